"""PostgreSQL that ends, restarts, is missing or has another version: no task is lost, and no two servers work on one entry."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx2 as httpx
import pytest
from child_processes import SERVER_COMMAND, minimal_environment, open_http_server, patient_times
from conftest import KEY, Clock, HeldClock, Open, PlainSimulator

from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.api.task import Task
from evolink_mcp.app.wiring import open_studio
from evolink_mcp.call_context import due_within
from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.all_profiles import Orphan, release_dead_servers
from evolink_mcp.journal.entry import UNCONFIRMED, Entry, new_key
from evolink_mcp.journal.journal import DailyLimitReached, Notification
from evolink_mcp.studio.jobs import ImageRequest
from evolink_mcp.teams.settings import TeamSettings

psycopg = pytest.importorskip("psycopg")

from psycopg.conninfo import conninfo_to_dict  # noqa: E402

from evolink_mcp.teams.database import Database, open_database  # noqa: E402
from evolink_mcp.teams.database_url import DEFAULT_TIMES, Address  # noqa: E402
from evolink_mcp.teams.lease import LOCKS  # noqa: E402
from evolink_mcp.teams.postgres import PostgresBackend, PostgresJournal  # noqa: E402
from evolink_mcp.teams.request_rates import RequestRates  # noqa: E402
from evolink_mcp.teams.schema import COMPATIBLE_WITH, MOVE_OLD_TABLES, OLD_TABLES, VERSIONS, read_entries  # noqa: E402
from evolink_mcp.teams.studios import team_parts  # noqa: E402

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
REQUEST = {"prompt": "sim:fast a fox", "size": "1024x640", "quality": "low"}
SLOW = {**REQUEST, "prompt": "a fox"}
SECRET = "s" * 32
PATIENT = patient_times()


def entry(journal: PostgresJournal, **fields: Any) -> Entry:
    return Entry(**{"key": new_key(), "owner": journal.owner, "phase": "intent", "created_at": 1.0, "account": "a1",
                    **fields})  # fmt: skip


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await anyio.sleep(0.01)


@pytest.fixture
def url(cluster: Any) -> str:
    return cluster.database()


@pytest.fixture
async def open_journal(url: str) -> AsyncIterator[Callable[..., Any]]:
    """Return a function that opens the journal of another server, with its own session. `times` are in DatabaseTimes."""
    async with AsyncExitStack() as stack:

        async def open_server(**times: float) -> PostgresJournal:
            database = await stack.enter_async_context(open_database(url, patient_times(**times)))
            return PostgresJournal(database, "a1")

        yield open_server


def name_of(url: str) -> str:
    return url.partition("@/")[2].partition("?")[0]


def end_sessions(cluster: Any, url: str) -> None:
    """End every session of this database, as a restart or a broken network does."""
    with cluster.admin() as db:
        db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()",
            (name_of(url),),
        )


def wait_for_session_end(db: Any, journal: PostgresJournal) -> None:
    """Wait until PostgreSQL has ended the session of this server."""
    db.execute("SELECT pg_advisory_xact_lock_shared(%s, %s)", (LOCKS, int(journal.owner.removeprefix("server-"))))


# --- owners ---


async def test_the_entries_of_a_dead_server_are_adopted_after_the_grace_time_and_not_before(
    open_journal: Any, cluster: Any, url: str
) -> None:
    dead, successor = await open_journal(), await open_journal()
    await dead.intend(orphan := entry(dead, caller=dead.owner))
    assert await successor.adopt() == []
    await dead.database.close()  # the session ends and releases no entry
    with cluster.admin(name_of(url)) as db:
        wait_for_session_end(db, dead)
        assert await successor.adopt() == []
        assert await successor.acquire(orphan.key) is False
        db.execute("UPDATE evolink_servers SET gone_since = gone_since - interval '3 seconds'")
        assert await successor.acquire(orphan.key) is False
        db.execute("UPDATE evolink_servers SET gone_since = gone_since - interval '1 second'")
    assert await successor.adopt() == [replace(orphan, owner=successor.owner, caller="")]


async def test_a_frozen_server_loses_its_entries_after_its_deadline_and_its_late_writes_change_nothing(
    open_journal: Any, cluster: Any, url: str
) -> None:
    """Its session stays open, and no heartbeat comes."""
    frozen, successor = await open_journal(), await open_journal(grace_s=0.0)
    await frozen.intend(orphan := entry(frozen, caller=frozen.owner))
    former_owner = frozen.owner
    with cluster.admin(name_of(url)) as db:
        move_deadline = "UPDATE evolink_servers SET lease_until = clock_timestamp() + %s * interval '1 second'"
        db.execute(move_deadline, (60,))
        assert await successor.adopt() == []
        db.execute(move_deadline, (-1,))
        new_journal = await open_journal()
        assert await new_journal.adopt() == []  # after an outage of the database, the others may be about to reconnect
        assert await successor.adopt() == [replace(orphan, owner=successor.owner, caller="")]
        assert await frozen.update(replace(orphan, phase="sending")) is False
        assert await frozen.acquire(orphan.key) is False
        assert await successor.by_key(orphan.key) == replace(orphan, owner=successor.owner, caller="")
        # A late heartbeat does not bring the lease back.
        end_sessions(cluster, url)
    await until(lambda: frozen.owner != former_owner and frozen.has_lease)
    await frozen.intend(new_entry := entry(frozen))
    assert (await frozen.by_key(new_entry.key)).owner == frozen.owner
    assert await successor.adopt() == []


async def test_a_state_without_a_task_never_replaces_a_certain_task(open_journal: Any) -> None:
    """Another server may have recorded the task while this one searched for it."""
    journal = await open_journal()
    await journal.intend(own_entry := entry(journal))
    certain = replace(own_entry, phase="submitted", task=Task("task-unified-1", "pending"))
    assert await journal.update(certain) is True
    assert await journal.update(replace(own_entry, phase="unknown")) is False
    assert await journal.by_key(own_entry.key) == certain
    unconfirmed = replace(certain, error=UNCONFIRMED)
    assert await journal.update(unconfirmed) is True
    assert await journal.update(replace(own_entry, phase="unknown")) is True


async def test_a_closed_journal_has_no_callback(open_journal: Any) -> None:
    """The server of a team closes the studio of an idle tenant and continues with the same database."""
    journal = await open_journal()
    journal.listen(lambda notification: None)
    stop_listening = journal.listen(lambda notification: None)
    journal.when_lost(lambda: None)
    assert journal.database.listener_count == 3
    stop_listening()
    await journal.close()
    assert journal.database.listener_count == 0


async def orphans_at(journal: PostgresJournal) -> list[Orphan]:
    backend = PostgresBackend(journal.database)
    return await backend.run(lambda db: release_dead_servers(db, journal.owner))


async def test_other_servers_find_the_entries_of_a_dead_server_in_all_profiles(
    open_journal: Any, cluster: Any, url: str
) -> None:
    """Their images are paid, and the tenants may never call again."""
    server, successor = await open_journal(), await open_journal()
    dead = PostgresJournal(server.database, "a1", profile="anna at https://login.example.org")
    await dead.intend(orphan := entry(dead))
    assert await orphans_at(successor) == []  # a live server owns it
    await dead.database.close()
    with cluster.admin(name_of(url)) as db:
        wait_for_session_end(db, dead)
        assert await orphans_at(successor) == []
        db.execute("UPDATE evolink_servers SET gone_since = clock_timestamp() - interval '1 minute' WHERE true")
    assert await orphans_at(successor) == [Orphan(dead.profile, "a1", orphan.key, dead.owner)]
    assert await orphans_at(successor) == [Orphan(dead.profile, "a1", orphan.key, "")]


async def test_the_wait_of_a_dead_servers_call_ends_in_all_profiles_and_accounts(
    open_journal: Any, cluster: Any, url: str
) -> None:
    dead, successor = await open_journal(), await open_journal(grace_s=0.0)
    living = PostgresJournal(successor.database, "b2", profile="bert")
    await living.intend(awaited_entry := entry(living, account="b2", caller=dead.owner, fingerprint="f"))
    await living.intend(own_entry := entry(living, account="b2", caller=living.owner))
    await dead.database.close()
    with cluster.admin(name_of(url)) as db:
        wait_for_session_end(db, dead)
    assert await orphans_at(successor) == []
    assert await living.by_key(awaited_entry.key) == replace(awaited_entry, caller="")
    assert await living.by_key(own_entry.key) == own_entry
    assert await living.claim(awaited_entry.key) is True


async def test_a_caller_of_a_silent_server_gets_the_result_from_another_server(
    open_journal: Any, cluster: Any, url: str
) -> None:
    """The client calls again at another server, long before that server may adopt the entry."""
    first, second = (
        await open_journal(stop_after_s=600.0),
        await open_journal(stop_after_s=600.0),
    )  # no heartbeat during the test
    await first.intend(own_entry := entry(first, caller=first.owner, fingerprint="f"))
    assert ((await second.undelivered(("f",), 0)).entries, await second.claim(own_entry.key)) == ([], False)
    assert [(await server.undelivered(("f",), 0)).is_awaited for server in (second, first)] == [True, False]
    with cluster.admin(name_of(url)) as db:
        db.execute("UPDATE evolink_servers SET seen_at = seen_at - interval '1 hour'")
        assert (await second.undelivered(("f",), 0)).entries == [own_entry]
        db.execute("UPDATE evolink_servers SET seen_at = clock_timestamp() + interval '1 minute'")
        assert (await second.undelivered(("f",), 0)).entries == []
        await first.database.close()
        with db.transaction():  # a third server tests the lease at the same moment
            wait_for_session_end(db, first)
            assert (await second.undelivered(("f",), 0)).entries == [own_entry]
            assert await second.claim(own_entry.key, first.owner) is True
        assert await second.acquire(own_entry.key) is False
    third = await open_journal()
    assert (await third.undelivered(("f",), 0)).entries == []


async def test_a_server_that_reconnects_hides_no_entry_behind_a_call_that_ended_meanwhile(
    open_journal: Any, cluster: Any, url: str
) -> None:
    """The end of the call was not recorded without the database, and the client calls again at another server."""
    first, second = await open_journal(), await open_journal()
    await first.intend(own_entry := entry(first, caller=first.owner, fingerprint="f"))
    await second.intend(other_entry := entry(second, caller=second.owner))
    with cluster.admin(name_of(url)) as db:
        number = int(first.owner.removeprefix("server-"))
        db.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE classid = %s AND objid = %s", (LOCKS, number))
    await until(lambda: not first.database.has_session)
    await until(lambda: first.database.has_session)
    undelivered = await second.undelivered(("f",), 0)
    assert (undelivered.entries, undelivered.is_awaited) == ([replace(own_entry, caller="")], False)
    assert await first.by_key(other_entry.key) == other_entry


async def test_a_server_reopens_a_lost_session_and_keeps_its_entries(open_journal: Any, cluster: Any, url: str) -> None:
    first, second = await open_journal(), await open_journal()
    stops: list[str] = []
    first.when_lost(lambda: stops.append("one"))
    await first.intend(own_entry := entry(first))
    before = first.owner
    end_sessions(cluster, url)
    await until(lambda: not first.database.has_session)
    await until(lambda: first.database.has_session and second.database.has_session)
    assert (first.database.is_alive, first.owner, stops) == (True, before, [])
    assert await second.adopt() == []
    assert await first.update(replace(own_entry, phase="sending")) is True
    with cluster.admin(name_of(url)) as db:
        assert db.execute("SELECT count(*) FROM evolink_servers WHERE gone_since IS NOT NULL").fetchone() == (0,)


async def test_a_server_stops_its_work_without_the_database_and_continues_with_it(
    open_journal: Any, cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first = await open_journal(stop_after_s=0.6)
    stops: list[str] = []
    first.when_lost(lambda: stops.append("one"))
    await first.intend(own_entry := entry(first))
    cluster.stop()
    stops.clear()
    try:
        await until(lambda: stops)
        assert first.database.is_alive is False
        with pytest.raises(JournalUnwritable, match=r"the session with it was lost.*EVOLINK_MCP_DATABASE_URL"):
            await first.intend(entry(first))
    finally:
        await anyio.to_thread.run_sync(cluster.start)
    await until(lambda: first.database.is_alive)
    assert await first.by_key(own_entry.key) == own_entry
    assert await first.acquire(own_entry.key) is True
    assert {record.message for record in caplog.records if record.levelno == logging.ERROR} == {
        "the database has not answered for 1 s, this server stops its work"
    }


class FreezingProxy:
    """A TCP proxy for PostgreSQL. It can stop to forward its first connection, which is the server's session."""

    def __init__(self, url: str) -> None:
        self.is_frozen = False
        self.has_ended = asyncio.Event()  # PostgreSQL has closed the first connection
        self._address = conninfo_to_dict(url)
        self._count = 0
        self._pipes: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        """Yield the database URL of the proxy."""
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        address = self._address
        try:
            yield f"postgresql://{address['user']}@127.0.0.1:{port}/{address['dbname']}"
        finally:
            server.close()
            for pipe in self._pipes:
                pipe.cancel()
            await asyncio.gather(*self._pipes, return_exceptions=True)
            for writer in self._writers:
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_session = self._count == 0
        self._count += 1
        path = f"{self._address['host']}/.s.PGSQL.{self._address.get('port', 5432)}"
        from_database, to_database = await asyncio.open_unix_connection(path)
        self._writers += [writer, to_database]
        for pipe in (
            self._forward(reader, to_database, is_session=is_session),
            self._forward(from_database, writer, is_session=is_session, from_database=True),
        ):
            self._pipes.add(asyncio.create_task(pipe))

    async def _forward(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        is_session: bool,
        from_database: bool = False,
    ) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if not (is_session and self.is_frozen):
                    writer.write(data)
        if is_session and from_database:
            self.has_ended.set()
        if not (is_session and self.is_frozen):
            writer.close()


