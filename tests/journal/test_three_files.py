"""The journal is three files. A deleted or truncated one is noticed before the next purchase, and no paid task is lost."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blocking import BlockingJournal
from conftest import Clock, Open, PlainSimulator

from evolink_mcp.api.task import Task
from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal import paid_record
from evolink_mcp.journal.entry import Entry, Phase, new_key
from evolink_mcp.journal.journal import DailyLimitReached
from evolink_mcp.journal.paid_record import PaidTask
from evolink_mcp.journal.sqlite import FILE_NAME, read_entries

NOW = 1_790_000_000.0
REQUEST = {"prompt": "a fox", "size": "1024x640", "quality": "low"}
NOT_ON_WINDOWS = pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps open files")


def remove(*tails: str) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        for tail in tails:
            Path(f"{path}{tail}").unlink(missing_ok=True)

    return act


def truncate(tail: str, share: float = 0.0) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        file = Path(f"{path}{tail}")
        os.truncate(file, int(file.stat().st_size * share))

    return act


DAMAGE = {
    "log removed": remove("-wal"),
    "log and index removed": remove("-wal", "-shm"),
    "index removed": remove("-shm"),
    "all removed": remove("", "-wal", "-shm"),
    "database removed": remove(""),
    "database empty": truncate(""),
    "database cut": truncate("", 0.5),
    "log empty": truncate("-wal"),
    "log cut": truncate("-wal", 0.6),
}
each_damage = pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)


@pytest.fixture
def open_journal(tmp_path: Path) -> Iterator[Callable[[], BlockingJournal]]:
    """Return a function that opens one more journal of the folder, as another server does."""
    journals: list[BlockingJournal] = []

    def open_one() -> BlockingJournal:
        journals.append(BlockingJournal(tmp_path / "data", clock=lambda: NOW))
        return journals[-1]

    yield open_one
    for journal in journals:
        with suppress(JournalUnwritable):
            journal.close()


OpenJournal = Callable[[], BlockingJournal]


def buy(journal: BlockingJournal, number: int) -> Entry:
    """Record a purchase of 1 credit up to its task ID."""
    entry = Entry(
        new_key(), journal.owner, Phase.INTENT, NOW + number, request={"prompt": f"fox {number}"}, estimate=1.0
    )
    journal.intend(entry)
    entry = replace(entry, phase=Phase.SENDING)
    assert journal.update(entry)
    entry = replace(entry, phase=Phase.SUBMITTED, task=Task(f"task-unified-{number}-a"))
    assert journal.update(entry)
    return entry


def complete(entry: Entry) -> Entry:
    assert entry.task is not None
    return replace(entry, task=replace(entry.task, status="completed", credits_used=1.0))


def order(journal: BlockingJournal) -> bool:
    """Try one more purchase of 1 credit with a daily limit of 3. Return whether the journal admits it."""
    entry = Entry(new_key(), journal.owner, Phase.INTENT, NOW + 9, estimate=1.0)
    try:
        journal.intend(entry, since=NOW, day_limit=3.0)
    except DailyLimitReached:
        return False
    return True


def tasks_of(entries: list[Entry]) -> set[str | None]:
    return {entry.task_id for entry in entries}


TASKS = {f"task-unified-{number}-a" for number in (1, 2, 3)}

# --- running servers ---


@NOT_ON_WINDOWS
@each_damage
@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["in the log", "in the database"])
def test_a_running_server_notices_the_damage_before_its_next_purchase(
    open_journal: OpenJournal, damage: Callable[[Path], None], is_checkpointed: bool
) -> None:
    first = open_journal()
    for number in (1, 2, 3):
        buy(first, number)
        if is_checkpointed and number == 2:
            first.file.run(lambda db: db.execute("PRAGMA wal_checkpoint(FULL)").fetchone())
    damage(first.path)
    assert not order(first)
    assert tasks_of(first.recent(9)) == TASKS
    second = open_journal()
    assert tasks_of(second.recent(9)) == TASKS
    assert not order(second)


@NOT_ON_WINDOWS
@each_damage
def test_a_purchase_after_the_damage_counts_for_the_limit_of_other_servers(
    open_journal: OpenJournal, damage: Callable[[Path], None]
) -> None:
    """The record does not have this purchase, because EvoLink has not answered yet."""
    first = open_journal()
    for number in (1, 2):
        buy(first, number)
    damage(first.path)
    assert order(first)
    second = open_journal()
    assert not order(second)
    assert len(second.recent(9)) == 3


@NOT_ON_WINDOWS
@each_damage
def test_an_unpaid_purchase_survives_the_damage_while_two_servers_run(
    open_journal: OpenJournal, damage: Callable[[Path], None]
) -> None:
    """The second server keeps the files open, so SQLite does not write the log of the first one into the database."""
    first, second = open_journal(), open_journal()
    for number in (1, 2):
        buy(first, number)
    assert order(first)
    assert len(second.recent(9)) == 3
    damage(first.path)
    assert not order(first)
    third = open_journal()
    assert len(third.recent(9)) == 3
    assert not order(third)


def test_the_log_of_an_empty_database_is_renamed_and_not_deleted(open_journal: OpenJournal) -> None:
    journal = open_journal()
    journal.folder.mkdir()
    journal.path.touch()
    Path(f"{journal.path}-wal").write_bytes(b"log")
    assert journal.recent(9) == []
    (log,) = journal.folder.glob(f"{FILE_NAME}.damaged-*-wal")
    assert log.read_bytes() == b"log"


@NOT_ON_WINDOWS
@each_damage
def test_a_new_server_buys_nothing_above_the_limit_before_the_running_one_notices(
    open_journal: OpenJournal, damage: Callable[[Path], None]
) -> None:
    first = open_journal()
    for number in (1, 2, 3):
        buy(first, number)
    damage(first.path)
    second = open_journal()
    with suppress(JournalUnwritable):
        assert not order(second)
    assert not order(first)
    assert not order(second)
    for journal in (first, second):
        assert tasks_of(journal.recent(9)) >= TASKS


@NOT_ON_WINDOWS
@each_damage
def test_three_servers_continue_on_one_journal_after_the_damage(
    open_journal: OpenJournal, damage: Callable[[Path], None]
) -> None:
    servers = [open_journal(), open_journal(), open_journal()]
    entries = [buy(server, number) for number, server in enumerate(servers, start=1)]
    damage(servers[0].path)
    for server, entry in zip(servers, entries, strict=True):
        finished_entry = complete(entry)
        with suppress(JournalUnwritable):
            server.update(finished_entry)
    for server in (*servers, *servers, open_journal()):
        assert tasks_of(server.recent(9)) == TASKS
        assert not order(server)


# --- killed servers ---

KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
import test_three_files as tests
from pathlib import Path
journal = tests.BlockingJournal(Path({folder!r}))
for number in (1, 2, 3):
    tests.buy(journal, number)
os.kill(os.getpid(), signal.SIGKILL)
"""


