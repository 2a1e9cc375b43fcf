"""Sizes by EvoLink's page: every cell of both tables, every limit, and an answer for every target."""

from __future__ import annotations

import pickle

import pytest

from evolink_mcp.api import models, sizes
from evolink_mcp.api.sizes import IllegalSize, Size

ANCHOR_EDGE = """\
| Ratio | 1K | 2K | 4K |
|---|---|---|---|
| 1:1 | 1024x1024 | 2048x2048 | 2880x2880 * |
| 1:2 | 1024x2048 | 1024x2048 | 1920x3840 |
| 2:1 | 2048x1024 | 2048x1024 | 3840x1920 |
| 1:3 | 1024x3072 | 688x2048 | 1280x3840 |
| 3:1 | 3072x1024 | 2048x688 | 3840x1280 |
| 2:3 | 1024x1536 | 1360x2048 | 2336x3520 * |
| 3:2 | 1536x1024 | 2048x1360 | 3520x2336 * |
| 3:4 | 1024x1360 | 1536x2048 | 2480x3312 * |
| 4:3 | 1360x1024 | 2048x1536 | 3312x2480 * |
| 4:5 | 1024x1280 | 1632x2048 | 2560x3216 * |
| 5:4 | 1280x1024 | 2048x1632 | 3216x2560 * |
| 9:16 | 1024x1824 | 1152x2048 | 2160x3840 |
| 16:9 | 1824x1024 | 2048x1152 | 3840x2160 |
| 9:21 | 1024x2384 | 880x2048 | 1648x3840 |
| 21:9 | 2384x1024 | 2048x880 | 3840x1648 |"""
PIXEL_BUDGET = """\
| Ratio | 1K | 2K | 4K |
|---|---|---|---|
| 1:1 | 1024x1024 | 2048x2048 | 2880x2880 |
| 1:2 | 720x1456 | 1456x2896 | 1920x3840 * |
| 2:1 | 1456x720 | 2896x1456 | 3840x1920 * |
| 1:3 | 592x1776 | 1184x3552 | 1280x3840 * |
| 3:1 | 1776x592 | 3552x1184 | 3840x1280 * |
| 2:3 | 832x1248 | 1680x2512 | 2352x3520 |
| 3:2 | 1248x832 | 2512x1680 | 3520x2352 |
| 3:4 | 880x1184 | 1776x2368 | 2480x3312 * |
| 4:3 | 1184x880 | 2368x1776 | 3312x2480 * |
| 4:5 | 912x1152 | 1824x2288 | 2576x3216 |
| 5:4 | 1152x912 | 2288x1824 | 3216x2576 |
| 9:16 | 768x1360 | 1536x2736 | 2160x3840 |
| 16:9 | 1360x768 | 2736x1536 | 3840x2160 |
| 9:21 | 672x1568 | 1344x3136 | 1648x3840 * |
| 21:9 | 1568x672 | 3136x1344 | 3840x1648 * |"""

TABLES = {"anchor-edge": ANCHOR_EDGE, "pixel-budget": PIXEL_BUDGET}


def _cells() -> list[object]:
    cells: list[object] = []
    for rule, text in TABLES.items():
        for line in text.splitlines()[2:]:
            ratio, *row = (cell.strip() for cell in line.strip("|").split("|"))
            cells += [
                pytest.param(
                    rule,
                    ratio,
                    tier,
                    cell.removesuffix(" *"),
                    cell.endswith("*"),
                    id=f"{rule} {ratio} {tier}",
                )
                for tier, cell in zip(models.TIERS, row, strict=True)
            ]
    return cells


def _legal(size: Size) -> bool:
    long, short = max(size.width, size.height), min(size.width, size.height)
    on_grid = long % 16 == short % 16 == 0
    return on_grid and 16 <= short <= long <= min(3840, 3 * short) and 655_360 <= long * short <= 8_294_400


@pytest.mark.parametrize(("rule", "ratio", "tier", "pixels", "downscaled"), _cells())
def test_a_ratio_and_a_tier_give_the_pixels_of_the_page(
    rule: str, ratio: str, tier: str, pixels: str, downscaled: bool
) -> None:
    resolved = sizes.resolve(ratio, tier, rule)
    width, height = map(int, pixels.split("x"))
    assert sizes.Resolved(Size(width, height), downscaled, True, rule) == resolved
    assert pixels == sizes.normalize(pixels)


@pytest.mark.parametrize("rule", sizes.RULES)
def test_the_table_in_markdown_is_the_page(rule: str) -> None:
    assert TABLES[rule] == sizes.table(rule)
    assert sum(line.count("x") for line in sizes.table(rule).splitlines()) == 45


def test_a_tier_is_read_in_any_case() -> None:
    assert sizes.resolve("16:9", "2K") == sizes.resolve(" 16:9 ", "2k")


