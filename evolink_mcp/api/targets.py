"""The targets of derive_image: pixels such as 1200x628, or the name of a usual size such as og or a4-300dpi."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from math import sqrt

from evolink_mcp.api.size_grammar import MM_PER_INCH, Contradiction, paper_size_mm, suggest
from evolink_mcp.api.sizes import Size
from evolink_mcp.sanitize import harmless

TARGETS_MAX = 25
# The decoder has 300 MiB. A target needs 4 bytes per pixel, beside the source and the encoder.
TARGET_MAX_PIXELS = 36_000_000
TARGET_MAX_EDGE = 16_000  # WebP has at most 16,383 pixels per edge
# An ico file stores an edge in one byte, and 0 means 256.
ICO_MAX_EDGE = 256
DPI_DEFAULT = 300
DPI_MIN, DPI_MAX = 36, 1200
TEXT_MAX_CHARS = 60

PNG, JPEG, WEBP, ICO = "image/png", "image/jpeg", "image/webp", "image/x-icon"
MIME_TYPES = {"png": PNG, "jpeg": JPEG, "webp": WEBP, "ico": ICO}
# Sizes on screens: name, the sizes in pixels, and the type of the file if it is not that of the source.
SCREENS: dict[str, tuple[str, str | None]] = {
    "og": ("1200x630", None),
    "facebook": ("1200x630", None),
    "facebook-cover": ("851x315", None),
    "twitter": ("1200x675", None),
    "twitter-header": ("1500x500", None),
    "instagram-square": ("1080x1080", None),
    "instagram-portrait": ("1080x1350", None),
    "instagram-landscape": ("1080x566", None),
    "instagram-story": ("1080x1920", None),
    "tiktok": ("1080x1920", None),
    "youtube-thumbnail": ("1280x720", None),
    "youtube-banner": ("2560x1440", None),
    "linkedin": ("1200x627", None),
    "linkedin-banner": ("1584x396", None),
    "pinterest": ("1000x1500", None),
    "hd": ("1280x720", None),
    "full-hd": ("1920x1080", None),
    "4k": ("3840x2160", None),
    "favicon": ("16x16 32x32 48x48", ICO),
    "windows-icon": ("16x16 24x24 32x32 48x48 64x64 128x128 256x256", ICO),
    "apple-touch-icon": ("180x180", PNG),
    "app-icon": ("1024x1024", PNG),
    "android-icon": ("512x512", PNG),
}
# Paper, upright. `-landscape` and `-300dpi` may follow the name. The file is a JPEG.
PAPERS: dict[str, tuple[float, float]] = {
    name: paper_size_mm(name)
    for name in (
        *("a2", "a3", "a4", "a5", "a6", "a7", "b5"),
        *("letter", "legal", "tabloid", "postcard", "business-card"),
    )
}
_PIXELS = re.compile(r"([1-9][0-9]{0,5}) ?[x×*] ?([1-9][0-9]{0,5})(?: ?px)?")
_PAPER = re.compile(rf"({'|'.join(PAPERS)})(?:-(portrait|landscape))?(?:-([1-9][0-9]{{0,4}})dpi)?")


# The point of the image to keep, as shares of its width and height.
GRAVITY = {"top": (0.5, 0.0), "left": (0.0, 0.5), "centre": (0.5, 0.5), "right": (1.0, 0.5), "bottom": (0.5, 1.0)}
_GRAVITY_NAMES = {
    "center": "centre", "middle": "centre", "north": "top", "south": "bottom", "west": "left", "east": "right",
    "up": "top", "down": "bottom",
}  # fmt: skip
_POINT = re.compile(r"([01](?:\.\d{1,6})?|\.\d{1,6}) ?[,; ] ?([01](?:\.\d{1,6})?|\.\d{1,6})")


def parse_gravity(text: str) -> tuple[float, float]:
    """Return the focus point for an edge ("top"), a corner ("top-left") or a point ("0.3,0.7").

    Raises:
        ValueError: none of them.
    """
    plain = text.strip().lower()[:TEXT_MAX_CHARS]
    if point := _POINT.fullmatch(plain):
        x = float(point[1])
        y = float(point[2])
        if x <= 1 and y <= 1:
            return x, y
        raise ValueError(f"a point has shares from 0 to 1, such as {min(x, 1):g},{min(y, 1):g}")
    split = re.sub(r"(north|south)(?=east|west)", r"\1-", plain)
    words = [_GRAVITY_NAMES.get(word, word) for word in re.split(r"[-_ ]+", split)]
    shares = [GRAVITY[word] for word in words if word in GRAVITY]
    is_pair = len(words) == 2 and words[0] != words[1] and not {"left", "right"}.issuperset(words)
    if len(shares) != len(words) or not (len(words) == 1 or (is_pair and not {"top", "bottom"}.issuperset(words))):
        close = difflib.get_close_matches(plain, GRAVITY, n=1)
        raise ValueError(
            f"use {close[0] if close else 'centre'}, an edge, a corner such as top-left, or a point such as 0.3,0.7"
        )
    # A corner has two edges. For each direction the edge counts that is not in the middle.
    return min((share[0] for share in shares), key=lambda x: -abs(x - 0.5)), min(
        (share[1] for share in shares), key=lambda y: -abs(y - 0.5)
    )


class UnknownTarget(ValueError):
    """The text is no target. The message is one line with the reason and the nearest valid value."""


@dataclass(frozen=True, slots=True)
class Target:
    """One file to make: its name, its sizes (several only for an icon) and its MIME type, None for the source's."""

    name: str
    sizes: tuple[Size, ...]
    mime_type: str | None = None

    @property
    def size(self) -> Size:
        """The largest size."""
        return max(self.sizes, key=lambda size: size.pixels)


