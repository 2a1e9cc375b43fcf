"""The journal in PostgreSQL, which all servers of a team share."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import psycopg
from psycopg import errors
from psycopg.rows import DictRow

from evolink_mcp.journal.backend import Connection, Result, Row, Statement, UniqueViolation, clean_text
from evolink_mcp.journal.entry import Entry
from evolink_mcp.journal.journal import HAS_WORD, Journal, Selection
from evolink_mcp.journal.profile import DEFAULT_PROFILE
from evolink_mcp.teams.database import Database, DatabaseConnection
from evolink_mcp.teams.schema import like_pattern, translate

T = TypeVar("T")

UNIQUE_TASK = "evolink_task_once"
# An advisory lock is a number of 64 bits.
LOCK_NAME = "SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))"


class PostgresConnection:
    """See Connection."""

    def __init__(self, db: DatabaseConnection, database: Database) -> None:
        self._db = db
        self._database = database

    async def execute(self, sql: str, values: Sequence[Any] = ()) -> int:
        """See Connection."""
        with _duplicate_task():
            return (await self._execute(sql, values)).rowcount

    async def batch(self, *statements: Statement) -> list[Result]:
        """See Connection. PostgreSQL runs the statements of a pipeline as one transaction."""
        with _duplicate_task():
            async with self._db.pipeline():
                cursors = [await self._execute(sql, values) for sql, values in statements]
            return [
                Result(await cursor.fetchall() if cursor.description else (), cursor.rowcount) for cursor in cursors
            ]

    async def fetch(self, sql: str, values: Sequence[Any] = (), *, lock_rows: bool = False) -> Sequence[Row]:
        """See Connection."""
        return await (await self._execute(f"{sql} FOR UPDATE" if lock_rows else sql, values)).fetchall()

    @asynccontextmanager
    async def transaction(self, *locks: str) -> AsyncGenerator[None]:
        """See Connection."""
        async with self._db.transaction():
            for lock in filter(None, locks):
                await self._db.execute(LOCK_NAME, (lock,))
            yield

    async def is_dead(self, owner: str) -> bool:
        """See Connection. In a transaction, a dead server stays dead until its end."""
        return await self._database.is_dead(self._db, owner)

    async def is_silent(self, owner: str) -> bool:
        """See Connection."""
        return await self._database.is_silent(self._db, owner)

    async def _execute(self, sql: str, values: Sequence[Any]) -> psycopg.AsyncCursor[DictRow]:
        # The best plan of a search depends on the word, and a prepared statement soon has one plan for all words.
        prepare = False if HAS_WORD in sql else None
        return await self._db.execute(translate(sql), [clean_text(value) for value in values], prepare=prepare)


class PostgresBackend:
    """See Backend. All journals of one server share `database`."""

    can_publish = True
    is_open = True
    has_data = True
    # PostgreSQL publishes the changes. A server rereads an entry only because its session may have missed one.
    reread_s = 10.0

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def adopt_every_s(self) -> float:
        """See Backend."""
        return self._database.times.adopt_every_s

    @property
    def owner(self) -> str:
        """See Backend."""
        return self._database.owner

    @property
    def has_lease(self) -> bool:
        """See Backend."""
        return self._database.is_alive

    async def run(self, act: Callable[[Connection], Awaitable[T]], *, key: str = "") -> T:
        """See Backend."""
        return await self._database.run(lambda db: act(PostgresConnection(db, self._database)), key=key or None)

    def listen(self, channel: str, receive: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """See Backend."""
        return self._database.listen(channel, receive)

    async def publish(self, channel: str, payload: dict[str, Any]) -> None:
        """See Backend."""
        await self._database.publish(channel, payload)

    def publish_later(self, channel: str, payload: dict[str, Any], *, topic: str) -> None:
        """See Backend."""
        self._database.publish_later(channel, payload, topic=topic)

    def when_lost(self, stop: Callable[[], None]) -> Callable[[], None]:
        """See Backend."""
        return self._database.when_lost(stop)

    async def close(self, *, is_released: bool) -> None:
        """See Backend. The database stays open for other journals."""


class PostgresJournal(Journal):
    """The journal in `database`."""

    def __init__(self, database: Database, identity: str = "", *, profile: str = DEFAULT_PROFILE) -> None:
        """See Journal."""
        super().__init__(PostgresBackend(database), identity, profile=profile)
        self.database = database

    async def intend(self, entry: Entry, **options: Any) -> Entry:
        """See Journal."""
        written = await super().intend(entry, **options)
        self.database.written.add(self.profile, written)
        return written

    async def release(self, key: str) -> None:
        """See Journal."""
        self.database.written.change(key, owner="")
        await super().release(key)

    async def deliver(self, key: str, at: float) -> None:
        """See Journal."""
        self.database.written.change(key, delivered_at=at)
        await super().deliver(key, at)

    async def _run_write(self, act: Callable[[Connection], Awaitable[bool]], entry: Entry) -> bool:
        is_written = await super()._run_write(act, entry)
        if is_written:
            self.database.written.add(self.profile, replace(entry, owner=self.owner))
        return is_written

    async def _select(self, db: Connection, selection: Selection, limit: int) -> Sequence[Row]:
        return await super()._select(db, replace(selection, words=tuple(map(like_pattern, selection.words))), limit)


@contextmanager
def _duplicate_task() -> Generator[None]:
    """Translate PostgreSQL's error for a task that another entry has."""
    try:
        yield
    except errors.UniqueViolation as error:
        if error.diag.constraint_name != UNIQUE_TASK:
            raise
        raise UniqueViolation from error
