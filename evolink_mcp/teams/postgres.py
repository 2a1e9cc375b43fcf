"""The journal in PostgreSQL, shared by the servers of a team, wherever they run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

from psycopg import errors
from psycopg.rows import DictRow

from evolink_mcp.errors import JournalUnwritable, TaskKnown, TooManyRunning
from evolink_mcp.journal.backend import Hear, News
from evolink_mcp.journal.entry import UNCONFIRMED, Entry, Phase
from evolink_mcp.journal.rows import STATE, UNDER_WAY, readable, selection, visible
from evolink_mcp.teams.database import Connection, Database, row_of
from evolink_mcp.teams.schema import INSERT, ROW, plain, values_of

log = logging.getLogger(__name__)

# A change is told at once; a watcher reads again by itself for what a broken session did not hear.
REREAD_S = 10.0
ADOPT_EVERY_S = 3.0

HOLDS = "strpos(words, ?) > 0"
UNDELIVERED = "fingerprint = ANY(%s) AND delivered_at IS NULL AND created_at >= %s"
# An id that EvoLink has told is written over another server's guess, or over the absence of one.
TRUTH = f'(task_id IS NULL OR error LIKE \'%%"code": "{UNCONFIRMED.code}"%%\')'


class PostgresJournal:
    """The `Journal` contract on `database`, where each method is described."""

    reread_s = REREAD_S
    adopt_every_s = ADOPT_EVERY_S

    def __init__(self, database: Database, account: str = "", *, has_tenants: bool = False) -> None:
        """`has_tenants`: without an account this journal sees no entry."""
        self.account = account
        self._database = database
        self._mine = visible(account, has_tenants=has_tenants)
        self._ends: list[Callable[[], None]] = []

    @property
    def owner(self) -> str:
        return self._database.owner

    def listen(self, hear: Hear) -> Callable[[], None]:
        def told(said: dict[str, Any]) -> None:
            try:
                news = News.of(said)
            except (TypeError, ValueError, KeyError, AttributeError):
                log.info("another version of evolink-mcp told something that this one does not understand")
            else:
                hear(news)

        self._ends.append(end := self._database.listen(self.account, told))
        return end

    async def tell(self, news: News) -> None:
        await self._database.tell(self.account, {name: value for name, value in asdict(news).items() if value})

    def when_lost(self, stop: Callable[[], None]) -> None:
        self._ends.append(self._database.when_lost(stop))

    # --- the contract ---

    async def intend(
        self, entry: Entry, *, since: float = 0.0, cap: float | None = None, running: int | None = None
    ) -> float | None:
        async def write(db: Connection) -> float | None:
            with _task_unique(entry):
                if cap is None and running is None:
                    await db.execute(INSERT.encode(), values_of(entry))
                    return None
                async with db.transaction():
                    await db.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (self.account,))
                    if running is not None:
                        count = f"SELECT count(*) AS found FROM evolink_entries WHERE {self._mine} AND {UNDER_WAY}"
                        row = await row_of(db, count)
                        if row is not None and row["found"] >= running:
                            raise TooManyRunning.of(row["found"], running)
                    spent = await self._spent(db, since) if cap is not None else 0.0
                    if cap is not None and spent + entry.estimate > cap:
                        return spent
                    await db.execute(INSERT.encode(), values_of(entry))
                return None

        return await self._database.run(write, key=entry.key)

    async def update(self, entry: Entry) -> bool:
        return await self._write(entry, STATE)

    async def keep(self, entry: Entry) -> bool:
        return await self._write(entry, (*STATE, "images"))

    async def acquire(self, key: str) -> bool:
        async def take(db: Connection) -> bool:
            async with db.transaction():
                where = f"key = %s AND {self._mine} FOR UPDATE"
                row = await row_of(db, f"SELECT owner FROM evolink_entries WHERE {where}", key)
                if row is None:
                    return False
                if row["owner"] == self.owner:
                    return True
                if row["owner"] != "" and not await self._database.is_dead(db, row["owner"]):
                    return False
                await db.execute("UPDATE evolink_entries SET owner = %s WHERE key = %s", (self.owner, key))
            return True

        return await self._database.run(take, key=key)

    async def release(self, key: str) -> None:
        await self._execute("owner = '' WHERE key = %s AND owner = %s", key, self.owner, key=key)

    async def deliver(self, key: str, at: float) -> None:
        await self._execute("delivered_at = %s WHERE key = %s", at, key, key=key)

    async def leave(self, key: str) -> None:
        await self._execute("caller = '' WHERE key = %s AND caller = %s", key, self.owner, key=key)

    async def claim(self, key: str) -> bool:
        async def take(db: Connection) -> bool:
            async with db.transaction():
                where = "key = %s AND delivered_at IS NULL FOR UPDATE"
                row = await row_of(db, f"SELECT caller FROM evolink_entries WHERE {where}", key)
                if row is None or (row["caller"] and not await self._database.is_away(db, row["caller"])):
                    return False
                await db.execute("UPDATE evolink_entries SET caller = %s WHERE key = %s", (self.owner, key))
            return True

        return await self._database.run(take, key=key)

    async def by_key(self, key: str) -> Entry | None:
        return await self._one("key = %s", key)

    async def by_task(self, task_id: str) -> Entry | None:
        return await self._one("task_id = %s", task_id)

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
        where = where.replace("?", "%s")
        return await self._many(f"{where} ORDER BY created_at DESC, key LIMIT %s", *values, limit)

    async def undelivered(self, fingerprints: tuple[str, ...], since: float) -> list[Entry]:
        where = f"{self._mine} AND {UNDELIVERED} ORDER BY created_at"

        async def read(db: Connection) -> list[DictRow]:
            async with db.transaction():
                found = await db.execute(
                    f"SELECT * FROM evolink_entries WHERE {where}".encode(), (list(fingerprints), since)
                )
                rows = await found.fetchall()
                callers = {row["caller"] for row in rows} - {"", self.owner}
                away = {caller for caller in callers if await self._database.is_away(db, caller)}
            return [row for row in rows if row["caller"] in {"", *away}]

        return readable(await self._database.run(read))

    async def is_awaited(self, fingerprints: tuple[str, ...], since: float) -> bool:
        where = f"{self._mine} AND {UNDELIVERED} AND caller NOT IN ('', %s)"
        statement = f"SELECT 1 FROM evolink_entries WHERE {where} LIMIT 1"
        return await self._rows(statement, list(fingerprints), since, self.owner) != []

    async def adopt(self) -> list[Entry]:
        rows = await self._database.run(self._take_over)
        return [replace(entry, owner=self.owner) for entry in readable(rows)]

    async def known_tasks(self, task_ids: list[str]) -> set[str]:
        statement = f"SELECT task_id FROM evolink_entries WHERE task_id = ANY(%s) AND {self._mine}"
        return {row["task_id"] for row in await self._rows(statement, [plain(task_id) for task_id in task_ids])}

    async def spent_since(self, since: float) -> float:
        return await self._database.run(lambda db: self._spent(db, since))

    async def remember_upload(self, sha256: str, url: str, expires_at: float) -> None:
        await self._rows(
            "INSERT INTO evolink_uploads VALUES (%s, %s, %s, %s) ON CONFLICT (account, sha256) "
            "DO UPDATE SET url = excluded.url, expires_at = excluded.expires_at RETURNING 1",
            self.account, sha256, url, expires_at,
        )  # fmt: skip

    async def find_upload(self, sha256: str, after: float) -> str | None:
        where = "account = %s AND sha256 = %s AND expires_at > %s"
        rows = await self._rows(f"SELECT url FROM evolink_uploads WHERE {where}", self.account, sha256, after)
        return rows[0]["url"] if rows else None

    async def learn(self, name: str, value: str) -> None:
        await self._rows(
            "INSERT INTO evolink_facts VALUES (%s, %s, %s) ON CONFLICT (account, name) "
            "DO UPDATE SET value = excluded.value RETURNING 1",
            self.account, name, value,
        )  # fmt: skip

    async def learned(self, name: str) -> str | None:
        rows = await self._rows(f"SELECT DISTINCT value FROM evolink_facts WHERE name = %s AND {self._mine}", name)
        return rows[0]["value"] if len(rows) == 1 else None

    async def close(self) -> None:
        for end in self._ends:
            with suppress(ValueError):  # it was ended before
                end()

        async def leave_all(db: Connection) -> None:
            async with db.transaction():
                for column in ("owner", "caller"):
                    change = f"UPDATE evolink_entries SET {column} = '' WHERE {column} = %s AND {self._mine}"
                    await db.execute(change.encode(), (self.owner,))

        with suppress(JournalUnwritable):  # others take it over as a dead server's
            await self._database.run(leave_all)

    # --- statements ---

    async def _execute(self, change: str, *values: Any, key: str) -> int:
        """How many rows it changed."""

        async def write(db: Connection) -> int:
            with _task_unique():
                return (await db.execute(f"UPDATE evolink_entries SET {change}".encode(), values)).rowcount

        return await self._database.run(write, key=key)

    async def _rows(self, statement: str, *values: Any) -> list[DictRow]:
        async def read(db: Connection) -> list[DictRow]:
            return await (await db.execute(statement.encode(), [plain(value) for value in values])).fetchall()

        return await self._database.run(read)

    async def _many(self, where: str, *values: Any) -> list[Entry]:
        return readable(await self._rows(f"SELECT * FROM evolink_entries WHERE {self._mine} AND {where}", *values))

    async def _one(self, where: str, *values: Any) -> Entry | None:
        entries = await self._many(f"{where} LIMIT 1", *values)
        return entries[0] if entries else None

    async def _write(self, entry: Entry, names: tuple[str, ...]) -> bool:
        """Write these columns; the whole entry if the database has lost it, because a back-up was restored."""
        changed = {name: ROW[name] for name in (*names, "words")}
        change = f"UPDATE evolink_entries SET {', '.join(f'{name} = %s' for name in changed)}"
        values = values_of(entry, changed)

        async def write(db: Connection) -> bool:
            with _task_unique(entry):
                mine = await db.execute(
                    f"{change} WHERE key = %s AND owner = %s".encode(), (*values, entry.key, self.owner)
                )
                if mine.rowcount == 1:
                    return True
                if entry.phase == Phase.SUBMITTED and entry.task is not None and not entry.is_unconfirmed:
                    truth = f"{change}, owner = %s WHERE key = %s AND {TRUTH}"
                    if (await db.execute(truth.encode(), (*values, self.owner, entry.key))).rowcount == 1:
                        return True
                if await row_of(db, "SELECT 1 FROM evolink_entries WHERE key = %s", entry.key) is not None:
                    return False
                await db.execute(INSERT.encode(), values_of(replace(entry, owner=self.owner)))
                return True

        return await self._database.run(write, key=entry.key)

    async def _spent(self, db: Connection, since: float) -> float:
        where = f"{self._mine} AND created_at >= %s"
        row = await row_of(db, f"SELECT coalesce(sum(spent), 0) AS total FROM evolink_entries WHERE {where}", since)
        return float(row["total"]) if row is not None else 0.0

    async def _take_over(self, db: Connection) -> list[DictRow]:
        """Free what dead servers' calls waited for, and own what is open and has no living owner."""
        left = f"NOT closed AND owner = '' AND {self._mine}"
        async with db.transaction():
            found = await db.execute(
                f"SELECT owner AS name FROM evolink_entries WHERE owner <> '' AND {self._mine} "
                f"UNION SELECT caller FROM evolink_entries WHERE caller <> '' AND delivered_at IS NULL AND {self._mine}"
                .encode()
            )  # fmt: skip
            owners = {row["name"] for row in await found.fetchall()} - {self.owner}
            dead = [owner for owner in owners if await self._database.is_dead(db, owner)]
            if dead:
                for column in ("caller", "owner"):
                    change = f"UPDATE evolink_entries SET {column} = '' WHERE {column} = ANY(%s) AND {self._mine}"
                    await db.execute(change.encode(), (dead,))
            rows = await db.execute(
                f"UPDATE evolink_entries SET owner = %s WHERE {left} RETURNING *".encode(), (self.owner,)
            )
            return sorted(await rows.fetchall(), key=lambda row: row["created_at"])


@contextmanager
def _task_unique(entry: Entry | None = None) -> Generator[None]:
    try:
        yield
    except errors.UniqueViolation as error:
        if error.diag.constraint_name != "evolink_task_once":
            raise
        raise TaskKnown(f"the journal has {entry.task_id if entry else 'its task'} already") from error
