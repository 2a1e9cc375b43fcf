"""The journal: every purchase is on disk before its POST is sent.

This module has the rules, and the SQL that both databases share. A `Backend` runs the SQL in SQLite or in PostgreSQL.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from evolink_mcp.api.task import SETTLED, Task
from evolink_mcp.errors import JournalUnwritable, OutcomeUnknown, Problem, TaskKnown, TooManyRunning
from evolink_mcp.journal.backend import Backend, Connection, Row, Statement, UniqueViolation
from evolink_mcp.journal.entry import UNCONFIRMED, DerivedFile, Entry, Phase
from evolink_mcp.journal.profile import DEFAULT_PROFILE, profile_id, profile_name
from evolink_mcp.journal.rows import (
    COLUMNS,
    CREDITS_MAX,
    STATE_COLUMNS,
    fold,
    readable_entries,
    task_from_dict,
    values_of,
)

log = logging.getLogger(__name__)

CHANGE_ATTEMPTS = 5  # while other servers change the same row between read and write
FORGET_AT_ONCE = 200  # entries in one transaction

# In each query, {mine} is the condition for an entry of the profile. {linked} also requires an account of this key.
# {accounts} is a list of account IDs, {marks} a list of `?`.

# Write a new entry.
INSERT_ENTRY = f"""INSERT INTO entries (profile, {", ".join(f'"{name}"' for name in COLUMNS)})
    VALUES (?, {", ".join("?" * len(COLUMNS))})"""
# Count the running tasks of the profile. The condition is the one of `Entry.is_running`; NOT closed uses an index.
COUNT_RUNNING = f"""SELECT count(*) AS running FROM entries WHERE {{mine}} AND NOT closed
    AND (phase IN ('intent', 'sending') OR task_id IS NOT NULL AND status NOT IN {tuple(sorted(SETTLED))})"""
# {mine} for the entries of all profiles.
ALL_PROFILES = "profile = profile"
# Transactions that check the limit of all profiles run one after the other.
TOTAL_LOCK = "total"

# The table `sums` has the sums per profile and slot of this length. The transaction that changes an entry changes them.
# Every local day starts at a slot: all time zones differ from UTC by a multiple of 15 minutes.
SLOT_S = 900
# A difference of larger credits is not exact in a float, so such a slot is summed again.
EXACT_BELOW = 1e6


def _limited(column: str) -> str:
    """Return SQL that limits a column to CREDITS_MAX. Rows of older versions can have more."""
    return f"CASE WHEN {column} < {CREDITS_MAX} THEN {column} ELSE {CREDITS_MAX} END"


# Add the confirmed charges, and the price ceilings of undecided charges. Limits and lists use this query. The values are
# the first complete slot, the start, and the start of the first complete slot.
SUMS = f"""SELECT coalesce(sum(spent), 0.0) AS spent, coalesce(sum(reserved), 0.0) AS reserved FROM (
    SELECT spent, reserved FROM sums WHERE {{mine}} AND slot >= ?
    UNION ALL SELECT {_limited("spent")}, {_limited("reserved")}
    FROM entries WHERE {{mine}} AND created_at >= ? AND created_at < ?) AS parts"""
# Add the same of single entries. {filters} are conditions. The CLI uses this query for a search.
SUMS_OF_ENTRIES = """SELECT coalesce(sum(spent), 0.0) AS spent, coalesce(sum(reserved), 0.0) AS reserved
    FROM entries WHERE {mine} AND created_at >= ? AND {filters}"""
# List the charges of a period. The command `audit` adds them.
CHARGES = """SELECT profile, created_at, task_id, spent, reserved FROM entries
    WHERE {mine} AND created_at >= ? AND (spent > 0 OR reserved > 0)"""
# Write the state of an entry that this server owns.
UPDATE_OWNED = "UPDATE entries SET {changes} WHERE key = ? AND owner = ?"
# Write a state without a task. It never removes a certain task, which another server may have recorded meanwhile.
UPDATE_WITHOUT_TASK = f"{UPDATE_OWNED} AND (task_id IS NULL OR error LIKE ?)"
# Write a task that EvoLink returned over another server's unconfirmed match, or over no task.
UPDATE_CERTAIN = """UPDATE entries SET {changes}, owner = ? WHERE key = ? AND (task_id IS NULL OR error LIKE ?)"""
# Check whether the database lost an entry, because an older backup was restored.
FIND_KEY = "SELECT 1 FROM entries WHERE key = ?"
# Read the owner of an entry.
FIND_OWNER = "SELECT owner FROM entries WHERE key = ? AND {linked}"
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
# Read the words of the newest entries.
RECENT_WORDS = "SELECT words FROM entries WHERE {mine} ORDER BY created_at DESC LIMIT ?"
# Read the newest entries of the key's accounts in all profiles. The key may be linked to other accounts in each of them.
OF_ACCOUNTS = """SELECT * FROM entries WHERE created_at >= ? AND created_at <= ?
    AND (account IN ('', {accounts}) OR account IN (SELECT account FROM links WHERE identity = ?))
    ORDER BY created_at DESC, key LIMIT ?"""
# Read the newest entries with a URL or a SHA-256 in an image or in the task.
BY_IMAGE = """SELECT * FROM entries WHERE {mine} AND (instr(images, ?) > 0 OR instr(task, ?) > 0)
    ORDER BY created_at DESC, key LIMIT ?"""
# Find another profile that has a task.
OTHER_PROFILE = "SELECT profile FROM entries WHERE task_id = ? AND NOT ({mine}) LIMIT 1"
# The condition for an entry with a folded word.
HAS_WORD = "instr(words, ?) > 0"
# Read undelivered entries of identical requests. The + keeps SQLite from an index by time, which has all entries.
UNDELIVERED = """SELECT * FROM entries WHERE {linked} AND fingerprint IN ({marks}) AND delivered_at IS NULL
    AND +created_at >= ? ORDER BY +created_at"""
# List the servers that own entries or have waiting calls.
FIND_SERVERS = """SELECT owner AS server FROM entries WHERE owner <> '' AND {linked}
    UNION SELECT caller FROM entries WHERE caller <> '' AND delivered_at IS NULL AND {linked}"""
# Check whether an unfinished entry has no owner.
HAS_ORPHAN = "SELECT 1 FROM entries WHERE NOT closed AND owner = '' AND {linked} LIMIT 1"
# Read the unfinished entries without an owner.
FIND_ORPHANS = "SELECT * FROM entries WHERE NOT closed AND owner = '' AND {linked} ORDER BY created_at"
# Release all entries of servers.
RELEASE_OWNERS = "UPDATE entries SET owner = '' WHERE owner IN ({marks}) AND owner <> '' AND {linked}"
# End the wait of all calls of servers. No call waits for a delivered entry.
RELEASE_CALLERS = """UPDATE entries SET caller = '' WHERE caller IN ({marks}) AND caller <> '' AND delivered_at IS NULL
    AND {linked}"""
# Find the tasks that have an entry, in any profile: an account may serve several profiles.
KNOWN_TASKS = "SELECT task_id FROM entries WHERE task_id IN ({marks})"
# Check whether a task belongs to another entry, of any account. An unconfirmed match proves nothing.
OTHER_ENTRY = "SELECT 1 FROM entries WHERE task_id = ? AND key <> ? AND (error IS NULL OR error NOT LIKE ?) LIMIT 1"
# Read another entry that has the task as an unconfirmed match.
UNCONFIRMED_BY_TASK = "SELECT * FROM entries WHERE task_id = ? AND key <> ? AND error LIKE ?"
# Write the state of an entry of any owner.
UPDATE_ANY = "UPDATE entries SET {changes} WHERE key = ?"
# Write the images of an entry, unless another server changed them since they were read.
CHANGE_IMAGES = "UPDATE entries SET images = ? WHERE key = ? AND images = ?"
# Record the address of an uploaded reference image.
SAVE_UPLOAD = """INSERT INTO uploads VALUES (?, ?, ?, ?)
    ON CONFLICT (profile, sha256) DO UPDATE SET url = excluded.url, expires_at = excluded.expires_at"""
# Read finished entries that still have their request, oldest first.
FIND_OLD_REQUESTS = """SELECT * FROM entries WHERE {mine} AND closed AND created_at < ? AND created_at > ?
    AND request <> '{{}}' ORDER BY created_at LIMIT ?"""
# Remove the request of a finished entry.
REMOVE_REQUEST = 'UPDATE entries SET request = ?, "references" = ?, words = ? WHERE key = ? AND closed'
# Delete uploads that EvoLink does not have any more.
DELETE_UPLOADS = "DELETE FROM uploads WHERE {mine} AND expires_at <= ?"
# Find the address of an uploaded reference image.
FIND_UPLOAD = "SELECT url, expires_at FROM uploads WHERE {mine} AND sha256 = ? AND expires_at > ?"
# Facts about image stores and quotas have a holder instead of an account. An account ID has no blanks, so they never meet.
STORE_HOLDER = "image stores"
# Record a fact about the account.
SAVE_FACT = """INSERT INTO facts VALUES (?, ?, ?) ON CONFLICT (account, name) DO UPDATE SET value = excluded.value"""
# Record a fact, unless there is one.
ADD_FACT = "INSERT INTO facts VALUES (?, ?, ?) ON CONFLICT (account, name) DO NOTHING"
# Empty a fact about an account.
EMPTY_FACT = "UPDATE facts SET value = '' WHERE account = ? AND name = ?"
# Read all facts about the key's accounts.
FIND_FACTS = "SELECT name, account, value FROM facts WHERE account IN ({accounts})"
# Read one fact.
FIND_FACT = "SELECT value FROM facts WHERE account = ? AND name = ?"
# Read a fact about each account of the journal.
FACT_VALUES = "SELECT value FROM facts WHERE name = ?"
# The accounts of the profile, for a server without a key.
PROFILE_ACCOUNTS = "SELECT account FROM links WHERE {mine}"
# Read which keys of the profile can read which accounts.
FIND_LINKS = "SELECT identity, account FROM links WHERE {mine}"
# Record that a key can read the tasks of an account.
SAVE_LINK = "INSERT INTO links VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
# Read the newest entry of an account that has a task with an ID of the usual form.
NEWEST_TASK = """SELECT * FROM entries WHERE {mine} AND account = ? AND account <> ''
    AND task_id LIKE 'task-unified-%'
    AND created_at <= ? ORDER BY created_at DESC LIMIT 1"""

LATEST = 1e12  # epoch seconds after every entry
FACTS_MAX_AGE_S = 1.0  # an answer may report a change of the prices this much later
UNCONFIRMED_PATTERN = f'%"code": "{UNCONFIRMED.code}"%'
NOT_CONFIRMED = Problem(
    "journal_unwritable", "the journal did not confirm the order in time, so nothing was sent", True, "Call again."
)
MATCH_WITHDRAWN = Problem(
    "outcome_unknown",
    "the answer to the request was lost, and the task that was a candidate belongs to another order",
    False,
    OutcomeUnknown.advice,
)


@dataclass(frozen=True, slots=True)
class Charge:
    """The credits of one purchase: confirmed (`spent`) or, while its charge is not decided, its ceiling (`reserved`).

    `created_at` is in epoch seconds. `task_id` is None after a lost answer.
    """

    profile: str
    created_at: float
    task_id: str | None
    spent: float
    reserved: float

    @classmethod
    def of(cls, row: Row) -> Charge:
        """Return the charge in a row of CHARGES."""
        return cls(profile_name(row["profile"]), row["created_at"], row["task_id"], row["spent"], row["reserved"])


@dataclass(frozen=True, slots=True)
class Sums:
    """Credits of several entries, to 0.0001 credit: `spent` is confirmed, `reserved` may still be charged."""

    spent: float = 0.0
    reserved: float = 0.0

    @classmethod
    def of(cls, row: Row) -> Sums:
        """Return the sums of a row of SUMS, rounded: the order of the additions changes the last digits."""
        return cls(round(float(row["spent"]), 4), round(float(row["reserved"]), 4))

    @property
    def total(self) -> float:
        """The credits that count for spending limits."""
        return round(self.spent + self.reserved, 4)


class DailyLimitReached(Exception):
    """The sums of the day and the price ceiling of `entry` are above a daily limit. Nothing is written.

    `is_total`: the limit of all profiles.
    """

    def __init__(self, entry: Entry, sums: Sums, *, is_total: bool) -> None:
        super().__init__()
        self.entry = entry
        self.sums = sums
        self.is_total = is_total


# Return the facts that an entry changes. The second argument has the facts of the account.
Learn = Callable[[Entry, Mapping[str, str]], Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Notification:
    """A message of one server to the others of the profile.

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


