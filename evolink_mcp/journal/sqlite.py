"""The journal in one SQLite file (WAL, synchronous FULL), which all servers of one computer share."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal import search
from evolink_mcp.journal.actions import Action, ActionThread, Outcome
from evolink_mcp.journal.backend import Connection, Result, Row, Statement, UniqueViolation, clean_text
from evolink_mcp.journal.entry import Entry
from evolink_mcp.journal.journal import (
    ALL_PROFILES,
    CHARGES,
    FACT_VALUES,
    HAS_WORD,
    INSERT_ENTRY,
    RECENT,
    SUMS,
    SUMS_OF_ENTRIES,
    Charge,
    Journal,
    Selection,
    Sums,
    values_of_sums,
)
from evolink_mcp.journal.migrations import check_origin, migrate, shared_transaction, transaction
from evolink_mcp.journal.paid_record import PaidRecord, PaidTask, readable_tasks
from evolink_mcp.journal.profile import DEFAULT_PROFILE, profile_id
from evolink_mcp.journal.rows import fold, readable_entries

if TYPE_CHECKING:
    # The functions import SQLite and filelock, so that the list of tools does not wait for them (docs/speed.md).
    import sqlite3

    from filelock import BaseFileLock

log = logging.getLogger(__name__)
T = TypeVar("T")

FILE_NAME = "journal.sqlite3"
# The longest wait for a lock that another program holds. After it, operations wait LOCKED_WAIT_S until a write succeeds.
# So a call that needs the journal several times waits only once.
LOCK_WAIT_S = 10.0
LOCKED_WAIT_S = 0.2
COPIES_MAX = 5  # attempts to copy the files while servers write to them
PRIMARY_CODE = 0xFF  # the part of an error code of SQLite that names the kind of the error

# Add entries of a copy. Of two states of an entry the later one stays: with a task, then finished, then delivered.
MERGE_ENTRIES = """INSERT OR REPLACE INTO main.entries SELECT old.* FROM copy.entries AS old
    LEFT JOIN main.entries AS new ON new.key = old.key WHERE new.key IS NULL
    OR (old.task_id IS NOT NULL, old.closed, old.delivered_at IS NOT NULL)
        > (new.task_id IS NOT NULL, new.closed, new.delivered_at IS NOT NULL)"""
# The tables that a copy has beside the entries. Triggers write the sums and the index of words.
OTHER_TABLES = ("links", "uploads", "facts")
# Add an entry of the record, unless the journal has its key or its task.
INSERT_LOST = INSERT_ENTRY.replace("INSERT INTO", "INSERT OR IGNORE INTO")


class JournalFile:
    """One connection to the file in `folder`. The first `run` creates folder and file. All methods block.

    Before each action it compares the three files of the database with those that it opened, and the journal with the
    record of paid tasks.
    """

    def __init__(
        self,
        folder: Path,
        owner: str,
        *,
        clock: Callable[[], float] = time.time,
        has_full_text: bool = True,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        """Without `has_full_text`, use no full-text search even if SQLite has it."""
        self.folder = folder
        self.path = folder / FILE_NAME
        self.owner = owner
        self._clock = clock
        self._has_full_text = has_full_text
        self._lock_wait_s = lock_wait_s
        self._is_locked = False  # the last write waited for a lock in vain
        self._db: sqlite3.Connection | None = None
        # Text instead of `Path`, because every action reads the state of these files.
        self._paths = {tail: f"{self.path}{tail}" for tail in ("", "-wal", "-shm")}
        self._files: FileStates = {}
        self._record = PaidRecord(folder)
        self._is_compared = False
        # Paid tasks that a living server has not written into the journal yet, by the key of the entry.
        self._unrecorded: dict[str, PaidTask] = {}
        self._dead_owners: set[str] = set()
        self._lease: BaseFileLock | None = None
        self._lease_inode = 0
        self._own_lease_path = self.lease_path(owner)

    def run(self, act: Callable[[sqlite3.Connection], T]) -> T:
        """Call `act` with the connection. Rename a damaged file, never delete it, and create a new one.

        Raises:
            JournalUnwritable: SQLite or the file system raised an error.
        """
        import sqlite3

        for attempt in (1, 2):
            try:
                db = self._open_and_compare()
                change_count = db.total_changes
                result = act(db)
                if self._is_locked and db.total_changes != change_count:
                    self._set_locked(is_locked=False)
                return result
            except sqlite3.DatabaseError as error:
                self._note_lock(error)
                # A short read is damage: the file lacks pages that its index names.
                is_short = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_IOERR_SHORT_READ
                # A lock or a full disk: the file is intact.
                if isinstance(error, sqlite3.OperationalError) and not is_short:
                    raise self.unwritable(str(error)) from error
                # An error of the statement and not of the file.
                if attempt == 2 or isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
                    raise self.unwritable(str(error)) from error
                self._move_damaged_file()
            except OSError as error:
                raise self.unwritable(error.strerror or type(error).__name__) from error
        raise AssertionError("unreachable")

    def run_together(self, actions: Sequence[Action]) -> list[Action]:
        """Run actions in one transaction, and settle them. Return those that did not start.

        The actions before the first change get their answers at once. Later ones get them after the commit, because the
        answers may depend on the change. The first later action without a change ends the transaction: a long search must
        not keep the write lock. After an error of SQLite the started actions run alone, and the error reaches the one that
        causes it.
        """
        import sqlite3

        failures = (sqlite3.Error, OSError, MemoryError)
        started: list[Action] = []
        try:
            db = self._open_and_compare()
            with shared_transaction(db):
                unsettled = _run_in_transaction(db, actions, started, failures)
        except (*failures, JournalUnwritable) as error:
            if not started and isinstance(error, sqlite3.Error):
                self._note_lock(error)
            log.info("actions on the journal run alone: %s", error)
            # Without a transaction each of them needs its own answer.
            started = started or list(actions)
            for action in started:
                if not action.future.done():
                    action.run_alone(self.run)
        else:
            for action, outcome in unsettled:
                action.settle(outcome)
            if self._is_locked and unsettled:
                self._set_locked(is_locked=False)
        return list(actions[len(started) :])

    def record_paid(self, task: PaidTask) -> None:
        """Add a paid task to the record. An error is only logged, because the journal gets the entry too."""
        try:
            self._record.append([task])
        except OSError as error:
            log.error("%s was not added to %s: %s", task.entry.task_id, self._record.path, error.strerror)

    @property
    def is_open(self) -> bool:
        """Whether the file was read or written."""
        return self._lease is not None

    def close(self, *, keep_lease_file: bool = False) -> None:
        """Close the file and release the lease. With `keep_lease_file`, other servers see a dead owner."""
        self._shut()
        if self._lease is not None:
            with suppress(OSError):
                self._lease.release()
                if not keep_lease_file:
                    self.lease_path(self.owner).unlink()
            self._lease = None

    def is_dead(self, owner: str) -> bool:
        """Return whether this server ended: its lease is free, or its lease file and its process do not exist."""
        from filelock import FileLock, Timeout

        if owner in self._dead_owners:
            return True
        path = self.lease_path(owner)
        # A FileLock would create the missing file.
        if not path.exists():
            return not _is_running(owner)
        lock = FileLock(path, mode=0o600)
        try:
            lock.acquire(blocking=False)
        except (Timeout, OSError):
            return False
        with suppress(OSError):
            lock.release()
            path.unlink()
        # A later process may get the process ID of the dead one, so the answer is remembered.
        self._dead_owners.add(owner)
        return True

    def lease_path(self, owner: str) -> Path:
        """Return the path of the lease: a file that a server locks until it ends."""
        return self.folder / "owners" / f"{owner}.lock"

    def unwritable(self, reason: str) -> JournalUnwritable:
        """Return the error with the path and the setting."""
        return JournalUnwritable(
            f"the journal {self.path} cannot be used ({reason}); EVOLINK_MCP_DATA_DIR names its folder"
        )

    @property
    def _present_wait_s(self) -> float:
        return min(LOCKED_WAIT_S, self._lock_wait_s) if self._is_locked else self._lock_wait_s

    def _note_lock(self, error: sqlite3.Error) -> None:
        """If another program held its lock during the whole wait, wait only briefly until a write succeeds."""
        import sqlite3

        if getattr(error, "sqlite_errorcode", 0) & PRIMARY_CODE == sqlite3.SQLITE_BUSY and not self._is_locked:
            log.warning("another program has locked the journal %s for %g s", self.path, self._lock_wait_s)
            self._set_locked(is_locked=True)

    def _set_locked(self, *, is_locked: bool) -> None:
        self._is_locked = is_locked
        if self._db is not None:
            self._db.execute(f"PRAGMA busy_timeout = {int(self._present_wait_s * 1000)}")

    def _open_and_compare(self) -> sqlite3.Connection:
        """Return the connection, after the comparison of the journal with the record of paid tasks."""
        db = self._open()
        self._compare_record(db)
        return db

    def _open(self) -> sqlite3.Connection:
        if self._db is not None and self._db.in_transaction:
            self._end_transaction(self._db)
        if self._db is not None:
            now = _states(self._paths)
            if _is_same(self._files, now):
                self._files = now
            else:
                self._recover(self._db, self._files, now)
        self._take_lease()
        if self._db is None:
            files = _states(self._paths)
            if files[""] == MISSING:
                # SQLite would create it with the permissions of the umask. Prompts are private.
                os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            elif files[""].size == 0 and files["-wal"].size > 0:
                # SQLite would delete the log of an empty file, although only the log has the entries.
                self._move_damaged_file()
                return self._open()
            self._db = self._open_journal()
            self._files = _states(self._paths)
            self._is_compared = False
            self._merge_copy(self._db)
        return self._db

    def _end_transaction(self, db: sqlite3.Connection) -> None:
        """Take back a transaction that did not end. Every later action would become a part of it."""
        import sqlite3

        log.warning("a transaction of the journal %s did not end; it is taken back", self.path)
        try:
            db.execute("ROLLBACK")
        except sqlite3.Error:
            self._shut()

    def _open_journal(self) -> sqlite3.Connection:
        db = _connect_to(self.path, self._present_wait_s)
        try:
            # The check is first, because the pragma below already changes the file.
            check_origin(db, self.path)
            db.execute("PRAGMA journal_mode = WAL")
            # With NORMAL, a power cut would lose the newest transactions of the log.
            db.execute("PRAGMA synchronous = FULL")
            migrate(db)
            self._prepare_search(db)
        except BaseException:
            db.close()
            raise
        return db

    def _prepare_search(self, db: sqlite3.Connection) -> None:
        is_usable = self._has_full_text and search.is_available(db)
        if not is_usable:
            log.warning("SQLite has no full-text search here, so a search of words reads every entry")
        search.prepare(db, is_usable=is_usable)

    def _recover(self, db: sqlite3.Connection, before: FileStates, now: FileStates) -> None:
        """Close the files that were deleted, truncated or replaced. Copy the entries first, for the next `_open_journal`.

        Otherwise this server would write purchases into a file that no other server and no later start can see.
        """
        self._copy_entries(db)
        if now[""].inode not in (0, before[""].inode):
            log.warning("the journal %s was replaced; the entries of this server are added to the new file", self.path)
            self._shut()
            return
        log.warning("a file of the journal %s was deleted or truncated while it was open; it is restored", self.path)
        self._shut()
        # SQLite would apply the log of the deleted database to the new one.
        if now[""] == MISSING:
            for tail in ("-wal", "-shm"):
                with suppress(FileNotFoundError):
                    os.unlink(f"{self.path}{tail}")

    @property
    def has_data(self) -> bool:
        """Whether there is a journal, or a record of paid tasks from which it is restored."""
        return self.path.exists() or self._record.exists()

    @property
    def _copy_path(self) -> Path:
        return self.path.with_name(f".{FILE_NAME}-{self.owner}")

    def _copy_entries(self, db: sqlite3.Connection) -> None:
        """Copy the content of the open files, unless it is damaged too."""
        import sqlite3

        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._copy_path.unlink(missing_ok=True)
        os.close(os.open(self._copy_path, os.O_CREAT | os.O_RDWR, 0o600))
        copy = sqlite3.connect(self._copy_path)
        try:
            db.backup(copy)
            is_intact = copy.execute("PRAGMA quick_check").fetchone()[0] == "ok"
        except sqlite3.DatabaseError:
            is_intact = False
        finally:
            copy.close()
        if not is_intact:
            self._copy_path.unlink()

    def _merge_copy(self, db: sqlite3.Connection) -> None:
        """Add the entries of the copy, if there is one. Of two states of an entry the later one stays.

        Raises:
            sqlite3.DatabaseError: the opened file is damaged.
        """
        import sqlite3

        if not self._copy_path.exists():
            return
        # The copy is deleted after the merge, so a damaged file must not receive it.
        if db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("database disk image is malformed")
        db.execute("ATTACH ? AS copy", (str(self._copy_path),))
        try:
            with transaction(db):
                db.execute(MERGE_ENTRIES)
                for table in OTHER_TABLES:
                    db.execute(f"INSERT OR REPLACE INTO main.{table} SELECT * FROM copy.{table}")
        finally:
            db.execute("DETACH copy")
        self._copy_path.unlink()

    def _compare_record(self, db: sqlite3.Connection) -> None:
        """Restore paid tasks that are in the record and not in the journal.

        Raises:
            sqlite3.Error, OSError: the record was not compared.
        """
        if self._is_compared and not self._unrecorded and self._record.is_read():
            return
        # Without its record the journal alone has the paid tasks, so a new record begins with all of them.
        if not self._record.exists():
            rows = db.execute("SELECT * FROM entries WHERE phase = 'submitted' ORDER BY created_at").fetchall()
            self._record.append(readable_tasks(rows))
        tasks = self._record.read_new() if self._is_compared else self._record.read_tail()
        lost = self._lost_tasks(db, tasks)
        if lost and not self._is_compared:
            lost = self._lost_tasks(db, self._record.read_all())
        if lost:
            log.warning("the journal %s lacked %d paid tasks; they are restored", self.path, len(lost))
            with transaction(db):
                restore(db, lost)
        self._is_compared = True

    def _lost_tasks(self, db: sqlite3.Connection, tasks: list[PaidTask]) -> list[PaidTask]:
        """Return the tasks that are not in the journal, and that no living owner of their entry will write into it."""
        lost: list[PaidTask] = []
        for task in (*self._unrecorded.values(), *tasks):
            entry = task.entry
            row = db.execute("SELECT owner, task_id FROM entries WHERE key = ?", (entry.key,)).fetchone()
            is_written = (row is not None and row["task_id"] is not None) or _has_task(db, task)
            has_living_owner = row is not None and row["owner"] != "" and not self._is_dead_owner(row["owner"])
            if is_written or not has_living_owner:
                self._unrecorded.pop(entry.key, None)
                if not is_written:
                    lost.append(task if self._has_lease(entry.owner) else _without_owner(task))
            else:
                self._unrecorded[entry.key] = task
        return lost

    def _has_lease(self, owner: str) -> bool:
        return owner == self.owner or (self.lease_path(owner).exists() and not self.is_dead(owner))

    def _is_dead_owner(self, owner: str) -> bool:
        return owner != self.owner and self.is_dead(owner)

    def _shut(self) -> bool:
        """Close the connection. Return False if there was none."""
        import sqlite3

        db = self._db
        self._db = None
        if db is not None:
            with suppress(sqlite3.Error):
                db.close()
        return db is not None

    def _take_lease(self) -> None:
        """Lock this server's lease file, which the system unlocks when the process ends. Restore a deleted file."""
        from filelock import FileLock

        path = self._own_lease_path
        if self._lease is not None and _inode(path) == self._lease_inode:
            return
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        lease = FileLock(path, mode=0o600, thread_local=False)
        lease.acquire(blocking=False)
        self._lease = lease
        self._lease_inode = _inode(path)

    def _move_damaged_file(self) -> None:
        if self._shut():
            with suppress(OSError):
                if self.path.stat().st_ino != self._files[""].inode:
                    return  # another server renamed the damaged file and created this one
        # Two servers may detect the damage in the same second.
        aside = self.path.with_name(f"{FILE_NAME}.damaged-{int(self._clock())}-{self.owner[-6:]}")
        try:
            os.replace(self.path, aside)
            for tail in ("-wal", "-shm"):
                with suppress(FileNotFoundError):
                    os.replace(f"{self.path}{tail}", f"{aside}{tail}")
        except OSError as error:
            raise self.unwritable(error.strerror or "damaged") from error
        log.error("the journal was damaged: it was set aside as %s, and a new one was created", aside)