@pytest.mark.parametrize(
    ("text", "size", "rule"),
    [
        pytest.param("auto", None, "auto", id="auto has no pixels"),
        pytest.param("1024x640", Size(1024, 640), "explicit", id="explicit pixels"),
        pytest.param("3840×2160", Size(3840, 2160), "explicit", id="multiplication sign"),
    ],
)
def test_the_tier_does_not_apply_to_auto_or_pixels(text: str, size: Size | None, rule: str) -> None:
    assert sizes.Resolved(size, downscaled=False, resolution_applies=False, rule=rule) == sizes.resolve(text, "4K")


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        pytest.param("auto", "auto", id="auto"),
        pytest.param(" AUTO\n", "auto", id="auto in capitals"),
        pytest.param("1024x640", "1024x640", id="fewest pixels"),
        pytest.param("640x1024", "640x1024", id="fewest pixels upright"),
        pytest.param("816x816", "816x816", id="smallest square"),
        pytest.param("2880x2880", "2880x2880", id="largest square"),
        pytest.param("3840x2160", "3840x2160", id="most pixels"),
        pytest.param("1280x3840", "1280x3840", id="exactly 1:3"),
        pytest.param("1536X1024", "1536x1024", id="capital X"),
        pytest.param("3840×2160", "3840x2160", id="multiplication sign"),
        pytest.param(" 1024 x 1024 ", "1024x1024", id="blanks around the x"),
    ],
)
def test_a_legal_size_is_normalized(text: str, canonical: str) -> None:
    assert canonical == sizes.normalize(text)
    assert canonical == sizes.normalize(canonical)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("16 : 9", id="blanks around the colon"),
        pytest.param("32:18", id="a ratio not reduced"),
        pytest.param("１６:９", id="full-width digits"),
        pytest.param("١٦:٩", id="Arabic-Indic digits"),
        pytest.param("1024х1024", id="Cyrillic letter instead of x"),
        pytest.param("1024*1024", id="asterisk"),
        pytest.param("1024 1024", id="blank only"),
        pytest.param("1024x", id="no height"),
        pytest.param("01024x1024", id="leading zero"),
        pytest.param("1024.0x1024", id="decimal"),
        pytest.param("1024x1024px", id="unit"),
        pytest.param("\ud800", id="lone surrogate"),
        pytest.param("0x0", id="zero"),
        pytest.param("16x16", id="too few pixels"),
        pytest.param("2880x2896", id="one row of 16 too many"),
        pytest.param("3856x1600", id="edge one step too long"),
        pytest.param("2048x320", id="wider than 3:1"),
        pytest.param("99999999999999999999x1024", id="twenty digits"),
        pytest.param("9" * 1_000_000, id="a megabyte of digits"),
        pytest.param("1024x" + " " * 1_000_000 + "1024", id="a megabyte of blanks inside"),
    ],
)
def test_anything_else_is_refused_in_few_words(text: str) -> None:
    with pytest.raises(IllegalSize) as refusal:
        sizes.normalize(text)
    assert len(str(refusal.value)) < 500
    assert all(_legal(size) for size in refusal.value.nearest)
    str(refusal.value).encode()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("1000x1008", ["the width is not a multiple of 16", "1008x1008"], id="multiple of 16"),
        pytest.param("4096x2048", ["the width is not within 16 to 3840", "3840x1920"], id="edge"),
        pytest.param("16x16", ["256 pixels are not within 655,360 to 8,294,400", "816x816"], id="pixels"),
        pytest.param("2048x320", ["the aspect ratio 6.4:1 is above 3:1", "1440x480"], id="aspect"),
        pytest.param("7:5", ["the nearest are 4:3 and 3:2", "1232x880"], id="ratio not on the page"),
        pytest.param("1024*1024", ["not understood", "Nearest legal sizes: 1024x1024"], id="what was meant"),
    ],
)
def test_a_refusal_names_the_limit_and_the_nearest_legal_sizes(text: str, words: list[str]) -> None:
    with pytest.raises(IllegalSize) as refusal:
        sizes.normalize(text)
    assert [word for word in words if word not in str(refusal.value)] == []


@pytest.mark.parametrize("tier", [pytest.param(t, id=repr(t)) for t in ("8K", "", "4", " 4K", "4\u212a")])
def test_an_unknown_tier_is_refused_even_for_auto(tier: str) -> None:
    with pytest.raises(IllegalSize, match="not one of 1K, 2K, 4K"):
        sizes.resolve("auto", tier)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="anchor-edge, pixel-budget"):
        sizes.resolve("1:1", "1K", "newest")


def test_a_refusal_survives_pickling() -> None:
    """A worker process sends an error to its parent as a pickle."""
    refusal = IllegalSize("No.", (Size(816, 816),))
    assert str(refusal) == str(pickle.loads(pickle.dumps(refusal)))


@pytest.mark.parametrize(
    ("width", "height", "first"),
    [
        pytest.param(1000, 1000, "1008x1008", id="between two squares"),
        pytest.param(3840, 3840, "2880x2880", id="too large a square"),
        pytest.param(800, 500, "1024x640", id="shape kept exactly"),
        pytest.param(2048, 320, "1440x480", id="too wide"),
        pytest.param(0, 0, "816x816", id="nothing"),
        pytest.param(10**20, 10**20, "2880x2880", id="twenty digits"),
        pytest.param(10**400, 3, "3840x1280", id="beyond floats"),
    ],
)
def test_the_nearest_legal_size_keeps_the_shape(width: int, height: int, first: str) -> None:
    nearest = sizes.nearest_legal(width, height)
    assert first == str(nearest[0])
    assert [_legal(size) for size in nearest] == [True] * 3
    assert len(set(nearest)) == 3


