"""PostgreSQL that ends, restarts, is old or new or not there: one clear line, nothing lost, nobody's work taken twice."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx2 as httpx
import pytest
from child_processes import SERVER_COMMAND, minimal_environment
from conftest import KEY, Clock, HeldClock, Open, PlainSimulator

from evolink_mcp.api.task import Task
from evolink_mcp.app.wiring import open_studio
from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.entry import UNCONFIRMED, Entry, new_key
from evolink_mcp.journal.journal import Notification
from evolink_mcp.teams.settings import TeamSettings

psycopg = pytest.importorskip("psycopg")

from evolink_mcp.teams.database import LOCKS, STOP_AFTER_S, Database, open_database  # noqa: E402
from evolink_mcp.teams.database_url import Address  # noqa: E402
from evolink_mcp.teams.orphans import TENANT, tenants_left  # noqa: E402
from evolink_mcp.teams.postgres import PostgresJournal  # noqa: E402
from evolink_mcp.teams.schema import MOVE_OLD_TABLES, OLD_TABLES, read_entries  # noqa: E402
from evolink_mcp.teams.studios import team_parts  # noqa: E402

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
WISH = {"prompt": "sim:fast a fox", "size": "1024x640", "quality": "low"}
SLOW = {**WISH, "prompt": "a fox"}
SECRET = "s" * 32


def entry(journal: PostgresJournal, **more: Any) -> Entry:
    return Entry(**{"key": new_key(), "owner": journal.owner, "phase": "intent", "created_at": 1.0, "account": "a1",
                    **more})  # fmt: skip


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await anyio.sleep(0.01)


@pytest.fixture
def url(cluster: Any) -> str:
    return cluster.database()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers stop their work when the database has been gone for seconds, as they do outside of tests."""
    monkeypatch.setitem(Database.__init__.__kwdefaults__, "stop_after_s", STOP_AFTER_S)


@pytest.fixture
async def opened(url: str) -> AsyncIterator[Callable[..., Any]]:
    """Servers of a team, each with a session of its own."""
    async with AsyncExitStack() as stack:

        async def server(**more: Any) -> PostgresJournal:
            return PostgresJournal(await stack.enter_async_context(open_database(url, **more)), "a1")

        yield server


def name_of(url: str) -> str:
    return url.partition("@/")[2].partition("?")[0]


def cut(cluster: Any, url: str) -> None:
    """End every session of this database, as a restart or a broken network does."""
    with cluster.admin() as db:
        db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()",
            (name_of(url),),
        )


def ended(db: Any, journal: PostgresJournal) -> None:
    """Wait until PostgreSQL has seen the end of its session."""
    db.execute("SELECT pg_advisory_xact_lock_shared(%s, %s)", (LOCKS, int(journal.owner.removeprefix("server-"))))


# --- a server lives ---


async def test_what_a_dead_server_worked_on_is_taken_over_after_a_while_and_not_before(
    opened: Any, cluster: Any, url: str
) -> None:
    dead, heir = await opened(), await opened()
    await dead.intend(left := entry(dead, caller=dead.owner))
    assert await heir.adopt() == []
    await dead.database.close()  # its session ends; nothing was released
    with cluster.admin(name_of(url)) as db:
        ended(db, dead)
        assert await heir.adopt() == []
        assert await heir.acquire(left.key) is False
        db.execute("UPDATE evolink_servers SET gone_since = gone_since - interval '3 seconds'")
        assert await heir.acquire(left.key) is False
        db.execute("UPDATE evolink_servers SET gone_since = gone_since - interval '1 second'")
    assert await heir.adopt() == [replace(left, owner=heir.owner, caller="")]


async def test_a_closed_journal_hears_nothing_and_is_told_nothing(opened: Any) -> None:
    """Servers of people who stay away are closed: nothing of them may stay behind."""
    journal = await opened()
    journal.listen(lambda news: None)
    ender = journal.listen(lambda news: None)
    journal.when_lost(lambda: None)
    ender()
    await journal.close()
    assert (journal.database._listeners, journal.database._stops) == ([], [])


