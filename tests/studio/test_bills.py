"""Every bill is compared with its price ceiling: by one server, by four servers with a limit, and after a crash."""

from __future__ import annotations

import itertools
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import pytest
from conftest import Clock, Open, PlainSimulator, World

from evolink_mcp.api.sizes import RULES
from evolink_mcp.api.task import Task
from evolink_mcp.journal.entry import Entry, Phase, ResultImage
from evolink_mcp.simulator import rules
from evolink_mcp.simulator.simulation import SimulatedTask
from evolink_mcp.studio.prices import Prices, learn, read_changes

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

MEDIUM = {"prompt": "a fox", "size": "1:1", "quality": "medium"}
# The published price of MEDIUM is 3.2241 credits for the image. compute_size adds a long prompt for the ceiling.
PUBLISHED = 3.2241
CEILING = 3.54

Bill = Callable[[SimulatedTask], float]


def published_price(task: SimulatedTask) -> float:
    return rules.price(task.body, task.size, task.pictures)


def times(factor: float) -> Bill:
    return lambda task: round(published_price(task) * factor, 4)


def by_table(rule: str) -> Bill:
    def bill(task: SimulatedTask) -> float:
        size = rules.pixels(task.body["size"], task.body.get("resolution", "1K"), rule)
        return rules.price(task.body, size, task.pictures)

    return bill


def by_quality(quality: str) -> Bill:
    return lambda task: rules.price({**task.body, "quality": quality}, task.size, task.pictures)


class BillingSimulator(PlainSimulator):
    """A simulated EvoLink that charges by `bill`. A task keeps the price of its start."""

    def __init__(
        self, clock: Clock, bill: Bill = published_price, *, rule: str = "anchor-edge", reserve: Bill | None = None
    ) -> None:
        super().__init__(clock=clock, duration_s=0, rule=rule)
        self.bill = bill
        self.reserve = reserve
        self.bills: dict[str, float] = {}

    def view(self, task: SimulatedTask, *args: Any, **options: Any) -> dict[str, Any]:
        answer = super().view(task, *args, **options)
        if task.id not in self.bills:
            self.bills[task.id] = self.bill(task)
        usage = answer.get("usage", {})
        if "credits_reserved" in usage:
            usage["credits_reserved"] = self.reserve(task) if self.reserve else self.bills[task.id]
        if "credits_used" in usage:
            usage["credits_used"] = self.bills[task.id]
            usage["cost"] = {"credits": self.bills[task.id]}
        return answer


class Servers:
    """Several servers of one account, with a tool call as a method."""

    def __init__(self, worlds: list[World], simulator: BillingSimulator) -> None:
        self.worlds = worlds
        self.simulator = simulator
        self.orders = 0

    async def call(self, tool: str, server: int = 0, **arguments: Any) -> Any:
        async with self.worlds[server].client(rule_fresh_for_s=0.0) as client:
            return await client.call_tool(tool, arguments)

    async def order(self, server: int = 0, **options: Any) -> Any:
        """Order a new image. Return the structured answer with its first line of text as `headline`."""
        self.orders += 1
        answer = await self.call("generate_image", server, **{**MEDIUM, "prompt": f"fox {self.orders}", **options})
        return {**answer.structured_content, "headline": answer.content[0].text.splitlines()[0]}

    async def ceiling(self, server: int = 0, **options: Any) -> float:
        arguments = {"size": "1:1", "quality": "medium", **options}
        answer = await self.call("compute_size", server, **arguments)
        return answer.structured_content["credits_at_most"]


@pytest.fixture
def open_servers(open_world: Open) -> Any:
    @asynccontextmanager
    async def opened(
        bill: Bill = published_price,
        count: int = 1,
        *,
        reserve: Bill | None = None,
        rule: str = "anchor-edge",
        **limits: float,
    ) -> AsyncIterator[Servers]:
        clock = Clock()
        simulator = BillingSimulator(clock, bill, reserve=reserve, rule=rule)
        environ = {f"EVOLINK_MCP_{name.upper()}": str(value) for name, value in limits.items()}
        async with AsyncExitStack() as stack:
            worlds = [
                await stack.enter_async_context(open_world(environ, simulator=simulator, clock=clock))
                for _ in range(count)
            ]
            yield Servers(worlds, simulator)

    return opened


def is_change(answer: dict[str, Any]) -> bool:
    return "from now on" in answer["headline"]


async def test_the_first_line_of_a_series_names_its_bills(open_servers: Any) -> None:
    async with open_servers(times(1.7)) as servers:
        answer = await servers.call("generate_images", prompts=["a fox", "a hen"], size="1:1", quality="medium")
    facts = answer.structured_content
    headline = answer.content[0].text.splitlines()[0]
    # The second picture has the new ceiling if the server already knows the first bill.
    assert re.match(r"Bills that differ from the computed price: [12] of 2\. EvoLink charged 5\.4", headline)
    assert headline == f"{facts['bill_difference']} 2 of 2 pictures are saved (status completed)."
    assert "times the published ones" in facts["bill_difference"]
    assert facts["notes"] == []


