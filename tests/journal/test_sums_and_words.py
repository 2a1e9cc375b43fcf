"""The sums of credits and the index of words agree with the entries after every kind of write."""

from __future__ import annotations

import math
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blocking import BlockingJournal, BlockingPostgres, open_portal

from evolink_mcp.api.task import Task
from evolink_mcp.errors import Problem
from evolink_mcp.journal.entry import Entry, Phase, ResultImage, new_key
from evolink_mcp.journal.journal import DailyLimitReached, Sums
from evolink_mcp.journal.sqlite import read_entries, read_sums

NOW = 1_790_000_000.0
QUARTER_S = 900.0
ALL = 10_000
WORDS = ["fox", "Füchse", "狐狸在雪中", '"quoted"', "100%", "a_b", "back\\slash", "x", "\n", "🦊🦊🦊"]
OpenJournal = Callable[..., Any]


@pytest.fixture(params=["sqlite", "sqlite without full-text search", "postgres"])
def open_journal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenJournal]:
    """Return a function that opens one more journal of the same database, as another server does."""
    journals: list[Any] = []
    if request.param != "postgres":
        has_full_text = request.param == "sqlite"

        def open_one(profile: str = "default") -> Any:
            journals.append(BlockingJournal(tmp_path, "k1", profile=profile, has_full_text=has_full_text))
            return journals[-1]

        yield open_one
        for one in journals:
            one.close()
        return
    url = request.getfixturevalue("cluster").database()
    with open_portal() as portal:

        def open_one(profile: str = "default") -> Any:
            journals.append(BlockingPostgres(url, portal, "k1", profile=profile))
            return journals[-1]

        yield open_one
        for one in journals:
            one.close()


def entry(journal: Any, prompt: str = "a fox", **fields: Any) -> Entry:
    return Entry(**{"key": new_key(), "owner": journal.owner, "phase": Phase.INTENT, "created_at": NOW,
                    "account": journal.account, "request": {"prompt": prompt}, **fields})  # fmt: skip


def sums_of(entries: list[Entry], since: float) -> Sums:
    counted_entries = [each for each in entries if each.created_at >= since]
    spent = math.fsum(each.spent for each in counted_entries)
    return Sums(round(spent, 4), round(math.fsum(each.reserved for each in counted_entries), 4))


def change_state(entry: Entry, dice: random.Random) -> Entry:
    """Return the entry in another state of a purchase."""
    task = Task(f"task-unified-{entry.key[7:]}", dice.choice(["pending", "completed", "failed"]),
                credits_reserved=dice.choice([None, 7.5]), credits_used=dice.choice([None, 0.0, 3.2301]))  # fmt: skip
    phase = dice.choice(list(Phase))
    has_task = phase in (Phase.SUBMITTED, Phase.EXTERNAL)
    return replace(entry, phase=phase, task=task if has_task else None)


def test_the_sums_are_those_of_the_entries_after_random_writes(open_journal: OpenJournal) -> None:
    dice = random.Random(29)
    journals = [open_journal(), open_journal(), open_journal("other")]
    written_entries: list[list[Entry]] = [[], [], []]
    for _ in range(300):
        number = dice.randrange(3)
        journal = journals[number]
        if dice.random() < 0.4 or not written_entries[number]:
            created_at = NOW + dice.choice([0.0, 0.001, 1.0]) + QUARTER_S * dice.randrange(-5, 5)
            new_entry = entry(journal, created_at=created_at, estimate=round(dice.uniform(0, 9), 4))
            journal.intend(new_entry)
            written_entries[number].append(new_entry)
        else:
            index = dice.randrange(len(written_entries[number]))
            new_entry = change_state(written_entries[number][index], dice)
            if journal.update(new_entry):  # no state removes a certain task
                written_entries[number][index] = new_entry
    own_entries = written_entries[0] + written_entries[1]
    for since in (0.0, NOW, NOW + 0.0005, NOW + QUARTER_S, NOW - 2 * QUARTER_S + 1, NOW + 99 * QUARTER_S):
        assert journals[0].sums_since(since) == sums_of(own_entries, since)
        assert journals[1].total_since(since) == sums_of(own_entries + written_entries[2], since)


