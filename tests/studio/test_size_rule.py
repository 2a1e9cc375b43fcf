"""Real pixels and prices: the server learns the size rule from an image, and no charge is above the price ceiling."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from conftest import Clock, Open, PlainSimulator, World

from evolink_mcp.api import costs, models, sizes
from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.api.size_grammar import legal_value
from evolink_mcp.journal.entry import account_id_of
from evolink_mcp.journal.sqlite import SqliteJournal
from evolink_mcp.simulator import rules
from evolink_mcp.studio.prices import AccountPrices, price_of

RATIOS = models.DEFAULT_MODEL.limits.ratios
pytestmark = pytest.mark.anyio

WIDE = {"prompt": "sim:fast a fox", "size": "16:9", "resolution": "2K", "quality": "low"}
OTHER_KEY = {"EVOLINK_API_KEY": "sk-another-0123456789abcdef"}
PIXELS = {"anchor-edge": (2048, 1152), "pixel-budget": (2736, 1536)}


@pytest.fixture(autouse=True)
async def in_time() -> AsyncIterator[None]:
    with anyio.fail_after(300):
        yield


async def call(world: World, tool: str, **arguments: Any) -> dict[str, Any]:
    async with world.client(rule_fresh_for_s=0.0) as client:
        return (await client.call_tool(tool, arguments)).structured_content


async def compute_size(world: World) -> tuple[int, int, str, bool]:
    out = await call(world, "compute_size", size="16:9", resolution="2K")
    return out["width"], out["height"], out["rule"], out["rule_known"]


def has_learned(facts: dict[str, Any]) -> bool:
    return any("from now on" in note for note in facts["notes"])


@pytest.mark.parametrize("rule", sizes.RULES)
async def test_the_rule_is_learned_once_from_a_picture_and_used_by_every_server_of_the_account(
    open_world: Open, rule: str
) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, rule=rule)
    async with (
        open_world(simulator=simulator, clock=clock) as first_world,
        open_world(simulator=simulator, clock=clock) as third_world,
        open_world(OTHER_KEY, simulator=simulator, clock=clock) as second_world,
    ):
        assert await compute_size(first_world) == await compute_size(third_world) == (2048, 1152, "anchor-edge", False)
        first = await call(first_world, "generate_image", **WIDE)
        assert first["expected_size"] == {"width": 2048, "height": 1152}
        assert (first["images"][0]["width"], first["images"][0]["height"]) == PIXELS[rule]
        assert has_learned(first)
        assert any("Computed 2048×1152" in note for note in first["notes"]) == (rule == "pixel-budget")
        second = await call(first_world, "generate_image", **{**WIDE, "prompt": "sim:fast a hen"})
        assert second["expected_size"] == dict(zip(("width", "height"), PIXELS[rule], strict=True))
        assert second["notes"] == []
        assert await compute_size(third_world) == (*PIXELS[rule], rule, True)
        assert await compute_size(second_world) == (2048, 1152, "anchor-edge", False)
        repeat = await call(first_world, "get_task", task_id=first["task_id"])
        assert repeat["expected_size"] == {"width": 2048, "height": 1152}  # an entry keeps its rule
    async with open_world(simulator=simulator, clock=clock) as later:
        assert await compute_size(later) == (*PIXELS[rule], rule, True)


async def test_a_pinned_rule_stays_and_the_difference_is_reported(open_world: Open) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, rule="pixel-budget")
    environ = {"EVOLINK_SIZE_RULE": "anchor-edge"}
    async with open_world(environ, simulator=simulator, clock=clock) as world:
        for prompt in ("sim:fast a fox", "sim:fast a hen"):
            facts = await call(world, "generate_image", **{**WIDE, "prompt": prompt})
            assert any("Computed 2048×1152" in note for note in facts["notes"])
        assert (await compute_size(world))[:3] == (2048, 1152, "anchor-edge")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"size": "1:1"}, id="both tables agree"),
        pytest.param({"size": "2048x1152"}, id="explicit pixels"),
        pytest.param({"size": "auto"}, id="auto"),
        pytest.param({"size": "16:9", "prompt": "sim:fast sim:other-size a fox"}, id="in neither table"),
    ],
)
async def test_an_image_that_proves_no_rule_changes_none(open_world: Open, changes: dict[str, Any]) -> None:
    clock = Clock()
    async with open_world(simulator=PlainSimulator(clock=clock, rule="pixel-budget"), clock=clock) as world:
        facts = await call(world, "generate_image", **{**WIDE, **changes, "resolution": "1K"})
        assert not has_learned(facts)
        assert (await compute_size(world))[3] is False
    assert any("Neither of EvoLink's tables" in note for note in facts["notes"]) == ("prompt" in changes)


async def test_while_the_rule_is_unknown_the_limits_use_the_higher_price(open_world: Open) -> None:
    """At 16:9 in 2K, high, the page's table costs 10.37 credits and the other one 14.76."""
    clock = Clock()
    simulator = PlainSimulator(clock=clock, rule="anchor-edge")
    high = {**WIDE, "quality": "high"}
    for name in ("CALL", "DAY"):
        async with open_world({f"EVOLINK_MCP_MAX_CREDITS_PER_{name}": "11"}, simulator=simulator, clock=clock) as world:
            refusal = await call(world, "generate_image", **high)
            assert refusal["error"]["code"] == "over_budget"
            assert "14.77 credits ($0.2172)" in refusal["error"]["message"]
    assert not simulator.tasks
    async with open_world({"EVOLINK_MCP_MAX_CREDITS_PER_CALL": "11"}, simulator=simulator, clock=clock) as world:
        await call(world, "generate_image", **WIDE)  # it teaches that the page's table holds
        assert (await call(world, "generate_image", **high))["status"] == "completed"


