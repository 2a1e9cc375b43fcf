"""A new API key keeps the history of the profile. If EvoLink lets it read the earlier tasks, it continues their work."""

from __future__ import annotations

import json
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from conftest import KEY, Clock, HeldClock, Open, PlainSimulator, World

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

NEW = "sk-new-key-0123456789abcdef"
NEW_KEY = {"EVOLINK_API_KEY": NEW}
REQUEST = {"prompt": "a fox", "size": "1024x640", "quality": "low"}
SLOW = {**REQUEST, "prompt": "sim:slow=1000000 a fox", "wait_seconds": 0}
RUNNING = ("pending", "processing")  # the polls of the studio move the clock, so either is right
LIMIT = {"EVOLINK_MCP_MAX_CREDITS_PER_DAY": "0.3"}


async def no_pause(_: float) -> None:
    await anyio.sleep(0.001)


async def call(world: World, tool: str, **arguments: Any) -> dict[str, Any]:
    async with world.client() as client:
        return (await client.call_tool(tool, arguments)).structured_content


def reads_of(world: World, task_id: str, key: str = NEW) -> int:
    """Return how often a key read the task."""
    reads = [r for r in world.simulator.requests if r.path == f"/v1/tasks/{task_id}"]
    return sum(r.headers["authorization"] == f"Bearer {key}" for r in reads)


@pytest.fixture
def one_account() -> PlainSimulator:
    """Return a simulated EvoLink where both keys belong to one account."""
    return PlainSimulator(clock=Clock(), accounts={NEW: KEY})


async def test_the_history_stays_after_a_key_change(open_world: Open, one_account: PlainSimulator) -> None:
    clock: Any = one_account.clock
    async with open_world(simulator=one_account, clock=clock) as before:
        purchase = await call(before, "generate_image", **REQUEST)
        sums = (await call(before, "list_tasks"))["spent"]
    clock.now += 60
    async with open_world(NEW_KEY, simulator=one_account, clock=clock) as after:
        task_id = purchase["task_id"]
        task_list = await call(after, "list_tasks")
        edit = await call(after, "generate_image", **{**REQUEST, "image_urls": [f"evolink://images/{task_id}/0"]})
        async with after.client() as client:
            view = await client.call_tool("view_image", {"task_id": task_id})
            image = await client.read_resource(f"evolink://images/{task_id}/0")
            resource = await client.read_resource(f"evolink://tasks/{task_id}")
    (task,) = task_list["tasks"]
    assert (task["task_id"], task["paths"]) == (task_id, [purchase["images"][0]["path"]])
    assert "other_key" not in task
    assert task_list["spent"] == sums
    assert view.content[0].type == "image"
    assert len(image.contents) == 1
    assert json.loads(resource.contents[0].text)["notes"] == []
    assert edit["status"] == "completed"
    assert edit["references"][0]["task_id"] == task_id


@pytest.mark.parametrize("key", [NEW, "sk-foreign-key-0123456789ab"], ids=["same account", "another account"])
async def test_the_daily_limit_counts_the_purchases_of_all_keys(
    open_world: Open, one_account: PlainSimulator, key: str
) -> None:
    clock: Any = one_account.clock
    async with open_world(LIMIT, simulator=one_account, clock=clock) as before:
        await call(before, "generate_image", **REQUEST)
    async with open_world({**LIMIT, "EVOLINK_API_KEY": key}, simulator=one_account, clock=clock) as after:
        refusal = await call(after, "generate_image", **REQUEST)
        assert (refusal["error"]["code"], after.posts) == ("over_budget", 1)


async def test_the_new_key_follows_a_running_task(open_world: Open, one_account: PlainSimulator) -> None:
    clock: Any = one_account.clock
    one_account.duration_s = 500
    async with open_world(simulator=one_account, clock=clock) as before:
        purchase = await call(before, "generate_image", **{**REQUEST, "wait_seconds": 0})
    clock.now += 1000
    async with open_world(NEW_KEY, simulator=one_account, clock=clock, pause=no_pause) as after:
        while not after.files:  # no call is necessary
            await anyio.sleep(0.01)
        result = await call(after, "get_task", task_id=purchase["task_id"])
    assert (result["status"], result["notes"]) == ("completed", [])
    assert reads_of(after, purchase["task_id"]) >= 1


async def test_an_identical_call_with_the_new_key_gets_the_undelivered_purchase(
    open_world: Open, one_account: PlainSimulator
) -> None:
    clock: Any = one_account.clock
    one_account.duration_s = 500
    async with open_world(simulator=one_account, clock=clock) as before:
        purchase = await call(before, "generate_image", **{**REQUEST, "wait_seconds": 0})
    clock.now += 1000
    async with open_world(NEW_KEY, simulator=one_account, clock=clock) as after:
        repeat = await call(after, "generate_image", **REQUEST)
        assert (repeat["task_id"], repeat["status"], after.posts) == (purchase["task_id"], "completed", 1)