@NOT_ON_WINDOWS
@each_damage
def test_all_paid_tasks_of_a_killed_server_are_listed_after_the_damage(
    open_journal: OpenJournal, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = Path(__file__).parent
    code = KILLED.format(path=[str(folder), str(folder.parent)], folder=str(tmp_path / "data"))
    process = subprocess.run([sys.executable, "-P", "-c", code], check=False)
    assert process.returncode == -9
    damage(tmp_path / "data" / FILE_NAME)
    assert tasks_of(read_entries(tmp_path / "data", 9)) >= TASKS or not (tmp_path / "data" / FILE_NAME).exists()
    journal = open_journal()
    assert tasks_of(journal.recent(9)) == TASKS
    assert not order(journal)
    adopted_entries = journal.adopt()
    assert tasks_of(adopted_entries) == TASKS
    assert {entry.request["prompt"] for entry in adopted_entries} == {"fox 1", "fox 2", "fox 3"}


@pytest.mark.anyio
@pytest.mark.journal_file
@pytest.mark.usefixtures("in_time")
async def test_the_next_server_completes_a_task_that_only_the_record_has(open_world: Open, tmp_path: Path) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=50)
    async with open_world(simulator=simulator, clock=clock) as world, world.client() as client:
        purchase = await client.call_tool("generate_image", {**REQUEST, "wait_seconds": 0})
    for file in (tmp_path / "data").glob(f"{FILE_NAME}*"):
        file.unlink()
    task_id = purchase.structured_content["task_id"]
    async with open_world(simulator=simulator, clock=clock) as world, world.client() as client:
        task_list = await client.call_tool("list_tasks", {})
        repeat = await client.call_tool("generate_image", REQUEST)
    assert [task["task_id"] for task in task_list.structured_content["tasks"]] == [task_id]
    assert repeat.structured_content["task_id"] == task_id
    assert Path(repeat.structured_content["images"][0]["path"]).is_file()
    assert len(simulator.tasks) == 1


@pytest.mark.parametrize("has_record", [True, False])
def test_a_search_for_dead_servers_restores_a_deleted_journal_and_creates_none(
    open_journal: OpenJournal, has_record: bool
) -> None:
    first = open_journal()
    buy(first, 1)
    first.close()
    names = [FILE_NAME] if has_record else [FILE_NAME, paid_record.FILE_NAME]
    for name in names:
        (first.folder / name).unlink()
    journal = open_journal()
    assert tasks_of(journal.adopt()) == ({"task-unified-1-a"} if has_record else set())
    assert journal.path.exists() is has_record


# --- the record ---


def lines_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / paid_record.FILE_NAME).read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_record_has_one_line_for_each_paid_task_and_only_for_the_user(open_journal: OpenJournal) -> None:
    journal = open_journal()
    for number in (1, 2, 3):
        entry = buy(journal, number)
        finished_entry = complete(entry)
        assert journal.update(finished_entry)
        assert journal.update_images(finished_entry)
    journal.intend(Entry(new_key(), journal.owner, Phase.INTENT, NOW))
    lines = lines_of(journal.folder)
    assert [line["task_id"] for line in lines] == sorted(TASKS)
    assert len({line["key"] for line in lines}) == 3
    if sys.platform != "win32":
        assert (journal.folder / paid_record.FILE_NAME).stat().st_mode & 0o777 == 0o600


