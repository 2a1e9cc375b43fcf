"""The versions of the PostgreSQL schema."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.rows import dict_row

from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.backend import Row
from evolink_mcp.journal.entry import Entry
from evolink_mcp.journal.journal import SUMS, Sums
from evolink_mcp.journal.rows import fold, readable_entries
from evolink_mcp.teams.database_url import Address

# A trigger publishes each visible change of an entry: "{Journal.channel of the profile} {JSON}". `by` is the server.
# PostgreSQL knows one channel for all profiles.
CHANNEL = "evolink_mcp"
# The tables of unpublished builds, and the statements that move them away.
OLD_TABLES = ("evolink_schema", "evolink_servers", "evolink_entries", "evolink_uploads", "evolink_facts")
MOVE_OLD_TABLES = "; ".join(
    ["CREATE SCHEMA evolink_old", *(f"ALTER TABLE {name} SET SCHEMA evolink_old" for name in OLD_TABLES)]
)
# VERSIONS[0] makes version 1. A later release appends a script and never changes an earlier one.
VERSIONS = (
    f"""
    CREATE TABLE evolink_servers (
        number INTEGER GENERATED ALWAYS AS IDENTITY PRIMARY KEY, since TIMESTAMPTZ NOT NULL DEFAULT now(),
        seen_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(), gone_since TIMESTAMPTZ
    );
    CREATE TABLE evolink_entries (
        key TEXT COLLATE "C" PRIMARY KEY, profile TEXT NOT NULL, account TEXT NOT NULL, owner TEXT NOT NULL,
        caller TEXT NOT NULL, phase TEXT NOT NULL, created_at DOUBLE PRECISION NOT NULL, fingerprint TEXT NOT NULL,
        task_id TEXT, status TEXT NOT NULL, closed BOOLEAN NOT NULL, delivered_at DOUBLE PRECISION,
        estimate DOUBLE PRECISION NOT NULL, spent DOUBLE PRECISION NOT NULL, reserved DOUBLE PRECISION NOT NULL,
        request TEXT NOT NULL, save_as TEXT, task TEXT, error TEXT, images TEXT NOT NULL, rule TEXT NOT NULL,
        "references" TEXT NOT NULL, price_factor DOUBLE PRECISION NOT NULL, words TEXT NOT NULL,
        CONSTRAINT evolink_task_once UNIQUE (task_id, profile)
    );
    CREATE INDEX evolink_entries_by_age ON evolink_entries (profile, created_at DESC, key);
    CREATE INDEX evolink_entries_spending ON evolink_entries (profile, created_at) INCLUDE (spent, reserved);
    CREATE INDEX evolink_entries_open ON evolink_entries (profile, owner) WHERE NOT closed;
    CREATE INDEX evolink_entries_owned ON evolink_entries (owner, profile) WHERE owner <> '';
    CREATE INDEX evolink_entries_awaited ON evolink_entries (caller, profile) WHERE caller <> '' AND delivered_at IS NULL;
    CREATE INDEX evolink_entries_undelivered ON evolink_entries (profile, fingerprint) WHERE delivered_at IS NULL;
    CREATE TABLE evolink_links (
        profile TEXT NOT NULL, identity TEXT NOT NULL, account TEXT NOT NULL,
        PRIMARY KEY (profile, identity, account)
    );
    CREATE TABLE evolink_uploads (
        profile TEXT NOT NULL, sha256 TEXT NOT NULL, url TEXT NOT NULL, expires_at DOUBLE PRECISION NOT NULL,
        PRIMARY KEY (profile, sha256)
    );
    CREATE TABLE evolink_facts (
        account TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (account, name)
    );
    CREATE FUNCTION evolink_publish() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_notify('{CHANNEL}', left(encode(sha256(convert_to(NEW.profile, 'UTF8')), 'hex'), 32) || ' ' ||
                json_build_object('by', CASE WHEN NEW.owner = '' AND TG_OP = 'UPDATE' THEN OLD.owner ELSE NEW.owner END,
                'key', NEW.key, 'task_id', NEW.task_id));
            RETURN NULL;
        END
    $$;
    CREATE TRIGGER evolink_changed AFTER INSERT OR UPDATE OF phase, task, error, images, owner ON evolink_entries
        FOR EACH ROW EXECUTE FUNCTION evolink_publish();
    """,
)


FIND_OLD_TABLES = "SELECT to_regclass('evolink_schema') AS name"
UNPUBLISHED = f"an unpublished build made its tables; move them away: {MOVE_OLD_TABLES}"


async def migrate(db: psycopg.AsyncConnection[Any], locks: int) -> None:
    """Run the scripts that the database has not seen, in one transaction. `locks` is the class of the advisory lock.

    Raises:
        JournalUnwritable: A newer version or an unpublished build of evolink-mcp made the tables.
    """
    async with db.transaction():
        await db.execute("SET LOCAL statement_timeout = '10min'")
        await db.execute("SELECT pg_advisory_xact_lock(%s, 0)", (locks,))
        row = await (await db.execute(FIND_OLD_TABLES)).fetchone()
        if row is not None and row["name"] is not None:
            raise JournalUnwritable(UNPUBLISHED)
        await db.execute("CREATE TABLE IF NOT EXISTS evolink_version (version INTEGER NOT NULL)")
        row = await (await db.execute("SELECT version FROM evolink_version")).fetchone()
        version = row["version"] if row is not None else 0
        if version > len(VERSIONS):
            raise JournalUnwritable(
                f"its tables are of version {version} and this program knows {len(VERSIONS)}: "
                "a newer version of evolink-mcp made them"
            )
        for script in VERSIONS[version:]:
            await db.execute(script.encode())
        if version < len(VERSIONS):
            await db.execute("DELETE FROM evolink_version")
            await db.execute("INSERT INTO evolink_version VALUES (%s)", (len(VERSIONS),))


def read_entries(url: str, limit: int, words: tuple[str, ...] = (), since: float = 0.0) -> tuple[str, list[Entry]]:
    """Return the database's name and the newest entries of all accounts, newest first. Block, and change nothing.

    `words` are those of `Journal.recent`, `since` is in epoch seconds.

    Raises:
        JournalUnwritable: The journal cannot be read.
    """
    filters = " AND strpos(words, %s) > 0" * len(words)
    statement = f"SELECT * FROM evolink_entries WHERE created_at >= %s{filters} ORDER BY created_at DESC, key LIMIT %s"
    place, rows = _read(url, statement, [(since, *map(fold, words), limit)])
    return place, readable_entries(rows)


def read_sums(url: str, since: list[float], words: tuple[str, ...] = ()) -> list[Sums]:
    """Return the sums of all accounts since each of these times, in epoch seconds. Block, and change nothing.

    `words` are those of `Journal.recent`.

    Raises:
        JournalUnwritable: The journal cannot be read.
    """
    sums = SUMS.format(mine="profile = profile").replace("FROM entries", "FROM evolink_entries").replace("?", "%s")
    statement = sums + " AND strpos(words, %s) > 0" * len(words)
    _, rows = _read(url, statement, [(start, *map(fold, words)) for start in since])
    return [Sums.of(row) for row in rows] or [Sums() for _ in since]


def _read(url: str, statement: str, parameters: list[tuple[Any, ...]]) -> tuple[str, list[Row]]:
    """Return the database's name and the rows of the statement with each tuple of parameters."""
    address = Address.of(url)
    try:
        with psycopg.connect(address.conninfo) as db, db.cursor(row_factory=dict_row) as cursor:
            row = cursor.execute(FIND_OLD_TABLES).fetchone()
            if row is not None and row["name"] is not None:
                raise address.unwritable(UNPUBLISHED)
            return address.place, [
                row for values in parameters for row in cursor.execute(statement.encode(), values).fetchall()
            ]
    except psycopg.errors.UndefinedTable:
        return address.place, []
    except psycopg.Error as error:
        raise address.unwritable(address.reason(error)) from error
