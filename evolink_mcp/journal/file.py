"""The journal's SQLite file: opened, migrated, moved aside when damaged; and the lock that shows that its owner lives.

Everything here blocks: it runs in the journal's own thread.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.migrations import check_origin, migrate
from evolink_mcp.journal.rows import searched

if TYPE_CHECKING:
    import sqlite3

    from filelock import BaseFileLock

log = logging.getLogger(__name__)
T = TypeVar("T")

FILE_NAME = "journal.sqlite3"
# How long a call waits while another program holds the file.
BUSY_TIMEOUT_S = 15.0
COPIES_MAX = 5


class JournalFile:
    """One connection to the file in `folder`; nothing is created before the first call of `run`.

    `set_aside` is where a damaged file was moved to, if one was found.
    """

    def __init__(self, folder: Path, owner: str, *, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.set_aside: Path | None = None
        self._owner = owner
        self._clock = clock
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        self._life: BaseFileLock | None = None
        self._life_inode = 0

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / FILE_NAME

    def run(self, act: Callable[[sqlite3.Connection], T]) -> T:
        """Call `act` with the connection. A damaged file is moved aside, never deleted, and a new one begun.

        Raises:
            JournalUnwritable: for everything that SQLite or the file system raises.
        """
        import sqlite3

        for attempt in (1, 2):
            try:
                return act(self._opened())
            except sqlite3.OperationalError as error:
                raise self.unwritable(str(error)) from error
            except sqlite3.DatabaseError as error:
                if attempt == 2 or isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
                    raise self.unwritable(str(error)) from error
                self._put_aside()
            except OSError as error:
                raise self.unwritable(error.strerror or type(error).__name__) from error
        raise AssertionError("unreachable")

    @property
    def in_use(self) -> bool:
        """Whether anything was read or written yet."""
        return self._life is not None

    def close(self, *, leave_sign: bool = False) -> None:
        """Close the file and end the sign of life. With `leave_sign` others see that this owner has died."""
        self._shut()
        if self._life is not None:
            with suppress(OSError):
                self._life.release()
                if not leave_sign:
                    self.life_path(self._owner).unlink()
            self._life = None

    def is_dead(self, owner: str) -> bool:
        """Whether this server has ended for certain: its lock is free, or it is gone and so is its process."""
        from filelock import FileLock, Timeout

        path = self.life_path(owner)
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
        return True

    def life_path(self, owner: str) -> Path:
        """The lock file that a server holds as long as it lives."""
        return self.folder / "owners" / f"{owner}.lock"

    def unwritable(self, reason: str) -> JournalUnwritable:
        """The error that names the place and the setting."""
        return JournalUnwritable(
            f"the journal {self.path} cannot be used ({reason}); EVOLINK_MCP_DATA_DIR names its folder"
        )

    def _opened(self) -> sqlite3.Connection:
        if self._db is not None and self._current_inode() != self._inode:
            self._find_again(self._db)
        self._hold_life_lock()
        if self._db is None:
            if not self.path.exists():
                os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            self._db = self._connect()
            self._inode = self._current_inode()
        return self._db

    def _connect(self) -> sqlite3.Connection:
        db = _connected(self.path)
        try:
            check_origin(db, self.path)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            migrate(db)
        except BaseException:
            db.close()
            raise
        return db

    def _current_inode(self) -> int:
        return _inode(self.path)

    def _find_again(self, db: sqlite3.Connection) -> None:
        """The file was deleted or replaced while it was open: write a deleted one again, or open the new one.

        Without this, orders would go on into a file that no other server and no later start can see.
        """
        import sqlite3

        if self.path.exists():
            log.warning("the journal %s was replaced; what is under way is written into the new one", self.path)
            self._shut()
            return
        log.warning("the journal %s was deleted while it was in use; it is written again", self.path)
        part = self.path.with_name(f".{FILE_NAME}-{self._owner}")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(part, os.O_CREAT | os.O_RDWR, 0o600))
        copy = sqlite3.connect(part)
        try:
            db.backup(copy)
        finally:
            copy.close()
        self._shut()
        for tail in ("-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.unlink(f"{self.path}{tail}")
        if not self.path.exists():
            os.replace(part, self.path)
        else:
            part.unlink()

    def _shut(self) -> bool:
        """Close the connection; False if there was none."""
        import sqlite3

        db, self._db = self._db, None
        if db is not None:
            with suppress(sqlite3.Error):
                db.close()
        return db is not None

    def _hold_life_lock(self) -> None:
        """Hold this owner's lock file. The lock ends with the process: while it is held, other servers know that we live.

        A file that somebody has deleted is made again.
        """
        from filelock import FileLock

        path = self.life_path(self._owner)
        if self._life is not None and _inode(path) == self._life_inode:
            return
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        life = FileLock(path, mode=0o600, thread_local=False)
        life.acquire(blocking=False)
        self._life, self._life_inode = life, _inode(path)

    def _put_aside(self) -> None:
        if self._shut():
            with suppress(OSError):
                if self.path.stat().st_ino != self._inode:
                    return  # another server has moved the damaged file aside already: this file is its new one
        aside = self.path.with_name(f"{FILE_NAME}.damaged-{int(self._clock())}-{self._owner[-6:]}")
        try:
            os.replace(self.path, aside)
            for tail in ("-wal", "-shm"):
                with suppress(FileNotFoundError):
                    os.replace(f"{self.path}{tail}", f"{aside}{tail}")
        except OSError as error:
            raise self.unwritable(error.strerror or "damaged") from error
        self.set_aside = aside
        log.error("the journal was damaged: it was set aside as %s and a new one begun", aside)


@contextmanager
def snapshot(folder: Path) -> Generator[sqlite3.Connection]:
    """The journal in `folder` as it is now, in a copy: not one byte of it or of its folder changes.

    Raises:
        JournalUnwritable: it is damaged, cannot be read, or was written by a newer version.
    """
    import sqlite3

    file = JournalFile(folder, "reader")
    with TemporaryDirectory(prefix="evolink-mcp-") as name:
        copy = Path(name) / FILE_NAME
        try:
            _copy(file.path, copy)
            db = _connected(copy)
            try:
                check_origin(db, file.path)
                migrate(db)
                yield db
            finally:
                db.close()
        except sqlite3.DatabaseError as error:
            raise file.unwritable(str(error)) from error
        except OSError as error:
            raise file.unwritable(error.strerror or type(error).__name__) from error


def _inode(path: Path) -> int:
    """The identity of the file at `path`; 0 if there is none."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def new_owner() -> str:
    """A server's mark: the number of its process, and a word that no other server has."""
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
        return True
    return True


