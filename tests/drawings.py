"""Make small images for tests, as bytes: plain or noisy, with metadata, or with a false size."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image, PngImagePlugin

SECRET = "the-photographer-was-here"


def drawing(
    size: tuple[int, int] = (64, 48), kind: str = "PNG", mode: str = "RGB", shade: int = 90, **save: Any
) -> bytes:
    """Return an image of one colour. Another `shade` gives another image."""
    out = io.BytesIO()
    Image.new(mode, size, (shade, 40, 200, 0)[: len(mode)]).save(out, kind, **save)
    return out.getvalue()


def change_image(picture: bytes, change: Callable[[Image.Image], object], **save: Any) -> bytes:
    """Return the image after `change`, in its own file type."""
    out = io.BytesIO()
    with Image.open(io.BytesIO(picture)) as image:
        change(image)
        image.save(out, image.format, **save)
    return out.getvalue()


def with_orientation(picture: bytes, orientation: int) -> bytes:
    """Return the same pixels with an EXIF orientation from 1 to 8."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return change_image(picture, lambda _: None, exif=exif.tobytes())


def noise(size: tuple[int, int], kind: str = "PNG", **save: Any) -> bytes:
    """Return an image that no codec compresses well."""
    out = io.BytesIO()
    bands = [Image.effect_noise(size, 120) for _ in range(3)]
    Image.merge("RGB", bands).save(out, kind, **save)
    return out.getvalue()


def image_with_metadata(kind: str) -> bytes:
    """Return an image with a text and with EXIF."""
    exif = Image.Exif()
    exif[0x010E] = SECRET
    options: dict[str, Any] = {"exif": exif.tobytes()}
    if kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("Comment", SECRET)
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", f"<x>{SECRET}</x>")
    elif kind == "WEBP":
        options["xmp"] = f"<x>{SECRET}</x>".encode()
    else:
        options["comment"] = SECRET
    return drawing((320, 200), kind, **options)


def png_without_pixels(width: int, height: int) -> bytes:
    """Return a PNG with this size in its header and without pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
