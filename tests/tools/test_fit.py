"""`fit` of generate_image: it buys the legal size that compute_size computes for the target."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest
from conftest import World

pytestmark = pytest.mark.anyio
PROMPT = "A calm sunset"


async def call(world: World, tool: str, **arguments: Any) -> Any:
    with anyio.fail_after(300):
        async with world.client() as client:
            return await client.call_tool(tool, arguments)


def sent_by(world: World) -> dict[str, Any]:
    return json.loads(next(r.body for r in world.simulator.requests if r.path == "/v1/images/generations"))


@pytest.mark.parametrize(
    ("fit", "width", "height"),
    [
        ("1200x628", 1200, 628),
        ("og", 1200, 630),
        ("instagram-story", 1080, 1920),
        ("favicon", 48, 48),
        ("a4-300dpi", 2480, 3508),
        ("1024x640", 1024, 640),
    ],
)
async def test_fit_buys_the_size_that_compute_size_computes(world: World, fit: str, width: int, height: int) -> None:
    size_answer = await call(world, "compute_size", width=width, height=height)
    size = size_answer.structured_content["explicit_size"]
    answer = await call(world, "generate_image", prompt=PROMPT, fit=fit)
    assert answer.is_error is False
    assert sent_by(world) == {"model": "gpt-image-2", "prompt": PROMPT, "size": size}
    assert world.posts == 1


async def test_the_price_ceiling_is_that_of_the_bought_size(world: World) -> None:
    """4K costs more than auto with the same limit allows, so the size of `fit` must be checked."""
    size_answer = await call(world, "compute_size", width=816, height=816)
    ceiling = size_answer.structured_content["credits_at_most"]
    small = await call(world, "generate_image", prompt=PROMPT, fit="800x800", max_credits=ceiling)
    large = await call(world, "generate_image", prompt=PROMPT, fit="2880x2880", max_credits=ceiling)
    assert small.is_error is False
    assert large.structured_content["error"]["code"] == "over_budget"
    assert world.posts == 1


async def test_auto_and_an_empty_size_are_allowed_beside_fit(world: World) -> None:
    for size in ("auto", "", None):
        answer = await call(world, "generate_image", prompt=f"{PROMPT} {size}", fit="1200x628", size=size)
        assert answer.is_error is False
    assert world.posts == 3


async def test_the_size_that_fit_buys_is_allowed_beside_it(world: World) -> None:
    """The request of an answer has both, and it must be a valid request."""
    answer = await call(world, "generate_image", prompt=PROMPT, fit="1200x628", size="1200x640")
    assert answer.is_error is False
    assert sent_by(world)["size"] == "1200x640"


@pytest.mark.parametrize("size", ["1200x656", "16:9", "2:1"])
async def test_another_size_beside_fit_is_refused(world: World, size: str) -> None:
    answer = await call(world, "generate_image", prompt=PROMPT, fit="1200x628", size=size)
    assert "fit chooses the size: leave size out. For fit '1200x628' it is 1200x640" in answer.content[0].text
    assert answer.structured_content["charged"] == "no"
    assert world.simulator.requests == []


@pytest.mark.parametrize(
    ("fit", "advice"),
    [
        ("fox", "give pixels such as 1200x628"),
        ("instagram-storry", "did you mean instagram-story"),
        ("90000x90000", "the largest target of this shape is"),
        ("0x0", "give pixels such as 1200x628"),
        ("16:9", "give pixels such as 1200x628"),
    ],
)
async def test_a_text_that_is_no_target_is_refused_with_a_valid_one(world: World, fit: str, advice: str) -> None:
    answer = await call(world, "generate_image", prompt=PROMPT, fit=fit)
    assert advice in answer.content[0].text
    assert world.simulator.requests == []


async def test_an_empty_fit_is_absent(world: World) -> None:
    answer = await call(world, "generate_image", prompt=PROMPT, fit="", size="16:9")
    assert sent_by(world) == {"model": "gpt-image-2", "prompt": PROMPT, "size": "16:9"}
    assert answer.structured_content["notes"][-1] == "Empty arguments count as absent: fit."


async def test_the_answer_names_the_bought_size_and_the_copy(world: World) -> None:
    answer = await call(world, "generate_image", prompt=PROMPT, fit="1200x628", resolution="4K")
    assert answer.structured_content["notes"][:2] == [
        "fit buys 1200x640. An exact copy is saved beside it.",
        "resolution has no effect with explicit pixels. It was not sent.",
    ]