def parse_target(text: str) -> Target:
    """Return the target for pixels ("1200x628"), a name ("og", "a4-landscape-150dpi") or words for pixels.

    Case and blanks do not matter. The words are those of `size_grammar`: "1920x1080 portrait", "10x15 cm 300dpi".

    Raises:
        UnknownTarget: none of them, or too large.
    """
    plain = re.sub(r"\s+", " ", text.strip()[: TEXT_MAX_CHARS + 1]).lower()
    if pixels := _PIXELS.fullmatch(plain):
        size = Size(int(pixels[1]), int(pixels[2]))
        return Target(str(size), (_checked(size, text),))
    name = re.sub(r"[ _]", "-", plain)
    if name in SCREENS:
        sizes, mime_type = SCREENS[name]
        return Target(name, tuple(_size(size) for size in sizes.split()), mime_type)
    if paper := _PAPER.fullmatch(name):
        return Target(name, (_checked(_paper_size(paper[1], paper[2], paper[3], text), text),), JPEG)
    if (size := _meant_pixels(text)) is not None:
        return Target(str(size), (_checked(size, text),))
    raise UnknownTarget(f"“{harmless(text, TEXT_MAX_CHARS)}” is no target: {_suggestion(name)}")


def _meant_pixels(text: str) -> Size | None:
    """Return the pixels of words for a size. None: the words are unknown or name no pixels."""
    try:
        suggestion = suggest(text)
    except Contradiction as error:
        raise UnknownTarget(error.reason) from None
    return None if suggestion is None or suggestion.target is None else Size(*suggestion.target)


def _size(text: str) -> Size:
    width, _, height = text.partition("x")
    return Size(int(width), int(height))


def _paper_size(paper: str, orientation: str | None, dpi_text: str | None, text: str) -> Size:
    dpi = DPI_DEFAULT if dpi_text is None else int(dpi_text)
    if not DPI_MIN <= dpi <= DPI_MAX:
        nearest = min(max(dpi, DPI_MIN), DPI_MAX)
        raise UnknownTarget(
            f"“{harmless(text, TEXT_MAX_CHARS)}” needs {DPI_MIN} to {DPI_MAX} dpi: use {paper}-{nearest}dpi"
        )
    edges = [round(mm / MM_PER_INCH * dpi) for mm in PAPERS[paper]]
    if orientation is not None:
        edges.sort(reverse=orientation == "landscape")
    return Size(*edges)


def _checked(size: Size, text: str) -> Size:
    """Return the size if a file may have it."""
    scale = min(1.0, sqrt(TARGET_MAX_PIXELS / size.pixels), TARGET_MAX_EDGE / max(size.width, size.height))
    if scale == 1:
        return size
    nearest = Size(max(1, int(size.width * scale)), max(1, int(size.height * scale)))
    raise UnknownTarget(
        f"“{harmless(text, TEXT_MAX_CHARS)}” has {size.megapixels:g} megapixels ({size}); the largest target of this shape "
        f"is {nearest}"
    )


def _suggestion(name: str) -> str:
    names = [*SCREENS, *PAPERS, "a4-300dpi"]
    if close := difflib.get_close_matches(name, names, n=2, cutoff=0.6):
        return f"did you mean {' or '.join(close)}?"
    return "give pixels such as 1200x628, or a name such as og, instagram-story, favicon or a4-300dpi"
