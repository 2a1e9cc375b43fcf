"""What a picture's bytes are: type, size, alpha, and whether it is whole. The only module that opens pictures."""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import anyio.to_thread

from evolink_mcp.api.sizes import MAX_PIXELS

if TYPE_CHECKING:
    from PIL.Image import Image

MAGIC: tuple[tuple[bytes, int, str, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", 0, "image/png", ".png"),
    (b"\xff\xd8\xff", 0, "image/jpeg", ".jpg"),
    (b"WEBP", 8, "image/webp", ".webp"),
)
FORMATS = ("PNG", "JPEG", "WEBP")
T = TypeVar("T")
_ONE_WORKER: list[anyio.CapacityLimiter] = []


@dataclass(frozen=True, slots=True)
class Facts:
    """What a picture's bytes say: MIME type, usual suffix, width and height in pixels, whether it has alpha."""

    mime_type: str
    suffix: str
    width: int
    height: int
    has_alpha: bool


class NotAPicture(ValueError):
    """The bytes are not a whole PNG, JPEG or WebP picture within the limits."""


def sniff(head: bytes) -> tuple[str, str] | None:
    """(MIME type, suffix) by magic bytes; None for anything but PNG, JPEG and WebP."""
    for magic, offset, mime_type, suffix in MAGIC:
        if head[offset : offset + len(magic)] == magic and (offset == 0 or head[:4] == b"RIFF"):
            return mime_type, suffix
    return None


def examine(file: BinaryIO, *, max_pixels: int = MAX_PIXELS, max_side: int = MAX_PIXELS, whole: bool = True) -> Facts:
    """Type and size of the picture in `file`; with `whole`, every pixel is decoded once. Blocks: run it in a thread.

    Raises:
        NotAPicture: not one of the three types, too large, or damaged.
    """
    known = sniff(file.read(16))
    if known is None:
        raise NotAPicture("it is not a PNG, JPEG or WebP picture")
    file.seek(0)
    with opened(file, max_pixels, max_side) as image:
        if whole:
            image.load()
        return Facts(*known, image.width, image.height, image.has_transparency_data)


@contextmanager
def opened(file: BinaryIO, max_pixels: int = MAX_PIXELS, max_side: int = MAX_PIXELS) -> Generator[Image]:
    """The picture in `file`, not decoded yet; every error that Pillow has for a damaged file becomes NotAPicture."""
    from PIL import Image as pil

    pil.MAX_IMAGE_PIXELS = None  # the size is checked below, before anything is decoded
    try:
        with pil.open(file, formats=FORMATS) as image:
            if image.width * image.height > max_pixels or max(image.size) > max_side:
                raise NotAPicture(f"it is too large: {image.width}×{image.height} pixels")
            yield image
    except NotAPicture:
        raise
    except (OSError, SyntaxError, EOFError, ValueError, IndexError, struct.error) as error:
        raise NotAPicture("it is damaged or incomplete") from error


async def in_picture_thread(call: Callable[[], T]) -> T:
    """Run `call` in the worker thread that is kept for pictures, so that the event loop never waits for it."""
    if not _ONE_WORKER:
        _ONE_WORKER.append(anyio.CapacityLimiter(1))
    return await anyio.to_thread.run_sync(call, limiter=_ONE_WORKER[0])
