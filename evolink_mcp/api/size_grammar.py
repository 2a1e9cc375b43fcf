"""Understand words for a size, for example "portrait 16:9", "A4 300dpi" or "landscape_16_9", and name the legal value.

A tokenizer splits the text and gives each token a kind, which is one letter. The rules are patterns of these letters. One
unknown word makes the whole text unknown, because it may change the meaning of the others.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import isqrt

from evolink_mcp.api import sizes
from evolink_mcp.api.models import DEFAULT_MODEL
from evolink_mcp.sanitize import quoted

_LIMITS = DEFAULT_MODEL.limits
MM_PER_INCH = Fraction(254, 10)
# Two shapes within 1 % count as the same shape. A ratio within 0.6 % of one of EvoLink's ratios means that ratio.
SAME_SHAPE = Fraction(101, 100)
SAME_RATIO = Fraction(1006, 1000)
RATIO_NUMBER_MAX = 40  # "16x10" and "32x9" are ratios, "48x48" are pixels
ICON_EDGE_MIN = 16  # "16x16" are pixels
COLON_PIXELS_MIN = 200  # "1920:1080" are pixels
INCHES_MAX = 120  # in "1920x1080 in landscape" the word "in" is no unit
PRINT_LONG_EDGE = 2048  # pixels of a paper size without dpi
VIDEO = (Fraction(16), Fraction(9))

# The ratio of link previews has usual pixels.
LINK_PREVIEW_RATIO = Fraction("1.91")
LINK_PREVIEW = (1200, 628)

PORTRAIT = "portrait"
LANDSCAPE = "landscape"
SQUARE = "square"
# Each orientation word, with the ratio that it means alone.
ORIENTATIONS = {
    "portrait": (PORTRAIT, "2:3"), "vertical": (PORTRAIT, "9:16"), "tall": (PORTRAIT, "9:16"),
    "upright": (PORTRAIT, "2:3"), "hochformat": (PORTRAIT, "2:3"), "landscape": (LANDSCAPE, "3:2"),
    "horizontal": (LANDSCAPE, "16:9"), "wide": (LANDSCAPE, "16:9"), "querformat": (LANDSCAPE, "3:2"),
    "square": (SQUARE, "1:1"), "quadratic": (SQUARE, "1:1"),
}  # fmt: skip
# Names of shapes. An orientation turns the first group. It contradicts the second group.
TURNABLE_SHAPES = {
    "widescreen": "16:9", "ultrawide": "21:9", "cinematic": "21:9", "cinema": "21:9", "panorama": "3:1",
    "panoramic": "3:1", "banner": "3:1",
}  # fmt: skip
FIXED_SHAPES = {
    "story": "9:16", "stories": "9:16", "reel": "9:16", "reels": "9:16", "shorts": "9:16", "tiktok": "9:16",
    "youtube": "16:9",
}  # fmt: skip
# Video formats: the short edge in pixels and the tier that is nearest.
VIDEO_FORMATS = {"hd": (720, "1K"), "fhd": (1080, "2K"), "qhd": (1440, "2K"), "uhd": (2160, "4K")}
# Papers with their edges, and the largest papers of the series A, B and C in millimetres.
PAPERS = {
    "letter": "8.5x11in", "legal": "8.5x14in", "tabloid": "11x17in", "ledger": "17x11in", "executive": "7.25x10.5in",
    "statement": "5.5x8.5in", "postcard": "4x6in", "businesscard": "85x55mm",
}  # fmt: skip
SERIES_RATIO = (Fraction(210), Fraction(297))
SERIES = {"a": (841, 1189), "b": (1000, 1414), "c": (917, 1297)}
UNITS = {
    "mm": Fraction(1),
    "cm": Fraction(10),
    "m": Fraction(1000),
    **dict.fromkeys(("in", "inch", "inches"), MM_PER_INCH),
    **dict.fromkeys(("ft", "feet", "foot"), MM_PER_INCH * 12),
}
FILLERS = frozenset(
    (
        *("a", "an", "the", "of", "for", "with", "and", "at", "please", "exactly", "aspect", "ratio", "ar", "size"),
        *("image", "picture", "photo", "pic", "resolution", "res", "format", "paper", "print", "page", "sheet"),
        *("orientation", "mode", "us", "din", "iso", "screen", "display", "video", "frame", "instagram", "facebook"),
    )
)
# Kinds of tokens. "wide" and "tall" are orientations, and beside a number they name an edge.
NUMBER, SEPARATOR, UNIT, DPI, ORIENTATION, WIDE, TALL, WIDTH, HEIGHT, SHAPE, PAPER, QUALITY, FILLER, UNKNOWN = (
    "NSUDOVTWHFAQ_?"
)
_KINDS = {
    **dict.fromkeys(FILLERS, FILLER),
    **dict.fromkeys(ORIENTATIONS, ORIENTATION),
    **dict.fromkeys((*TURNABLE_SHAPES, *FIXED_SHAPES), SHAPE),
    **dict.fromkeys(VIDEO_FORMATS, QUALITY),
    **dict.fromkeys(PAPERS, PAPER),
    **dict.fromkeys((*UNITS, "px", "pixel", "pixels"), UNIT),
    **dict.fromkeys(("dpi", "ppi"), DPI),
    **dict.fromkeys(("x", "by", "to"), SEPARATOR),
    **dict.fromkeys(("width", "w"), WIDTH),
    **dict.fromkeys(("height", "h", "high"), HEIGHT),
    "wide": WIDE,
    "tall": TALL,
}
# Signs that look like x, a colon or a dash. U+2033 is the inch sign.
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("×✕✖⨯хХχΧ*∗", "x"),
        **dict.fromkeys("∶ː", ":"),
        **dict.fromkeys("–—‑−‐", "-"),
        "″": " in ",
        "”": '"',
    }
)
_PHRASES = {
    r"full[ _-]?hd": "fhd", r"ultra[ _-]?hd": "uhd", r"quad[ _-]?hd|wqhd": "qhd", r"ultra[ _-]?wide": "ultrawide",
    r"wide[ _-]?screen": "widescreen", r"half[ _-]?letter": "statement", r"business[ _-]?card": "businesscard",
    r"(dots|pixels) per inch": "dpi", r"(?<=k[ _-])uhd": "", r'(?<=\d)"(?! ?[,:}])': " in ",
    r"(?<=x)( ?\d{3,4})p\b": r"\1", r"(?<=\d)(mm|cm|m|in|px)x(?=\d)": r"\1 x ", r"(?<=din )([abc]) (?=\d)": r"\1",
}  # fmt: skip
_QUOTED = re.compile(r"[\"'“‘`«{(\[]+(.*?)[\"'’`»})\]]*")
# "21,5 cm" has a decimal comma. In "1,920x1,080" the comma separates thousands.
_THOUSANDS = re.compile(r"(?<!\d)(\d{1,3}),(?=\d{3}(?!\d))")
_DECIMAL_COMMA = re.compile(r"(?<=\d),(?=\d{1,2}(?!\d))")
_METRIC = re.compile(r"\d ?(mm|cm|m|in|inch|inches|ft|feet)\b")
_NEGATIVE = re.compile(r"(?:^|\s)[-+]\d")
_TOKEN = re.compile(
    r"(?P<series>(?<![a-z])[abc](?:10|\d)(?!\d))|(?P<tier>\d{1,2}k)(?![a-z])|(?P<lines>\d{3,4}p)(?![a-z])"
    r"|(?P<number>\d+(?:\.\d+)?)|(?P<word>[^\W\d_]+)|(?P<sign>[:/_,-])|\+"
)
_DPI_RULE = re.compile("(N)S?D|DS?(N)")
_WIDTH_FIRST = re.compile("(?:WS?(N)U?|(N)U?[WV])[S_]*(?:HS?(N)U?|(N)U?[HT])")
_HEIGHT_FIRST = re.compile("(?:HS?(N)U?|(N)U?[HT])[S_]*(?:WS?(N)U?|(N)U?[WV])")
_PAIR_RULE = re.compile("(N)(U?)(S+)(N)(U?)")
_LONE_NUMBER = re.compile("(N)(U?)")


class Contradiction(sizes.IllegalSize):
    """The words have two meanings. `readings` are the legal values of both."""

    def __init__(self, text: str, readings: Sequence[tuple[str, str]]) -> None:
        meanings = " and ".join(f'“{words}” means size="{value}"' for words, value in readings)
        super().__init__(f"The words of size {quoted(text, 40)} contradict each other: {meanings}.")
        self.readings = tuple(value for _, value in readings)


@dataclass(frozen=True, slots=True)
class Suggestion:
    """The legal value for words: `size`, and `resolution` if the words name a tier.

    `ratio` is the meant shape, `target` the meant pixels. `is_tier`: the words name only a tier.
    """

    size: str
    ratio: str
    resolution: str | None = None
    target: tuple[int, int] | None = None
    is_tier: bool = False


@dataclass(frozen=True, slots=True)
class _Shape:
    """One statement about the shape: `words` of the caller, and the edges with their meaning."""

    words: str
    width: Fraction
    height: Fraction
    pixels: tuple[int, int] | None = None
    mm: tuple[Fraction, Fraction] | None = None
    is_turnable: bool = True

    @property
    def orientation(self) -> str:
        return SQUARE if self.width == self.height else PORTRAIT if self.width < self.height else LANDSCAPE

    def turn(self, orientation: str) -> _Shape:
        """Return the shape in portrait or landscape."""
        if self.orientation in (orientation, SQUARE):
            return self
        pixels = None if self.pixels is None else (self.pixels[1], self.pixels[0])
        mm = None if self.mm is None else (self.mm[1], self.mm[0])
        return replace(self, width=self.height, height=self.width, pixels=pixels, mm=mm)

    def agrees(self, other: _Shape) -> bool:
        """Return whether the shapes, and the pixels of both if they have some, are the same."""
        pairs = [(self.width * other.height, self.height * other.width)]
        if self.pixels and other.pixels:
            pairs.append((Fraction(self.pixels[0]), Fraction(other.pixels[0])))
        return all(max(first, second) <= min(first, second) * SAME_SHAPE for first, second in pairs)


@dataclass(frozen=True, slots=True)
class _Quality:
    """One statement about the pixels: a tier, with the short edge of a video format."""

    words: str
    tier: str
    short_edge: int | None = None
    thousands: int | None = None


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str


def suggest(text: str) -> Suggestion | None:
    """Return the legal value for words. None for a value that is legal already, and for unknown words.

    Raises:
        Contradiction: the words have two meanings.
    """
    trimmed = text.strip(sizes.BLANKS)
    if len(trimmed) > sizes.TEXT_MAX_CHARS or _is_plain(trimmed):
        return None
    tokens = _tokens(_folded(trimmed))
    kinds = "".join(token.kind for token in tokens)
    if not tokens or UNKNOWN in kinds or _NEGATIVE.search(trimmed):
        return None
    return _Reader(trimmed, tokens).suggestion()


def legal_value(text: str) -> str | None:
    """Return the size for words: "16x9" is "16:9", "1080p" is "1920x1088". None as in `suggest`.

    Raises:
        Contradiction: the words have two meanings.
    """
    suggestion = suggest(text)
    return None if suggestion is None else suggestion.size


def advice(text: str) -> str | None:
    """Return a sentence with the value to use instead of words; None if they are not understood.

    Raises:
        Contradiction: the words have two meanings.
    """
    suggestion = suggest(text)
    return None if suggestion is None else advice_for(suggestion)


def advice_for(suggestion: Suggestion) -> str:
    """Return a sentence with the value to use."""
    hint = f'use size="{suggestion.size}"'
    if suggestion.resolution is not None and sizes.takes_resolution(suggestion.size):
        hint += f' and resolution="{suggestion.resolution}"'
    if suggestion.target is not None:
        width, height = suggestion.target
        hint += f"{sizes.cover_text(width, height)}; the closest ratio is {sizes.nearest_ratios(width, height)[0]}"
    elif not sizes.takes_resolution(suggestion.size):
        width, height = map(int, suggestion.size.split("x"))
        hint += f" for {suggestion.ratio}; the closest ratio is {sizes.nearest_ratios(width, height)[0]}"
    if suggestion.is_tier:
        return f'it is a tier: give resolution="{suggestion.resolution}" beside a ratio, or {hint}'
    return hint


def _is_plain(text: str) -> bool:
    """Return whether `sizes.normalize` judges the text: auto, pixels, and a ratio that is not EvoLink's."""
    if text.lower() == "auto" or sizes.PIXELS.fullmatch(text):
        return not _is_small_pair(text)
    ratio = sizes.RATIO.fullmatch(text)
    if ratio is None:
        return False
    shape = _Shape(text, Fraction(int(ratio[1])), Fraction(int(ratio[2])))
    return text in _LIMITS.ratios or _known_ratio(shape) is None


