"""Make files of exact size, type and length from one image. Its functions run in the decoder process."""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

from evolink_mcp.images.inspect import ImageFacts, open_image, upright
from evolink_mcp.images.metadata import Origin, with_origin
from evolink_mcp.images.prepare import REFERENCE_MAX_SIDE
from evolink_mcp.images.structure import parts_of
from evolink_mcp.images.unusable import Reason

if TYPE_CHECKING:
    from PIL.Image import Image

Fit = Literal["cover", "contain", "pad"]
Colour = tuple[int, int, int, int]

# The decoder has 300 MiB, and an image needs 4 bytes per pixel beside the largest target.
SOURCE_MAX_PIXELS = 50_000_000
SOURCE_MAX_SIDE = REFERENCE_MAX_SIDE
QUALITY_DEFAULT = 90
QUALITY_MAX = 100
QUALITY_MIN = 10  # the lowest quality that `max_bytes` uses
# A binary search over the 91 qualities from 10 to 100 needs at most 7 steps.
QUALITY_STEPS_MAX = 7
# Pillow first halves the image by averaging while it stays 3 times the target: no visible loss.
REDUCING_GAP = 3.0
# A border has the colour of the top left pixel. JPEG changes it by a few levels.
TRIM_TOLERANCE = 10
DRAFT_MARGIN = 2
COLOUR_MAX_CHARS = 40
TRANSPARENT: Colour = (0, 0, 0, 0)
WHITE: Colour = (255, 255, 255, 255)
PNG_FAST_PIXELS = 2_000_000  # of a larger PNG only runs are compressed: a third of the time, as short for a photo
PNG_FAST = {"compress_type": 3}  # zlib's Z_RLE
PNG_SHORTEST = {"compress_level": 9}
_PILLOW_NAMES = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP", "image/x-icon": "ICO"}
_LOSSY = ("image/jpeg", "image/webp")
_PROFILE_SPACES = {b"GRAY": ("L", "LA"), b"RGB ": ("RGB", "RGBA")}


@dataclass(frozen=True, slots=True)
class Output:
    """One file to make: its sizes in pixels (several only for an icon) and its MIME type."""

    sizes: tuple[tuple[int, int], ...]
    mime_type: str


@dataclass(frozen=True, slots=True)
class DerivePlan:
    """The files to make from one image.

    `cover` fills the size and cuts the rest, `contain` keeps the whole image and may be smaller in one edge, `pad` adds
    borders to it. `focus` is the point to keep, as shares of width and height. `background` (RGBA) fills borders and
    transparent pixels; None: transparent where the type allows it, else white. `max_bytes` lowers the quality of JPEG
    and WebP. `trim` removes borders of one colour first.
    """

    outputs: tuple[Output, ...]
    fit: Fit = "cover"
    focus: tuple[float, float] = (0.5, 0.5)
    quality: int = QUALITY_DEFAULT
    max_bytes: int | None = None
    background: Colour | None = None
    trim: bool = False
    origin: Origin | None = None

    def pack(self) -> bytes:
        """Return the plan as JSON."""
        # A prompt may contain lone surrogates, which UTF-8 cannot encode.
        return json.dumps(asdict(self), ensure_ascii=False).encode("utf-8", "replace")

    @classmethod
    def unpack(cls, text: bytes) -> DerivePlan:
        """Read a plan that `pack` wrote."""
        data: dict[str, Any] = json.loads(text)
        outputs = [
            Output(tuple((width, height) for width, height in output["sizes"]), output["mime_type"])
            for output in data.pop("outputs")
        ]
        for name in ("focus", "background"):
            data[name] = None if data[name] is None else tuple(data[name])
        data["origin"] = None if data["origin"] is None else Origin(**data["origin"])
        return cls(tuple(outputs), **data)