async def test_tenants_whose_server_has_died_are_found_by_others(opened: Any, cluster: Any, url: str) -> None:
    """Nobody may ever call for them again, and their pictures are paid."""
    dead, heir = await opened(), await opened()
    await dead.save_fact(TENANT, "anna at https://login.example.org")
    await dead.intend(entry(dead))
    assert await tenants_left(heir.database, []) == {}  # somebody works on it
    await dead.database.close()
    with cluster.admin(name_of(url)) as db:
        ended(db, dead)
        assert await tenants_left(heir.database, []) == {}
        db.execute("UPDATE evolink_servers SET gone_since = clock_timestamp() - interval '1 minute' WHERE true")
    assert await tenants_left(heir.database, ["another"]) == {"a1": "anna at https://login.example.org"}
    assert await tenants_left(heir.database, ["a1"]) == {}


async def test_a_call_of_a_server_that_is_not_heard_from_waits_for_nothing(opened: Any, cluster: Any, url: str) -> None:
    """Its client calls again by another server, long before that one may take the work over."""
    one, other = await opened(stop_after_s=600.0), await opened(stop_after_s=600.0)  # neither beats meanwhile
    await one.intend(mine := entry(one, caller=one.owner, fingerprint="f"))
    assert (await other.undelivered(("f",), 0), await other.claim(mine.key)) == ([], False)
    assert (await other.is_awaited(("f",), 0), await one.is_awaited(("f",), 0)) == (True, False)
    with cluster.admin(name_of(url)) as db:
        db.execute("UPDATE evolink_servers SET seen_at = seen_at - interval '1 hour'")
        assert await other.undelivered(("f",), 0) == [mine]
        db.execute("UPDATE evolink_servers SET seen_at = clock_timestamp() + interval '1 minute'")
        assert await other.undelivered(("f",), 0) == []
        await one.database.close()
        with db.transaction():  # somebody else asks at the same moment
            ended(db, one)
            assert await other.undelivered(("f",), 0) == [mine]
            assert await other.claim(mine.key, one.owner) is True
        assert await other.acquire(mine.key) is False
    third = await opened()
    assert await third.undelivered(("f",), 0) == []


async def test_a_session_that_is_cut_comes_back_and_nobody_has_taken_anything(
    opened: Any, cluster: Any, url: str
) -> None:
    one, other = await opened(), await opened()
    stopped: list[str] = []
    one.when_lost(lambda: stopped.append("one"))
    await one.intend(mine := entry(one))
    before = one.owner
    cut(cluster, url)
    await until(lambda: one.database._session is None)
    await until(lambda: one.database._session is not None and other.database._session is not None)
    assert (one.database.alive, one.owner, stopped) == (True, before, [])
    assert await other.adopt() == []
    assert await one.update(replace(mine, phase="sending")) is True
    with cluster.admin(name_of(url)) as db:
        assert db.execute("SELECT count(*) FROM evolink_servers WHERE gone_since IS NOT NULL").fetchone() == (0,)