@dataclass(frozen=True, slots=True)
class Selection:
    """The conditions of `Journal.recent`.

    `start` and `end` limit `created_at` and are included. `words` are folded. `other_filters` are all further SQL
    conditions, with `other_values`.
    """

    start: float
    end: float
    words: tuple[str, ...]
    other_filters: tuple[str, ...]
    other_values: tuple[Any, ...]

    @property
    def filters(self) -> str:
        """The SQL of all conditions."""
        return " AND ".join(("created_at >= ?", "created_at <= ?", *self.other_filters, *[HAS_WORD] * len(self.words)))

    @property
    def values(self) -> tuple[Any, ...]:
        """The values of `filters`."""
        return (self.start, self.end, *self.other_values, *self.words)


@dataclass(frozen=True, slots=True)
class Undelivered:
    """The undelivered entries of identical requests that no call of another server waits for, oldest first.

    `is_awaited`: calls of other servers wait for further ones.
    """

    entries: list[Entry]
    is_awaited: bool


@dataclass(frozen=True, slots=True)
class Upload:
    """EvoLink's copy of a reference image: its URL, and the time (epoch seconds) after which the URL is not used."""

    url: str
    expires_at: float


class Journal:
    """The entries of one profile. Each entry belongs to the account that bought it.

    Every entry of the profile can be read. Only entries of the accounts of this server's key can be owned, adopted and
    used for deduplication. A write is on disk when its method returns. Entries are never deleted. Only the owner writes
    the state of an entry. Times are epoch seconds, sums are credits. A write continues after the cancellation of its
    caller.

    Raises (every method):
        JournalUnwritable: The database cannot be read or written. The message names it and its setting.
    """

    def __init__(self, backend: Backend, identity: str = "", *, profile: str = DEFAULT_PROFILE) -> None:
        """`identity` is the account ID of the key, empty without a key. `profile` is any text."""
        self.profile = profile_id(profile)
        self.identity = identity
        self._backend = backend
        self._mine = f"profile = '{self.profile}'"
        self._linked: set[str] = set()  # the accounts that the key can read, as recorded in the journal
        self._accounts = (_checked_account(identity),)
        self._last_facts: dict[str, str] = {}
        self._facts_read_at = -math.inf  # monotonic time
        self._stop_functions: list[Callable[[], None]] = []

    @property
    def channel(self) -> str:
        """The name under which servers of the profile exchange notifications. It does not reveal the profile."""
        return hashlib.sha256(self.profile.encode()).hexdigest()[:32]

    @property
    def account(self) -> str:
        """The account of new entries: the one of the key, or an earlier account that the key can read."""
        return self._accounts[0]

    def is_linked(self, account: str) -> bool:
        """Return whether the key of this server may act for this account. Without a key no account is linked."""
        return self.identity != "" and account in self._accounts

    @property
    def owner(self) -> str:
        """The ID of this server."""
        return self._backend.owner

    @property
    def has_lease(self) -> bool:
        """Whether this server still owns its entries. Without the lease other servers may adopt them."""
        return self._backend.has_lease

    @property
    def can_publish(self) -> bool:
        """Whether `publish` reaches other servers."""
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

        stop = self._backend.listen(self.channel, read)
        self._stop_functions.append(stop)
        return stop

    async def publish(self, notification: Notification) -> None:
        """Send a notification to the other servers of the profile. The database itself publishes a changed entry."""
        await self._backend.publish(self.channel, _payload_of(notification))

    def publish_progress(self, key: str, task: Task) -> None:
        """Send the progress of an entry's task to the other servers of the profile soon. It is not recorded."""
        self._backend.publish_later(self.channel, _payload_of(Notification(key, task.id, task)), topic=key)

    def when_lost(self, stop: Callable[[], None]) -> None:
        """Call `stop` when other servers may adopt the entries of this one."""
        self._stop_functions.append(self._backend.when_lost(stop))

    # --- purchases ---

    async def intend(
        self,
        entry: Entry,
        *,
        since: float = 0.0,
        day_limit: float | None = None,
        total_limit: float | None = None,
        running_max: int | None = None,
        reprice: Callable[[Mapping[str, str]], Entry] | None = None,
    ) -> Entry:
        """Write a new entry and return it. All checks and the write are one transaction.

        `reprice` returns the entry with the price ceiling by the account's current facts. The sums of the profile since
        `since` and this ceiling together must not exceed `day_limit`, and those of all profiles not `total_limit`.
        `running_max` is the maximum of running tasks, this one included.

        Raises:
            TooManyRunning: The maximum is reached. Nothing is written.
            DailyLimitReached: A sum would exceed its limit. Nothing is written.
            TaskKnown: Another entry of the profile has this task.
        """

        async def act(db: Connection) -> Entry:
            all_limits = ((day_limit, self._mine), (total_limit, ALL_PROFILES))
            limits = [(limit, mine) for limit, mine in all_limits if limit is not None]
            has_limit = day_limit is not None or running_max is not None
            # A purchase without limits waits for no other purchase.
            locks = (*([TOTAL_LOCK] if total_limit is not None else []), *([self.profile] if has_limit else []))
            async with db.transaction(*locks):
                facts, count, *sums_of_limits = await db.batch(
                    self._facts_query,
                    (self._sql(COUNT_RUNNING), ()),
                    *[(SUMS.format(mine=mine), values_of_sums(since)) for _, mine in limits],
                )
                if running_max is not None and count.rows[0]["running"] >= running_max:
                    raise TooManyRunning.of(count.rows[0]["running"], running_max)
                priced = entry if reprice is None else reprice(self._facts_of(facts.rows))
                for (limit, mine), result in zip(limits, sums_of_limits, strict=True):
                    sums = Sums.of(result.rows[0])
                    if sums.total + priced.estimate > limit:
                        raise DailyLimitReached(priced, sums, is_total=mine == ALL_PROFILES)
                await self._record_link(db)
                await self._insert(db, priced)
            return priced

        written = await self._backend.run(act, key=entry.key)
        self._confirm_link()
        return written

    async def update(self, entry: Entry, learn: Learn | None = None) -> bool:
        """Write the entry's phase, task and error. Return False if another server owns the entry.

        `learn` returns the facts that the entry changes. They are written in the same transaction.

        Raises:
            TaskKnown: Another entry of the profile has this task.
        """
        return await self._write(entry, STATE_COLUMNS, learn)

    async def update_images(self, entry: Entry, learn: Learn | None = None) -> bool:
        """Do the same as `update`, and write the entry's images."""
        return await self._write(entry, (*STATE_COLUMNS, "images"), learn)

    async def sums_since(self, since: float) -> Sums:
        """Return the confirmed charges and the reserved credits of the entries since then."""
        return await self._backend.run(lambda db: _sums(db, self._mine, since))

    async def total_since(self, since: float) -> Sums:
        """Return the same as `sums_since`, for all profiles."""
        return await self._backend.run(lambda db: _sums(db, ALL_PROFILES, since))

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

        `caller` is the field of the entry that `undelivered` returned: empty, or a server without a waiting call.
        """
        return await self._execute(SET_CALLER, self.owner, key, caller, key=key) == 1

    async def remove_caller(self, key: str) -> None:
        """Record that no call of this server waits for the entry."""
        await self._execute(REMOVE_CALLER, key, self.owner, key=key)

    async def withdraw(self, key: str) -> None:
        """End an entry that `intend` wrote although its answer was lost. The server sent nothing for it."""
        entry = await self.by_key(key)
        if entry is None or entry.owner != self.owner:
            return
        await self.remove_caller(key)
        await self.update(replace(entry, phase=Phase.UNSENT, error=NOT_CONFIRMED))
        await self.release(key)

    async def deliver(self, key: str, at: float) -> None:
        """Record that a caller got the result."""
        await self._execute(SET_DELIVERED, at, key, key=key)

    async def add_derived(self, task_id: str, index: int, files: Sequence[DerivedFile]) -> bool:
        """Record files that were made from an image. Return False if the journal does not have the image.

        A file that is recorded already is not recorded again.
        """
        for _ in range(CHANGE_ATTEMPTS):
            rows = await self._fetch(self._sql(BY_TASK), task_id)
            entries = readable_entries(rows)
            if not entries or all(image.index != index for image in entries[0].images):
                return False
            images = tuple(
                replace(image, derived=tuple(dict.fromkeys((*image.derived, *files))))
                if image.index == index
                else image
                for image in entries[0].images
            )
            (value,) = values_of(replace(entries[0], images=images), ("images",))
            key = entries[0].key
            if await self._execute(CHANGE_IMAGES, value, key, rows[0]["images"], key=key) == 1:
                return True
        return False

    async def adopt(self) -> list[Entry]:
        """Become the owner of unfinished entries without a living owner, and end the waits of dead servers' calls.

        Creates no file.
        """
        if not self._has_data:
            return []
        rows = await self._backend.run(self._adopt)
        return [replace(entry, owner=self.owner) for entry in readable_entries(rows)]

    # --- reads ---

    async def by_key(self, key: str) -> Entry | None:
        """Return the entry with this key, or None."""
        return await self._one(BY_KEY, key)

    async def by_task(self, task_id: str) -> Entry | None:
        """Return the entry of this task, or None."""
        return await self._one(BY_TASK, task_id)

    async def by_image(self, text: str, limit: int) -> list[Entry]:
        """Return at most `limit` entries with this URL or SHA-256 in an image or in the task, newest first.

        Reads all entries of the profile, because the columns have no index.
        """
        written = json.dumps(text)[1:-1]  # as the columns have it
        return readable_entries(await self._fetch(self._sql(BY_IMAGE), written, written, limit))

    async def other_profile_of(self, task_id: str) -> str | None:
        """Return the name of another profile of this journal that has the task, or None."""
        rows = await self._fetch(self._sql(OTHER_PROFILE), task_id)
        return profile_name(rows[0]["profile"]) if rows else None

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
        start = since or 0.0
        end = until if until is not None else LATEST
        if after is not None:
            end = min(end, after[0])
        filters: list[str] = []
        values: list[Any] = []
        if status is not None:
            filters.append("status = ?")
            values.append(status)
        if after is not None:
            filters.append("(created_at < ? OR created_at = ? AND key > ?)")
            values += [after[0], *after]
        selection = Selection(start, end, tuple(map(fold, words)), tuple(filters), tuple(values))
        return readable_entries(await self._backend.run(lambda db: self._select(db, selection, limit)))

    async def recent_words(self, limit: int) -> list[str]:
        """Return the folded words of at most `limit` entries, newest first, one text for each entry."""
        return [row["words"] for row in await self._fetch(self._sql(RECENT_WORDS), limit)]

    async def of_accounts(self, limit: int, since: float, until: float) -> list[Entry]:
        """Return at most `limit` entries of the key's accounts, newest first. Other profiles may use the same account."""
        sql = self._sql(OF_ACCOUNTS, accounts=self._account_list)
        return readable_entries(await self._fetch(sql, since, until, self.identity, limit))

    async def undelivered(self, fingerprints: tuple[str, ...], since: float) -> Undelivered:
        """Return the undelivered entries of identical requests."""
        sql = self._sql(UNDELIVERED, marks=marks(fingerprints))

        async def act(db: Connection) -> Undelivered:
            rows = await db.fetch(sql, (*fingerprints, since))
            callers = {row["caller"] for row in rows} - {"", self.owner}
            awaiting = {caller for caller in callers if not await db.is_silent(caller)}
            entries = readable_entries(row for row in rows if row["caller"] not in awaiting)
            return Undelivered(entries, is_awaited=bool(awaiting))

        return await self._backend.run(act)

    async def known_tasks(self, task_ids: list[str]) -> set[str]:
        """Return which of these tasks have an entry, in any profile."""
        rows = await self._fetch(self._sql(KNOWN_TASKS, marks=marks(task_ids)), *task_ids)
        return {row["task_id"] for row in rows}

    async def belongs_to_other(self, task_id: str, key: str) -> bool:
        """Return whether another entry than `key` certainly has this task, in any account."""
        return bool(await self._fetch(OTHER_ENTRY, task_id, key, UNCONFIRMED_PATTERN))

    # --- accounts ---

    async def read_links(self) -> list[str]:
        """Read the accounts that this key can act for. Return the profile's other accounts.

        Creates no file.
        """
        if not self._has_data:
            return []
        rows = await self._fetch(self._sql(FIND_LINKS))
        for row in rows:
            if row["identity"] == self.identity:
                self._add_account(row["account"])
        return sorted({row["account"] for row in rows} - set(self._accounts))

    async def newest_of(self, account: str, until: float = LATEST) -> Entry | None:
        """Return the newest entry with a task that the profile bought from an account by `until`, or None."""
        return await self._one(NEWEST_TASK, account, until)

    async def link(self, account: str) -> None:
        """Record that this key can read the tasks of an account. From now on this server acts for the account too."""
        await self._execute(SAVE_LINK, self.profile, self.identity, account)
        self._add_account(account)

    # --- uploads and facts ---

    async def forget(self, before: float, now: float) -> int:
        """Remove the requests of finished entries that are older than `before`, and expired uploads.

        The entries stay, with task, charge and images. Return the number of changed entries.
        """
        await self._execute(self._sql(DELETE_UPLOADS), now)
        changed = 0
        newest = 0.0
        while rows := await self._fetch(self._sql(FIND_OLD_REQUESTS), before, newest, FORGET_AT_ONCE):
            newest = rows[-1]["created_at"]
            entries = [replace(entry, request={}, references=()) for entry in readable_entries(rows)]
            changed += await self._backend.run(partial(_remove_requests, entries))
        return changed

    async def remember_upload(self, sha256: str, url: str, expires_at: float) -> None:
        """Record that EvoLink has a reference image of this profile under this URL until `expires_at`."""
        await self._execute(SAVE_UPLOAD, self.profile, sha256, url, expires_at)

    async def find_upload(self, sha256: str, after: float) -> str | None:
        """Return the URL of an uploaded image that does not expire before `after`, or None."""
        upload = await self.upload_of(sha256, after)
        return None if upload is None else upload.url

    async def upload_of(self, sha256: str, after: float) -> Upload | None:
        """Return an uploaded image of this profile that does not expire before `after`, or None."""
        rows = await self._fetch(self._sql(FIND_UPLOAD), sha256, after)
        return Upload(rows[0]["url"], rows[0]["expires_at"]) if rows else None

    async def spend_quota(self, name: str, day: str, amount: int, maximum: int) -> bool:
        """Add an amount to the profile's sum of a day, unless the sum would exceed `maximum`. Return whether it fits.

        `name` is that of the quota. A new day begins with an empty sum.
        """
        holder = f"quota of {self.profile}"

        async def act(db: Connection) -> bool:
            async with db.transaction(self.profile):
                rows = await db.fetch(FIND_FACT, (holder, name))
                last_day, _, text = rows[0]["value"].partition(" ") if rows else ("", "", "")
                total = amount + (int(text) if last_day == day else 0)
                if total > maximum:
                    return False
                await db.execute(SAVE_FACT, (holder, name, f"{day} {total}"))
                return True

        return await self._backend.run(act)

    async def store_id(self, location: str) -> str | None:
        """Return the ID of an image store, or None if the journal knows none. All profiles of the journal share it.

        `location` names the store.
        """
        rows = await self._fetch(FIND_FACT, STORE_HOLDER, location)
        return rows[0]["value"] if rows else None

    async def add_store_id(self, location: str, store_id: str) -> str:
        """Record the ID of an image store, unless another server was faster. Return the recorded ID."""
        await self._execute(ADD_FACT, STORE_HOLDER, location, store_id)
        return await self.store_id(location) or store_id

    async def save_fact(self, name: str, value: str) -> None:
        """Record a fact about the account."""

        async def act(db: Connection) -> None:
            async with db.transaction():
                await self._record_link(db)
                await db.execute(SAVE_FACT, (self.account, name, value))

        await self._backend.run(act)
        self._facts_read_at = -math.inf
        self._confirm_link()

    async def fact(self, name: str) -> str | None:
        """Return a recorded fact about the accounts of the key, or None. Create no file.

        Without a key: the value that all accounts of the profile share.
        """
        return (await self.facts()).get(name)

    async def facts(self, max_age_s: float = 0.0) -> dict[str, str]:
        """Return all facts by their names, each as `fact` returns it. A read of the last `max_age_s` seconds counts."""
        if time.monotonic() - self._facts_read_at < max_age_s:
            return self._last_facts
        return await self._backend.run(self._facts) if self._has_data else {}

    async def take_fact(self, name: str) -> str | None:
        """Return a fact about the account and empty it. Of several servers only one gets it. None: it is empty."""

        async def act(db: Connection) -> str | None:
            async with db.transaction(self.account):
                value = (await self._facts(db)).get(name)
                if value:
                    for account in self._accounts:
                        await db.execute(EMPTY_FACT, (account, name))
                    self._last_facts.pop(name, None)
                return value or None

        # Most answers find an empty fact, so they need no lock. Most of them follow a write that read the facts.
        return await self._backend.run(act) if self.identity and (await self.facts(FACTS_MAX_AGE_S)).get(name) else None

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

    @property
    def _has_data(self) -> bool:
        return self._backend.is_open or self._backend.has_data

    @property
    def _account_list(self) -> str:
        return ", ".join(f"'{account}'" for account in self._accounts)

    @property
    def _linked_condition(self) -> str:
        """The condition for the entries of the key's accounts."""
        return f"{self._mine} AND account IN ({self._account_list})"

    @property
    def _is_link_recorded(self) -> bool:
        return self.account in self._linked or not self.identity

    def _add_account(self, account: str) -> None:
        """Let this key act for one more account. New entries belong to the key's own account if that has entries."""
        self._linked.add(_checked_account(account))
        first = self.identity if self.identity in self._linked else min(self._linked)
        self._accounts = (first, *({self.identity, *self._linked} - {first}))

    def _sql(self, query: str, **parts: str) -> str:
        return query.format(mine=self._mine, linked=self._linked_condition, **parts)

    async def _insert(self, db: Connection, entry: Entry) -> None:
        with _duplicate_task(entry):
            await db.execute(INSERT_ENTRY, (self.profile, *values_of(entry)))

    async def _record_link(self, db: Connection) -> None:
        """Record that this key can read the tasks of its account, before the first entry or fact of the account."""
        if not self._is_link_recorded:
            await db.execute(SAVE_LINK, (self.profile, self.identity, self.account))

    def _confirm_link(self) -> None:
        """The transaction of `_record_link` is complete."""
        if self.identity:
            self._add_account(self.account)

    async def _execute(self, sql: str, *values: Any, key: str = "") -> int:
        return await self._backend.run(lambda db: db.execute(sql, values), key=key)

    async def _fetch(self, sql: str, *values: Any) -> Sequence[Row]:
        return await self._backend.run(lambda db: db.fetch(sql, values))

    async def _select(self, db: Connection, selection: Selection, limit: int) -> Sequence[Row]:
        """Return the newest rows of a selection. A subclass may search words in an index."""
        return await db.fetch(self._sql(RECENT, filters=selection.filters), (*selection.values, limit))

    async def _one(self, query: str, *values: str | float) -> Entry | None:
        entries = readable_entries(await self._fetch(self._sql(query), *values))
        return entries[0] if entries else None

    @property
    def _facts_query(self) -> Statement:
        accounts = self._account_list if self.identity else self._sql(PROFILE_ACCOUNTS)
        return self._sql(FIND_FACTS, accounts=accounts), ()

    async def _facts(self, db: Connection) -> dict[str, str]:
        return self._facts_of(await db.fetch(*self._facts_query))

    def _facts_of(self, rows: Iterable[Row]) -> dict[str, str]:
        """Return the facts in the rows of FIND_FACTS. The key's own account has precedence."""
        values: dict[str, dict[str, str]] = {}
        for row in rows:
            values.setdefault(row["name"], {})[row["account"]] = row["value"]
        facts: dict[str, str] = {}
        for name, by_account in values.items():
            shared = set(by_account.values())
            value = by_account.get(self.account) or (shared.pop() if len(shared) == 1 else None)
            if value is not None:
                facts[name] = value
        self._last_facts = facts
        self._facts_read_at = time.monotonic()
        return facts

    async def _write(self, entry: Entry, columns: tuple[str, ...], learn: Learn | None) -> bool:
        """Write the columns of an entry, and the facts that it changes."""
        changes = _assignments(columns)
        values = values_of(entry, columns)
        update = UPDATE_OWNED.format(changes=changes), (*values, entry.key, self.owner)
        if entry.task is None:
            update = UPDATE_WITHOUT_TASK.format(changes=changes), (*update[1], UNCONFIRMED_PATTERN)

        async def write(db: Connection) -> bool:
            if entry.has_certain_task:
                await _withdraw_matches(db, entry)
            with _duplicate_task(entry):
                if await db.execute(*update) == 1:
                    return True
                if entry.has_certain_task:
                    sql = UPDATE_CERTAIN.format(changes=changes)
                    if await db.execute(sql, (*values, self.owner, entry.key, UNCONFIRMED_PATTERN)) == 1:
                        return True
            if await db.fetch(FIND_KEY, (entry.key,)):
                return False
            await self._insert(db, replace(entry, owner=self.owner))
            return True

        async def write_at_once(db: Connection) -> bool:
            """Write the entry in one step. Return False if that is not enough, which is rare: then it is written again."""
            matches = UNCONFIRMED_BY_TASK, (entry.task_id, entry.key, UNCONFIRMED_PATTERN)
            try:
                facts, other_entries, updated = await db.batch(self._facts_query, matches, update)
            except UniqueViolation:
                return False
            has_new_facts = learn is not None and bool(learn(entry, self._facts_of(facts.rows)))
            has_wrong_match = entry.has_certain_task and bool(other_entries.rows)
            return updated.changed == 1 and not has_wrong_match and not has_new_facts

        async def act(db: Connection) -> bool:
            if await write_at_once(db):
                return True
            if learn is None or not learn(entry, await self._facts(db)):
                return await write(db)
            async with db.transaction(self.account):
                is_written = await write(db)
                if is_written:
                    for name, value in learn(entry, await self._facts(db)).items():
                        await db.execute(SAVE_FACT, (self.account, name, value))
                        self._last_facts[name] = value
            return is_written

        return await self._run_write(act, entry)

    async def _run_write(self, act: Callable[[Connection], Awaitable[bool]], entry: Entry) -> bool:
        """Run the action that writes an entry. A subclass may record the entry at a second place."""
        return await self._backend.run(act, key=entry.key)

    async def _adopt(self, db: Connection) -> Sequence[Row]:
        servers = {row["server"] for row in await db.fetch(self._sql(FIND_SERVERS))} - {self.owner}
        dead = [server for server in servers if await db.is_dead(server)]
        # A start must not write if there is nothing to adopt: an MCP host may start several servers at once.
        if not dead and not await db.fetch(self._sql(HAS_ORPHAN)):
            return []
        async with db.transaction():
            dead = [server for server in dead if await db.is_dead(server)]
            await release_servers(db, dead, self._linked_condition)
            rows = await db.fetch(self._sql(FIND_ORPHANS), lock_rows=True)
            for row in rows:
                await db.execute(CHANGE_OWNER, (self.owner, row["key"], ""))
        return rows

    async def _release_all(self, db: Connection) -> None:
        async with db.transaction():
            await release_servers(db, [self.owner], self._linked_condition)


