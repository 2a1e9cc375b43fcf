"""A picture made small, to be shown inside an answer: as it is checked, or later from its file."""

from __future__ import annotations

import io
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from evolink_mcp.images.folders import open_plain
from evolink_mcp.images.inspect import Facts, checked, decoded, opened

if TYPE_CHECKING:
    from PIL.Image import Image

# What may be asked for, in pixels.
PREVIEW_EDGE_MIN, PREVIEW_EDGE_MAX = 64, 2048
# Longest edge in pixels by the number of pictures: many are shown smaller, so that all of them fit and none is late.
EDGES = {1: 1024, 2: 768, 3: 768, 4: 640}
EDGE_OF_MANY = 512
# (share of the longest edge, WebP quality): the first step that fits the budget is taken.
LADDER = ((1.0, 80), (0.75, 60), (0.5, 50), (0.25, 40))
# Pillow halves the picture by averaging first, while it stays 1.5 times the target: half the time, no visible loss.
REDUCING_GAP = 1.5
KEPT_MAX_BYTES = 8 << 20
_KEPT: OrderedDict[tuple[str, int, int, int], bytes] = OrderedDict()
Kind = Literal["webp", "png"]


def edge_of(pictures: int, longest_edge: int | None) -> int:
    """The longest edge of each preview, in pixels, when `pictures` are shown; `longest_edge` is the owner's setting."""
    return EDGES.get(pictures, EDGE_OF_MANY) if longest_edge is None else longest_edge


def preview(path: Path, edge: int, budget: int, kind: Kind = "webp") -> bytes | None:
    """A small copy of the picture at `path`: longest edge ≤ `edge` pixels, ≤ `budget` bytes, upright, no metadata.

    None where no step of the ladder fits. Blocks: run it in a child.

    Raises:
        NotAPicture: too large, damaged, or not a picture (any more).
        OSError: the file cannot be read.
    """
    with open_plain(path) as file, opened(file) as image:
        image.draft("RGB", (edge, edge))  # a JPEG is decoded at the size that is needed
        return _made_small(image, edge, budget, kind)


def check_and_preview(path: Path, edge: int) -> tuple[Facts, bytes | None]:
    """What the picture at `path` is, every pixel decoded, and its preview (None if `edge` is 0), from one decoding.

    Blocks: run it in a child.

    Raises:
        NotAPicture: too large, damaged, or no picture.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file, checked(file) as (image, facts):
        facts = decoded(image, facts)
        return facts, _made_small(image, edge, KEPT_MAX_BYTES) if edge else None


def remember(path: Path, edge: int, made: bytes) -> None:
    """Keep a preview that was made while its picture was checked; the oldest go beyond KEPT_MAX_BYTES."""
    _KEPT[_mark(path, edge)] = made
    while sum(map(len, _KEPT.values())) > KEPT_MAX_BYTES:
        _KEPT.popitem(last=False)


def remembered(path: Path, edge: int) -> bytes | None:
    """The preview that `remember` was given, if the file has not changed since.

    Raises:
        OSError: the file is gone.
    """
    return _KEPT.get(_mark(path, edge))


def _mark(path: Path, edge: int) -> tuple[str, int, int, int]:
    now = path.stat()
    return str(path), now.st_mtime_ns, now.st_size, edge


def _made_small(image: Image, edge: int, budget: int, kind: Kind = "webp") -> bytes | None:
    from PIL import ImageOps

    mode = "RGBA" if image.has_transparency_data else "RGB"
    step = image.convert(mode) if image.mode != mode else image
    for share, quality in LADDER:
        longest = max(1, int(edge * share))
        # In place, from the last step: to copy a 4K picture takes as long as to encode it.
        step.thumbnail((longest, longest), reducing_gap=REDUCING_GAP)
        ImageOps.exif_transpose(step, in_place=True)
        step.info.clear()
        out = io.BytesIO()
        step.save(out, kind, quality=quality, method=2)
        if out.tell() <= budget:
            return out.getvalue()
    return None
