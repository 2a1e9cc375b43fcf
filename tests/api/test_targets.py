"""A target is a size in pixels or the name of a usual size."""

from __future__ import annotations

from pathlib import Path

import pytest

from evolink_mcp.api.targets import ICO, PAPERS, SCREENS, UnknownTarget, parse_gravity, parse_target


@pytest.mark.parametrize(
    ("text", "name", "size"),
    [
        ("1200x628", "1200x628", "1200x628"),
        (" 1200 × 628 px ", "1200x628", "1200x628"),
        ("1200*628", "1200x628", "1200x628"),
        ("OG", "og", "1200x630"),
        ("Instagram Story", "instagram-story", "1080x1920"),
        ("instagram_square", "instagram-square", "1080x1080"),
        ("favicon", "favicon", "48x48"),
        ("a4", "a4", "2480x3508"),
        ("a4-300dpi", "a4-300dpi", "2480x3508"),
        ("A4 landscape 150dpi", "a4-landscape-150dpi", "1754x1240"),
        ("letter", "letter", "2550x3300"),
        ("a5", "a5", "1748x2480"),
    ],
)
def test_pixels_and_names_are_valid_targets(text: str, name: str, size: str) -> None:
    target = parse_target(text)
    assert (target.name, str(target.size)) == (name, size)


def test_every_name_of_both_tables_is_a_target() -> None:
    for name in (*SCREENS, *PAPERS):
        assert parse_target(name).name == name


def test_the_page_of_derived_files_lists_every_name_with_its_pixels() -> None:
    page = (Path(__file__).parents[2] / "docs" / "derived-files.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for name, (sizes, mime_type) in SCREENS.items():
        row = next(row for row in rows if f"`{name}`" in row)
        assert all(size.partition("x")[0] in row for size in sizes.split())
        assert mime_type is None or mime_type.removeprefix("image/").replace("x-icon", "ico") in row
        assert mime_type == ICO or sizes in row
    papers = next(row for row in rows if "`a2`" in row)
    assert all(f"`{name}`" in papers for name in PAPERS if not name.startswith("a"))


@pytest.mark.parametrize(
    ("text", "point"),
    [
        ("centre", (0.5, 0.5)),
        ("Center", (0.5, 0.5)),
        ("top", (0.5, 0)),
        ("bottom-right", (1, 1)),
        ("right bottom", (1, 1)),
        ("northwest", (0, 0)),
        ("east", (1, 0.5)),
        ("top-centre", (0.5, 0)),
        ("0.3,0.7", (0.3, 0.7)),
        ("1, 0", (1, 0)),
    ],
)
def test_gravity_is_an_edge_a_corner_or_a_point(text: str, point: tuple[float, float]) -> None:
    assert parse_gravity(text) == point


@pytest.mark.parametrize("text", ["", "top-bottom", "left-right", "top-left-right", "1.5,0", "-1,0", "nan,0", "0.5"])
def test_another_gravity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"0\.3,0\.7|shares from 0 to 1"):
        parse_gravity(text)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("instagram-sqare", "did you mean instagram-square"),
        ("nonsense", "give pixels such as 1200x628"),
        ("0x100", "give pixels"),
        ("10001x10000", "the largest target of this shape is 6000x5999"),
        ("999999x999999", "the largest target of this shape is 6000x6000"),
        ("999999x1", "the largest target of this shape is 16000x1"),
        ("a4-9999dpi", "use a4-1200dpi"),
        ("a3-1200dpi", "the largest target of this shape is"),
        ("", "give pixels"),
    ],
)
def test_a_refusal_is_one_line_and_names_the_nearest_valid_value(text: str, advice: str) -> None:
    with pytest.raises(UnknownTarget) as refusal:
        parse_target(text)
    assert advice in str(refusal.value)
    assert "\n" not in str(refusal.value)
