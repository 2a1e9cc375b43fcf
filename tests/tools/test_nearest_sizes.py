"""One function names the nearest size of a target, in compute_size and in refusals of generate_image."""

from __future__ import annotations

import re
from typing import Any

import anyio
import pytest
from conftest import World
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from evolink_mcp.api import sizes
from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.studio.prices import Prices
from evolink_mcp.tools.adapter import explain
from evolink_mcp.tools.compute_size import ComputeSizeArguments, compute

EDGE = st.integers(1, 5_000) | st.sampled_from([16, 17, 1279, 1280, 2160, 2161, 2880, 2881, 3840, 3841])
MANY = settings(max_examples=400, deadline=None, database=None, derandomize=True)
PRICES = Prices.from_facts({}, "auto")


def _ceil_16(edge: int) -> int:
    return -(-edge // 16) * 16


def _can_be_covered(width: int, height: int) -> bool:
    """Return whether EvoLink's page allows a size with both edges at least this long.

    The smallest such size has the target's edges rounded up, and the short edge is at least a third of the long one.
    """
    long = _ceil_16(max(width, height))
    short = max(_ceil_16(min(width, height)), _ceil_16(-(-long // 3)))
    return long <= 3840 and long * short <= 8_294_400


def _is_legal(size: sizes.Size) -> bool:
    long = max(size.width, size.height)
    short = min(size.width, size.height)
    return long % 16 == short % 16 == 0 and long <= 3840 and long <= 3 * short and 655_360 <= long * short <= 8_294_400


@given(EDGE, EDGE)
@MANY
def test_the_nearest_size_covers_the_target_wherever_a_legal_size_can(width: int, height: int) -> None:
    size = sizes.nearest_sizes(width, height)[0]
    assert _is_legal(size)
    assert size.covers(width, height) == _can_be_covered(width, height)
    assert (size.width - size.height) * (width - height) >= 0, "the orientation is the opposite"


@given(EDGE, EDGE)
@MANY
def test_compute_size_and_a_refusal_of_generate_image_name_the_same_nearest_size(width: int, height: int) -> None:
    cover_answer = compute(ComputeSizeArguments(width=width, height=height), PRICES)
    target = f"{width}x{height}"
    size_answer = compute(ComputeSizeArguments(size=target), PRICES)
    try:
        GenerationRequest(prompt="a fox", size=target)
    except ValidationError as error:
        _, nearest = explain(error, GenerationRequest)
        message = str(error)
        if size_answer.error is None:  # a small pair such as 3x2 is a ratio
            (advice,) = re.findall(r"use size=\S+", message)
            assert advice in size_answer.notes[0]
        else:
            assert cover_answer.explicit_size == nearest[0] == size_answer.alternatives[0]
            assert f"Nearest legal sizes: {cover_answer.explicit_size}" in message
            is_covered = f"No legal size covers it. {cover_answer.explicit_size} is the nearest" not in message
            assert is_covered == _can_be_covered(width, height)
    else:
        assert cover_answer.explicit_size == target == size_answer.explicit_size


@given(EDGE, EDGE)
@MANY
def test_scale_and_crop_of_the_nearest_size_give_the_target(width: int, height: int) -> None:
    cover = sizes.cover(width, height)
    assert (cover.crop.width, cover.crop.height) == (width, height)
    assert cover.left + width <= cover.size.width * cover.scale + 1e-6
    assert cover.top + height <= cover.size.height * cover.scale + 1e-6
    assert (cover.scale <= 1) == cover.size.covers(width, height)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("target", "nearest"),
    [
        ("1920x1080", "1920x1088"),
        ("1200x628", "1200x640"),
        ("1080x1920", "1088x1920"),
        ("2048x320", "2048x688"),
        ("1000x1000", "1008x1008"),
        ("5000x5000", "2880x2880"),
    ],
)
async def test_both_tools_answer_with_the_same_size(world: World, target: str, nearest: str) -> None:
    width, height = map(int, target.split("x"))
    calls: list[tuple[str, dict[str, Any]]] = [
        ("generate_image", {"prompt": "a fox", "size": target}),
        ("compute_size", {"size": target}),
        ("compute_size", {"width": width, "height": height}),
    ]
    with anyio.fail_after(300):
        async with world.client() as client:
            refusal, size_answer, cover_answer = [await client.call_tool(*call) for call in calls]
    assert f"Nearest legal sizes: {nearest}" in refusal.content[0].text
    assert size_answer.structured_content["alternatives"][0] == nearest
    assert cover_answer.structured_content["explicit_size"] == nearest
    assert world.posts == 0


@pytest.mark.anyio
async def test_words_for_pixels_get_scale_and_crop(world: World) -> None:
    with anyio.fail_after(300):
        async with world.client() as client:
            answer = await client.call_tool("compute_size", {"size": "A4 landscape 300dpi"})
    facts = answer.structured_content
    assert (facts["explicit_size"], facts["crop"]["width"], facts["crop"]["height"]) == ("3424x2416", 3508, 2480)
    assert facts["scale"] == 1.0265
    assert (
        "No legal size covers 3508×2480. 3424x2416 is the nearest, so the picture must be enlarged." in facts["notes"]
    )


@pytest.mark.anyio
async def test_a_tier_in_the_words_sets_the_resolution(world: World) -> None:
    with anyio.fail_after(300):
        async with world.client() as client:
            answer = await client.call_tool("compute_size", {"size": "16:9, 2K", "resolution": "1K"})
    facts = answer.structured_content
    assert (facts["explicit_size"], facts["resolution_applies"]) == ("2048x1152", True)
    assert 'use size="16:9" and resolution="2K"' in answer.content[0].text


@pytest.mark.anyio
@pytest.mark.parametrize("tool", ["compute_size", "generate_image"])
async def test_contradicting_words_are_refused_with_both_readings(world: World, tool: str) -> None:
    prompt = {"prompt": "a fox"} if tool == "generate_image" else {}
    with anyio.fail_after(300):
        async with world.client() as client:
            answer = await client.call_tool(tool, {"size": "landscape 9:16 portrait", **prompt})
    assert answer.is_error is True
    assert '“landscape” means size="16:9" and “portrait” means size="9:16"' in answer.content[0].text
    assert world.posts == 0


@pytest.mark.anyio
@pytest.mark.parametrize("tool", ["compute_size", "generate_image"])
async def test_an_object_as_size_gets_the_value_as_text(world: World, tool: str) -> None:
    prompt = {"prompt": "a fox"} if tool == "generate_image" else {}
    with anyio.fail_after(300):
        async with world.client() as client:
            answer = await client.call_tool(tool, {"size": {"width": 1024, "height": 768}, **prompt})
    assert 'use size="1024x768"' in answer.content[0].text
    assert world.posts == 0
