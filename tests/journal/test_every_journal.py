"""The promises of every journal, tested with SQLite and with PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blocking import BlockingJournal, BlockingPostgres, open_portal

from evolink_mcp.api.task import Task, TaskError
from evolink_mcp.errors import Problem, TaskKnown, TooManyRunning
from evolink_mcp.journal.entry import Entry, ResultImage, new_key
from evolink_mcp.journal.journal import DailyLimitReached, Sums

NOW = 1_790_000_000.0
OpenJournal = Callable[..., Any]


def entry(journal: Any, **fields: Any) -> Entry:
    return Entry(**{"key": new_key(), "owner": journal.owner, "phase": "intent", "created_at": NOW,
                    "account": journal.account, **fields})  # fmt: skip


def task(name: str = "1", status: str = "pending", **fields: Any) -> Task:
    return Task(f"task-unified-{name}", status, **fields)


@pytest.fixture(params=["sqlite", "postgres"])
def open_journal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenJournal]:
    """Return a function that opens the journal of one more server. All of them share their entries."""
    journals: list[Any] = []
    if request.param == "sqlite":

        def open_one(*identity: str, profile: str = "default") -> Any:
            journals.append(BlockingJournal(tmp_path / "data", *identity, profile=profile, clock=lambda: NOW))
            return journals[-1]

        yield open_one
        for one in journals:
            one.close()
        return
    url = request.getfixturevalue("cluster").database()
    with open_portal() as portal:

        def open_one(*identity: str, profile: str = "default") -> Any:
            journals.append(BlockingPostgres(url, portal, *identity, profile=profile))
            return journals[-1]

        yield open_one
        for one in journals:
            one.close()


def test_an_entry_is_read_as_it_was_written(open_journal: OpenJournal) -> None:
    journal = open_journal()
    image = ResultImage(0, "https://x.example/1", NOW, "/tmp/ü \ud83e.png", "image/png", 16, 16, 9, "ab", None, False)
    complete = entry(
        journal, phase="submitted", fingerprint="f", request={"prompt": "a “fox” \ud800 🦊", "n": 2}, estimate=1.5,
        save_as="hero.png", task=task(status="completed", results=("https://x.example/1",), credits_used=0.25,
                                      error=TaskError("a", "b")),
        error=Problem("a", "b", True, "c"),
    )  # fmt: skip
    journal.intend(complete)
    journal.update_images(replace(complete, images=(image,)))
    journal.deliver(complete.key, NOW)
    assert open_journal().by_key(complete.key) == replace(complete, images=(image,), delivered_at=NOW)
    assert open_journal().by_task("task-unified-1") == open_journal().recent(5)[0]


def test_only_the_owner_writes_an_entry_and_any_server_may_deliver_it(open_journal: OpenJournal) -> None:
    first, second = open_journal(), open_journal()
    completed_entry = entry(first, task=task(status="completed"), phase="submitted")
    first.intend(completed_entry)
    assert second.update_images(replace(completed_entry, images=(ResultImage(0, "u", NOW, path="/x"),))) is False
    assert second.update(replace(completed_entry, phase="unknown")) is False
    second.deliver(completed_entry.key, NOW)
    assert first.by_key(completed_entry.key) == replace(completed_entry, delivered_at=NOW)
    assert first.update(replace(completed_entry, phase="unknown")) is True
    row = second.by_key(completed_entry.key)
    assert row is not None
    assert (row.phase, row.delivered_at) == ("unknown", NOW)


def test_only_one_of_many_callers_claims_an_undelivered_entry(open_journal: OpenJournal) -> None:
    journals = [open_journal() for _ in range(4)]
    journals[0].intend(orphan := entry(journals[0], fingerprint="f"))
    results: list[bool] = []
    threads = [threading.Thread(target=lambda j=j: results.append(j.claim(orphan.key))) for j in journals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False, False, False, True]


def test_the_daily_limit_includes_the_newest_entries_of_other_servers(open_journal: OpenJournal) -> None:
    first, second = open_journal(), open_journal()
    first.intend(entry(first, estimate=3.0), day_limit=5.0)
    with pytest.raises(DailyLimitReached) as refusal:
        second.intend(entry(second, estimate=3.0), day_limit=5.0)
    assert refusal.value.sums == Sums(reserved=3.0)
    second.intend(entry(second, estimate=2.0), day_limit=5.0)
    assert len(first.recent(9)) == 2


@pytest.mark.parametrize(
    ("fields", "credits"),
    [
        pytest.param({"phase": "intent"}, 2.0, id="about to be sent: its estimate"),
        pytest.param({"phase": "unknown"}, 2.0, id="unknown outcome: its estimate"),
        pytest.param({"phase": "refused"}, 0.0, id="refused"),
        pytest.param({"phase": "submitted", "task": task()}, 2.0, id="under way: its estimate"),
        pytest.param({"phase": "submitted", "task": task(status="failed")}, 0.0, id="failed"),
        pytest.param({"phase": "submitted", "task": task(status="completed", credits_used=1.2)}, 1.2, id="the charge"),
        pytest.param(
            {"phase": "external", "task": task(status="completed", credits_used=1.2)}, 0.0, id="bought elsewhere"
        ),
        pytest.param({"phase": "submitted", "task": task(), "created_at": NOW - 86_400}, 0.0, id="yesterday"),
    ],
)
def test_the_daily_sum_counts_charges_or_else_estimates(
    open_journal: OpenJournal, fields: dict[str, Any], credits: float
) -> None:
    journal = open_journal()
    journal.intend(entry(journal, estimate=2.0, **fields))
    assert journal.sums_since(NOW - 3600).total == credits


def test_a_dead_servers_entries_are_adopted_once_and_a_living_ones_never(open_journal: OpenJournal) -> None:
    dead, living, successor, later_server = (open_journal() for _ in range(4))
    for journal, name in ((dead, "1"), (living, "2")):
        journal.intend(entry(journal, phase="submitted", task=task(name), caller=journal.owner))
    assert successor.adopt() == []
    dead.close()
    adopted_entries = successor.adopt()
    assert [(row.task_id, row.owner, row.caller) for row in adopted_entries] == [
        ("task-unified-1", successor.owner, "")
    ]
    assert later_server.adopt() == []


def test_a_finished_entry_whose_caller_died_can_be_delivered(open_journal: OpenJournal) -> None:
    dead, successor = open_journal(), open_journal()
    finished_entry = replace(
        entry(dead, phase="submitted", fingerprint="f", caller=dead.owner),
        task=task(status="completed"),
        images=(ResultImage(0, "u", NOW, path="/x"),),
    )
    dead.intend(finished_entry)
    assert successor.undelivered(("f",), 0).entries == []
    dead.close()
    assert successor.adopt() == []
    assert [row.key for row in successor.undelivered(("f",), 0).entries] == [finished_entry.key]


@pytest.mark.parametrize(
    ("image", "is_adopted"),
    [
        pytest.param(ResultImage(0, "u", NOW, path="/x"), False, id="saved"),
        pytest.param(ResultImage(0, "u", NOW, error="no room"), True, id="failed and to be tried again"),
        pytest.param(ResultImage(0, "u", NOW, error="expired", is_lost=True), False, id="lost for good"),
    ],
)
def test_an_entry_is_adopted_if_its_image_can_still_be_downloaded(
    open_journal: OpenJournal, image: ResultImage, is_adopted: bool
) -> None:
    dead, successor = open_journal(), open_journal()
    dead.intend(entry(dead, phase="submitted", task=task(status="completed"), images=(image,)))
    dead.close()
    assert bool(successor.adopt()) == is_adopted


def test_a_profile_sees_only_its_own_entries_although_another_one_uses_the_same_key(open_journal: OpenJournal) -> None:
    anna = open_journal("a1", profile="anna")
    ben = open_journal("a1", profile="ben's “50%” ?{}")
    anna.intend(entry_of_anna := entry(anna, fingerprint="f", task=task("1"), phase="submitted", estimate=2.0))
    anna.remember_upload("ab", "https://x.example/1", NOW)
    assert anna.recent(9) == [entry_of_anna]
    assert ben.recent(9) == []
    assert ben.by_key(entry_of_anna.key) is None
    assert ben.by_task("task-unified-1") is None
    assert ben.undelivered(("f", "g"), 0).entries == []
    assert anna.undelivered(("f", "g"), 0).entries == [entry_of_anna]
    assert (ben.sums_since(0).total, anna.sums_since(0).total) == (0.0, 2.0)
    assert ben.acquire(entry_of_anna.key) is False
    assert ben.find_upload("ab", 0) is None
    ben.intend(entry_of_ben := entry(ben, task=task("1")))
    assert ben.recent(9) == [entry_of_ben]


def test_a_lost_answer_is_not_matched_with_a_task_of_another_profile(open_journal: OpenJournal) -> None:
    """Both profiles may use one key, so both see the task in EvoLink's list."""
    anna, ben = open_journal("a1", profile="anna"), open_journal("a1", profile="ben")
    anna.intend(entry(anna, task=task("1"), phase="submitted"))
    assert ben.known_tasks(["task-unified-1", "x"]) == {"task-unified-1"}


