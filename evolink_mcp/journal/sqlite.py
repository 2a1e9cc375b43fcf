"""The journal in one SQLite file (WAL, FULL): made at the first use, shared by any number of servers of one machine."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from evolink_mcp.errors import JournalUnwritable, Problem
from evolink_mcp.journal import Entry, Picture
from evolink_mcp.tasks import Task, TaskError

log = logging.getLogger(__name__)
T = TypeVar("T")

FILE_NAME = "journal.sqlite3"
BUSY_TIMEOUT_S = 5.0
MIGRATIONS = (
    """
    CREATE TABLE entries (
        key TEXT PRIMARY KEY, owner TEXT NOT NULL, phase TEXT NOT NULL, created_at REAL NOT NULL,
        fingerprint TEXT NOT NULL, task_id TEXT UNIQUE, status TEXT NOT NULL, complete INTEGER NOT NULL,
        attended INTEGER NOT NULL, delivered_at REAL, estimate REAL NOT NULL, credits REAL, charged TEXT NOT NULL,
        request TEXT NOT NULL, save_as TEXT, task TEXT, error TEXT, pictures TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX entries_by_age ON entries (created_at);
    CREATE INDEX entries_open ON entries (owner) WHERE complete = 0;
    CREATE INDEX entries_undelivered ON entries (fingerprint) WHERE delivered_at IS NULL;
    CREATE TABLE uploads (sha256 TEXT PRIMARY KEY, url TEXT NOT NULL, expires_at REAL NOT NULL) WITHOUT ROWID;
    """,
)
_COLUMNS = "key, owner, phase, created_at, fingerprint, request, estimate, save_as, attended, delivered_at, task, error, pictures"
_WRITTEN = (
    "owner", "phase", "created_at", "fingerprint", "task_id", "status", "complete", "attended", "delivered_at",
    "estimate", "credits", "charged", "request", "save_as", "task", "error", "pictures",
)  # fmt: skip
_STATE = {"phase", "task_id", "status", "complete", "credits", "charged", "task", "error"}


class SqliteJournal:
    """The `Journal` contract on a file in `folder`; nothing is created before the first call."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.owner = uuid.uuid4().hex
        self.set_aside: Path | None = None
        self._clock = clock
        self._db: sqlite3.Connection | None = None
        self._life: FileLock | None = None

    @property
    def path(self) -> Path:
        return self.folder / FILE_NAME

    # --- writing ---

    def intend(self, entry: Entry, *, since: float = 0.0, cap: float | None = None) -> float | None:
        names = ", ".join(("key", *_WRITTEN))
        marks = ", ".join("?" * (len(_WRITTEN) + 1))

        def write(db: sqlite3.Connection) -> float | None:
            with _transaction(db):
                spent = _spent(db, since)
                if cap is not None and spent + entry.estimate > cap:
                    return spent
                db.execute(f"INSERT INTO entries ({names}) VALUES ({marks})", _row(entry))
            return None

        return self._run(write)

    def update(self, entry: Entry) -> None:
        key, *values = _row(entry)
        pairs = [(name, value) for name, value in zip(_WRITTEN, values, strict=True) if name in _STATE]
        assignments = ", ".join(f"{name} = ?" for name, _ in pairs)
        self._run(
            lambda db: db.execute(f"UPDATE entries SET {assignments} WHERE key = ?", (*(v for _, v in pairs), key))
        )

    def keep(self, key: str, pictures: tuple[Picture, ...], complete: bool) -> None:
        told = json.dumps([asdict(picture) for picture in pictures])
        statement = "UPDATE entries SET pictures = ?, complete = ? WHERE key = ?"
        self._run(lambda db: db.execute(statement, (told, complete, key)))

    def deliver(self, key: str, at: float) -> None:
        self._run(lambda db: db.execute("UPDATE entries SET delivered_at = ? WHERE key = ?", (at, key)))

    def leave(self, key: str) -> None:
        self._run(lambda db: db.execute("UPDATE entries SET attended = 0 WHERE key = ?", (key,)))

    def claim(self, key: str) -> bool:
        statement = "UPDATE entries SET attended = 1 WHERE key = ? AND attended = 0 AND delivered_at IS NULL"
        return self._run(lambda db: db.execute(statement, (key,)).rowcount) == 1

    def adopt(self) -> list[Entry]:
        owners = [row[0] for row in self._run(lambda db: db.execute(
            "SELECT DISTINCT owner FROM entries WHERE (complete = 0 OR (delivered_at IS NULL AND attended = 1))"
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
            finally:
                lock.release()
                with suppress(OSError):
                    self._life_path(owner).unlink()
        return adopted

    def _take_over(self, owner: str) -> list[Entry]:
        def take(db: sqlite3.Connection) -> list[Any]:
            with _transaction(db):
                db.execute("UPDATE entries SET attended = 0 WHERE owner = ?", (owner,))
                rows = db.execute(
                    f"SELECT {_COLUMNS} FROM entries WHERE owner = ? AND complete = 0", (owner,)
                ).fetchall()
                db.execute("UPDATE entries SET owner = ? WHERE owner = ? AND complete = 0", (self.owner, owner))
            return rows

        return [replace(_entry(row), owner=self.owner) for row in self._run(take)]

    def remember_upload(self, sha256: str, url: str, expires_at: float) -> None:
        statement = "INSERT OR REPLACE INTO uploads (sha256, url, expires_at) VALUES (?, ?, ?)"
        self._run(lambda db: db.execute(statement, (sha256, url, expires_at)))

    # --- reading ---

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

    def open_entries(self) -> list[Entry]:
        return self._many("owner = ? AND complete = 0 ORDER BY created_at", self.owner)

    def known_tasks(self, task_ids: list[str]) -> set[str]:
        marks = ", ".join("?" * len(task_ids))
        statement = f"SELECT task_id FROM entries WHERE task_id IN ({marks})"
        return {row[0] for row in self._run(lambda db: db.execute(statement, task_ids).fetchall())}

    def spent_since(self, since: float) -> float:
        return self._run(lambda db: _spent(db, since))

    def find_upload(self, sha256: str, after: float) -> str | None:
        statement = "SELECT url FROM uploads WHERE sha256 = ? AND expires_at > ?"
        row = self._run(lambda db: db.execute(statement, (sha256, after)).fetchone())
        return row[0] if row else None

    def close(self) -> None:
        if self._db is not None:
            with suppress(sqlite3.Error):
                self._db.close()
            self._db = None
        if self._life is not None:
            self._life.release()
            with suppress(OSError):
                self._life_path(self.owner).unlink()
            self._life = None

    # --- the file ---

    def _one(self, where: str, *values: Any) -> Entry | None:
        rows = self._many(where, *values)
        return rows[0] if rows else None

    def _many(self, where: str, *values: Any) -> list[Entry]:
        statement = f"SELECT {_COLUMNS} FROM entries WHERE {where}"
        return [_entry(row) for row in self._run(lambda db: db.execute(statement, values).fetchall())]

    def _run(self, act: Callable[[sqlite3.Connection], T]) -> T:
        """The one border to SQLite. A damaged file is set aside, never deleted, and a new one begun."""
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
        if self._db is None:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._live()
            if not self.path.exists():
                os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            db = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
            try:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                _migrate(db)
            except BaseException:
                db.close()
                raise
            self._db = db
        return self._db

    def _live(self) -> None:
        """Hold this owner's lock file: it dies with the process, and tells other servers that we have not."""
        if self._life is None:
            path = self._life_path(self.owner)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            life = FileLock(path, thread_local=False)
            life.acquire(blocking=False)
            self._life = life

    def _life_path(self, owner: str) -> Path:
        return self.folder / "owners" / f"{owner}.lock"

    def _put_aside(self) -> None:
        if self._db is not None:
            with suppress(sqlite3.Error):
                self._db.close()
            self._db = None
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


def _migrate(db: sqlite3.Connection) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version >= len(MIGRATIONS):
        return
    with _transaction(db):
        (version,) = db.execute("PRAGMA user_version").fetchone()
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            for statement in filter(str.strip, script.split(";")):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number}")


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Immediate, since a read that turns into a write later fails when another process was faster."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _spent(db: sqlite3.Connection, since: float) -> float:
    (total,) = db.execute(
        "SELECT total(CASE WHEN charged = 'no' AND complete = 1 THEN 0 ELSE coalesce(credits, estimate) END)"
        " FROM entries WHERE created_at >= ? AND phase != 'found'",
        (since,),
    ).fetchone()
    return float(total)


def _row(entry: Entry) -> tuple[Any, ...]:
    """An entry as (key, *_WRITTEN)."""
    return (
        entry.key, entry.owner, entry.phase, entry.created_at, entry.fingerprint, entry.task_id, entry.status,
        entry.complete, entry.attended, entry.delivered_at, entry.estimate,
        entry.task.credits_used if entry.task else None, entry.charged, json.dumps(entry.request), entry.save_as,
        json.dumps(asdict(entry.task)) if entry.task else None, json.dumps(asdict(entry.error)) if entry.error else None,
        json.dumps([asdict(picture) for picture in entry.pictures]),
    )  # fmt: skip


def _entry(row: Any) -> Entry:
    """The reverse, from _COLUMNS."""
    (
        key,
        owner,
        phase,
        created_at,
        mark,
        request,
        estimate,
        save_as,
        attended,
        delivered_at,
        task,
        error,
        pictures,
    ) = row
    return Entry(
        key=key, owner=owner, phase=phase, created_at=created_at, fingerprint=mark, request=json.loads(request),
        estimate=estimate, save_as=save_as, attended=bool(attended), delivered_at=delivered_at,
        task=_task(json.loads(task)) if task else None, error=Problem(**json.loads(error)) if error else None,
        pictures=tuple(Picture(**picture) for picture in json.loads(pictures)),
    )  # fmt: skip


def _task(data: dict[str, Any]) -> Task:
    error = data.pop("error")
    return Task(**{**data, "results": tuple(data["results"]), "error": TaskError(**error) if error else None})
