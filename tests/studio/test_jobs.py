"""A job moves only along its table, and a cancelled call loses neither a claim nor an entry."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import aclosing
from itertools import product
from typing import Any

import anyio
import pytest
from conftest import Open, World
from faulty_journal import FaultyJournal

from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.journal.entry import Entry, Phase
from evolink_mcp.studio.jobs import IllegalTransition, ImageRequest, Job, JobState

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

REQUEST = ImageRequest(GenerationRequest(prompt="sim:slow=60 a fox"), price_ceiling=9.0)
PREPARED, SENDING, RUNNING, SAVING, WATCHING, DONE = JobState
LEGAL = {
    (PREPARED, SENDING), (PREPARED, WATCHING), (PREPARED, DONE),
    (SENDING, PREPARED), (SENDING, RUNNING), (SENDING, WATCHING), (SENDING, DONE),
    (RUNNING, SAVING), (RUNNING, WATCHING), (RUNNING, DONE),
    (SAVING, WATCHING), (SAVING, DONE),
    (WATCHING, PREPARED), (WATCHING, SENDING), (WATCHING, RUNNING), (WATCHING, DONE),
}  # fmt: skip
PATHS = {
    PREPARED: (),
    SENDING: (SENDING,),
    RUNNING: (SENDING, RUNNING),
    SAVING: (SENDING, RUNNING, SAVING),
    WATCHING: (WATCHING,),
    DONE: (DONE,),
}


@pytest.mark.parametrize(("start", "target"), [pair for pair in product(JobState, repeat=2) if pair[0] != pair[1]])
async def test_a_job_moves_only_along_its_table(start: JobState, target: JobState) -> None:
    job = Job(Entry("key", "owner", Phase.INTENT, 0.0))
    for state in PATHS[start]:
        job.move_to(state)
    if (start, target) in LEGAL:
        job.move_to(target)
        assert job.state is target
    else:
        with pytest.raises(IllegalTransition):
            job.move_to(target)
        assert job.state is start


async def test_a_change_while_a_call_handles_the_earlier_state_is_not_missed() -> None:
    job = Job(Entry("key", "owner", Phase.INTENT, 0.0))
    states: list[tuple[Phase, JobState]] = []
    async with aclosing(job.states(math.inf)) as entries:
        async for entry in entries:
            states.append((entry.phase, job.state))
            if entry.phase is Phase.INTENT:
                job.change_to(Entry("key", "owner", Phase.REFUSED, 0.0))
            elif not job.is_finished:
                job.finish()
    assert states == [(Phase.INTENT, PREPARED), (Phase.REFUSED, PREPARED), (Phase.REFUSED, DONE)]


async def test_an_answer_that_confirms_the_known_state_wakes_its_waiting_calls() -> None:
    job = Job(Entry("key", "owner", Phase.SUBMITTED, 0.0))
    async with aclosing(job.states(math.inf)) as states, anyio.create_task_group() as group:
        await anext(states)
        group.start_soon(anext, states)
        await anyio.wait_all_tasks_blocked()
        job.record_answer(is_running=False)


@pytest.fixture
async def world(open_world: Open) -> AsyncIterator[World]:
    async with open_world(wrap_journal=FaultyJournal) as opened:
        yield opened


async def cancel_during(world: World, method: str) -> None:
    """Cancel an order after the journal did its work and before this method returns."""
    journal: Any = world.studio.journal
    has_entered = anyio.Event()
    release = anyio.Event()

    async def hold() -> None:
        has_entered.set()
        await release.wait()

    async def order() -> None:
        async with world.studio.ordered(REQUEST):
            await anyio.sleep_forever()

    journal.after[method] = hold
    async with anyio.create_task_group() as group:
        group.start_soon(order)
        await has_entered.wait()
        group.cancel_scope.cancel()
        release.set()


async def test_a_call_that_is_cancelled_during_its_claim_leaves_the_purchase_to_the_next_one(world: World) -> None:
    first = await world.studio.order(REQUEST)
    while first.entry.task is None:
        await anyio.sleep(0)
    await world.studio.depart(first)
    await cancel_during(world, "claim")
    assert first.callers == 0
    assert await world.studio.order(REQUEST) is first
    assert world.posts == 1


async def test_a_call_that_is_cancelled_while_its_entry_is_recorded_buys_nothing_and_reserves_nothing(
    world: World,
) -> None:
    await cancel_during(world, "intend")
    while not world.studio.is_idle:
        await anyio.sleep(0)
    assert [entry.phase for entry in await world.studio.journal.recent(9)] == [Phase.UNSENT]
    assert (await world.studio.journal.sums_since(0)).total == 0
    assert world.posts == 0


async def test_an_entry_of_another_owner_is_not_sent(world: World, open_world: Open) -> None:
    """For example a server that was suspended after its write, so that another server adopted the entry."""
    journal: Any = world.studio.journal
    async with open_world(simulator=world.simulator, clock=world.clock) as second:

        async def change_owner() -> None:
            (entry,) = await journal.recent(9)
            await journal.release(entry.key)
            assert await second.studio.journal.acquire(entry.key)

        journal.after["intend"] = change_owner
        job = await world.studio.order(REQUEST)
        while not job.is_finished and not world.posts:
            await anyio.sleep(0)
        assert world.posts == 0
        assert [entry.phase for entry in await journal.recent(9)] == [Phase.INTENT]
        await world.studio.depart(job)