async def test_a_series_at_published_prices_has_no_difference(open_servers: Any) -> None:
    async with open_servers() as servers:
        answer = await servers.call("generate_images", prompts=["a fox", "a hen"], size="1:1", quality="medium")
    assert answer.structured_content["bill_difference"] is None
    assert answer.content[0].text.startswith("2 of 2 pictures are saved")


async def test_the_first_line_of_a_list_names_a_bill_that_no_call_waited_for(open_servers: Any) -> None:
    async with open_servers(times(1.7), reserve=published_price) as servers:
        await servers.order(prompt="sim:slow=30 a fox", wait_seconds=0)
        (world,) = servers.worlds
        world.clock.now += 60
        async with anyio.create_task_group() as group:
            group.start_soon(_until_idle, world, group.cancel_scope)
        answers = [await servers.call("list_tasks") for _ in range(2)]
    first, second = (answer.content[0].text.splitlines()[0] for answer in answers)
    (note,) = answers[0].structured_content["notes"]
    assert "times the published ones" in note
    assert first == f"{note} {second}"
    assert answers[0].content[0].text.count(note) == 1


async def test_a_published_bill_is_no_difference(open_servers: Any) -> None:
    async with open_servers() as servers:
        for quality in ("low", "medium", "high"):
            answer = await servers.order(quality=quality)
            assert answer["bill_difference"] is None
            assert answer["headline"].startswith("Task ")


async def test_a_higher_bill_is_in_the_first_line_and_raises_every_later_ceiling(open_servers: Any) -> None:
    async with open_servers(times(1.7)) as servers:
        before = await servers.ceiling(quality="high")
        first = await servers.order()
        assert first["headline"].startswith("EvoLink charged 5.4")
        assert "more than the price ceiling of 3.23 credits" in first["headline"]
        assert is_change(first)
        assert "times the published ones" in first["bill_difference"]
        high = await servers.ceiling(quality="high")
        assert before * 1.69 <= high <= before * 1.72
        answer = await servers.call("compute_size", size="1:1", quality="high")
        assert any("times the published ones" in note for note in answer.structured_content["notes"])
        assert answer.structured_content["estimated_credits"] == pytest.approx(12.8961 * 1.7, rel=0.01)
        second = await servers.order(quality="high")
        assert second["bill_difference"] is None
        assert second["credits"] <= high


async def test_a_lower_bill_lowers_the_ceilings_and_is_reported_once(open_servers: Any) -> None:
    async with open_servers(times(0.8)) as servers:
        first = await servers.order()
        assert is_change(first)
        assert "0.8" in first["headline"]
        second = await servers.order()
        assert second["bill_difference"] is None
        assert PUBLISHED * 0.8 <= await servers.ceiling() < CEILING * 0.82


async def test_the_factor_follows_every_change_up_and_down(open_servers: Any) -> None:
    async with open_servers() as servers:
        for factor in (1.0, 1.7, 0.8, 1.0, 3.0):
            servers.simulator.bill = times(factor)
            reports = [is_change(await servers.order()) for _ in range(3)]
            assert reports == [factor != 1.0 or servers.orders > 3, False, False]
            assert CEILING * factor * 0.99 <= await servers.ceiling() <= CEILING * factor * 1.02


async def test_max_credits_holds_after_the_first_higher_bill(open_servers: Any) -> None:
    async with open_servers(lambda task: 40.0) as servers:
        assert (await servers.order(max_credits=4))["credits"] == 40
        for _ in range(2):
            refusal = await servers.order(max_credits=4)
            assert refusal["error"]["code"] == "over_budget"
            assert refusal["charged"] == "no"
        assert len(servers.simulator.tasks) == 1


async def test_the_reservation_of_a_running_task_warns_before_its_end(open_servers: Any) -> None:
    async with open_servers(times(1.7)) as servers:
        running = await servers.order(prompt="sim:slow=1000000 a fox", wait_seconds=0)
        assert running["status"] in ("pending", "processing")
        assert running["headline"].startswith("EvoLink reserved 5.4")
        assert await servers.ceiling() > CEILING * 1.69
        task_list = await servers.call("list_tasks")
        assert task_list.structured_content["reserved"]["today"]["credits"] > PUBLISHED * 1.7


async def test_a_reservation_above_the_final_charge_changes_no_price(open_servers: Any) -> None:
    async with open_servers(published_price, reserve=times(1.5)) as servers:
        answers = [await servers.order() for _ in range(3)]
        assert not any(is_change(answer) for answer in answers)
        assert await servers.ceiling() == CEILING
        assert [answer["bill_difference"] for answer in answers] == [None, None, None]