def _is_small_pair(text: str) -> bool:
    """Return whether `text` such as 16x9 is a ratio."""
    pair = sizes.PIXELS.fullmatch(text)
    if pair is None:
        return False
    width = int(pair[1])
    height = int(pair[2])
    return min(width, height) > 0 and _has_ratio_numbers(Fraction(width), Fraction(height))


def _has_ratio_numbers(width: Fraction, height: Fraction) -> bool:
    is_icon = width == height and width >= ICON_EDGE_MIN
    is_small = max(width, height) < RATIO_NUMBER_MAX and not is_icon
    return is_small or not _are_whole(width, height)


def _are_whole(*numbers: Fraction) -> bool:
    return all(number.denominator == 1 for number in numbers)


def _folded(text: str) -> str:
    """Return the text in small ASCII letters, digits and signs where Unicode has an equivalent."""
    # NFKC splits the inch sign, so `_SIGNS` is applied before it. It also makes new signs, so again after it.
    plain = unicodedata.normalize("NFKC", text.translate(_SIGNS)).translate(_SIGNS).lower()
    plain = "".join(str(unicodedata.decimal(char)) if char.isdecimal() else char for char in plain)
    if match := _QUOTED.fullmatch(plain):
        plain = match[1]
    for phrase, word in _PHRASES.items():
        plain = re.sub(phrase, word, plain)
    if _METRIC.search(plain):
        return _DECIMAL_COMMA.sub(".", plain)
    has_separator = re.search(r"\dx|\d x|by|:", plain) is not None
    return _THOUSANDS.sub(r"\1", plain) if has_separator else plain


