"""Compute the pixels of a size: the fields `size` and `resolution` of EvoLink's page, and the nearest legal sizes.

Every function takes the limits of a model. The default are the limits of the default model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import gcd, isqrt, log, sqrt
from typing import Literal

from evolink_mcp.api.models import DEFAULT_MODEL, SizeLimits

Rule = Literal["anchor-edge", "pixel-budget"]

RULES: tuple[Rule, ...] = ("anchor-edge", "pixel-budget")
DEFAULT_LIMITS = DEFAULT_MODEL.limits
TARGET_EDGE_MAX = 100_000
TEXT_MAX_CHARS = 64
BLANKS = " \t\r\n"
_ECHO_MAX_CHARS = 40
_SHAPE_WEIGHT = 8  # a change of the shape is more visible than the same change of the area
PIXELS = re.compile(r"(0|[1-9][0-9]{0,19})[ \t]*[xX×][ \t]*(0|[1-9][0-9]{0,19})")
_NUMBER = re.compile(r"[0-9]{1,20}")
_WORD = re.compile(r"[^\W\d_xX]")
RATIO = re.compile(r"([1-9][0-9]{0,19}):([1-9][0-9]{0,19})")


@dataclass(frozen=True, slots=True)
class Size:
    """Width and height in pixels. EvoLink may refuse the size."""

    width: int
    height: int

    @property
    def pixels(self) -> int:
        """The number of pixels."""
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
        """Return whether both edges are at least as long as these."""
        return self.width >= width and self.height >= height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class IllegalSize(ValueError):
    """EvoLink would refuse this size. `reason` is one sentence, `nearest` are the closest legal sizes, if any."""

    def __init__(self, reason: str, nearest: tuple[Size, ...] = ()) -> None:
        # Pickle creates an exception from `args`, so `args` must contain both.
        super().__init__(reason, nearest)
        self.reason = reason
        self.nearest = nearest

    def __str__(self) -> str:
        if not self.nearest:
            return self.reason
        return f"{self.reason} Nearest legal sizes: {', '.join(map(str, self.nearest))}."


@dataclass(frozen=True, slots=True)
class Resolved:
    """The pixels of a size; None for auto.

    `downscaled`: the tier is reduced to the model's limits, marked with * on the page. `rule` is "auto", "explicit" or
    one of RULES.
    """

    size: Size | None
    downscaled: bool
    resolution_applies: bool
    rule: str


@dataclass(frozen=True, slots=True)
class Cover:
    """An image of exactly `target` pixels: order `size`, scale it by `scale`, then cut `crop` at `left`, `top`.

    `ratio`, `tier` and `tier_size` are the closest cell of the table; `tier_covers`: its size is large enough.
    """

    target: tuple[int, int]
    size: Size
    scale: float
    crop: Size
    left: int
    top: int
    ratio: str
    tier: str
    tier_size: Size
    tier_covers: bool


def normalize(text: str, limits: SizeLimits = DEFAULT_LIMITS) -> str:
    """Return the text to send: "auto", a ratio or "1024x640". Case, blanks and × are normalized.

    Raises:
        IllegalSize: EvoLink would refuse it.
    """
    trimmed = text.strip(BLANKS)
    if len(trimmed) > TEXT_MAX_CHARS:
        raise IllegalSize(f"Size {_quoted(trimmed)} is too long to be a size.")
    lower_case = trimmed.lower()
    if lower_case in ("auto", *limits.ratios):
        return lower_case
    if ratio := RATIO.fullmatch(trimmed):
        raise _unknown_ratio(trimmed, int(ratio[1]), int(ratio[2]), limits)
    pixels = PIXELS.fullmatch(trimmed)
    if pixels is None:
        raise _not_a_size(trimmed, limits)
    width, height = int(pixels[1]), int(pixels[2])
    if breaches := _breaches(width, height, limits):
        nearest = nearest_sizes(width, height, limits=limits)
        too_large = (
            "" if nearest[0].covers(width, height) else f" No legal size covers it. {nearest[0]} is the nearest."
        )
        raise IllegalSize(f"Size {_quoted(trimmed)} is not legal: {'; '.join(breaches)}.{too_large}", nearest)
    return f"{width}x{height}"


# The cache keeps compute_size nearly as fast as an empty tool (docs/speed.md).
@lru_cache(maxsize=1024)
def resolve(text: str, tier: str = "1K", rule: str = "anchor-edge", limits: SizeLimits = DEFAULT_LIMITS) -> Resolved:
    """Return the pixels of `text` at `tier` (any case) under `rule`.

    Raises:
        IllegalSize: EvoLink would refuse the size or the tier.
        ValueError: an unknown rule.
    """
    if tier.upper() not in limits.tiers:
        raise IllegalSize(f"Resolution {_quoted(tier)} is not one of {', '.join(limits.tiers)}.")
    known_rule = _known_rule(rule)
    canonical = normalize(text, limits)
    if takes_resolution(canonical, limits):
        size, downscaled = _cell(canonical, tier.upper(), known_rule, limits)
        return Resolved(size, downscaled, resolution_applies=True, rule=known_rule)
    if canonical == "auto":
        return Resolved(None, downscaled=False, resolution_applies=False, rule="auto")
    width, height = map(int, canonical.split("x"))
    return Resolved(Size(width, height), downscaled=False, resolution_applies=False, rule="explicit")


def takes_resolution(size: str, limits: SizeLimits = DEFAULT_LIMITS) -> bool:
    """Return whether `resolution` has an effect on a normalized size: only on a ratio."""
    return size in limits.ratios


def nearest_sizes(width: int, height: int, count: int = 3, limits: SizeLimits = DEFAULT_LIMITS) -> tuple[Size, ...]:
    """Return up to `count` legal sizes for a target in pixels. The first is that of `cover`."""
    by_shape = nearest_legal(width, height, count, limits)
    if not (1 <= width <= TARGET_EDGE_MAX and 1 <= height <= TARGET_EDGE_MAX):
        return by_shape
    return tuple(dict.fromkeys((cover(width, height, limits=limits).size, *by_shape)))[:count]


def nearest_legal(width: int, height: int, count: int = 3, limits: SizeLimits = DEFAULT_LIMITS) -> tuple[Size, ...]:
    """Return up to `count` legal sizes, the nearest first. The shape counts more than the area."""
    long = max(width, height, 1)
    short = max(min(width, height), 1)
    aspect = long / short if long <= limits.aspect_max * short else float(limits.aspect_max)
    area = min(max(long * short, limits.pixels_min), limits.pixels_max)
    ideal = min(sqrt(area * aspect), float(limits.edge_max))

    def distance(edges: tuple[int, int]) -> float:
        off_shape = edges[0] / edges[1] / aspect
        off_area = edges[0] * edges[1] * aspect / ideal**2
        return _SHAPE_WEIGHT * abs(log(off_shape)) + abs(log(off_area))

    def candidates() -> Iterator[tuple[int, int]]:
        window = max(8, count)
        middle = round(ideal / limits.edge_step)
        for step in range(middle - window, middle + window + 1):
            for other in (-1, 0, 1):
                edges = (step * limits.edge_step, (round(step / aspect) + other) * limits.edge_step)
                if not _breaches(*edges, limits):
                    yield edges

    best = sorted(candidates(), key=distance)[:count]
    return tuple(Size(*edges) if width >= height else Size(*reversed(edges)) for edges in best)


def cover(width: int, height: int, rule: str = "anchor-edge", limits: SizeLimits = DEFAULT_LIMITS) -> Cover:
    """Return the way to an image of exactly `width` x `height` pixels, each 1 to 100,000.

    `size` is the smallest legal size in the target's shape that covers it. If no legal size covers it, `size` needs the
    least enlarging. The image is scaled until it covers the target, then cut. A target beyond 3:1 is cut from a 3:1 image.

    Raises:
        IllegalSize: an edge is out of range.
    """
    known_rule = _known_rule(rule)
    if not (1 <= width <= TARGET_EDGE_MAX and 1 <= height <= TARGET_EDGE_MAX):
        raise IllegalSize(f"Width and height must each be 1 to {TARGET_EDGE_MAX:,} pixels.")
    long = max(width, height)
    short = min(width, height)
    edges = _smallest_cover(long, short, limits) or _largest_in_shape(long, short, limits)
    size = Size(*edges) if width >= height else Size(*reversed(edges))
    # Without scaling, only the few pixels beyond a multiple of 16 are cut. A target below the smallest legal size is scaled
    # down, so that it shows the whole image and not only the middle.
    scale_min = Fraction(0) if width * height < limits.pixels_min else Fraction(1)
    scale = max(scale_min, Fraction(width, size.width), Fraction(height, size.height))
    ratio = nearest_ratios(width, height, limits)[0]
    # Sorted by pixels: at 3:1 the anchor-edge rule gives 1K more pixels than 2K.
    cells = [(tier, _cell(ratio, tier, known_rule, limits)[0]) for tier in limits.tiers]
    cells.sort(key=lambda cell: cell[1].pixels)
    tier, tier_size = next((cell for cell in cells if cell[1].covers(width, height)), cells[-1])
    return Cover(
        target=(width, height),
        size=size,
        scale=float(scale),
        crop=Size(width, height),
        left=(int(size.width * scale) - width) // 2,
        top=(int(size.height * scale) - height) // 2,
        ratio=ratio,
        tier=tier,
        tier_size=tier_size,
        tier_covers=tier_size.covers(width, height),
    )


def cover_text(width: int, height: int, limits: SizeLimits = DEFAULT_LIMITS) -> str:
    """Return the words after the size of `cover`: whether it covers the target. Empty if the target is legal."""
    size = cover(width, height, limits=limits).size
    if (size.width, size.height) == (width, height):
        return ""
    if size.covers(width, height):
        return f" (the smallest legal size that covers {width}x{height})"
    return f" (the nearest legal size; none covers {width}x{height})"


def nearest_ratios(width: int, height: int, limits: SizeLimits = DEFAULT_LIMITS) -> tuple[str, ...]:
    """Return all ratios, the nearest in shape to `width`:`height` (both positive) first."""

    def stretch(ratio: str) -> Fraction:
        across, down = map(int, ratio.split(":"))
        factor = Fraction(width * down, height * across)
        return max(factor, 1 / factor)

    return tuple(sorted(limits.ratios, key=stretch))


def table(rule: str, limits: SizeLimits = DEFAULT_LIMITS) -> str:
    """Return all ratios and tiers under `rule` as a Markdown table. * marks a downscaled size."""
    rows = [f"| Ratio | {' | '.join(limits.tiers)} |", f"|---|{'---|' * len(limits.tiers)}"]
    for ratio in limits.ratios:
        cells = (_cell(ratio, tier, _known_rule(rule), limits) for tier in limits.tiers)
        rows.append(f"| {ratio} | " + " | ".join(f"{size}{' *' * downscaled}" for size, downscaled in cells) + " |")
    return "\n".join(rows)


def _cell(ratio: str, tier_name: str, rule: Rule, limits: SizeLimits) -> tuple[Size, bool]:
    across, down = map(int, ratio.split(":"))
    first = max(across, down)
    second = min(across, down)
    tier = limits.tiers[tier_name]
    step = limits.edge_step
    downscaled = False
    if rule == "pixel-budget":  # the page since 2026-04-25: a tier is a number of pixels
        long = _near(isqrt(tier.pixels * first // second), 1, step)
        short = _near(isqrt(tier.pixels * second // first), 1, step)
        if long > limits.edge_max:
            long = limits.edge_max
            short = _near(limits.edge_max * second, first, step)
            downscaled = True
    elif tier.short_edge is not None:  # the page of 2026-04-23: 1K fixes the short edge, the others the long one
        long = _near(tier.short_edge * first, second, step)
        short = tier.short_edge
    else:
        long = tier.long_edge or limits.edge_max
        short = _near(long * second, first, step)
    if long * short > limits.pixels_max:
        # long * sqrt(MAX / (long * short)) is sqrt(MAX * long / short): the same cut without floats.
        # Only rounding down gives the page's sizes. The nearest multiple may exceed the pixel limit.
        cut_long = _floor(isqrt(limits.pixels_max * long // short), step)
        short = _floor(isqrt(limits.pixels_max * short // long), step)
        long = cut_long
        downscaled = True
    return (Size(long, short) if across >= down else Size(short, long)), downscaled


def _smallest_cover(long: int, short: int, limits: SizeLimits) -> tuple[int, int] | None:
    step = limits.edge_step
    short = max(short, -(-long // limits.aspect_max))
    if long > limits.edge_max or _ceil(long, step) * _ceil(short, step) > limits.pixels_max:
        return None
    for edge in range(_ceil(long, step), limits.edge_max + 1, step):
        # In the target's shape the short edge passes at most two steps while the long one passes one.
        least = max(_ceil(short, step), _floor((edge - step) * short // long, step) + step)
        for other in range(least, _ceil(-(-edge * short // long), step) + 1, step):
            if not _breaches(edge, other, limits):
                return edge, other
    return None


def _largest_in_shape(long: int, short: int, limits: SizeLimits) -> tuple[int, int]:
    step = limits.edge_step
    # With a shorter long edge, no size reaches the pixel limit.
    edges = range(_floor(isqrt(limits.pixels_max), step), limits.edge_max + 1, step)
    sizes = [
        (
            edge,
            min(
                _ceil(-(-max(edge * short, edge * long // limits.aspect_max) // long), step),
                _floor(limits.pixels_max // edge, step),
            ),
        )
        for edge in edges
    ]
    return min(sizes, key=lambda s: (max(Fraction(long, s[0]), Fraction(short, s[1])), s[0] * s[1]))


def _breaches(width: int, height: int, limits: SizeLimits) -> list[str]:
    """Return one clause for each limit that the size breaks."""
    breaches: list[str] = []
    for name, edge in (("width", width), ("height", height)):
        if not limits.edge_min <= edge <= limits.edge_max:
            breaches.append(f"the {name} is not within {limits.edge_min} to {limits.edge_max}")
        if edge % limits.edge_step:
            breaches.append(f"the {name} is not a multiple of {limits.edge_step}")
    long = max(width, height)
    short = min(width, height)
    if long > limits.aspect_max * short > 0:
        breaches.append(f"the aspect ratio {long / short:g}:1 is above {limits.aspect_max}:1")
    if not limits.pixels_min <= width * height <= limits.pixels_max:
        breaches.append(f"{width * height:,} pixels are not within {limits.pixels_min:,} to {limits.pixels_max:,}")
    return breaches


def _unknown_ratio(text: str, across: int, down: int, limits: SizeLimits) -> IllegalSize:
    first, second = nearest_ratios(across, down, limits)[:2]
    pixels = next(iter(limits.tiers.values())).pixels
    reason = f"Ratio {_quoted(text)} is not one of the {len(limits.ratios)}; the nearest are {first} and {second}."
    edges = (isqrt(pixels * across // down), isqrt(pixels * down // across))
    return IllegalSize(reason, nearest_legal(*edges, limits=limits))


def _not_a_size(text: str, limits: SizeLimits) -> IllegalSize:
    forms = f"auto, a ratio ({' '.join(limits.ratios)}) or WxH such as 1024x640"
    numbers = [int(number) for number in _NUMBER.findall(text)]
    # A word may turn the shape, so numbers have a meaning only without words.
    are_edges = len(numbers) == 2 and all(limits.edge_min <= number <= TARGET_EDGE_MAX for number in numbers)
    nearest = nearest_sizes(numbers[0], numbers[1], limits=limits) if are_edges and not _WORD.search(text) else ()
    return IllegalSize(f"Size {_quoted(text)} is not understood: give {forms}.", nearest)


def _known_rule(rule: str) -> Rule:
    if rule not in RULES:
        raise ValueError(f"The size rule is not one of {', '.join(RULES)}.")
    return rule


def _near(numerator: int, denominator: int, step: int) -> int:
    # Half up. No cell of the page is a tie, so half-even gives the same table.
    return (2 * numerator + step * denominator) // (2 * step * denominator) * step


def _floor(edge: int, step: int) -> int:
    return edge // step * step


def _ceil(edge: int, step: int) -> int:
    return -(-edge // step) * step


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _ECHO_MAX_CHARS else text[: _ECHO_MAX_CHARS - 1] + "…")