async def test_a_bill_of_a_lower_quality_is_a_possible_downgrade_and_changes_no_ceiling(open_servers: Any) -> None:
    async with open_servers(by_quality("low")) as servers:
        before = await servers.ceiling(quality="high")
        answers = [await servers.order(quality="high") for _ in range(2)]
        for answer in answers:
            assert "price of quality low, the request was for high" in answer["headline"]
            assert "may be lower than requested" in answer["headline"]
        assert [is_change(answer) for answer in answers] == [True, False]
        assert await servers.ceiling(quality="high") == before
        servers.simulator.bill = published_price
        last = await servers.order(quality="high")
        assert "charges high at its own price again" in last["headline"]


async def test_a_bill_of_a_higher_quality_raises_the_ceiling_of_the_lower_one(open_servers: Any) -> None:
    async with open_servers(by_quality("high")) as servers:
        first = await servers.order(quality="low")
        assert "price of quality high" in first["headline"]
        assert await servers.ceiling(quality="low") >= first["credits"]
        assert await servers.ceiling(quality="medium") == CEILING
        assert (await servers.order(quality="low"))["credits"] <= await servers.ceiling(quality="low")
        assert len(servers.simulator.tasks) == 2


@pytest.mark.parametrize("rule", RULES)
async def test_a_bill_by_the_other_size_table_raises_the_ceilings_of_that_table(open_servers: Any, rule: str) -> None:
    """The images follow one table, the bills the other one."""
    (second,) = set(RULES) - {rule}
    wide = {"size": "16:9", "resolution": "2K"}
    async with open_servers(rule=rule) as servers:
        first = await servers.order(**wide)
        assert any("from now on" in note for note in first["notes"])
        assert first["bill_difference"] is None
        servers.simulator.bill = by_table(second)
        answers = [await servers.order(**wide) for _ in range(3)]
        assert [is_change(answer) for answer in answers] == [True, False, False]
        assert f"charges by its {second} table" in answers[0]["headline"]
        ceiling = await servers.ceiling(**wide)
        assert all(answer["credits"] <= ceiling for answer in answers)
        servers.simulator.bill = published_price
        assert is_change(await servers.order(**wide))


async def test_the_pixels_correct_the_factor_that_the_reservation_showed(open_servers: Any) -> None:
    """While the table is unknown, a reservation of the more expensive table looks like a higher factor."""
    wide = {"size": "16:9", "resolution": "2K"}
    async with open_servers(times(1.7), rule="pixel-budget") as servers:
        first = await servers.order(**wide)
        assert is_change(first)
        assert any("pixel-budget table" in note for note in first["notes"])
        await servers.ceiling()
        factor = servers.worlds[0].studio.prices.current.factor
        assert factor == pytest.approx(1.7, rel=0.01)
        assert (await servers.order(**wide))["bill_difference"] is None


async def test_the_pixels_replace_the_conclusion_from_the_reservation() -> None:
    body = {"prompt": "a fox", "size": "16:9", "resolution": "2K", "quality": "medium"}
    charge = round(rules.price(body, (2736, 1536), 1) * 1.7, 4)
    task = Task("task-unified-1", created=1.0, credits_reserved=charge)
    entry = Entry("k" * 32, "server", Phase.SUBMITTED, 1.0, request=body, estimate=3.7, account="a1", task=task)
    facts = learn(entry, {})
    assert Prices.from_facts(facts).factor > 2.4
    settled_task = replace(task, status="completed", credits_used=charge, results=("https://cdn.evolink.ai/1.png",))
    image = ResultImage(0, "https://cdn.evolink.ai/1.png", 9e9, path="/x.png", width=2736, height=1536)
    facts |= learn(replace(entry, task=settled_task, images=(image,)), facts)
    prices = Prices.from_facts(facts)
    assert prices.factor == pytest.approx(1.7, rel=0.01)
    assert (prices.rule, prices.bills.rule) == ("pixel-budget", None)
    assert set(read_changes(facts["price_changes"])) == {"factor", "size_rule"}


async def test_the_charge_replaces_the_conclusion_from_the_reservation_of_the_same_task() -> None:
    """Both equal the published price of another quality, on an account with a lower factor."""
    body = {"prompt": "a fox", "size": "16:9", "resolution": "1K", "quality": "low"}
    pixels = (2048, 1152)
    charge = round(rules.price({**body, "quality": "medium"}, pixels, 1), 4)
    lower = round(rules.price(body, pixels, 1) * 0.8, 4)
    url = "https://cdn.evolink.ai/1.png"
    image = ResultImage(0, url, 9e9, path="/x.png", width=pixels[0], height=pixels[1])
    facts: dict[str, str] = {}
    for number, credits in enumerate((lower, charge), start=1):
        created_at = float(number)
        task = Task(f"task-unified-{number}", created=created_at, credits_reserved=credits)
        entry = Entry("k" * 32, "server", Phase.SUBMITTED, created_at, request=body, account="a1", task=task)
        facts |= learn(entry, facts)
        settled_task = replace(task, status="completed", credits_used=credits, results=(url,))
        facts |= learn(replace(entry, task=settled_task, images=(image,)), facts)
    bills = Prices.from_facts(facts).bills
    assert (bills.factor, bills.qualities) == (1.0, {"low": "medium"})


