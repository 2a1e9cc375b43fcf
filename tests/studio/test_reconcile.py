"""A lost answer is matched only with a task that contradicts nothing, in any form of the account's task list."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import httpx2 as httpx
import pytest
from conftest import KEY, Clock, Open, PlainSimulator, World

from evolink_mcp.api.task import Task
from evolink_mcp.journal.entry import Entry
from evolink_mcp.studio.reconcile import contradicts

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

REQUEST = {"prompt": "a fox", "size": "1024x640", "quality": "low"}
NOW = 1_790_000_000.0
PRICE = 0.1983
OLD_KEY = "sk-former-0123456789"


class LosesAnswers(httpx.ASGITransport):
    """Loses the answers of purchases. With `refuses_purchases` EvoLink gets no purchase.

    `skew_s` is the time by which its clock is ahead in the `Date` header.
    """

    def __init__(
        self, simulator: PlainSimulator, *, refuses_purchases: bool = False, skew_s: float | None = None
    ) -> None:
        super().__init__(simulator.app)
        self._simulator, self.refuses_purchases, self._skew_s = simulator, refuses_purchases, skew_s

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/images/generations":
            if not self.refuses_purchases:
                await super().handle_async_request(request)
            return httpx.Response(502, stream=httpx.ByteStream(b"<html>"))
        reply = await super().handle_async_request(request)
        if self._skew_s is not None:
            moment = datetime.fromtimestamp(self._simulator.clock() + self._skew_s, UTC)
            reply.headers["date"] = format_datetime(moment, usegmt=True)
        return reply


async def buy(world: World, **options: Any) -> tuple[dict[str, Any], str]:
    async with world.client() as client:
        answer = await client.call_tool("generate_image", {**REQUEST, **options})
    return answer.structured_content, answer.content[0].text


@pytest.mark.parametrize("list_times", ["number", "iso", "none"])
async def test_the_task_is_found_in_every_form_of_the_list(open_world: Open, list_times: str) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0, list_times=list_times)
    async with open_world(simulator=simulator, clock=clock, transport=LosesAnswers(simulator)) as world:
        facts, text = await buy(world)
    assert (facts["guess"], facts["charged"], facts["status"], facts["credits"]) == (True, "unknown", "completed", None)
    assert text.splitlines()[0].startswith("Unconfirmed match, a guess: ")
    assert [facts["task_id"]] == list(simulator.tasks)
    assert world.posts == 1


@pytest.mark.parametrize("list_times", ["number", "iso", "none"])
async def test_a_purchase_from_the_web_page_is_not_matched_with_an_unbilled_post(
    open_world: Open, list_times: str
) -> None:
    """The POST got a 502 and made no task. The user bought something more expensive on EvoLink's page."""
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0, list_times=list_times)
    transport = LosesAnswers(simulator, refuses_purchases=True)
    async with open_world(simulator=simulator, clock=clock, transport=transport) as world:
        assert world.settings.key is not None
        other_request = {"model": "gpt-image-2", "prompt": "a duchess", "size": "2048x2048", "quality": "high"}
        simulator.create(other_request, key=world.settings.key.get_secret_value())
        facts, text = await buy(world)
        async with world.client() as client:
            task_list = (await client.call_tool("list_tasks", {"sync": True, "detail": True})).structured_content
    assert (facts["task_id"], facts["charged"], facts["status"]) == (None, "unknown", "unknown")
    assert not text.startswith("Unconfirmed match")
    (other_task,) = (task for task in task_list["tasks"] if task["task_id"])
    assert other_task["created_at"].startswith("2026-")
    assert not any("support" in note for task in task_list["tasks"] for note in task["notes"])


async def test_one_task_that_two_lost_orders_may_own_is_assigned_to_neither(open_world: Open) -> None:
    """One of two orders was billed and the task list does not show which. The error names the task ID."""
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0)
    transport = LosesAnswers(simulator, refuses_purchases=True)
    async with open_world(simulator=simulator, clock=clock, transport=transport) as world:
        await buy(world)
        transport.refuses_purchases = False
        facts, text = await buy(world, prompt="a hen")
    (task_id,) = simulator.tasks
    assert (facts["task_id"], facts["charged"]) == (None, "unknown")
    assert task_id in text


async def test_an_order_of_another_profile_may_own_the_task_too(open_world: Open) -> None:
    """Two windows with two profiles use one account. One of two lost orders was billed."""
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0)
    transport = LosesAnswers(simulator, refuses_purchases=True)
    options: Any = {"simulator": simulator, "clock": clock, "transport": transport}
    async with open_world(**options) as world, open_world({"EVOLINK_MCP_PROFILE": "second"}, **options) as second:
        await buy(world)
        transport.refuses_purchases = False
        facts, text = await buy(second, prompt="a hen")
    (task_id,) = simulator.tasks
    assert (facts["task_id"], facts["charged"]) == (None, "unknown")
    assert task_id in text