@pytest.mark.parametrize("size", ["16:9", "auto", "1024x640"])
async def test_the_price_ceiling_is_accepted_as_max_credits(size: str, open_world: Open) -> None:
    async with open_world() as world:
        for quality, n in itertools.product(("low", "high"), (1, 3)):
            answer = await call(world, "compute_size", size=size, quality=quality, n=n)
            facts = await call(world, "generate_image", prompt="sim:fast " + "x" * 900, size=size, quality=quality,
                                n=n, max_credits=answer["credits_at_most"])  # fmt: skip
            assert facts["status"] == "completed", (size, quality, n)
            assert facts["credits"] <= answer["credits_at_most"]


@pytest.mark.parametrize("prompt", ["x", "a fox " * 300, "ein Füchslein " * 40, "狐" * 500, "🦊" * 200])
async def test_the_charge_is_never_above_the_price_ceiling(prompt: str) -> None:
    """The simulator computes the charge with its own formula, for both tables."""
    links = [f"https://cdn.evolink.ai/{number}.png" for number in range(16)]
    for size, tier, quality, n, references in itertools.product(
        (*RATIOS, "auto", "1024x640", "2880x2880"),
        models.TIERS,
        ("low", "medium", "high"),
        (1, 3),
        (0, 1, 16),
    ):
        body: dict[str, Any] = {"prompt": prompt, "size": size, "resolution": tier, "quality": quality, "n": n}
        if references:
            body["image_urls"] = links[:references]
        price_ceiling = price_of(GenerationRequest.model_validate(body), sizes.RULES)
        for rule in sizes.RULES:
            pixels = (2880, 2880) if size == "auto" else rules.pixels(size, tier, rule)
            charge = rules.price(body, pixels, n)
            assert charge <= price_ceiling, (body, rule)
        assert price_ceiling == round(price_ceiling, 2)


async def test_a_learned_rule_is_saved_for_the_account(tmp_path: Any) -> None:
    first, second, keyless = (
        SqliteJournal(tmp_path, identity) for identity in (account_id_of("a", "u"), account_id_of("b", "u"), "")
    )
    assert await keyless.fact("size_rule") is None
    assert not list(tmp_path.iterdir())
    await first.save_fact("size_rule", "pixel-budget")
    assert (await first.fact("size_rule"), await second.fact("size_rule")) == ("pixel-budget", None)
    assert await keyless.fact("size_rule") == "pixel-budget"
    await second.save_fact("size_rule", "anchor-edge")
    assert await keyless.fact("size_rule") is None
    with pytest.raises(ValueError, match="not one of"):
        AccountPrices(first, "golden-ratio")
    for journal in (first, second, keyless):
        await journal.close()