async def test_one_read_links_a_key_and_the_next_server_needs_none(
    open_world: Open, one_account: PlainSimulator
) -> None:
    clock: Any = one_account.clock
    async with open_world(simulator=one_account, clock=clock) as before:
        purchase = await call(before, "generate_image", **REQUEST)
    clock.now += 60
    for reads in (1, 1):
        async with open_world(NEW_KEY, simulator=one_account, clock=clock) as after:
            await call(after, "list_tasks")
            await call(after, "get_task", task_id=purchase["task_id"])
            assert reads_of(after, purchase["task_id"]) == reads
    async with open_world(simulator=one_account, clock=clock) as old:
        assert await old.studio.journal.read_links() == []


async def test_a_key_of_another_account_sees_the_history_and_touches_nothing(open_world: Open) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock)
    async with open_world(simulator=simulator, clock=clock) as before:
        purchase = await call(before, "generate_image", **SLOW)
        completed_purchase = await call(before, "generate_image", **REQUEST)
    clock.now += 60
    async with open_world(NEW_KEY, simulator=simulator, clock=clock, pause=no_pause) as after:
        task_list = await call(after, "list_tasks")
        text = (await _answer(after, "list_tasks")).content[0].text
        detail = await call(after, "list_tasks", detail=True)
        running_task = await call(after, "get_task", task_id=purchase["task_id"], wait_seconds=0)
        completed_task = await call(after, "get_task", task_id=completed_purchase["task_id"])
        async with after.client() as client:
            view = await client.call_tool("view_image", {"task_id": completed_purchase["task_id"]})
        repeat = await call(after, "generate_image", **SLOW)
        assert reads_of(after, completed_purchase["task_id"]) == 1  # the test of the account
        assert reads_of(after, purchase["task_id"]) == 0
        assert [job.entry.task_id for job in after.studio.jobs] == [repeat["task_id"]]
        assert after.posts == 3
    assert [task["other_key"] for task in task_list["tasks"]] == [True, True]
    assert text.count("bought with another key") == 2
    assert all("bought with another key" in task["notes"][0] for task in detail["tasks"])
    assert running_task["status"] in RUNNING
    assert (running_task["charged"], running_task["error"]["code"]) == ("unknown", "other_key")
    assert running_task["next_action"] is None
    assert (completed_task["status"], completed_task["error"]) == ("completed", None)
    assert "bought with another key" in completed_task["notes"][0]
    assert view.content[0].type == "image"
    assert repeat["task_id"] != purchase["task_id"]


async def _answer(world: World, tool: str) -> Any:
    async with world.client() as client:
        return await client.call_tool(tool, {})


async def test_the_first_key_continues_its_work_when_it_is_back(open_world: Open) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=500)
    async with open_world(simulator=simulator, clock=clock) as before:
        purchase = await call(before, "generate_image", **{**REQUEST, "wait_seconds": 0})
    clock.now += 1000
    async with (
        open_world(NEW_KEY, simulator=simulator, clock=clock) as second,
        open_world(simulator=simulator, clock=clock, pause=no_pause) as third,
    ):
        assert [task["status"] for task in (await call(second, "list_tasks"))["tasks"]] == ["pending"]
        assert second.studio.jobs == []
        result = await call(third, "get_task", task_id=purchase["task_id"])
        assert (result["status"], result["notes"]) == ("completed", [])
        task = await call(second, "get_task", task_id=purchase["task_id"])
    assert (task["status"], len(task["images"])) == ("completed", 1)


async def test_nothing_is_bought_while_the_account_of_a_new_key_is_unknown(open_world: Open) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, accounts={NEW: KEY})
    async with open_world(simulator=simulator, clock=clock) as before:
        purchase = await call(before, "generate_image", **{**SLOW, "prompt": "sim:slow=1000 a fox"})
    clock.now += 60
    gateway = Gateway(simulator)
    async with open_world(NEW_KEY, simulator=simulator, clock=clock, transport=gateway) as after:
        refusal = await call(after, "generate_image", **REQUEST)
        assert (refusal["charged"], refusal["error"]["retryable"]) == ("no", True)
        assert "belongs to the earlier purchases" in refusal["error"]["message"]
        assert after.posts == 1
        gateway.is_down = False
        repeat = await call(after, "generate_image", **{**SLOW, "prompt": "sim:slow=1000 a fox"})
        assert (repeat["task_id"], after.posts) == (purchase["task_id"], 1)