def test_a_truncated_line_of_the_record_hides_no_other_line(open_journal: OpenJournal) -> None:
    journal = open_journal()
    buy(journal, 1)
    record = journal.folder / paid_record.FILE_NAME
    with record.open("ab") as file:
        file.write(b'{"key": "evomcp-cut')
    buy(journal, 2)
    with record.open("ab") as file:
        file.write(b"\xff\xfe no JSON\n[]\n")
    buy(journal, 3)
    journal.close()
    remove("", "-wal", "-shm")(journal.path)
    assert tasks_of(open_journal().recent(9)) == TASKS


def test_a_deleted_record_is_written_again_from_the_journal(open_journal: OpenJournal) -> None:
    journal = open_journal()
    for number in (1, 2):
        buy(journal, number)
    (journal.folder / paid_record.FILE_NAME).unlink()
    buy(journal, 3)
    assert {line["task_id"] for line in lines_of(journal.folder)} == TASKS


def test_a_record_that_cannot_be_read_stops_purchases(open_journal: OpenJournal) -> None:
    journal = open_journal()
    buy(journal, 1)
    (journal.folder / paid_record.FILE_NAME).unlink()
    (journal.folder / paid_record.FILE_NAME).mkdir()
    with pytest.raises(JournalUnwritable):
        order(journal)


@NOT_ON_WINDOWS
def test_a_task_id_is_in_the_record_although_the_journal_could_not_be_written(open_journal: OpenJournal) -> None:
    journal = open_journal()
    entry = buy(journal, 1)
    second = replace(entry, key=new_key(), task=Task("task-unified-2-a"))
    shutil.rmtree(journal.folder / "owners")
    (journal.folder / "owners").write_text("no folder")
    with pytest.raises(JournalUnwritable):
        journal.update(second)
    assert [line["task_id"] for line in lines_of(journal.folder)] == ["task-unified-1-a", "task-unified-2-a"]
    (journal.folder / "owners").unlink()
    assert tasks_of(journal.recent(9)) == {"task-unified-1-a", "task-unified-2-a"}


def test_a_task_of_the_record_is_read_only_after_its_owner_has_ended(open_journal: OpenJournal) -> None:
    owner = open_journal()
    second = open_journal()
    entry = Entry(new_key(), owner.owner, Phase.INTENT, NOW, estimate=1.0)
    owner.intend(entry)
    submitted = replace(entry, phase=Phase.SUBMITTED, task=Task("task-unified-1-a"))
    paid_record.PaidRecord(owner.folder).append([PaidTask("default", submitted)])
    assert tasks_of(second.recent(9)) == {None}
    owner.file.close(keep_lease_file=True)
    assert tasks_of(second.recent(9)) == {"task-unified-1-a"}


@NOT_ON_WINDOWS
def test_only_the_end_of_a_long_record_is_read_if_the_journal_has_it(open_journal: OpenJournal) -> None:
    journal = open_journal()
    buy(journal, 1)
    record = journal.folder / paid_record.FILE_NAME
    old = replace(
        buy(journal, 2), key="old", task=Task("task-unified-0-old"), request={"prompt": "x" * paid_record.TAIL_BYTES}
    )
    content = record.read_bytes()
    record.unlink()
    paid_record.PaidRecord(journal.folder).append([PaidTask("default", old)])
    with record.open("ab") as file:
        file.write(content)
    journal.close()
    assert "task-unified-0-old" not in tasks_of(open_journal().recent(9))
    remove("", "-wal", "-shm")(journal.path)
    assert "task-unified-0-old" in tasks_of(open_journal().recent(9))


MANY = 400  # with this many entries the log has several frames of most pages
IDLE = """
import sys
sys.path[:0] = {path!r}
import test_three_files as tests
from pathlib import Path
journal = tests.BlockingJournal(Path({folder!r}))
print(len(journal.recent(9999)), flush=True)
sys.stdin.readline()
print(len(journal.recent(9999)), flush=True)
journal.close()
"""


@NOT_ON_WINDOWS
def test_another_program_reads_the_restored_journal_while_an_idle_server_has_the_old_log(
    open_journal: OpenJournal,
) -> None:
    """The idle server still uses the deleted log and its index."""
    first = open_journal()
    task_ids = {buy(first, number).task_id for number in range(MANY)}
    program = IDLE.format(path=sys.path, folder=str(first.path.parent))
    command = [sys.executable, "-P", "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as idle:
        assert idle.stdin is not None
        assert idle.stdout is not None
        assert idle.stdout.readline() == f"{len(task_ids)}\n"
        remove("-wal")(first.path)
        task_ids.add(buy(first, MANY).task_id)
        with closing(sqlite3.connect(first.path)) as plain:
            assert {task_id for (task_id,) in plain.execute("SELECT task_id FROM entries")} == task_ids
        task_ids.add(buy(open_journal(), MANY + 1).task_id)
        idle.stdin.write("\n")
        idle.stdin.flush()
        assert idle.stdout.readline() == f"{len(task_ids)}\n"
    assert tasks_of(open_journal().recent(9999)) == task_ids
