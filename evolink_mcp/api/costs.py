"""Compute the price of a request: from size, quality and number of images to tokens and credits, as EvoLink bills them.

A sum is in whole units of 0.0001 credit, and each component is rounded up. The rates are public, without discounts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from evolink_mcp.api.models import DEFAULT_MODEL, ImageModel
from evolink_mcp.api.sizes import Size

# By EvoLink's own client, 1 credit has 10,000 units and 1 USD has 68 credits.
UNITS_PER_CREDIT = 10_000
CREDITS_PER_USD = 68


@dataclass(frozen=True, slots=True)
class Price:
    """The price of one request. `tokens` are the output tokens of all images."""

    tokens: int
    credits: float
    usd: float
    assumed_auto: bool


def output_tokens(size: Size, quality: str, model: ImageModel = DEFAULT_MODEL) -> int:
    """Return the output tokens of one image (1024x1024: 196, 1756, 7024).

    Raises:
        ValueError: the model has no such quality.
    """
    if quality not in model.qualities:
        raise ValueError(f"The quality is not one of {', '.join(model.qualities)}.")
    base = model.qualities[quality].tile_base
    long = max(size.width, size.height)
    short = min(size.width, size.height)
    # round(base * short / long), half up. Whole numbers give EvoLink's tokens without float errors.
    across = (2 * base * short + long) // (2 * long)
    return -(-base * across * (2_000_000 + size.pixels) // 4_000_000)


# The cache keeps compute_size nearly as fast as an empty tool (docs/speed.md).
@lru_cache(maxsize=1024)
def price(
    size: Size | None,
    quality: str,
    n: int = 1,
    *,
    references: int = 0,
    prompt_tokens: int = 0,
    model: ImageModel = DEFAULT_MODEL,
) -> Price:
    """Return the price of `n` images. EvoLink bills each image with its share of prompt and references.

    The output is exact, the price of `references` images is an upper bound, the price of the text is as good as
    `prompt_tokens`. A `size` of None (auto) is priced as EvoLink's own calculator does.

    Raises:
        ValueError: an impossible count, or a quality that the model does not have.
    """
    if n < 1 or references < 0 or prompt_tokens < 0:
        raise ValueError("A price needs n of at least 1 and no negative counts.")
    tokens = output_tokens(size or Size(*model.auto_price_size), quality, model)
    units = n * (
        _units(tokens, model.rates.image_output)
        + _units(references * model.reference_tokens_max, model.rates.image_input)
        + _units(prompt_tokens, model.rates.text_input)
    )
    return Price(
        tokens=n * tokens,
        credits=units / UNITS_PER_CREDIT,
        usd=round(units / (UNITS_PER_CREDIT * CREDITS_PER_USD), 6),
        assumed_auto=size is None,
    )


def at_most(
    sizes: Iterable[Size | None],
    quality: str,
    n: int = 1,
    *,
    references: int = 0,
    prompt_bytes: int = 0,
    factor: float = 1.0,
    model: ImageModel = DEFAULT_MODEL,
) -> float:
    """Return the highest possible price times `factor` in credits, rounded up to a hundredth.

    `sizes` are the possible sizes of the images; the most expensive one counts. None (auto) means the model's most
    expensive size. A token has at least one byte of the prompt (UTF-8).
    """
    credits = max(
        price(
            size or Size(*model.auto_sizes[-1]),
            quality,
            n,
            references=references,
            prompt_tokens=prompt_bytes,
            model=model,
        ).credits
        for size in sizes
    )
    # Without `round`, a float error such as 110.00000000000001 would add a hundredth.
    return math.ceil(round(credits * factor * 100, 6)) / 100


def usd(credits: float) -> float:
    """Return the public price of these credits in US dollars, to a ten-thousandth."""
    return round(credits / CREDITS_PER_USD, 4)


def format_credits(credits: float) -> str:
    """Return a text with credits and dollars."""
    return f"{credits:g} credits (${usd(credits):g})"


def prompt_tokens(prompt: str) -> int:
    """Estimate the tokens of a prompt: one per four ASCII characters or per CJK character (three UTF-8 bytes)."""
    ascii_bytes = len(prompt.encode("ascii", "ignore"))
    other_bytes = len(prompt.encode("utf-8", "surrogatepass")) - ascii_bytes
    return -(-(3 * ascii_bytes + 4 * other_bytes) // 12)


def _units(tokens: int, units_per_1000_tokens: int) -> int:
    return -(-tokens * units_per_1000_tokens // 1000)