async def test_a_server_without_its_database_stops_buys_nothing_and_goes_on_when_it_is_back(
    opened: Any, cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    one = await opened(stop_after_s=0.6)
    stopped: list[str] = []
    one.when_lost(lambda: stopped.append("one"))
    await one.intend(mine := entry(one))
    cluster.stop()
    stopped.clear()
    try:
        await until(lambda: stopped)
        assert one.database.alive is False
        with pytest.raises(JournalUnwritable, match=r"the session with it was lost.*EVOLINK_MCP_DATABASE_URL"):
            await one.intend(entry(one))
    finally:
        await anyio.to_thread.run_sync(cluster.start)
    await until(lambda: one.database.alive)
    assert await one.by_key(mine.key) == mine
    assert await one.acquire(mine.key) is True
    assert {record.message for record in caplog.records if record.levelno == logging.ERROR} == {
        "the database has not answered for 1 s, this server stops its work"
    }


async def test_a_hanging_former_session_is_ended_and_the_lock_is_held_again(opened: Any) -> None:
    one = await opened()
    hanging = one.database._session  # it stands there, and nobody hears it any more
    one.database._session = None
    one.database._heartbeat.cancel()
    one.database._heartbeat = asyncio.create_task(one.database._run_session())
    await until(lambda: one.database._session is not None)
    with pytest.raises(psycopg.OperationalError):
        await hanging.execute("SELECT 1")
    await hanging.close()
    assert one.database.alive


async def test_changes_are_told_to_the_other_servers_of_the_account(opened: Any, url: str) -> None:
    one, other = await opened(), await opened()
    async with open_database(url) as third:
        told: list[tuple[str, Notification]] = []
        for name, journal in (("one", one), ("other", other), ("b2", PostgresJournal(third, "b2"))):
            journal.listen(lambda news, name=name: told.append((name, news)))
        await one.intend(mine := entry(one))
        task = Task("task-unified-1", "pending")
        await one.update(replace(mine, phase="submitted", task=task))
        await one.release(mine.key)
        progress = Notification(mine.key, task.id, replace(task, progress=40.0))
        await one.publish(progress)
        await one.publish(Notification(mine.key, task.id, replace(task, results=("https://x.example/" + "x" * 9000,))))
        await one.database.run(lambda db: db.execute("SELECT pg_notify('evolink_mcp', 'a1 nonsense')"))
        await one.database.run(lambda db: db.execute("SELECT pg_notify('evolink_mcp', 'a1 {\"task\": {\"x\": 1}}')"))
        await other.publish(Notification(call=("session x", 7)))
        await PostgresJournal(other.database, "b2").publish(Notification("for b2 only"))
        await until(lambda: len(told) == 6)
    changed = Notification(mine.key, task.id)
    assert [news for name, news in told if name == "other"] == [
        Notification(mine.key), changed, changed, progress
    ]  # fmt: skip
    assert [news for name, news in told if name == "b2"] == [Notification("for b2 only")]
    assert [news for name, news in told if name == "one"] == [Notification(call=("session x", 7))]


async def test_a_studio_that_is_closed_hears_nothing_more(opened: Any, url: str, tmp_path: Path) -> None:
    """Its server lives on, and other tenants' studios with it."""
    settings = TeamSettings.from_environment({
        "EVOLINK_API_KEY": KEY, "EVOLINK_MCP_DATABASE_URL": url, "EVOLINK_MCP_SECRET": SECRET,
        "EVOLINK_MCP_DATA_DIR": str(tmp_path), "EVOLINK_MCP_OUTPUT_DIR": str(tmp_path),
    })  # fmt: skip
    other = await opened()
    async with open_database(url) as database:
        async with open_studio(settings, team_parts(settings, database)) as studio:
            neighbour = PostgresJournal(other.database, studio.journal.account)
        heard: list[Notification] = []
        PostgresJournal(database, studio.journal.account).listen(heard.append)
        await neighbour.publish(Notification("evomcp-1", "task-unified-1"))
        await neighbour.publish(Notification("evomcp-1", "task-unified-1", is_callback=True))
        await until(lambda: len(heard) == 2)
        assert database._heartbeat is not None
        assert not database._heartbeat.done()


# --- what is true ---


@pytest.mark.parametrize("guess", [None, "task-unified-guess"])
async def test_an_id_that_was_told_is_written_even_if_another_server_has_taken_the_entry(
    opened: Any, guess: str | None
) -> None:
    one, other = await opened(), await opened()
    await one.intend(mine := entry(one))
    await one.update(sent := replace(mine, phase="sending"))
    await one.release(mine.key)
    assert await other.acquire(mine.key)
    taken = replace(sent, owner=other.owner)
    if guess is not None:
        taken = replace(taken, phase="submitted", task=Task(guess, "pending"), error=UNCONFIRMED)
    assert await other.update(taken)
    told = replace(sent, phase="submitted", task=Task("task-unified-told", "pending"))
    assert await one.update(told) is True
    assert await one.by_key(mine.key) == told
    assert await other.update(replace(taken, phase="unknown")) is False


async def test_what_another_server_knows_for_certain_is_not_overwritten(opened: Any) -> None:
    one, other = await opened(), await opened()
    await one.intend(mine := entry(one))
    await one.release(mine.key)
    assert await other.acquire(mine.key)
    known = replace(mine, owner=other.owner, phase="submitted", task=Task("task-unified-known", "completed"))
    assert await other.update(known)
    assert await one.update(replace(mine, phase="submitted", task=Task("task-unified-other", "pending"))) is False
    assert await one.update(replace(mine, phase="sending")) is False
    assert await one.by_key(mine.key) == known


async def test_what_is_asked_for_one_entry_happens_in_that_order(opened: Any) -> None:
    """A caller that is cancelled leaves a write behind: what is written after it must not come before it."""
    database = (await opened()).database
    done: list[str] = []

    async def slow(_: Any) -> None:
        await anyio.sleep(0.1)
        done.append("slow")

    async def quick(_: Any) -> None:
        done.append("quick")

    with anyio.move_on_after(0.01) as scope:
        await database.run(slow, key="a")
    await database.run(quick, key="b")
    await database.run(quick, key="a")
    assert (scope.cancelled_caught, done) == (True, ["quick", "slow", "quick"])


async def test_many_servers_together_stay_below_the_days_cap(url: str) -> None:
    bought: list[float | None] = []

    async def buys() -> None:
        async with open_database(url) as database:
            journal = PostgresJournal(database, "a1")
            bought.extend([await journal.intend(entry(journal, estimate=1.0), cap=50.0) for _ in range(20)])

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(buys)
    assert bought.count(None) == 50


# --- its tables ---


async def test_servers_that_start_together_make_the_tables_once(url: str, cluster: Any) -> None:
    numbers: set[str] = set()

    async def starts() -> None:
        async with open_database(url) as database:
            numbers.add(database.owner)

    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(starts)
    assert len(numbers) == 6
    with cluster.admin(name_of(url)) as db:
        assert db.execute("SELECT version FROM evolink_version").fetchall() == [(1,)]


async def test_tables_of_a_newer_version_are_left_alone(url: str, cluster: Any) -> None:
    async with open_database(url):
        pass
    with cluster.admin(name_of(url)) as db:
        db.execute("UPDATE evolink_version SET version = 99")
        with pytest.raises(JournalUnwritable, match="of version 99 and this program knows 1: a newer version"):
            await Database(url).open()
        assert db.execute("SELECT version FROM evolink_version").fetchall() == [(99,)]


async def test_tables_of_an_unpublished_build_are_refused_with_the_statements_that_move_them_away(
    url: str, cluster: Any
) -> None:
    with cluster.admin(name_of(url)) as db:
        for name in OLD_TABLES:
            db.execute(f"CREATE TABLE {name} (version INTEGER NOT NULL)")
        with pytest.raises(JournalUnwritable, match="an unpublished build made its tables; move them away") as refused:
            await Database(url).open()
        with pytest.raises(JournalUnwritable, match="an unpublished build made its tables; move them away"):
            read_entries(url, 5)
        for statement in MOVE_OLD_TABLES.split("; "):
            assert statement in refused.value.message
            db.execute(statement)
    async with open_database(url) as database:
        journal = PostgresJournal(database, "a1")
        await journal.intend(mine := entry(journal))
        assert await journal.recent(5) == [mine]


# --- an address that is wrong ---


def silent_port() -> int:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return closed.getsockname()[1]


@pytest.mark.parametrize("command", [[], ["http", "--port", "0"], ["tasks"]])
@pytest.mark.parametrize("wrong", ["nobody listens", "no such database", "no address"])
async def test_a_database_that_cannot_be_used_ends_the_start_in_one_line(
    command: list[str], wrong: str, cluster: Any, tmp_path: Path
) -> None:
    address = {
        "nobody listens": f"postgresql://team:canary-word@127.0.0.1:{silent_port()}/evolink",
        "no such database": cluster.url("nowhere").replace("postgres@", "postgres:canary-word@"),
        "no address": "postgresql://team:canary-word@127.0.0.1/evolink?canary-word=1",
    }[wrong]
    env = minimal_environment(tmp_path, EVOLINK_MCP_DATABASE_URL=address, EVOLINK_MCP_SECRET=SECRET,
                           EVOLINK_API_KEY="sk-canary-0123456789", EVOLINK_BASE_URL="http://127.0.0.1:9")  # fmt: skip
    # The host keeps stdin open.
    async with await anyio.open_process([*SERVER_COMMAND, *command], env=env) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said = b"".join([chunk async for chunk in process.stderr]).decode()
        assert (await process.wait(), [chunk async for chunk in process.stdout]) == (1, [])
    lines = [line for line in said.splitlines() if line]
    assert len(lines) == 1, said
    assert "EVOLINK_MCP_DATABASE_URL" in lines[0]
    assert "canary-word" not in said


@pytest.mark.parametrize("command", ["", "http", "sse", "tasks", "open", "sheet", "doctor"])
@pytest.mark.parametrize("address", ["team:canary/word@db.example.com/x", "team:canary@word@db.example.com/x"])
async def test_no_command_shows_a_part_of_an_ambiguous_address(command: str, address: str, tmp_path: Path) -> None:
    env = minimal_environment(tmp_path, EVOLINK_MCP_DATABASE_URL=f"postgresql://{address}", EVOLINK_MCP_SECRET=SECRET)
    run = await anyio.run_process([*SERVER_COMMAND, *command.split()], env=env, check=False)
    text = (run.stdout + run.stderr).decode()
    assert run.returncode == (1 if command == "doctor" else 2)
    assert text.count("EVOLINK_MCP_DATABASE_URL is ambiguous") == 1
    assert [part for part in ("canary", "word@", "db.example") if part in text] == []


async def test_a_reason_that_quotes_the_password_is_shown_without_it() -> None:
    address = Address.of("postgresql://team:p%40ss-word@db.example.com/evolink?sslpassword=key-word")
    error = psycopg.OperationalError('connection refused: sent "p@ss-word" and "key-word"\nmore')
    assert address.reason(error) == 'connection refused: sent "***" and "***"'
    assert "ss-word" not in repr(address)
    assert "key-word" not in repr(address)


async def test_a_password_that_is_also_the_name_of_the_user_leaves_a_reason_readable() -> None:
    address = Address.of("postgresql://evolink:evolink@db.example.com/evolink")
    error = psycopg.OperationalError('role "evolink" does not exist')
    assert address.reason(error) == 'role "evolink" does not exist'


async def test_a_server_says_whether_it_can_do_paid_work(cluster: Any, url: str, tmp_path: Path) -> None:
    port = silent_port()
    env = minimal_environment(tmp_path, EVOLINK_MCP_DATABASE_URL=url, EVOLINK_MCP_SECRET=SECRET,
                           EVOLINK_API_KEY="sk-canary-0123456789", EVOLINK_BASE_URL="http://127.0.0.1:9")  # fmt: skip
    command = [*SERVER_COMMAND, "http", "--port", str(port)]
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http,
        await anyio.open_process(command, env=env, stdin=-3, stdout=-3, stderr=-3) as server,
    ):

        async def says(path: str, *wanted: Any) -> dict[str, Any]:
            while True:
                try:
                    told = await http.get(path)
                except httpx.TransportError:
                    await anyio.sleep(0.05)
                    continue
                if (told.status_code, told.json()["status"]) == wanted:
                    return told.json()
                await anyio.sleep(0.05)

        await says("/readyz", 200, "ok")
        cluster.stop()
        try:
            assert (await says("/readyz", 503, "not ready"))["why"] == "the database does not answer"
            await says("/healthz", 200, "ok")
        finally:
            await anyio.to_thread.run_sync(cluster.start)
        await says("/readyz", 200, "ok")
        server.terminate()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"EVOLINK_MCP_DATABASE_URL": "mysql://x/y", "EVOLINK_MCP_SECRET": SECRET}, "must begin with postgresql://"),
        ({"EVOLINK_MCP_DATABASE_URL": "postgresql:///x"}, "needs EVOLINK_MCP_SECRET"),
        ({"EVOLINK_MCP_DATABASE_URL": "postgresql:///x", "EVOLINK_MCP_SECRET": "short"}, "32 characters or more"),
    ],
)
async def test_a_setting_that_cannot_be_used_is_named(settings: dict[str, str], told: str, tmp_path: Path) -> None:
    run = await anyio.run_process(SERVER_COMMAND, env=minimal_environment(tmp_path, **settings), check=False)
    assert (run.returncode, told in run.stderr.decode(), "short" in run.stderr.decode()) == (2, True, False)


