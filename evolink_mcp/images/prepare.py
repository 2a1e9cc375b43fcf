"""Check a reference image, and make the copy that is uploaded: upright and without metadata.

Its functions run in the decoder process.
"""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

from evolink_mcp.images.inspect import ImageFacts, measure_alpha, open_image, upright
from evolink_mcp.images.integrity import check_data, check_pixels
from evolink_mcp.images.unusable import Reason, UnusableImage

# EvoLink's limits for a reference image.
REFERENCE_MAX_PIXELS = 178_956_970
REFERENCE_MAX_SIDE = 23_170
# The decoder has 300 MiB. A mask needs one copy of its pixels, rotation needs two.
MASK_MAX_PIXELS = 50_000_000
ROTATED_MAX_PIXELS = 24_000_000
# How a rotated image is written.
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "image/jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "image/png": {"format": "PNG"},
    "image/webp": {"format": "WEBP", "quality": 95},
}


def check_reference(
    content: bytes,
    is_mask: bool,
    *,
    mask_max_pixels: int = MASK_MAX_PIXELS,
    rotated_max_pixels: int = ROTATED_MAX_PIXELS,
) -> ImageFacts:
    """Return type and size of a reference image; for a mask also its transparency. All pixels are decoded.

    Raises:
        UnusableImage: EvoLink or this server cannot use it.
    """
    with open_image(content, REFERENCE_MAX_PIXELS, REFERENCE_MAX_SIDE) as opened:
        image = opened.image
        facts = opened.facts
        pixels = image.width * image.height
        # Only the JPEG decoder can decode an image smaller.
        if not facts.is_upright and pixels > rotated_max_pixels and facts.mime_type != "image/jpeg":
            raise UnusableImage(Reason.ROTATED_TOO_LARGE)
        if is_mask and facts.has_alpha and pixels > mask_max_pixels:
            raise UnusableImage(Reason.MASK_TOO_LARGE)
        pixels_hash = check_pixels(opened)
        if is_mask and facts.has_alpha:
            image.load()  # a large PNG is loaded here
            facts = replace(facts, alpha=measure_alpha(image))
        plain = opened.content
    check_data(plain, facts.mime_type, pixels_hash, REFERENCE_MAX_PIXELS, REFERENCE_MAX_SIDE)
    return facts


def normalize(content: bytes, *, rotated_max_pixels: int = ROTATED_MAX_PIXELS) -> bytes:
    """Return the image upright and without metadata. An upright image keeps every pixel, another one is encoded again.

    A JPEG with more than `rotated_max_pixels` is halved before it is rotated, until it fits.

    Raises:
        UnusableImage: it cannot be decoded.
    """
    with open_image(content, REFERENCE_MAX_PIXELS, REFERENCE_MAX_SIDE) as opened:
        if opened.facts.is_upright:
            return opened.content
        image = opened.image
        shrink = 1
        while image.width * image.height > rotated_max_pixels * shrink**2:
            shrink *= 2
        if shrink > 1:
            image.draft(image.mode, (image.width // shrink, image.height // shrink))
        icc_profile = image.info.get("icc_profile")
        rotated = upright(image, opened.orientation)
        rotated.info.clear()
        out = io.BytesIO()
        rotated.save(out, icc_profile=icc_profile, **SAVE_OPTIONS[opened.facts.mime_type])
        return out.getvalue()