def _tokens(plain: str) -> list[_Token]:
    kinds = {"series": PAPER, "tier": QUALITY, "lines": QUALITY, "number": NUMBER, "sign": SEPARATOR}
    return [
        _Token(kinds.get(match.lastgroup or "") or _KINDS.get(match[0], UNKNOWN), match[0])
        for match in _TOKEN.finditer(plain)
    ]


def paper_size_mm(name: str) -> tuple[float, float]:
    """Return width and height of a paper in millimetres, upright: "a4", "letter", "business-card"."""
    width, height = _paper(name.replace("-", "")).mm or (0, 0)
    return float(width), float(height)


class _Reader:
    """Apply the rules to the tokens of one text. Each rule consumes its tokens."""

    def __init__(self, text: str, tokens: list[_Token]) -> None:
        self.text = text
        self.tokens = tokens
        self.kinds = "".join(token.kind for token in tokens)
        self.shapes: list[_Shape] = []
        self.dpi: Fraction | None = None
        self.is_understood = True

    def suggestion(self) -> Suggestion | None:
        # Each rule consumes its numbers, so the order is from the most exact rule to the least exact one.
        self._read_dpi()
        self._read_edges(_WIDTH_FIRST, is_width_first=True)
        self._read_edges(_HEIGHT_FIRST, is_width_first=False)
        self._read_pairs()
        orientations = self._free_words(ORIENTATION + WIDE + TALL)
        self._read_lone_number(is_square=any(ORIENTATIONS[word][0] == SQUARE for word in orientations))
        self._read_names()
        qualities = [_quality(word) for word in self._free_words(QUALITY)]
        shapes = [self._with_dpi(shape) for shape in self.shapes]
        has_meaning = shapes or orientations or qualities
        if not (self.is_understood and has_meaning) or set(self.kinds) & {NUMBER, DPI, WIDTH, HEIGHT}:
            return None
        quality = self._agreed_quality(qualities)
        shape = self._agreed_shape(shapes, orientations, quality)
        return _suggestion(shape, quality)

    def _free_words(self, kinds: str) -> list[str]:
        """Return the words of these kinds that no rule consumed."""
        return [token.text for token, kind in zip(self.tokens, self.kinds, strict=True) if kind in kinds]

    def _take(self, match: re.Match[str]) -> list[str]:
        """Consume the tokens of a match. Return the texts of its groups."""
        spans = [match.span(group) for group in range(1, match.re.groups + 1) if match[group] is not None]
        texts = ["".join(token.text for token in self.tokens[start:end]) for start, end in spans]
        self.kinds = self.kinds[: match.start()] + FILLER * (match.end() - match.start()) + self.kinds[match.end() :]
        return texts

    def _add(self, shape: _Shape | None) -> None:
        """Add a shape. Without one, the numbers have no meaning."""
        if shape is None:
            self.is_understood = False
        else:
            self.shapes.append(shape)

    def _read_dpi(self) -> None:
        if match := _DPI_RULE.search(self.kinds):
            self.dpi = Fraction(self._take(match)[0])

    def _read_edges(self, rule: re.Pattern[str], *, is_width_first: bool) -> None:
        """Read named edges: "width 1024 height 768", "1080 wide by 1920 tall"."""
        if match := rule.search(self.kinds):
            first, second = self._take(match)
            width = first if is_width_first else second
            height = second if is_width_first else first
            self._add(_pixel_shape(f"{width}x{height}", Fraction(width), Fraction(height)))

    def _read_pairs(self) -> None:
        """Read two numbers: a ratio, pixels, or a size in millimetres."""
        while match := _PAIR_RULE.search(self.kinds):
            width, first_unit, separator, height, second_unit = self._take(match)
            self._add(_pair(Fraction(width), Fraction(height), separator, second_unit or first_unit))

    def _read_lone_number(self, *, is_square: bool) -> None:
        """Read "1024 square" and "20 cm square", and a decimal number such as 1.91 as a ratio to 1."""
        if match := _LONE_NUMBER.search(self.kinds):
            edge, unit = self._take(match)
            number = Fraction(edge)
            if is_square:
                self._add(_pair(number, number, "x", unit))
            else:
                is_ratio = not unit and "." in edge and Fraction(1, 10) <= number <= 10
                self._add(_ratio(edge, number, Fraction(1)) if is_ratio else None)

    def _read_names(self) -> None:
        """Read the names of papers and shapes."""
        self.shapes += [_paper(word) for word in self._free_words(PAPER)]
        for word in self._free_words(SHAPE):
            ratio = TURNABLE_SHAPES.get(word) or FIXED_SHAPES[word]
            self.shapes.append(_ratio_shape(word, ratio, is_turnable=word in TURNABLE_SHAPES))

    def _agreed_shape(self, shapes: list[_Shape], orientations: list[str], quality: _Quality | None) -> _Shape | None:
        """Return the one shape in the named orientation; None if only a quality is named.

        Raises:
            Contradiction: two statements disagree.
        """
        if not orientations:
            return self._same(shapes) if shapes else None
        word = orientations[0]
        orientation = ORIENTATIONS[word][0]
        base = shapes[0] if shapes else _frame(word, quality)
        for other in orientations[1:]:
            if ORIENTATIONS[other][0] != orientation:
                raise self._contradiction(_meaning_of(base, word), _meaning_of(base, other))
        for shape in shapes:
            is_opposite = not shape.is_turnable and orientation != shape.orientation
            if (orientation == SQUARE) != (shape.orientation == SQUARE) or is_opposite:
                raise self._contradiction(shape, _meaning_of(shape, word))
        return self._same([shape.turn(orientation) for shape in shapes or [base]])

    def _with_dpi(self, shape: _Shape) -> _Shape:
        """Return a shape in millimetres with its pixels at the named dpi."""
        if shape.mm is None or not self.dpi:
            return shape
        width, height = (max(1, round(edge / MM_PER_INCH * self.dpi)) for edge in shape.mm)
        if max(width, height) > sizes.TARGET_EDGE_MAX:
            self.is_understood = False
            return shape
        return replace(shape, pixels=(width, height))

    def _same(self, shapes: list[_Shape]) -> _Shape:
        """Return the statement with pixels, if all statements agree."""
        for shape in shapes[1:]:
            if not shape.agrees(shapes[0]):
                raise self._contradiction(shapes[0], shape)
        return next((shape for shape in shapes if shape.pixels), shapes[0])

    def _contradiction(self, *shapes: _Shape) -> Contradiction:
        return Contradiction(self.text, [(shape.words, _suggestion(shape, None).size) for shape in shapes])

    def _agreed_quality(self, qualities: list[_Quality]) -> _Quality | None:
        """Return the most exact statement, if all statements agree.

        Raises:
            Contradiction: two tiers or two video formats are named.
        """
        if not qualities:
            return None
        best = next((quality for quality in qualities if quality.short_edge), qualities[0])
        for other in qualities:
            has_other_edge = None not in (best.short_edge, other.short_edge) and best.short_edge != other.short_edge
            has_other_tier = best.tier != other.tier or (best.thousands or other.thousands) != (
                other.thousands or best.thousands
            )
            if has_other_edge or has_other_tier:
                raise Contradiction(self.text, [(each.words, _suggestion(None, each).size) for each in (best, other)])
        return best


