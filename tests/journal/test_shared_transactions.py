"""Actions that wait for the journal's thread at the same time share one transaction, and each caller gets its answer."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from evolink_mcp.api.task import Task
from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.actions import ActionThread
from evolink_mcp.journal.backend import Connection
from evolink_mcp.journal.entry import Entry, Phase, new_key
from evolink_mcp.journal.journal import DailyLimitReached, Journal, TaskKnown
from evolink_mcp.journal.sqlite import FILE_NAME, JournalFile, SqliteBackend, new_owner

pytestmark = [pytest.mark.anyio, pytest.mark.journal_file]


def entry(journal: Journal, **fields: Any) -> Entry:
    return Entry(**{"key": new_key(), "owner": journal.owner, "phase": Phase.INTENT, "created_at": 1.0, "account": "a1",
                    "request": {"prompt": "a fox"}, **fields})  # fmt: skip


@pytest.fixture
def backend(tmp_path: Path) -> SqliteBackend:
    return SqliteBackend(JournalFile(tmp_path, new_owner(), lock_wait_s=0.2))


@pytest.fixture
async def journal(backend: SqliteBackend) -> AsyncIterator[Journal]:
    journal = Journal(backend, "a1")
    yield journal
    await journal.close()


def stored_keys(folder: Path) -> set[str]:
    """Return the keys that another program can read, which are those on the disk."""
    with closing(sqlite3.connect(folder / FILE_NAME)) as db:
        return {key for (key,) in db.execute("SELECT key FROM entries")}


async def count_commits(backend: SqliteBackend) -> list[str]:
    """Return the list that gets each later end of a transaction."""
    statements: list[str] = []

    def record(sql: str) -> None:
        if sql.startswith(("COMMIT", "ROLLBACK")):
            statements.append(sql)

    await anyio.to_thread.run_sync(lambda: backend.file.run(lambda db: db.set_trace_callback(record)))
    return statements


class Calls:
    """Calls that wait for the thread. `results` has the result of each, or the type of its error."""

    def __init__(self) -> None:
        self.results: dict[int, Any] = {}

    async def call(self, number: int, action: Awaitable[Any]) -> None:
        try:
            self.results[number] = await action
        except (JournalUnwritable, TaskKnown, DailyLimitReached, MemoryError) as error:
            self.results[number] = type(error)


@asynccontextmanager
async def hold_thread(backend: SqliteBackend) -> AsyncIterator[None]:
    """Keep the thread busy during the block, so that all calls of the block wait for it together."""
    is_busy = threading.Event()
    may_continue = threading.Event()

    async def wait(db: Connection) -> None:
        is_busy.set()
        may_continue.wait()

    async with anyio.create_task_group() as group:
        group.start_soon(backend.run, wait)
        await anyio.to_thread.run_sync(is_busy.wait)
        try:
            yield
        finally:
            may_continue.set()


async def run_together(backend: SqliteBackend, *actions: Awaitable[Any]) -> Calls:
    """Run actions that wait for the thread at the same time."""
    calls = Calls()
    async with anyio.create_task_group() as group, hold_thread(backend):
        for number, action in enumerate(actions):
            group.start_soon(calls.call, number, action)
        await anyio.wait_all_tasks_blocked()
    return calls


async def test_waiting_writes_share_one_write_to_the_disk(
    journal: Journal, backend: SqliteBackend, tmp_path: Path
) -> None:
    entries = [entry(journal) for _ in range(40)]
    await journal.intend(entries[0])
    commits = await count_commits(backend)
    await run_together(backend, *[journal.intend(each) for each in entries[1:]])
    assert stored_keys(tmp_path) == {each.key for each in entries}
    assert commits == ["COMMIT"]


def test_no_answer_precedes_the_write_to_the_disk_that_it_depends_on(tmp_path: Path) -> None:
    """The third action changes nothing, because the second one did. It is answered after the commit too."""
    file = JournalFile(tmp_path, new_owner())
    file.run(lambda db: None)
    may_continue = threading.Event()
    thread = ActionThread(file)
    thread.submit(lambda db: may_continue.wait())
    link = "INSERT INTO links (profile, identity, account) VALUES ('p', 'i', 'a') ON CONFLICT DO NOTHING"
    queries = ["SELECT 1", link, link, "SELECT 2"]
    futures = [thread.submit(lambda db, sql=sql: db.execute(sql).rowcount) for sql in queries]
    statements: list[str] = []
    done_futures: list[bool] = []

    def record(sql: str) -> None:
        statements.append(sql)
        if sql == "COMMIT":
            done_futures.extend(future.done() for future in futures)

    file.run(lambda db: db.set_trace_callback(record))
    may_continue.set()
    assert [future.result() for future in futures] == [-1, 1, 0, -1]
    assert done_futures == [True, False, False, False]
    # The first action without a change ends the transaction, so that no long search keeps the write lock.
    assert statements.index("COMMIT") < statements.index("SELECT 2")
    thread.call(file.close).result()


async def test_the_refusal_of_one_purchase_leaves_the_others_written(
    journal: Journal, backend: SqliteBackend, tmp_path: Path
) -> None:
    first, second, third = (entry(journal, estimate=4.0) for _ in range(3))
    calls = await run_together(backend, *[journal.intend(each, day_limit=9.0) for each in (first, second, third)])
    assert [calls.results[number] for number in range(3)] == [first, second, DailyLimitReached]
    assert stored_keys(tmp_path) == {first.key, second.key}


async def test_a_task_that_another_entry_has_is_refused_and_its_neighbours_are_written(
    journal: Journal, backend: SqliteBackend
) -> None:
    task = Task("task-unified-1", "pending")
    first, second, third = (entry(journal) for _ in range(3))
    for each in (first, second, third):
        await journal.intend(each)
    submitted_entries = [replace(each, phase=Phase.SUBMITTED, task=task) for each in (first, second)]
    sending = replace(third, phase=Phase.SENDING)
    calls = await run_together(backend, *map(journal.update, [*submitted_entries, sending]))
    assert calls.results == {0: True, 1: TaskKnown, 2: True}
    assert [(await journal.by_key(each.key)).phase for each in (first, second, third)] == [  # pyright: ignore
        Phase.SUBMITTED, Phase.INTENT, Phase.SENDING,
    ]  # fmt: skip


@pytest.mark.parametrize("has_savepoint", [True, False])
async def test_an_action_that_fails_within_its_transaction_leaves_nothing(
    has_savepoint: bool, journal: Journal, backend: SqliteBackend, tmp_path: Path
) -> None:
    await journal.intend(first := entry(journal))
    second = entry(journal)

    async def fail(db: Connection) -> None:
        async with db.transaction():
            await db.execute("DELETE FROM entries")
            if not has_savepoint:  # then its part of the shared transaction cannot be taken back alone
                with suppress(sqlite3.Error):
                    await db.execute("RELEASE part")
            raise TaskKnown("another entry has it")

    calls = await run_together(backend, backend.run(fail), journal.intend(second), backend.run(fail))
    assert calls.results == {0: TaskKnown, 1: second, 2: TaskKnown}
    assert stored_keys(tmp_path) == {first.key, second.key}


@pytest.mark.parametrize("error", [MemoryError(), TaskKnown("another entry has it")])
async def test_an_error_that_takes_the_transaction_back_runs_no_neighbour_twice(
    error: Exception, journal: Journal, backend: SqliteBackend, tmp_path: Path
) -> None:
    """Without memory SQLite takes the transaction back, and the action may raise another error."""
    await journal.intend(first := entry(journal))
    second, third = entry(journal), entry(journal)

    async def fail(db: Connection) -> None:
        await db.execute("UPDATE entries SET caller = caller")
        with suppress(sqlite3.Error):
            await db.execute("ROLLBACK")
        raise error

    calls = await run_together(
        backend, journal.intend(second), backend.run(fail), journal.claim(first.key), journal.intend(third)
    )
    assert calls.results == {0: second, 1: type(error), 2: True, 3: third}
    assert stored_keys(tmp_path) == {first.key, second.key, third.key}


async def test_a_call_during_the_end_of_the_journal_uses_its_thread(journal: Journal, backend: SqliteBackend) -> None:
    threads: list[int] = []

    async def record(db: Connection) -> None:
        threads.append(threading.get_ident())

    await backend.run(record)
    async with anyio.create_task_group() as group, hold_thread(backend):
        group.start_soon(partial(backend.close, is_released=True))
        await anyio.wait_all_tasks_blocked()
        group.start_soon(backend.run, record)
        await anyio.wait_all_tasks_blocked()
    assert threads[0] == threads[1]


async def test_a_lock_of_another_program_refuses_each_write_and_no_read(
    journal: Journal, backend: SqliteBackend, tmp_path: Path
) -> None:
    await journal.intend(first := entry(journal))
    with closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        calls = await run_together(
            backend, journal.intend(entry(journal)), journal.by_key(first.key), journal.deliver(first.key, 2.0)
        )
    assert calls.results == {0: JournalUnwritable, 1: first, 2: JournalUnwritable}
    assert stored_keys(tmp_path) == {first.key}


async def test_a_write_of_another_program_in_between_loses_and_doubles_nothing(
    journal: Journal, backend: SqliteBackend, tmp_path: Path
) -> None:
    await journal.intend(first := entry(journal))
    second = entry(journal)
    reads = 0

    async def other_writes(db: Connection) -> None:
        nonlocal reads
        reads += 1
        await db.fetch("SELECT 1 FROM entries")
        if reads == 1:
            with closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as other:
                other.execute("UPDATE entries SET delivered_at = 7.0")

    calls = await run_together(backend, backend.run(other_writes), journal.intend(second), journal.claim(first.key))
    assert calls.results == {0: None, 1: second, 2: False}  # the other program delivered it, so a claim fails
    assert reads == 1
    assert stored_keys(tmp_path) == {first.key, second.key}


async def test_a_cancelled_call_that_waits_for_the_thread_writes_nothing(
    journal: Journal, backend: SqliteBackend, tmp_path: Path
) -> None:
    await journal.intend(first := entry(journal))
    cancelled_entry = entry(journal)
    other_entry = entry(journal)
    async with anyio.create_task_group() as group, hold_thread(backend):
        scope = anyio.CancelScope()

        async def intend() -> None:
            with scope:
                await journal.intend(cancelled_entry)

        group.start_soon(intend)
        group.start_soon(journal.intend, other_entry)
        await anyio.wait_all_tasks_blocked()
        scope.cancel()
        await anyio.wait_all_tasks_blocked()
    assert stored_keys(tmp_path) == {first.key, other_entry.key}


async def test_a_transaction_without_an_end_loses_no_later_write(
    journal: Journal, backend: SqliteBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await journal.intend(first := entry(journal))

    async def begin(db: Connection) -> None:
        await db.execute("BEGIN")
        await db.execute("DELETE FROM entries")

    await backend.run(begin)
    second = entry(journal)
    await journal.intend(second)
    assert stored_keys(tmp_path) == {first.key, second.key}
    assert "did not end" in caplog.text