def test_a_legal_size_is_its_own_nearest() -> None:
    grid = [Size(width, height) for width in range(16, 3856, 112) for height in range(16, 3856, 48)]
    legal = [size for size in grid if _legal(size)]
    assert legal == [sizes.nearest_legal(size.width, size.height, 1)[0] for size in legal]


@pytest.mark.parametrize(
    ("target", "size", "scale", "offset", "cell"),
    [
        pytest.param((1200, 628), "1200x640", 1.0, (0, 6), "2:1 1K 2048x1024 True", id="link preview"),
        pytest.param((1920, 1080), "1920x1088", 1.0, (0, 4), "16:9 2K 2048x1152 True", id="full HD"),
        pytest.param((1080, 1350), "1088x1360", 1.0, (4, 5), "4:5 2K 1632x2048 True", id="portrait post"),
        pytest.param((800, 800), "816x816", 800 / 816, (0, 0), "1:1 1K 1024x1024 True", id="below the pixel budget"),
        pytest.param((728, 90), "1392x480", 728 / 1392, (0, 80), "3:1 2K 2048x688 True", id="a small banner"),
        pytest.param((16, 16), "816x816", 16 / 816, (0, 0), "1:1 1K 1024x1024 True", id="an icon"),
        pytest.param((1500, 500), "1504x512", 1.0, (2, 6), "3:1 2K 2048x688 True", id="2K is smaller than 1K at 3:1"),
        pytest.param((2000, 300), "2000x672", 1.0, (0, 186), "3:1 2K 2048x688 True", id="wider than 3:1"),
        pytest.param((8000, 1000), "3840x1280", 8000 / 3840, (0, 833), "3:1 4K 3840x1280 False", id="wide, too large"),
        pytest.param((3840, 3840), "2880x2880", 4 / 3, (0, 0), "1:1 4K 2880x2880 False", id="above the maximum"),
    ],
)
def test_a_target_in_pixels_is_covered(
    target: tuple[int, int], size: str, scale: float, offset: tuple[int, int], cell: str
) -> None:
    cover = sizes.cover(*target)
    assert (target, size, scale) == (cover.target, str(cover.size), cover.scale)
    assert (Size(*target), offset) == (cover.crop, (cover.left, cover.top))
    assert cell == f"{cover.ratio} {cover.tier} {cover.tier_size} {cover.tier_covers}"


def test_a_cover_follows_the_rule() -> None:
    assert str(sizes.cover(1200, 628, "pixel-budget").tier_size) == "1456x720"


@pytest.mark.parametrize("rule", sizes.RULES)
def test_every_target_gets_a_legal_size_that_contains_the_crop(rule: str) -> None:
    uncovered: list[tuple[int, int]] = []
    for width in (1, 15, 16, 17, 333, 809, 1000, 1403, 2881, 3839, 3841, 9999, 100_000):
        for height in (1, 16, 300, 481, 810, 1281, 2160, 2881, 3840, 5000, 100_000):
            cover = sizes.cover(width, height, rule)
            right, bottom = cover.left + width, cover.top + height
            is_contained = (
                right <= cover.size.width * cover.scale + 1e-6 and bottom <= cover.size.height * cover.scale + 1e-6
            )
            # Only a target smaller than every legal size is scaled down, and only as far as necessary.
            is_small = width * height < models.DEFAULT_MODEL.limits.pixels_min
            is_tight = cover.scale >= 1 or (is_small and width / cover.size.width <= cover.scale + 1e-9)
            if not (_legal(cover.size) and is_contained and cover.left >= 0 <= cover.top and is_tight):
                uncovered.append((width, height))
    assert uncovered == []


@pytest.mark.parametrize(
    ("width", "height"),
    [
        pytest.param(0, 100, id="no width"),
        pytest.param(100, 100_001, id="too high"),
        pytest.param(9, -1, id="minus"),
    ],
)
def test_a_target_outside_1_to_100000_is_refused(width: int, height: int) -> None:
    with pytest.raises(IllegalSize, match="1 to 100,000"):
        sizes.cover(width, height)


@pytest.mark.parametrize(
    ("size", "aspect", "megapixels"),
    [
        pytest.param(Size(2048, 1152), "16:9", 2.36, id="reduces to a ratio of the page"),
        pytest.param(Size(2048, 688), "128:43", 1.41, id="reduces to what it is"),
        pytest.param(Size(3840, 2160), "16:9", 8.29, id="UHD"),
    ],
)
def test_a_size_has_its_ratio_megapixels_and_pixels(size: Size, aspect: str, megapixels: float) -> None:
    assert (aspect, megapixels) == (size.aspect_ratio, size.megapixels)
    assert size.width * size.height == size.pixels
