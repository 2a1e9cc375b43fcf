"""The server learns durations from tasks that it followed from start to end. The next server of the account knows them."""

from __future__ import annotations

import json
from dataclasses import replace

import anyio
import pytest
from conftest import KEY, World

from evolink_mcp.api.models import TYPICAL_S
from evolink_mcp.api.task import Task
from evolink_mcp.journal.entry import Entry
from evolink_mcp.studio.events import Events
from evolink_mcp.studio.jobs import Job, Timing
from evolink_mcp.studio.journal_writer import JournalWriter
from evolink_mcp.studio.poller import Poller, TaskFollower
from evolink_mcp.studio.schedule import DURATIONS_FACT, ENOUGH_TASKS, WRITE_EVERY, DurationHistory

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

ENTRY = Entry(
    key="k",
    owner="o",
    phase="submitted",
    created_at=1.0,
    request={"quality": "high"},
    task=Task("t", estimated_time_s=100.0),
)


async def learn_durations(world: World, duration_s: float, times: int) -> DurationHistory:
    history = DurationHistory(world.studio.journal)
    for _ in range(times):
        await history.add(ENTRY, duration_s)
    return history


async def test_the_next_server_knows_the_learned_durations(world: World) -> None:
    assert WRITE_EVERY >= ENOUGH_TASKS
    history = await learn_durations(world, 60.0, WRITE_EVERY)
    second = DurationHistory(world.studio.journal)
    assert (await history.expected(ENTRY)).median_s == (await second.expected(ENTRY)).median_s == 60.0
    low = replace(ENTRY, request={"quality": "low"})
    assert (await second.expected(low)).median_s == TYPICAL_S["low"]


async def test_remaining_durations_are_written_when_the_server_ends(world: World) -> None:
    history = await learn_durations(world, 60.0, WRITE_EVERY - 1)
    assert await world.studio.journal.fact(DURATIONS_FACT) is None
    await history.write()
    assert json.loads(await world.studio.journal.fact(DURATIONS_FACT) or "") == [["high", 100.0, 60.0]] * (
        WRITE_EVERY - 1
    )


async def test_a_task_that_ended_at_once_is_not_counted(world: World) -> None:
    history = await learn_durations(world, 0.2, 3 * WRITE_EVERY)
    assert (await history.expected(ENTRY)).median_s == TYPICAL_S["high"]


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
    durations = DurationHistory(journal, counted_min_s=0.0)
    stored_counts: list[int] = []
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
            stored_counts.append(len(json.loads(await journal.fact(DURATIONS_FACT) or "[]")))
    assert stored_counts == [0, 1]