def test_an_absurd_reservation_of_evolink_leaves_no_error_in_the_sums(open_journal: OpenJournal) -> None:
    journal = open_journal()
    small_entry = entry(journal, estimate=0.1)
    absurd_entries = [
        entry(journal, phase=Phase.SUBMITTED, task=Task(f"task-unified-{n}", "pending")) for n in range(2)
    ]
    for each in absurd_entries:
        journal.intend(each)
        assert journal.update(replace(each, task=replace(each.task, credits_reserved=1.5e308)))
    journal.intend(small_entry)
    assert min(journal.sums_since(NOW).reserved, journal.sums_since(0.0).reserved) >= 1e15
    with pytest.raises(DailyLimitReached):
        journal.intend(entry(journal, estimate=0.1), since=NOW, day_limit=100.0)
    for each in absurd_entries:
        assert journal.update(replace(each, task=replace(each.task, status="completed", credits_used=3.5)))
    assert journal.sums_since(NOW) == journal.sums_since(0.0) == Sums(7.0, 0.1)


def test_a_limit_counts_entries_since_a_time_within_a_quarter_of_an_hour(open_journal: OpenJournal) -> None:
    journal = open_journal()
    journal.intend(entry(journal, created_at=NOW + 10.0, estimate=2.0))
    journal.intend(entry(journal, created_at=NOW + 20.0, estimate=3.0))
    journal.intend(entry(journal, created_at=NOW + 21.0, estimate=2.0), since=NOW + 11.0, day_limit=5.0)
    with pytest.raises(DailyLimitReached):
        journal.intend(entry(journal, created_at=NOW + 22.0, estimate=0.1), since=NOW + 11.0, day_limit=5.0)


def expected_keys(entries: list[Entry], words: tuple[str, ...]) -> list[str]:
    def has(text: str) -> bool:
        return all(word.casefold() in text.casefold() for word in words)

    matches = [each for each in entries if has(each.request["prompt"])]
    return [each.key for each in sorted(matches, key=lambda each: (-each.created_at, each.key))]


def test_a_search_finds_the_entries_that_contain_all_words_newest_first(open_journal: OpenJournal) -> None:
    dice = random.Random(7)
    journal = open_journal()
    entries = [
        entry(journal, " ".join(dice.sample(WORDS, 3)), created_at=NOW - dice.choice([0, 0, 0.0004, 5, 5, 800]))
        for _ in range(60)
    ]
    for each in entries:
        journal.intend(each)
    for words in [("fox",), ("FÜCHSE",), ("狐狸在",), ("狐狸",), ('"quoted"',), ("100%",), ("a_b",), ("k\\s",), ("x",),
                  ("fox", "a_b"), ("fox", "x"), ("unicorn",), ("AND",), ("🦊🦊🦊", "100"), ("_b",), ("%",)]:  # fmt: skip
        assert [each.key for each in journal.recent(ALL, words=words)] == expected_keys(entries, words), words


def test_the_pages_of_a_search_have_each_match_once_in_the_order_of_the_list(open_journal: OpenJournal) -> None:
    journal = open_journal()
    times = [NOW, NOW, NOW, NOW - 0.0001, NOW - 0.0002, NOW - 0.0002, NOW - 1, NOW - 2, NOW - 2, NOW - 3]
    entries = [entry(journal, "a fox", created_at=created_at) for created_at in times]
    for each in reversed(entries):
        journal.intend(each)
    for size in (1, 2, 3, 7):
        keys: list[str] = []
        after: tuple[float, str] | None = None
        while page := journal.recent(size, words=("fox",), after=after):
            keys += [each.key for each in page]
            after = (page[-1].created_at, page[-1].key)
        assert keys == expected_keys(entries, ("fox",))


