"""300 wordings for a size and their meaning. The table comes from the rules of the grammar, not from reports."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolink_mcp.api import sizes
from evolink_mcp.api.size_grammar import Contradiction, suggest

TABLE = Path(__file__).parent / "size_wordings.tsv"
ROWS = [tuple(line.split("\t")) for line in TABLE.read_text("utf-8").splitlines() if line and not line.startswith("# ")]
SHAPE_TOLERANCE = 0.01


def _orientation(width: float, height: float) -> int:
    return (width > height) - (width < height)


def _shape(text: str) -> tuple[float, float]:
    width, height = text.replace("x", ":").split(":")
    return float(width), float(height)


def _is_meant(wording: str, meaning: str) -> bool:
    """Return whether the grammar reads the wording with the meaning of the table.

    Raises:
        AssertionError: the size has the wrong orientation.
    """
    if meaning.startswith("refuse"):
        with pytest.raises(Contradiction) as refusal:
            suggest(wording)
        return sorted(refusal.value.readings) == sorted(meaning.split()[1:])
    suggestion = suggest(wording)
    if suggestion is None or meaning == "?":
        return suggestion is None and meaning == "?"
    shape, _, tier = meaning.removeprefix("=").partition("@")
    size = sizes.resolve(suggestion.size).size
    assert size is not None
    expected_ratio = _shape(shape)
    assert _orientation(size.width, size.height) == _orientation(*expected_ratio), (wording, suggestion)
    if meaning.startswith("="):
        return suggestion.size == shape
    ratio = _shape(suggestion.size)
    is_same_shape = abs(ratio[0] / ratio[1] * expected_ratio[1] / expected_ratio[0] - 1) <= SHAPE_TOLERANCE
    return is_same_shape and (not tier or suggestion.resolution == tier)


def test_the_table_has_300_different_wordings() -> None:
    assert len({wording for wording, _ in ROWS}) == len(ROWS) >= 300


def test_every_wording_has_its_meaning() -> None:
    assert [row for row in ROWS if not _is_meant(*row)] == []


WORDS = st.sampled_from(
    [
        *(
            "portrait",
            "landscape",
            "square",
            "16:9",
            "9:16",
            "4x5",
            "1920x1080",
            "1080 x 1920 px",
            "A4",
            "letter",
            "B5",
        ),
        *(
            "10x15 cm",
            "8x10 in",
            "300dpi",
            "4K",
            "HD",
            "1080p",
            "1K",
            "story",
            "banner",
            "widescreen",
            "1.91",
            ",",
            "(",
            "x",
        ),
        *("1024", "width 1024", "height 768", "tall", "wide", "16", ":", "-", "_", "px", "fox", "0", "in", "image"),
    ]
)


@given(st.lists(WORDS, min_size=1, max_size=5), st.sampled_from(["portrait", "landscape"]), st.integers(0, 4))
@settings(max_examples=1_500, deadline=None, database=None, derandomize=True)
def test_the_size_never_has_the_opposite_of_the_named_orientation(
    words: list[str], orientation: str, position: int
) -> None:
    words.insert(position, orientation)
    try:
        suggestion = suggest(" ".join(words))
    except Contradiction:
        suggestion = None
    if suggestion is not None:
        size = sizes.resolve(suggestion.size).size
        assert size is not None
        assert _orientation(size.width, size.height) == (1 if orientation == "landscape" else -1)