def test_another_key_of_the_profile_reads_an_entry_and_cannot_work_on_it(open_journal: OpenJournal) -> None:
    dead, first, second = open_journal("a1"), open_journal("a1"), open_journal("b2")
    finished_entry = entry(dead, fingerprint="f", phase="submitted", task=task("1"), estimate=2.0)
    dead.intend(finished_entry)
    assert second.recent(9) == [finished_entry]
    assert second.by_key(finished_entry.key) == second.by_task("task-unified-1") == finished_entry
    assert second.sums_since(0).total == 2.0
    dead.close()
    assert second.undelivered(("f",), 0).entries == []
    assert second.adopt() == []
    assert second.acquire(finished_entry.key) is False
    assert first.adopt() == [replace(finished_entry, owner=first.owner)]


def test_a_key_adopts_its_own_orphan_and_leaves_that_of_another_key(open_journal: OpenJournal) -> None:
    dead, other_dead = open_journal("a1"), open_journal("b2")
    dead.intend(entry(dead, phase="submitted", task=task("1")))
    other_dead.intend(orphan := entry(other_dead, phase="submitted", task=task("2")))
    dead.close()
    other_dead.close()
    second = open_journal("b2")
    assert second.adopt() == [replace(orphan, owner=second.owner)]


def test_a_linked_key_works_on_the_entries_of_the_earlier_key(open_journal: OpenJournal) -> None:
    dead = open_journal("a1")
    dead.intend(finished_entry := entry(dead, fingerprint="f", phase="submitted", task=task("1")))
    dead.save_fact("rule", "one")
    dead.close()
    first_journal, second_journal = open_journal("b2"), open_journal("b2")
    assert first_journal.read_links() == second_journal.read_links() == ["a1"]
    assert first_journal.newest_of("a1") == replace(finished_entry, owner="")
    assert first_journal.newest_of("b2") is None
    assert (first_journal.account, first_journal.is_linked("a1"), first_journal.fact("rule")) == ("b2", False, None)
    first_journal.link("a1")
    assert (first_journal.account, first_journal.is_linked("a1"), first_journal.fact("rule")) == ("a1", True, "one")
    assert first_journal.undelivered(("f",), 0).entries == [replace(finished_entry, owner="")]
    assert first_journal.adopt() == [replace(finished_entry, owner=first_journal.owner)]
    assert second_journal.read_links() == []
    assert second_journal.account == "a1"
    assert open_journal("b2", profile="another").read_links() == []