async def test_a_server_ends_its_former_session_and_takes_its_lease_again(url: str) -> None:
    """PostgreSQL does not notice a broken network, so the former session still holds the lease."""
    proxy = FreezingProxy(url)
    async with proxy.open() as proxy_url, open_database(proxy_url, patient_times(stop_after_s=0.6)) as database:
        owner = database.owner
        proxy.is_frozen = True
        await until(lambda: not database.has_session)
        await until(lambda: database.has_session)
        await proxy.has_ended.wait()
        await until(lambda: database.is_alive)
        assert database.owner == owner


async def test_the_heartbeats_exchange_the_requests_of_tenants(url: str) -> None:
    times = patient_times(stop_after_s=3.0)
    async with open_database(url, times) as first, open_database(url, times) as second:
        for database in (first, second):
            database.rates = RequestRates(default=5, clock=lambda: 6000.0)

        async def requests_in_table(tenant: str) -> int:
            rows = await first.run(lambda db: db.execute("SELECT * FROM evolink_requests WHERE tenant = %s", (tenant,)))
            row = await rows.fetchone()
            return 0 if row is None else row["requests"]

        async def is_allowed(database: Database, tenant: str, *, total: int) -> bool:
            """Make a request, and wait until the table has this total."""
            is_allowed = database.rates.failure(tenant, None) is None
            while await requests_in_table(tenant) < total:
                await anyio.sleep(0.01)
            return is_allowed

        assert [first.rates.failure("anna", None) is None for _ in range(2)] == [True, True]
        assert await is_allowed(first, "anna", total=3)
        assert await is_allowed(second, "anna", total=4)
        assert await is_allowed(second, "bert", total=1)  # a later heartbeat, so the answer for anna has arrived
        assert [second.rates.failure("anna", None) is None for _ in range(2)] == [True, False]


