"""The journal in one SQLite file (WAL, synchronous FULL), shared by any number of servers of one machine."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.entry import COLUMNS, STATE, Entry, entry_of
from evolink_mcp.journal.migrations import migrate, transaction

log = logging.getLogger(__name__)
T = TypeVar("T")

if TYPE_CHECKING:
    import sqlite3

    from filelock import BaseFileLock

FILE_NAME = "journal.sqlite3"
BUSY_TIMEOUT_S = 5.0


class SqliteJournal:
    """The `Journal` contract on a file in `folder`, where each method is described; nothing is created before a call.

    `owner` is this server's mark on its entries. `set_aside` is where a damaged journal was moved to, if one was found.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.owner = uuid.uuid4().hex
        self.set_aside: Path | None = None
        self._clock = clock
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        self._life: BaseFileLock | None = None

    @property
    def path(self) -> Path:
        return self.folder / FILE_NAME

    # --- writing ---

    def intend(self, entry: Entry, *, since: float = 0.0, cap: float | None = None) -> float | None:
        statement = f"INSERT INTO entries ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"
        values = [value(entry) for value in COLUMNS.values()]

        def write(db: sqlite3.Connection) -> float | None:
            with transaction(db):
                spent = _spent(db, since)
                if cap is not None and spent + entry.estimate > cap:
                    return spent
                db.execute(statement, values)
            return None

        return self._run(write)

    def update(self, entry: Entry) -> None:
        self._write(entry, STATE)

    def keep(self, entry: Entry) -> None:
        self._write(entry, (*STATE, "pictures"))

    def _write(self, entry: Entry, names: tuple[str, ...]) -> None:
        statement = f"UPDATE entries SET {', '.join(f'{name} = ?' for name in names)} WHERE key = ?"
        values = [*(COLUMNS[name](entry) for name in names), entry.key]
        if self._run(lambda db: db.execute(statement, values).rowcount) != 1:
            raise self._unwritable("the entry is not in it any more")

    def deliver(self, key: str, at: float) -> None:
        self._run(lambda db: db.execute("UPDATE entries SET delivered_at = ? WHERE key = ?", (at, key)))

    def leave(self, key: str) -> None:
        self._run(lambda db: db.execute("UPDATE entries SET attended = 0 WHERE key = ?", (key,)))

    def claim(self, key: str) -> bool:
        statement = "UPDATE entries SET attended = 1 WHERE key = ? AND attended = 0 AND delivered_at IS NULL"
        return self._run(lambda db: db.execute(statement, (key,)).rowcount) == 1

    def adopt(self) -> list[Entry]:
        from filelock import FileLock, Timeout

        owners = [row[0] for row in self._run(lambda db: db.execute(
            "SELECT DISTINCT owner FROM entries WHERE (closed = 0 OR (delivered_at IS NULL AND attended = 1))"
            " AND owner != ?", (self.owner,)).fetchall())]  # fmt: skip
        adopted: list[Entry] = []
        for owner in owners:
            lock = FileLock(self._life_path(owner))
            try:
                lock.acquire(blocking=False)
            except (Timeout, OSError):
                continue
            try:
                adopted += self._take_over(owner)
            except JournalUnwritable as error:  # keep what is taken over already; the rest is left for the next time
                log.warning("%s", error.what)
            finally:
                with suppress(OSError):
                    lock.release()
                    self._life_path(owner).unlink()
        return adopted

    def _take_over(self, owner: str) -> list[Entry]:
        def take(db: sqlite3.Connection) -> list[Any]:
            with transaction(db):
                db.execute("UPDATE entries SET attended = 0 WHERE owner = ?", (owner,))
                found = "SELECT * FROM entries WHERE owner = ? AND closed = 0"
                rows = db.execute(found, (owner,)).fetchall()
                db.execute("UPDATE entries SET owner = ? WHERE owner = ? AND closed = 0", (self.owner, owner))
            return rows

        return [replace(entry, owner=self.owner) for entry in _readable(self._run(take))]

    def remember_upload(self, sha256: str, url: str, expires_at: float) -> None:
        self._run(lambda db: db.execute("INSERT OR REPLACE INTO uploads VALUES (?, ?, ?)", (sha256, url, expires_at)))

    def by_key(self, key: str) -> Entry | None:
        return self._one("key = ?", key)

    def by_task(self, task_id: str) -> Entry | None:
        return self._one("task_id = ?", task_id)

    def recent(
        self, limit: int, status: str | None = None, since: float | None = None, until: float | None = None
    ) -> list[Entry]:
        clauses = ["created_at >= ?", "created_at <= ?"]
        values: list[Any] = [since or 0.0, until if until is not None else 1e12]
        if status is not None:
            clauses.append("status = ?")
            values.append(status)
        return self._many(" AND ".join(clauses) + " ORDER BY created_at DESC, key LIMIT ?", *values, limit)

    def undelivered(self, fingerprint: str) -> list[Entry]:
        return self._many("fingerprint = ? AND delivered_at IS NULL AND attended = 0 ORDER BY created_at", fingerprint)

    def known_tasks(self, task_ids: list[str]) -> set[str]:
        marks = ", ".join("?" * len(task_ids))
        statement = f"SELECT task_id FROM entries WHERE task_id IN ({marks})"
        return {row[0] for row in self._run(lambda db: db.execute(statement, task_ids).fetchall())}

    def spent_since(self, since: float) -> float:
        return self._run(lambda db: _spent(db, since))

    def find_upload(self, sha256: str, after: float) -> str | None:
        statement = "SELECT url FROM uploads WHERE sha256 = ? AND expires_at > ?"
        return next(iter(self._run(lambda db: db.execute(statement, (sha256, after)).fetchone()) or ()), None)

    def close(self) -> None:
        self._shut()
        if self._life is not None:
            with suppress(OSError):
                self._life.release()
                self._life_path(self.owner).unlink()
            self._life = None

    # --- the file ---

    def _shut(self) -> bool:
        """Close the file; False when it was not open."""
        import sqlite3

        db, self._db = self._db, None
        if db is not None:
            with suppress(sqlite3.Error):
                db.close()
        return db is not None

    def _one(self, where: str, *values: Any) -> Entry | None:
        rows = self._many(where, *values)
        return rows[0] if rows else None

    def _many(self, where: str, *values: Any) -> list[Entry]:
        statement = f"SELECT * FROM entries WHERE {where}"
        return _readable(self._run(lambda db: db.execute(statement, values).fetchall()))

    def _run(self, act: Callable[[sqlite3.Connection], T]) -> T:
        """Run `act`, and translate what SQLite raises. A damaged file is moved aside, never deleted, and a new one begun."""
        import sqlite3

        for attempt in (1, 2):
            try:
                return act(self._opened())
            except sqlite3.OperationalError as error:
                raise self._unwritable(str(error)) from error
            except sqlite3.DatabaseError as error:
                if attempt == 2 or isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
                    raise self._unwritable(str(error)) from error
                self._put_aside()
            except OSError as error:
                raise self._unwritable(error.strerror or type(error).__name__) from error
        raise AssertionError("unreachable")

    def _opened(self) -> sqlite3.Connection:
        import sqlite3

        if self._db is None:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._hold_life_lock()
            if not self.path.exists():
                os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            db = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
            db.row_factory = sqlite3.Row
            db.text_factory = _text
            try:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                migrate(db)
            except BaseException:
                db.close()
                raise
            self._db, self._inode = db, self.path.stat().st_ino
        return self._db

    def _hold_life_lock(self) -> None:
        """Hold this owner's lock file. The lock ends with the process: while it is held, other servers know that we live."""
        from filelock import FileLock

        if self._life is None:
            path = self._life_path(self.owner)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            life = FileLock(path, thread_local=False)
            life.acquire(blocking=False)
            self._life = life

    def _life_path(self, owner: str) -> Path:
        return self.folder / "owners" / f"{owner}.lock"

    def _put_aside(self) -> None:
        if self._shut():
            with suppress(OSError):
                if self.path.stat().st_ino != self._inode:
                    return  # another server has moved the damaged file aside already: this file is its new one
        aside = self.path.with_name(f"{FILE_NAME}.damaged-{int(self._clock())}-{self.owner[:6]}")
        try:
            os.replace(self.path, aside)
            for tail in ("-wal", "-shm"):
                with suppress(FileNotFoundError):
                    os.replace(f"{self.path}{tail}", f"{aside}{tail}")
        except OSError as error:
            raise self._unwritable(error.strerror or "damaged") from error
        self.set_aside = aside
        log.error("the journal was damaged: it was set aside as %s and a new one begun", aside)

    def _unwritable(self, reason: str) -> JournalUnwritable:
        return JournalUnwritable(
            f"the journal {self.path} cannot be used ({reason}); EVOLINK_MCP_DATA_DIR names its folder"
        )


def _text(data: bytes) -> str:
    """A damaged letter must not make the entry unreadable."""
    return data.decode("utf-8", "replace")


def _spent(db: sqlite3.Connection, since: float) -> float:
    (total,) = db.execute(
        "SELECT total(CASE WHEN charged = 'no' AND closed = 1 THEN 0 ELSE coalesce(credits, estimate) END)"
        " FROM entries WHERE created_at >= ? AND phase != 'found'",
        (since,),
    ).fetchone()
    return float(total)


def _readable(rows: list[Any]) -> list[Entry]:
    """The entries of these rows; a row that makes no sense is named in the log and stays in the file."""
    entries: list[Entry] = []
    for row in rows:
        try:
            entries.append(entry_of(row))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            log.error("the journal's entry %s is damaged and left out", row["key"])
    return entries
