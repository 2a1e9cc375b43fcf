"""The journal keeps its entries despite other servers, damage, full disks and read-only folders."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from blocking import BlockingJournal
from conftest import KEY, Open

from evolink_mcp.api.task import Task
from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.entry import UNCONFIRMED, Entry, Phase, ResultImage, Stage, fingerprint, new_key
from evolink_mcp.journal.journal import DailyLimitReached, Sums
from evolink_mcp.journal.migrations import MIGRATIONS, migrate, move_command
from evolink_mcp.journal.sqlite import FILE_NAME, read_entries

NOW = 1_790_000_000.0
REQUEST = {"prompt": "sim:fast a fox", "size": "1024x640", "quality": "low"}


def entry(journal: BlockingJournal, **fields: Any) -> Entry:
    return Entry(**{"key": new_key(), "owner": journal.owner, "phase": "intent", "created_at": NOW, **fields})


def task(name: str = "1", status: str = "pending", **fields: Any) -> Task:
    return Task(f"task-unified-{name}", status, **fields)


PENDING = ResultImage(0, "u", NOW)
SAVED = ResultImage(0, "u", NOW, path="/x")
FAILED = ResultImage(1, "u", NOW, error="no room")
LOST = ResultImage(1, "u", NOW, error="expired", is_lost=True)


@pytest.fixture
def open_journal(tmp_path: Path) -> Iterator[Callable[[], BlockingJournal]]:
    """Return a function that opens one more journal of the folder, as another server does."""
    journals: list[BlockingJournal] = []

    def open_one() -> BlockingJournal:
        journals.append(BlockingJournal(tmp_path / "data", clock=lambda: NOW))
        return journals[-1]

    yield open_one
    for one in journals:
        one.close()


OpenJournal = Callable[[], BlockingJournal]


# --- versions ------------------------------------------------------------------------------------------------


def test_a_new_version_changes_the_tables_of_a_journal_once_and_keeps_its_entries(open_journal: OpenJournal) -> None:
    journal = open_journal()
    journal.intend(first_entry := entry(journal))
    journal.close()
    migrations = (
        *MIGRATIONS,
        "ALTER TABLE entries ADD COLUMN mood TEXT NOT NULL DEFAULT 'calm'; CREATE TABLE moods (x)",
    )
    with closing(sqlite3.connect(journal.path, isolation_level=None)) as db:
        migrate(db, migrations)
        migrate(db, migrations)
        assert db.execute("SELECT key, mood FROM entries").fetchall() == [(first_entry.key, "calm")]
        assert db.execute("PRAGMA user_version").fetchone() == (len(migrations),)


def test_a_migration_that_fails_changes_nothing(open_journal: OpenJournal) -> None:
    journal = open_journal()
    journal.intend(first_entry := entry(journal))
    journal.close()
    with closing(sqlite3.connect(journal.path, isolation_level=None)) as db:
        with pytest.raises(sqlite3.OperationalError):
            migrate(db, (*MIGRATIONS, "CREATE TABLE moods (x); CREATE TABLE moods (x)"))
        assert db.execute("SELECT name FROM sqlite_master WHERE name = 'moods'").fetchall() == []
    assert open_journal().recent(5) == [replace(first_entry, owner="")]


@pytest.mark.parametrize("version", [1, 5])
def test_a_journal_of_an_unpublished_build_is_refused_with_the_command_that_moves_it_away(
    open_journal: OpenJournal, tmp_path: Path, version: int
) -> None:
    journal = open_journal()
    journal.folder.mkdir()
    with closing(sqlite3.connect(journal.path)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE entries (key TEXT PRIMARY KEY)")
        db.execute(f"PRAGMA user_version = {version}")
    for read in (lambda: journal.recent(5), lambda: read_entries(journal.folder, 5)):
        with pytest.raises(JournalUnwritable, match=r"an unpublished build wrote it; move it away: ") as refusal:
            read()
        assert str(journal.path) in refusal.value.message
        assert move_command(journal.path) in refusal.value.message
    journal.close()
    subprocess.run(move_command(journal.path), shell=True, check=True, cwd=journal.folder)
    assert Path(f"{journal.path}.old").exists()
    second = open_journal()
    second.intend(new_entry := entry(second))
    assert second.recent(5) == [new_entry]


def test_the_command_that_moves_a_journal_away_fits_the_platform() -> None:
    path = Path("/home/ann lee/data/journal.sqlite3")
    assert move_command(path, "linux") == f"mv '{path}' '{path}.old'"
    assert move_command(path, "darwin") == move_command(path, "linux")
    assert move_command(path, "win32") == f'ren "{path}" "journal.sqlite3.old"'


@pytest.mark.parametrize(
    ("facts", "status", "charged", "stage"),
    [
        ({"phase": Phase.INTENT}, "pending", "no", Stage.OPEN),
        ({"phase": Phase.SENDING}, "unknown", "unknown", Stage.OPEN),
        ({"phase": Phase.REFUSED}, "failed", "no", Stage.FINAL),
        ({"phase": Phase.UNSENT}, "failed", "no", Stage.FINAL),
        ({"phase": Phase.UNKNOWN}, "unknown", "unknown", Stage.FINAL),
        ({"task": task(status="processing")}, "processing", "unknown", Stage.OPEN),
        ({"task": task(status="completed")}, "completed", "yes", Stage.OPEN),
        ({"task": task(status="completed"), "images": (SAVED,)}, "completed", "yes", Stage.FINAL),
        ({"task": task(status="completed"), "images": (SAVED, FAILED)}, "completed", "yes", Stage.DELIVERABLE),
        ({"task": task(status="completed"), "images": (SAVED, PENDING)}, "completed", "yes", Stage.OPEN),
        ({"task": task(status="completed"), "images": (LOST,)}, "completed", "yes", Stage.FINAL),
        ({"task": task(status="failed")}, "failed", "no", Stage.FINAL),
        (
            {"task": task(status="completed"), "error": UNCONFIRMED, "images": (SAVED,)},
            "completed",
            "unknown",
            Stage.FINAL,
        ),
        (
            {"task": task(status="completed"), "phase": Phase.EXTERNAL, "images": (SAVED,)},
            "completed",
            "yes",
            Stage.FINAL,
        ),
    ],
)
def test_status_charge_and_stage_follow_from_phase_task_and_images(
    facts: dict[str, Any], status: str, charged: str, stage: Stage
) -> None:
    first = Entry(**{"key": "k", "owner": "o", "phase": Phase.SUBMITTED, "created_at": NOW, **facts})
    assert (first.status, first.charged, first.stage) == (status, charged, stage)


# --- the file ------------------------------------------------------------------------------------------------


def test_every_write_is_synced_and_only_the_user_can_read_the_files(open_journal: OpenJournal) -> None:
    journal = open_journal()
    journal.intend(entry(journal))
    assert journal.file.run(lambda db: tuple(db.execute("PRAGMA synchronous").fetchone())) == (2,)
    assert journal.file.run(lambda db: tuple(db.execute("PRAGMA journal_mode").fetchone())) == ("wal",)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in journal.folder.rglob("*") if path.is_file()}
    assert any(name.endswith(".lock") for name in modes)
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE(journal.folder.stat().st_mode) == 0o700


def test_nothing_is_created_before_the_first_use(tmp_path: Path) -> None:
    BlockingJournal(tmp_path / "data").close()
    assert list(tmp_path.iterdir()) == []


def test_an_identical_request_has_the_same_fingerprint_in_any_order() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_four_servers_write_at_the_same_time(tmp_path: Path) -> None:
    """With real processes: a write that waits for another process does not fail."""
    write = (
        "import sys; from pathlib import Path; from evolink_mcp.journal.entry import Entry, new_key\n"
        "from evolink_mcp.journal.sqlite import SqliteJournal\n"
        "j = SqliteJournal(Path(sys.argv[1]))\n"
        "async def writes():\n"
        "    for i in range(40):\n"
        "        e = Entry(new_key(), j.owner, 'intent', 1.0, estimate=1.0)\n"
        "        await j.intend(e, day_limit=1e9); await j.update(e); await j.claim(e.key)\n"
        "    await j.close()\n"
        "import anyio; anyio.run(writes)\n"
    )
    run = [sys.executable, "-P", "-c", write, str(tmp_path)]
    root = str(Path(__file__).parents[2])
    writers = [subprocess.Popen(run, cwd=root, stderr=subprocess.PIPE) for _ in range(4)]
    assert [(writer.communicate(timeout=300)[1], writer.returncode) for writer in writers] == [(b"", 0)] * 4
    journal = BlockingJournal(tmp_path)
    assert journal.sums_since(0).total == 160
    journal.close()


def test_four_processes_together_stay_below_the_daily_limit(tmp_path: Path) -> None:
    """One transaction checks the limit and writes the entry, so no other process writes in between."""
    write = (
        "import sys; from pathlib import Path; from evolink_mcp.journal.entry import Entry, new_key\n"
        "from evolink_mcp.journal.sqlite import SqliteJournal\n"
        "from evolink_mcp.journal.journal import DailyLimitReached\n"
        "from contextlib import suppress\n"
        "j = SqliteJournal(Path(sys.argv[1]))\n"
        "async def writes():\n"
        "    await j.recent(1); print('ready', flush=True); sys.stdin.readline()\n"
        "    for i in range(60):\n"
        "        with suppress(DailyLimitReached):\n"
        "            await j.intend(Entry(new_key(), j.owner, 'intent', 1.0, estimate=1.0), day_limit=100.0)\n"
        "    await j.close()\n"
        "import anyio; anyio.run(writes)\n"
    )
    run = [sys.executable, "-P", "-c", write, str(tmp_path)]
    root = str(Path(__file__).parents[2])
    writers = [subprocess.Popen(run, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline().strip() == b"ready"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    assert [writer.communicate(timeout=300)[1] for writer in writers] == [None] * 4
    journal = BlockingJournal(tmp_path)
    assert journal.sums_since(0).total == 100
    journal.close()


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold the write lock of the file, as another program does."""
    with closing(sqlite3.connect(path, isolation_level=None)) as second:
        second.execute("BEGIN IMMEDIATE")
        yield
        second.execute("ROLLBACK")


