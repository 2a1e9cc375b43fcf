"""Another program holds a lock on the journal: a call waits once, and `compute_size` never fails."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from blocking import BlockingJournal
from conftest import Open
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool

from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.entry import Entry, Phase, new_key
from evolink_mcp.journal.journal import Journal
from evolink_mcp.journal.sqlite import FILE_NAME, SqliteJournal
from evolink_mcp.tools.compute_size import compute_size_tool

pytestmark = pytest.mark.journal_file

NOW = 1_790_000_000.0
SHORT_S = 0.05
LONG_S = 3600.0
REQUEST = {"prompt": "sim:fast a fox", "size": "1024x640", "quality": "low"}


@contextmanager
def hold_lock(path: Path, *, for_readers: bool = False) -> Iterator[sqlite3.Connection]:
    """Hold the write lock of the file, and with `for_readers` the lock that also stops every reader."""
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        if for_readers:
            other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        yield other
        if other.in_transaction:
            other.execute("ROLLBACK")


def entry(journal: Any, **fields: Any) -> Entry:
    return Entry(**{"key": new_key(), "owner": journal.owner, "phase": Phase.INTENT, "created_at": NOW, **fields})


def wait_ms(journal: BlockingJournal) -> int:
    """Return the longest wait of the next operation for a lock."""
    return journal.file.run(lambda db: db.execute("PRAGMA busy_timeout").fetchone()[0])


def lock_reports(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "has locked" in record.getMessage()]


def test_after_one_failed_wait_the_operations_wait_briefly_until_a_write_succeeds(tmp_path: Path) -> None:
    journal = BlockingJournal(tmp_path, lock_wait_s=1.0)
    journal.intend(first := entry(journal))
    assert wait_ms(journal) == 1000
    with hold_lock(journal.path):
        with pytest.raises(JournalUnwritable, match="locked"):
            journal.intend(entry(journal))
        assert wait_ms(journal) == 200
        assert journal.by_key(first.key) == first
        assert wait_ms(journal) == 200
    journal.intend(entry(journal))
    assert wait_ms(journal) == 1000
    journal.close()


def test_a_journal_that_cannot_be_opened_because_of_a_lock_is_opened_later(tmp_path: Path) -> None:
    first = BlockingJournal(tmp_path)
    first.intend(entry(first))
    first.close()
    journal = BlockingJournal(tmp_path, lock_wait_s=SHORT_S)
    with hold_lock(tmp_path / FILE_NAME, for_readers=True), pytest.raises(JournalUnwritable, match="locked"):
        journal.recent(5)
    journal.intend(entry(journal))
    assert len(journal.recent(5)) == 2
    journal.close()


def with_lock_wait(seconds: float) -> Any:
    def wrap(journal: Journal) -> Journal:
        assert isinstance(journal, SqliteJournal)
        return SqliteJournal(journal.file.folder, journal.identity, clock=lambda: NOW, lock_wait_s=seconds)

    return wrap


@pytest.mark.anyio
async def test_calls_on_a_locked_journal_wait_once_and_charge_nothing(
    open_world: Open, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_world(wrap_journal=with_lock_wait(SHORT_S)) as world, world.client() as client:
        await client.call_tool("generate_image", REQUEST)
        caplog.clear()
        with caplog.at_level(logging.WARNING), hold_lock(world.settings.data_dir / FILE_NAME):
            order = await client.call_tool("generate_image", {**REQUEST, "force_new": True})
            assert order.is_error is True
            assert order.structured_content["error"]["code"] == "journal_unwritable"
            assert "locked" in order.structured_content["error"]["message"]
            assert (await client.call_tool("list_tasks", {})).is_error is False
            assert (await client.call_tool("generate_image", REQUEST)).is_error is True
        assert len(lock_reports(caplog)) == 1
        assert world.posts == 1
        repeat = await client.call_tool("generate_image", {**REQUEST, "force_new": True})
        assert repeat.structured_content["status"] == "completed"


@pytest.mark.anyio
async def test_list_and_task_of_a_journal_that_stops_readers_name_the_lock(
    open_world: Open, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_world(wrap_journal=with_lock_wait(SHORT_S)) as world:
        other = BlockingJournal(world.settings.data_dir)
        await anyio.to_thread.run_sync(other.intend, entry(other))
        await anyio.to_thread.run_sync(other.close)
        async with world.client() as client:
            with caplog.at_level(logging.WARNING), hold_lock(world.settings.data_dir / FILE_NAME, for_readers=True):
                tasks = await client.call_tool("list_tasks", {})
                task = await client.call_tool("get_task", {"task_id": "task-unified-1"})
            assert "locked" in tasks.structured_content["error"]["message"]
            assert task.structured_content["error"]["code"] == "not_found"
            assert len(lock_reports(caplog)) == 1


@pytest.mark.anyio
async def test_compute_size_answers_with_known_prices_while_another_call_waits_for_the_lock(open_world: Open) -> None:
    async with open_world(wrap_journal=with_lock_wait(LONG_S)) as world:
        tool = compute_size_tool(world.studio, rule_fresh_for_s=0.0, journal_wait_s=SHORT_S)
        patient_tool = compute_size_tool(world.studio, rule_fresh_for_s=0.0, journal_wait_s=LONG_S)
        with anyio.fail_after(300):
            await world.studio.journal.save_fact("a", "")
            before = await tool_answer(patient_tool, {"size": "16:9"})
            with hold_lock(world.settings.data_dir / FILE_NAME) as other:
                async with anyio.create_task_group() as group:
                    group.start_soon(world.studio.journal.save_fact, "a", "b")  # waits for the lock
                    await anyio.wait_all_tasks_blocked()
                    answer = await tool_answer(tool, {"size": "16:9"})
                    other.execute("ROLLBACK")
            after = await tool_answer(patient_tool, {"size": "16:9"})
    assert after == before
    assert answer == {**before, "notes": answer["notes"]}
    assert answer["notes"][:-1] == before["notes"]
    assert "journal could not be read" in answer["notes"][-1]


async def tool_answer(tool: Tool, arguments: dict[str, Any]) -> dict[str, Any]:
    result = await tool.run(arguments, Context())
    return result.structured_content
