"""What a picture costs: size, quality and number to tokens to credits, as EvoLink bills them.

Sums are whole units of 0.0001 credit, each component rounded up; the rates are public, without discounts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from evolink_mcp.api.sizes import Size

# A unit is 0.0001 credit. EvoLink's price page (https://evolink.ai/gpt-image-2), credits per 1,000 tokens:
# 1.836 image output, 0.4896 image input, 0.306 text input.
UNITS_PER_CREDIT = 10_000
OUTPUT_UNITS_PER_1000_TOKENS = 18_360
IMAGE_INPUT_UNITS_PER_1000_TOKENS = 4_896
TEXT_INPUT_UNITS_PER_1000_TOKENS = 3_060
CREDITS_PER_USD = 68

# The generation page, field `quality`: "Tile base".
TILE_BASE = {"low": 16, "medium": 48, "high": 96}
# OpenAI budgets 1,536 patches of 32 pixels a picture, so no reference costs more.
REFERENCE_TOKENS_MAX = 1_536
# EvoLink's own price calculator takes this for `auto`, whose size is not known beforehand.
AUTO_SIZE = Size(2048, 2048)
# The dearest size there is: `auto` may choose it.
DEAREST_SIZE = Size(2880, 2880)


@dataclass(frozen=True, slots=True)
class Price:
    """The price of one request: `tokens` are the output tokens of all its pictures."""

    tokens: int
    credits: float
    usd: float
    assumed_auto: bool


def output_tokens(size: Size, quality: str) -> int:
    """Output tokens of one picture (1024x1024: 196, 1756, 7024); ValueError for an unknown quality."""
    if quality not in TILE_BASE:
        raise ValueError(f"The quality is not one of {', '.join(TILE_BASE)}.")
    base = TILE_BASE[quality]
    long, short = max(size.width, size.height), min(size.width, size.height)
    across = (2 * base * short + long) // (2 * long)
    return -(-base * across * (2_000_000 + size.pixels) // 4_000_000)


@lru_cache(maxsize=1024)
def price(size: Size | None, quality: str, n: int = 1, *, references: int = 0, prompt_tokens: int = 0) -> Price:
    """The price of `n` pictures, each billed for itself with its share of prompt and references.

    Exact for the output, an upper bound for `references` pictures, as good as `prompt_tokens` for the text.
    `size` None is auto, priced as 2048x2048. Raises ValueError for counts that cannot be.
    """
    if n < 1 or references < 0 or prompt_tokens < 0:
        raise ValueError("A price needs n of at least 1 and no negative counts.")
    tokens = output_tokens(size or AUTO_SIZE, quality)
    units = n * (
        _units(tokens, OUTPUT_UNITS_PER_1000_TOKENS)
        + _units(references * REFERENCE_TOKENS_MAX, IMAGE_INPUT_UNITS_PER_1000_TOKENS)
        + _units(prompt_tokens, TEXT_INPUT_UNITS_PER_1000_TOKENS)
    )
    return Price(
        tokens=n * tokens,
        credits=units / UNITS_PER_CREDIT,
        usd=round(units / (UNITS_PER_CREDIT * CREDITS_PER_USD), 6),
        assumed_auto=size is None,
    )


def at_most(
    sizes: Iterable[Size | None], quality: str, n: int = 1, *, references: int = 0, prompt_bytes: int = 0
) -> float:
    """Credits that `n` pictures cannot exceed, rounded up to a hundredth: pass it on as `max_credits`.

    `sizes` are those that the pictures may have: the dearest counts, and None (auto) may be the dearest of all. A token
    is at least one byte of the prompt (UTF-8), and a reference at most REFERENCE_TOKENS_MAX.
    """
    credits = max(
        price(size or DEAREST_SIZE, quality, n, references=references, prompt_tokens=prompt_bytes).credits
        for size in sizes
    )
    return math.ceil(round(credits * 100, 6)) / 100


def usd(credits: float) -> float:
    """The public price of these credits in US dollars, to a ten-thousandth."""
    return round(credits / CREDITS_PER_USD, 4)


def priced(credits: float) -> str:
    """Credits with their price in dollars, in words."""
    return f"{credits:g} credits (${usd(credits):g})"


def prompt_tokens(prompt: str) -> int:
    """An estimate, not a count: a token is four ASCII characters or one CJK character (three UTF-8 bytes)."""
    ascii_bytes = len(prompt.encode("ascii", "ignore"))
    other_bytes = len(prompt.encode("utf-8", "surrogatepass")) - ascii_bytes
    return -(-(3 * ascii_bytes + 4 * other_bytes) // 12)


def _units(tokens: int, units_per_1000_tokens: int) -> int:
    return -(-tokens * units_per_1000_tokens // 1000)
