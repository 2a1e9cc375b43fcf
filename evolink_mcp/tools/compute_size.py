"""compute_size: pixels and price of a size, or the legal size that covers a target width and height."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp_types import CallToolResult
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

from evolink_mcp.api import size_grammar, sizes
from evolink_mcp.api.costs import format_credits, price, usd
from evolink_mcp.api.models import DEFAULT_MODEL, TIERS
from evolink_mcp.api.request import REFERENCES_MAX, WHOLE, Arguments, Count, OrNull, Quality, Resolution, size_argument
from evolink_mcp.api.sizes import TARGET_EDGE_MAX
from evolink_mcp.errors import EvolinkError, Refused
from evolink_mcp.sanitize import harmless
from evolink_mcp.studio.prices import Prices
from evolink_mcp.studio.studio import Studio
from evolink_mcp.tools.adapter import OFFLINE, flat_tool, result
from evolink_mcp.tools.schemas import ErrorOut, error_out, undescribed
from evolink_mcp.tools.task_text import sentence

# A read of the journal takes longer than the computation.
RULE_FRESH_FOR_S = 2.0
# The tool is offline and free, so a locked journal must not delay it.
JOURNAL_WAIT_S = 1.0
NOT_CURRENT = "The journal could not be read now. Size rule and prices are those that this server read last."
PROMPT_BYTES = 1_000  # allowance of credits_at_most for a prompt that is not written yet

Edge = Annotated[int, Strict(), Field(ge=1, le=TARGET_EDGE_MAX), WHOLE]


class ComputeSizeArguments(Arguments):
    """The arguments of compute_size: a size, or a target width and height."""

    size: Annotated[
        str | OrNull,
        # Not checked here: this tool also computes sizes in words, which generate_image refuses.
        BeforeValidator(size_argument),
        Field(description="auto, a ratio, WxH, or words such as A4 300dpi."),
    ] = None
    resolution: Resolution = TIERS[0]
    quality: Quality = DEFAULT_MODEL.default_quality
    n: Count = 1
    references: Annotated[
        int,
        Strict(),
        Field(ge=0, le=REFERENCES_MAX, description="Number of reference images."),
        WHOLE,
    ] = 0
    width: Annotated[Edge | OrNull, Field(description="Target width, instead of size.")] = None
    height: Annotated[Edge | OrNull, Field(description="Target height, with width.")] = None


class Crop(BaseModel):
    """The part of the picture to keep, in pixels from its top left corner."""

    model_config = ConfigDict(json_schema_extra=undescribed)

    left: int
    top: int
    width: int
    height: int


class PriceOut(BaseModel):
    """The price of the same shape in another quality or tier. `resolution` is null where it has no effect."""

    model_config = ConfigDict(json_schema_extra=undescribed)

    quality: str
    resolution: str | None = None
    size: str | None = None
    credits: float
    usd: float
    credits_at_most: float


class SizeOut(BaseModel):
    """The answer of compute_size.

    `width`, `height` and `pixels` are null for `auto`. `megapixels` are millions of pixels. `rule_known`: a delivered
    picture confirmed `rule`. `estimated_tokens` are output tokens. `estimated_credits` and `estimated_usd` are the
    price of all `n` pictures, without the prompt and reference images. `credits_at_most` is the price ceiling, compared
    with the spending limits. It includes `references` and a prompt of up to 1,000 bytes, and uses the more expensive
    rule while the rule is unknown. For a target width and height: scale the picture by `scale`, then crop to `crop`.
    """

    width: int | None = None
    height: int | None = None
    pixels: int | None = None
    megapixels: float | None = None
    aspect_ratio: str | None = None
    downscaled: bool | None = None
    explicit_size: str | None = None
    resolution_applies: bool | None = None
    rule: str | None = None
    rule_known: bool | None = None
    estimated_tokens: int | None = None
    estimated_credits: float | None = None
    estimated_usd: float | None = None
    credits_at_most: float | None = Field(default=None, description="for max_credits")
    usd_at_most: float | None = None
    prices: list[PriceOut] = []
    alternatives: list[str] = []
    scale: float | None = None
    crop: Crop | None = None
    closest_ratio: str | None = None
    closest_resolution: str | None = None
    error: ErrorOut | None = None
    notes: list[str] = []


def compute_size_tool(
    studio: Studio, rule_fresh_for_s: float = RULE_FRESH_FOR_S, journal_wait_s: float = JOURNAL_WAIT_S
) -> Tool:
    """Return the tool. It reads the account's size rule and prices at most once in `rule_fresh_for_s` seconds.

    It does not wait for the journal longer than `journal_wait_s`.
    """

    async def compute_size(req: ComputeSizeArguments, ctx: Context[Any, Any]) -> CallToolResult:
        """Compute pixels and price of a size before you buy. Offline, free of charge. For a width and height: the legal
        size that covers them, scale and crop."""
        out = compute(req, await studio.prices.refresh(rule_fresh_for_s, journal_wait_s))
        if not studio.prices.is_current:
            out.notes.append(NOT_CURRENT)
        return result(size_text(out), out, is_error=out.error is not None)

    return flat_tool(
        compute_size, ComputeSizeArguments, SizeOut, _format_error, title="Compute size", annotations=OFFLINE
    )


def _format_error(error: EvolinkError, nearest: tuple[str, ...]) -> CallToolResult:
    out = SizeOut(alternatives=list(nearest), error=error_out(error.problem))
    return result(size_text(out), out, is_error=True)


def compute(req: ComputeSizeArguments, prices: Prices) -> SizeOut:
    """Return pixels and price of a size, or the size that covers a target, by the account's prices.

    Raises:
        Refused: the call needs either `size`, or `width` and `height`.
    """
    # Models that fill in every argument send "auto" beside a target.
    if req.width is not None and req.height is not None and req.size in (None, "auto"):
        return _with_factor(_covering(req, (req.width, req.height), prices), prices)
    if req.size is None:
        raise Refused(
            "give either size, or both width and height",
            code="invalid_arguments",
            advice="Correct them and call again.",
        )
    try:
        suggestion = size_grammar.suggest(req.size)
        if suggestion is None:
            out = _resolved(req, req.size, prices)
        elif suggestion.target is not None:
            out = _covering(req, suggestion.target, prices)
        else:
            tier = suggestion.resolution or req.resolution
            out = _resolved(req.model_copy(update={"resolution": tier}), suggestion.size, prices)
    except sizes.IllegalSize as error:
        readings = error.readings if isinstance(error, size_grammar.Contradiction) else ()
        alternatives = [*readings, *map(str, error.nearest)]
        problem = ErrorOut(
            code="illegal_size",
            message=error.reason,
            retryable=False,
            advice="Use one of the alternatives." if alternatives else "Use auto, one of the 15 ratios, or WxH.",
        )
        return SizeOut(alternatives=alternatives, error=problem)
    if suggestion is not None:
        corrected = size_grammar.advice_for(suggestion)
        out.notes.insert(0, f"EvoLink does not take “{harmless(req.size, 40)}” as a size: {corrected}.")
    if req.width or req.height:
        out.notes.append("width and height have no effect with size.")
    return _with_factor(out, prices)


def _resolved(req: ComputeSizeArguments, size: str, prices: Prices) -> SizeOut:
    """Return pixels and price of a legal size.

    Raises:
        IllegalSize: EvoLink would refuse it.
    """
    rule = prices.rule
    resolved = sizes.resolve(size, req.resolution, rule)
    candidates = [sizes.resolve(size, req.resolution, each).size for each in prices.possible_rules]
    out = _sized(resolved.size, req, prices, candidates)
    out.downscaled = resolved.downscaled
    out.resolution_applies = resolved.resolution_applies
    out.rule = resolved.rule
    out.rule_known = prices.is_rule_known if resolved.resolution_applies else None
    out.prices = _other_prices(size, req, prices)
    if resolved.size is None:
        out.notes.append(
            "With auto the model chooses the size. The estimate assumes 2048x2048, as EvoLink's own estimate does. "
            "credits_at_most assumes the most expensive size, 2880x2880."
        )
    elif not resolved.resolution_applies and "resolution" in req.model_fields_set:
        out.notes.append("resolution has no effect with WxH.")
    if resolved.resolution_applies:
        other_rule = next(name for name in sizes.RULES if name != rule)
        other_size = sizes.resolve(size, req.resolution, other_rule).size
        if other_size != resolved.size:
            out.alternatives.append(str(other_size))
            unknown_rule = (
                " The rule of this account's pictures is not known yet." if len(prices.possible_rules) > 1 else ""
            )
            out.notes.append(
                f"EvoLink's {other_rule} rule computes {other_size}. Pass explicit_size as size for exact pixels.{unknown_rule}"
            )
    return out


def _with_factor(out: SizeOut, prices: Prices) -> SizeOut:
    """Add a note about the factor that the prices include."""
    if prices.factor != 1:
        out.notes.append(
            f"By its bills, EvoLink's prices for this account are {prices.factor:g} times the published ones. The prices "
            "here include this."
        )
    return out


def _other_prices(size: str, req: ComputeSizeArguments, prices: Prices) -> list[PriceOut]:
    """Return the prices of the same shape in the other qualities and tiers."""
    others: list[PriceOut] = []
    tiers = tuple(DEFAULT_MODEL.limits.tiers) if sizes.takes_resolution(sizes.normalize(size)) else (None,)
    for quality, tier in itertools.product(DEFAULT_MODEL.qualities, tiers):
        if quality == req.quality and tier in (None, req.resolution.upper()):
            continue
        # A size without a tier, such as explicit pixels, ignores the tier here.
        candidates = [sizes.resolve(size, tier or "1K", each).size for each in prices.possible_rules]
        pixels = sizes.resolve(size, tier or "1K", prices.rule).size
        credits = prices.estimate(pixels, quality, req.n)
        others.append(
            PriceOut(
                quality=quality,
                resolution=tier,
                size=str(pixels) if pixels else None,
                credits=credits,
                usd=usd(credits),
                credits_at_most=_at_most(candidates, quality, req, prices),
            )
        )
    return others


def _at_most(candidates: Sequence[sizes.Size | None], quality: str, req: ComputeSizeArguments, prices: Prices) -> float:
    return prices.at_most(candidates, quality, req.n, references=req.references, prompt_bytes=PROMPT_BYTES)


def _covering(req: ComputeSizeArguments, target: tuple[int, int], prices: Prices) -> SizeOut:
    width, height = target
    cover = sizes.cover(width, height, prices.rule)
    out = _sized(cover.size, req, prices, [cover.size])
    out.rule = "explicit"
    out.downscaled = False
    out.resolution_applies = False
    out.scale = round(cover.scale, 4)
    out.crop = Crop(left=cover.left, top=cover.top, width=cover.crop.width, height=cover.crop.height)
    out.closest_ratio = cover.ratio
    out.closest_resolution = cover.tier
    out.alternatives = [str(cover.tier_size)]
    out.prices = _other_prices(str(cover.size), req, prices)
    scaled = f"scale it by {cover.scale:.4g}, then " if cover.scale != 1 else ""
    if (cover.crop.width, cover.crop.height) != (cover.size.width, cover.size.height) or scaled:
        out.notes.append(f"For {width}×{height}: {scaled}crop to {cover.crop} at ({cover.left}, {cover.top}).")
    if not cover.size.covers(width, height):
        out.notes.append(
            f"No legal size covers {width}×{height}. {cover.size} is the nearest, so the picture must be enlarged."
        )
    covers = "covers the target" if cover.tier_covers else "is smaller than the target"
    out.notes.append(f"Closest ratio and tier: {cover.ratio} at {cover.tier}. It has {cover.tier_size} and {covers}.")
    return out


def _sized(
    size: sizes.Size | None, req: ComputeSizeArguments, prices: Prices, candidates: Sequence[sizes.Size | None]
) -> SizeOut:
    estimate = prices.estimate(size, req.quality, req.n)
    price_ceiling = _at_most(candidates, req.quality, req, prices)
    out = SizeOut(
        estimated_tokens=price(size, req.quality, req.n).tokens,
        estimated_credits=estimate,
        estimated_usd=usd(estimate),
        credits_at_most=price_ceiling,
        usd_at_most=usd(price_ceiling),
    )
    if size is not None:
        out.width = size.width
        out.height = size.height
        out.explicit_size = str(size)
        out.pixels = size.pixels
        out.megapixels = size.megapixels
        out.aspect_ratio = size.aspect_ratio
    return out


def size_text(out: SizeOut) -> str:
    """Return the answer as text."""
    if out.error is not None:
        are_pixels = all("x" in size for size in out.alternatives)
        label = "Nearest legal sizes" if are_pixels else "Alternatives"
        nearest = f" {label}: {', '.join(out.alternatives)}." if out.alternatives else ""
        return f"{sentence(out.error.message)}{nearest} Nothing was sent or charged. {out.error.advice}"
    lines = ["The model chooses the pixels (auto)."]
    if out.width:
        lines = [
            f"{out.width}×{out.height} pixels: {out.pixels:,} in total, {out.megapixels:g} megapixels, aspect ratio "
            f'{out.aspect_ratio}. Pass size="{out.explicit_size}" for exactly these pixels.'
        ]
    if out.rule in sizes.RULES:
        evidence = (
            "A delivered picture confirmed it" if out.rule_known else "No picture of this account confirmed it yet"
        )
        smaller = " The picture is smaller than the tier's name suggests." if out.downscaled else ""
        lines.append(f"The pixels follow EvoLink's {out.rule} table. {evidence}.{smaller}")
    lines.append(
        f"Estimated price: {format_credits(out.estimated_credits or 0)} for {out.estimated_tokens:,} output tokens, without the "
        f"prompt and reference images. Highest possible charge: {format_credits(out.credits_at_most or 0)}. The server compares "
        "spending limits and max_credits with it."
    )
    if out.crop and out.scale is not None:
        crop = f"crop {out.crop.width}×{out.crop.height} at ({out.crop.left}, {out.crop.top})"
        lines.append(
            f"Scale by {out.scale:g}, then {crop}. Closest ratio {out.closest_ratio} at {out.closest_resolution}."
        )
    if out.alternatives:
        lines.append(f"Alternatives: {', '.join(out.alternatives)}.")
    if out.prices:
        lines.append(f"Highest possible charge of other settings, in credits: {_price_text(out.prices)}.")
    return "\n".join([*lines, *(f"Note: {note}" for note in out.notes)])


def _price_text(prices: list[PriceOut]) -> str:
    amounts: dict[str, list[str]] = {}
    for each in prices:
        tier = f" in {each.resolution}" if each.resolution else ""
        amounts.setdefault(each.quality, []).append(f"{each.credits_at_most:g}{tier}")
    return "; ".join(f"{quality} {', '.join(each)}" for quality, each in amounts.items())