def _copy(path: Path, copy: Path) -> None:
    """Copy the file and its write-ahead log; again if a server has written meanwhile."""
    for _ in range(COPIES_MAX):
        before = _versions(path)
        for tail in ("", "-wal"):
            if Path(f"{path}{tail}").exists() or not tail:
                shutil.copyfile(f"{path}{tail}", f"{copy}{tail}")
            else:
                Path(f"{copy}{tail}").unlink(missing_ok=True)
        if _versions(path) == before:
            return


def _versions(path: Path) -> list[tuple[int, int]]:
    facts = [Path(f"{path}{tail}") for tail in ("", "-wal")]
    return [(one.stat().st_mtime_ns, one.stat().st_size) if one.exists() else (0, 0) for one in facts]


def _connected(path: Path) -> sqlite3.Connection:
    import sqlite3

    db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    db.text_factory = _text
    db.create_function("holds", 5, _holds, deterministic=True)
    return db


def _holds(word: str, request: str, pictures: str, save_as: str | None, task_id: str | None) -> bool:
    """Whether a folded word is in an entry's prompt, in a name of its files or in its task's id."""
    try:
        return any(word in text for text in searched(json.loads(request), json.loads(pictures), save_as, task_id))
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return False


def _text(data: bytes) -> str:
    """A damaged letter must not make the entry unreadable."""
    return data.decode("utf-8", "replace")