@pytest.mark.anyio
async def test_a_lock_of_another_program_delays_only_calls_that_need_the_journal(open_world: Open) -> None:
    async with open_world() as world, world.client() as client, anyio.create_task_group() as group:
        with anyio.fail_after(300):
            await client.call_tool("list_tasks", {})
            answers: list[Any] = []

            async def buy() -> None:
                answers.append(await client.call_tool("generate_image", {**REQUEST, "prompt": "sim:fast a fox"}))

            with hold_lock(world.settings.data_dir / FILE_NAME):
                group.start_soon(buy)
                for _ in range(3):
                    assert (await client.call_tool("compute_size", {"size": "16:9"})).is_error is False
                    assert (await client.call_tool("get_balance", {})).is_error is False
                assert (answers, world.posts) == ([], 0)
            while not answers:
                await anyio.sleep(0.01)
    assert answers[0].structured_content["status"] == "completed"
    assert world.posts == 1


# --- a deleted or replaced file ------------------------------------------------------------------------------


def test_a_deleted_journal_is_written_again_before_the_next_purchase(open_journal: OpenJournal) -> None:
    first = open_journal()
    first.intend(first_entry := entry(first, estimate=3.0))
    for name in ("", "-wal", "-shm"):
        (first.folder / f"{FILE_NAME}{name}").unlink(missing_ok=True)
    with pytest.raises(DailyLimitReached) as refusal:
        first.intend(entry(first, estimate=3.0), day_limit=5.0)
    assert refusal.value.sums == Sums(reserved=3.0)
    second = open_journal()
    assert second.recent(5) == [first_entry]
    with pytest.raises(DailyLimitReached) as refusal:
        second.intend(entry(second, estimate=3.0), day_limit=5.0)
    assert refusal.value.sums == Sums(reserved=3.0)


