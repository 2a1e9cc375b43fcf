"""A new version of the journal removes the accents from the words of earlier entries."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from blocking import BlockingJournal, BlockingPostgres, open_portal

from evolink_mcp.journal.entry import Entry, Phase, new_key
from evolink_mcp.journal.migrations import MIGRATIONS, migrate


@pytest.mark.journal_file
def test_an_earlier_journal_is_searched_without_accents_too(tmp_path: Path) -> None:
    journal = BlockingJournal(tmp_path, "a" * 32)
    request = {"prompt": "Füchse im Café"}
    entry = Entry(new_key(), journal.owner, Phase.INTENT, 1_790_000_000.0, account="a" * 32, request=request)
    journal.intend(entry)
    journal.close()
    with closing(sqlite3.connect(journal.path, isolation_level=None)) as db:
        db.execute("UPDATE entries SET words = 'füchse im café'")
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) - 1}")
        migrate(db)
        assert db.execute("SELECT words FROM entries").fetchall() == [("fuchse im cafe",)]
    second = BlockingJournal(tmp_path, "a" * 32)
    assert [match.key for match in second.recent(5, words=("FÜCHSE", "cafe"))] == [entry.key]
    second.close()


def test_a_database_of_an_earlier_version_is_searched_without_accents_too(cluster: Any) -> None:
    url = cluster.database()
    with open_portal() as portal:
        BlockingPostgres(url, portal, "a" * 32).close()
        with cluster.admin(url.partition("?")[0].rpartition("/")[2]) as db:
            db.execute(
                """INSERT INTO evolink_entries SELECT 'evomcp-1', 'default', repeat('a', 32), '', '', 'submitted', 1790000000.0,
                'f', 'task-unified-1', 'completed', true, 1790000000.0, 4, 4, 0, '{}', NULL, '{}', NULL, '[]', 'r', '[]', 1,
                'füchse im café が'"""
            )
            db.execute("UPDATE evolink_version SET version = 2")
        BlockingPostgres(url, portal, "a" * 32).close()
        with cluster.admin(url.partition("?")[0].rpartition("/")[2]) as db:
            assert db.execute("SELECT words FROM evolink_entries").fetchall() == [("fuchse im cafe が",)]
