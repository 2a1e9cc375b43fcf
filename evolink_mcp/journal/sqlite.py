"""The journal in one SQLite file (WAL, synchronous FULL), shared by any number of servers of one machine.

One thread of its own does all its work, with one connection: the event loop never waits for the disk or for a lock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from evolink_mcp.errors import JournalUnwritable, TaskKnown, TooManyRunning
from evolink_mcp.journal.backend import Hear, News
from evolink_mcp.journal.entry import Entry
from evolink_mcp.journal.file import JournalFile, new_owner, snapshot
from evolink_mcp.journal.migrations import transaction
from evolink_mcp.journal.rows import COLUMNS, STATE, UNDER_WAY, folded, readable, selection, visible

if TYPE_CHECKING:
    import sqlite3

T = TypeVar("T")

HOLDS = "holds(?, request, images, save_as, task_id)"  # the word, as `folded` makes it
INSERT = f"INSERT INTO entries ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"


class SqliteJournal:
    """The `Journal` contract on a file in `folder`, where each method is described; nothing is created before a call."""

    reread_s = 1.0
    adopt_every_s = None

    def __init__(
        self, folder: Path, account: str = "", *, has_tenants: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        """`has_tenants`: without an account this journal sees no entry."""
        self.owner = new_owner()
        self.account = account
        self._mine = visible(account, has_tenants=has_tenants)
        self._file = JournalFile(folder, self.owner, clock=clock)
        self._thread: ThreadPoolExecutor | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    @property
    def set_aside(self) -> Path | None:
        """Where a damaged journal was moved to, if one was found."""
        return self._file.set_aside

    def listen(self, hear: Hear) -> Callable[[], None]:
        return lambda: None  # SQLite tells nobody of a change: `reread_s` is short

    async def tell(self, news: News) -> None:
        pass

    def when_lost(self, stop: Callable[[], None]) -> None:
        pass  # the lock that shows that this server lives ends with its process, and not before

    # --- the contract ---

    async def intend(
        self, entry: Entry, *, since: float = 0.0, cap: float | None = None, running: int | None = None
    ) -> float | None:
        values = [value(entry) for value in COLUMNS.values()]

        def write(db: sqlite3.Connection) -> float | None:
            with _task_unique(entry):
                if cap is None and running is None:
                    db.execute(INSERT, values)
                    return None
                with transaction(db):
                    if running is not None:
                        where = f"{self._mine} AND {UNDER_WAY}"
                        (under_way,) = db.execute(f"SELECT count(*) FROM entries WHERE {where}").fetchone()
                        if under_way >= running:
                            raise TooManyRunning.of(under_way, running)
                    spent = self._spent(db, since) if cap is not None else 0.0
                    if cap is not None and spent + entry.estimate > cap:
                        return spent
                    db.execute(INSERT, values)
                return None

        return await self._run(write)

    async def update(self, entry: Entry) -> bool:
        return await self._write(entry, STATE)

    async def keep(self, entry: Entry) -> bool:
        return await self._write(entry, (*STATE, "images"))

    async def acquire(self, key: str) -> bool:
        def take(db: sqlite3.Connection) -> bool:
            with transaction(db):
                row = db.execute(f"SELECT owner FROM entries WHERE key = ? AND {self._mine}", (key,)).fetchone()
                if row is None or not (row[0] in ("", self.owner) or self._file.is_dead(row[0])):
                    return False
                db.execute("UPDATE entries SET owner = ? WHERE key = ?", (self.owner, key))
            return True

        return await self._run(take)

    async def release(self, key: str) -> None:
        await self._execute("UPDATE entries SET owner = '' WHERE key = ? AND owner = ?", key, self.owner)

    async def deliver(self, key: str, at: float) -> None:
        await self._execute("UPDATE entries SET delivered_at = ? WHERE key = ?", at, key)

    async def leave(self, key: str) -> None:
        await self._execute("UPDATE entries SET caller = '' WHERE key = ? AND caller = ?", key, self.owner)

    async def claim(self, key: str) -> bool:
        statement = "UPDATE entries SET caller = ? WHERE key = ? AND caller = '' AND delivered_at IS NULL"
        return await self._execute(statement, self.owner, key) == 1

    async def by_key(self, key: str) -> Entry | None:
        return await self._one("key = ?", key)

    async def by_task(self, task_id: str) -> Entry | None:
        return await self._one("task_id = ?", task_id)

    async def recent(
        self,
        limit: int,
        status: str | None = None,
        since: float | None = None,
        until: float | None = None,
        words: tuple[str, ...] = (),
        after: tuple[float, str] | None = None,
    ) -> list[Entry]:
        where, values = selection(HOLDS, status, since, until, words, after)
        return await self._many(f"{where} ORDER BY created_at DESC, key LIMIT ?", *values, limit)

    async def undelivered(self, fingerprints: tuple[str, ...], since: float) -> list[Entry]:
        marks = ", ".join("?" * len(fingerprints))
        where = f"fingerprint IN ({marks}) AND delivered_at IS NULL AND caller = '' AND created_at >= ?"
        return await self._many(f"{where} ORDER BY created_at", *fingerprints, since)

    async def is_awaited(self, fingerprints: tuple[str, ...], since: float) -> bool:
        return False  # each client has a server of its own

    async def adopt(self) -> list[Entry]:
        rows = await self._run(self._take_over)
        return [replace(entry, owner=self.owner) for entry in readable(rows)]

    async def known_tasks(self, task_ids: list[str]) -> set[str]:
        marks = ", ".join("?" * len(task_ids))
        where = f"task_id IN ({marks}) AND {self._mine}"
        return {row[0] for row in await self._rows(f"SELECT task_id FROM entries WHERE {where}", *task_ids)}

    async def spent_since(self, since: float) -> float:
        return await self._run(lambda db: self._spent(db, since))

    async def remember_upload(self, sha256: str, url: str, expires_at: float) -> None:
        statement = "INSERT OR REPLACE INTO uploads VALUES (?, ?, ?, ?)"
        await self._execute(statement, self.account, sha256, url, expires_at)

    async def find_upload(self, sha256: str, after: float) -> str | None:
        where = "account = ? AND sha256 = ? AND expires_at > ?"
        rows = await self._rows(f"SELECT url FROM uploads WHERE {where}", self.account, sha256, after)
        return rows[0][0] if rows else None

    async def learn(self, name: str, value: str) -> None:
        await self._execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", self.account, name, value)

    async def learned(self, name: str) -> str | None:
        if not self._file.in_use and not self._file.path.exists():
            return None
        rows = await self._rows(f"SELECT DISTINCT value FROM facts WHERE name = ? AND {self._mine}", name)
        return rows[0][0] if len(rows) == 1 else None

    async def close(self) -> None:
        await self._call(self._close)
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None

    # --- the thread ---

    async def _call(self, call: Callable[[], T]) -> T:
        """Run `call` in the journal's thread, after everything that was asked before it."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        return await asyncio.wrap_future(self._thread.submit(call))

    async def _run(self, act: Callable[[sqlite3.Connection], T]) -> T:
        return await self._call(lambda: self._file.run(act))

    async def _execute(self, statement: str, *values: Any) -> int:
        """How many rows it changed."""
        return await self._run(lambda db: db.execute(statement, values).rowcount)

    async def _rows(self, statement: str, *values: Any) -> list[sqlite3.Row]:
        return await self._run(lambda db: db.execute(statement, values).fetchall())

    async def _many(self, where: str, *values: Any) -> list[Entry]:
        return readable(await self._rows(f"SELECT * FROM entries WHERE {self._mine} AND {where}", *values))

    async def _one(self, where: str, *values: Any) -> Entry | None:
        entries = await self._many(where, *values)
        return entries[0] if entries else None

    async def _write(self, entry: Entry, names: tuple[str, ...]) -> bool:
        """Write these columns; the whole entry if the file has lost it, because somebody has replaced the file."""
        changes = ", ".join(f"{name} = ?" for name in names)
        changed = [*(COLUMNS[name](entry) for name in names), entry.key, self.owner]

        def write(db: sqlite3.Connection) -> bool:
            with _task_unique(entry):
                if db.execute(f"UPDATE entries SET {changes} WHERE key = ? AND owner = ?", changed).rowcount == 1:
                    return True
                if db.execute("SELECT 1 FROM entries WHERE key = ?", (entry.key,)).fetchone():
                    return False
                db.execute(INSERT, [value(replace(entry, owner=self.owner)) for value in COLUMNS.values()])
                return True

        return await self._run(write)

    def _spent(self, db: sqlite3.Connection, since: float) -> float:
        where = f"{self._mine} AND created_at >= ?"
        (total,) = db.execute(f"SELECT total(spent) FROM entries WHERE {where}", (since,)).fetchone()
        return float(total)

    def _take_over(self, db: sqlite3.Connection) -> list[sqlite3.Row]:
        """Free what dead servers' calls waited for, and own what is open and has no living owner."""
        working = "SELECT DISTINCT owner FROM entries WHERE owner != ''"
        waiting = "SELECT DISTINCT caller FROM entries WHERE caller != '' AND delivered_at IS NULL"
        owners = {row[0] for row in db.execute(f"{working} UNION {waiting}")} - {self.owner}
        dead = [owner for owner in owners if self._file.is_dead(owner)]
        marks = ", ".join("?" * len(dead))
        left = f"closed = 0 AND owner = '' AND {self._mine}"
        if not dead and not db.execute(f"SELECT 1 FROM entries WHERE {left} LIMIT 1").fetchone():
            return []
        with transaction(db):
            db.execute(f"UPDATE entries SET caller = '' WHERE caller IN ({marks})", dead)
            db.execute(f"UPDATE entries SET owner = '' WHERE owner IN ({marks})", dead)
            rows = db.execute(f"SELECT * FROM entries WHERE {left} ORDER BY created_at").fetchall()
            db.execute(f"UPDATE entries SET owner = ? WHERE {left}", (self.owner,))
        return rows

    def _close(self) -> None:
        """Nobody works on what this server leaves; if that cannot be written, it is left as a dead server's."""
        written = False
        if self._file.in_use:
            with suppress(JournalUnwritable):
                self._file.run(self._leave_all)
                written = True
        self._file.close(leave_sign=not written)

    def _leave_all(self, db: sqlite3.Connection) -> None:
        with transaction(db):
            db.execute("UPDATE entries SET owner = '' WHERE owner = ?", (self.owner,))
            db.execute("UPDATE entries SET caller = '' WHERE caller = ?", (self.owner,))


def read_entries(folder: Path, limit: int, words: tuple[str, ...] = (), since: float = 0.0) -> list[Entry]:
    """The newest entries of the journal in `folder`, newest first; blocks, and changes nothing.

    `words` are those of `Journal.recent`; `since` is in epoch seconds.

    Raises:
        JournalUnwritable: it is damaged or cannot be read.
    """
    holds = f" AND {HOLDS}" * len(words)
    statement = f"SELECT * FROM entries WHERE created_at >= ?{holds} ORDER BY created_at DESC, key LIMIT ?"
    with snapshot(folder) as db:
        return readable(db.execute(statement, (since, *map(folded, words), limit)).fetchall())


@contextmanager
def _task_unique(entry: Entry) -> Generator[None]:
    import sqlite3

    try:
        yield
    except sqlite3.IntegrityError as error:
        raise TaskKnown(f"the journal has {entry.task_id} already") from error