# --- an order meets it ---


@pytest.fixture
def in_postgres(open_world: Open, url: str) -> Callable[..., Any]:
    team = {"EVOLINK_MCP_DATABASE_URL": url, "EVOLINK_MCP_SECRET": SECRET}
    return lambda **more: open_world(team, **more)


@pytest.mark.usefixtures("impatient")
async def test_an_id_that_came_while_the_database_was_gone_is_delivered_and_written_later(
    in_postgres: Any, cluster: Any
) -> None:
    clock = Clock()

    class EndsTheDatabase(PlainSimulator):
        def create(self, *args: Any, **more: Any) -> Any:
            reply = super().create(*args, **more)
            cluster.stop()
            return reply

    simulator = EndsTheDatabase(clock=clock, duration_s=0)
    async with in_postgres(simulator=simulator, clock=clock) as world, world.client() as client:
        answer = await client.call_tool("generate_image", WISH)
        facts = answer.structured_content
        assert (facts["status"], facts["charged"]) == ("completed", "yes")
        refused = await client.call_tool("generate_image", {**WISH, "prompt": "another"})
        assert refused.structured_content["error"]["code"] == "journal_unwritable"
        assert (await client.call_tool("compute_size", {"size": "16:9"})).is_error is False
        await anyio.to_thread.run_sync(cluster.start)
        while not (found := await _entry_of(world.studio, facts["task_id"])):
            await anyio.sleep(0.05)
        assert (found.phase, found.charged) == ("submitted", "yes")
        assert world.posts == 1