def _payload_of(notification: Notification) -> dict[str, Any]:
    return {name: value for name, value in asdict(notification).items() if value}


async def release_servers(db: Connection, servers: list[str], linked: str) -> None:
    """Release the entries of servers and end the waits of their calls. `linked` is the condition for the entries."""
    if servers:
        for query in (RELEASE_CALLERS, RELEASE_OWNERS):
            await db.execute(query.format(marks=marks(servers), linked=linked), servers)


async def _remove_requests(entries: list[Entry], db: Connection) -> int:
    async with db.transaction():
        for entry in entries:
            await db.execute(REMOVE_REQUEST, (*values_of(entry, ("request", "references", "words")), entry.key))
    return len(entries)


@contextmanager
def _duplicate_task(entry: Entry) -> Generator[None]:
    """Translate a violation of the rule "one entry per task and profile" into TaskKnown."""
    try:
        yield
    except UniqueViolation as error:
        raise TaskKnown(f"the journal already has the task {entry.task_id}") from error


def _checked_account(account: str) -> str:
    if account and not account.isalnum():
        raise ValueError("an account ID has only letters and digits")
    return account


async def _sums(db: Connection, mine: str, since: float) -> Sums:
    (row,) = await db.fetch(SUMS.format(mine=mine), values_of_sums(since))
    return Sums.of(row)