@dataclass(frozen=True, slots=True)
class DerivedImage:
    """One finished file, or the reason why there is none.

    `width` and `height` are in pixels. `quality` is 0 for a type without one. `is_enlarged`: the size is larger than
    the source. `has_lost_alpha`: transparent pixels were filled. `has_lost_profile`: the colour profile did not fit.
    `smallest_bytes` is the smallest possible length if `max_bytes` is lower.
    """

    mime_type: str
    width: int = 0
    height: int = 0
    quality: int = 0
    is_enlarged: bool = False
    has_lost_alpha: bool = False
    has_lost_profile: bool = False
    smallest_bytes: int = 0
    reason: Reason | None = None


def parse_colour(text: str) -> Colour:
    """Return RGBA for a CSS name, #hex, rgb(…) or "transparent".

    Raises:
        ValueError: it is no colour.
    """
    from PIL import ImageColor

    plain = text.strip().lower()
    if plain in ("transparent", "none"):
        return TRANSPARENT
    try:
        red, green, blue, *alpha = ImageColor.getrgb(plain[:COLOUR_MAX_CHARS])
    except ValueError:
        close = difflib.get_close_matches(plain, ImageColor.colormap, n=1)
        raise ValueError(f"use a name such as {close[0] if close else 'white'}, #ffffff or transparent") from None
    return red, green, blue, alpha[0] if alpha else 255


def derive(content: bytes, plan: DerivePlan) -> Iterator[ImageFacts | tuple[DerivedImage, bytes]]:
    """Yield the facts of the image (after `trim`), then each finished file with its content, in the plan's order.

    Raises:
        UnusableImage: the image cannot be decoded.
    """
    with open_image(content, SOURCE_MAX_PIXELS, SOURCE_MAX_SIDE) as opened:
        facts = opened.facts
        # `trim` reports the remaining size in original pixels, so it needs the whole image.
        if not plan.trim and facts.mime_type == "image/jpeg":
            _decode_smaller(opened.image, facts, plan)
        profile = opened.image.info.get("icc_profile")
        image = upright(_in_plain_mode(opened.image), opened.orientation)
        # After `_decode_smaller`, `image.size` is smaller than the original.
        size = (facts.width, facts.height)
        if plan.trim:
            image = _trimmed(image)
            size = image.size
        has_alpha = image.mode in ("RGBA", "LA")
        if has_alpha:
            image = image.convert("RGBa" if image.mode == "RGBA" else "La")  # alpha must not mix colours while resizing
        source = _Source(image, size, has_alpha, profile)
        yield ImageFacts(facts.mime_type, *size, has_alpha=has_alpha, is_upright=facts.is_upright)
        for output in plan.outputs:
            yield _finished(source, output, plan)


@dataclass(frozen=True, slots=True)
class _Source:
    """The upright image. With alpha its colours are multiplied by it. `size` is that of the original pixels."""

    image: Image
    size: tuple[int, int]
    has_alpha: bool
    profile: bytes | None


def _decode_smaller(image: Image, facts: ImageFacts, plan: DerivePlan) -> None:
    """Let the JPEG decoder halve a large image while it stays DRAFT_MARGIN times larger than every target."""
    sizes = [size for output in plan.outputs for size in output.sizes]
    scale = max(max(width / facts.width, height / facts.height) for width, height in sizes) * DRAFT_MARGIN
    if scale < 1:
        image.draft(image.mode, (ceil(image.width * scale), ceil(image.height * scale)))


def _in_plain_mode(image: Image) -> Image:
    """Return the image as L, LA, RGB or RGBA, without alpha if every pixel is opaque."""
    if image.mode.startswith("I"):  # 16 bits per pixel: `convert` would clip them
        return _mapped(image.convert("I"), _high_byte).convert("L")
    if image.has_transparency_data:
        image = image if image.mode == "LA" else image.convert("RGBA")
        # An opaque alpha channel must not count as lost transparency in a JPEG.
        if image.getextrema()[-1] != (255, 255):
            return image
        return image.convert("L" if image.mode == "LA" else "RGB")
    if image.mode in ("1", "L"):
        return image.convert("L")
    return image.convert("RGB")


def _mapped(image: Image, values: Any) -> Image:
    plain: Any = image
    return plain.point(values)