def _run_in_transaction(
    db: sqlite3.Connection, actions: Sequence[Action], started: list[Action], failures: tuple[type[Exception], ...]
) -> list[tuple[Action, Outcome]]:
    """Run actions in the open transaction, for `run_together`. Add each to `started` before it runs.

    Settle the actions before the first change. Return the others with their outcomes: they depend on the commit.

    Raises:
        sqlite3.Error, OSError, MemoryError: one of `failures` ended an action, or SQLite took the transaction back.
    """
    import sqlite3

    unsettled: list[tuple[Action, Outcome]] = []
    first_count = db.total_changes
    for action in actions:
        started.append(action)
        change_count = db.total_changes
        outcome = Outcome.of(partial(action.act, db), *failures)
        # After some errors SQLite takes the whole transaction back.
        if not db.in_transaction:
            raise sqlite3.OperationalError("the transaction was taken back")
        if db.total_changes == first_count:
            action.settle(outcome)
            continue
        unsettled.append((action, outcome))
        if db.total_changes == change_count:
            break
    return unsettled


@contextmanager
def snapshot(folder: Path) -> Generator[sqlite3.Connection]:
    """Open a copy of the journal in `folder`. The journal and its folder do not change.

    Raises:
        JournalUnwritable: It is damaged, cannot be read, or a newer version or an unpublished build wrote it.
    """
    import sqlite3

    file = JournalFile(folder, "reader")
    # Even a reader of a WAL database writes its -shm file, so only a copy is opened.
    with TemporaryDirectory(prefix="evolink-mcp-") as name:
        copy = Path(name) / FILE_NAME
        record = PaidRecord(folder)
        try:
            if file.path.exists() or not record.exists():
                _copy(file.path, copy)
            db = _connect_to(copy)
            try:
                check_origin(db, file.path)
                migrate(db)
                if not search.is_available(db):
                    # `restore` inserts rows, and the triggers of the index would fail.
                    search.prepare(db, is_usable=False)
                restore(db, record.read_all())
                yield db
            finally:
                db.close()
        except sqlite3.DatabaseError as error:
            raise file.unwritable(str(error)) from error
        except OSError as error:
            raise file.unwritable(error.strerror or type(error).__name__) from error