def test_a_key_with_entries_keeps_its_account_when_it_is_linked_to_another_one(open_journal: OpenJournal) -> None:
    first, second = open_journal("a1"), open_journal("b2")
    second.intend(second_entry := entry(second, created_at=NOW - 1, fingerprint="f"))
    first.intend(first_entry := entry(first, fingerprint="f"))
    assert second.read_links() == ["a1"]
    second.link("a1")
    assert second.account == "b2"
    assert second.undelivered(("f",), 0).entries == [second_entry, first_entry]
    third = open_journal("b2")
    third.read_links()
    assert (third.account, third.is_linked("a1")) == ("b2", True)


def test_without_a_key_all_entries_of_the_profile_are_read(open_journal: OpenJournal) -> None:
    anna = open_journal("a1")
    ben = open_journal("b2")
    anna.intend(entry_of_anna := entry(anna))
    ben.intend(entry_of_ben := entry(ben, created_at=NOW - 1))
    assert open_journal().recent(9) == [entry_of_anna, entry_of_ben]
    assert open_journal(profile="another").recent(9) == []
    assert open_journal(profile="another").by_key(entry_of_anna.key) is None


def test_a_task_has_one_entry_a_profile(open_journal: OpenJournal) -> None:
    anna, ben = open_journal("a1"), open_journal("b2", profile="ben")
    anna.intend(entry(anna, task=task()))
    anna.intend(second := entry(anna))
    with pytest.raises(TaskKnown, match="task-unified-1"):
        anna.intend(entry(anna, task=task()))
    with pytest.raises(TaskKnown, match="task-unified-1"):
        anna.update(replace(second, task=task(), phase="submitted"))
    assert anna.by_key(second.key) == second
    ben.intend(entry(ben, task=task()))
    assert len(ben.recent(9)) == 1


