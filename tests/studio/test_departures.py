"""An identical order gets the purchase of a call that ended, even if the journal could not record that end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from conftest import Clock, Open, World
from faulty_journal import FaultyJournal

from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.journal import Journal
from evolink_mcp.studio.events import Events
from evolink_mcp.studio.jobs import ImageRequest, Job
from evolink_mcp.studio.journal_writer import JournalWriter

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

SLOW = ImageRequest(GenerationRequest(prompt="sim:slow=60 a fox"), price_ceiling=9.0)
QUICK = ImageRequest(GenerationRequest(prompt="a fox"), price_ceiling=9.0)
FAILS = ImageRequest(GenerationRequest(prompt="sim:fail a fox"), price_ceiling=9.0)


@asynccontextmanager
async def faulty_world(open_world: Open, **options: Any) -> AsyncIterator[tuple[World, FaultyJournal]]:
    journals: list[FaultyJournal] = []

    def wrap(journal: Journal) -> FaultyJournal:
        journals.append(FaultyJournal(journal))
        return journals[-1]

    async with open_world(wrap_journal=wrap, **options) as world:
        yield world, journals[0]


async def submit(world: World, request: ImageRequest = SLOW) -> Job:
    job = await world.studio.order(request)
    while job.entry.task is None:
        await anyio.sleep(0)
    return job


async def finish(job: Job) -> Job:
    while not job.is_finished:
        await anyio.sleep(0)
    return job


async def test_a_call_gets_the_purchase_of_a_call_that_ends_while_earlier_purchases_are_read(open_world: Open) -> None:
    """The rows still name the first call when the second one reads them."""
    async with faulty_world(open_world) as (world, journal), anyio.create_task_group() as group:
        first = await submit(world)
        is_claimed = anyio.Event()

        async def end_first_call() -> None:
            journal.after["remove_caller"] = is_claimed.wait
            group.start_soon(world.studio.depart, first)
            while first.callers:
                await anyio.sleep(0)

        journal.after["undelivered"] = end_first_call
        second = await world.studio.order(SLOW)
        is_claimed.set()
        assert (second is first, world.posts) == (True, 1)


async def test_a_call_gets_the_purchase_of_a_call_whose_end_could_not_be_recorded(open_world: Open) -> None:
    async with faulty_world(open_world) as (world, journal):
        first = await submit(world)
        journal.unwritable = {"remove_caller"}
        await world.studio.depart(first)
        second = await world.studio.order(SLOW)
        assert (second is first, second.callers) == (True, 1)
    assert world.posts == 1


async def test_the_end_of_a_call_is_recorded_later_so_another_server_can_hand_the_purchase_over(
    open_world: Open,
) -> None:
    clock = Clock()
    async with faulty_world(open_world, clock=clock) as (world, journal):
        first = await submit(world)
        journal.unwritable = {"remove_caller"}
        await world.studio.depart(first)
        assert world.studio.has_unwritten
        journal.unwritable = set()
        await world.studio.flush()
        assert not world.studio.has_unwritten
        async with open_world(simulator=world.simulator, clock=clock) as second_world:
            second = await second_world.studio.order(SLOW)
            assert second.entry.task_id == first.entry.task_id
    assert world.posts == 1


async def test_a_repeated_record_of_the_end_does_not_undo_a_later_claim(open_world: Open) -> None:
    async with faulty_world(open_world) as (world, journal):
        first = await submit(world)
        journal.unwritable = {"remove_caller"}
        await world.studio.depart(first)
        await world.studio.order(SLOW)
        journal.unwritable = set()
        await world.studio.flush()
        assert await submit(world) is not first
    assert world.posts == 2


async def test_a_claim_that_cannot_be_recorded_buys_nothing_and_keeps_the_purchase(open_world: Open) -> None:
    async with faulty_world(open_world) as (world, journal):
        first = await submit(world)
        journal.unwritable = {"remove_caller", "claim"}
        await world.studio.depart(first)
        with pytest.raises(JournalUnwritable):
            await world.studio.order(SLOW)
        journal.unwritable = set()
        assert await world.studio.order(SLOW) is first
    assert world.posts == 1


@pytest.mark.parametrize("is_shared", [True, False], ids=["shared account", "own account"])
async def test_a_task_is_not_called_unknown_because_the_journal_cannot_be_read(
    open_world: Open, is_shared: bool
) -> None:
    """Without the journal, the server polls a task only if the account belongs to one person."""
    async with faulty_world(open_world, is_shared=is_shared) as (world, journal), world.client() as client:
        purchase = await client.call_tool("generate_image", {"prompt": "sim:fast a fox"})
        task_id = purchase.structured_content["task_id"]
        journal.unwritable = {"by_task"}
        facts = (await client.call_tool("get_task", {"task_id": task_id, "wait_seconds": 1})).structured_content
    if is_shared:
        assert (facts["status"], facts["charged"], facts["error"]["code"]) == (
            "unknown",
            "unknown",
            "journal_unwritable",
        )
    else:
        assert (facts["status"], facts["error"]) == ("completed", None)


async def answer_is_lost() -> None:
    raise JournalUnwritable("the answer of the journal was lost (simulated)")


async def test_a_recorded_claim_whose_answer_was_lost_does_not_hide_the_purchase(open_world: Open) -> None:
    async with faulty_world(open_world) as (world, journal):
        first = await submit(world)
        await world.studio.depart(first)
        journal.after["claim"] = answer_is_lost
        with pytest.raises(JournalUnwritable):
            await world.studio.order(SLOW)
        second = await world.studio.order(SLOW)
        assert (second is first, world.posts) == (True, 1)


async def test_a_recorded_order_whose_answer_was_lost_buys_nothing_and_reserves_nothing(open_world: Open) -> None:
    """It would count as a running task, and its price as spent, until the server ends."""
    async with faulty_world(open_world) as (world, journal):
        journal.after["intend"] = answer_is_lost
        journal.unwritable = {"withdraw"}
        with pytest.raises(JournalUnwritable):
            await world.studio.order(SLOW)
        await world.studio.flush()
        assert world.studio.has_unwritten
        journal.unwritable = set()
        await world.studio.flush()
        (entry,) = await journal.recent(10)
        assert (entry.phase, entry.owner, entry.caller) == ("unsent", "", "")
        sums = await journal.sums_since(0.0)
        assert (sums.total, world.posts, world.studio.has_unwritten) == (0, 0, False)


async def test_an_order_gets_a_purchase_that_the_journal_could_not_record(open_world: Open) -> None:
    async with faulty_world(open_world) as (world, journal):
        journal.after["update"] = make_unwritable(journal)
        first = await submit(world)
        assert world.studio.has_unwritten
        await world.studio.depart(first)
        second = await world.studio.order(SLOW)
        assert second.entry.task_id == first.entry.task_id
    assert world.posts == 1


async def test_an_order_buys_if_the_unrecorded_state_of_the_earlier_one_is_a_failure(open_world: Open) -> None:
    """The journal still says that the task runs."""
    async with faulty_world(open_world) as (world, journal):
        first = await submit(world, FAILS)
        journal.unwritable = {"update", "update_images"}
        await finish(first)
        assert (first.entry.status, world.studio.has_unwritten) == ("failed", True)
        await world.studio.depart(first)
        journal.unwritable = {"update_images"}
        second = await submit(world, FAILS)
        assert second.entry.key != first.entry.key
    assert world.posts == 2


async def test_a_delivered_image_is_not_handed_over_again_although_the_delivery_is_not_recorded(
    open_world: Open,
) -> None:
    async with faulty_world(open_world) as (world, journal):
        first = await finish(await submit(world, QUICK))
        journal.unwritable = {"deliver"}
        await world.studio.depart(first)
        await world.studio.deliver(first)
        second = await submit(world, QUICK)
        assert second.entry.key != first.entry.key
        journal.unwritable = set()
        await world.studio.flush()
        stored_entry = await world.studio.journal.by_key(first.entry.key)
        assert stored_entry is not None
        assert stored_entry.delivered_at == first.entry.delivered_at
    assert world.posts == 2


def make_unwritable(journal: FaultyJournal) -> Callable[[], Awaitable[None]]:
    async def fail_from_now_on() -> None:
        journal.unwritable = {"update", "update_images", "release"}

    return fail_from_now_on


async def test_an_order_buys_if_a_call_of_another_server_claims_the_purchase_first(open_world: Open) -> None:
    clock = Clock()
    async with (
        faulty_world(open_world, clock=clock) as (world, journal),
        open_world(simulator=world.simulator, clock=clock) as second_world,
    ):
        first = await submit(world)
        await world.studio.depart(first)
        claimed_jobs: list[Job] = []

        async def claim_at_second() -> None:
            claimed_jobs.append(await second_world.studio.order(SLOW))

        journal.before["claim"] = claim_at_second
        second = await submit(world)
        assert claimed_jobs[0].entry.task_id == first.entry.task_id
        assert second.entry.task_id != first.entry.task_id
    assert world.posts == 2


async def test_the_end_of_a_call_is_recorded_within_a_second_although_two_writes_of_it_fail(open_world: Open) -> None:
    """Another server waits one second for the end of a call, and then buys."""
    pauses: list[float] = []
    attempts: list[str] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await anyio.sleep(0)

    async def fail_twice(remove_caller: Callable[[str], Awaitable[None]], key: str) -> None:
        attempts.append(key)
        if len(attempts) <= 2:
            raise JournalUnwritable("the journal cannot be used (simulated)")
        await remove_caller(key)

    async with faulty_world(open_world) as (world, journal), anyio.create_task_group() as group:
        job = await submit(world)
        journal.replacements["remove_caller"] = fail_twice
        writer = JournalWriter(world.studio.journal, Events())
        group.start_soon(writer.flush_loop, pause)
        await writer.remove_caller(job.entry.key)
        assert writer.has_unwritten
        while writer.has_unwritten:
            await anyio.sleep(0)
        group.cancel_scope.cancel()
    assert attempts[:3] == [job.entry.key] * 3
    assert 0 < sum(pauses) < 1