def _high_byte(value: Any) -> Any:
    return value * (1 / 256)


def _trimmed(image: Image) -> Image:
    """Return the image without borders of the colour of its top left pixel. An image of one colour stays whole."""
    from PIL import Image as pil
    from PIL import ImageChops

    corner = image.getpixel((0, 0))
    difference = ImageChops.difference(image, pil.new(image.mode, image.size, corner))
    if isinstance(corner, tuple) and image.mode in ("RGBA", "LA") and corner[-1] == 0:
        difference = difference.getchannel("A")  # the colour of an invisible pixel has no meaning
    levels = _mapped(difference, [255 * (value > TRIM_TOLERANCE) for value in range(256)] * len(difference.getbands()))
    box = levels.getbbox(alpha_only=False)
    return image if box is None else image.crop(box)


def _finished(source: _Source, output: Output, plan: DerivePlan) -> tuple[DerivedImage, bytes]:
    try:
        return _made(source, output, plan)
    except MemoryError:
        # The other outputs may be smaller and fit.
        return DerivedImage(output.mime_type, reason=Reason.TOO_MUCH_MEMORY), b""


def _made(source: _Source, output: Output, plan: DerivePlan) -> tuple[DerivedImage, bytes]:
    images = [_rendered(source, size, output.mime_type, plan) for size in output.sizes]
    largest = max(images, key=lambda image: image.width * image.height)
    profile = _profile_for(largest, source.profile)
    quality = plan.quality if output.mime_type in _LOSSY else 0
    content = _encoded(images, output.mime_type, quality, profile, plan)
    smallest = 0
    if plan.max_bytes is not None and len(content) > plan.max_bytes:
        first = content
        quality, content = _shortened(images, output.mime_type, quality, profile, plan)
        content = min(content, first, key=len)
        smallest = len(content) if len(content) > plan.max_bytes else 0
    facts = DerivedImage(
        output.mime_type,
        largest.width,
        largest.height,
        quality,
        # The last size of an icon is the largest one.
        is_enlarged=_scale(source.size, output.sizes[-1], plan.fit) > 1,
        has_lost_alpha=source.has_alpha and largest.mode not in ("RGBA", "LA"),
        has_lost_profile=source.profile is not None and profile is None and output.mime_type != "image/x-icon",
        smallest_bytes=smallest,
        reason=Reason.ABOVE_MAX_BYTES if smallest else None,
    )
    return facts, b"" if smallest else content


def _rendered(source: _Source, size: tuple[int, int], mime_type: str, plan: DerivePlan) -> Image:
    """Return the image in one size, with alpha only if the type can have it."""
    if plan.fit == "cover":
        image = _resized(source.image, size, _cover_box(source.image.size, size, plan.focus))
    else:
        image = _resized(source.image, _contained_size(source.size, size), None)
    if source.has_alpha:
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    background = plan.background
    if background is None:
        background = WHITE if mime_type == "image/jpeg" else TRANSPARENT
    needs_canvas = plan.fit == "pad" and image.size != size
    needs_fill = source.has_alpha and background[3] == 255
    if not needs_canvas and not needs_fill:
        return image
    return _on_canvas(image, size if plan.fit == "pad" else image.size, background, plan.focus)


