"""Tenants with unfinished entries of a dead server. They may never call again, so every server searches for them."""

from __future__ import annotations

from collections.abc import Collection

from psycopg.rows import DictRow

from evolink_mcp.journal.profile import profile_name
from evolink_mcp.teams.database import Database, DatabaseConnection


async def tenants_left(database: Database, profiles: Collection[str]) -> set[str]:
    """Return the names of tenants with open entries and no living owner. Skip the profiles in `profiles`.

    Raises:
        JournalUnwritable: The database cannot be read.
    """

    async def read(db: DatabaseConnection) -> list[DictRow]:
        async with db.transaction():
            cursor = await db.execute(
                "SELECT DISTINCT profile, owner FROM evolink_entries WHERE NOT closed AND NOT profile = ANY(%s)",
                (list(profiles),),
            )
            rows = await cursor.fetchall()
            dead = {owner for owner in {row["owner"] for row in rows} if not owner or await database.is_dead(db, owner)}
            return [row for row in rows if row["owner"] in dead]

    return {profile_name(row["profile"]) for row in await database.run(read)}
