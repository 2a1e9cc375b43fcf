"""With the extra `heic` a HEIC photo is converted. Without it the refusal names the extra."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pillow_heif
import pytest
from conftest import World
from fake_decoders import answering_once
from PIL import Image, ImageCms

from evolink_mcp.app.wiring import decoder_environment
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.images.decode_protocol import DecodeAnswer
from evolink_mcp.images.metadata import ORIENTATION
from evolink_mcp.images.unusable import Reason, UnusableImage

pytestmark = pytest.mark.anyio
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def heic(size: tuple[int, int] = (64, 48), mode: str = "RGB", **options: Any) -> bytes:
    """Return a HEIC photo: left half black, right half white. With alpha its upper half is transparent."""
    image = Image.new(mode, size)
    image.paste("white", (size[0] // 2, 0, *size))
    if mode == "RGBA":
        image.putalpha(255)
        image.paste((0, 0, 0, 0), (0, 0, size[0], size[1] // 2))
    out = io.BytesIO()
    pillow_heif.from_pillow(image).save(out, quality=90, **options)
    return out.getvalue()


def unfinished_photo() -> bytes:
    """Return a photo of which a download tool has the first half and zeros for the rest."""
    image = Image.effect_noise((256, 256), 60).convert("RGB")
    out = io.BytesIO()
    pillow_heif.from_pillow(image).save(out, quality=90)
    content = out.getvalue()
    return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)


def too_many_pixels() -> bytes:
    """Return a small photo. Its head names too many pixels for the memory of a decoder."""
    content = heic((64, 64))
    size = content.index(b"ispe") + 8  # after the box type, its version and its flags
    return content[:size] + (5000).to_bytes(4, "big") + (5008).to_bytes(4, "big") + content[size + 8 :]


async def convert(content: bytes) -> bytes:
    file = io.BytesIO(content)
    with closing(Decoder(decoder_environment())) as decoder:
        await decoder.convert_heic(file)
    return file.getvalue()


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "JPEG"), ("RGBA", "PNG")])
async def test_a_photo_becomes_a_jpeg_and_keeps_alpha_as_a_png(mode: str, kind: str) -> None:
    with Image.open(io.BytesIO(await convert(heic(mode=mode)))) as image:
        assert (image.format, image.size, image.mode) == (kind, (64, 48), mode)
        assert max(image.convert("L").getpixel((60, 40)) or 0, 0) > 240  # pyright: ignore
        if mode == "RGBA":
            assert image.getchannel("A").getextrema() == (0, 255)


async def test_the_copy_is_upright_has_the_colour_profile_and_no_metadata() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # displayed clockwise
    exif[0x010F] = "a camera"
    content = heic(exif=exif.tobytes(), icc_profile=SRGB)
    with pillow_heif.open_heif(io.BytesIO(content)).to_pillow() as expected:
        size = expected.size
    with Image.open(io.BytesIO(await convert(content))) as image:
        assert image.size == size
        assert image.info["icc_profile"] == SRGB
        assert not image.getexif()


async def test_grey_with_10_bits_keeps_its_shades() -> None:
    ramp = b"".join((value << 8).to_bytes(2, "little") for value in range(256)) * 64
    out = io.BytesIO()
    pillow_heif.from_bytes("I;16", (256, 64), ramp).save(out, quality=100)
    with Image.open(io.BytesIO(await convert(out.getvalue()))) as image:
        shades = [image.convert("L").getpixel((x, 32)) for x in (0, 64, 128, 192, 255)]
    assert all(abs(shade - value) <= 4 for shade, value in zip(shades, (0, 64, 128, 192, 255), strict=True)), shades  # type: ignore[operator]


async def test_a_photo_is_kept_until_its_conversion_is_complete() -> None:
    """The work may start again if other images need its place. Then it must read the photo and not a part of the answer."""
    photo = heic()
    file = io.BytesIO(photo)
    part = DecodeAnswer(payload=bytes(100)).pack() + bytes(10)
    with (
        closing(Decoder(decoder_environment(), command=answering_once(part))) as decoder,
        pytest.raises(UnusableImage) as error,
    ):
        await decoder.convert_heic(file)
    assert error.value.reason is Reason.DECODER_FAILED
    assert file.getvalue() == photo


async def test_every_other_file_stays() -> None:
    for content in (b"", b"text", b"\x89PNG\r\n\x1a\n and more", heic()[:11]):
        assert await convert(content) == content


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(lambda: heic()[:200], Reason.DAMAGED, id="the first bytes"),
        pytest.param(lambda: heic()[:-40], Reason.DAMAGED, id="the end is missing"),
        pytest.param(unfinished_photo, Reason.INCOMPLETE, id="an unfinished download"),
        pytest.param(too_many_pixels, Reason.HEIC_TOO_LARGE, id="too many pixels"),
    ],
)
async def test_a_damaged_or_too_large_photo_is_refused(make: Callable[[], bytes], reason: Reason) -> None:
    content = make()  # not at import: every worker imports this file
    with pytest.raises(UnusableImage) as error:
        await convert(content)
    assert error.value.reason is reason


def write_photo(world: World, content: bytes) -> Path:
    path = world.folder / "pictures" / "IMG_0001.HEIC"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("form", ["path", "data URI"])
async def test_a_photo_is_a_reference_and_is_uploaded_once(world: World, form: str) -> None:
    content = heic()
    source = str(write_photo(world, content))
    if form == "data URI":
        source = "data:image/heic;base64," + base64.b64encode(content).decode()
    async with world.client() as client:
        for prompt in ("sim:fast a fox", "sim:fast a hen"):
            answer = await client.call_tool("generate_image", {"prompt": prompt, "image_urls": [source]})
            assert not answer.is_error, answer.content[0].text
    uploads = [request for request in world.simulator.requests if request.path.startswith("/api/v1/files/upload")]
    assert len(uploads) == 1
    assert b"ftypheic" not in uploads[0].body
    assert b"\xff\xd8\xff" in uploads[0].body


async def test_exact_files_are_derived_from_a_photo(world: World) -> None:
    path = write_photo(world, heic())
    async with world.client() as client:
        answer = await client.call_tool("derive_image", {"source": str(path), "targets": ["32x32"]})
    assert not answer.is_error, answer.content[0].text
    (file,) = answer.structured_content["files"]
    assert (file["width"], file["height"], file["mime_type"]) == (32, 32, "image/jpeg")
    assert Path(file["path"]).name == "IMG_0001-32x32.jpg"
    assert world.posts == 0


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        pytest.param("generate_image", {"prompt": "a fox", "image_urls": ["{path}"]}, id="reference"),
        pytest.param("derive_image", {"source": "{path}", "targets": ["32x32"]}, id="derive"),
    ],
)
async def test_without_the_extra_the_refusal_names_it(
    world: World, monkeypatch: pytest.MonkeyPatch, tool: str, arguments: dict[str, Any]
) -> None:
    path = str(write_photo(world, heic()))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    arguments_with_path = {
        name: [path] if value == ["{path}"] else path if value == "{path}" else value
        for name, value in arguments.items()
    }
    async with world.client() as client:
        answer = await client.call_tool(tool, arguments_with_path)
    assert answer.is_error
    text = answer.content[0].text
    assert "a HEIC image" in text
    assert "the extra heic" in text
    assert (world.posts, world.simulator.requests) == (0, [])
