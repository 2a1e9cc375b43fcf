"""Open an image: type, size, transparency, and whether it is complete. The only module that calls Pillow's open.

Its functions run in the decoder process.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from evolink_mcp.api.models import MODELS
from evolink_mcp.images.metadata import orientation, without_metadata
from evolink_mcp.images.structure import parts_of
from evolink_mcp.images.unusable import Reason, UnusableImage

if TYPE_CHECKING:
    from PIL.Image import Image

MAGIC: tuple[tuple[bytes, int, str, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", 0, "image/png", ".png"),
    (b"\xff\xd8\xff", 0, "image/jpeg", ".jpg"),
    (b"WEBP", 8, "image/webp", ".webp"),
)
# A result image has at most as many pixels as the largest size of any model.
MAX_PIXELS = max(model.limits.pixels_max for model in MODELS.values())
SUFFIX_OF = {mime_type: suffix for _, _, mime_type, suffix in MAGIC}
FORMATS = ("PNG", "JPEG", "WEBP")
# A pixel is transparent if at least half of the background shows through it. Values go from 0 (invisible) to 255 (opaque).
TRANSPARENT_ALPHA_MAX = 127
# An image that keeps its transparency in a palette or in one colour is converted in strips of this many pixels.
STRIP_PIXELS = 1 << 20


@dataclass(frozen=True, slots=True)
class Alpha:
    """The measured transparency of an image.

    `transparent_share` is the share of pixels with an alpha of at most TRANSPARENT_ALPHA_MAX. `lowest` and `highest` are
    the extreme alpha values of all pixels, 0 to 255.
    """

    transparent_share: float
    lowest: int
    highest: int


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """The properties of an image: MIME type, width and height in pixels as displayed, whether it has alpha.

    `is_upright`: no EXIF orientation rotates it. The others need all pixels: `alpha` is the measured transparency, None
    without alpha; `is_one_colour`: all pixels are equal.
    """

    mime_type: str
    width: int
    height: int
    has_alpha: bool
    is_upright: bool = True
    alpha: Alpha | None = None
    is_one_colour: bool = False

    @property
    def suffix(self) -> str:
        """The usual suffix of the type, with its dot."""
        return SUFFIX_OF[self.mime_type]


@dataclass(frozen=True, slots=True)
class OpenImage:
    """An open image: Pillow's object, its facts, its EXIF orientation and the file without metadata."""

    image: Image
    facts: ImageFacts
    orientation: int
    content: bytes


def sniff(head: bytes) -> tuple[str, str] | None:
    """Return (MIME type, suffix) by magic bytes; None for anything but PNG, JPEG and WebP."""
    for magic, offset, mime_type, suffix in MAGIC:
        if head[offset : offset + len(magic)] == magic and (offset == 0 or head[:4] == b"RIFF"):
            return mime_type, suffix
    return None


@contextmanager
def open_image(content: bytes, max_pixels: int = MAX_PIXELS, max_side: int = MAX_PIXELS) -> Generator[OpenImage]:
    """Open an image and read its head. Pillow sees the file without its metadata, and only after its parts were counted.

    Raises:
        UnusableImage: not one of the three types, too large, too many parts, or damaged. Also for an error of Pillow
            inside the `with` block.
    """
    from PIL import Image as pil

    image_type = sniff(content[:16])
    if image_type is None:
        raise UnusableImage(Reason.NOT_AN_IMAGE)
    mime_type = image_type[0]
    parts = parts_of(content, mime_type)
    turn = orientation(content, mime_type, parts)
    plain = without_metadata(content, mime_type, parts)
    pil.MAX_IMAGE_PIXELS = None  # the limit below replaces it
    try:
        # Every further format of Pillow would be one more decoder to attack.
        with pil.open(io.BytesIO(plain), formats=FORMATS) as image:
            if image.width * image.height > max_pixels or max(image.size) > max_side:
                raise UnusableImage(Reason.TOO_LARGE, image.size)
            width, height = reversed(image.size) if turn >= 5 else image.size
            facts = ImageFacts(mime_type, width, height, image.has_transparency_data, is_upright=turn == 1)
            yield OpenImage(image, facts, turn, plain)
    except UnusableImage:
        raise
    except MemoryError as error:
        raise UnusableImage(Reason.TOO_MUCH_MEMORY) from error
    except (OSError, SyntaxError, EOFError, ValueError, IndexError, struct.error) as error:
        # Pillow raises all of these for damaged files.
        raise UnusableImage(Reason.DAMAGED) from error


def decode(image: Image, facts: ImageFacts) -> ImageFacts:
    """Decode all pixels and return the facts with the properties that need them."""
    image.load()
    return replace(facts, alpha=measure_alpha(image), is_one_colour=_is_one_colour(image))


def upright(image: Image, turn: int) -> Image:
    """Return the image rotated and mirrored as its EXIF orientation `turn` (1 to 8) orders."""
    from PIL.Image import Transpose

    methods = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image if turn == 1 else image.transpose(methods[turn])


def measure_alpha(image: Image) -> Alpha | None:
    """Return the transparency of an image: of its alpha channel, its palette or its transparent colour. None without any."""
    if not image.has_transparency_data:
        return None
    if "A" in image.getbands():
        histogram = image.histogram()[-256:]  # alpha is the last band
    else:
        histogram = [0] * 256
        # The whole image in RGBA would need 4 bytes for each pixel.
        rows = max(1, STRIP_PIXELS // image.width)
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
            histogram = [sum(counts) for counts in zip(histogram, strip.histogram()[-256:], strict=True)]
    used = [value for value, count in enumerate(histogram) if count]
    share = sum(histogram[: TRANSPARENT_ALPHA_MAX + 1]) / (image.width * image.height)
    return Alpha(share, used[0], used[-1])


def _is_one_colour(image: Image) -> bool:
    extrema = cast("Any", image.getextrema())
    bands = extrema if isinstance(extrema[0], tuple) else (extrema,)
    return all(low == high for low, high in bands)