async def test_a_search_is_planned_for_its_word(open_journal: Any) -> None:
    """A prepared statement soon has one plan for all words, which reads every match of a frequent word."""
    journal = await open_journal()
    await journal.intend(entry(journal, request={"prompt": "a red fox"}))
    for words in [("fox",), ()] * 20:
        assert len(await journal.recent(5, words=words)) == 1
    prepared: set[str] = set()
    for _ in range(20):  # more than the connections of the pool
        rows = await journal.database.run(lambda db: db.execute("SELECT statement FROM pg_prepared_statements"))
        prepared.update(row["statement"] for row in await rows.fetchall())
    lists = [statement for statement in prepared if "ORDER BY created_at DESC" in statement]
    assert lists
    assert [statement for statement in lists if "words LIKE" in statement] == []


async def test_all_servers_have_the_time_of_the_database(url: str) -> None:
    async with open_database(url, PATIENT) as database:
        rows = await database.run(lambda db: db.execute("SELECT extract(epoch FROM clock_timestamp())::float8 AS now"))
        row = await rows.fetchone()
        assert row is not None
        assert abs(database.now() - row["now"]) < 60


async def test_the_other_servers_of_the_profile_receive_changes(open_journal: Any, url: str) -> None:
    first, second = await open_journal(), await open_journal()
    async with open_database(url, PATIENT) as third:
        deliveries: list[tuple[str, Notification]] = []
        for name, journal in (
            ("first", first),
            ("second", second),
            ("ben", PostgresJournal(third, "a1", profile="ben")),
        ):
            journal.listen(lambda notification, name=name: deliveries.append((name, notification)))
        await first.intend(own_entry := entry(first))
        task = Task("task-unified-1", "pending")
        await first.update(replace(own_entry, phase="submitted", task=task))
        await first.release(own_entry.key)
        progress = Notification(own_entry.key, task.id, replace(task, progress=40.0))
        await first.publish(progress)
        await first.publish(
            Notification(own_entry.key, task.id, replace(task, results=("https://x.example/" + "x" * 9000,)))
        )
        for message in ("nonsense", '{"task": {"x": 1}}'):
            payload = f"{first.channel} {message}"
            await first.database.run(
                lambda db, payload=payload: db.execute("SELECT pg_notify('evolink_mcp', %s)", (payload,))
            )
        await second.publish(Notification(call=("session x", 7)))
        ben = PostgresJournal(second.database, "a1", profile="ben")
        await ben.publish(Notification("for ben only"))
        await until(lambda: len(deliveries) == 4)
    # No call of another server can wait for a new entry.
    assert [notification for name, notification in deliveries if name == "second"] == [
        Notification(own_entry.key, task.id), progress
    ]  # fmt: skip
    assert [notification for name, notification in deliveries if name == "ben"] == [Notification("for ben only")]
    assert [notification for name, notification in deliveries if name == "first"] == [
        Notification(call=("session x", 7))
    ]


