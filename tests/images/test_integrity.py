"""A reference image that is damaged inside is refused before the purchase, and a valid one never is."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import Open
from drawings import drawing
from PIL import Image, ImageDraw, ImageFilter

from evolink_mcp.images.prepare import check_reference
from evolink_mcp.images.unusable import Reason, UnusableImage

KINDS = {
    "PNG": ("PNG", {}),
    "JPEG": ("JPEG", {"quality": 85}),
    "optimized JPEG": ("JPEG", {"quality": 85, "optimize": True}),
    "JPEG with restart markers": ("JPEG", {"quality": 85, "restart_marker_rows": 1}),
    "progressive JPEG": ("JPEG", {"quality": 85, "progressive": True}),
    "WebP": ("WEBP", {"quality": 80}),
    "lossless WebP": ("WEBP", {"lossless": True}),
}


def photo(size: tuple[int, int] = (640, 480), seed: int = 1) -> Image.Image:
    """Return an image with a blurred part and a part of noise."""
    dice = random.Random(seed)
    values = dice.randbytes(size[0] * size[1] * 3)
    noise_image = Image.frombytes("RGB", size, values)
    image = noise_image.filter(ImageFilter.GaussianBlur(3))
    image.paste(noise_image.crop((0, 0, size[0], size[1] // 3)))
    return image


def logo(size: tuple[int, int] = (640, 480), seed: int = 1) -> Image.Image:
    """Return an image whose last rows have one colour."""
    dice = random.Random(seed)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = dice.randrange(size[0]), dice.randrange(size[1] // 2)
        draw.ellipse((x, y, x + 60, y + 60), fill=dice.choice(["red", "teal", "black"]))
    return image


def encode(image: Image.Image, kind: str) -> bytes:
    name, options = KINDS[kind]
    out = io.BytesIO()
    image.save(out, name, **options)
    return out.getvalue()


def with_damage(content: bytes, damage: bytes, position: float = 0.5) -> bytes:
    """Return the file with other bytes inside. Its start and its end are unchanged."""
    start = int(len(content) * position)
    assert start + len(damage) < len(content) - 500
    return content[:start] + damage + content[start + len(damage) :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "draw", [photo, logo, lambda size: Image.new("RGB", size, "teal")], ids=["photo", "logo", "plain"]
)
@pytest.mark.parametrize("size", [(640, 480), (333, 77), (17, 9)], ids=str)
def test_a_valid_image_is_accepted(kind: str, draw: Any, size: tuple[int, int]) -> None:
    facts = check_reference(encode(draw(size), kind), is_mask=False)
    assert (facts.width, facts.height) == size


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lossless WebP"])
@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_inside_are_found(kind: str, seed: int) -> None:
    content = encode(photo(seed=seed), kind)
    with pytest.raises(UnusableImage) as refusal:
        check_reference(with_damage(content, random.Random(seed).randbytes(6000)), is_mask=False)
    assert refusal.value.reason in (Reason.DAMAGED, Reason.INCOMPLETE)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP"])
def test_zeros_inside_are_found(kind: str) -> None:
    with pytest.raises(UnusableImage):
        check_reference(with_damage(encode(photo(), kind), bytes(9000)), is_mask=False)


def test_one_wrong_bit_of_a_png_is_found() -> None:
    content = encode(photo(), "PNG")
    middle = len(content) // 2
    flipped_byte = bytes([content[middle] ^ 1])
    with pytest.raises(UnusableImage):
        check_reference(with_damage(content, flipped_byte), is_mask=False)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP", "lossless WebP"])
def test_missing_bytes_inside_are_found(kind: str) -> None:
    content = encode(photo(), kind)
    middle = len(content) // 3
    with pytest.raises(UnusableImage):
        check_reference(content[:middle] + content[middle + 9001 :], is_mask=False)


@pytest.mark.anyio
@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP"])
@pytest.mark.parametrize("tool", ["generate_image", "generate_images"])
async def test_a_damaged_reference_is_refused_before_anything_is_sent(open_world: Open, kind: str, tool: str) -> None:
    async with open_world() as world, world.client() as client:
        pictures = world.folder / "pictures"
        pictures.mkdir(exist_ok=True)
        file = pictures / "photo.png"
        file.write_bytes(with_damage(encode(photo(), kind), random.Random(5).randbytes(6000)))
        prompt = {"prompt": "a fox"} if tool == "generate_image" else {"prompts": ["a fox", "a hen"]}
        answer = await client.call_tool(tool, {**prompt, "image_urls": [str(file)]})
        assert answer.is_error
        assert "damaged" in answer.content[0].text
        assert world.simulator.requests == []


def mask(alpha: int, spot: int | None = None) -> bytes:
    """Return a mask with this alpha everywhere, and another alpha in one pixel."""
    image = Image.new("RGBA", (64, 48), (0, 0, 0, alpha))
    if spot is not None:
        image.putpixel((3, 3), (0, 0, 0, spot))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.mark.anyio
@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize(
    ("content", "refusal", "note"),
    [
        pytest.param(mask(254), "no transparent pixels (alpha of at most 127 of 255)", None, id="254 everywhere"),
        pytest.param(mask(255, 128), "no transparent pixels", None, id="one pixel above the threshold"),
        pytest.param(mask(255, 127), None, None, id="one pixel at the threshold"),
        pytest.param(mask(0), None, "The mask is completely transparent", id="transparent everywhere"),
    ],
)
async def test_a_mask_needs_a_pixel_that_evolink_can_redraw(
    open_world: Open, content: bytes, refusal: str | None, note: str | None
) -> None:
    async with open_world() as world, world.client() as client:
        pictures = world.folder / "pictures"
        pictures.mkdir(exist_ok=True)
        _write(pictures / "photo.png", drawing((64, 48)))
        _write(pictures / "mask.png", content)
        answer = await client.call_tool(
            "generate_image",
            {"prompt": "a fox", "image_urls": [str(pictures / "photo.png")], "mask_url": str(pictures / "mask.png")},
        )
    text = answer.content[0].text
    assert answer.is_error == (refusal is not None)
    assert world.posts == (0 if refusal else 1)
    assert refusal is None or refusal in text
    assert ("The mask is" in text) == (note is not None)
    assert note is None or note in text
    assert any("The mask is" in each for each in answer.structured_content["notes"]) == (note is not None)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