def _pair(width: Fraction, height: Fraction, separator: str, unit: str) -> _Shape | None:
    """Return the meaning of two numbers; None for zero and for more than 100,000 pixels."""
    if not (width > 0 and height > 0):
        return None
    words = f"{_text(width)}{separator if len(separator) == 1 else 'x'}{_text(height)}"
    factor = UNITS.get(unit)
    if factor is not None and not (factor == MM_PER_INCH and max(width, height) > INCHES_MAX):
        return _Shape(f"{words} {unit}", width, height, mm=(width * factor, height * factor))
    if unit.startswith("p"):
        return _pixel_shape(words, width, height)
    is_ratio_sign = separator[0] in ":/_-t" and min(width, height) < COLON_PIXELS_MIN
    if is_ratio_sign or _has_ratio_numbers(width, height):
        return _ratio(words, width, height)
    return _pixel_shape(words, width, height)


def _ratio(words: str, width: Fraction, height: Fraction) -> _Shape:
    pixels = LINK_PREVIEW if width == height * LINK_PREVIEW_RATIO else None
    return _Shape(words, width, height, pixels)


def _pixel_shape(words: str, width: Fraction, height: Fraction) -> _Shape | None:
    is_in_range = min(width, height) >= 1 and max(width, height) <= sizes.TARGET_EDGE_MAX
    if not (is_in_range and _are_whole(width, height)):
        return None
    return _Shape(words, width, height, pixels=(int(width), int(height)))