class FileState(NamedTuple):
    """The identity of a file and its size in bytes."""

    inode: int
    size: int


MISSING = FileState(0, 0)
FileStates = dict[str, FileState]


def _states(paths: dict[str, str]) -> FileStates:
    """Return the states of the database, its log and the index of the log. Every action reads them."""
    states: FileStates = {}
    for tail, path in paths.items():
        try:
            status = os.stat(path)
        except OSError:
            states[tail] = MISSING
        else:
            states[tail] = FileState(status.st_ino, status.st_size)
    return states


def _is_same(before: FileStates, now: FileStates) -> bool:
    """Return whether all files have the same identity and none became smaller."""
    return before == now or all(
        old.inode in (0, now[tail].inode) and now[tail].size >= old.size for tail, old in before.items()
    )


def restore(db: sqlite3.Connection, tasks: Iterable[PaidTask]) -> None:
    """Write the entries of tasks that the journal does not have, or has without their task."""
    for task in tasks:
        if _has_task(db, task):
            continue
        db.execute("DELETE FROM entries WHERE key = ? AND task_id IS NULL", (task.entry.key,))
        db.execute(INSERT_LOST, task.values)


def _has_task(db: sqlite3.Connection, task: PaidTask) -> bool:
    """Return whether any entry of the profile has the task. EvoLink may answer two orders with the same task."""
    sql = "SELECT 1 FROM entries WHERE profile = ? AND task_id = ?"
    return db.execute(sql, (task.profile, task.entry.task_id)).fetchone() is not None


