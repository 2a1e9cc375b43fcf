"""The index of words in the SQLite journal: SQLite's full-text search (FTS5) with every three characters as a term.

Triggers keep the index equal to the column `words` of the entries. A row of the index has a `position`, which grows with
`created_at`: the entry's millisecond, then a number. So a search reads the newest matches first and needs no sort.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from evolink_mcp.journal.migrations import statements_of, transaction

if TYPE_CHECKING:
    import sqlite3

log = logging.getLogger(__name__)

TERM_CHARS = 3  # a shorter word has no term
SQLITE_VERSION = (3, 34)  # the first one with terms of three characters
POSITIONS_PER_MS = 1_000_000
LATEST_S = 9_000_000_000  # a later time has no position of its own

_MILLISECOND = f"CAST(min(max(created_at, 0), {LATEST_S}) * 1000 AS INTEGER)"
_FIRST = f"{_MILLISECOND.replace('created_at', 'new.created_at')} * {POSITIONS_PER_MS}"
_ADD = "INSERT INTO search_words (rowid, text) SELECT position, new.words FROM search WHERE entry = new.key"
_REMOVE = """INSERT INTO search_words (search_words, rowid, text)
        SELECT 'delete', position, old.words FROM search WHERE entry = old.key"""
TRIGGERS = ("search_inserted", "search_updated", "search_deleted")
# A contentless index stores no second copy of the words. To remove a row, it needs the old words.
# Case does not matter, because `words` is folded.
CREATE = f"""
    DROP TABLE IF EXISTS search_words;
    DROP TABLE IF EXISTS search;
    CREATE TABLE search (position INTEGER PRIMARY KEY, entry TEXT NOT NULL UNIQUE);
    CREATE VIRTUAL TABLE search_words USING fts5 (text, content = '', tokenize = 'trigram case_sensitive 1');
    INSERT INTO search SELECT {_MILLISECOND} * {POSITIONS_PER_MS}
        + row_number() OVER (PARTITION BY {_MILLISECOND}) - 1, key FROM entries;
    INSERT INTO search_words (rowid, text) SELECT position, words FROM search JOIN entries ON key = entry;
    CREATE TRIGGER search_inserted AFTER INSERT ON entries BEGIN
        INSERT INTO search SELECT coalesce(max(position), {_FIRST} - 1) + 1, new.key FROM search
            WHERE position >= {_FIRST} AND position < {_FIRST} + {POSITIONS_PER_MS};
        {_ADD};
    END;
    CREATE TRIGGER search_updated AFTER UPDATE OF words ON entries WHEN new.words <> old.words BEGIN
        {_REMOVE};
        {_ADD};
    END;
    CREATE TRIGGER search_deleted AFTER DELETE ON entries BEGIN
        {_REMOVE};
        DELETE FROM search WHERE entry = old.key;
    END;
"""
# Check whether the index is complete: a server without full-text search removes the triggers.
HAS_INDEX = "SELECT 1 FROM sqlite_master WHERE type = 'trigger' AND name = 'search_updated'"
# Read the newest entries with these terms in their words, newest millisecond first. {filters} are conditions.
# CROSS JOIN keeps SQLite from another order of the tables, which would need a sort.
RECENT_BY_WORDS = """SELECT entries.*, position FROM search_words CROSS JOIN search ON position = search_words.rowid
    CROSS JOIN entries ON key = entry WHERE search_words MATCH ? AND search_words.rowid BETWEEN ? AND ?
    AND {mine} AND {filters} ORDER BY search_words.rowid DESC LIMIT ?"""


def is_available(db: sqlite3.Connection) -> bool:
    """Return whether the SQLite of this Python has full-text search with terms of three characters."""
    import sqlite3

    has_module = db.execute("SELECT 1 FROM pragma_module_list WHERE name = 'fts5'").fetchone() is not None
    return has_module and sqlite3.sqlite_version_info >= SQLITE_VERSION


def prepare(db: sqlite3.Connection, *, is_usable: bool) -> None:
    """Create the index if it is missing. If full-text search is not usable, remove the triggers that need it."""
    has_index = db.execute(HAS_INDEX).fetchone() is not None
    if is_usable == has_index:
        return
    with transaction(db):
        # Another server may have done it in between.
        if (db.execute(HAS_INDEX).fetchone() is not None) == is_usable:
            return
        if is_usable:
            for statement in statements_of(CREATE):
                db.execute(statement)
        else:
            for trigger in TRIGGERS:
                db.execute(f"DROP TRIGGER {trigger}")


def terms_of(words: tuple[str, ...]) -> str:
    """Return the query of full-text search for all words that have a term. Empty: no word has one."""
    return " AND ".join(f'"{word.replace(chr(34), chr(34) * 2)}"' for word in words if len(word) >= TERM_CHARS)


def positions(start: float, end: float) -> tuple[int, int]:
    """Return the first and the last position of two times in epoch seconds."""
    return _first_position(start), _first_position(end) + POSITIONS_PER_MS - 1


def positions_beside(position: int) -> tuple[int, int]:
    """Return the first and the last position of the same millisecond."""
    first = position - position % POSITIONS_PER_MS
    return first, first + POSITIONS_PER_MS - 1


def _first_position(seconds: float) -> int:
    return int(min(max(seconds, 0.0), float(LATEST_S)) * 1000) * POSITIONS_PER_MS
