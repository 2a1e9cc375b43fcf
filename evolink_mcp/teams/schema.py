"""The versions of the PostgreSQL schema, its dialect of the journal's SQL, and the reads of the commands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import psycopg
from psycopg.rows import dict_row

from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.backend import Row
from evolink_mcp.journal.entry import Entry
from evolink_mcp.journal.journal import (
    ALL_PROFILES,
    CHARGES,
    EXACT_BELOW,
    FACT_VALUES,
    HAS_WORD,
    LATEST,
    RECENT,
    SLOT_S,
    SUMS,
    SUMS_OF_ENTRIES,
    Charge,
    Sums,
    values_of_sums,
)
from evolink_mcp.journal.rows import CREDITS_MAX, fold, readable_entries
from evolink_mcp.teams.database_url import Address

# The tables in the journal's SQL. PostgreSQL has them with a prefix.
TABLES = re.compile(r"\b(FROM|INTO|UPDATE) (entries|links|uploads|facts|sums)\b")
# The condition for an entry with a word. An index with trigrams supports LIKE. The value is a `like_pattern`.
LIKE_WORD = "words LIKE ?"
# The channel of all profiles. A trigger publishes changes of an entry as "{Journal.channel of the profile} {JSON}". In the
# JSON, `by` is the server that made the change. The newest script below that replaces the trigger selects the changes.
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
    # Each query finds its rows in an index. `evolink_sums` has the credits per profile and slot. A sum of
    # float8 that overflows is an error, so absurd credits of EvoLink count as CREDITS_MAX.
    f"""
    DROP INDEX evolink_entries_spending;
    DROP INDEX evolink_entries_open;
    DROP INDEX evolink_entries_owned;
    DROP INDEX evolink_entries_undelivered;
    CREATE INDEX evolink_entries_by_status ON evolink_entries (profile, status, created_at DESC, key);
    CREATE INDEX evolink_entries_of_all ON evolink_entries (created_at DESC, key);
    CREATE INDEX evolink_entries_of_account ON evolink_entries (profile, account, created_at) WHERE account <> '';
    CREATE INDEX evolink_entries_open ON evolink_entries (profile, owner, created_at) WHERE NOT closed;
    CREATE INDEX evolink_entries_owned ON evolink_entries (profile, owner, account) WHERE owner <> '';
    CREATE INDEX evolink_entries_undelivered ON evolink_entries (fingerprint, profile, created_at)
        WHERE delivered_at IS NULL;
    CREATE INDEX evolink_entries_with_request ON evolink_entries (profile, created_at)
        WHERE closed AND request <> '{{}}';
    CREATE TABLE evolink_sums (
        profile TEXT NOT NULL, slot BIGINT NOT NULL, spent DOUBLE PRECISION NOT NULL, reserved DOUBLE PRECISION NOT NULL,
        PRIMARY KEY (profile, slot)
    ) WITH (fillfactor = 50);
    CREATE INDEX evolink_sums_of_all ON evolink_sums (slot);
    CREATE FUNCTION evolink_slot(created_at DOUBLE PRECISION) RETURNS BIGINT LANGUAGE sql IMMUTABLE AS $$
        SELECT floor(least(greatest(created_at, 0), {LATEST}))::bigint / {SLOT_S}
    $$;
    CREATE FUNCTION evolink_sum() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_OP = 'INSERT' THEN
                INSERT INTO evolink_sums VALUES (NEW.profile, evolink_slot(NEW.created_at),
                    least(NEW.spent, {CREDITS_MAX}), least(NEW.reserved, {CREDITS_MAX}))
                ON CONFLICT (profile, slot) DO UPDATE SET
                    spent = evolink_sums.spent + excluded.spent, reserved = evolink_sums.reserved + excluded.reserved;
            ELSIF greatest(OLD.spent, NEW.spent, OLD.reserved, NEW.reserved) < {EXACT_BELOW} THEN
                UPDATE evolink_sums SET
                    spent = spent + (NEW.spent - OLD.spent), reserved = reserved + (NEW.reserved - OLD.reserved)
                    WHERE profile = NEW.profile AND slot = evolink_slot(NEW.created_at);
            ELSE
                -- The next statement sees the changes of every transaction that had this lock.
                PERFORM 1 FROM evolink_sums WHERE profile = NEW.profile AND slot = evolink_slot(NEW.created_at) FOR UPDATE;
                UPDATE evolink_sums SET (spent, reserved) = (
                    SELECT sum(least(spent, {CREDITS_MAX})), sum(least(reserved, {CREDITS_MAX})) FROM evolink_entries
                    WHERE profile = NEW.profile AND created_at >= slot * {SLOT_S} AND created_at < (slot + 1) * {SLOT_S})
                    WHERE profile = NEW.profile AND slot = evolink_slot(NEW.created_at);
            END IF;
            RETURN NULL;
        END
    $$;
    CREATE TRIGGER evolink_inserted AFTER INSERT ON evolink_entries FOR EACH ROW EXECUTE FUNCTION evolink_sum();
    CREATE TRIGGER evolink_charged AFTER UPDATE OF spent, reserved ON evolink_entries FOR EACH ROW
        WHEN (NEW.spent <> OLD.spent OR NEW.reserved <> OLD.reserved) EXECUTE FUNCTION evolink_sum();
    INSERT INTO evolink_sums SELECT profile, evolink_slot(created_at), sum(least(spent, {CREDITS_MAX})),
        sum(least(reserved, {CREDITS_MAX})) FROM evolink_entries GROUP BY 1, 2;
    DO $$
        BEGIN
            CREATE EXTENSION IF NOT EXISTS pg_trgm;
            CREATE INDEX evolink_entries_words ON evolink_entries USING gin (words gin_trgm_ops);
        EXCEPTION WHEN insufficient_privilege OR undefined_file OR feature_not_supported OR undefined_object THEN
            RAISE NOTICE 'pg_trgm is missing, so a search of words reads every entry';
        END
    $$;
    """,
    # A search ignores accents: the range of `rows.fold`. normalize() needs a database in UTF-8.
    """
    DO $$
        BEGIN
            UPDATE evolink_entries SET
                words = normalize(regexp_replace(normalize(words, NFD), '[\\u0300-\\u036f]', '', 'g'), NFC)
                WHERE normalize(words, NFD) ~ '[\\u0300-\\u036f]';
        EXCEPTION WHEN feature_not_supported OR syntax_error OR undefined_function THEN
            RAISE NOTICE 'the words of earlier entries keep their accents';
        END
    $$;
    """,
    # The lease has a deadline (`lease_until`). Another server that ends it sets `fenced_at`. The server works on `timeline`. The
    # other servers wait for it on the timeline `awaited_on`.
    """
    ALTER TABLE evolink_servers ADD COLUMN IF NOT EXISTS lease_until TIMESTAMPTZ,
        ADD COLUMN IF NOT EXISTS fenced_at TIMESTAMPTZ, ADD COLUMN IF NOT EXISTS timeline TEXT NOT NULL DEFAULT '',
        ADD COLUMN IF NOT EXISTS awaited_on TEXT;
    """,
    # Each notification costs each server a transaction. The release of an entry notifies the servers of all its last changes,
    # and the heartbeat of its owner publishes its progress. Other changes notify only if no release follows soon. A server
    # without another living server needs no notification.
    f"""
    DROP TRIGGER IF EXISTS evolink_changed ON evolink_entries;
    CREATE OR REPLACE FUNCTION evolink_publish() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE changed_by TEXT := CASE WHEN NEW.owner = '' THEN OLD.owner ELSE NEW.owner END;
        BEGIN
            IF evolink_has_other_server(changed_by) THEN
                PERFORM pg_notify('{CHANNEL}', left(encode(sha256(convert_to(NEW.profile, 'UTF8')), 'hex'), 32) || ' ' ||
                    json_build_object('by', changed_by, 'key', NEW.key, 'task_id', NEW.task_id));
            END IF;
            RETURN NULL;
        END
    $$;
    CREATE OR REPLACE FUNCTION evolink_has_other_server(server TEXT) RETURNS BOOLEAN LANGUAGE sql STABLE AS $$
        SELECT EXISTS (SELECT FROM evolink_servers
            WHERE lease_until > clock_timestamp() AND 'server-' || number <> server)
    $$;
    CREATE TRIGGER evolink_changed AFTER UPDATE OF images, error, owner ON evolink_entries FOR EACH ROW
        WHEN (NEW.owner = '' AND OLD.owner <> ''
            OR (NEW.images <> OLD.images OR NEW.error IS DISTINCT FROM OLD.error) AND (OLD.owner = '' OR NOT NEW.closed))
        EXECUTE FUNCTION evolink_publish();
    """,
    # The requests of each tenant per minute, at all servers. They may be lost in a crash, so they need no log.
    """
    CREATE UNLOGGED TABLE IF NOT EXISTS evolink_requests (
        tenant TEXT NOT NULL, minute BIGINT NOT NULL, requests INTEGER NOT NULL, PRIMARY KEY (tenant, minute)
    );
    CREATE INDEX IF NOT EXISTS evolink_requests_by_minute ON evolink_requests (minute);
    """,
)


# For rollbacks: by the version of the tables, the version of the oldest program that can still use them. A version that only adds
# to the tables is listed. Every older program refuses the tables of an unlisted version. docs/operations.md has the list.
COMPATIBLE_WITH: Mapping[int, int] = {}
LONG_STATEMENTS = "SET statement_timeout = '5min'"
FIND_OLD_TABLES = "SELECT to_regclass('evolink_schema') AS name"
UNPUBLISHED = f"an unpublished build made its tables; move them away: {MOVE_OLD_TABLES}"


async def migrate(db: psycopg.AsyncConnection[Any], locks: int) -> None:
    """Run the scripts that the database has not seen, in one transaction. `locks` is the class of the advisory lock.

    Raises:
        JournalUnwritable: An unpublished build or a newer, incompatible version of evolink-mcp made the tables.
    """
    async with db.transaction():
        # A large table needs more than the 8 s of the connection's options.
        await db.execute("SET LOCAL statement_timeout = '10min'")
        # Servers that start at the same time wait here for the migration of the first one.
        await db.execute("SET LOCAL lock_timeout = 0")
        await db.execute("SELECT pg_advisory_xact_lock(%s, 0)", (locks,))
        row = await (await db.execute(FIND_OLD_TABLES)).fetchone()
        if row is not None and row["name"] is not None:
            raise JournalUnwritable(UNPUBLISHED)
        await db.execute(
            "CREATE TABLE IF NOT EXISTS evolink_version (version INTEGER NOT NULL, compatible_with INTEGER)"
        )
        row = await (await db.execute("SELECT * FROM evolink_version")).fetchone() or {"version": 0}
        version = row["version"]
        if version > len(VERSIONS) and len(VERSIONS) < (row.get("compatible_with") or version):
            raise JournalUnwritable(
                f"its tables are of version {version} and this program knows {len(VERSIONS)}: "
                "a newer version of evolink-mcp made them"
            )
        for script in VERSIONS[version:]:
            await db.execute(script.encode())
        if version < len(VERSIONS):
            await db.execute("ALTER TABLE evolink_version ADD COLUMN IF NOT EXISTS compatible_with INTEGER")
            await db.execute("DELETE FROM evolink_version")
            await db.execute(
                "INSERT INTO evolink_version (version, compatible_with) VALUES (%s, %s)",
                (len(VERSIONS), COMPATIBLE_WITH.get(len(VERSIONS))),
            )


def read_entries(url: str, limit: int, words: tuple[str, ...] = (), since: float = 0.0) -> tuple[str, list[Entry]]:
    """Return the database's name and the newest entries of all accounts, newest first. Block, and change nothing.

    `words` are those of `Journal.recent`, `since` is in epoch seconds.

    Raises:
        JournalUnwritable: The journal cannot be read.
    """
    sql = RECENT.format(mine=ALL_PROFILES, filters=" AND ".join(["created_at >= ?", *[HAS_WORD] * len(words)]))
    place, rows = _read(url, sql, [(since, *map(like_pattern, map(fold, words)), limit)])
    return place, readable_entries(rows)


def read_sums(url: str, since: list[float], words: tuple[str, ...] = ()) -> list[Sums]:
    """Return the sums of all accounts since each of these times, in epoch seconds. Block, and change nothing.

    `words` are those of `Journal.recent`.

    Raises:
        JournalUnwritable: The journal cannot be read.
    """
    if words:
        sql = SUMS_OF_ENTRIES.format(mine=ALL_PROFILES, filters=" AND ".join([HAS_WORD] * len(words)))
        values: list[tuple[Any, ...]] = [(start, *map(like_pattern, map(fold, words))) for start in since]
    else:
        sql = SUMS.format(mine=ALL_PROFILES)
        values = [values_of_sums(start) for start in since]
    _, rows = _read(url, sql, values)
    return [Sums.of(row) for row in rows] or [Sums() for _ in since]


def read_charges(url: str, since: float) -> list[Charge]:
    """Return the charges of all tenants since a time (epoch seconds). Block, and change nothing.

    Raises:
        JournalUnwritable: The journal cannot be read.
    """
    _, rows = _read(url, CHARGES.format(mine=ALL_PROFILES), [(since,)])
    return [Charge.of(row) for row in rows]


def read_fact(url: str, name: str) -> list[str]:
    """Return the values of a fact, one for each account that has it. Block, and change nothing.

    Raises:
        JournalUnwritable: The journal cannot be read.
    """
    _, rows = _read(url, FACT_VALUES, [(name,)])
    return [row["value"] for row in rows]


@lru_cache(maxsize=1000)
def translate(sql: str) -> bytes:
    """Return the SQL of the journal in PostgreSQL's dialect."""
    # psycopg reads % as the start of a placeholder.
    sql = sql.replace("%", "%%").replace(HAS_WORD, LIKE_WORD).replace("instr(", "strpos(").replace("?", "%s")
    return TABLES.sub(r"\1 evolink_\2", sql).encode()


def like_pattern(word: str) -> str:
    """Return the pattern of LIKE for texts that contain the word."""
    escaped = word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return f"%{escaped}%"


def _read(url: str, sql: str, parameters: list[tuple[Any, ...]]) -> tuple[str, list[Row]]:
    """Return the database's name and the rows of the journal's SQL with each tuple of parameters."""
    address = Address.of(url)
    try:
        with psycopg.connect(address.conninfo) as db, db.cursor(row_factory=dict_row) as cursor:
            cursor.execute(LONG_STATEMENTS)  # a command may read all entries, and no call waits for it
            row = cursor.execute(FIND_OLD_TABLES).fetchone()
            if row is not None and row["name"] is not None:
                raise address.unwritable(UNPUBLISHED)
            return address.place, [
                row for values in parameters for row in cursor.execute(translate(sql), values).fetchall()
            ]
    except psycopg.errors.UndefinedTable:
        return address.place, []
    except psycopg.Error as error:
        raise address.unwritable(address.reason(error)) from error
