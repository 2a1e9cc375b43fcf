"""A saved picture made small, to be shown inside an answer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

from evolink_mcp.pictures.folders import open_plain
from evolink_mcp.pictures.inspect import opened

# What may be asked for, in pixels.
PREVIEW_EDGE_MIN, PREVIEW_EDGE_MAX = 64, 2048
# (share of the longest edge, WebP quality): the first step that fits the budget is taken.
LADDER = ((1.0, 80), (0.75, 60), (0.5, 50), (0.25, 40))
# Pillow halves the picture by averaging first, while it stays 1.5 times the target: half the time, no visible loss.
REDUCING_GAP = 1.5


def preview(path: Path, edge: int, budget: int, kind: Literal["webp", "png"] = "webp") -> bytes | None:
    """A small copy of the picture at `path`: longest edge ≤ `edge` pixels, ≤ `budget` bytes, no metadata.

    None where no step of the ladder fits. Blocks: run it in a thread.

    Raises:
        NotAPicture: too large, damaged, or not a picture (any more).
        OSError: the file cannot be read.
    """
    with open_plain(path) as file, opened(file) as image:
        image.draft("RGB", (edge, edge))  # a JPEG is decoded at the size that is needed
        mode = "RGBA" if image.has_transparency_data else "RGB"
        step = image.convert(mode) if image.mode != mode else image
        for share, quality in LADDER:
            longest = max(1, int(edge * share))
            # In place, from the last step: to copy a 4K picture takes as long as to encode it.
            step.thumbnail((longest, longest), reducing_gap=REDUCING_GAP)
            step.info.clear()
            out = io.BytesIO()
            step.save(out, kind, quality=quality, method=2)
            if out.tell() <= budget:
                return out.getvalue()
    return None
