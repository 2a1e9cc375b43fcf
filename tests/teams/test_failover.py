"""A standby that lacks the last entries is promoted: live servers write them back, and nothing is bought twice."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import anyio
import anyio.to_thread
import pytest
from child_processes import patient_times
from conftest import HeldClock, Open, PlainSimulator

pytest.importorskip("psycopg")

from cluster import Cluster, find_programs, run_cluster

from evolink_mcp.api.task import Task
from evolink_mcp.journal.entry import Entry, ResultImage, new_key
from evolink_mcp.teams.database import open_database
from evolink_mcp.teams.postgres import PostgresJournal

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
REQUEST = {"prompt": "a fox", "size": "1024x640", "quality": "low", "wait_seconds": 0}


class Pair:
    """A primary and its asynchronous standby. `url` leads to the one that accepts writes."""

    def __init__(self, primary: Cluster, standby: Cluster) -> None:
        self.primary = primary
        self._standby = standby
        name = primary.database().partition("@/")[2].partition("?")[0]
        self.url = (
            f"postgresql://postgres@/{name}?host={primary.folder},{standby.folder}&target_session_attrs=read-write"
        )
        self.name = name

    def disconnect(self) -> None:
        """Stop the replication, so that the standby lacks every later change."""
        self._standby.wait_for(self.primary)
        self._standby.stop_replication()

    def promote(self) -> None:
        self.primary.stop()
        self._standby.promote()

    def admin(self) -> Any:
        return self._standby.admin(self.name)


@pytest.fixture
def pair() -> Iterator[Pair]:
    programs = find_programs()
    if programs is None:
        pytest.skip("needs PostgreSQL, for example Debian's package postgresql")
    with run_cluster() as primary, primary.standby() as standby:
        yield Pair(primary, standby)


@pytest.fixture
async def open_journal(pair: Pair) -> AsyncIterator[Callable[..., Any]]:
    async with AsyncExitStack() as stack:

        async def open_server(**times: float) -> PostgresJournal:
            database = await stack.enter_async_context(open_database(pair.url, patient_times(**times)))
            return PostgresJournal(database, "a1")

        yield open_server


def entry(journal: PostgresJournal, **fields: Any) -> Entry:
    return Entry(**{"key": new_key(), "owner": journal.owner, "phase": "intent", "created_at": 1.0, "account": "a1",
                    "fingerprint": "f", **fields})  # fmt: skip


async def wait_for_return(pair: Pair, *journals: PostgresJournal) -> None:
    """Wait until the servers work with the promoted standby."""
    with pair.admin() as db:
        (timeline,) = db.execute("SELECT left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)").fetchone()
        while db.execute(
            "SELECT count(*) FROM evolink_servers WHERE timeline LIKE %s", (f"%/{timeline}",)
        ).fetchone() != (len(journals),):
            await anyio.sleep(0.01)
    for journal in journals:
        while not journal.database.has_session:
            await anyio.sleep(0.01)


async def test_entries_and_states_that_the_standby_lacks_are_written_back(pair: Pair, open_journal: Any) -> None:
    first, second = await open_journal(), await open_journal()
    await first.intend(replicated_entry := entry(first))
    pair.disconnect()
    task = Task("task-unified-1", "completed", results=("https://images.example/1.png",))
    image = ResultImage(0, "https://images.example/1.png", 2.0, path="/pictures/fox.png")
    completed = replace(replicated_entry, phase="submitted", task=task, images=(image,))
    assert await first.update_images(completed)
    await first.deliver(replicated_entry.key, 5.0)
    await first.release(replicated_entry.key)
    await first.intend(lost_entry := entry(first, fingerprint="g"))
    assert await first.update(sent_entry := replace(lost_entry, phase="sending"))
    pair.promote()
    await wait_for_return(pair, first, second)
    expected = replace(completed, owner="", delivered_at=5.0)
    assert await second.by_key(replicated_entry.key) == expected
    assert await second.by_key(lost_entry.key) == replace(sent_entry, owner=first.owner)
    assert (await second.undelivered(("f",), 0)).entries == []
    # A later connection to the same timeline changes nothing.
    assert await first.update(replace(sent_entry, phase="unknown"))
    with pair.admin() as db:
        db.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> "
                   "pg_backend_pid()", (pair.name,))  # fmt: skip
    while first.database.has_session:
        await anyio.sleep(0.01)
    await wait_for_return(pair, first, second)
    assert (await first.by_key(lost_entry.key)).phase == "unknown"


async def test_no_server_continues_before_all_live_servers_have_written_back(pair: Pair, open_journal: Any) -> None:
    server = await open_journal()
    with pair.primary.admin(pair.name) as db:
        # A server that was alive at the failover and never returns.
        db.execute("INSERT INTO evolink_servers (number, lease_until, timeline) OVERRIDING SYSTEM VALUE "
                   "SELECT 5, lease_until, timeline FROM evolink_servers")  # fmt: skip
        # Servers that had ended before.
        db.execute("INSERT INTO evolink_servers (number, lease_until, timeline) OVERRIDING SYSTEM VALUE "
                   "SELECT 6, lease_until - interval '1 hour', timeline FROM evolink_servers WHERE number <> 5")  # fmt: skip
    pair.disconnect()
    pair.promote()
    with pair.admin() as db:
        awaited_server = "SELECT 1 FROM evolink_servers WHERE number = 5 AND awaited_on IS NOT NULL"
        while db.execute(awaited_server).fetchone() is None:
            await anyio.sleep(0.01)
        assert db.execute("SELECT awaited_on FROM evolink_servers WHERE number = 6").fetchone() == (None,)
        rows: list[Any] = []

        async def read() -> None:
            rows.append(await server.by_key("evomcp-1"))

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            for _ in range(50):
                assert (server.database.has_session, rows) == (False, [])
                await anyio.sleep(0.01)
            db.execute("UPDATE evolink_servers SET timeline = awaited_on WHERE number = 5")  # it returned
        assert rows == [None]


async def test_an_identical_call_after_a_failover_does_not_buy_again(pair: Pair, open_world: Open) -> None:
    clock = HeldClock()
    clock.is_held = True
    simulator = PlainSimulator(clock=clock, duration_s=3600)
    team = {"EVOLINK_MCP_DATABASE_URL": pair.url, "EVOLINK_MCP_SECRET": "s" * 32}
    options = {"simulator": simulator, "clock": clock, "database_times": patient_times()}
    async with (
        open_world(team, **options) as first,
        open_world(team, **options) as second,
        first.client() as buyer,
        second.client() as other,
    ):
        await other.call_tool("list_tasks", {})
        pair.disconnect()
        purchase = (await buyer.call_tool("generate_image", REQUEST)).structured_content
        await anyio.to_thread.run_sync(pair.promote)
        await wait_for_return(pair, first.studio.journal, second.studio.journal)
        repeat = (await other.call_tool("generate_image", REQUEST)).structured_content
        assert repeat["task_id"] == purchase["task_id"]
    assert first.posts == 1
    assert len(simulator.tasks) == 1


async def test_a_role_without_the_right_to_see_the_timeline_works_without_write_back(pair: Pair) -> None:
    with pair.primary.admin(pair.name) as db:
        db.execute("CREATE ROLE team LOGIN")
        db.execute("GRANT CREATE ON SCHEMA public TO team")
        db.execute("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM public")
    async with open_database(pair.url.replace("postgres@", "team@"), patient_times()) as database:
        journal = PostgresJournal(database, "a1")
        await journal.intend(own_entry := entry(journal))
        assert await journal.by_key(own_entry.key) == own_entry
    with pair.primary.admin(pair.name) as db:
        assert db.execute("SELECT timeline FROM evolink_servers").fetchall() == [("",)]
        db.execute("GRANT EXECUTE ON FUNCTION pg_control_system() TO public")
    async with open_database(pair.url.replace("postgres@", "team@"), patient_times()) as database:
        assert database.is_alive
    with pair.primary.admin(pair.name) as db:
        assert db.execute("SELECT count(*) FROM evolink_servers WHERE timeline <> ''").fetchall() == [(1,)]


async def test_an_asynchronous_standby_is_a_warning_at_the_start(
    pair: Pair, open_journal: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await open_journal()
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "a standby of the database replicates asynchronously, so a failover can lose the last purchases if their server "
        "ends too; set synchronous_standby_names"
    ]