async def test_a_closed_studio_receives_no_notification(open_journal: Any, url: str, tmp_path: Path) -> None:
    """Its server continues, and so do the studios of other tenants."""
    settings = TeamSettings.from_environment({
        "EVOLINK_API_KEY": KEY, "EVOLINK_MCP_DATABASE_URL": url, "EVOLINK_MCP_SECRET": SECRET,
        "EVOLINK_MCP_DATA_DIR": str(tmp_path), "EVOLINK_MCP_OUTPUT_DIR": str(tmp_path),
    })  # fmt: skip
    second = await open_journal()
    async with open_database(url, PATIENT) as database:
        async with open_studio(settings, team_parts(settings, database)) as studio:
            neighbour = PostgresJournal(second.database, studio.journal.account)
        notifications: list[Notification] = []
        PostgresJournal(database, studio.journal.account).listen(notifications.append)
        await neighbour.publish(Notification("evomcp-1", "task-unified-1"))
        await neighbour.publish(Notification("evomcp-1", "task-unified-1", is_callback=True))
        await until(lambda: len(notifications) == 2)
        # An error in a listener would end the session's coroutine.
        await neighbour.publish(Notification("evomcp-2", "task-unified-2"))
        await until(lambda: len(notifications) == 3)


# --- contradicting writes ---