def _ratio_shape(words: str, ratio: str, *, is_turnable: bool = True) -> _Shape:
    width, height = map(Fraction, ratio.split(":"))
    return _Shape(words, width, height, is_turnable=is_turnable)


def _paper(name: str) -> _Shape:
    """Return a paper, upright. Each paper of a series is half of the one before."""
    if name in PAPERS:
        unit = UNITS[PAPERS[name][-2:]]
        width, height = map(Fraction, PAPERS[name][:-2].split("x"))
        return _Shape(name, width, height, mm=(width * unit, height * unit))
    short, long = SERIES[name[0]]
    for _ in range(int(name[1:])):
        # ISO 216 rounds down to whole millimetres.
        half = long // 2
        long = short
        short = half
    return _Shape(name, *SERIES_RATIO, mm=(Fraction(short), Fraction(long)))


def _meaning_of(shape: _Shape, word: str) -> _Shape:
    """Return the meaning of an orientation word beside a shape."""
    orientation, alone = ORIENTATIONS[word]
    if SQUARE in (orientation, shape.orientation):
        return _ratio_shape(word, alone)
    return replace(shape.turn(orientation), words=word)


def _frame(word: str, quality: _Quality | None) -> _Shape:
    """Return the meaning of an orientation word without a shape: its usual ratio, or 16:9 for a video format."""
    orientation, alone = ORIENTATIONS[word]
    if quality is None or orientation == SQUARE or _is_square_tier(quality):
        return _ratio_shape(word, alone)
    return _Shape(quality.words, *VIDEO, pixels=_video_pixels(quality))


