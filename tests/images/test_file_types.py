"""A reference of another type is refused by its real name, whatever its file is called, with the way to convert it."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Open
from drawings import drawing
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from evolink_mcp.images.file_types import HEAD_BYTES, foreign_type
from evolink_mcp.images.inspect import sniff


def encode(kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), "teal").save(out, kind, **options)
    return out.getvalue()


def box(brand: bytes, *compatible: bytes) -> bytes:
    """Return the first box of an ISO media file."""
    body = b"ftyp" + brand + bytes(4) + b"".join(compatible)
    return (len(body) + 4).to_bytes(4, "big") + body + b"\0\0\1\0meta" + bytes(300)


DNG = b"II*\0\x08\0\0\0\x02\0\xfe\0\x04\0\x01\0\0\0\0\0\0\0\x12\xc6\x01\0\x04\0\0\0\x01\x04\0\0" + bytes(200)
FILES = [
    pytest.param(box(b"heic", b"mif1", b"heic"), "a HEIC image", "Export it as JPEG", id="HEIC"),
    pytest.param(box(b"mif1", b"heic"), "a HEIC image", "Export it as JPEG", id="HEIC of another brand"),
    pytest.param(encode("AVIF"), "an AVIF image", "as PNG", id="AVIF"),
    pytest.param(box(b"mif1", b"avif"), "an AVIF image", "as PNG", id="AVIF of another brand"),
    pytest.param(encode("GIF"), "a GIF image", "as PNG", id="GIF"),
    pytest.param(encode("TIFF"), "a TIFF image", "as PNG", id="TIFF"),
    pytest.param(b"MM\0*\0\0\0\x08" + bytes(99), "a TIFF image", "as PNG", id="TIFF, big endian"),
    pytest.param(encode("BMP"), "a BMP image", "as PNG", id="BMP"),
    pytest.param(encode("ICO", sizes=[(16, 16)]), "an ICO icon", "as PNG", id="ICO"),
    pytest.param(encode("PDF"), "a PDF document", "Export the page as PNG", id="PDF"),
    pytest.param(b"8BPS\0\1" + bytes(99), "a Photoshop document", "export it as PNG", id="PSD"),
    pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing", "as PNG", id="SVG"),
    pytest.param(
        b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- by hand -->\n<svg/>", "an SVG drawing", "as PNG", id="SVG with a head"
    ),
    pytest.param(b"\n<!DOCTYPE html><html></html>", "a web page", "The link led to a page", id="HTML"),
    pytest.param(DNG, "a camera raw file", "Export it as JPEG", id="DNG"),
    pytest.param(b"II*\0\x10\0\0\0CR\2\0" + bytes(99), "a camera raw file", "Export it as JPEG", id="CR2"),
    pytest.param(box(b"crx "), "a camera raw file (CR3)", "Export it as JPEG", id="CR3"),
    pytest.param(b"FUJIFILMCCD-RAW 0201", "a camera raw file", "Export it as JPEG", id="RAF"),
    pytest.param(b"\xff\x0a" + bytes(99), "a JPEG XL image", "as PNG", id="JXL"),
    pytest.param(b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image", "as PNG", id="JXL in a container"),
    pytest.param(box(b"qt  "), "a video", "Save one frame", id="video"),
    pytest.param(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer", "git lfs pull", id="LFS"
    ),
    pytest.param(b"", "an empty file", "not have downloaded it", id="empty"),
    pytest.param(bytes(500_000), "a file of zero bytes only", "not have downloaded it", id="zeros"),
]


@pytest.mark.anyio
@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize(("content", "name", "advice"), FILES)
async def test_a_file_of_another_type_is_named_and_nothing_is_sent(
    open_world: Open, monkeypatch: pytest.MonkeyPatch, content: bytes, name: str, advice: str
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as without the extra `heic`
    async with open_world() as world, world.client() as client:
        pictures = world.folder / "pictures"
        pictures.mkdir(exist_ok=True)
        file = Path(pictures / "photo.png")
        file.write_bytes(content)
        answer = await client.call_tool("generate_image", {"prompt": "a fox", "image_urls": [str(file)]})
        assert answer.is_error
        assert f"is {name}" in answer.content[0].text
        assert advice in answer.content[0].text
        assert "Charged: no" in answer.content[0].text
        assert world.simulator.requests == []


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_accepted_type_has_no_foreign_name(kind: str) -> None:
    content = drawing(kind=kind)
    assert sniff(content) is not None
    assert foreign_type(content[:HEAD_BYTES]) is None


@given(st.binary(max_size=HEAD_BYTES))
def test_any_bytes_have_at_most_one_name(head: bytes) -> None:
    known = foreign_type(head)
    assert known is None or (known.name and known.advice.endswith("."))
