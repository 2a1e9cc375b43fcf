"""What a picture's bytes are: type, size, alpha, and whether it is whole. The only module that opens pictures."""

from __future__ import annotations

import struct
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from evolink_mcp.api.sizes import MAX_PIXELS
from evolink_mcp.images.metadata import orientation

if TYPE_CHECKING:
    from PIL.Image import Image

MAGIC: tuple[tuple[bytes, int, str, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", 0, "image/png", ".png"),
    (b"\xff\xd8\xff", 0, "image/jpeg", ".jpg"),
    (b"WEBP", 8, "image/webp", ".webp"),
)
FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a picture's bytes say: MIME type, usual suffix, width and height in pixels as it is seen, whether it has alpha.

    `upright`: its pixels lie as they are seen, no EXIF orientation turns them. Only of a picture that was decoded:
    `transparent` is the share of pixels that can be seen through, None without alpha; `one_colour`: all its pixels are
    alike.
    """

    mime_type: str
    suffix: str
    width: int
    height: int
    has_alpha: bool
    upright: bool = True
    transparent: float | None = None
    one_colour: bool = False


class NotAPicture(ValueError):
    """The bytes are not a whole PNG, JPEG or WebP picture within the limits."""


def sniff(head: bytes) -> tuple[str, str] | None:
    """(MIME type, suffix) by magic bytes; None for anything but PNG, JPEG and WebP."""
    for magic, offset, mime_type, suffix in MAGIC:
        if head[offset : offset + len(magic)] == magic and (offset == 0 or head[:4] == b"RIFF"):
            return mime_type, suffix
    return None


def examine(file: BinaryIO, *, max_pixels: int = MAX_PIXELS, max_side: int = MAX_PIXELS, whole: bool = True) -> Facts:
    """Type and size of the picture in `file`; with `whole`, every pixel is decoded once. Blocks: run it in a child.

    Raises:
        NotAPicture: not one of the three types, too large, or damaged.
    """
    with checked(file, max_pixels, max_side) as (image, facts):
        return decoded(image, facts) if whole else facts


@contextmanager
def checked(file: BinaryIO, max_pixels: int = MAX_PIXELS, max_side: int = MAX_PIXELS) -> Generator[tuple[Image, Facts]]:
    """The picture in `file`, its parts counted but not decoded yet, with what its head says.

    Raises:
        NotAPicture: as `examine`.
    """
    known = sniff(file.read(16))
    if known is None:
        raise NotAPicture("it is not a PNG, JPEG or WebP picture")
    try:
        turned = orientation(file, known[0])
    except ValueError as error:
        raise NotAPicture(f"it is damaged or incomplete: {error}") from error
    file.seek(0)
    with opened(file, max_pixels, max_side) as image:
        width, height = reversed(image.size) if turned >= 5 else image.size
        yield image, Facts(*known, width, height, image.has_transparency_data, upright=turned == 1)


def decoded(image: Image, facts: Facts) -> Facts:
    """`facts` with what only the pixels tell; decodes all of them."""
    image.load()
    return replace(facts, transparent=_transparent(image), one_colour=_is_one_colour(image))


def _transparent(image: Image) -> float | None:
    """The share of pixels that can be seen through."""
    if "A" not in image.getbands():
        return None
    opaque = image.histogram()[-1]  # alpha is the last band
    return round(1 - opaque / (image.width * image.height), 4)


def _is_one_colour(image: Image) -> bool:
    extrema = cast("Any", image.getextrema())
    bands = extrema if isinstance(extrema[0], tuple) else (extrema,)
    return all(low == high for low, high in bands)


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
    except MemoryError as error:
        raise NotAPicture("it needs too much memory") from error
    except (OSError, SyntaxError, EOFError, ValueError, IndexError, struct.error) as error:
        raise NotAPicture("it is damaged or incomplete") from error