def test_an_owned_entry_can_be_acquired_after_its_release(open_journal: OpenJournal) -> None:
    first, second = open_journal(), open_journal()
    first.intend(own_entry := entry(first))
    assert (first.acquire(own_entry.key), second.acquire(own_entry.key), second.acquire("no such key")) == (
        True,
        False,
        False,
    )
    first.release(own_entry.key)
    second.release("no such key")
    assert (second.acquire(own_entry.key), first.acquire(own_entry.key)) == (True, False)
    assert second.by_key(own_entry.key).owner == second.owner
    assert first.update(replace(own_entry, phase="unknown")) is False


def test_an_entry_can_be_claimed_after_its_caller_left(open_journal: OpenJournal) -> None:
    first, second = open_journal(), open_journal()
    first.intend(own_entry := entry(first, fingerprint="f", caller=first.owner))
    assert (second.undelivered(("f",), 0).entries, second.claim(own_entry.key)) == ([], False)
    second.remove_caller(own_entry.key)
    assert second.undelivered(("f",), 0).entries == []
    first.remove_caller(own_entry.key)
    assert [row.key for row in second.undelivered(("e", "f"), NOW).entries] == [own_entry.key]
    assert second.undelivered(("f",), NOW + 1).entries == []
    assert (second.claim(own_entry.key), first.claim(own_entry.key)) == (True, False)
    first.deliver(own_entry.key, NOW + 1)
    second.remove_caller(own_entry.key)
    assert (first.claim(own_entry.key), first.by_key(own_entry.key).delivered_at) == (False, NOW + 1)


def test_entries_are_found_by_time_status_and_words_page_by_page(open_journal: OpenJournal) -> None:
    journal = open_journal()
    prompts = ["Ein FÜCHSLEIN im Schnee", "a red fox", "a hen, 100% red_ish"]
    entries = [
        entry(journal, created_at=NOW + number, request={"prompt": prompt}, save_as=f"bild-{number}.png")
        for number, prompt in enumerate(prompts)
    ]
    for row in entries:
        journal.intend(row)
    saved_entry = replace(entries[1], phase="submitted", task=task(status="completed"),
                    images=(ResultImage(0, "u", NOW, path="/x/Späher-1.png"),))  # fmt: skip
    journal.update_images(saved_entry)
    newest = [entries[2], saved_entry, entries[0]]
    assert journal.recent(9) == newest
    assert journal.recent(2) == newest[:2]
    assert journal.recent(9, "completed") == [saved_entry]
    assert journal.recent(9, None, NOW + 1) == newest[:2]
    assert journal.recent(9, None, None, NOW + 1) == newest[1:]
    assert journal.recent(9, words=("füchslein",)) == [entries[0]]
    assert journal.recent(9, words=("FU\u0308CHS", "schnee")) == [entries[0]]
    assert journal.recent(9, words=("späher",)) == journal.recent(9, words=("unified-1",)) == [saved_entry]
    assert journal.recent(9, words=("bild-2", "100%")) == journal.recent(9, words=("d_i",)) == [entries[2]]
    assert journal.recent(9, words=("fox hen",)) == []
    assert journal.recent(1, after=(NOW + 2, entries[2].key)) == [saved_entry]
    assert journal.recent(9, after=(NOW, entries[0].key)) == []