def _without_owner(task: PaidTask) -> PaidTask:
    """Return the task without its owner and its waiting call: both have ended."""
    return replace(task, entry=replace(task.entry, owner="", caller=""))


def _inode(path: Path) -> int:
    """Return the inode of the file, or 0 without a file."""
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0


def new_owner() -> str:
    """Return a new server ID: the process ID and a random word."""
    return f"{os.getpid()}-{uuid.uuid4().hex}"


def _is_running(owner: str) -> bool:
    """Return whether the owner's process exists. Windows cannot delete a lock file in use, so it needs no check."""
    number = owner.partition("-")[0]
    if sys.platform == "win32" or "-" not in owner or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        # A missing permission, for example, proves that the process exists.
        return True
    return True


def _copy(path: Path, copy: Path) -> None:
    """Copy the file and its write-ahead log. Repeat if a server wrote in between."""
    for _ in range(COPIES_MAX):
        before = _versions(path)
        for tail in ("", "-wal"):
            if Path(f"{path}{tail}").exists() or not tail:
                shutil.copyfile(f"{path}{tail}", f"{copy}{tail}")
            else:
                Path(f"{copy}{tail}").unlink(missing_ok=True)
        if _versions(path) == before:
            return
    log.warning("other servers write to the journal all the time, so the newest entries may be missing here")


