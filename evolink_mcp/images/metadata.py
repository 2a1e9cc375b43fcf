"""Read the EXIF orientation of an image file, and remove all metadata without touching a pixel."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator

from evolink_mcp.images.structure import Part

ORIENTATION = 0x0112  # EXIF tag: 1 is upright, 2 to 4 are rotated or mirrored, 5 to 8 also swap width and height
EXIF_HEAD = b"Exif\0\0"
# A JPEG segment has 64 KiB. Pillow copies the value of each entry, so its time grows with the square of this size.
EXIF_MAX_BYTES = 64 << 10
# The chunks that a decoder needs for pixels and colours. PNG: https://www.w3.org/TR/png-3/#11Chunks
PNG_KEPT = frozenset(b"IHDR PLTE IDAT IEND tRNS cHRM gAMA iCCP sBIT sRGB cICP mDCV cLLI bKGD pHYs".split())
WEBP_KEPT = frozenset([b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP"])
WEBP_METADATA_FLAGS = 0x0C  # of VP8X: the file has EXIF and XMP
APP0, APP2, APP14, APP15, COM = 0xE0, 0xE2, 0xEE, 0xEF, 0xFE
JFIF_LENGTH = 16  # of APP0 without the thumbnail that may follow


def orientation(content: bytes, mime_type: str, parts: list[Part]) -> int:
    """Return the EXIF orientation: 1 (upright) to 8. Only the first EXIF block counts."""
    blocks = (_exif(content, mime_type, part) for part in parts)
    block = next((block for block in blocks if block is not None), None)
    return 1 if block is None else _orientation_in(block)


def _orientation_in(block: bytes) -> int:
    from PIL.Image import Exif

    exif = Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about a broken entry and reads the others
            exif.load(block)
            value = exif.get(ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, struct.error):
        return 1
    return value if value in range(1, 9) else 1


def without_metadata(content: bytes, mime_type: str, parts: list[Part]) -> bytes:
    """Return the file without EXIF, XMP, texts, times, thumbnails and trailing bytes. Every pixel stays as it is."""
    if mime_type == "image/jpeg":
        return b"".join([content[:2], *_jpeg_kept(content, parts), b"\xff\xd9"])
    if mime_type == "image/png":
        return b"".join([content[:8], *_png_kept(content, parts)])
    chunks = b"".join(_webp_kept(content, parts))
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks


def _exif(content: bytes, mime_type: str, part: Part) -> bytes | None:
    """Return the first bytes of the EXIF block of a part, or None for another part."""
    kind = {"image/jpeg": b"\xe1", "image/png": b"eXIf", "image/webp": b"EXIF"}[mime_type]
    if part.kind != kind:
        return None
    head, tail = {"image/jpeg": (4, 0), "image/png": (8, 4), "image/webp": (8, 0)}[mime_type]
    start = part.start + head
    block = content[start : min(part.end - tail, start + EXIF_MAX_BYTES)]
    if mime_type == "image/jpeg" and not block.startswith(EXIF_HEAD):
        return None
    return block


def _jpeg_kept(content: bytes, parts: list[Part]) -> Iterator[bytes | memoryview]:
    view = memoryview(content)
    for part in parts:
        marker = part.kind[0]
        head = content[part.start : part.start + 16]
        if marker == APP0 and head[4:9] == b"JFIF\0":
            yield b"\xff\xe0" + struct.pack(">H", JFIF_LENGTH) + head[4:16] + b"\0\0"
        elif not (APP0 <= marker <= APP15 or marker == COM) or _is_colour(marker, head):
            yield view[part.start : part.end]


def _is_colour(marker: int, head: bytes) -> bool:
    """Return whether a segment with these first bytes changes the colours."""
    return (marker == APP2 and head[4:16] == b"ICC_PROFILE\0") or (marker == APP14 and head[4:9] == b"Adobe")


def _png_kept(content: bytes, parts: list[Part]) -> Iterator[memoryview]:
    view = memoryview(content)
    kinds: set[bytes] = set()
    for part in parts:
        # Apart from IDAT, each of these chunks may occur once. A decoder would unpack each copy of a profile.
        if part.kind in PNG_KEPT and (part.kind == b"IDAT" or part.kind not in kinds):
            kinds.add(part.kind)
            yield view[part.start : part.end]


def _webp_kept(content: bytes, parts: list[Part]) -> Iterator[bytes | memoryview]:
    view = memoryview(content)
    for part in parts:
        if part.kind == b"VP8X" and part.end - part.start > 8:
            chunk = content[part.start : part.end]
            yield chunk[:8] + bytes([chunk[8] & ~WEBP_METADATA_FLAGS]) + chunk[9:]
        elif part.kind in WEBP_KEPT:
            yield view[part.start : part.end]