def test_entries_of_one_moment_come_in_the_order_of_their_keys(open_journal: OpenJournal) -> None:
    journal = open_journal()
    keys = ["evomcp-B", "evomcp-a", "evomcp-_", "evomcp-9"]
    for key in keys:
        journal.intend(entry(journal, key=key))
    assert [row.key for row in journal.recent(9)] == sorted(keys)
    assert [row.key for row in journal.recent(9, after=(NOW, "evomcp-B"))] == ["evomcp-_", "evomcp-a"]


def test_uploads_belong_to_a_profile_and_facts_to_an_account(open_journal: OpenJournal) -> None:
    anna, ben, keyless = open_journal("a1"), open_journal("b2"), open_journal()
    other_profile = open_journal("a1", profile="another")
    anna.remember_upload("ab", "https://x.example/1", NOW + 5)
    anna.remember_upload("ab", "https://x.example/2", NOW + 9)
    assert (anna.find_upload("ab", NOW + 8), anna.find_upload("ab", NOW + 9)) == ("https://x.example/2", None)
    assert ben.find_upload("ab", NOW) == "https://x.example/2"
    assert (other_profile.find_upload("ab", NOW), anna.find_upload("cd", NOW)) == (None, None)
    assert anna.fact("rule") is None
    anna.save_fact("rule", "one")
    anna.save_fact("rule", "two")
    assert (anna.fact("rule"), ben.fact("rule"), keyless.fact("rule")) == ("two", None, "two")
    assert (other_profile.fact("rule"), open_journal(profile="another").fact("rule")) == ("two", None)
    ben.save_fact("rule", "three")
    assert keyless.fact("rule") is None


def test_unusual_characters_are_stored_unchanged(open_journal: OpenJournal) -> None:
    journal = open_journal()
    odd_entry = entry(journal, request={"prompt": "a\0b \ud800 '; DROP TABLE x; -- %s"}, task=Task("a\0b/../c", "pending"),
                error=Problem("x", "nul \0", False, "\udfff"))  # fmt: skip
    journal.intend(odd_entry)
    assert journal.by_key(odd_entry.key) == odd_entry
    assert journal.by_task("a\0b/../c") == odd_entry
    assert journal.known_tasks(["a\0b/../c"])
    assert journal.recent(9, words=("drop table x; -- %s",)) == [odd_entry]


def test_a_lost_entry_is_written_again_completely(open_journal: OpenJournal) -> None:
    """The user restored an older backup while the server ran."""
    journal = open_journal()
    lost_entry = entry(journal, phase="submitted", task=task(), fingerprint="f", save_as="x.png")
    assert journal.update(lost_entry) is True
    assert journal.by_key(lost_entry.key) == lost_entry


@pytest.mark.parametrize(
    ("fields", "is_running"),
    [
        ({}, True),
        ({"phase": "sending"}, True),
        ({"phase": "submitted", "task": task()}, True),
        ({"phase": "submitted", "task": task(status="something new")}, True),
        ({"phase": "submitted", "task": task(status="completed")}, False),  # its pictures are still to be saved
        ({"phase": "submitted", "task": task(status="failed")}, False),
        ({"phase": "unknown"}, False),
        ({"phase": "unsent"}, False),
    ],
)
def test_the_running_tasks_of_a_profile_are_limited(
    open_journal: OpenJournal, fields: dict[str, Any], is_running: bool
) -> None:
    first, second, ben = open_journal("a1"), open_journal("b2"), open_journal("a1", profile="ben")
    first.intend(entry(first, **fields))
    ben.intend(entry(ben), running_max=1)
    if not is_running:
        second.intend(entry(second), running_max=1)
        return
    with pytest.raises(TooManyRunning, match="the limit of 1 running tasks is reached"):
        second.intend(entry(second), running_max=1, day_limit=100.0)
    second.intend(entry(second), running_max=2)
    assert len(first.recent(9)) == 2
