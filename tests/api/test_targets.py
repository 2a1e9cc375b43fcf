"""A target is a size in pixels or the name of a usual size."""

from __future__ import annotations

import pytest

from evolink_mcp.api.targets import PAPERS, SCREENS, UnknownTarget, parse_target


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
def test_pixels_and_names_are_understood(text: str, name: str, size: str) -> None:
    target = parse_target(text)
    assert (target.name, str(target.size)) == (name, size)


def test_every_name_of_both_tables_is_a_target() -> None:
    for name in (*SCREENS, *PAPERS):
        assert parse_target(name).name == name


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
    with pytest.raises(UnknownTarget) as caught:
        parse_target(text)
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)