async def test_a_lost_answer_is_matched_by_the_price_factor_of_the_account(open_servers: Any) -> None:
    async with open_servers(times(3.0)) as servers:
        await servers.order()
        lost_task = await servers.order(prompt="sim:lost-reply a fox")
        assert lost_task["guess"]
        assert lost_task["task_id"] in servers.simulator.tasks


async def test_four_servers_cross_a_limit_by_one_task_for_each_change(open_servers: Any) -> None:
    """Four servers order at the same time. Each change is reported once over all of them."""
    limit = 130.0
    changes = [times(1.7), times(0.8), by_quality("high"), times(2.5)]
    answers: list[dict[str, Any]] = []
    async with open_servers(count=4, max_credits_per_day=limit) as servers:

        async def order(server: int) -> None:
            answers.append(await servers.order(server))

        for number, bill in enumerate([published_price, *changes]):
            servers.simulator.bill = bill
            for _ in range(1 if number < len(changes) else 3):
                async with anyio.create_task_group() as group:
                    for server in range(4):
                        group.start_soon(order, server)
            assert sum(map(is_change, answers)) == number
        refusals = [answer for answer in answers if answer["error"]]
        assert {answer["error"]["code"] for answer in refusals} == {"over_budget"}
        bills = list(servers.simulator.bills.values())
        sums = list(itertools.accumulate(bills))
        assert sum(each > limit for each in sums) <= len(changes)
        task_list = (await servers.call("list_tasks", 3)).structured_content
        assert task_list["spent"]["today"]["credits"] == pytest.approx(sums[-1], abs=0.001)
        assert task_list["reserved"]["today"]["credits"] == 0


@pytest.mark.parametrize("factor", [0.8, 1.7])
async def test_four_servers_at_once_report_a_change_once(open_servers: Any, factor: float) -> None:
    async with open_servers(times(factor), count=4) as servers:
        answers: list[dict[str, Any]] = []

        async def order(server: int) -> None:
            answers.append(await servers.order(server))

        async with anyio.create_task_group() as group:
            for server in range(4):
                group.start_soon(order, server)
        assert sum(is_change(answer) for answer in answers) == 1
        assert await servers.ceiling(3) >= PUBLISHED * factor


async def test_a_server_that_knows_a_table_reads_a_new_one_with_the_limit_check(open_servers: Any) -> None:
    """The first server learns the more expensive table. The second one knew the other table, and its limit is between both."""
    wide = {"size": "16:9", "resolution": "2K"}
    async with open_servers(count=2, max_credits_per_call=11) as servers:
        for server in (0, 1):
            await servers.order(server, quality="low", **wide)
        assert await servers.ceiling(1, quality="high", **wide) < 11
        servers.simulator.rule = "pixel-budget"
        await servers.order(0, quality="low", **wide)
        refusal = await servers.order(1, quality="high", **wide)
        assert refusal["error"]["code"] == "over_budget"
        assert all(task.body["quality"] == "low" for task in servers.simulator.tasks.values())


async def test_a_change_that_no_call_waited_for_is_reported_by_the_next_server(open_world: Open) -> None:
    """The rule is in the journal with the image, so a server that stops in between loses nothing."""
    clock = Clock()
    simulator = BillingSimulator(clock, times(1.7), rule="pixel-budget")
    async with open_world(simulator=simulator, clock=clock) as world, world.client() as client:
        arguments = {"prompt": "a fox", "size": "16:9", "resolution": "2K", "quality": "low", "wait_seconds": 0}
        await client.call_tool("generate_image", {**arguments, "prompt": "sim:slow=30 a fox"})
        await world.studio.take_price_changes()
        clock.now += 60
        async with anyio.create_task_group() as group:
            group.start_soon(_until_idle, world, group.cancel_scope)
    async with open_world(simulator=simulator, clock=clock) as world, world.client() as client:
        answers = [await client.call_tool("list_tasks", {}) for _ in range(2)]
    notes = [answer.structured_content["notes"] for answer in answers]
    assert any("pixel-budget table" in note for note in notes[0])
    assert notes[1] == []


async def _until_idle(world: World, scope: anyio.CancelScope) -> None:
    while not world.studio.is_idle:
        await anyio.lowlevel.checkpoint()
    scope.cancel()