async def test_an_order_under_a_former_key_of_another_profile_may_own_the_task_too(open_world: Open) -> None:
    """Profile one continues the account of its former key. Profile two knows only the new key."""
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0)
    transport = LosesAnswers(simulator, refuses_purchases=True)
    options: Any = {"simulator": simulator, "clock": clock}
    async with open_world({"EVOLINK_API_KEY": OLD_KEY}, **options) as before:
        await buy(before, prompt="a harbour")
    for task in simulator.tasks.values():
        task.key = KEY
    async with (
        open_world(transport=transport, **options) as world,
        open_world({"EVOLINK_MCP_PROFILE": "second"}, transport=transport, **options) as second,
    ):
        await buy(world)
        transport.refuses_purchases = False
        facts, _ = await buy(second, prompt="a hen")
    assert (facts["task_id"], facts["guess"]) == (None, False)


async def test_a_key_of_another_account_searches_for_no_lost_answer_of_the_profile(open_world: Open) -> None:
    """Its account has a task that would fit. The lost answer belongs to the account that sent the order."""
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0)
    transport = LosesAnswers(simulator, refuses_purchases=True)
    async with open_world(simulator=simulator, clock=clock, transport=transport) as world:
        facts, _ = await buy(world)
        assert (facts["task_id"], facts["status"]) == (None, "unknown")
    foreign_key = "sk-foreign-key-0123456789ab"
    simulator.create({**REQUEST, "model": "gpt-image-2"}, key=foreign_key)
    async with (
        open_world({"EVOLINK_API_KEY": foreign_key}, simulator=simulator, clock=clock) as world,
        world.client() as client,
    ):
        task_list = (await client.call_tool("list_tasks", {"sync": True, "detail": True})).structured_content
        (entry,) = [entry for entry in await world.studio.journal.recent(9) if entry.request]
        assert world.studio.jobs == []
    (task,) = (task for task in task_list["tasks"] if task["status"] == "unknown")
    assert (task["task_id"], task["charged"]) == (None, "unknown")
    assert entry.task is None


@pytest.mark.parametrize("ahead_s", [-3 * 86_400.0, 3600.0])
async def test_a_clock_that_is_wrong_hides_no_task(open_world: Open, ahead_s: float) -> None:
    """EvoLink's `Date` header shows the difference of the two clocks."""
    clock, evolink_clock = Clock(), Clock()
    evolink_clock.now = clock.now + ahead_s
    simulator = PlainSimulator(clock=evolink_clock, duration_s=0)
    transport = LosesAnswers(simulator, skew_s=0.0)
    async with open_world(simulator=simulator, clock=clock, transport=transport) as world:
        async with world.client() as client:
            await client.call_tool("get_balance", {})
        facts, _ = await buy(world)
    assert [facts["task_id"]] == list(simulator.tasks)


def entry(**request: Any) -> Entry:
    return Entry("k", "o", "unknown", NOW, request={"model": "gpt-image-2", **REQUEST, **request}, estimate=PRICE)


@pytest.mark.parametrize(
    ("task", "skew_s", "expected"),
    [
        pytest.param({}, None, False, id="the same time"),
        pytest.param({"created": NOW + 100}, 0.0, False, id="while it was repeated"),
        pytest.param({"created": NOW - 30}, None, False, id="a little before, and the clocks are not known"),
        pytest.param({"created": NOW - 30}, 0.0, True, id="before it was ordered"),
        pytest.param({"created": NOW + 300}, 0.0, True, id="long after"),
        pytest.param({"created": NOW + 3600}, 3600.0, False, id="EvoLink's clock is an hour ahead"),
        pytest.param({"created": NOW}, 3600.0, True, id="an hour too early by EvoLink's clock"),
        pytest.param({"created": None}, None, True, id="no time at all"),
        pytest.param({"model": "nano-banana"}, None, True, id="another model"),
        pytest.param({"credits_reserved": PRICE}, None, False, id="the price reserved"),
        pytest.param({"credits_used": PRICE, "status": "completed"}, None, False, id="the price charged"),
        pytest.param({"credits_reserved": 9.0}, None, True, id="a dearer picture"),
        pytest.param({"credits_reserved": 2 * PRICE}, None, True, id="two pictures"),
        pytest.param({"credits_used": 0.05, "status": "completed"}, None, True, id="a cheaper picture"),
    ],
)
async def test_a_task_that_contradicts_the_entry_is_no_candidate(
    task: dict[str, Any], skew_s: float | None, expected: bool
) -> None:
    assert contradicts(entry(), Task("task-unified-1-a", **{"created": NOW, **task}), skew_s) is expected


async def test_a_request_that_leaves_the_size_to_evolink_fits_any_of_its_sizes() -> None:
    lost_entry = entry(size="auto", quality="high", n=2)
    fits = [
        credits
        for credits in (2.0, 5.0, 20.0, 50.0, 87.0, 90.0, 150.0)
        if not contradicts(lost_entry, Task("t", created=NOW, credits_used=credits), None)
    ]
    assert fits == [20.0, 50.0, 87.0]
