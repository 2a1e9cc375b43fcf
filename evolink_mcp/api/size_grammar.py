"""Words that people use for a size, and the legal value that they mean."""

from __future__ import annotations

import re
from math import sqrt

from evolink_mcp.api import sizes

# What people call a shape, and formats by their usual pixels (A4 and Letter at the area of a 2K square).
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
AREA = 1024 * 1024  # pixels of a shape that is no ratio of EvoLink's, as at 1K


def meant(text: str) -> str | None:
    """The legal value that somebody means by words for a size: "16x9" is "16:9", "1080p" "1920x1088", "square" "1:1".

    None for what is legal as it stands, and for what is not understood.
    """
    words = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.strip(sizes.BLANKS).lower().replace("×", "x"))
    if words in ("auto", *sizes.RATIOS) or _RATIO.fullmatch(words) or len(words) > sizes.TEXT_MAX:
        return None
    if words in SHAPES:
        return SHAPES[words]
    if words in FORMATS_IN_PIXELS:
        return str(sizes.cover(*FORMATS_IN_PIXELS[words]).size)
    bare = _OTHER_WORDS.sub("", words).strip(" ,()/")
    if (small := _SMALL_PAIR.fullmatch(bare)) is not None:
        across, down = float(small[1]), float(small[2])
        ratio = f"{small[1]}:{small[2]}"
        if ratio in sizes.RATIOS:
            return ratio
        if across > 0 and down > 0 and (":" in bare or max(across, down) < sizes.MIN_EDGE):
            budget = AREA
            return str(sizes.nearest_legal(round(sqrt(budget * across / down)), round(sqrt(budget * down / across)))[0])
    if (pixels := _EXPLICIT.fullmatch(bare)) is not None and bare != text.strip(sizes.BLANKS).lower().replace("×", "x"):
        width, height = int(pixels[1]), int(pixels[2])
        return str(sizes.cover(width, height).size) if max(width, height) <= sizes.MAX_EDGE else None
    return None


def advice(text: str) -> str | None:
    """What to give instead of words for a size, in words; None if `meant` does not know them."""
    if (value := meant(text)) is None:
        return None
    told = f'use size="{value}"'
    if (tier := text.strip(sizes.BLANKS).upper()) in sizes.TIERS:
        return f'it is a tier: give resolution="{tier}" beside a ratio, or {told}'
    if value not in sizes.RATIOS:
        width, height = map(int, value.split("x"))
        told += f", or the ratio {sizes.nearest_ratios(width, height)[0]}"
    return told