class Gateway(httpx.AsyncBaseTransport):
    """EvoLink behind a gateway that answers 503 to every read of a task while it `is_down`."""

    def __init__(self, simulator: PlainSimulator) -> None:
        self.is_down = True
        self._upstream = httpx.ASGITransport(simulator.app)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.is_down and request.url.path.startswith("/v1/tasks/"):
            return httpx.Response(503, json={"error": {"message": "down"}})
        return await self._upstream.handle_async_request(request)


async def test_a_learned_size_rule_moves_with_the_link(open_world: Open) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, rule="pixel-budget", accounts={NEW: KEY})
    order = {**REQUEST, "size": "16:9", "resolution": "2K"}
    async with open_world(simulator=simulator, clock=clock) as before:
        await call(before, "generate_image", **order)
        assert await before.studio.journal.fact("size_rule") == "pixel-budget"
    clock.now += 60
    async with open_world(NEW_KEY, simulator=simulator, clock=clock) as after:
        await call(after, "list_tasks")
        values = await call(after, "compute_size", size="16:9", resolution="2K")
    assert (values["rule"], values["rule_known"]) == ("pixel-budget", True)


async def test_servers_with_the_old_and_the_new_key_share_their_work(open_world: Open) -> None:
    """The polls of a running task must not move the clock: after a day, the same call would buy again."""
    clock = HeldClock()
    simulator = PlainSimulator(clock=clock, accounts={NEW: KEY})
    async with open_world(simulator=simulator, clock=clock) as old_world:
        await call(old_world, "generate_image", **REQUEST)
        clock.is_held = True
        async with open_world(NEW_KEY, simulator=simulator, clock=clock) as new_world:
            running_task = await call(new_world, "generate_image", **SLOW)
            task = await call(old_world, "get_task", task_id=running_task["task_id"], wait_seconds=0)
        assert (task["status"], task["error"], task["notes"]) == ("pending", None, [])
        repeat = await call(old_world, "generate_image", **SLOW)
        assert (repeat["task_id"], old_world.posts) == (running_task["task_id"], 2)


async def test_another_profile_has_its_own_history_and_limit(open_world: Open) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock)
    async with open_world(LIMIT, simulator=simulator, clock=clock) as first:
        purchase = await call(first, "generate_image", **REQUEST)
    async with open_world({**LIMIT, "EVOLINK_MCP_PROFILE": "Büro “2”"}, simulator=simulator, clock=clock) as second:
        assert (await call(second, "list_tasks"))["tasks"] == []
        assert (await call(second, "list_tasks", sync=True))["tasks"] == []
        own_purchase = await call(second, "generate_image", **REQUEST)
        assert own_purchase["status"] == "completed"
        assert own_purchase["task_id"] != purchase["task_id"]
        assert (await call(second, "generate_image", **REQUEST))["error"]["code"] == "over_budget"


async def test_a_task_that_evolink_does_not_know_yet_proves_nothing(open_world: Open) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock)
    async with open_world(simulator=simulator, clock=clock) as before:
        purchase = await call(before, "generate_image", **SLOW)
    hidden = simulator.tasks.pop(purchase["task_id"])
    simulator.accounts[NEW] = KEY
    async with open_world(NEW_KEY, simulator=simulator, clock=clock) as after:
        clock.now = hidden.created + 1
        refusal = await call(after, "generate_image", **REQUEST)
        assert (refusal["charged"], refusal["error"]["retryable"]) == ("no", True)
        simulator.tasks[hidden.id] = hidden
        repeat = await call(after, "generate_image", **SLOW)
        assert (repeat["task_id"], after.posts) == (purchase["task_id"], 1)


async def test_an_earlier_purchase_identifies_the_account_while_the_newest_one_is_too_young(
    open_world: Open,
) -> None:
    """EvoLink may answer "not found" for a task of the last seconds, to any key."""
    clock = Clock()
    simulator = PlainSimulator(clock=clock)

    async def order(prompt: str) -> float:
        async with open_world(simulator=simulator, clock=clock) as before:
            purchase = await call(before, "generate_image", **{**SLOW, "prompt": f"sim:slow=1000000 {prompt}"})
        return simulator.tasks.pop(purchase["task_id"]).created

    created_at = await order("a fox")
    async with open_world(NEW_KEY, simulator=simulator, clock=clock) as after:
        clock.now = created_at + 1
        refusal = await call(after, "generate_image", **REQUEST)
    assert (refusal["charged"], refusal["error"]["retryable"]) == ("no", True)
    assert "too young" in refusal["error"]["message"]
    assert refusal["error"]["advice"] == "Call again in 10 s."
    clock.now += 60
    created_at = await order("a hen")
    async with open_world(NEW_KEY, simulator=simulator, clock=clock) as after:
        clock.now = created_at + 1
        assert (await call(after, "generate_image", **REQUEST))["status"] == "completed"
    assert len(simulator.tasks) == 1
