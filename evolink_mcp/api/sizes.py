"""Which pixels a size means: EvoLink's gpt-image-2 page, fields `size` and `resolution`, with every limit of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import gcd, isqrt, log, sqrt
from typing import Literal, cast

Tier = Literal["1K", "2K", "4K"]
Rule = Literal["anchor-edge", "pixel-budget"]

RATIOS = (
    *("1:1", "1:2", "2:1", "1:3", "3:1", "2:3", "3:2", "3:4"),
    *("4:3", "4:5", "5:4", "9:16", "16:9", "9:21", "21:9"),
)
TIERS: tuple[Tier, ...] = ("1K", "2K", "4K")
RULES: tuple[Rule, ...] = ("anchor-edge", "pixel-budget")

EDGE_STEP = 16
MIN_EDGE = 16
MAX_EDGE = 3840
MIN_PIXELS = 655_360
MAX_PIXELS = 8_294_400
MAX_ASPECT = 3

MAX_WISH_EDGE = 100_000
_MAX_ECHO = 40
TEXT_MAX = 64
_SHAPE_WEIGHT = 8  # a change of shape is noticed sooner than the same change of area
_LONG_EDGE: dict[Tier, int] = {"2K": 2048, "4K": MAX_EDGE}
_SHORT_EDGE_1K = 1024
_BUDGET: dict[Tier, int] = {"1K": 1024 * 1024, "2K": 2048 * 2048, "4K": MAX_PIXELS}
BLANKS = " \t\r\n"
_EXPLICIT = re.compile(r"(0|[1-9][0-9]{0,19})[ \t]*[xX×][ \t]*(0|[1-9][0-9]{0,19})")
_RATIO = re.compile(r"([1-9][0-9]{0,19}):([1-9][0-9]{0,19})")
_NUMBER = re.compile(r"[0-9]{1,20}")


@dataclass(frozen=True, slots=True)
class Size:
    """Width and height in pixels; holds any size, legal for EvoLink or not."""

    width: int
    height: int

    @property
    def pixels(self) -> int:
        """How many pixels it has."""
        return self.width * self.height

    @property
    def megapixels(self) -> float:
        """Millions of pixels, rounded to two places."""
        return round(self.pixels / 1_000_000, 2)

    @property
    def aspect_ratio(self) -> str:
        """The exact ratio in lowest terms: 2048x1152 is "16:9", 2048x688 is "128:43"."""
        common = gcd(self.width, self.height) or 1
        return f"{self.width // common}:{self.height // common}"

    def covers(self, width: int, height: int) -> bool:
        """Whether neither edge is smaller than asked."""
        return self.width >= width and self.height >= height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class IllegalSize(ValueError):
    """A size EvoLink would refuse: `reason` in one sentence, `nearest` the closest legal sizes, if any."""

    def __init__(self, reason: str, nearest: tuple[Size, ...] = ()) -> None:
        super().__init__(reason, nearest)
        self.reason = reason
        self.nearest = nearest

    def __str__(self) -> str:
        if not self.nearest:
            return self.reason
        return f"{self.reason} Nearest legal sizes: {', '.join(map(str, self.nearest))}."


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a size comes to (None: auto); `downscaled` is the page's *; `rule`: auto, explicit or of RULES."""

    size: Size | None
    downscaled: bool
    resolution_applies: bool
    rule: str


@dataclass(frozen=True, slots=True)
class Cover:
    """For a picture of `wish` pixels: order `size`, scale it by `scale`, then cut `crop` at `left`, `top`.

    `scale` is below 1 for a wish that is smaller than every legal size: it is cut from the whole picture made small.

    `ratio`, `tier`, `tier_size`: the table's cell that comes closest instead; `tier_covers`: it suffices.
    """

    wish: tuple[int, int]
    size: Size
    scale: float
    crop: Size
    left: int
    top: int
    ratio: str
    tier: Tier
    tier_size: Size
    tier_covers: bool


def normalize(text: str) -> str:
    """The text to send: "auto", one of RATIOS or "1024x640"; folds case, blanks and ×; raises IllegalSize."""
    trimmed = text.strip(BLANKS)
    if len(trimmed) > TEXT_MAX:
        raise IllegalSize(f"Size {_quoted(trimmed)} is too long to be a size.")
    if (folded := trimmed.lower()) in ("auto", *RATIOS):
        return folded
    if ratio := _RATIO.fullmatch(trimmed):
        raise _unknown_ratio(trimmed, int(ratio[1]), int(ratio[2]))
    pixels = _EXPLICIT.fullmatch(trimmed)
    if pixels is None:
        raise _not_a_size(trimmed)
    width, height = int(pixels[1]), int(pixels[2])
    if breaches := _breaches(width, height):
        reason = f"Size {_quoted(trimmed)} is not legal: {'; '.join(breaches)}."
        raise IllegalSize(reason, nearest_legal(width, height))
    return f"{width}x{height}"


