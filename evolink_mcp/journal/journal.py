"""The journal: every purchase is on disk before its POST is sent.

This module has all rules and all SQL. A `Backend` runs the SQL in SQLite or in PostgreSQL.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from evolink_mcp.api.task import SETTLED, Task
from evolink_mcp.errors import JournalUnwritable, TaskKnown, TooManyRunning
from evolink_mcp.journal.backend import Backend, Connection, Row, UniqueViolation
from evolink_mcp.journal.entry import UNCONFIRMED, Entry, Phase
from evolink_mcp.journal.rows import COLUMNS, STATE_COLUMNS, fold, readable_entries, task_from_dict, values_of

log = logging.getLogger(__name__)

# In each query, {mine} is the condition for the entries that the account sees, {marks} is a list of `?`.

# Write a new entry.
INSERT_ENTRY = f"""INSERT INTO entries ({", ".join(f'"{name}"' for name in COLUMNS)})
    VALUES ({", ".join("?" * len(COLUMNS))})"""
# Count the running tasks of the account. The condition is the one of `Entry.is_running`; NOT closed uses an index.
COUNT_RUNNING = f"""SELECT count(*) AS running FROM entries WHERE {{mine}} AND NOT closed
    AND (phase IN ('intent', 'sending') OR task_id IS NOT NULL AND status NOT IN {tuple(sorted(SETTLED))})"""
# Add the confirmed charges, and the price ceilings of undecided charges. Limits, lists and the CLI use this query.
SUMS = """SELECT coalesce(sum(spent), 0.0) AS spent, coalesce(sum(reserved), 0.0) AS reserved
    FROM entries WHERE {mine} AND created_at >= ?"""
# Write the state of an entry that this server owns.
UPDATE_OWNED = "UPDATE entries SET {changes} WHERE key = ? AND owner = ?"
# Write a task that EvoLink returned over another server's unconfirmed match, or over no task.
UPDATE_CERTAIN = """UPDATE entries SET {changes}, owner = ? WHERE key = ? AND (task_id IS NULL OR error LIKE ?)"""
# Check whether the database lost an entry, because an older backup was restored.
FIND_KEY = "SELECT 1 FROM entries WHERE key = ?"
# Read the owner of an entry.
FIND_OWNER = "SELECT owner FROM entries WHERE key = ? AND {mine}"
# Become the owner, unless the owner changed since it was read.
CHANGE_OWNER = "UPDATE entries SET owner = ? WHERE key = ? AND owner = ?"
# Let a call of this server wait for an undelivered entry, unless another call was faster.
SET_CALLER = "UPDATE entries SET caller = ? WHERE key = ? AND caller IN ('', ?) AND delivered_at IS NULL"
# End the wait of this server's call.
REMOVE_CALLER = "UPDATE entries SET caller = '' WHERE key = ? AND caller = ?"
# Record the time when a caller got the result.
SET_DELIVERED = "UPDATE entries SET delivered_at = ? WHERE key = ?"
# Read an entry by its key.
BY_KEY = "SELECT * FROM entries WHERE {mine} AND key = ? LIMIT 1"
# Read an entry by its task.
BY_TASK = "SELECT * FROM entries WHERE {mine} AND task_id = ? LIMIT 1"
# Read the newest entries. {filters} are optional conditions.
RECENT = "SELECT * FROM entries WHERE {mine} AND {filters} ORDER BY created_at DESC, key LIMIT ?"
# Read undelivered entries of identical requests.
UNDELIVERED = """SELECT * FROM entries WHERE {mine} AND fingerprint IN ({marks}) AND delivered_at IS NULL
    AND created_at >= ? ORDER BY created_at"""
# Check whether a call of another server waits for an identical request.
AWAITED = """SELECT 1 FROM entries WHERE {mine} AND fingerprint IN ({marks}) AND delivered_at IS NULL
    AND created_at >= ? AND caller <> '' AND caller <> ? LIMIT 1"""
# List the servers that own entries or whose calls wait.
FIND_SERVERS = """SELECT owner AS server FROM entries WHERE owner <> '' AND {mine}
    UNION SELECT caller FROM entries WHERE caller <> '' AND delivered_at IS NULL AND {mine}"""
# Check whether an unfinished entry has no owner.
HAS_ORPHAN = "SELECT 1 FROM entries WHERE NOT closed AND owner = '' AND {mine} LIMIT 1"
# Read the unfinished entries without an owner.
FIND_ORPHANS = "SELECT * FROM entries WHERE NOT closed AND owner = '' AND {mine} ORDER BY created_at"
# Release all entries of servers.
RELEASE_OWNERS = "UPDATE entries SET owner = '' WHERE owner IN ({marks}) AND {mine}"
# End the wait of all calls of servers.
RELEASE_CALLERS = "UPDATE entries SET caller = '' WHERE caller IN ({marks}) AND {mine}"
# Find the tasks that have an entry.
KNOWN_TASKS = "SELECT task_id FROM entries WHERE task_id IN ({marks}) AND {mine}"
# Record the address of an uploaded reference image.
SAVE_UPLOAD = """INSERT INTO uploads VALUES (?, ?, ?, ?)
    ON CONFLICT (account, sha256) DO UPDATE SET url = excluded.url, expires_at = excluded.expires_at"""
# Find the address of an uploaded reference image.
FIND_UPLOAD = "SELECT url FROM uploads WHERE account = ? AND sha256 = ? AND expires_at > ?"
# Record a fact about the account.
SAVE_FACT = """INSERT INTO facts VALUES (?, ?, ?) ON CONFLICT (account, name) DO UPDATE SET value = excluded.value"""
# Read a fact about the account.
FIND_FACT = "SELECT DISTINCT value FROM facts WHERE name = ? AND {mine}"


@dataclass(frozen=True, slots=True)
class Sums:
    """Credits of several entries, to 0.0001 credit: `spent` is confirmed, `reserved` may still be charged."""

    spent: float = 0.0
    reserved: float = 0.0

    @classmethod
    def of(cls, row: Row) -> Sums:
        """Return the sums of a row of SUMS. The order of the additions does not show in the last digit."""
        return cls(round(float(row["spent"]), 4), round(float(row["reserved"]), 4))

    @property
    def total(self) -> float:
        """The credits that count for spending limits."""
        return round(self.spent + self.reserved, 4)


@dataclass(frozen=True, slots=True)
class Notification:
    """A message of one server to the others of the account.

    `key` and `task_id` name an entry that changed. `task` has its progress, which is not written. `is_callback`: EvoLink
    called back. `call` names an HTTP call that its client cancelled: the session and the request ID.
    """

    key: str = ""
    task_id: str | None = None
    task: Task | None = None
    is_callback: bool = False
    call: tuple[str, str | int] | None = None

    @classmethod
    def from_dict(cls, payload: dict[str, Any]) -> Notification:
        """Return the notification of its fields. A missing field is empty.

        Raises:
            TypeError, ValueError, KeyError, AttributeError: The payload is invalid.
        """
        task = payload.get("task")
        call = payload.get("call")
        return cls(
            key=payload.get("key", ""),
            task_id=payload.get("task_id"),
            task=task_from_dict(task) if task else None,
            is_callback=bool(payload.get("is_callback")),
            call=(call[0], call[1]) if call else None,
        )


class Journal:
    """The entries that one account sees. Without an account: the entries of all accounts.

    A write is on disk when its method returns. Entries are never deleted. Only the owner writes the state of an entry.
    Times are epoch seconds, sums are credits. A write continues after the cancellation of its caller.

    Raises (every method):
        JournalUnwritable: The database cannot be read or written. The message names it and its setting.
    """

    def __init__(self, backend: Backend, account: str = "", *, has_tenants: bool = False) -> None:
        """With `has_tenants`, a journal without an account sees no entry."""
        if account and not account.isalnum():
            raise ValueError("an account ID has only letters and digits")
        self.account = account
        self._backend = backend
        self._mine = f"account = '{account}'" if account or has_tenants else "account = account"
        self._stop_functions: list[Callable[[], None]] = []

    @property
    def owner(self) -> str:
        """The ID of this server."""
        return self._backend.owner

    @property
    def can_publish(self) -> bool:
        """Whether other servers receive what `publish` sends."""
        return self._backend.can_publish

    @property
    def reread_s(self) -> float:
        """The interval in which a server reads an entry of another server."""
        return self._backend.reread_s

    @property
    def adopt_every_s(self) -> float | None:
        """The interval in which a server adopts entries; None: only at a call."""
        return self._backend.adopt_every_s

    def listen(self, receive: Callable[[Notification], None]) -> Callable[[], None]:
        """Call `receive` with each notification of another server. Return the function that stops it."""

        def read(payload: dict[str, Any]) -> None:
            try:
                notification = Notification.from_dict(payload)
            except (TypeError, ValueError, KeyError, AttributeError):
                log.info("ignoring a notification of another version of evolink-mcp")
            else:
                receive(notification)

        stop = self._backend.listen(self.account, read)
        self._stop_functions.append(stop)
        return stop

    async def publish(self, notification: Notification) -> None:
        """Send a notification to the other servers of the account. The database itself publishes a changed entry."""
        payload = {name: value for name, value in asdict(notification).items() if value}
        await self._backend.publish(self.account, payload)

    def when_lost(self, stop: Callable[[], None]) -> None:
        """Call `stop` when other servers may adopt the entries of this one."""
        self._stop_functions.append(self._backend.when_lost(stop))

    # --- purchases ---

    async def intend(
        self, entry: Entry, *, since: float = 0.0, cap: float | None = None, running: int | None = None
    ) -> float | None:
        """Write a new entry.

        With `cap`, the credits spent since `since` and the estimate together must not exceed it. If they do, write
        nothing and return the credits already spent. `running` is the maximum of running tasks, this one included.

        Raises:
            TooManyRunning: The maximum is reached. Nothing is written.
            TaskKnown: Another entry of the account has this task.
        """

        async def act(db: Connection) -> float | None:
            if cap is None and running is None:
                await _insert(db, entry)
                return None
            async with db.transaction(lock=self.account):
                if running is not None:
                    (row,) = await db.fetch(self._sql(COUNT_RUNNING))
                    if row["running"] >= running:
                        raise TooManyRunning.of(row["running"], running)
                spent = (await self._sums(db, since)).total if cap is not None else 0.0
                if cap is not None and spent + entry.estimate > cap:
                    return spent
                await _insert(db, entry)
            return None

        return await self._backend.run(act, key=entry.key)

    async def update(self, entry: Entry) -> bool:
        """Write the entry's phase, task and error. Return False if another server owns the entry.

        Raises:
            TaskKnown: Another entry of the account has this task.
        """
        return await self._write(entry, STATE_COLUMNS)

    async def update_images(self, entry: Entry) -> bool:
        """Write the entry's images, and what `update` writes."""
        return await self._write(entry, (*STATE_COLUMNS, "images"))

    async def sums_since(self, since: float) -> Sums:
        """Return the confirmed charges and the reserved credits of the entries since then."""
        return await self._backend.run(lambda db: self._sums(db, since))

    # --- owners and callers ---

    async def acquire(self, key: str) -> bool:
        """Become the owner of an entry. Return False if a living server owns it."""

        async def act(db: Connection) -> bool:
            async with db.transaction():
                rows = await db.fetch(self._sql(FIND_OWNER), (key,))
                if not rows:
                    return False
                owner = rows[0]["owner"]
                if owner == self.owner:
                    return True
                if owner and not await db.is_dead(owner):
                    return False
                return await db.execute(CHANGE_OWNER, (self.owner, key, owner)) == 1

        return await self._backend.run(act, key=key)

    async def release(self, key: str) -> None:
        """Stop the work of this server on an entry."""
        await self._execute(CHANGE_OWNER, "", key, self.owner, key=key)

    async def claim(self, key: str, caller: str = "") -> bool:
        """Let a call of this server wait for an undelivered entry. Return False if another call waits for it.

        `caller` is the server in the entry that `undelivered` returned: none, or one whose call does not wait any more.
        """
        return await self._execute(SET_CALLER, self.owner, key, caller, key=key) == 1

    async def remove_caller(self, key: str) -> None:
        """Record that no call of this server waits for the entry."""
        await self._execute(REMOVE_CALLER, key, self.owner, key=key)

    async def deliver(self, key: str, at: float) -> None:
        """Record that a caller got the result."""
        await self._execute(SET_DELIVERED, at, key, key=key)

    async def adopt(self) -> list[Entry]:
        """Become the owner of unfinished entries without a living owner, and end the waits of dead servers' calls."""
        rows = await self._backend.run(self._adopt)
        return [replace(entry, owner=self.owner) for entry in readable_entries(rows)]

    # --- reads ---

    async def by_key(self, key: str) -> Entry | None:
        """Return the entry with this key, or None."""
        return await self._one(BY_KEY, key)

    async def by_task(self, task_id: str) -> Entry | None:
        """Return the entry of this task, or None."""
        return await self._one(BY_TASK, task_id)

    async def recent(
        self,
        limit: int,
        status: str | None = None,
        since: float | None = None,
        until: float | None = None,
        words: tuple[str, ...] = (),
        after: tuple[float, str] | None = None,
    ) -> list[Entry]:
        """Return at most `limit` entries, newest first. `since` and `until` are included.

        Each of the `words` is in the prompt, a file name or the task ID, in any case. `after` has `created_at` and key
        of the last entry of the page before.
        """
        filters = ["created_at >= ?", "created_at <= ?", *["instr(words, ?) > 0" for _ in words]]
        values: list[Any] = [since or 0.0, until if until is not None else 1e12, *map(fold, words)]
        if status is not None:
            filters.append("status = ?")
            values.append(status)
        if after is not None:
            filters.append("(created_at < ? OR created_at = ? AND key > ?)")
            values += [after[0], *after]
        sql = self._sql(RECENT, filters=" AND ".join(filters))
        return readable_entries(await self._fetch(sql, *values, limit))

    async def undelivered(self, fingerprints: tuple[str, ...], since: float) -> list[Entry]:
        """Return undelivered entries of identical requests that no call of another server waits for, oldest first."""
        sql = self._sql(UNDELIVERED, marks=_marks(fingerprints))

        async def act(db: Connection) -> list[Row]:
            rows = await db.fetch(sql, (*fingerprints, since))
            callers = {row["caller"] for row in rows} - {"", self.owner}
            silent = {caller for caller in callers if await db.is_silent(caller)}
            return [row for row in rows if row["caller"] in {"", self.owner, *silent}]

        return readable_entries(await self._backend.run(act))

    async def is_awaited(self, fingerprints: tuple[str, ...], since: float) -> bool:
        """Return whether a call of another server waits for an identical request of a client that may repeat it here."""
        if not self.can_publish:
            return False
        sql = self._sql(AWAITED, marks=_marks(fingerprints))
        return bool(await self._fetch(sql, *fingerprints, since, self.owner))

    async def known_tasks(self, task_ids: list[str]) -> set[str]:
        """Return which of these tasks have an entry."""
        rows = await self._fetch(self._sql(KNOWN_TASKS, marks=_marks(task_ids)), *task_ids)
        return {row["task_id"] for row in rows}

    # --- uploads and facts ---

    async def remember_upload(self, sha256: str, url: str, expires_at: float) -> None:
        """Record that EvoLink has a reference image of this account under this URL until `expires_at`."""
        await self._execute(SAVE_UPLOAD, self.account, sha256, url, expires_at)

    async def find_upload(self, sha256: str, after: float) -> str | None:
        """Return the URL of an uploaded image that does not expire before `after`, or None."""
        rows = await self._fetch(FIND_UPLOAD, self.account, sha256, after)
        return rows[0]["url"] if rows else None

    async def save_fact(self, name: str, value: str) -> None:
        """Record a fact about the account."""
        await self._execute(SAVE_FACT, self.account, name, value)

    async def fact(self, name: str) -> str | None:
        """Return a recorded fact, or None. Without an account: the value that all accounts share. Create no file."""
        if not self._backend.is_open and not self._backend.has_data:
            return None
        rows = await self._fetch(self._sql(FIND_FACT), name)
        return rows[0]["value"] if len(rows) == 1 else None

    async def close(self) -> None:
        """Release all entries of this server, so that another server can adopt them at once."""
        for stop in self._stop_functions:
            with suppress(ValueError):  # the caller may have stopped it before
                stop()
        is_released = False
        if self._backend.is_open:
            with suppress(JournalUnwritable):
                await self._backend.run(self._release_all)
                is_released = True
        await self._backend.close(is_released=is_released)

    def _sql(self, query: str, **parts: str) -> str:
        return query.format(mine=self._mine, **parts)

    async def _execute(self, sql: str, *values: Any, key: str = "") -> int:
        return await self._backend.run(lambda db: db.execute(sql, values), key=key)

    async def _fetch(self, sql: str, *values: Any) -> Sequence[Row]:
        return await self._backend.run(lambda db: db.fetch(sql, values))

    async def _one(self, query: str, value: str) -> Entry | None:
        entries = readable_entries(await self._fetch(self._sql(query), value))
        return entries[0] if entries else None

    async def _write(self, entry: Entry, columns: tuple[str, ...]) -> bool:
        changes = ", ".join(f"{name} = ?" for name in columns)
        values = values_of(entry, columns)
        is_certain = entry.phase == Phase.SUBMITTED and entry.task is not None and not entry.is_unconfirmed

        async def act(db: Connection) -> bool:
            with _duplicate_task(entry):
                if await db.execute(UPDATE_OWNED.format(changes=changes), (*values, entry.key, self.owner)) == 1:
                    return True
                if is_certain:
                    sql = UPDATE_CERTAIN.format(changes=changes)
                    unconfirmed = f'%"code": "{UNCONFIRMED.code}"%'
                    if await db.execute(sql, (*values, self.owner, entry.key, unconfirmed)) == 1:
                        return True
            if await db.fetch(FIND_KEY, (entry.key,)):
                return False
            await _insert(db, replace(entry, owner=self.owner))
            return True

        return await self._backend.run(act, key=entry.key)

    async def _sums(self, db: Connection, since: float) -> Sums:
        (row,) = await db.fetch(self._sql(SUMS), (since,))
        return Sums.of(row)

    async def _adopt(self, db: Connection) -> Sequence[Row]:
        servers = {row["server"] for row in await db.fetch(self._sql(FIND_SERVERS))} - {self.owner}
        dead = [server for server in servers if await db.is_dead(server)]
        # A start must not write if there is nothing to adopt: an MCP host may start several servers at once.
        if not dead and not await db.fetch(self._sql(HAS_ORPHAN)):
            return []
        async with db.transaction():
            dead = [server for server in dead if await db.is_dead(server)]
            await self._release_servers(db, dead)
            rows = await db.fetch(self._sql(FIND_ORPHANS), lock_rows=True)
            for row in rows:
                await db.execute(CHANGE_OWNER, (self.owner, row["key"], ""))
        return rows

    async def _release_all(self, db: Connection) -> None:
        async with db.transaction():
            await self._release_servers(db, [self.owner])

    async def _release_servers(self, db: Connection, servers: list[str]) -> None:
        if servers:
            for query in (RELEASE_CALLERS, RELEASE_OWNERS):
                await db.execute(self._sql(query, marks=_marks(servers)), servers)


@contextmanager
def _duplicate_task(entry: Entry) -> Generator[None]:
    """Translate a violation of the rule "one entry per task and account" into TaskKnown."""
    try:
        yield
    except UniqueViolation as error:
        raise TaskKnown(f"the journal already has the task {entry.task_id}") from error


async def _insert(db: Connection, entry: Entry) -> None:
    with _duplicate_task(entry):
        await db.execute(INSERT_ENTRY, values_of(entry))


def _marks(values: Sequence[str]) -> str:
    """Return as many `?` as there are values. An empty list in SQL is valid in SQLite only, so it gets one NULL."""
    return ", ".join("?" * len(values)) or "NULL"