def test_a_replaced_journal_is_opened_and_gets_the_running_entries(open_journal: OpenJournal, tmp_path: Path) -> None:
    """A backup replaces the file while a server runs. Its entries count, and the server adds the running one."""
    first = open_journal()
    first.intend(saved_entry := entry(first, estimate=3.0, created_at=NOW - 1))
    first.file.run(lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone())
    shutil.copy(first.path, tmp_path / "back-up")
    first.intend(running_entry := entry(first, estimate=1.0))
    for name in ("-wal", "-shm"):
        (first.folder / f"{FILE_NAME}{name}").unlink(missing_ok=True)
    os.replace(tmp_path / "back-up", first.path)
    assert first.update(replace(running_entry, phase="sending")) is True
    second = open_journal()
    assert second.recent(5) == [replace(running_entry, phase="sending"), saved_entry]
    with pytest.raises(DailyLimitReached) as refusal:
        second.intend(entry(second, estimate=3.0), day_limit=5.0)
    assert refusal.value.sums == Sums(reserved=4.0)


# --- damage --------------------------------------------------------------------------------------------------


def damage(path: Path, kind: str) -> None:
    if kind == "no database":
        path.write_bytes(b"this was a journal once " * 400)
    else:
        data = bytearray(path.read_bytes())
        data[100 : len(data)] = b"\xa5" * (len(data) - 100)
        path.write_bytes(data)


