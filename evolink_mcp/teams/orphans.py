"""Tenants whose work a dead server has left, and whom nobody may call for: every server looks for them."""

from __future__ import annotations

from collections.abc import Collection

from psycopg.rows import DictRow

from evolink_mcp.teams.database import Connection, Database

# What an account's tenant is called, among what is learned of the account.
TENANT = "tenant"


async def tenants_left(database: Database, known: Collection[str]) -> dict[str, str]:
    """The names of tenants with open entries that no living server owns, by their accounts' marks; without those `known`.

    Raises:
        JournalUnwritable: it cannot be known.
    """

    async def look(db: Connection) -> list[DictRow]:
        async with db.transaction():
            found = await db.execute(
                "SELECT DISTINCT account, owner, value FROM evolink_entries JOIN evolink_facts USING (account) "
                "WHERE NOT closed AND name = %s AND NOT account = ANY(%s)",
                (TENANT, list(known)),
            )
            rows = await found.fetchall()
            dead = {owner for owner in {row["owner"] for row in rows} if not owner or await database.is_dead(db, owner)}
            return [row for row in rows if row["owner"] in dead]

    return {row["account"]: row["value"] for row in await database.run(look)}
