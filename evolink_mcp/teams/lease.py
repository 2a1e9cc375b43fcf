"""The lease of one server: the proof for all other servers that it is alive.

It has two parts. The row in `evolink_servers` has the deadline `lease_until` by the database's clock, and each heartbeat
moves it. The session holds an advisory lock, which PostgreSQL releases when the session ends.

The server's number is the fencing number: each write of an entry names it as the owner. A server that adopts the entries
of a dead one sets `fenced_at` in its row first. If the other server was only frozen, it finds this mark, gets a new number,
and its late writes change nothing.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import psycopg
from psycopg.rows import DictRow

from evolink_mcp.teams.database_url import DatabaseTimes

DatabaseConnection = psycopg.AsyncConnection[DictRow]

# The class of all advisory locks. The second half of a lock is the number of a server, or 0 for a migration.
# It is "evol" in ASCII, so that it differs from the locks of other programs in the same database.
LOCKS = 0x65766F6C
# Each half of an advisory lock is a signed integer of 32 bits.
NUMBERS = 1_000_000_000
# Add a server. A random number cannot return after a failover that lost the newest rows and the state of a sequence.
ADD_SERVER = """INSERT INTO evolink_servers (number, lease_until) OVERRIDING SYSTEM VALUE
    VALUES (%s, clock_timestamp() + make_interval(secs => %s)) ON CONFLICT DO NOTHING"""
# Move the deadline, unless another server ended the lease.
# clock_timestamp(), because now() is the start of the transaction.
RENEW = """UPDATE evolink_servers SET
    seen_at = clock_timestamp(), gone_since = NULL, lease_until = clock_timestamp() + make_interval(secs => %s)
    WHERE number = %s AND fenced_at IS NULL RETURNING extract(epoch FROM seen_at)::float8 AS now"""
# Lock the number for this session.
LOCK_NUMBER = "SELECT pg_try_advisory_lock(%s, %s) AS is_locked"
# Read the process of this session.
FIND_SESSION = "SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()"
# End a former session of this server.
# PostgreSQL can give the same process ID to another session later.
END_SESSION = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = %s AND backend_start = %s"
# Forget servers that ended long ago.
FORGET = "DELETE FROM evolink_servers WHERE seen_at < clock_timestamp() - interval '1 day'"
# Read the state of a server's lease. The lock is free if its session ended.
# Shared, so that several servers can test it at the same time. It lasts until the end of the transaction.
FIND_LEASE = """SELECT fenced_at IS NOT NULL AS is_fenced, pg_try_advisory_xact_lock_shared(%s, number) AS is_free,
    coalesce(lease_until < clock_timestamp(), false) AS is_expired,
    seen_at < clock_timestamp() - make_interval(secs => %s) AS is_silent
    FROM evolink_servers WHERE number = %s"""
# Remember when the session of a server was missing for the first time.
NOTE_END = "UPDATE evolink_servers SET gone_since = clock_timestamp() WHERE number = %s AND gone_since IS NULL"
# End the lease of a server finally: after its deadline, or some time after the end of its session.
FENCE = """UPDATE evolink_servers SET fenced_at = clock_timestamp() WHERE number = %s AND fenced_at IS NULL
    AND (lease_until < clock_timestamp() AND %s OR gone_since <= clock_timestamp() - make_interval(secs => %s) AND %s)"""


class LeaseLost(psycopg.OperationalError):
    """Another server ended the lease of this one, or the database does not have it any more."""


class Lease:
    """The lease of this server. `number` is 0 until `register`."""

    def __init__(self, times: DatabaseTimes) -> None:
        self._times = times
        self._session: tuple[int, Any] = (0, None)  # process ID and start of the session in PostgreSQL
        self._taken_at = 0.0  # monotonic time
        self.number = 0

    @property
    def owner(self) -> str:
        """The ID of this server, which is the owner of its entries."""
        return f"server-{self.number}"

    async def register(self, db: DatabaseConnection) -> None:
        """Get a new number."""
        while True:
            number = 1 + secrets.randbelow(NUMBERS - 1)
            if (await db.execute(ADD_SERVER.encode(), (number, self._times.lease_s))).rowcount == 1:
                self.number = number
                return

    async def take(self, db: DatabaseConnection) -> None:
        """Hold the lease with this session. End a former session of this server that still holds it.

        Raises:
            LeaseLost: Another server ended the lease.
            psycopg.OperationalError: A former session still holds the lock. Try again.
        """
        row = await (await db.execute(LOCK_NUMBER.encode(), (LOCKS, self.number))).fetchone()
        if row is None or not row["is_locked"]:
            await db.execute(END_SESSION.encode(), self._session)
            # PostgreSQL ends a session later than it accepts the command, so the caller tries again.
            raise psycopg.OperationalError("the former session holds the lease, or another server is testing it")
        await self.renew(db)
        row = await (await db.execute(FIND_SESSION.encode())).fetchone()
        self._session = (row["pid"], row["backend_start"]) if row else (0, None)
        self._taken_at = time.monotonic()

    async def renew(self, db: DatabaseConnection) -> float:
        """Move the deadline to `lease_s` from now. Return the time of the database's clock (epoch seconds).

        Raises:
            LeaseLost: Another server ended the lease.
        """
        row = await (await db.execute(RENEW.encode(), (self._times.lease_s, self.number))).fetchone()
        if row is None:
            raise LeaseLost(f"another server ended the lease of {self.owner}")
        return row["now"]

    async def forget_old(self, db: DatabaseConnection) -> None:
        """Delete the rows of servers that ended a day ago."""
        await db.execute(FORGET.encode())

    async def is_dead(self, db: DatabaseConnection, owner: str) -> bool:
        """Return whether a server ended, or did not move its deadline. Then end its lease, so that it can never move it again."""
        number = number_of(owner)
        lease = await self._find(db, number)
        if lease is None or lease["is_fenced"]:
            return True
        # After an outage of the database the other servers need time to reconnect.
        can_enforce = lease["is_expired"] and time.monotonic() - self._taken_at >= self._times.grace_s
        if lease["is_free"]:
            await db.execute(NOTE_END.encode(), (number,))
        elif not can_enforce:
            return False
        values = (number, can_enforce, self._times.grace_s, lease["is_free"])
        return (await db.execute(FENCE.encode(), values)).rowcount == 1

    async def is_silent(self, db: DatabaseConnection, owner: str) -> bool:
        """Return whether a server ended or sent no heartbeat for `stop_after_s`. Then no call waits there."""
        lease = await self._find(db, number_of(owner))
        return lease is None or lease["is_fenced"] or lease["is_free"] or lease["is_silent"]

    async def _find(self, db: DatabaseConnection, number: int) -> DictRow | None:
        return await (await db.execute(FIND_LEASE.encode(), (LOCKS, self._times.stop_after_s, number))).fetchone()


def number_of(owner: str) -> int:
    """Return the number in a server ID, or 0, which no server has."""
    number = owner.removeprefix("server-")
    return int(number) if number.isdigit() and len(number) < 10 else 0
