"""compute_size: pixels and price of a size, or the legal size that covers the pixels somebody needs."""

from __future__ import annotations

from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp_types import CallToolResult
from pydantic import BaseModel, ConfigDict, Field, Strict

from evolink_mcp.api import sizes
from evolink_mcp.api.costs import price
from evolink_mcp.api.request import Arguments, Count, OrNull, Quality, Resolution
from evolink_mcp.api.sizes import MAX_WISH_EDGE
from evolink_mcp.errors import EvolinkError, Refused
from evolink_mcp.studio.studio import Studio
from evolink_mcp.tools.adapter import OFFLINE, flat_tool, result
from evolink_mcp.tools.schemas import ErrorOut, error_out, undescribed

Edge = Annotated[int, Strict(), Field(ge=1, le=MAX_WISH_EDGE)]


class ComputeSizeArguments(Arguments):
    """compute_size: a size to look up, or a width and height that are needed."""

    size: Annotated[str | OrNull, Field(description="auto, a ratio such as 16:9, or WxH in pixels.")] = None
    resolution: Resolution = "1K"
    quality: Quality = "medium"
    n: Count = 1
    width: Annotated[Edge | OrNull, Field(description="Instead of size: the width you need, any number.")] = None
    height: Annotated[Edge | OrNull, Field(description="With width: the height you need.")] = None


class Crop(BaseModel):
    """What to cut out of the picture, in pixels from its top left corner."""

    model_config = ConfigDict(json_schema_extra=undescribed)

    left: int
    top: int
    width: int
    height: int