@pytest.mark.usefixtures("impatient")
async def test_an_id_that_is_not_written_down_yet_is_not_forgotten_when_the_server_stops(
    in_postgres: Any, cluster: Any
) -> None:
    """What the journal has of it is older: the request is on its way, nobody knows of a task."""
    clock = HeldClock()
    clock.is_held = True

    class EndsTheDatabase(PlainSimulator):
        def create(self, *args: Any, **more: Any) -> Any:
            reply = super().create(*args, **more)
            cluster.stop()
            return reply

    async def never(_: float) -> None:
        await anyio.sleep_forever()

    simulator = EndsTheDatabase(clock=clock, duration_s=3600)
    async with in_postgres(simulator=simulator, clock=clock, pause=never) as world, world.client() as client:
        facts = (await client.call_tool("generate_image", {**SLOW, "wait_seconds": 0})).structured_content
        (job,) = world.studio.jobs
        world.studio.journal.database._lost()
        await until(lambda: job.has_remote_owner)
        await anyio.to_thread.run_sync(cluster.start)
        await until(lambda: world.studio.journal.database.alive)
        job.wake()
        await until(lambda: job.following_scope or job.is_finished)
        assert (job.entry.phase, job.entry.task_id, job.entry.is_unconfirmed) == ("submitted", facts["task_id"], False)
        await world.studio.flush()
        found = await _entry_of(world.studio, facts["task_id"])
    assert found is not None
    assert (found.phase, found.is_unconfirmed, world.posts) == ("submitted", False, 1)


