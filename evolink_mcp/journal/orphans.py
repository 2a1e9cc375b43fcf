"""Find unfinished entries without a living owner in all profiles. The number of profiles does not change the cost."""

from __future__ import annotations

from dataclasses import dataclass

from evolink_mcp.journal.backend import Connection
from evolink_mcp.journal.entry import Entry
from evolink_mcp.journal.journal import EVERYONE, FIND_SERVERS, RELEASE_CALLERS, RELEASE_OWNERS
from evolink_mcp.journal.rows import readable_entries

# List the servers that own entries or whose calls wait, in all profiles.
ALL_SERVERS = FIND_SERVERS.format(linked=EVERYONE)
# List the unfinished entries of these servers, and those without an owner, in all profiles.
ALL_ORPHANS = "SELECT profile, account, key, owner FROM entries WHERE NOT closed AND owner IN ('', {marks})"
# Read an entry of any profile.
ANY_ENTRY = "SELECT * FROM entries WHERE key = ?"


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
        marks = ", ".join("?" * len(dead)) or "NULL"
        rows = await db.fetch(ALL_ORPHANS.format(marks=marks), dead)
        if dead:
            for query in (RELEASE_CALLERS, RELEASE_OWNERS):
                await db.execute(query.format(marks=marks, linked=EVERYONE), dead)
    return [Orphan(row["profile"], row["account"], row["key"], row["owner"]) for row in rows]


async def find_entry(db: Connection, key: str) -> tuple[str, Entry] | None:
    """Return the profile and the entry with this key, or None."""
    rows = await db.fetch(ANY_ENTRY, (key,))
    return next(((row["profile"], entry) for row in rows for entry in readable_entries([row])), None)
