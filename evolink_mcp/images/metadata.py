"""What a picture file says beside its pixels: read for the way up, and left out of what is uploaded."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from typing import BinaryIO

from evolink_mcp.images.structure import Part, walk

ORIENTATION = 0x0112  # of EXIF: 1 is upright, 2 to 4 are turned or mirrored, 5 to 8 lie on their side
EXIF_HEAD = b"Exif\0\0"
# What a decoder needs for the pixels and their colours. PNG: https://www.w3.org/TR/png-3/#11Chunks
PNG_KEPT = frozenset(
    b"IHDR PLTE IDAT IEND tRNS cHRM gAMA iCCP sBIT sRGB cICP mDCV cLLI bKGD hIST pHYs sPLT".split(),
)
WEBP_KEPT = frozenset([b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP"])
WEBP_SAYS_METADATA = 0x0C  # flags of VP8X: EXIF and XMP are there
APP0, APP2, APP14, APP15, COM = 0xE0, 0xE2, 0xEE, 0xEF, 0xFE
JFIF_LENGTH = 16  # of APP0 without the thumbnail that may follow


def orientation(file: BinaryIO, mime_type: str) -> int:
    """How the picture is turned, as EXIF says it: 1 (upright) to 8. Walks over every part, to the end.

    Raises:
        TooManyParts, BreaksOff: as `walk`.
    """
    found = [data for part in walk(file, mime_type) if (data := _exif(file, mime_type, part)) is not None]
    return _turned(found[0]) if found else 1


def _turned(data: bytes) -> int:
    from PIL.Image import Exif

    exif = Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is broken and reads the rest
            exif.load(data)
            turned = exif.get(ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, struct.error):
        return 1
    return turned if turned in range(1, 9) else 1


def without_metadata(content: bytes, mime_type: str) -> bytes:
    """The same file without EXIF, XMP, texts, times, thumbnails, and whatever follows the picture; pixels untouched.

    Raises:
        TooManyParts, BreaksOff: as `walk`.
    """
    file = io.BytesIO(content)
    parts = list(walk(file, mime_type))
    if mime_type == "image/jpeg":
        return b"".join([content[:2], *_jpeg_kept(content, parts), b"\xff\xd9"])
    if mime_type == "image/png":
        return content[:8] + b"".join(content[part.start : part.end] for part in parts if part.kind in PNG_KEPT)
    kept = b"".join(_webp_kept(content, parts))
    return b"RIFF" + struct.pack("<I", len(kept) + 4) + b"WEBP" + kept


def _exif(file: BinaryIO, mime_type: str, part: Part) -> bytes | None:
    """The part's EXIF data, if that is what it holds."""
    kind = {"image/jpeg": b"\xe1", "image/png": b"eXIf", "image/webp": b"EXIF"}[mime_type]
    if part.kind != kind:
        return None
    head, tail = {"image/jpeg": (4, 0), "image/png": (8, 4), "image/webp": (8, 0)}[mime_type]
    file.seek(part.start + head)
    data = file.read(part.end - part.start - head - tail)
    if mime_type == "image/jpeg" and not data.startswith(EXIF_HEAD):
        return None
    return data


def _jpeg_kept(content: bytes, parts: list[Part]) -> Iterator[bytes]:
    for part in parts:
        marker, data = part.kind[0], content[part.start : part.end]
        if marker == APP0 and data[4:9] == b"JFIF\0":
            yield b"\xff\xe0" + struct.pack(">H", JFIF_LENGTH) + data[4:16] + b"\0\0"
        elif not (APP0 <= marker <= APP15 or marker == COM) or _needed_for_colours(marker, data):
            yield data


def _needed_for_colours(marker: int, data: bytes) -> bool:
    return (marker == APP2 and data[4:16] == b"ICC_PROFILE\0") or (marker == APP14 and data[4:9] == b"Adobe")


def _webp_kept(content: bytes, parts: list[Part]) -> Iterator[bytes]:
    for part in parts:
        data = content[part.start : part.end]
        if part.kind == b"VP8X" and len(data) > 8:
            yield data[:8] + bytes([data[8] & ~WEBP_SAYS_METADATA]) + data[9:]
        elif part.kind in WEBP_KEPT:
            yield data