class SizeOut(BaseModel):
    """What compute_size answers.

    `width`, `height` and `pixels` are null for `auto`. `megapixels` are millions of pixels. `estimated_tokens` are
    output tokens; `estimated_credits` and `estimated_usd` are the price of all `n` pictures, without the prompt and
    reference images. For a wished width and height: enlarge by `scale` (1 is unchanged), then cut `crop`.
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
    estimated_tokens: int | None = None
    estimated_credits: float | None = None
    estimated_usd: float | None = None
    alternatives: list[str] = []
    scale: float | None = None
    crop: Crop | None = None
    closest_ratio: str | None = None
    closest_resolution: str | None = None
    error: ErrorOut | None = None
    notes: list[str] = []


def compute_size_tool(studio: Studio) -> Tool:
    """The tool over one studio, by its size rule."""

    async def compute_size(req: ComputeSizeArguments, ctx: Context[Any, Any]) -> CallToolResult:
        """What pixels and what price a size, ratio and tier mean, before anything is spent: offline, free. Or the
        other way round: give width and height you need (such as 1200 and 628) for the nearest legal size that
        covers them, the closest ratio and tier, and what to crop."""
        out = compute(req, studio.rule)
        return result(size_text(out), out, is_error=out.error is not None)

    return flat_tool(compute_size, ComputeSizeArguments, SizeOut, _refuse, title="Compute size", annotations=OFFLINE)


def _refuse(error: EvolinkError, nearest: tuple[str, ...]) -> CallToolResult:
    out = SizeOut(alternatives=list(nearest), error=error_out(error.problem))
    return result(size_text(out), out, is_error=True)


def compute(req: ComputeSizeArguments, rule: str) -> SizeOut:
    """Pixels and price of a size; or the size that covers a wish."""
    wish = (req.width, req.height)
    if req.size is None and None not in wish:
        return _covering(req, rule)
    if req.size is None or any(wish):
        raise Refused(
            "give either size, or both width and height",
            code="invalid_arguments",
            advice="Correct them and call again.",
        )
    try:
        resolved = sizes.resolve(req.size, req.resolution, rule)
    except sizes.IllegalSize as error:
        nearest = [str(size) for size in error.nearest]
        problem = ErrorOut(
            code="illegal_size", message=error.reason, retryable=False,
            advice="Use one of the alternatives." if nearest else "Use auto, one of the 15 ratios, or WxH.",
        )  # fmt: skip
        return SizeOut(alternatives=nearest, error=problem)
    out = _sized(resolved.size, req)
    out.downscaled = resolved.downscaled
    out.resolution_applies = resolved.resolution_applies
    out.rule = resolved.rule
    if resolved.size is None:
        out.notes.append("auto lets the model decide: the price assumes 2048x2048, as EvoLink's own estimate does.")
    elif not resolved.resolution_applies and "resolution" in req.model_fields_set:
        out.notes.append("resolution has no effect with WxH.")
    if resolved.resolution_applies:
        other = next(name for name in sizes.RULES if name != rule)
        twin = sizes.resolve(req.size, req.resolution, other).size
        if twin != resolved.size:
            out.alternatives.append(str(twin))
            out.notes.append(f"EvoLink's {other} rule makes {twin} of this; give explicit_size to be certain.")
    return out


def _covering(req: ComputeSizeArguments, rule: str) -> SizeOut:
    assert req.width is not None
    assert req.height is not None
    cover = sizes.cover(req.width, req.height, rule)
    out = _sized(cover.size, req)
    out.rule, out.downscaled, out.resolution_applies = "explicit", False, False
    out.scale = round(cover.scale, 4)
    out.crop = Crop(left=cover.left, top=cover.top, width=cover.crop.width, height=cover.crop.height)
    out.closest_ratio, out.closest_resolution = cover.ratio, cover.tier
    out.alternatives = [str(cover.tier_size)]
    enlarged = f"enlarge it by {cover.scale:.4g}, then " if cover.scale > 1 else ""
    if (cover.crop.width, cover.crop.height) != (cover.size.width, cover.size.height) or enlarged:
        out.notes.append(
            f"For {req.width}×{req.height}: {enlarged}crop to {cover.crop} at ({cover.left}, {cover.top})."
        )
    covers = "covers it" if cover.tier_covers else "is smaller"
    out.notes.append(f"Closest ratio and tier: {cover.ratio} at {cover.tier}, {cover.tier_size}, which {covers}.")
    return out


def _sized(size: sizes.Size | None, req: ComputeSizeArguments) -> SizeOut:
    cost = price(size, req.quality, req.n)
    out = SizeOut(estimated_tokens=cost.tokens, estimated_credits=cost.credits, estimated_usd=cost.usd)
    if size is not None:
        out.width, out.height, out.explicit_size = size.width, size.height, str(size)
        out.pixels, out.megapixels, out.aspect_ratio = size.pixels, size.megapixels, size.aspect_ratio
    return out


def size_text(out: SizeOut) -> str:
    """The same facts in words."""
    if out.error is not None:
        near = f" Nearest legal sizes: {', '.join(out.alternatives)}." if out.alternatives else ""
        return f"{out.error.message}{near} Nothing was sent or charged. {out.error.advice}"
    words = [f"{out.width}×{out.height} pixels" if out.width else "The model decides the pixels (auto)"]
    if out.width:
        words[0] += (
            f' ({out.pixels} = {out.megapixels} MP, {out.aspect_ratio}); pass size="{out.explicit_size}" to be certain'
        )
    facts = f"rule {out.rule}, downscaled {_yes(out.downscaled)}, resolution applies {_yes(out.resolution_applies)}"
    cost = f"about {out.estimated_credits:g} credits (${out.estimated_usd:g}), {out.estimated_tokens} output tokens"
    words += [facts, f"{cost}, without the prompt and reference images"]
    if out.crop:
        words.append(
            f"scale {out.scale:g}, crop {out.crop.width}×{out.crop.height} at ({out.crop.left}, {out.crop.top})"
        )
        words.append(f"closest ratio {out.closest_ratio} at {out.closest_resolution}")
    if out.alternatives:
        words.append("alternatives: " + ", ".join(out.alternatives))
    return ". ".join(words) + "." + "".join(f"\nNote: {note}" for note in out.notes)


def _yes(value: bool | None) -> str:
    return "unknown" if value is None else "yes" if value else "no"
