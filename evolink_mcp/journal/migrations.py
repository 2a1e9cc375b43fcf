"""The journal's tables: a list of changes, each made once; a journal of any earlier version opens in this one."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3

MIGRATIONS = (
    """
    CREATE TABLE entries (
        key TEXT PRIMARY KEY, owner TEXT NOT NULL, phase TEXT NOT NULL, created_at REAL NOT NULL,
        fingerprint TEXT NOT NULL, task_id TEXT UNIQUE, status TEXT NOT NULL, complete INTEGER NOT NULL,
        attended INTEGER NOT NULL, delivered_at REAL, estimate REAL NOT NULL, credits REAL, charged TEXT NOT NULL,
        request TEXT NOT NULL, save_as TEXT, task TEXT, error TEXT, pictures TEXT NOT NULL
    );
    CREATE INDEX entries_by_age ON entries (created_at);
    CREATE INDEX entries_open ON entries (owner) WHERE complete = 0;
    CREATE INDEX entries_left ON entries (owner) WHERE complete = 0 OR (delivered_at IS NULL AND attended = 1);
    CREATE INDEX entries_undelivered ON entries (fingerprint) WHERE delivered_at IS NULL;
    CREATE TABLE uploads (sha256 TEXT PRIMARY KEY, url TEXT NOT NULL, expires_at REAL NOT NULL) WITHOUT ROWID;
    """,
    # 2: the column always held `Entry.closed`. SQLite renames it in the indexes too.
    "ALTER TABLE entries RENAME COLUMN complete TO closed",
    # 3: accounts; who works on an entry now, and who waits for it; what counts for the caps. SQLite cannot change a
    # UNIQUE constraint, so the table is copied.
    """
    CREATE TABLE copied (
        key TEXT PRIMARY KEY, account TEXT NOT NULL, owner TEXT NOT NULL, caller TEXT NOT NULL, phase TEXT NOT NULL,
        created_at REAL NOT NULL, fingerprint TEXT NOT NULL, task_id TEXT, status TEXT NOT NULL,
        closed INTEGER NOT NULL, delivered_at REAL, estimate REAL NOT NULL, spent REAL NOT NULL,
        request TEXT NOT NULL, save_as TEXT, task TEXT, error TEXT, pictures TEXT NOT NULL, UNIQUE (task_id, account)
    );
    INSERT INTO copied SELECT
        key, '', CASE WHEN closed THEN '' ELSE owner END, CASE WHEN attended THEN owner ELSE '' END, phase,
        created_at, fingerprint, task_id, status, closed, delivered_at, estimate,
        CASE WHEN phase = 'found' OR (charged = 'no' AND closed) OR error LIKE '%"code": "adopted"%' THEN 0
            ELSE coalesce(credits, estimate) END,
        request, save_as, task, error, pictures FROM entries;
    DROP TABLE entries;
    ALTER TABLE copied RENAME TO entries;
    CREATE INDEX entries_by_age ON entries (created_at);
    CREATE INDEX entries_spending ON entries (account, created_at, spent);
    CREATE INDEX entries_open ON entries (owner) WHERE closed = 0;
    CREATE INDEX entries_owned ON entries (owner) WHERE owner != '';
    CREATE INDEX entries_awaited ON entries (caller) WHERE caller != '' AND delivered_at IS NULL;
    CREATE INDEX entries_undelivered ON entries (fingerprint) WHERE delivered_at IS NULL;
    DROP TABLE uploads;
    CREATE TABLE uploads (
        account TEXT NOT NULL, sha256 TEXT NOT NULL, url TEXT NOT NULL, expires_at REAL NOT NULL,
        PRIMARY KEY (account, sha256)
    ) WITHOUT ROWID;
    """,
    # 4: what was learned of an account, and the size rule that each entry was computed by. Before, that was the page's.
    """
    CREATE TABLE facts (
        account TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (account, name)
    ) WITHOUT ROWID;
    ALTER TABLE entries ADD COLUMN rule TEXT NOT NULL DEFAULT 'anchor-edge';
    """,
    # 5: what an order was made from, as the caller gave it.
    "ALTER TABLE entries ADD COLUMN given TEXT NOT NULL DEFAULT '[]'",
)


def migrate(db: sqlite3.Connection) -> None:
    """Make the changes that this file has not seen yet, in one transaction.

    Raises:
        sqlite3.OperationalError: a newer version of evolink-mcp wrote it.
    """
    import sqlite3

    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise sqlite3.OperationalError("a newer version of evolink-mcp wrote it")
    if version == len(MIGRATIONS):
        return
    with transaction(db):
        (version,) = db.execute("PRAGMA user_version").fetchone()
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            for statement in filter(str.strip, script.split(";")):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number}")


@contextmanager
def transaction(db: sqlite3.Connection) -> Generator[None]:
    """A transaction that locks at once: one that begins with a read fails at its first write if another was faster."""
    import sqlite3

    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")