@pytest.mark.parametrize("guess", [None, "task-unified-guess"])
async def test_a_received_task_id_is_written_even_if_another_server_adopted_the_entry(
    open_journal: Any, guess: str | None
) -> None:
    first, second = await open_journal(), await open_journal()
    await first.intend(own_entry := entry(first))
    await first.update(sent_entry := replace(own_entry, phase="sending"))
    await first.release(own_entry.key)
    assert await second.acquire(own_entry.key)
    adopted_entry = replace(sent_entry, owner=second.owner)
    if guess is not None:
        adopted_entry = replace(adopted_entry, phase="submitted", task=Task(guess, "pending"), error=UNCONFIRMED)
    assert await second.update(adopted_entry)
    with_task = replace(sent_entry, phase="submitted", task=Task("task-unified-received", "pending"))
    assert await first.update(with_task) is True
    assert await first.by_key(own_entry.key) == with_task
    assert await second.update(replace(adopted_entry, phase="unknown")) is False


async def test_a_confirmed_task_of_another_server_is_not_overwritten(open_journal: Any) -> None:
    first, second = await open_journal(), await open_journal()
    await first.intend(own_entry := entry(first))
    await first.release(own_entry.key)
    assert await second.acquire(own_entry.key)
    confirmed = replace(own_entry, owner=second.owner, phase="submitted", task=Task("task-unified-known", "completed"))
    assert await second.update(confirmed)
    assert (
        await first.update(replace(own_entry, phase="submitted", task=Task("task-unified-other", "pending"))) is False
    )
    assert await first.update(replace(own_entry, phase="sending")) is False
    assert await first.by_key(own_entry.key) == confirmed


async def test_writes_of_one_entry_happen_in_the_order_of_their_calls(open_journal: Any) -> None:
    """A cancelled caller leaves a running write behind. A later write must not overtake it."""
    database = (await open_journal()).database
    finished_writes: list[str] = []

    async def slow(_: Any) -> None:
        await anyio.sleep(0.1)
        finished_writes.append("slow")

    async def quick(_: Any) -> None:
        finished_writes.append("quick")

    with anyio.move_on_after(0.01) as scope:
        await database.run(slow, key="a")
    await database.run(quick, key="b")
    await database.run(quick, key="a")
    assert (scope.cancelled_caught, finished_writes) == (True, ["quick", "slow", "quick"])


async def test_an_action_that_its_deadline_ends_does_not_change_the_order_of_the_others(url: str) -> None:
    order: list[str] = []
    is_free = anyio.Event()

    async def first(_: Any) -> None:
        order.append("first begins")
        await is_free.wait()
        order.append("first ends")

    async def second(_: Any) -> None:
        order.append("second")

    async with open_database(url, patient_times(action_min_s=0.0)) as database, anyio.create_task_group() as group:
        group.start_soon(partial(database.run, first, key="k"))
        await until(lambda: order)
        with due_within(0.0), pytest.raises(JournalUnwritable):
            await database.run(second, key="k")
        group.start_soon(partial(database.run, second, key="k"))
        await anyio.wait_all_tasks_blocked()
        is_free.set()
    assert order == ["first begins", "first ends", "second"]


async def test_a_call_that_used_its_time_for_an_upload_still_reaches_the_database(url: str) -> None:
    async with open_database(url, patient_times(action_min_s=600.0)) as database:
        with due_within(0.0):
            await database.try_entries()


async def test_many_servers_together_stay_below_the_daily_limit(url: str) -> None:
    entries: list[Entry] = []

    async def buy() -> None:
        async with open_database(url, PATIENT) as database:
            journal = PostgresJournal(database, "a1")
            for _ in range(20):
                with suppress(DailyLimitReached):
                    entries.append(await journal.intend(entry(journal, estimate=1.0), day_limit=50.0))

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(buy)
    assert len(entries) == 50


# --- tables ---


async def test_servers_that_start_together_make_the_tables_once(url: str, cluster: Any) -> None:
    numbers: set[str] = set()

    async def start() -> None:
        async with open_database(url, PATIENT) as database:
            numbers.add(database.owner)

    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(start)
    assert len(numbers) == 6
    with cluster.admin(name_of(url)) as db:
        assert db.execute("SELECT version FROM evolink_version").fetchall() == [(len(VERSIONS),)]


async def test_tables_of_a_newer_version_stay_unchanged(url: str, cluster: Any) -> None:
    async with open_database(url, PATIENT):
        pass
    with cluster.admin(name_of(url)) as db:
        db.execute("UPDATE evolink_version SET version = 99")
        with pytest.raises(
            JournalUnwritable, match=f"of version 99 and this program knows {len(VERSIONS)}: a newer version"
        ):
            await Database(url, PATIENT).open()
        assert db.execute("SELECT version FROM evolink_version").fetchall() == [(99,)]