@pytest.mark.parametrize("kind", ["no database", "every page overwritten"])
def test_a_damaged_journal_is_renamed_with_an_error_in_the_log_and_a_new_one_works(
    open_journal: OpenJournal, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_journal()
    first.intend(entry(first))
    first.close()
    damage(first.path, kind)
    journal = open_journal()
    journal.intend(new_entry := entry(journal))
    assert journal.recent(5) == [new_entry]
    aside = list(journal.folder.glob(f"{FILE_NAME}.damaged-*"))
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert any(f"set aside as {path}," in caplog.text for path in aside)


def damage_found_once(before: Callable[[], object] = lambda: None) -> Callable[[sqlite3.Connection], None]:
    """Return an action that finds damage in the file at its first attempt."""
    attempts: list[int] = []

    def act(_: sqlite3.Connection) -> None:
        attempts.append(1)
        if len(attempts) == 1:
            before()
            raise sqlite3.DatabaseError("database disk image is malformed")

    return act


def test_the_second_server_that_finds_the_damage_keeps_the_new_journal(open_journal: OpenJournal) -> None:
    """The second server still has the damaged file open. It must not rename the new journal of the first one."""
    first, second = open_journal(), open_journal()
    first.intend(entry(first))
    assert len(second.recent(5)) == 1
    new_entry = entry(first)

    def first_server_was_faster() -> None:
        first.file.run(damage_found_once())
        first.intend(new_entry)

    second.file.run(damage_found_once(first_server_was_faster))
    assert second.recent(5) == [new_entry]
    assert len(list(first.folder.glob(f"{FILE_NAME}.damaged-*[0-9a-f]"))) == 1


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("task", b'{"id": 1'), ("task", b"[]"), ("request", b"7"), ("images", b'[{"shape": "round"}]'),
        ("error", b"\xff\xfe"), ("images", b"null"),
    ],
)  # fmt: skip
def test_an_invalid_entry_is_logged_and_the_others_are_used(
    open_journal: OpenJournal, column: str, value: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    journal = open_journal()
    journal.intend(invalid_entry := entry(journal, created_at=NOW - 1))
    journal.intend(valid_entry := entry(journal))
    with sqlite3.connect(journal.path) as db:
        db.execute(f"UPDATE entries SET {column} = CAST(? AS TEXT) WHERE key = ?", (value, invalid_entry.key))
    db.close()
    assert open_journal().recent(5) == [valid_entry]
    assert invalid_entry.key in caplog.text
    journal.close()
    assert [row.key for row in open_journal().adopt()] == [valid_entry.key]


def test_a_journal_of_a_newer_version_stays_unchanged(open_journal: OpenJournal) -> None:
    journal = open_journal()
    journal.intend(entry(journal))
    journal.close()
    with sqlite3.connect(journal.path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(JournalUnwritable, match="newer version"):
        open_journal().recent(5)
    assert [path.name for path in journal.folder.glob("*damaged*")] == []


# --- a full disk and a read-only folder, with real mounts ---------------------------------------------------


@contextmanager
def mount_small_disk(folder: Path, options: str) -> Iterator[Path]:
    """Mount a small file system. Skip the test with the reason where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    mount = shutil.which("mount")
    mount_run = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True
    )
    if not mount_run or mount_run.returncode:
        pytest.skip(
            f"mounting a tmpfs is not possible here: {mount_run.stderr.decode().strip() if mount_run else 'no mount'}"
        )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    with suppress(OSError), (folder / "filler").open("wb") as file:
        while True:
            file.write(b"x" * 4096)
            file.flush()


def turn_read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="mounts file systems")


@LINUX
@pytest.mark.anyio
@pytest.mark.parametrize(
    ("damage", "purchase_count"),
    [
        pytest.param(fill, 0, id="disk full"),
        pytest.param(fill, 1, id="disk full after a purchase"),
        pytest.param(turn_read_only, 0, id="read-only"),
    ],
)
async def test_a_purchase_that_cannot_be_recorded_is_not_sent(
    open_world: Open, tmp_path: Path, damage: Callable[[Path], None], purchase_count: int
) -> None:
    with mount_small_disk(tmp_path / "small", "size=600k") as small, anyio.fail_after(300):
        if not purchase_count:
            damage(small)
        async with open_world({"EVOLINK_MCP_DATA_DIR": str(small / "data")}) as world, world.client() as client:
            if purchase_count:
                first = await client.call_tool("generate_image", REQUEST)
                assert first.structured_content["charged"] == "yes"
                damage(small)
            refusal = await client.call_tool("generate_image", {**REQUEST, "prompt": "another"})
            size_answer = await client.call_tool("compute_size", {"size": "16:9"})
            balance = await client.call_tool("get_balance", {})
    text = refusal.content[0].text
    assert refusal.is_error
    assert refusal.structured_content["charged"] == "no"
    assert refusal.structured_content["error"]["code"] == "journal_unwritable"
    assert str(small / "data" / FILE_NAME) in text
    assert "EVOLINK_MCP_DATA_DIR" in text
    assert "Charged: no" in text
    assert (size_answer.is_error, balance.is_error) == (False, False)
    assert world.posts == purchase_count


@LINUX
@pytest.mark.anyio
async def test_an_image_without_disk_space_is_not_bought(open_world: Open, tmp_path: Path) -> None:
    with mount_small_disk(tmp_path / "small", "size=64k") as small, anyio.fail_after(300):
        fill(small)
        async with open_world({"EVOLINK_MCP_OUTPUT_DIR": str(small / "pictures")}) as world, world.client() as client:
            answer = await client.call_tool("generate_image", REQUEST)
            facts = answer.structured_content
            assert (facts["charged"], facts["status"], world.posts) == ("no", "failed", 0)
            assert "EVOLINK_MCP_OUTPUT_DIR" in answer.content[0].text
            (small / "filler").unlink()
            subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
            repeat = await client.call_tool("generate_image", REQUEST)
    assert repeat.structured_content["images"][0]["path"] is not None
    assert world.posts == 1


@pytest.mark.anyio
async def test_a_data_folder_that_is_a_file_stops_purchases_with_an_error(open_world: Open, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a folder")
    with anyio.fail_after(300):
        async with open_world() as world, world.client() as client:
            refusal = await client.call_tool("generate_image", REQUEST)
            task_list = await client.call_tool("list_tasks", {})
            answer = await client.call_tool("get_task", {"task_id": "task-unified-1-abc"})
    assert (refusal.structured_content["charged"], world.posts) == ("no", 0)
    assert [answer.is_error for answer in (refusal, task_list, answer)] == [True] * 3
    assert "EVOLINK_MCP_DATA_DIR" in task_list.content[0].text
    assert answer.structured_content["error"]["code"] != "journal_unwritable"


def test_the_journal_holds_no_key(open_journal: OpenJournal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "EVOLINK_API_KEY", KEY)
    journal = open_journal()
    journal.intend(entry(journal, request={"prompt": "x"}))
    assert not any(KEY.encode() in path.read_bytes() for path in journal.folder.rglob("*") if path.is_file())