async def _entry_of(studio: Any, task_id: str) -> Entry | None:
    try:
        return await studio.journal.by_task(task_id)
    except JournalUnwritable:
        return None


async def test_another_servers_result_comes_at_once(in_postgres: Any) -> None:
    """A watcher is told of the change; it does not wait for its next look."""
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=3600)

    async def never(_: float) -> None:
        await anyio.sleep_forever()

    async with in_postgres(simulator=simulator, clock=clock) as one:
        async with one.client() as client:
            bought = (await client.call_tool("generate_image", {**SLOW, "wait_seconds": 0})).structured_content
        async with in_postgres(simulator=simulator, clock=clock, pause=never) as other, other.client() as client:
            got: list[Any] = []

            async def asks() -> None:
                got.append(await client.call_tool("get_task", {"task_id": bought["task_id"], "wait_seconds": 600}))

            async with anyio.create_task_group() as group:
                group.start_soon(asks)
                await until(lambda: other.studio.jobs)
                for task in simulator.tasks.values():
                    task.duration = 0
            assert got[0].structured_content["status"] == "completed"
    assert one.posts == 1


@pytest.mark.usefixtures("impatient")
async def test_a_server_that_may_be_taken_for_dead_stops_what_it_works_on(
    in_postgres: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=3600)
    async with in_postgres(simulator=simulator, clock=clock) as world, world.client() as client:
        journal = world.studio.journal
        await client.call_tool("generate_image", {**SLOW, "wait_seconds": 0})
        (job,) = world.studio.jobs
        await until(lambda: job.following_scope)

        async def taken(_: str) -> bool:
            return False

        monkeypatch.setattr(journal, "acquire", taken)
        journal.database._lost()
        await until(lambda: job.has_remote_owner)
        assert (job.following_scope, job.is_finished) == (None, False)
        monkeypatch.undo()
        await until(lambda: journal.database.alive)
        job.wake()
        await until(lambda: job.following_scope)
        assert not job.has_remote_owner


