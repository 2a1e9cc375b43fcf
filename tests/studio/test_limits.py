"""A refusal by a spending limit names the largest size and quality that fit. One limit counts all profiles."""

from __future__ import annotations

import re
from typing import Any

import pytest
from conftest import Clock, Open, PlainSimulator, World

from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.errors import OverBudget
from evolink_mcp.journal.entry import Entry, Phase, new_key
from evolink_mcp.journal.journal import DailyLimitReached, Sums
from evolink_mcp.studio.jobs import ImageRequest
from evolink_mcp.studio.limits import SpendingLimits, largest_that_fits
from evolink_mcp.studio.prices import Prices

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]


async def order(world: World, **arguments: Any) -> Any:
    async with world.client() as client:
        answer = await client.call_tool("generate_image", {"prompt": "sim:fast a fox", **arguments})
        return answer.structured_content


def suggested_arguments(advice: str) -> dict[str, Any]:
    """Return the arguments that a refusal names as the largest that fit."""
    sentence = advice.partition("The largest that fits is ")[2].partition(": at most")[0]
    match = dict(re.findall(r'(\w+)="?([\w:]+)"?', sentence))
    return {name: int(value) if name == "n" else value for name, value in match.items()}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param({}, {"size": "1:1", "quality": "medium", "resolution": "1K"}, id="auto"),
        pytest.param(
            {"size": "16:9", "resolution": "4K", "quality": "high"},
            {"size": "16:9", "quality": "medium", "resolution": "2K"},
            id="a ratio",
        ),
        pytest.param({"size": "2048x1152", "quality": "high"}, {"size": "2048x1152", "quality": "medium"}, id="pixels"),
        pytest.param({"size": "1:1", "n": 10}, {"size": "1:1", "quality": "low", "resolution": "1K"}, id="ten images"),
    ],
)
async def test_a_refusal_names_the_largest_variant_and_that_variant_is_accepted(
    open_world: Open, arguments: dict[str, Any], expected: dict[str, Any]
) -> None:
    async with open_world({"EVOLINK_MCP_MAX_CREDITS_PER_DAY": "5"}) as world:
        refusal = await order(world, **arguments)
        advice = refusal["error"]["advice"]
        assert refusal["error"]["code"] == "over_budget"
        assert suggested_arguments(advice) == expected
        assert "midnight" not in advice
        assert "EVOLINK_MCP_MAX_CREDITS_PER_DAY" in advice
        second = await order(world, **{**arguments, **suggested_arguments(advice)})
        assert second["error"] is None


async def test_a_refusal_says_that_the_call_fits_tomorrow_and_names_the_credits_of_today(open_world: Open) -> None:
    async with open_world({"EVOLINK_MCP_MAX_CREDITS_PER_DAY": "5"}) as world:
        await order(world, size="1:1")
        refusal = await order(world, prompt="sim:fast a hen", size="1:1")
    assert "The limit starts again at midnight." in refusal["error"]["advice"]
    assert suggested_arguments(refusal["error"]["advice"])["quality"] == "low"
    assert "are spent" in refusal["error"]["message"]


async def test_the_refusal_says_that_nothing_fits(open_world: Open) -> None:
    async with open_world({"EVOLINK_MCP_MAX_CREDITS_PER_DAY": "0.01"}) as world:
        refusal = await order(world)
    assert "No size and quality fits." in refusal["error"]["advice"]


async def test_a_quality_above_the_requested_one_is_never_suggested() -> None:
    request = GenerationRequest(prompt="a fox", size="1:1", resolution="4K", quality="low")
    best = largest_that_fits(request, Prices(), 0.5)
    assert best is not None
    assert (best.quality, best.resolution) == ("low", "1K")


async def test_a_tenant_reads_the_name_of_its_own_limit() -> None:
    limits = SpendingLimits(per_day=5, tenant="anna")
    advice = limits.advice("EVOLINK_MCP_MAX_CREDITS_PER_DAY", "max_credits_per_day")
    assert advice == "The operator of this server sets max_credits_per_day of the tenant anna."


async def test_the_total_limit_counts_all_profiles(open_world: Open) -> None:
    """Each profile has its own limit of 5 credits, and all together have 8."""
    clock = Clock()
    simulator = PlainSimulator(clock=clock)
    limits = {"EVOLINK_MCP_MAX_CREDITS_PER_DAY": "5", "EVOLINK_MCP_TOTAL_CREDITS_PER_DAY": "8"}
    accepted_count = 0
    for name in ("anna", "bert", "cleo"):
        environ = {**limits, "EVOLINK_MCP_PROFILE": name}
        async with open_world(environ, simulator=simulator, clock=clock) as world:
            answer = await order(world, size="1:1")
            accepted_count += answer["error"] is None
            journal = world.studio.journal
            own_sums = await journal.sums_since(0)
            total = await journal.total_since(0)
    assert accepted_count == 2
    assert own_sums == Sums()
    assert 6 < total.total < 8
    assert "all users" in answer["error"]["message"]
    assert "EVOLINK_MCP_TOTAL_CREDITS_PER_DAY" in answer["error"]["advice"]
    assert len(simulator.tasks) == 2


@pytest.mark.parametrize("limit", ["CALL", "DAY"])
async def test_a_price_that_rose_after_it_was_computed_is_refused_before_the_post(open_world: Open, limit: str) -> None:
    """Another server learns the more expensive table between the price and the record of the entry."""
    request = GenerationRequest(prompt="a fox", size="16:9", resolution="2K", quality="high")
    async with open_world({f"EVOLINK_MCP_MAX_CREDITS_PER_{limit}": "11"}) as world:
        await world.studio.journal.save_fact("size_rule", "anchor-edge")
        prices = await world.studio.prices.refresh()
        stale = ImageRequest(request, prices.ceiling(request))
        assert stale.price_ceiling < 11
        await world.studio.journal.save_fact("size_rule", "pixel-budget")
        with pytest.raises(OverBudget, match=r"14\.7"):
            await world.studio.order(stale)
        assert world.posts == 0
        assert await world.studio.journal.recent(5) == []


async def test_the_transaction_of_an_entry_checks_the_sum_of_all_profiles(open_world: Open) -> None:
    clock = Clock()
    async with (
        open_world({"EVOLINK_MCP_PROFILE": "anna"}, clock=clock) as anna,
        open_world({"EVOLINK_MCP_PROFILE": "bert"}, clock=clock) as bert,
    ):

        def entry(world: World) -> Entry:
            journal = world.studio.journal
            return Entry(
                new_key(), journal.owner, Phase.INTENT, clock.now, estimate=3.0, account=journal.account, request={}
            )

        await anna.studio.journal.intend(entry(anna), day_limit=5.0, total_limit=5.0)
        with pytest.raises(DailyLimitReached) as refusal:
            await bert.studio.journal.intend(entry(bert), day_limit=5.0, total_limit=5.0)
        assert (refusal.value.is_total, refusal.value.sums) == (True, Sums(reserved=3.0))
        await bert.studio.journal.intend(entry(bert), day_limit=5.0, total_limit=6.0)
