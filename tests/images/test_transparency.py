"""The transparency of an image is measured by its pixels, wherever the file keeps it. Answers report the share."""

from __future__ import annotations

import io
from typing import Any

import pytest
from conftest import Clock, Open, PlainSimulator
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from evolink_mcp.images.decode_protocol import DecodeAnswer, unpack_answer
from evolink_mcp.images.inspect import Alpha
from evolink_mcp.images.previews import check_and_preview

ALPHAS = st.lists(st.integers(0, 255), min_size=1, max_size=40)
CHOICES = st.lists(st.booleans(), min_size=1, max_size=40)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def measure(content: bytes) -> Alpha | None:
    facts, _ = check_and_preview(content, 0)
    return facts.alpha


def expected_alpha(alphas: list[int]) -> Alpha:
    """Return the result by the definition: a pixel is transparent if its alpha is at most 127."""
    return Alpha(len([alpha for alpha in alphas if alpha <= 127]) / len(alphas), min(alphas), max(alphas))


def image_of(mode: str, values: list[Any]) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    return image


@settings(deadline=None)
@given(ALPHAS)
def test_an_alpha_channel_is_measured(alphas: list[int]) -> None:
    colour = image_of("RGBA", [(9, 90, 200, alpha) for alpha in alphas])
    grey = image_of("LA", [(90, alpha) for alpha in alphas])
    assert measure(encode(colour)) == expected_alpha(alphas)
    assert measure(encode(grey)) == expected_alpha(alphas)
    assert measure(encode(colour, "WEBP", lossless=True, exact=True)) in (
        expected_alpha(alphas),
        None if min(alphas) == 255 else expected_alpha(alphas),  # WebP stores no alpha channel for an opaque image
    )


@settings(deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=40), st.lists(st.integers(0, 255), min_size=8, max_size=8))
def test_a_palette_with_transparent_entries_is_measured(indexes: list[int], alpha_of_index: list[int]) -> None:
    image = image_of("P", indexes)
    image.putpalette([value for index in range(8) for value in (index, 90, 200)])
    content = encode(image, transparency=bytes(alpha_of_index))
    assert measure(content) == expected_alpha([alpha_of_index[index] for index in indexes])


@settings(deadline=None)
@given(CHOICES)
@pytest.mark.parametrize(
    ("mode", "key", "other"),
    [
        pytest.param("P", 3, 4, id="palette"),
        pytest.param("RGB", (1, 2, 3), (1, 2, 4), id="colour"),
        pytest.param("L", 5, 6, id="grey"),
        pytest.param("1", 0, 1, id="black and white"),
    ],
)
def test_one_transparent_colour_is_measured(mode: str, key: Any, other: Any, is_clear: list[bool]) -> None:
    image = image_of(mode, [key if clear else other for clear in is_clear])
    if mode == "P":
        image.putpalette([value for index in range(8) for value in (index, 90, 200)])
    assert measure(encode(image, transparency=key)) == expected_alpha([0 if clear else 255 for clear in is_clear])


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_an_image_without_transparency_has_none(mode: str) -> None:
    assert measure(encode(Image.new(mode, (4, 4)))) is None


def test_a_large_palette_image_is_measured_in_strips() -> None:
    image = Image.new("P", (2048, 1100))
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.paste(1, (0, 0, 2048, 275))
    assert measure(encode(image, transparency=bytes([255, 0]))) == Alpha(0.25, 0, 255)


@given(st.floats(0, 1), st.integers(0, 255), st.integers(0, 255))
def test_the_decoder_sends_the_measured_transparency(share: float, lowest: int, highest: int) -> None:
    facts, _ = check_and_preview(encode(Image.new("RGBA", (4, 4))), 0)
    alpha = Alpha(share, min(lowest, highest), max(lowest, highest))
    answer = DecodeAnswer(type(facts)(facts.mime_type, 4, 4, has_alpha=True, alpha=alpha))
    assert unpack_answer(answer.pack(), 0).facts == answer.facts


def clear_palette(size: tuple[int, int]) -> Image.Image:
    """Return an image of which 38 % of the rows have the transparent palette entry."""
    image = Image.new("P", size)
    image.putpalette([255, 255, 255, 200, 30, 30])
    image.paste(1, (0, 0, size[0], size[1] * 62 // 100))
    return image


@pytest.mark.anyio
@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize(
    ("draw", "options", "text"),
    [
        pytest.param(clear_palette, {"transparency": 0}, "38 % of the pixels are transparent", id="palette"),
        pytest.param(lambda size: Image.new("RGB", size, "red"), {}, "no transparency at all", id="no alpha"),
        pytest.param(
            lambda size: Image.new("RGBA", size, (9, 9, 9, 255)),
            {},
            "no pixel of the picture is transparent",
            id="opaque",
        ),
        pytest.param(
            lambda size: Image.new("RGBA", size, (9, 9, 9, 254)),
            {},
            "the lowest alpha is 254 of 255",
            id="nearly opaque",
        ),
        pytest.param(lambda size: Image.new("RGBA", size, (9, 9, 9, 0)), {}, "completely invisible", id="invisible"),
        pytest.param(
            lambda size: Image.new("RGBA", size, (9, 9, 9, 3)),
            {},
            "the highest alpha is 3 of 255",
            id="nearly invisible",
        ),
    ],
)
async def test_the_answer_reports_the_measured_transparency(
    open_world: Open, draw: Any, options: dict[str, Any], text: str
) -> None:
    class Painter(PlainSimulator):
        def draw(self, task: Any, index: int) -> bytes:
            return encode(draw(task.size), **options)

    clock = Clock()
    request = {"prompt": "a fox", "size": "1600x1600", "background": "transparent"}
    async with open_world(simulator=Painter(clock=clock, duration_s=0), clock=clock) as world, world.client() as client:
        answer = await client.call_tool("generate_image", request)
        task = await client.call_tool("get_task", {"task_id": answer.structured_content["task_id"]})
    assert [note for note in answer.structured_content["notes"] if text in note]
    assert text in answer.content[0].text
    assert answer.structured_content["status"] == "completed"
    assert task.structured_content["notes"] == answer.structured_content["notes"]
