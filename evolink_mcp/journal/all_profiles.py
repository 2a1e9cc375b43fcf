"""Queries over all profiles, for a server with many tenants. The number of profiles does not change the cost."""

from __future__ import annotations

from dataclasses import dataclass

from evolink_mcp.journal.backend import Connection
from evolink_mcp.journal.entry import Entry
from evolink_mcp.journal.journal import ALL_PROFILES, FIND_SERVERS, marks, release_servers
from evolink_mcp.journal.profile import profile_name
from evolink_mcp.journal.rows import readable_entries

# List the owners of entries and the servers with waiting calls, in all profiles.
ALL_SERVERS = FIND_SERVERS.format(linked=ALL_PROFILES)
# List the unfinished entries of these servers, and those without an owner, in all profiles.
ALL_ORPHANS = "SELECT profile, account, key, owner FROM entries WHERE NOT closed AND owner IN ('', {marks})"
# Read an entry of any profile.
ANY_ENTRY = "SELECT * FROM entries WHERE key = ?"
# List the profiles with old requests or expired uploads. The + keeps SQLite from an index of all entries.
OLD_PROFILES = """SELECT profile FROM entries WHERE closed AND request <> '{{}}' AND +created_at < ?
    UNION SELECT profile FROM uploads WHERE expires_at <= ?"""


@dataclass(frozen=True, slots=True)
class Orphan:
    """An unfinished entry without a living owner. `owner` is the dead server, "" if a server released the entry."""

    profile: str
    account: str
    key: str
    owner: str


async def release_dead_servers(db: Connection, own_server: str) -> list[Orphan]:
    """Release the entries of dead servers and end the waits of their calls. Return the unfinished entries without an owner.

    It needs no key, because it continues no entry. `Journal.adopt` with the key of an entry's account continues it.
    """
    async with db.transaction():
        servers = {row["server"] for row in await db.fetch(ALL_SERVERS)} - {own_server}
        dead = [server for server in servers if await db.is_dead(server)]
        rows = await db.fetch(ALL_ORPHANS.format(marks=marks(dead)), dead)
        await release_servers(db, dead, ALL_PROFILES)
    return [Orphan(row["profile"], row["account"], row["key"], row["owner"]) for row in rows]


async def find_entry(db: Connection, key: str) -> tuple[str, Entry] | None:
    """Return the profile and the entry with this key, or None."""
    rows = await db.fetch(ANY_ENTRY, (key,))
    return next(((row["profile"], entry) for row in rows for entry in readable_entries([row])), None)


async def old_profiles(db: Connection, before: float, now: float) -> list[str]:
    """Return the names of the profiles for which `Journal.forget` has work."""
    return [profile_name(row["profile"]) for row in await db.fetch(OLD_PROFILES.format(), (before, now))]
