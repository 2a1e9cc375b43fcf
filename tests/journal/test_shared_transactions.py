"""Actions that wait for the journal's thread at the same time share one transaction, and each gets the answer of its own."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from evolink_mcp.api.task import Task
from evolink_mcp.errors import JournalUnwritable
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


def keys_in(folder: Path) -> set[str]:
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
    """Calls that wait for the thread. `results` has the result or the error of each, `order` the order of the answers."""

    def __init__(self) -> None:
        self.results: dict[int, Any] = {}
        self.order: list[int] = []

    async def call(self, number: int, action: Awaitable[Any]) -> None:
        try:
            self.results[number] = await action
        except (JournalUnwritable, TaskKnown, DailyLimitReached) as error:
            self.results[number] = type(error)
        self.order.append(number)


@asynccontextmanager
async def thread_held(backend: SqliteBackend) -> AsyncIterator[None]:
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


async def together(backend: SqliteBackend, *actions: Awaitable[Any]) -> Calls:
    """Run actions that wait for the thread at the same time."""
    calls = Calls()
    async with anyio.create_task_group() as group, thread_held(backend):
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
    await together(backend, *[journal.intend(each) for each in entries[1:]])
    assert keys_in(tmp_path) == {each.key for each in entries}
    assert commits == ["COMMIT"]


async def test_no_write_is_answered_before_it_is_on_the_disk(
    journal: Journal, backend: SqliteBackend, tmp_path: Path
) -> None:
    await journal.intend(first := entry(journal))
    second = entry(journal)
    seen: list[tuple[set[str], bool]] = []

    async def look(db: Connection) -> None:
        await db.execute("UPDATE entries SET caller = '' WHERE key = ?", (second.key,))
        seen.append((keys_in(tmp_path), 0 in calls.results))

    calls = Calls()
    async with anyio.create_task_group() as group, thread_held(backend):
        group.start_soon(calls.call, 0, journal.intend(second))
        group.start_soon(calls.call, 1, journal.by_key(first.key))
        group.start_soon(calls.call, 2, backend.run(look))
        await anyio.wait_all_tasks_blocked()
    assert seen == [({first.key}, False)]
    # A read need not wait for the disk.
    assert calls.order[0] == 1
    assert keys_in(tmp_path) == {first.key, second.key}


async def test_the_refusal_of_one_purchase_leaves_the_others_written(
    journal: Journal, backend: SqliteBackend, tmp_path: Path
) -> None:
    first, second, third = (entry(journal, estimate=4.0) for _ in range(3))
    calls = await together(backend, *[journal.intend(each, cap=9.0) for each in (first, second, third)])
    assert [calls.results[number] for number in range(3)] == [first, second, DailyLimitReached]
    assert keys_in(tmp_path) == {first.key, second.key}


async def test_a_task_that_another_entry_has_is_refused_and_its_neighbours_are_written(
    journal: Journal, backend: SqliteBackend
) -> None:
    task = Task("task-unified-1", "pending")
    first, second, third = (entry(journal) for _ in range(3))
    for each in (first, second, third):
        await journal.intend(each)
    submitted = [replace(each, phase=Phase.SUBMITTED, task=task) for each in (first, second)]
    sending = replace(third, phase=Phase.SENDING)
    calls = await together(backend, *map(journal.update, [*submitted, sending]))
    assert calls.results == {0: True, 1: TaskKnown, 2: True}
    assert [(await journal.by_key(each.key)).phase for each in (first, second, third)] == [  # pyright: ignore
        Phase.SUBMITTED, Phase.INTENT, Phase.SENDING,
    ]  # fmt: skip


async def test_an_action_that_fails_within_its_transaction_leaves_nothing(
    journal: Journal, backend: SqliteBackend, tmp_path: Path
) -> None:
    await journal.intend(first := entry(journal))
    second = entry(journal)

    async def fail(db: Connection) -> None:
        async with db.transaction():
            await db.execute("DELETE FROM entries")
            raise TaskKnown("another entry has it")

    calls = await together(backend, backend.run(fail), journal.intend(second), backend.run(fail))
    assert calls.results == {0: TaskKnown, 1: second, 2: TaskKnown}
    assert keys_in(tmp_path) == {first.key, second.key}


async def test_a_lock_of_another_program_refuses_each_write_and_no_read(
    journal: Journal, backend: SqliteBackend, tmp_path: Path
) -> None:
    await journal.intend(first := entry(journal))
    with closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        calls = await together(
            backend, journal.intend(entry(journal)), journal.by_key(first.key), journal.deliver(first.key, 2.0)
        )
    assert calls.results == {0: JournalUnwritable, 1: first, 2: JournalUnwritable}
    assert keys_in(tmp_path) == {first.key}


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

    calls = await together(backend, backend.run(other_writes), journal.intend(second), journal.claim(first.key))
    assert calls.results == {0: None, 1: second, 2: False}  # the other program delivered it, so nobody can claim it
    assert reads == 1
    assert keys_in(tmp_path) == {first.key, second.key}


async def test_a_cancelled_call_that_waits_for_the_thread_writes_nothing(
    journal: Journal, backend: SqliteBackend, tmp_path: Path
) -> None:
    await journal.intend(first := entry(journal))
    cancelled, kept = entry(journal), entry(journal)
    async with anyio.create_task_group() as group, thread_held(backend):
        scope = anyio.CancelScope()

        async def intend() -> None:
            with scope:
                await journal.intend(cancelled)

        group.start_soon(intend)
        group.start_soon(journal.intend, kept)
        await anyio.wait_all_tasks_blocked()
        scope.cancel()
        await anyio.wait_all_tasks_blocked()
    assert keys_in(tmp_path) == {first.key, kept.key}


async def test_a_transaction_without_an_end_swallows_no_later_write(
    journal: Journal, backend: SqliteBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await journal.intend(first := entry(journal))

    async def begin(db: Connection) -> None:
        await db.execute("BEGIN")
        await db.execute("DELETE FROM entries")

    await backend.run(begin)
    second = entry(journal)
    await journal.intend(second)
    assert keys_in(tmp_path) == {first.key, second.key}
    assert "did not end" in caplog.text
