"""compute_size: pixels and price of a size, or the size that covers a wish; as data and in words."""

from __future__ import annotations

from evolink_mcp.api import sizes
from evolink_mcp.api.costs import price
from evolink_mcp.errors import Refused
from evolink_mcp.tools import shapes
from evolink_mcp.tools.arguments import ComputeSizeArguments


def compute(req: ComputeSizeArguments, rule: str) -> shapes.SizeOut:
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
        problem = shapes.ErrorOut(
            code="illegal_size", message=error.reason, retryable=False,
            advice="Use one of the alternatives." if nearest else "Use auto, one of the 15 ratios, or WxH.",
        )  # fmt: skip
        return shapes.SizeOut(alternatives=nearest, error=problem)
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


def _covering(req: ComputeSizeArguments, rule: str) -> shapes.SizeOut:
    assert req.width is not None
    assert req.height is not None
    cover = sizes.cover(req.width, req.height, rule)
    out = _sized(cover.size, req)
    out.rule, out.downscaled, out.resolution_applies = "explicit", False, False
    out.scale = round(cover.scale, 4)
    out.crop = shapes.Crop(left=cover.left, top=cover.top, width=cover.crop.width, height=cover.crop.height)
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


def _sized(size: sizes.Size | None, req: ComputeSizeArguments) -> shapes.SizeOut:
    cost = price(size, req.quality, req.n)
    out = shapes.SizeOut(estimated_tokens=cost.tokens, estimated_credits=cost.credits, estimated_usd=cost.usd)
    if size is not None:
        out.width, out.height, out.explicit_size = size.width, size.height, str(size)
        out.pixels, out.megapixels, out.aspect_ratio = size.pixels, size.megapixels, size.aspect_ratio
    return out


def size_text(out: shapes.SizeOut) -> str:
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