def _cover_box(
    source: tuple[int, int], size: tuple[int, int], focus: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Return the largest part of the source that has the shape of `size`, with the focus as near to its middle as possible."""
    scale = _scale(source, size, "cover")
    width = min(size[0] / scale, source[0])
    height = min(size[1] / scale, source[1])
    left = min(max(focus[0] * source[0] - width / 2, 0), source[0] - width)
    top = min(max(focus[1] * source[1] - height / 2, 0), source[1] - height)
    return left, top, min(left + width, source[0]), min(top + height, source[1])


def _scale(source: tuple[int, int], size: tuple[int, int], fit: Fit) -> float:
    """Return the factor by which the image is enlarged."""
    factors = (size[0] / source[0], size[1] / source[1])
    return max(factors) if fit == "cover" else min(factors)


def _contained_size(source: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    scale = _scale(source, size, "contain")
    return (
        min(size[0], max(1, round(source[0] * scale))),
        min(size[1], max(1, round(source[1] * scale))),
    )


def _resized(image: Image, size: tuple[int, int], box: tuple[float, float, float, float] | None) -> Image:
    from PIL.Image import Resampling

    plain: Any = image
    return plain.resize(size, Resampling.LANCZOS, box, reducing_gap=REDUCING_GAP)


def _on_canvas(image: Image, size: tuple[int, int], background: Colour, focus: tuple[float, float]) -> Image:
    """Return the image on a background. The focus divides the free space: 0 is left or top, 1 is right or bottom."""
    from PIL import Image as pil

    place = (round((size[0] - image.width) * focus[0]), round((size[1] - image.height) * focus[1]))
    is_grey = image.mode in ("L", "LA") and len(set(background[:3])) == 1
    if background[3] == 255:
        mode = "L" if is_grey else "RGB"
        canvas = pil.new(mode, size, background[0] if is_grey else background[:3])
        mask = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
        canvas.paste(image.convert(mode), place, mask)
        return canvas
    mode = "LA" if is_grey else "RGBA"
    canvas = pil.new(mode, size, (background[0], background[3]) if is_grey else background)
    canvas.paste(image.convert(mode), place)
    return canvas


def _profile_for(image: Image, profile: bytes | None) -> bytes | None:
    """Return the colour profile if it describes the colours of the image: that of a CMYK file does not fit RGB."""
    # Bytes 16 to 19 of an ICC profile name its colour space.
    if profile is None or image.mode not in _PROFILE_SPACES.get(profile[16:20], ()):
        return None
    return profile


def _encoded(images: list[Image], mime_type: str, quality: int, profile: bytes | None, plan: DerivePlan) -> bytes:
    pixels = images[0].width * images[0].height
    options: dict[str, Any] = {
        "image/png": {} if pixels < PNG_FAST_PIXELS else PNG_FAST,
        "image/jpeg": {"quality": quality},
        "image/webp": {"quality": quality, "method": 2},
        # Without `append_images`, Pillow would make the sizes itself from one image.
        "image/x-icon": {"sizes": [image.size for image in images], "append_images": images},
    }[mime_type]
    return _written(images[-1], mime_type, profile, plan, options)


def _written(image: Image, mime_type: str, profile: bytes | None, plan: DerivePlan, options: dict[str, Any]) -> bytes:
    # Pillow would write metadata of the source from `info`.
    image.info.clear()
    out = io.BytesIO()
    if mime_type != "image/x-icon":
        options = {**options, "icc_profile": profile}
    image.save(out, _PILLOW_NAMES[mime_type], **options)
    content = out.getvalue()
    if plan.origin is None or mime_type == "image/x-icon":
        return content
    return with_origin(content, mime_type, parts_of(content, mime_type), plan.origin) or content


def _shortened(
    images: list[Image], mime_type: str, quality: int, profile: bytes | None, plan: DerivePlan
) -> tuple[int, bytes]:
    """Return the highest quality that fits `max_bytes`, else the shortest file, with its content."""
    assert plan.max_bytes is not None
    if mime_type == "image/png":
        return 0, _written(images[0], mime_type, profile, plan, PNG_SHORTEST)
    if mime_type not in _LOSSY:
        return 0, _encoded(images, mime_type, 0, profile, plan)
    low = min(QUALITY_MIN, quality)
    best = (low, _encoded(images, mime_type, low, profile, plan))
    high = quality - 1
    if len(best[1]) > plan.max_bytes:
        return best
    for _ in range(QUALITY_STEPS_MAX):
        if low >= high:
            break
        middle = (low + high + 1) // 2
        content = _encoded(images, mime_type, middle, profile, plan)
        if len(content) <= plan.max_bytes:
            low = middle
            best = (middle, content)
        else:
            high = middle - 1
    return best