def values_of_sums(since: float) -> tuple[int, float, float]:
    """Return the values of SUMS for the entries since then (epoch seconds)."""
    slot = math.ceil(since / SLOT_S)
    return slot, since, slot * SLOT_S


async def _withdraw_matches(db: Connection, entry: Entry) -> None:
    """Make the outcome of another entry unknown again if its unconfirmed match is the certain task of this entry."""
    columns = (*STATE_COLUMNS, "images")
    sql = UPDATE_ANY.format(changes=_assignments(columns))
    values = (entry.task_id, entry.key, UNCONFIRMED_PATTERN)
    for other in readable_entries(await db.fetch(UNCONFIRMED_BY_TASK, values)):
        log.warning("the task %s belongs to another order, the match of %s was wrong", entry.task_id, other.key)
        unknown = replace(other, phase=Phase.UNKNOWN, task=None, images=(), error=MATCH_WITHDRAWN)
        await db.execute(sql, (*values_of(unknown, columns), other.key))


def _assignments(columns: Sequence[str]) -> str:
    return ", ".join(f"{name} = ?" for name in columns)


def marks(values: Sequence[str]) -> str:
    """Return as many `?` as there are values. An empty list in SQL is valid in SQLite only, so it gets one NULL."""
    return ", ".join("?" * len(values)) or "NULL"
