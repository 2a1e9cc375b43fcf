"""Understand words for a size, for example "square", "1080p" or "16x9", and name the legal value."""

from __future__ import annotations

import re
from math import sqrt

from evolink_mcp.api import sizes
from evolink_mcp.api.models import DEFAULT_MODEL

# Usual names of shapes, and formats with their usual pixels (A4 and Letter with the area of a 2K square).
SHAPES = {
    "square": "1:1", "portrait": "2:3", "landscape": "3:2", "vertical": "9:16", "horizontal": "16:9", "tall": "9:16",
    "wide": "16:9", "widescreen": "16:9", "story": "9:16", "reel": "9:16", "tiktok": "9:16", "youtube": "16:9",
    "ultrawide": "21:9", "cinematic": "21:9", "panorama": "3:1", "banner": "3:1",
}  # fmt: skip
FORMATS_IN_PIXELS = {
    "720p": (1280, 720), "hd": (1280, 720), "1080p": (1920, 1080), "full hd": (1920, 1080), "fullhd": (1920, 1080),
    "fhd": (1920, 1080), "1440p": (2560, 1440), "2k": (2048, 1152), "qhd": (2560, 1440), "2160p": (3840, 2160),
    "4k": (3840, 2160), "uhd": (3840, 2160), "4k uhd": (3840, 2160), "1k": (1024, 1024), "a3": (1448, 2048),
    "a4": (1448, 2048), "a5": (1448, 2048), "a4 portrait": (1448, 2048), "a4 landscape": (2048, 1448),
    "1.91:1": (1200, 628), "letter": (1584, 2048), "us letter": (1584, 2048),
}  # fmt: skip
_OTHER_WORDS = re.compile(
    r"\b(aspect|ratio|portrait|landscape|vertical|horizontal|square|widescreen|wide|tall|pixels?|px|size|hd|uhd)\b"
)
_SMALL_PAIR = re.compile(r"(\d{1,2}(?:\.\d{1,2})?) ?(?:[:x/]|by) ?(\d{1,2}(?:\.\d{1,2})?)")
_RATIO = re.compile(r"[1-9][0-9]*:[1-9][0-9]*")
_EXPLICIT = re.compile(r"([1-9][0-9]{0,4}) ?x ?([1-9][0-9]{0,4})")
_LIMITS = DEFAULT_MODEL.limits
_AREA = 1024 * 1024  # pixels of a shape that is not one of EvoLink's ratios, as at 1K


def legal_value(text: str) -> str | None:
    """Return the legal value for words: "16x9" is "16:9", "1080p" is "1920x1088", "square" is "1:1".

    None for a value that is legal already, and for text that is not understood.
    """
    plain = text.strip(sizes.BLANKS).lower().replace("×", "x")
    words = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", plain)
    if words in ("auto", *_LIMITS.ratios) or _RATIO.fullmatch(words) or len(words) > sizes.TEXT_MAX:
        return None
    if words in SHAPES:
        return SHAPES[words]
    if words in FORMATS_IN_PIXELS:
        return str(sizes.cover(*FORMATS_IN_PIXELS[words]).size)
    bare = _OTHER_WORDS.sub("", words).strip(" ,()/")
    if (pair := _SMALL_PAIR.fullmatch(bare)) is not None:
        across = float(pair[1])
        down = float(pair[2])
        ratio = f"{pair[1]}:{pair[2]}"
        if ratio in _LIMITS.ratios:
            return ratio
        if across > 0 and down > 0 and (":" in bare or max(across, down) < _LIMITS.edge_min):
            edges = (round(sqrt(_AREA * across / down)), round(sqrt(_AREA * down / across)))
            return str(sizes.nearest_legal(*edges)[0])
    if (pixels := _EXPLICIT.fullmatch(bare)) is not None and bare != plain:
        width = int(pixels[1])
        height = int(pixels[2])
        return str(sizes.cover(width, height).size) if max(width, height) <= _LIMITS.edge_max else None
    return None


def advice(text: str) -> str | None:
    """Return a sentence with the value to use instead of words; None if they are not understood."""
    value = legal_value(text)
    if value is None:
        return None
    hint = f'use size="{value}"'
    tier = text.strip(sizes.BLANKS).upper()
    if tier in _LIMITS.tiers:
        return f'it is a tier: give resolution="{tier}" beside a ratio, or {hint}'
    if value not in _LIMITS.ratios:
        width, height = map(int, value.split("x"))
        hint += f", or the ratio {sizes.nearest_ratios(width, height)[0]}"
    return hint
