"""Small copies of images for answers and pages, and the cache of those made while an image was checked."""

from __future__ import annotations

import io
from collections import OrderedDict
from pathlib import Path

from evolink_mcp.images.inspect import ImageFacts, OpenImage, decode, open_image, upright

# Limits of the longest edge, in pixels.
PREVIEW_EDGE_MIN, PREVIEW_EDGE_MAX = 64, 2048
# Longest edge in pixels by the number of images: smaller for many images, so that all fit into one answer.
EDGES = {1: 1024, 2: 768, 3: 768, 4: 640}
EDGE_OF_MANY = 512
# (share of the longest edge, WebP quality): the first step that fits the budget is used.
LADDER = ((1.0, 80), (0.75, 60), (0.5, 50), (0.25, 40))
# Pillow first halves the image by averaging while it stays 1.5 times the target: half the time, no visible loss.
REDUCING_GAP = 1.5
CACHE_MAX_BYTES = 8 << 20


def edge_of(pictures: int, longest_edge: int | None) -> int:
    """Return the longest edge of each preview in pixels for an answer with `pictures` images. A set `longest_edge` wins."""
    return EDGES.get(pictures, EDGE_OF_MANY) if longest_edge is None else longest_edge


def preview(content: bytes, edge: int, budget: int) -> bytes | None:
    """Return a small upright copy of an image without metadata: longest edge ≤ `edge` pixels, ≤ `budget` bytes.

    None if no step of the ladder fits. Runs in the decoder process.

    Raises:
        UnusableImage: too large, damaged, or not an image.
    """
    with open_image(content) as opened:
        opened.image.draft("RGB", (edge, edge))  # a JPEG is decoded at the size that is needed
        return _reduce(opened, edge, budget)


def check_and_preview(content: bytes, edge: int, budget: int = CACHE_MAX_BYTES) -> tuple[ImageFacts, bytes | None]:
    """Return the facts of an image and its preview (None if `edge` is 0). All pixels are decoded, once.

    Runs in the decoder process.

    Raises:
        UnusableImage: too large, damaged, or not an image.
    """
    with open_image(content) as opened:
        facts = decode(opened.image, opened.facts)
        return facts, _reduce(opened, edge, budget) if edge else None


class PreviewCache:
    """Previews that were made while their images were checked. Beyond `max_bytes` the oldest ones are dropped."""

    def __init__(self, max_bytes: int = CACHE_MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._previews: OrderedDict[tuple[str, int, int, int], bytes] = OrderedDict()

    def add(self, path: Path, edge: int, content: bytes) -> None:
        """Add the preview of the image at `path` with this longest edge in pixels.

        Raises:
            OSError: the image is gone.
        """
        self._previews[_cache_key(path, edge)] = content
        while sum(map(len, self._previews.values())) > self._max_bytes:
            self._previews.popitem(last=False)

    def find(self, path: Path, edge: int) -> bytes | None:
        """Return the preview if the file has not changed since.

        Raises:
            OSError: the file is gone.
        """
        return self._previews.get(_cache_key(path, edge))


def _cache_key(path: Path, edge: int) -> tuple[str, int, int, int]:
    status = path.stat()
    return str(path), status.st_mtime_ns, status.st_size, edge


def _reduce(opened: OpenImage, edge: int, budget: int) -> bytes | None:
    image = opened.image
    mode = "RGBA" if image.has_transparency_data else "RGB"
    reduced = image.convert(mode) if image.mode != mode else image
    for share, quality in LADDER:
        longest = max(1, int(edge * share))
        # In place, from the previous step: a copy of a 4K image takes as long as its encoding.
        reduced.thumbnail((longest, longest), reducing_gap=REDUCING_GAP)
        rotated = upright(reduced, opened.orientation)
        rotated.info.clear()
        out = io.BytesIO()
        rotated.save(out, "WEBP", quality=quality, method=2)
        if out.tell() <= budget:
            return out.getvalue()
    return None
