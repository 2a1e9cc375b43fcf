"""Computed costs equal the figures that EvoLink published or charged, to 0.0001 credit."""

from __future__ import annotations

import pytest

from evolink_mcp.api import costs
from evolink_mcp.api.costs import Price
from evolink_mcp.api.sizes import Size

SQUARE = Size(1024, 1024)


@pytest.mark.parametrize(
    ("size", "quality", "tokens"),
    [
        pytest.param(SQUARE, "low", 196, id="square low"),
        pytest.param(SQUARE, "medium", 1756, id="square medium"),
        pytest.param(SQUARE, "high", 7024, id="square high"),
        pytest.param(Size(1536, 1024), "high", 5488, id="3:2 high"),
        pytest.param(Size(1024, 1536), "high", 5488, id="2:3 costs as 3:2"),
        pytest.param(Size(1792, 1024), "high", 5063, id="7:4 high"),
        pytest.param(Size(3584, 2048), "high", 12329, id="large 7:4 high"),
        pytest.param(Size(2048, 1024), "medium", 1180, id="wider is cheaper"),
        pytest.param(Size(1776, 592), "low", 62, id="the cheapest picture of the price page"),
        pytest.param(Size(2880, 2880), "high", 23719, id="the dearest picture of the price page"),
        pytest.param(Size(2048, 2048), "medium", 3568, id="the price page's auto"),
    ],
)
def test_output_tokens_follow_the_published_formula(size: Size, quality: str, tokens: int) -> None:
    assert tokens == costs.output_tokens(size, quality)


def test_an_unknown_quality_has_no_price() -> None:
    with pytest.raises(ValueError, match="low, medium, high"):
        costs.output_tokens(SQUARE, "ultra")


def test_a_real_charge_is_reproduced_to_the_last_digit() -> None:
    """EvoLink charged 0.3682 credits, 0.005415 USD, for 27 tokens of text and a low square."""
    assert Price(196, 0.3682, 0.005415, assumed_auto=False) == costs.price(SQUARE, "low", prompt_tokens=27)


@pytest.mark.parametrize(
    ("n", "references", "prompt_tokens", "credits"),
    [
        pytest.param(1, 0, 0, 3.2241, id="output alone, rounded up"),
        pytest.param(1, 0, 1, 3.2245, id="one token of text, rounded up for itself"),
        pytest.param(1, 1, 0, 3.9762, id="a reference at its upper bound"),
        pytest.param(3, 0, 1, 9.6735, id="three pictures, each with its text"),
        pytest.param(10, 16, 100, 152.872, id="everything at once"),
    ],
)
def test_each_component_is_rounded_up_and_each_picture_billed(
    n: int, references: int, prompt_tokens: int, credits: float
) -> None:
    price = costs.price(SQUARE, "medium", n, references=references, prompt_tokens=prompt_tokens)
    assert (credits, n * 1756) == (price.credits, price.tokens)


def test_auto_has_the_highest_price_and_is_marked_as_an_assumption() -> None:
    assert Price(3568, 6.5509, 0.096337, assumed_auto=True) == costs.price(None, "medium")


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param({"n": 0}, id="no picture"),
        pytest.param({"references": -1}, id="negative references"),
        pytest.param({"prompt_tokens": -1}, id="negative text"),
    ],
)
def test_impossible_counts_have_no_price(counts: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        costs.price(SQUARE, "low", **counts)


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        pytest.param("", 0, id="empty"),
        pytest.param("a", 1, id="one letter"),
        pytest.param("a beautiful colorful sunset", 7, id="English"),
        pytest.param("海の夕日", 4, id="CJK"),
        pytest.param("sea 海", 2, id="mixed"),
        pytest.param("\ud800", 1, id="lone surrogate"),
        pytest.param("a" * 32_000, 8_000, id="the longest prompt"),
    ],
)
def test_prompt_tokens_are_estimated(prompt: str, tokens: int) -> None:
    assert tokens == costs.prompt_tokens(prompt)
