"""The next server continues the work of the last one, and an undelivered purchase is returned to the next identical call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from conftest import Clock, Open, World
from faulty_gateway import CURRENT, ONE_SERVER, QuickSimulator
from faulty_journal import FaultyJournal
from mcp.client import Client

from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.journal.entry import Entry, new_key
from evolink_mcp.journal.sqlite import SqliteJournal
from evolink_mcp.studio.jobs import ImageRequest

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

REQUEST = {"prompt": "a fox", "size": "1024x640", "quality": "low"}
LONG = {**REQUEST, "prompt": "sim:slow=1000000 a fox"}
HANDLE = {**LONG, "wait_seconds": 0}


class LosesAnswers(httpx.ASGITransport):
    """Lose the answers of accepted purchases (`loses_answers`) or of the task list (`loses_lists`)."""

    def __init__(self, simulator: QuickSimulator) -> None:
        super().__init__(simulator.app)
        self.loses_answers = self.loses_lists = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.loses_lists and request.url.path == "/v1/tasks":
            raise httpx.ReadError("gone")
        reply = await super().handle_async_request(request)
        if self.loses_answers and request.url.path == "/v1/images/generations":
            raise httpx.ReadError("gone")
        return reply


@asynccontextmanager
async def lossy_world(open_world: Open, **options: Any) -> AsyncIterator[tuple[World, Client, LosesAnswers]]:
    clock = options.get("clock") or Clock()
    simulator = options.get("simulator") or QuickSimulator(clock=clock)
    transport = LosesAnswers(simulator)
    async with open_world(simulator=simulator, clock=clock, transport=transport) as world:
        CURRENT.studio = world.studio
        async with Client(ONE_SERVER) as client:
            yield world, client, transport


async def list_tasks(client: Client, **arguments: Any) -> list[dict[str, Any]]:
    answer = await client.call_tool("list_tasks", {"detail": True, **arguments})
    assert answer.is_error is False
    return answer.structured_content["tasks"]


async def wait_for_completed(client: Client, count: int) -> list[dict[str, Any]]:
    while True:
        tasks = await list_tasks(client)
        if sum(any(image["path"] for image in task["images"]) for task in tasks) == count:
            return tasks
        await anyio.sleep(0)


# --- the next server -----------------------------------------------------------------------------------------


async def test_the_next_server_completes_the_tasks_of_the_last_one(open_world: Open) -> None:
    clock = Clock()
    simulator = QuickSimulator(clock=clock, duration_s=500)
    async with open_world(simulator=simulator, clock=clock) as world, world.client() as client:
        for number in range(3):
            await client.call_tool("generate_image", {**REQUEST, "prompt": f"fox {number}", "wait_seconds": 0})
    clock.now += 1000
    async with open_world(simulator=simulator, clock=clock) as world, world.client() as client:
        tasks = await wait_for_completed(client, 3)
    assert [task["status"] for task in tasks] == ["completed"] * 3
    assert (world.posts, len(world.files)) == (3, 3)


async def test_images_with_expired_links_are_reported(open_world: Open) -> None:
    clock = Clock()
    simulator = QuickSimulator(clock=clock, duration_s=500)
    async with open_world(simulator=simulator, clock=clock) as world, world.client() as client:
        handle = await client.call_tool("generate_image", {**REQUEST, "wait_seconds": 0})
    clock.now += 26 * 3600
    async with open_world(simulator=simulator, clock=clock) as world, world.client() as client:
        answer = await client.call_tool("get_task", {"task_id": handle.structured_content["task_id"]})
    facts = answer.structured_content
    assert (facts["status"], facts["charged"]) == ("completed", "yes")
    assert "expired" in answer.content[0].text
    assert world.posts == 1


async def test_a_failed_download_is_tried_again_by_the_next_server(open_world: Open) -> None:
    clock = Clock()
    simulator = QuickSimulator(clock=clock, duration_s=0)

    class NoPictures(httpx.ASGITransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if request.url.path.startswith("/pictures/"):
                raise httpx.ConnectError("not now")
            return await super().handle_async_request(request)

    bad = NoPictures(simulator.app)
    async with open_world(simulator=simulator, clock=clock, transport=bad) as world, world.client() as client:
        answer = await client.call_tool("generate_image", REQUEST)
        facts = answer.structured_content
        assert answer.is_error
        assert (facts["charged"], facts["images"][0]["url"] is not None) == ("yes", True)
    async with open_world(simulator=simulator, clock=clock) as world, world.client() as client:
        await wait_for_completed(client, 1)
    assert (world.posts, len(world.files)) == (1, 1)


async def test_an_image_that_was_moved_away_is_downloaded_again_until_its_link_expires(open_world: Open) -> None:
    clock = Clock()
    simulator = QuickSimulator(clock=clock, duration_s=0)
    async with open_world(simulator=simulator, clock=clock) as world, world.client() as client:
        answer = await client.call_tool("generate_image", REQUEST)
        world.files[0].unlink()
        repeat = await client.call_tool("get_task", {"task_id": answer.structured_content["task_id"]})
    assert repeat.structured_content["images"][0]["path"] == str(world.files[0])
    assert world.posts == 1


@pytest.mark.journal_file
@pytest.mark.parametrize(("phase", "charged"), [("intent", "no"), ("sending", "unknown")])
async def test_the_charge_of_an_entry_of_a_dead_server_follows_from_its_phase(
    open_world: Open, tmp_path: Any, phase: Any, charged: str
) -> None:
    """Without the phase `sending` on the disk nothing was sent. With it, only EvoLink knows the outcome."""
    clock = Clock()
    async with open_world(simulator=QuickSimulator(clock=clock), clock=clock) as world, world.client() as client:
        dead = SqliteJournal(tmp_path / "data", world.studio.journal.account, clock=clock)
        entry = Entry(new_key(), dead.owner, phase, clock.now, request=REQUEST, account=dead.account, caller=dead.owner)
        await dead.intend(entry)
        await dead.close()
        await list_tasks(client)
        while (tasks := await list_tasks(client))[0]["error"] is None:
            await anyio.sleep(0)
    assert (tasks[0]["charged"], world.posts) == (charged, 0)
    assert tasks[0]["error"]["advice"] != ""


async def test_two_living_servers_do_not_touch_each_others_work(open_world: Open) -> None:
    clock = Clock()
    simulator = QuickSimulator(clock=clock, duration_s=1e6)
    async with (
        open_world(simulator=simulator, clock=clock) as first_world,
        open_world(simulator=simulator, clock=clock) as second_world,
        first_world.client() as first,
        second_world.client() as second,
    ):
        await first.call_tool("generate_image", HANDLE)
        assert len(await list_tasks(second)) == 1
        assert second_world.studio.jobs == []
        assert len(first_world.studio.jobs) == 1


# --- deduplicated or bought again ----------------------------------------------------------------------------


async def test_an_identical_call_returns_the_purchase_of_a_call_that_timed_out(open_world: Open) -> None:
    async with lossy_world(open_world) as (world, client, _):
        first = await client.call_tool("generate_image", HANDLE)
        second = await client.call_tool("generate_image", {**HANDLE, "quality": "low"})
        other_order = await client.call_tool("generate_image", {**HANDLE, "quality": "medium"})
    assert second.structured_content["task_id"] == first.structured_content["task_id"]
    assert other_order.structured_content["task_id"] != first.structured_content["task_id"]
    assert world.posts == 2


async def test_an_identical_call_buys_again_after_the_delivery(open_world: Open) -> None:
    clock = Clock()
    async with lossy_world(open_world, simulator=QuickSimulator(clock=clock, duration_s=0), clock=clock) as (
        world, client, _,
    ):  # fmt: skip
        answers = [await client.call_tool("generate_image", REQUEST) for _ in range(3)]
    assert len({answer.structured_content["task_id"] for answer in answers}) == 3
    assert (world.posts, len(world.files)) == (3, 3)


async def test_a_handle_that_get_task_has_completed_counts_as_received(open_world: Open) -> None:
    clock = Clock()
    async with lossy_world(open_world, simulator=QuickSimulator(clock=clock, duration_s=500), clock=clock) as (
        world, client, _,
    ):  # fmt: skip
        handle = await client.call_tool("generate_image", {**REQUEST, "wait_seconds": 0})
        await client.call_tool("get_task", {"task_id": handle.structured_content["task_id"]})
        await client.call_tool("generate_image", REQUEST)
    assert world.posts == 2


class CancellingClock(Clock):
    """A clock whose next sleep runs `cancel` first."""

    cancel: Callable[[], Awaitable[None]] | None = None

    async def sleep(self, seconds: float) -> None:
        if self.cancel is not None:
            await self.cancel()
            self.cancel = None
        await super().sleep(seconds)


async def test_a_call_that_overtakes_the_cancellation_of_the_same_call_gets_its_purchase(open_world: Open) -> None:
    """Over HTTP the cancellation is a separate request and may arrive after the second call."""
    clock = CancellingClock()
    async with open_world(clock=clock) as world:
        request = ImageRequest(GenerationRequest(prompt="sim:slow=60 a fox"), price_ceiling=9.0)
        first = await world.studio.order(request)
        while first.entry.task is None:
            await anyio.sleep(0)
        clock.cancel = lambda: world.studio.depart(first)
        second = await world.studio.order(request)
        assert (second is first, second.is_deduplicated) == (True, True)
    assert world.posts == 1


async def test_simultaneous_identical_calls_are_separate_purchases(open_world: Open) -> None:
    clock = Clock()
    answers: list[Any] = []
    async with lossy_world(open_world, simulator=QuickSimulator(clock=clock, duration_s=0), clock=clock) as (
        world, client, _,
    ):  # fmt: skip

        async def order() -> None:
            answers.append(await client.call_tool("generate_image", REQUEST))

        async with anyio.create_task_group() as calls:
            for _ in range(4):
                calls.start_soon(order)
    assert len({answer.structured_content["task_id"] for answer in answers}) == 4
    assert (world.posts, len(world.files)) == (4, 4)
    assert not any(note.startswith("This was bought") for a in answers for note in a.structured_content["notes"])


async def test_force_new_buys_although_a_purchase_is_undelivered(open_world: Open) -> None:
    async with lossy_world(open_world) as (world, client, _):
        first = await client.call_tool("generate_image", HANDLE)
        second = await client.call_tool("generate_image", {**HANDLE, "force_new": True})
    assert first.structured_content["task_id"] != second.structured_content["task_id"]
    assert world.posts == 2


async def test_a_failed_task_is_not_returned_to_the_next_call(open_world: Open) -> None:
    async with lossy_world(open_world) as (world, client, _):
        for _ in range(2):
            answer = await client.call_tool("generate_image", {**REQUEST, "prompt": "sim:fail a fox"})
            assert (answer.is_error, answer.structured_content["charged"]) == (True, "no")
    assert world.posts == 2


# --- unknown outcomes ----------------------------------------------------------------------------------------


async def test_the_only_candidate_is_matched_and_followed_to_its_image(open_world: Open) -> None:
    async with lossy_world(open_world) as (world, client, transport):
        transport.loses_answers = True
        answer = await client.call_tool("generate_image", REQUEST)
        facts = answer.structured_content
        assert (facts["charged"], facts["status"], facts["credits"]) == ("unknown", "completed", None)
        assert answer.content[0].text.startswith("Unconfirmed match, a guess: ")
        assert (await client.call_tool("list_tasks", {})).structured_content["spent"]["today"]["credits"] == 0
        confirmed = await client.call_tool("get_task", {"task_id": facts["task_id"]})
        facts = confirmed.structured_content
        assert (facts["charged"], facts["guess"]) == ("yes", False)
        listing = await client.call_tool("list_tasks", {})
        assert listing.structured_content["spent"]["today"]["credits"] == facts["credits"]
    assert (world.posts, len(world.files)) == (1, 1)


async def test_several_candidates_are_named_and_none_is_matched(open_world: Open) -> None:
    async with lossy_world(open_world) as (world, client, transport):
        for _ in range(2):
            world.simulator.create({"model": "gpt-image-2", **REQUEST}, key=_key(world))
        transport.loses_answers = True
        answer = await client.call_tool("generate_image", REQUEST)
        facts = answer.structured_content
    assert (answer.is_error, facts["charged"], facts["status"], facts["task_id"]) == (True, "unknown", "unknown", None)
    assert all(task_id in answer.content[0].text for task_id in world.simulator.tasks)
    assert facts["next_action"] == {"tool": "list_tasks", "arguments": {"sync": True}}
    assert world.posts == 1


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"created": -3600.0}, id="long before"),
        pytest.param({"created": 3600.0}, id="long after"),
        pytest.param({"known": True}, id="in the journal"),
    ],
)
async def test_tasks_that_contradict_the_request_are_not_matched(open_world: Open, other: dict[str, Any]) -> None:
    async with lossy_world(open_world) as (world, client, transport):
        if "known" in other:
            await client.call_tool("generate_image", LONG | {"wait_seconds": 0})
        else:
            world.simulator.create({"model": "gpt-image-2", "prompt": "x"}, key=_key(world))
            (task,) = world.simulator.tasks.values()
            task.created += other["created"]
        transport.loses_answers = True
        answer = await client.call_tool("generate_image", {**REQUEST, "prompt": "sim:500 nothing is created"})
    assert (answer.structured_content["charged"], answer.structured_content["task_id"]) == ("unknown", None)


async def test_a_lost_answer_is_listed_and_matched_when_the_task_list_is_readable_again(open_world: Open) -> None:
    async with lossy_world(open_world) as (world, client, transport):
        transport.loses_answers = transport.loses_lists = True
        lost = await client.call_tool("generate_image", REQUEST)
        assert (lost.structured_content["charged"], lost.structured_content["task_id"]) == ("unknown", None)
        (before,) = await list_tasks(client, status="unknown")
        assert (before["charged"], before["status"]) == ("unknown", "unknown")
        second_list = await client.call_tool("list_tasks", {"sync": True})
        assert (second_list.is_error, second_list.structured_content["synced"]) == (False, False)
        transport.loses_lists = False
        await client.call_tool("list_tasks", {"sync": True})
        tasks = await wait_for_completed(client, 1)
    assert [(task["charged"], task["status"]) for task in tasks] == [("unknown", "completed")]
    assert world.posts == 1


async def test_two_lost_purchases_of_one_moment_are_not_matched(open_world: Open) -> None:
    """Nothing shows which task belongs to which call. Both stay unknown, and both errors name both tasks."""
    async with lossy_world(open_world) as (world, client, transport):
        transport.loses_answers = transport.loses_lists = True
        await client.call_tool("generate_image", REQUEST)
        await client.call_tool("generate_image", {**REQUEST, "prompt": "a hen"})
        transport.loses_lists = False
        await client.call_tool("list_tasks", {"sync": True})
        tasks = [task for task in await list_tasks(client) if task["task_id"] is None]
    assert [task["charged"] for task in tasks] == ["unknown", "unknown"]
    assert all(task_id in task["error"]["advice"] for task in tasks for task_id in world.simulator.tasks)


async def test_a_journal_that_fails_after_the_post_does_not_hide_the_task(open_world: Open) -> None:
    """The caller receives the task ID. `sending` is on disk, so the next server searches for the task."""
    from evolink_mcp.errors import JournalUnwritable

    clock = Clock()
    simulator = QuickSimulator(clock=clock, duration_s=1e6)
    options: Any = {"simulator": simulator, "clock": clock, "wrap_journal": FaultyJournal}
    async with open_world(**options) as world, world.client() as client:
        journal: Any = world.studio.journal

        async def update(write: Any, entry: Entry, *facts: Any) -> bool:
            if entry.phase != "sending":
                raise JournalUnwritable("the disk is full")
            return await write(entry, *facts)

        journal.replacements["update"] = update
        answer = await client.call_tool("generate_image", HANDLE)
        assert answer.structured_content["task_id"] in simulator.tasks
    simulator.duration_s = 0
    for task in simulator.tasks.values():
        task.duration = 0
    async with open_world(simulator=simulator, clock=clock) as world, world.client() as client:
        tasks = await wait_for_completed(client, 1)
    assert [task["task_id"] for task in tasks] == list(simulator.tasks)
    assert world.posts == 1


def _key(world: World) -> str:
    assert world.settings.key is not None
    return world.settings.key.get_secret_value()