async def test_progress_and_changes_reach_who_watches_at_another_server(
    in_postgres: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = HeldClock()
    clock.is_held = True
    simulator = PlainSimulator(clock=clock, duration_s=3600)

    async def never(_: float) -> None:
        await anyio.sleep_forever()

    async with (
        in_postgres(simulator=simulator, clock=clock) as one,
        in_postgres(simulator=simulator, clock=clock, pause=never) as other,
        one.client() as buyer,
        other.client() as watcher,
    ):
        changed: list[str] = []
        seen: set[float | None] = set()

        async def hears(task_id: str) -> None:
            changed.append(task_id)
            seen.update(job.entry.task.progress for job in other.studio.jobs if job.entry.task)

        other.studio.subscribe(hears)
        bought = (await buyer.call_tool("generate_image", {**SLOW, "wait_seconds": 0})).structured_content
        await until(lambda: bought["task_id"] in changed)
        looks: list[str] = []
        look = other.studio.client.task

        async def counted(task_id: str) -> Task:
            looks.append(task_id)
            return await look(task_id)

        monkeypatch.setattr(other.studio.client, "task", counted)

        answers: list[Any] = []

        async def asks() -> None:
            answers.append(await watcher.call_tool("get_task", {"task_id": bought["task_id"], "wait_seconds": 600}))

        async with anyio.create_task_group() as group:
            group.start_soon(asks)
            await until(lambda: looks)
            clock.is_held = False
            clock.release.set()
    (answer,) = answers
    assert answer.structured_content["status"] == "completed"
    assert len(looks) <= 1  # all that it knows later, the other server has told it
    assert len(seen) > 3
