"""A target may be words for pixels, by the grammar of sizes."""

from __future__ import annotations

import pytest

from evolink_mcp.api.targets import UnknownTarget, parse_target


@pytest.mark.parametrize(
    ("text", "pixels"),
    [
        ("1920x1080 portrait", "1080x1920"),
        ("portrait 1920x1080", "1080x1920"),
        ("1080p", "1920x1080"),
        ("vertical 4K", "2160x3840"),
        ("10x15 cm 300dpi", "1181x1772"),
        ("4x6 inch landscape 300 dpi", "1800x1200"),
        ("300dpi A4", "2480x3508"),
        ("B4 150dpi", "1476x2085"),
        ("１２００×６２８", "1200x628"),
        ("1.91:1", "1200x628"),
    ],
)
def test_words_for_pixels_are_a_target(text: str, pixels: str) -> None:
    assert str(parse_target(text).size) == pixels


@pytest.mark.parametrize("text", ["16:9", "portrait", "A4 16:9 fox", "square 2K"])
def test_words_without_pixels_are_no_target(text: str) -> None:
    with pytest.raises(UnknownTarget, match="is no target"):
        parse_target(text)


def test_a_contradiction_names_both_meanings() -> None:
    with pytest.raises(UnknownTarget, match='“landscape” means size="1920x1088" and “portrait” means size="1088x1920"'):
        parse_target("landscape 1920x1080 portrait")


def test_a_paper_has_the_pixels_of_its_millimetres() -> None:
    assert str(parse_target("a4-300dpi").size) == "2480x3508"
    assert str(parse_target("letter-300dpi").size) == "2550x3300"
    assert str(parse_target("business-card-300dpi").size) == "1004x650"
