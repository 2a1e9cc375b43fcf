"""Each query of the journal finds its rows in an index, in SQLite and in PostgreSQL."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from blocking import BlockingJournal, BlockingPostgres, open_portal

from evolink_mcp.journal import all_profiles, journal, search
from evolink_mcp.journal.entry import Entry, Phase, new_key

ACCOUNT = "a" * 32
PARTS = {
    "mine": "profile = 'default'",
    "linked": f"profile = 'default' AND account IN ('{ACCOUNT}')",
    "accounts": f"'{ACCOUNT}'",
    "marks": "?, ?",
    "changes": "phase = ?, status = ?",
}
# The variants of a query with {filters}, as `Journal.recent` and the CLI build them.
PERIOD = "created_at >= ? AND created_at <= ?"
PAGE = f"{PERIOD} AND (created_at < ? OR created_at = ? AND key > ?)"
FILTERS = [PERIOD, f"{PERIOD} AND status = ?", PAGE, f"{PERIOD} AND status = ? AND {journal.HAS_WORD}"]
TABLES = ("entries", "links", "uploads", "facts", "sums")
# Queries whose sort or scan has few rows.
SORTS = {
    "UNDELIVERED": "undelivered entries of one request",
    "FIND_SERVERS": "the servers of unfinished entries",
    "ALL_SERVERS": "the servers of unfinished entries of all profiles",
    "OLD_PROFILES": "the profiles, once a day",
}
# The index of a query that another index would answer with more rows.
INDEXES = {
    "RECENT 0": "entries_by_age",
    "RECENT 1": "entries_by_status",
    "RECENT 2": "entries_by_age",
    "NEWEST_TASK 0": "entries_of_account",
    "UNDELIVERED 0": "entries_undelivered",
    "COUNT_RUNNING 0": "entries_open",
    "FIND_ORPHANS 0": "entries_open",
    "HAS_ORPHAN 0": "entries_open",
    "RELEASE_OWNERS of all profiles": "entries_owned",
    "ALL_SERVERS 0": "entries_owned",
    "ALL_ORPHANS 0": "entries_open",
    "OLD_PROFILES 0": "entries_with_request",
    "RELEASE_OWNERS 0": "entries_owned",
    "RELEASE_CALLERS 0": "entries_awaited",
    "FIND_OLD_REQUESTS 0": "entries_with_request",
    "SUMS of all profiles": "sums_of_all",
}
SORTED_ROWS_MAX = 100  # as PostgreSQL estimates them
SCANS = {
    "FIND_SERVERS": "the result of its two parts",
    "ALL_SERVERS": "the indexes of owned entries and of undelivered ones",
    "ALL_ORPHANS": "the index of unfinished entries",
    "OLD_PROFILES": "the index of entries with a request, once a day",
    "RELEASE_OWNERS of all profiles": "the index of owned entries",
    "RELEASE_CALLERS of all profiles": "the index of undelivered entries",
    "SUMS": "the result of its two parts",
    "OF_ACCOUNTS": "the links of keys and accounts, for a lost answer",
    "FIND_FACTS": "PostgreSQL reads a table of a few pages at once",
    "FACT_VALUES": "doctor reads the few facts of all accounts once",
    "SUMS_OF_ENTRIES": "the CLI adds the entries with a word",
}


def queries() -> dict[str, tuple[str, str]]:
    """Return the query of each name, and of each of its variants."""
    constants = {**vars(journal), **vars(all_profiles), **vars(search)}
    texts = {
        name: text
        for name, text in constants.items()
        if name.isupper()
        and name[0] != "_"
        and isinstance(text, str)
        and re.match(r"(SELECT|UPDATE|DELETE|INSERT) ", text)
    }
    variants: dict[str, tuple[str, str]] = {}
    for name, text in texts.items():
        for number, filters in enumerate(FILTERS if "{filters}" in text else [""]):
            variants[f"{name} {number}"] = (name, text.format(**PARTS, filters=filters))
    variants["SUMS of all profiles"] = ("SUMS", journal.SUMS.format(mine=journal.ALL_PROFILES))
    for name in ("RELEASE_OWNERS", "RELEASE_CALLERS"):
        sql = texts[name].format(**{**PARTS, "linked": journal.ALL_PROFILES})
        variants[f"{name} of all profiles"] = (f"{name} of all profiles", sql)
    return variants


def test_the_named_queries_are_found() -> None:
    names = {name for name, _ in queries().values()}
    assert {"RECENT", "SUMS", "FIND_ORPHANS", "RELEASE_CALLERS", "RECENT_BY_WORDS", "SAVE_FACT"} <= names
    assert len(names) >= 40


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    one = BlockingJournal(tmp_path_factory.mktemp("plans"), ACCOUNT)
    one.intend(Entry(new_key(), one.owner, Phase.INTENT, 1_790_000_000.0, account=ACCOUNT))
    one.close()
    with closing(sqlite3.connect(one.path)) as db:
        yield db


@pytest.mark.parametrize("query", queries())
def test_sqlite_needs_no_scan_and_no_sort(query: str, file: sqlite3.Connection) -> None:
    name, sql = queries()[query]
    rows = file.execute(f"EXPLAIN QUERY PLAN {sql}", [None] * sql.count("?")).fetchall()
    plan = [row[3] for row in rows]
    scans = [step for step in plan if re.match(rf"SCAN ({'|'.join(TABLES)})\b", step)]
    sorts = [step for step in plan if "TEMP B-TREE" in step and name not in SORTS]
    if name not in SCANS:
        assert scans == []
    assert sorts == []
    assert INDEXES.get(query, "") in "\n".join(plan)


@pytest.fixture(scope="module")
def database(cluster: Any) -> Iterator[Any]:
    """A database with 20,000 entries of 20 profiles, and with the statistics that PostgreSQL collects."""
    url = cluster.database()
    with open_portal() as portal:
        BlockingPostgres(url, portal, ACCOUNT).close()
    with cluster.admin(url.partition("?")[0].rpartition("/")[2]) as db:
        db.execute(
            """INSERT INTO evolink_entries SELECT 'evomcp-' || i, CASE i % 20 WHEN 0 THEN 'default' ELSE 'p' || i % 20 END,
                repeat('a', 32), CASE i % 1000 WHEN 0 THEN 'server-1' ELSE '' END,
                CASE i % 1000 WHEN 0 THEN 'server-1' ELSE '' END, 'submitted', 1790000000.0 - i * 60, md5(i::text),
                'task-unified-' || i, CASE i % 100 WHEN 0 THEN 'pending' ELSE 'completed' END, i % 100 <> 0,
                CASE i % 100 WHEN 0 THEN NULL ELSE 1790000000.0 END, 4, 4, 0, '{}', NULL, '{}', NULL, '[]', 'r', '[]', 1,
                'a fox ' || md5(i::text) || repeat(' picture', 40) FROM generate_series(1, 20000) AS i"""
        )
        for table in TABLES:
            db.execute(f"VACUUM ANALYZE evolink_{table}".encode())
        db.execute("SET plan_cache_mode = force_generic_plan")
        yield db


@pytest.mark.parametrize("query", [each for each, (name, _) in queries().items() if not hasattr(search, name)])
def test_postgresql_needs_no_scan_and_no_sort(query: str, database: Any) -> None:
    from evolink_mcp.teams.schema import translate

    name, sql = queries()[query]
    database.execute(b"PREPARE query AS " + with_numbered_parameters(translate(sql)))
    values = ", ".join(["NULL"] * sql.count("?"))
    rows = database.execute(f"EXPLAIN EXECUTE query{f'({values})' if values else ''}".encode()).fetchall()
    database.execute("DEALLOCATE query")
    plan = "\n".join(row[0] for row in rows)
    if name not in SCANS:
        assert not re.search(r"Seq Scan on evolink_entries", plan), plan
    sorts = re.findall(r"^ *(?:->)? *Sort .*rows=(\d+)", plan, re.MULTILINE)
    assert [rows for rows in sorts if int(rows) > SORTED_ROWS_MAX] == [], plan
    if name != "NEWEST_TASK":  # every entry of this profile has the account
        assert INDEXES.get(query, "") in plan


def test_postgresql_finds_a_rare_word_in_an_index(database: Any) -> None:
    from evolink_mcp.teams.schema import LIKE_WORD, like_pattern

    condition = LIKE_WORD.replace("?", f"'{like_pattern('unicorn')}'")
    rows = database.execute(f"EXPLAIN SELECT key FROM evolink_entries WHERE profile = 'p1' AND {condition}".encode())
    assert "evolink_entries_words" in "\n".join(row[0] for row in rows)


def with_numbered_parameters(statement: bytes) -> bytes:
    """Return a statement of psycopg with PostgreSQL's own parameters, as text of unknown type."""
    numbers = iter(range(1, 100))
    text = re.sub(r"%s", lambda _: f"${next(numbers)}", statement.decode())
    return text.replace("%%", "%").encode()