def _versions(path: Path) -> list[tuple[int, int]]:
    files = [Path(f"{path}{tail}") for tail in ("", "-wal")]
    return [(one.stat().st_mtime_ns, one.stat().st_size) if one.exists() else (0, 0) for one in files]


def _connect_to(path: Path, lock_wait_s: float = LOCK_WAIT_S) -> sqlite3.Connection:
    import sqlite3

    # With Python's default isolation_level, sqlite3 begins transactions itself and without the write lock.
    db = sqlite3.connect(path, timeout=lock_wait_s, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    db.text_factory = _text
    # INSERT OR REPLACE must run the triggers for the row that it deletes.
    db.execute("PRAGMA recursive_triggers = ON")
    return db


def _text(data: bytes) -> str:
    """Decode text. A damaged character must not make the entry unreadable."""
    return data.decode("utf-8", "replace")


class SqliteConnection:
    """See Connection. Its methods block and never suspend, so that one thread can run a complete action."""

    def __init__(self, db: sqlite3.Connection, file: JournalFile) -> None:
        self._db = db
        self._file = file

    async def execute(self, sql: str, values: Sequence[Any] = ()) -> int:
        """See Connection."""
        return self._execute(sql, values).changed

    def _execute(self, sql: str, values: Sequence[Any]) -> Result:
        import sqlite3

        try:
            cursor = self._db.execute(sql, [clean_text(value) for value in values])
            return Result(cursor.fetchall(), cursor.rowcount)
        except sqlite3.IntegrityError as error:
            if error.sqlite_errorname != "SQLITE_CONSTRAINT_UNIQUE":
                raise
            raise UniqueViolation from error

    async def batch(self, *statements: Statement) -> list[Result]:
        """See Connection."""
        with transaction(self._db):
            return [self._execute(sql, values) for sql, values in statements]

    async def fetch(self, sql: str, values: Sequence[Any] = (), *, lock_rows: bool = False) -> Sequence[Row]:
        """See Connection. A transaction locks the whole file, so `lock_rows` has no effect."""
        return self._execute(sql, values).rows

    @asynccontextmanager
    async def transaction(self, *locks: str) -> AsyncGenerator[None]:
        """See Connection. A transaction locks the whole file, so `locks` have no effect."""
        with transaction(self._db):
            yield

    async def is_dead(self, owner: str) -> bool:
        """See Connection."""
        return self._file.is_dead(owner)

    async def is_silent(self, owner: str) -> bool:
        """See Connection."""
        return self._file.is_dead(owner)


class SqliteBackend:
    """See Backend. One thread does all work: the event loop never waits for the disk or for a lock."""

    can_publish = False
    has_lease = True  # it ends only with the process
    reread_s = 1.0
    adopt_every_s = None

    def __init__(self, file: JournalFile) -> None:
        self.owner = file.owner
        self.file = file
        self._thread: ActionThread | None = None

    @property
    def is_open(self) -> bool:
        """See Backend."""
        return self.file.is_open

    @property
    def has_data(self) -> bool:
        """See Backend."""
        return self.file.has_data

    async def run(
        self, act: Callable[[Connection], Awaitable[T]], *, key: str = "", paid_task: PaidTask | None = None
    ) -> T:
        """See Backend. One thread runs all actions in the order of their calls.

        `paid_task` is added to the record beside the journal before the action.
        """

        def run_act(db: sqlite3.Connection) -> T:
            return _run_now(act(SqliteConnection(db, self.file)))

        return await asyncio.wrap_future(self._started_thread().submit(run_act, paid_task))

    def listen(self, channel: str, receive: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """See Backend. SQLite has no notifications; `reread_s` is short instead."""
        return lambda: None

    async def publish(self, channel: str, payload: dict[str, Any]) -> None:
        """See Backend. SQLite has no notifications."""

    def publish_later(self, channel: str, payload: dict[str, Any], *, topic: str) -> None:
        """See Backend. SQLite has no notifications."""

    def when_lost(self, stop: Callable[[], None]) -> Callable[[], None]:
        """See Backend. A lease ends only with its process, so this never happens."""
        return lambda: None

    async def close(self, *, is_released: bool) -> None:
        """See Backend."""
        # Later calls use this thread too, because two threads must not share the connection. It ends with this object.
        closing = self._started_thread().call(partial(self.file.close, keep_lease_file=not is_released))
        await asyncio.shield(asyncio.wrap_future(closing))

    def _started_thread(self) -> ActionThread:
        self._thread = self._thread or ActionThread(self.file)
        return self._thread


class SqliteJournal(Journal):
    """The journal in the file of `folder`. Nothing is created before the first call."""

    def __init__(
        self,
        folder: Path,
        identity: str = "",
        *,
        profile: str = DEFAULT_PROFILE,
        clock: Callable[[], float] = time.time,
        has_full_text: bool = True,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        """See Journal and JournalFile."""
        backend = SqliteBackend(
            JournalFile(folder, new_owner(), clock=clock, has_full_text=has_full_text, lock_wait_s=lock_wait_s)
        )
        super().__init__(backend, identity, profile=profile)
        self.file = backend.file
        self._sqlite = backend

    async def _run_write(self, act: Callable[[Connection], Awaitable[bool]], entry: Entry) -> bool:
        paid_task = PaidTask(self.profile, entry) if entry.has_certain_task else None
        return await self._sqlite.run(act, key=entry.key, paid_task=paid_task)

    async def _select(self, db: Connection, selection: Selection, limit: int) -> Sequence[Row]:
        terms = search.terms_of(selection.words)
        if not terms or not await db.fetch(search.HAS_INDEX):
            return await super()._select(db, selection, limit)
        # The index ignores characters beyond a NUL, and short words have no term. So all words are compared again.
        sql = self._sql(search.RECENT_BY_WORDS, filters=selection.filters)
        values = selection.values
        rows = await db.fetch(sql, (terms, *search.positions(selection.start, selection.end), *values, limit))
        if len(rows) == limit:
            # The order within a millisecond is not the order of the list, so all of the last one are candidates.
            last = search.positions_beside(rows[-1]["position"])
            rows = [*rows, *await db.fetch(sql, (terms, *last, *values, -1))]
        unique = {row["key"]: row for row in rows}
        return sorted(unique.values(), key=lambda row: (-row["created_at"], row["key"]))[:limit]

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.file.path


def read_entries(
    folder: Path, limit: int, words: tuple[str, ...] = (), since: float = 0.0, *, profile: str | None = None
) -> list[Entry]:
    """Return the newest entries of the profile, newest first. Without a profile: of all. Block, and change nothing.

    `words` are those of `Journal.recent`, `since` is in epoch seconds.

    Raises:
        JournalUnwritable: The journal is damaged or cannot be read.
    """
    filters = " AND ".join(["created_at >= ?", *[HAS_WORD] * len(words)])
    sql = RECENT.format(mine=_mine(profile), filters=filters)
    with snapshot(folder) as db:
        return readable_entries(db.execute(sql, (since, *map(fold, words), limit)).fetchall())


def read_sums(
    folder: Path, since: list[float], words: tuple[str, ...] = (), *, profile: str | None = None
) -> list[Sums]:
    """Return the sums of the profile since each of these times (epoch seconds). Block, and change nothing.

    Without a profile: the sums of all. `words` are those of `Journal.recent`.

    Raises:
        JournalUnwritable: The journal is damaged or cannot be read.
    """
    with snapshot(folder) as db:
        if not words:
            sql = SUMS.format(mine=_mine(profile))
            return [Sums.of(db.execute(sql, values_of_sums(start)).fetchone()) for start in since]
        sql = SUMS_OF_ENTRIES.format(mine=_mine(profile), filters=" AND ".join([HAS_WORD] * len(words)))
        return [Sums.of(db.execute(sql, (start, *map(fold, words))).fetchone()) for start in since]


def read_charges(folder: Path, since: float, *, profile: str | None = None) -> list[Charge]:
    """Return the charges of the profile since a time (epoch seconds). Block, and change nothing.

    Without a profile: the charges of all.

    Raises:
        JournalUnwritable: The journal is damaged or cannot be read.
    """
    with snapshot(folder) as db:
        return [Charge.of(row) for row in db.execute(CHARGES.format(mine=_mine(profile)), (since,))]


def read_fact(folder: Path, name: str) -> list[str]:
    """Return the values of a fact, one for each account that has it. Block, and change nothing.

    Raises:
        JournalUnwritable: The journal is damaged or cannot be read.
    """
    with snapshot(folder) as db:
        return [row["value"] for row in db.execute(FACT_VALUES, (name,))]


def read_accounts(folder: Path, profile: str, identity: str) -> set[str]:
    """Return the accounts that this key of the profile can act for. Block, and change nothing.

    Raises:
        JournalUnwritable: The journal is damaged or cannot be read.
    """
    with snapshot(folder) as db:
        rows = db.execute(
            "SELECT account FROM links WHERE profile = ? AND identity = ?", (profile_id(profile), identity)
        )
        return {identity, *(row["account"] for row in rows)}


def _mine(profile: str | None) -> str:
    return ALL_PROFILES if profile is None else f"profile = '{profile_id(profile)}'"


def _run_now(action: Awaitable[T]) -> T:
    """Return the result of an action that never suspends."""
    try:
        cast(Coroutine[Any, Any, T], action).send(None)
    except StopIteration as finished:
        return finished.value
    raise RuntimeError("an action of the journal waited for the event loop")