@lru_cache(maxsize=1024)
def resolve(text: str, tier: str = "1K", rule: str = "anchor-edge") -> Resolved:
    """The pixels of `text` at `tier` (any case) under `rule`; raises IllegalSize, ValueError for the rule."""
    if tier.upper() not in TIERS:
        raise IllegalSize(f"Resolution {_quoted(tier)} is not one of {', '.join(TIERS)}.")
    known_rule, canonical = _known_rule(rule), normalize(text)
    if takes_resolution(canonical):
        size, downscaled = _cell(canonical, cast(Tier, tier.upper()), known_rule)
        return Resolved(size, downscaled, resolution_applies=True, rule=known_rule)
    if canonical == "auto":
        return Resolved(None, downscaled=False, resolution_applies=False, rule="auto")
    width, height = map(int, canonical.split("x"))
    return Resolved(Size(width, height), downscaled=False, resolution_applies=False, rule="explicit")


def takes_resolution(size: str) -> bool:
    """Whether `resolution` has an effect on this size (as `normalize` returns it): only on a ratio."""
    return size in RATIOS


def nearest_legal(width: int, height: int, count: int = 3) -> tuple[Size, ...]:
    """Up to `count` legal sizes nearest to any wish, best first: the shape is kept before the area."""
    long, short = max(width, height, 1), max(min(width, height), 1)
    aspect = long / short if long <= MAX_ASPECT * short else float(MAX_ASPECT)
    area = min(max(long * short, MIN_PIXELS), MAX_PIXELS)
    ideal = min(sqrt(area * aspect), float(MAX_EDGE))

    def distance(edges: tuple[int, int]) -> float:
        off_shape, off_area = edges[0] / edges[1] / aspect, edges[0] * edges[1] * aspect / ideal**2
        return _SHAPE_WEIGHT * abs(log(off_shape)) + abs(log(off_area))

    window, middle = max(8, count), round(ideal / EDGE_STEP)
    found = [
        edges
        for step in range(middle - window, middle + window + 1)
        for other in (-1, 0, 1)
        if not _breaches(*(edges := (step * EDGE_STEP, (round(step / aspect) + other) * EDGE_STEP)))
    ]
    best = sorted(found, key=distance)[:count]
    return tuple(Size(*edges) if width >= height else Size(*reversed(edges)) for edges in best)


def cover(width: int, height: int, rule: str = "anchor-edge") -> Cover:
    """How to get a picture of exactly `width` x `height` pixels, each 1 to 100,000; else IllegalSize.

    The size is the wish enlarged, in its own shape, only until it is legal; where no legal size reaches, the
    one that needs the least enlarging. The picture is scaled until it just covers the wish, and then cut: a wish beyond
    3:1 out of a 3:1 picture.
    """
    known_rule = _known_rule(rule)
    if not (1 <= width <= MAX_WISH_EDGE and 1 <= height <= MAX_WISH_EDGE):
        raise IllegalSize(f"Width and height must each be 1 to {MAX_WISH_EDGE:,} pixels.")
    long, short = max(width, height), min(width, height)
    edges = _smallest_cover(long, short) or _largest_in_shape(long, short)
    size = Size(*edges) if width >= height else Size(*reversed(edges))
    # A few pixels more than the wish, because edges are multiples of 16, are only cut; a wish below the smallest legal
    # picture is scaled down, so that it shows the whole picture and not its middle.
    smallest = Fraction(0) if width * height < MIN_PIXELS else Fraction(1)
    scale = max(smallest, Fraction(width, size.width), Fraction(height, size.height))
    left, top = (int(size.width * scale) - width) // 2, (int(size.height * scale) - height) // 2
    ratio = nearest_ratios(width, height)[0]
    # By pixels, not by name: at 3:1 the first page's 1K is larger than its 2K.
    cells: list[tuple[Tier, Size]] = [(tier, _cell(ratio, tier, known_rule)[0]) for tier in TIERS]
    cells.sort(key=lambda cell: cell[1].pixels)
    tier, cell = next((cell for cell in cells if cell[1].covers(width, height)), cells[-1])
    crop, enough = Size(width, height), cell.covers(width, height)
    return Cover((width, height), size, float(scale), crop, left, top, ratio, tier, cell, enough)


def nearest_ratios(width: int, height: int) -> tuple[str, ...]:
    """All of RATIOS, the nearest in shape to `width`:`height` (both positive) first."""

    def stretch(ratio: str) -> Fraction:
        across, down = map(int, ratio.split(":"))
        factor = Fraction(width * down, height * across)
        return max(factor, 1 / factor)

    return tuple(sorted(RATIOS, key=stretch))


def table(rule: str) -> str:
    """All ratios and tiers under `rule` as a Markdown table; * marks what is scaled down to fit."""
    rows = [f"| Ratio | {' | '.join(TIERS)} |", f"|---|{'---|' * len(TIERS)}"]
    for ratio in RATIOS:
        cells = (_cell(ratio, tier, _known_rule(rule)) for tier in TIERS)
        rows.append(f"| {ratio} | " + " | ".join(f"{size}{' *' * starred}" for size, starred in cells) + " |")
    return "\n".join(rows)