@pytest.mark.parametrize(("compatible_with", "is_usable"), [(len(VERSIONS), True), (len(VERSIONS) + 1, False)])
async def test_an_older_server_uses_newer_tables_only_if_they_are_compatible_with_it(
    url: str, cluster: Any, compatible_with: int, is_usable: bool
) -> None:
    async with open_database(url, PATIENT):
        pass
    with cluster.admin(name_of(url)) as db:
        row = (len(VERSIONS) + 1, compatible_with)
        db.execute("UPDATE evolink_version SET version = %s, compatible_with = %s", row)
        db.execute("ALTER TABLE evolink_entries ADD COLUMN added_later INTEGER NOT NULL DEFAULT 0")
        if is_usable:
            async with open_database(url, PATIENT) as database:
                journal = PostgresJournal(database, "a1")
                await journal.intend(own_entry := entry(journal))
                assert await journal.recent(5) == [own_entry]
        else:
            with pytest.raises(JournalUnwritable, match="a newer version of evolink-mcp made them"):
                await Database(url, PATIENT).open()
        assert db.execute("SELECT version, compatible_with FROM evolink_version").fetchall() == [row]


async def test_a_migration_records_the_oldest_compatible_program(url: str, cluster: Any) -> None:
    async with open_database(url, PATIENT):
        pass
    with cluster.admin(name_of(url)) as db:
        rows = db.execute("SELECT version, compatible_with FROM evolink_version").fetchall()
    assert rows == [(len(VERSIONS), COMPATIBLE_WITH.get(len(VERSIONS)))]


async def test_tables_of_an_unpublished_build_are_refused_with_the_statements_that_move_them_away(
    url: str, cluster: Any
) -> None:
    with cluster.admin(name_of(url)) as db:
        for name in OLD_TABLES:
            db.execute(f"CREATE TABLE {name} (version INTEGER NOT NULL)")
        with pytest.raises(JournalUnwritable, match="an unpublished build made its tables; move them away") as refusal:
            await Database(url, PATIENT).open()
        with pytest.raises(JournalUnwritable, match="an unpublished build made its tables; move them away"):
            read_entries(url, 5)
        for statement in MOVE_OLD_TABLES.split("; "):
            assert statement in refusal.value.message
            db.execute(statement)
    async with open_database(url, PATIENT) as database:
        journal = PostgresJournal(database, "a1")
        await journal.intend(own_entry := entry(journal))
        assert await journal.recent(5) == [own_entry]


# --- wrong addresses ---


def silent_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("command", [[], ["http", "--port", "0"], ["tasks"]])
@pytest.mark.parametrize("wrong", ["no server", "no such database", "no address"])
async def test_a_database_that_cannot_be_used_ends_the_start_in_one_line(
    command: list[str], wrong: str, cluster: Any, tmp_path: Path
) -> None:
    address = {
        "no server": f"postgresql://team:canary-word@127.0.0.1:{silent_port()}/evolink",
        "no such database": cluster.url("nowhere").replace("postgres@", "postgres:canary-word@"),
        "no address": "postgresql://team:canary-word@127.0.0.1/evolink?canary-word=1",
    }[wrong]
    env = minimal_environment(tmp_path, EVOLINK_MCP_DATABASE_URL=address, EVOLINK_MCP_SECRET=SECRET,
                           EVOLINK_API_KEY="sk-canary-0123456789", EVOLINK_BASE_URL="http://127.0.0.1:9")  # fmt: skip
    # The host keeps stdin open.
    async with await anyio.open_process([*SERVER_COMMAND, *command], env=env) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        message = b"".join([chunk async for chunk in process.stderr]).decode()
        assert (await process.wait(), [chunk async for chunk in process.stdout]) == (1, [])
    lines = [line for line in message.splitlines() if line]
    assert len(lines) == 1, message
    assert "EVOLINK_MCP_DATABASE_URL" in lines[0]
    assert "canary-word" not in message


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