def test_a_search_knows_the_newest_words_of_an_entry(open_journal: OpenJournal) -> None:
    journal = open_journal()
    other = open_journal()
    first_entry = entry(journal, "a calm sea", phase=Phase.SUBMITTED, task=Task("task-unified-1", "completed"))
    journal.intend(first_entry)
    journal.update_images(replace(first_entry, images=(ResultImage(0, "u", NOW, path="/pictures/harbour.png"),)))
    assert [each.key for each in other.recent(9, words=("harbour", "unified-1", "calm"))] == [first_entry.key]
    journal.update_images(replace(first_entry, images=(ResultImage(0, "u", NOW, path="/pictures/beach.png"),)))
    assert other.recent(9, words=("harbour",)) == []
    assert [each.key for each in other.recent(9, words=("beach",), status="completed", since=NOW, until=NOW)]
    assert other.recent(9, words=("beach",), status="failed") == []
    assert other.recent(9, words=("beach",), since=NOW + 1) == []
    assert open_journal("other").recent(9, words=("beach",)) == []


def test_a_search_is_complete_after_a_server_without_full_text_search_wrote(tmp_path: Path) -> None:
    with_index = BlockingJournal(tmp_path)
    with_index.intend(first := entry(with_index))
    without = BlockingJournal(tmp_path, has_full_text=False)
    without.intend(second := entry(without, created_at=NOW + 1))
    with closing(sqlite3.connect(without.path)) as db:
        triggers = db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall()
    assert not [name for (name,) in triggers if "search" in name]
    later_journal = BlockingJournal(tmp_path)
    assert [each.key for each in with_index.recent(9, words=("fox",))] == [second.key, first.key]
    assert [each.key for each in later_journal.recent(9, words=("fox",))] == [second.key, first.key]
    later_journal.intend(third := entry(later_journal, created_at=NOW + 2))
    assert [each.key for each in with_index.recent(9, words=("fox",))] == [third.key, second.key, first.key]
    for journal in (with_index, without, later_journal):
        journal.close()


def test_a_replaced_file_gets_entries_sums_and_words_of_the_server_that_had_the_old_one(tmp_path: Path) -> None:
    journal = BlockingJournal(tmp_path)
    backup = tmp_path / "backup"
    journal.intend(first := entry(journal, "a fox", phase=Phase.SENDING, estimate=2.0))
    with closing(sqlite3.connect(journal.path)) as db, closing(sqlite3.connect(backup)) as copy:
        db.backup(copy)
    paid_entry = replace(first, phase=Phase.SUBMITTED, task=Task("task-unified-1", "completed", credits_used=1.25))
    journal.update(paid_entry)
    journal.intend(second := entry(journal, "a fox in the snow", created_at=NOW + 1, estimate=0.5))
    backup.replace(journal.path)
    for tail in ("-wal", "-shm"):
        Path(f"{journal.path}{tail}").unlink()
    assert [each.key for each in journal.recent(9, words=("fox",))] == [second.key, first.key]
    assert [each.key for each in journal.recent(9, words=("unified-1",))] == [first.key]
    assert journal.sums_since(NOW) == journal.sums_since(0.0) == Sums(1.25, 0.5)
    journal.close()


def test_the_command_line_adds_the_entries_with_a_word(tmp_path: Path) -> None:
    journal = BlockingJournal(tmp_path)
    journal.intend(entry(journal, "a fox", estimate=2.0))
    journal.intend(entry(journal, "a hare", estimate=0.5, error=Problem("a", "b", False, "c")))
    journal.close()
    assert read_sums(tmp_path, [0.0, NOW + 1], ("FOX",)) == [Sums(0.0, 2.0), Sums()]
    assert read_sums(tmp_path, [0.0]) == [Sums(0.0, 2.5)]
    assert [each.request["prompt"] for each in read_entries(tmp_path, 9, ("hare",))] == ["a hare"]
