"""Tenants with unfinished entries of a dead server. They may never call again, so every server searches for them."""

from __future__ import annotations

from collections.abc import Collection

from psycopg.rows import DictRow

from evolink_mcp.teams.database import Database, DatabaseConnection

# The fact with the name of an account's tenant.
TENANT = "tenant"


async def tenants_left(database: Database, known: Collection[str]) -> dict[str, str]:
    """Return the names of tenants with open entries and no living owner, by account ID. Skip the `known` accounts.

    Raises:
        JournalUnwritable: The database cannot be read.
    """

    async def read(db: DatabaseConnection) -> list[DictRow]:
        async with db.transaction():
            cursor = await db.execute(
                "SELECT DISTINCT account, owner, value FROM evolink_entries JOIN evolink_facts USING (account) "
                "WHERE NOT closed AND name = %s AND NOT account = ANY(%s)",
                (TENANT, list(known)),
            )
            rows = await cursor.fetchall()
            dead = {owner for owner in {row["owner"] for row in rows} if not owner or await database.is_dead(db, owner)}
            return [row for row in rows if row["owner"] in dead]

    return {row["account"]: row["value"] for row in await database.run(read)}