def _is_square_tier(quality: _Quality) -> bool:
    """Return whether the quality is 1K, which names no video format."""
    return quality.tier == "1K" and quality.short_edge is None


def _quality(word: str) -> _Quality:
    if word in VIDEO_FORMATS:
        short_edge, tier = VIDEO_FORMATS[word]
        return _Quality(word, tier, short_edge)
    number = int(word[:-1])
    if word.endswith("p"):
        tier = next((tier for edge, tier in VIDEO_FORMATS.values() if number <= edge), "4K")
        return _Quality(word, tier, number)
    return _Quality(word, "1K" if number <= 1 else "2K" if number == 2 else "4K", thousands=number)


def _video_pixels(quality: _Quality) -> tuple[int, int]:
    """Return the pixels of a quality in 16:9: 1080p is 1920x1080, 4K is 3840x2160."""
    if quality.short_edge is not None:
        return round(Fraction(quality.short_edge) * VIDEO[0] / VIDEO[1]), quality.short_edge
    # 2K means 2048 pixels at EvoLink, and a 4K video has 4 x 960.
    long_edge = 2048 if quality.thousands == 2 else 960 * (quality.thousands or 1)
    return long_edge, round(long_edge * VIDEO[1] / VIDEO[0])


def _suggestion(shape: _Shape | None, quality: _Quality | None) -> Suggestion:
    """Return the legal value for the agreed statements. One of them may be None."""
    if shape is None:
        assert quality is not None
        pixels = (1024, 1024) if _is_square_tier(quality) else _video_pixels(quality)
        is_tier = quality.short_edge is None
        return _covering(pixels, resolution=quality.tier if is_tier else None, is_tier=is_tier)
    if shape.pixels is not None:
        return _covering(shape.pixels)
    known_ratio = _known_ratio(shape)
    tier = None if quality is None else quality.tier
    # "4:3 1080p" names the short edge. "square HD" of another service names only a tier.
    is_exact = quality is not None and (quality.words.endswith("p") or known_ratio in ("16:9", "9:16"))
    if quality is not None and quality.short_edge is not None and is_exact:
        factor = quality.short_edge / min(shape.width, shape.height)
        return _covering((round(shape.width * factor), round(shape.height * factor)))
    if known_ratio is not None:
        return Suggestion(known_ratio, known_ratio, tier)
    width, height = _edges(shape, tier)
    return Suggestion(str(sizes.nearest_legal(width, height)[0]), _ratio_text(shape), tier)