async def test_a_server_reports_whether_it_can_do_paid_work(cluster: Any, url: str, tmp_path: Path) -> None:
    env = minimal_environment(tmp_path, EVOLINK_MCP_DATABASE_URL=url, EVOLINK_MCP_SECRET=SECRET,
                           EVOLINK_API_KEY="sk-canary-0123456789", EVOLINK_BASE_URL="http://127.0.0.1:9")  # fmt: skip
    async with (
        open_http_server(env=env) as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=60) as http,
    ):

        async def wait_for_answer(path: str, *expected: Any) -> dict[str, Any]:
            while True:
                response = await http.get(path)
                if (response.status_code, response.json()["status"]) == expected:
                    return response.json()
                await anyio.sleep(0.05)

        await wait_for_answer("/readyz", 200, "ok")
        # Before the outage: without its session, this server must write to the table before it takes its lease again.
        with cluster.admin(name_of(url)) as db, db.transaction():
            db.execute("LOCK TABLE evolink_entries IN ACCESS EXCLUSIVE MODE")
            why = (await wait_for_answer("/readyz", 503, "not ready"))["why"]
            assert why == "the database did not return an entry within 2 s"
        await wait_for_answer("/readyz", 200, "ok")
        cluster.stop()
        try:
            assert (await wait_for_answer("/readyz", 503, "not ready"))["why"] == "the database does not answer"
            await wait_for_answer("/healthz", 200, "ok")
        finally:
            await anyio.to_thread.run_sync(cluster.start)
        await wait_for_answer("/readyz", 200, "ok")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"EVOLINK_MCP_DATABASE_URL": "mysql://x/y", "EVOLINK_MCP_SECRET": SECRET}, "must begin with postgresql://"),
        ({"EVOLINK_MCP_DATABASE_URL": "postgresql:///x"}, "needs EVOLINK_MCP_SECRET"),
        ({"EVOLINK_MCP_DATABASE_URL": "postgresql:///x", "EVOLINK_MCP_SECRET": "short"}, "32 characters or more"),
    ],
)
async def test_an_unusable_setting_is_named(settings: dict[str, str], message: str, tmp_path: Path) -> None:
    run = await anyio.run_process(SERVER_COMMAND, env=minimal_environment(tmp_path, **settings), check=False)
    assert (run.returncode, message in run.stderr.decode(), "short" in run.stderr.decode()) == (2, True, False)


# --- purchases ---


@pytest.fixture
def in_postgres(open_world: Open, url: str) -> Callable[..., Any]:
    team = {"EVOLINK_MCP_DATABASE_URL": url, "EVOLINK_MCP_SECRET": SECRET}
    return lambda **options: open_world(team, **{"database_times": PATIENT, **options})


async def test_a_task_id_that_arrives_without_the_database_is_delivered_and_written_later(
    in_postgres: Any, cluster: Any
) -> None:
    clock = Clock()

    class DatabaseStopper(PlainSimulator):
        def create(self, *args: Any, **options: Any) -> Any:
            reply = super().create(*args, **options)
            cluster.stop()
            return reply

    simulator = DatabaseStopper(clock=clock, duration_s=0)
    options = {"simulator": simulator, "clock": clock, "database_times": DEFAULT_TIMES}
    async with in_postgres(**options) as world, world.client() as client:
        answer = await client.call_tool("generate_image", {**REQUEST, "wait_seconds": 8})
        facts = answer.structured_content
        assert (facts["status"], facts["charged"]) == ("completed", "yes")
        refusal = await client.call_tool("generate_image", {**REQUEST, "prompt": "another"})
        assert refusal.structured_content["error"]["code"] == "journal_unwritable"
        assert (await client.call_tool("compute_size", {"size": "16:9"})).is_error is False
        await anyio.to_thread.run_sync(cluster.start)
        while not (row := await _entry_of(world.studio, facts["task_id"])):
            await anyio.sleep(0.05)
        assert (row.phase, row.charged) == ("submitted", "yes")
        assert world.posts == 1


async def test_a_task_id_that_is_not_written_yet_survives_the_loss_of_the_session(
    in_postgres: Any, cluster: Any
) -> None:
    """The journal still has the phase `sending` without a task."""
    clock = HeldClock()
    clock.is_held = True

    class DatabaseStopper(PlainSimulator):
        def create(self, *args: Any, **options: Any) -> Any:
            reply = super().create(*args, **options)
            cluster.stop()
            return reply

    async def never(_: float) -> None:
        await anyio.sleep_forever()

    simulator = DatabaseStopper(clock=clock, duration_s=3600)
    options = {"simulator": simulator, "clock": clock, "pause": never, "database_times": DEFAULT_TIMES}
    async with in_postgres(**options) as world, world.client() as client:
        facts = (await client.call_tool("generate_image", {**SLOW, "wait_seconds": 0})).structured_content
        (job,) = world.studio.jobs
        await until(lambda: job.has_remote_owner)
        await anyio.to_thread.run_sync(cluster.start)
        await until(lambda: world.studio.journal.database.is_alive)
        job.wake()
        await until(lambda: job.following_scope or job.is_finished)
        assert (job.entry.phase, job.entry.task_id, job.entry.is_unconfirmed) == ("submitted", facts["task_id"], False)
        await world.studio.flush()
        saved = await _entry_of(world.studio, facts["task_id"])
    assert saved is not None
    assert (saved.phase, saved.is_unconfirmed, world.posts) == ("submitted", False, 1)


async def _entry_of(studio: Any, task_id: str) -> Entry | None:
    try:
        return await studio.journal.by_task(task_id)
    except JournalUnwritable:
        return None


