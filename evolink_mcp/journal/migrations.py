"""The versions of the SQLite schema."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from evolink_mcp.journal.journal import EXACT_BELOW, SLOT_S
from evolink_mcp.journal.rows import fold

if TYPE_CHECKING:
    import sqlite3

# SQLite stores this number in the header of the file. It distinguishes this journal from that of an unpublished build.
APPLICATION_ID = 0x65766F32

# MIGRATIONS[0] makes version 1. A later release appends a script and never changes an earlier one.
MIGRATIONS = (
    f"""
    PRAGMA application_id = {APPLICATION_ID};
    CREATE TABLE entries (
        key TEXT PRIMARY KEY, profile TEXT NOT NULL, account TEXT NOT NULL, owner TEXT NOT NULL, caller TEXT NOT NULL,
        phase TEXT NOT NULL, created_at REAL NOT NULL, fingerprint TEXT NOT NULL, task_id TEXT, status TEXT NOT NULL,
        closed INTEGER NOT NULL, delivered_at REAL, estimate REAL NOT NULL, spent REAL NOT NULL,
        reserved REAL NOT NULL, request TEXT NOT NULL, save_as TEXT, task TEXT, error TEXT, images TEXT NOT NULL,
        rule TEXT NOT NULL, "references" TEXT NOT NULL, price_factor REAL NOT NULL, words TEXT NOT NULL,
        UNIQUE (task_id, profile)
    );
    CREATE INDEX entries_by_age ON entries (created_at, profile, spent, reserved);
    CREATE INDEX entries_spending ON entries (profile, created_at, spent, reserved);
    CREATE INDEX entries_open ON entries (owner) WHERE NOT closed;
    CREATE INDEX entries_owned ON entries (owner, profile, account) WHERE owner <> '';
    CREATE INDEX entries_awaited ON entries (caller, profile, account) WHERE caller <> '' AND delivered_at IS NULL;
    CREATE INDEX entries_undelivered ON entries (fingerprint) WHERE delivered_at IS NULL;
    CREATE TABLE links (
        profile TEXT NOT NULL, identity TEXT NOT NULL, account TEXT NOT NULL,
        PRIMARY KEY (profile, identity, account)
    ) WITHOUT ROWID;
    CREATE TABLE uploads (
        profile TEXT NOT NULL, sha256 TEXT NOT NULL, url TEXT NOT NULL, expires_at REAL NOT NULL,
        PRIMARY KEY (profile, sha256)
    ) WITHOUT ROWID;
    CREATE TABLE facts (
        account TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (account, name)
    ) WITHOUT ROWID;
    """,
    # Each query finds its rows in an index and in the order of its answer. `sums` has the credits per profile and slot.
    f"""
    DROP INDEX entries_by_age;
    DROP INDEX entries_spending;
    DROP INDEX entries_open;
    DROP INDEX entries_owned;
    DROP INDEX entries_awaited;
    DROP INDEX entries_undelivered;
    CREATE INDEX entries_by_age ON entries (profile, created_at DESC, key);
    CREATE INDEX entries_by_status ON entries (profile, status, created_at DESC, key);
    CREATE INDEX entries_of_all ON entries (created_at DESC, key);
    CREATE INDEX entries_of_account ON entries (profile, account, created_at) WHERE account <> '';
    CREATE INDEX entries_open ON entries (profile, owner, created_at) WHERE NOT closed;
    CREATE INDEX entries_owned ON entries (profile, owner, account) WHERE owner <> '';
    CREATE INDEX entries_awaited ON entries (profile, caller, account) WHERE caller <> '' AND delivered_at IS NULL;
    CREATE INDEX entries_undelivered ON entries (fingerprint, profile, created_at) WHERE delivered_at IS NULL;
    CREATE INDEX entries_with_request ON entries (profile, created_at) WHERE closed AND request <> '{{}}';
    CREATE TABLE sums (
        profile TEXT NOT NULL, slot INTEGER NOT NULL, spent REAL NOT NULL, reserved REAL NOT NULL,
        PRIMARY KEY (profile, slot)
    ) WITHOUT ROWID;
    CREATE INDEX sums_of_all ON sums (slot);
    INSERT INTO sums SELECT profile, CAST(created_at AS INTEGER) / {SLOT_S}, total(spent), total(reserved) FROM entries
        GROUP BY 1, 2;
    CREATE TRIGGER sums_inserted AFTER INSERT ON entries BEGIN
        INSERT INTO sums SELECT new.profile, CAST(new.created_at AS INTEGER) / {SLOT_S}, 0, 0 WHERE NOT EXISTS (
            SELECT 1 FROM sums WHERE profile = new.profile AND slot = CAST(new.created_at AS INTEGER) / {SLOT_S});
        UPDATE sums SET spent = spent + new.spent, reserved = reserved + new.reserved
            WHERE profile = new.profile AND slot = CAST(new.created_at AS INTEGER) / {SLOT_S};
    END;
    CREATE TRIGGER sums_updated AFTER UPDATE OF spent, reserved ON entries
    WHEN new.spent <> old.spent OR new.reserved <> old.reserved BEGIN
        UPDATE sums SET spent = spent + (new.spent - old.spent), reserved = reserved + (new.reserved - old.reserved)
            WHERE profile = new.profile AND slot = CAST(new.created_at AS INTEGER) / {SLOT_S}
            AND max(old.spent, new.spent, old.reserved, new.reserved) < {EXACT_BELOW};
        UPDATE sums SET (spent, reserved) = (SELECT total(spent), total(reserved) FROM entries
            WHERE profile = new.profile AND created_at >= slot * {SLOT_S} AND created_at < (slot + 1) * {SLOT_S})
            WHERE profile = new.profile AND slot = CAST(new.created_at AS INTEGER) / {SLOT_S}
            AND max(old.spent, new.spent, old.reserved, new.reserved) >= {EXACT_BELOW};
    END;
    CREATE TRIGGER sums_deleted AFTER DELETE ON entries BEGIN
        UPDATE sums SET (spent, reserved) = (SELECT total(spent), total(reserved) FROM entries
            WHERE profile = old.profile AND created_at >= slot * {SLOT_S} AND created_at < (slot + 1) * {SLOT_S})
            WHERE profile = old.profile AND slot = CAST(old.created_at AS INTEGER) / {SLOT_S};
    END;
    """,
    # A search ignores accents.
    """
    UPDATE entries SET words = fold(words) WHERE words <> fold(words);
    """,
)


def check_origin(db: sqlite3.Connection, path: Path) -> None:
    """Return if the file is empty or a journal of this program.

    Raises:
        sqlite3.OperationalError: An unpublished build wrote the file. The message has the command that moves it away.
    """
    import sqlite3

    # The number of tables is read first: another server may make tables and application ID in between, never apart.
    (table_count,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (application_id,) = db.execute("PRAGMA application_id").fetchone()
    if table_count and application_id != APPLICATION_ID:
        raise sqlite3.OperationalError(f"an unpublished build wrote it; move it away: {move_command(path)}")


def move_command(path: Path, platform: str = sys.platform) -> str:
    """Return the shell command that moves the file away."""
    if platform == "win32":
        return f'ren "{path}" "{path.name}.old"'
    import shlex

    return f"mv {shlex.quote(os.fspath(path))} {shlex.quote(f'{path}.old')}"


def migrate(db: sqlite3.Connection, migrations: Sequence[str] = MIGRATIONS) -> None:
    """Run the scripts that the file has not seen, in one transaction.

    Raises:
        sqlite3.OperationalError: A newer version of evolink-mcp wrote the file.
    """
    import sqlite3

    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > len(migrations):
        raise sqlite3.OperationalError("a newer version of evolink-mcp wrote it")
    # A start with the current schema takes no write lock, which another server may hold.
    if version == len(migrations):
        return
    db.create_function("fold", 1, fold, deterministic=True)
    with transaction(db):
        # Another server may have run the scripts while this one waited for the lock.
        (version,) = db.execute("PRAGMA user_version").fetchone()
        for number, script in enumerate(migrations[version:], start=version + 1):
            # `executescript` would end the transaction.
            for statement in statements_of(script):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number}")


def statements_of(script: str) -> list[str]:
    """Return the statements of a script. A trigger has several semicolons."""
    import sqlite3

    statements: list[str] = []
    statement = ""
    for part in script.split(";"):
        statement += f"{part};"
        if sqlite3.complete_statement(statement):
            statements.append(statement)
            statement = ""
    return [each for each in statements if each.strip(" \n;")]


@contextmanager
def transaction(db: sqlite3.Connection) -> Generator[None]:
    """Run a transaction that takes the write lock at its start, or a part of the transaction that runs already.

    A transaction that starts with a read fails at its first write if another program wrote in between.
    """
    if db.in_transaction:
        with _enclosed(db, "SAVEPOINT part", "RELEASE part", "ROLLBACK TO part", "RELEASE part"):
            yield
    else:
        with _enclosed(db, "BEGIN IMMEDIATE", "COMMIT", "ROLLBACK"):
            yield


@contextmanager
def shared_transaction(db: sqlite3.Connection) -> Generator[None]:
    """Run a transaction of several actions, which takes the write lock only if one of them writes.

    It starts with a read. So a write fails at once if another program has the lock or wrote in between. Without the read
    the transaction would wait for the lock, and then each of its actions again.
    """
    with _enclosed(db, "BEGIN", "COMMIT", "ROLLBACK"):
        db.execute("SELECT 1 FROM entries LIMIT 1").fetchone()
        yield


@contextmanager
def _enclosed(db: sqlite3.Connection, begin: str, end: str, *undo: str) -> Generator[None]:
    """Run `begin` and `end` around the block. After an error of the block or of `end`, run `undo`."""
    import sqlite3

    db.execute(begin)
    try:
        yield
        db.execute(end)
    except BaseException as error:
        try:
            for statement in undo:
                db.execute(statement)
        except sqlite3.Error:
            # The undo failed too, so the changes are still in the transaction. An error of SQLite shows that to the caller.
            if db.in_transaction and not isinstance(error, sqlite3.Error):
                raise
        raise
