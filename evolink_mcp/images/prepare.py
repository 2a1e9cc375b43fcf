"""A reference as it is sent: checked by its head, upright, without metadata. Blocks: run it in a child."""

from __future__ import annotations

import io
from typing import Any

from evolink_mcp.images.inspect import Facts, NotAPicture, checked, decoded
from evolink_mcp.images.metadata import without_metadata

REFERENCE_MAX_PIXELS = 178_956_970
REFERENCE_MAX_SIDE = 23_170
# What fits into a child's memory: a mask once, a picture that must be turned twice.
MASK_MAX_PIXELS = 50_000_000
TURNED_MAX_PIXELS = 24_000_000
# How a picture that had to be turned is written again.
SAVED_AS: dict[str, dict[str, Any]] = {
    "image/jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "image/png": {"format": "PNG"},
    "image/webp": {"format": "WEBP", "quality": 95},
}


def check_reference(content: bytes, is_mask: bool) -> Facts:
    """Type and size of a picture that may be sent; of a mask also the share of its transparent pixels.

    Raises:
        NotAPicture: it cannot be used, and why.
    """
    with checked(io.BytesIO(content), REFERENCE_MAX_PIXELS, REFERENCE_MAX_SIDE) as (image, facts):
        pixels = image.width * image.height
        if not facts.upright and pixels > TURNED_MAX_PIXELS and facts.mime_type != "image/jpeg":
            raise NotAPicture("its metadata turn it, and it is too large to be turned here: save it upright")
        if not is_mask or not facts.has_alpha:
            return facts
        if pixels > MASK_MAX_PIXELS:
            raise NotAPicture(f"a mask may have at most {MASK_MAX_PIXELS // 1_000_000} megapixels")
        return decoded(image if "A" in image.getbands() else image.convert("RGBA"), facts)


def presentable(content: bytes) -> bytes:
    """The picture upright and without metadata. One that is upright keeps every pixel; another is written again.

    A JPEG of more than TURNED_MAX_PIXELS that must be turned is halved first (its edges, perhaps repeatedly).

    Raises:
        NotAPicture: it cannot be decoded.
    """
    with checked(io.BytesIO(content), REFERENCE_MAX_PIXELS, REFERENCE_MAX_SIDE) as (image, facts):
        if facts.upright:
            return without_metadata(content, facts.mime_type)
        from PIL import ImageOps

        shrink = 1
        while image.width * image.height > TURNED_MAX_PIXELS * shrink**2:
            shrink *= 2
        if shrink > 1:
            image.draft(image.mode, (image.width // shrink, image.height // shrink))
        colours = image.info.get("icc_profile")
        ImageOps.exif_transpose(image, in_place=True)
        image.info.clear()
        out = io.BytesIO()
        image.save(out, icc_profile=colours, **SAVED_AS[facts.mime_type])
        return out.getvalue()