async def test_the_deadline_of_a_call_ends_its_order_while_a_table_is_locked(
    in_postgres: Any, cluster: Any, url: str
) -> None:
    """The order that the locked database still holds is neither sent nor kept, and an order without a lock succeeds."""
    order = ImageRequest(GenerationRequest(prompt="sim:fast a fox", size="1024x640"), 9.0)
    async with in_postgres(database_times=patient_times(action_min_s=0.05)) as world:
        with cluster.admin(name_of(url)) as db, db.transaction():
            db.execute("LOCK TABLE evolink_entries IN ACCESS EXCLUSIVE MODE")
            with due_within(0.05), pytest.raises(JournalUnwritable, match=r"did not answer within the 0\.\d s that"):
                await world.studio.order(order)
        await world.studio.flush()
        assert [entry.phase for entry in await world.studio.journal.recent(9) if entry.phase != "unsent"] == []
        assert ((await world.studio.journal.sums_since(0.0)).total, world.posts) == (0, 0)
        with due_within(600.0):
            job = await world.studio.order(order)
        await until(lambda: job.is_finished)
        assert (job.entry.status, world.posts) == ("completed", 1)


async def test_a_watching_server_receives_the_result_at_once(in_postgres: Any) -> None:
    """It receives a notification of the change and does not wait for its next poll."""
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=3600)

    async def never(_: float) -> None:
        await anyio.sleep_forever()

    async with in_postgres(simulator=simulator, clock=clock) as first:
        async with first.client() as client:
            purchase = (await client.call_tool("generate_image", {**SLOW, "wait_seconds": 0})).structured_content
        async with in_postgres(simulator=simulator, clock=clock, pause=never) as second, second.client() as client:
            answers: list[Any] = []

            async def ask() -> None:
                answers.append(
                    await client.call_tool("get_task", {"task_id": purchase["task_id"], "wait_seconds": 600})
                )

            async with anyio.create_task_group() as group:
                group.start_soon(ask)
                await until(lambda: second.studio.jobs)
                for task in simulator.tasks.values():
                    task.duration = 0
            assert answers[0].structured_content["status"] == "completed"
    assert first.posts == 1


async def test_a_server_without_its_session_stops_its_jobs_and_resumes_them(in_postgres: Any, cluster: Any) -> None:
    """Other servers may adopt its entries, so it must not work on them."""
    clock = HeldClock()
    clock.is_held = True  # otherwise the polls move the clock, and the task ends
    simulator = PlainSimulator(clock=clock, duration_s=3600)
    options = {"simulator": simulator, "clock": clock, "database_times": patient_times(stop_after_s=0.6)}
    async with in_postgres(**options) as world, world.client() as client:
        journal = world.studio.journal
        await client.call_tool("generate_image", {**SLOW, "wait_seconds": 0})
        (job,) = world.studio.jobs
        await until(lambda: job.following_scope)
        cluster.stop()
        try:
            await until(lambda: job.has_remote_owner)
            assert (job.following_scope, job.is_finished) == (None, False)
        finally:
            await anyio.to_thread.run_sync(cluster.start)
        await until(lambda: journal.database.is_alive)
        job.wake()
        await until(lambda: job.following_scope)
        assert not job.has_remote_owner


class PollCounter(httpx.ASGITransport):
    """A transport that counts the polls of one server."""

    count = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.count += request.url.path.startswith("/v1/tasks/")
        return await super().handle_async_request(request)


class SteppedPolls(httpx.ASGITransport):
    """A transport of the owner. From the event on, each poll shows more progress than the last one, which `has_seen` saw."""

    def __init__(self, app: Any, clock: Clock, has_seen: Callable[[int], bool]) -> None:
        super().__init__(app)
        self.may_poll = anyio.Event()
        self._clock = clock
        self._has_seen = has_seen
        self._steps = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.startswith("/v1/tasks/"):
            await self.may_poll.wait()
            await until(lambda: self._has_seen(self._steps))
            self._steps += 1
            self._clock.now += 400
        return await super().handle_async_request(request)


async def test_progress_and_changes_reach_a_watcher_at_another_server(in_postgres: Any) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=3600)
    counter = PollCounter(simulator.app)
    percentages: set[float | None] = set()
    polls = SteppedPolls(simulator.app, clock, lambda steps: len(percentages) >= min(steps, 4))

    async def never(_: float) -> None:
        await anyio.sleep_forever()

    async def return_at_once(_: float) -> None:
        await anyio.sleep(0)

    times = patient_times(stop_after_s=3.0)  # one heartbeat per second
    async with (
        in_postgres(
            simulator=simulator, clock=clock, pause=return_at_once, transport=polls, database_times=times
        ) as first,
        in_postgres(simulator=simulator, clock=clock, pause=never, transport=counter) as second,
        first.client() as buyer,
        second.client() as watcher,
    ):

        async def receive(_: str) -> None:
            percentages.update(job.entry.task.progress for job in second.studio.jobs if job.entry.task)

        second.studio.subscribe(receive)
        purchase = (await buyer.call_tool("generate_image", {**SLOW, "wait_seconds": 0})).structured_content
        answers: list[Any] = []

        async def ask() -> None:
            answers.append(await watcher.call_tool("get_task", {"task_id": purchase["task_id"], "wait_seconds": 600}))

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await until(lambda: counter.count)
            polls.may_poll.set()
    (answer,) = answers
    assert answer.structured_content["status"] == "completed"
    assert counter.count == 1  # the owner published all later progress
    assert len(percentages) > 3