def _covering(pixels: tuple[int, int], resolution: str | None = None, *, is_tier: bool = False) -> Suggestion:
    cover = sizes.cover(*pixels)
    return Suggestion(str(cover.size), cover.ratio, resolution, pixels, is_tier)


def _edges(shape: _Shape, tier: str | None) -> tuple[int, int]:
    """Return the edges in pixels of a shape without pixels: paper has a long edge of 2048, others the pixels of the tier."""
    if shape.mm is not None and tier is None:
        long = max(shape.width, shape.height)
        return round(PRINT_LONG_EDGE * shape.width / long), round(PRINT_LONG_EDGE * shape.height / long)
    pixels = _LIMITS.tiers[tier or "1K"].pixels
    return isqrt(int(pixels * shape.width / shape.height)), isqrt(int(pixels * shape.height / shape.width))


def _known_ratio(shape: _Shape) -> str | None:
    """Return the ratio of EvoLink that the shape means."""
    for ratio in _LIMITS.ratios:
        across, down = map(int, ratio.split(":"))
        first = shape.width * down
        second = shape.height * across
        if max(first, second) <= min(first, second) * SAME_RATIO:
            return ratio
    return None


def _ratio_text(shape: _Shape) -> str:
    """Return the ratio in lowest terms, of paper as the caller wrote it: 8:5, 210:297, 11:8.5."""
    if shape.mm is None and _are_whole(shape.width, shape.height):
        ratio = shape.width / shape.height
        return f"{ratio.numerator}:{ratio.denominator}"
    return f"{_text(shape.width)}:{_text(shape.height)}"


def _text(number: Fraction) -> str:
    return f"{float(number):g}" if number < 10**6 else str(int(number))