# --- words and prices ----------------------------------------------------------------------------------------

WORDS = {
    "16x9": "16:9", "9:16 vertical": "9:16", "1.91:1": "1200x640", "2.35:1": "1584x672", "1,024x1,024": "1024x1024",
    "1080p": "1920x1088", "4k": "3840x2160", "A4": "1456x2064", "portrait": "2:3", "square": "1:1", "16/9": "16:9",
    "1920 x 1080 px": "1920x1088", "landscape 16:9": "16:9", "4K UHD": "3840x2160",
}  # fmt: skip


@pytest.mark.parametrize(("word", "value"), WORDS.items())
async def test_a_word_for_a_size_is_refused_with_its_value_and_answered_in_compute_size(
    world: World, word: str, value: str
) -> None:
    refusal = await call(world, "generate_image", prompt="a fox", size=word)
    assert (refusal["charged"], f'size="{value}"' in refusal["error"]["message"]) == ("no", True)
    answer = await call(world, "compute_size", size=word)
    assert answer["error"] is None
    assert str(sizes.resolve(value).size) == answer["explicit_size"]
    assert any(f'size="{value}"' in note for note in answer["notes"])


@pytest.mark.parametrize(
    "text", ["auto", "16:9", "-1024x1024", "1024x640", "1024X640", "fox", "", "16:10", "3000x2000", "0x0", "x" * 99]
)
async def test_a_legal_or_unknown_size_has_no_suggestion(text: str) -> None:
    assert legal_value(text) is None


async def test_one_call_lists_the_other_qualities_and_tiers(world: World) -> None:
    answer = await call(world, "compute_size", size="16:9", resolution="2K", quality="medium", n=2)
    assert len(answer["prices"]) == 8
    match = next(p for p in answer["prices"] if (p["quality"], p["resolution"]) == ("high", "4K"))
    assert match["size"] == "3840x2160"
    assert match["credits"] == costs.price(sizes.Size(3840, 2160), "high", 2).credits
    assert match["usd"] == round(match["credits"] / 68, 4)
    assert match["credits_at_most"] >= match["credits"]
    plain = await call(world, "compute_size", size="1024x640")
    assert [(p["quality"], p["resolution"]) for p in plain["prices"]] == [("low", None), ("high", None)]


# --- differences of the delivered image ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "note_text"),
    [
        pytest.param({"output_format": "webp"}, None, id="as asked"),
        pytest.param(
            {"background": "transparent", "output_format": "png"},
            "75 % of the pixels are transparent",
            id="transparent as asked",
        ),
        pytest.param({"background": "transparent", "prompt": "opaque"}, "no transparency at all", id="no alpha at all"),
        pytest.param({"prompt": "flat"}, "only one colour", id="of one colour"),
        pytest.param({"output_format": "webp", "prompt": "png"}, "instead of webp", id="another file type"),
    ],
)
async def test_a_delivery_that_differs_from_the_request_is_reported_and_is_no_error(
    open_world: Open, changes: dict[str, Any], note_text: str | None
) -> None:
    clock = Clock()

    class OtherDelivery(PlainSimulator):
        def draw(self, task: Any, index: int) -> bytes:
            from conftest import flat_image

            if changes.get("prompt") == "flat":
                return flat_image(7, task.size, task.kind, False, is_plain=True)
            clear = task.body.get("background") == "transparent" and changes.get("prompt") != "opaque"
            return flat_image(index, task.size, "png" if changes.get("prompt") == "png" else task.kind, clear)

    async with open_world(simulator=OtherDelivery(clock=clock, duration_s=0), clock=clock) as world:
        facts = await call(world, "generate_image", **{"prompt": "a fox", "size": "1024x640", **changes})
    assert (facts["status"], facts["error"]) == ("completed", None)
    assert [note_text in note for note in facts["notes"]] == ([True] if note_text else [])
