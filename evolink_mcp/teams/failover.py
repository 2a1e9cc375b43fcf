"""A promoted standby that lacks the newest entries: each server writes back its own before any server continues.

A standby with asynchronous replication can lose the last moments. Each PostgreSQL cluster has a timeline, and a promotion
begins a new one. A server that meets a new timeline marks all servers that were alive, and waits until each of them has
written its entries back or has not returned within the time of a lease. It waits for WAIT_MAX_S at most.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from psycopg import errors

from evolink_mcp.journal.backend import clean_text
from evolink_mcp.journal.entry import Entry
from evolink_mcp.journal.rows import COLUMNS, values_of
from evolink_mcp.teams.lease import DatabaseConnection, Lease

log = logging.getLogger(__name__)

# A promoted standby can lack the newest states. How many depends on the network, so both values are guesses.
KEEP_MAX = 5_000
KEEP_S = 600.0
CHECK_EVERY_S = 0.5
# A server that keeps its lease and never writes back must not stop the whole team.
WAIT_MAX_S = 60.0
# Read the timeline of this cluster. A database that was restored on another machine has another system identifier.
# The name of a WAL file begins with the eight digits of its timeline.
FIND_TIMELINE = """SELECT system_identifier || '/' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) AS timeline
    FROM pg_control_system()"""
# Give all servers that were alive at the end of the former timeline the time of a lease to return. Only the first call
# for a timeline changes rows.
AWAIT_SERVERS = """UPDATE evolink_servers SET awaited_on = %(timeline)s,
    lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s)
    WHERE timeline NOT IN ('', %(timeline)s) AND awaited_on IS DISTINCT FROM %(timeline)s AND fenced_at IS NULL
    AND lease_until > (SELECT max(lease_until) FROM evolink_servers WHERE timeline <> %(timeline)s)
    - make_interval(secs => 2 * %(lease_s)s)"""
# Record that this server has written its entries back.
CONFIRM = "UPDATE evolink_servers SET timeline = %s WHERE number = %s"
# Check whether a server has still to write its entries back.
IS_INCOMPLETE = """SELECT 1 FROM evolink_servers WHERE awaited_on = %s AND timeline <> awaited_on AND fenced_at IS NULL
    AND lease_until > clock_timestamp() AND number <> %s LIMIT 1"""
# The state of an entry: the columns that RESTORE changes in an existing row.
STATE = (
    "owner",
    "phase",
    "task_id",
    "status",
    "closed",
    "delivered_at",
    "spent",
    "reserved",
    "task",
    "error",
    "images",
)
# A later state of an entry has a higher rank, so an older copy never replaces a newer one.
RANK = "({0}.task_id IS NOT NULL, {0}.closed, {0}.delivered_at IS NOT NULL, length({0}.images))"
# Write an entry that the database does not have, or has in an earlier state.
RESTORE = f"""INSERT INTO evolink_entries AS old (profile, {", ".join(f'"{name}"' for name in COLUMNS)})
    VALUES (%s{", %s" * len(COLUMNS)}) ON CONFLICT (key) DO UPDATE SET
    {", ".join(f"{name} = excluded.{name}" for name in STATE)} WHERE {RANK.format("excluded")} > {RANK.format("old")}"""
# Check whether standbys replicate asynchronously. A role without the right to see standbys counts none.
HAS_ASYNCHRONOUS_STANDBY = """SELECT 1 FROM pg_stat_replication WHERE sync_state = 'async'
    AND current_setting('synchronous_standby_names') = '' LIMIT 1"""
ASYNCHRONOUS_STANDBY = (
    "a standby of the database replicates asynchronously, so a failover can lose the last purchases if their server "
    "ends too; set synchronous_standby_names"
)


class WrittenEntries:
    """The newest states that this server wrote in the last KEEP_S seconds, at most KEEP_MAX."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: OrderedDict[str, tuple[float, str, Entry]] = OrderedDict()

    def add(self, profile: str, entry: Entry) -> None:
        """Remember an entry that was written now."""
        self._entries[entry.key] = (self._clock(), profile, entry)
        self._entries.move_to_end(entry.key)
        while len(self._entries) > KEEP_MAX or next(iter(self._entries.values()))[0] < self._clock() - KEEP_S:
            self._entries.popitem(last=False)

    def change(self, key: str, **fields: Any) -> None:
        """Change the fields of an entry, if it is remembered."""
        if key in self._entries:
            written_at, profile, entry = self._entries[key]
            self._entries[key] = (written_at, profile, replace(entry, **fields))

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._entries)

    async def restore(self, db: DatabaseConnection, owner: str) -> int:
        """Write all entries that the database does not have in this state. Return their number."""
        count = 0
        for _, profile, entry in list(self._entries.values()):
            owned = replace(entry, owner=owner if entry.owner else "", caller="")
            try:
                cursor = await db.execute(
                    RESTORE.encode(), [clean_text(value) for value in (profile, *values_of(owned))]
                )
            except errors.UniqueViolation:
                log.warning("%s was not written back: another entry has its task", entry.task_id)
            else:
                count += cursor.rowcount
        return count


class Timelines:
    """The timeline on which this server works."""

    def __init__(self, lease_s: float, written: WrittenEntries) -> None:
        self._lease_s = lease_s
        self._written = written
        self._current: str | None = None

    async def find(self, db: DatabaseConnection) -> str:
        """Return the timeline of the database. If it is new, give all servers of the former timeline time to return.

        Call this before this server takes its lease: the new deadline would hide when the others were last alive.

        A database without these functions, or a role without the right to them, has "" as its only timeline.
        """
        timeline = await _find_timeline(db)
        if timeline != self._current:
            await db.execute(AWAIT_SERVERS.encode(), {"timeline": timeline, "lease_s": self._lease_s})
        return timeline

    async def is_current(self, db: DatabaseConnection) -> bool:
        """Return whether a connection leads to the timeline on which this server works."""
        return await _find_timeline(db) == self._current

    async def enter(self, db: DatabaseConnection, timeline: str, lease: Lease) -> None:
        """Write the entries of this server back, and wait for the other servers. Renew the lease meanwhile."""
        if timeline == self._current:
            return
        # A server that has just started has written nothing.
        if self._current is not None:
            count = await self._written.restore(db, lease.owner)
            log.warning("the database was replaced: wrote back %d of %d entries", count, len(self._written))
        await db.execute(CONFIRM.encode(), (timeline, lease.number))
        give_up_at = time.monotonic() + WAIT_MAX_S
        while await (await db.execute(IS_INCOMPLETE.encode(), (timeline, lease.number))).fetchone() is not None:
            if time.monotonic() > give_up_at:
                log.error("another server has not written its entries back for %.0f s", WAIT_MAX_S)
                break
            await asyncio.sleep(CHECK_EVERY_S)
            await lease.renew(db)
        self._current = timeline


async def _find_timeline(db: DatabaseConnection) -> str:
    try:
        row = await (await db.execute(FIND_TIMELINE.encode())).fetchone()
    except (errors.InsufficientPrivilege, errors.FeatureNotSupported, errors.UndefinedFunction):
        return ""
    return str(row["timeline"]) if row is not None else ""


async def warn_of_asynchronous_standby(db: DatabaseConnection) -> None:
    """Log a warning if a failover can lose purchases."""
    if await (await db.execute(HAS_ASYNCHRONOUS_STANDBY.encode())).fetchone() is not None:
        log.warning(ASYNCHRONOUS_STANDBY)