def _cell(ratio: str, tier: Tier, rule: Rule) -> tuple[Size, bool]:
    across, down = map(int, ratio.split(":"))
    first, second = max(across, down), min(across, down)
    downscaled = False
    if rule == "pixel-budget":  # the page since 2026-04-25: a tier is a number of pixels
        budget = _BUDGET[tier]
        long, short = _near(isqrt(budget * first // second), 1), _near(isqrt(budget * second // first), 1)
        if long > MAX_EDGE:
            long, short, downscaled = MAX_EDGE, _near(MAX_EDGE * second, first), True
    elif tier == "1K":  # the page of 2026-04-23: 1K locks the short edge, the others the long
        long, short = _near(_SHORT_EDGE_1K * first, second), _SHORT_EDGE_1K
    else:
        long, short = _LONG_EDGE[tier], _near(_LONG_EDGE[tier] * second, first)
    if long * short > MAX_PIXELS:
        # long * sqrt(MAX / (long * short)) is sqrt(MAX * long / short): the same cut without floats.
        long, short = _floor(isqrt(MAX_PIXELS * long // short)), _floor(isqrt(MAX_PIXELS * short // long))
        downscaled = True
    return (Size(long, short) if across >= down else Size(short, long)), downscaled


def _smallest_cover(long: int, short: int) -> tuple[int, int] | None:
    short = max(short, -(-long // MAX_ASPECT))
    if long > MAX_EDGE or _ceil(long) * _ceil(short) > MAX_PIXELS:
        return None
    for edge in range(_ceil(long), MAX_EDGE + 1, EDGE_STEP):
        # Growing in shape, the short edge passes at most two steps while the long one passes one.
        least = max(_ceil(short), _floor((edge - EDGE_STEP) * short // long) + EDGE_STEP)
        for other in range(least, _ceil(-(-edge * short // long)) + 1, EDGE_STEP):
            if not _breaches(edge, other):
                return edge, other
    return None


def _largest_in_shape(long: int, short: int) -> tuple[int, int]:
    edges = range(_floor(isqrt(MAX_PIXELS)), MAX_EDGE + 1, EDGE_STEP)
    wanted = [(edge, _ceil(-(-max(edge * short, edge * long // MAX_ASPECT) // long))) for edge in edges]
    sizes = [(edge, min(other, _floor(MAX_PIXELS // edge))) for edge, other in wanted]
    return min(sizes, key=lambda s: (max(Fraction(long, s[0]), Fraction(short, s[1])), s[0] * s[1]))


def _breaches(width: int, height: int) -> list[str]:
    found: list[str] = []
    for name, edge in (("width", width), ("height", height)):
        if not MIN_EDGE <= edge <= MAX_EDGE:
            found.append(f"the {name} is not within {MIN_EDGE} to {MAX_EDGE}")
        if edge % EDGE_STEP:
            found.append(f"the {name} is not a multiple of {EDGE_STEP}")
    long, short = max(width, height), min(width, height)
    if long > MAX_ASPECT * short > 0:
        found.append(f"the aspect ratio {long / short:g}:1 is above {MAX_ASPECT}:1")
    if not MIN_PIXELS <= width * height <= MAX_PIXELS:
        found.append(f"{width * height:,} pixels are not within {MIN_PIXELS:,} to {MAX_PIXELS:,}")
    return found


def _unknown_ratio(text: str, across: int, down: int) -> IllegalSize:
    first, second = nearest_ratios(across, down)[:2]
    budget = _BUDGET["1K"]
    reason = f"Ratio {_quoted(text)} is not one of the {len(RATIOS)}; the nearest are {first} and {second}."
    return IllegalSize(reason, nearest_legal(isqrt(budget * across // down), isqrt(budget * down // across)))


def _not_a_size(text: str) -> IllegalSize:
    numbers = [int(number) for number in _NUMBER.findall(text)]
    meant = len(numbers) == 2 and all(MIN_EDGE <= number <= MAX_WISH_EDGE for number in numbers)
    forms = f"auto, a ratio ({' '.join(RATIOS)}) or WxH such as 1024x640"
    nearest = nearest_legal(numbers[0], numbers[1]) if meant else ()
    return IllegalSize(f"Size {_quoted(text)} is not understood: give {forms}.", nearest)


def _known_rule(rule: str) -> Rule:
    if rule not in RULES:
        raise ValueError(f"The size rule is not one of {', '.join(RULES)}.")
    return rule


def _near(numerator: int, denominator: int) -> int:
    return (2 * numerator + EDGE_STEP * denominator) // (2 * EDGE_STEP * denominator) * EDGE_STEP


def _floor(edge: int) -> int:
    return edge // EDGE_STEP * EDGE_STEP


def _ceil(edge: int) -> int:
    return -(-edge // EDGE_STEP) * EDGE_STEP


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _MAX_ECHO else text[: _MAX_ECHO - 1] + "…")
