"""What tasks took is learned from those that were watched from start to end, and known to the account's next server."""

from __future__ import annotations

import json
from dataclasses import replace

import anyio
import pytest
from conftest import KEY, World

from evolink_mcp.api.models import TYPICAL_S
from evolink_mcp.api.task import Task
from evolink_mcp.journal.entry import Entry
from evolink_mcp.studio.events import Events, JournalWriter
from evolink_mcp.studio.jobs import Job, Timing
from evolink_mcp.studio.poller import Poller, TaskFollower
from evolink_mcp.studio.schedule import DURATIONS_FACT, ENOUGH_TASKS, WRITTEN_EVERY, DurationHistory

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

ENTRY = Entry(
    key="k",
    owner="o",
    phase="submitted",
    created_at=1.0,
    request={"quality": "high"},
    task=Task("t", estimated_time_s=100.0),
)


async def learned(world: World, took_s: float, times: int) -> DurationHistory:
    own_names = DurationHistory(world.studio.journal)
    for _ in range(times):
        await own_names.add(ENTRY, took_s)
    return own_names


async def test_the_next_server_knows_the_learned_durations(world: World) -> None:
    assert WRITTEN_EVERY >= ENOUGH_TASKS
    own_names = await learned(world, 60.0, WRITTEN_EVERY)
    foreign = DurationHistory(world.studio.journal)
    assert (await own_names.expected(ENTRY)).median_s == (await foreign.expected(ENTRY)).median_s == 60.0
    low = replace(ENTRY, request={"quality": "low"})
    assert (await foreign.expected(low)).median_s == TYPICAL_S["low"]


async def test_remaining_durations_are_written_when_the_server_ends(world: World) -> None:
    own_names = await learned(world, 60.0, WRITTEN_EVERY - 1)
    assert await world.studio.journal.fact(DURATIONS_FACT) is None
    await own_names.write()
    assert json.loads(await world.studio.journal.fact(DURATIONS_FACT) or "") == [["high", 100.0, 60.0]] * (
        WRITTEN_EVERY - 1
    )


async def test_a_task_that_ended_at_once_is_not_counted(world: World) -> None:
    own_names = await learned(world, 0.2, 3 * WRITTEN_EVERY)
    assert (await own_names.expected(ENTRY)).median_s == TYPICAL_S["high"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "7", "{}", '[["high"]]', '[["high", null, "x"]]', '[["high", 1e999, 5]]', '[["high", 1, 1e999]]', "[[]]"],
)
async def test_an_invalid_record_is_ignored(world: World, text: str) -> None:
    await world.studio.journal.save_fact(DURATIONS_FACT, text)
    assert (await DurationHistory(world.studio.journal).expected(ENTRY)).median_s == TYPICAL_S["high"]


async def test_only_a_task_that_was_followed_from_its_start_counts(world: World) -> None:
    journal = world.studio.journal
    world.simulator.create({"model": "gpt-image-2", "prompt": "sim:done a fox"}, key=KEY)
    (task_id,) = world.simulator.tasks
    entry = replace(ENTRY, owner=journal.owner, account=journal.account, task=Task(task_id))
    await journal.intend(entry)
    durations = DurationHistory(journal, counted_from_s=0.0)
    stored: list[int] = []
    async with anyio.create_task_group() as group:
        timing = Timing(world.clock, world.clock.sleep)
        writer = JournalWriter(journal, Events())
        follower = TaskFollower(Poller(world.studio.client, group), writer, durations, timing)
        for is_purchase in (False, True):
            job = Job(entry)
            if is_purchase:
                job.record_answer(is_running=True)
            await follower.follow(job)
            assert job.entry.status == "completed"
            await durations.write()
            stored.append(len(json.loads(await journal.fact(DURATIONS_FACT) or "[]")))
    assert stored == [0, 1]
