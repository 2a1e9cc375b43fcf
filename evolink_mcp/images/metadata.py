"""Read the EXIF orientation of an image file, and remove or add metadata without touching a pixel."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from unicodedata import category

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
APP1, APP11 = 0xE1, 0xEB
XMP_HEAD = b"http://ns.adobe.com/xap/1.0/\0"
# A JPEG segment has at most 65,533 bytes.
XMP_PROMPT_MAX_BYTES = 60_000
WEBP_XMP_FLAG, WEBP_ALPHA_FLAG = 0x04, 0x10
_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmp="http://ns.adobe.com/xap/1.0/" dc:source="{task}" '
    'xmp:CreatorTool="{tool}"><dc:description><rdf:Alt><rdf:li xml:lang="x-default">{prompt}</rdf:li></rdf:Alt>'
    '</dc:description></rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of an image: its prompt, EvoLink's task ID and the model."""

    prompt: str
    task_id: str
    model: str


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
        # Pillow raises all of these for broken EXIF data.
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


def with_origin(content: bytes, mime_type: str, parts: list[Part], origin: Origin) -> bytes | None:
    """Return the file with its origin: iTXt chunks in a PNG, XMP in a JPEG or WebP. All other bytes stay as they are.

    None: the file has XMP of another program, or content credentials (C2PA). A change would break their signature.
    """
    if any(_forbids_origin(content, mime_type, part) for part in parts):
        return None
    insert = {"image/png": _png_with, "image/jpeg": _jpeg_with, "image/webp": _webp_with}[mime_type]
    return insert(content, parts, origin)


def _forbids_origin(content: bytes, mime_type: str, part: Part) -> bool:
    # Content credentials are in the chunk caBX of a PNG, and in JUMBF segments (APP11) of a JPEG.
    head = content[part.start : part.start + 40]
    if mime_type == "image/png":
        return part.kind == b"caBX"
    if mime_type == "image/webp":
        return part.kind in (b"C2PA", b"XMP ")
    marker = part.kind[0]
    return (marker == APP11 and head[4:6] == b"JP") or (marker == APP1 and head[4:].startswith(XMP_HEAD))


def _xmp(origin: Origin) -> bytes:
    prompt = _xml(origin.prompt).encode()[:XMP_PROMPT_MAX_BYTES].decode(errors="ignore")
    prompt = prompt[: prompt.rfind("&")] if prompt.rfind("&") > prompt.rfind(";") else prompt  # no half entity
    return _XMP.format(task=_xml(origin.task_id), tool=_xml(f"evolink-mcp, {origin.model}"), prompt=prompt).encode()


def _xml(text: str) -> str:
    """Return the text for XML, without characters that XML cannot have."""
    return escape("".join(char for char in text if char in "\t\n" or category(char) not in ("Cc", "Cs", "Cn")))


def _png_with(content: bytes, parts: list[Part], origin: Origin) -> bytes:
    texts = {"Description": origin.prompt, "Source": f"EvoLink {origin.task_id}", "Software": origin.model}
    chunks: list[bytes] = []
    for keyword, text in texts.items():
        data = b"iTXt" + keyword.encode() + b"\0\0\0\0\0" + text.replace("\0", "").encode("utf-8", "replace")
        chunks.append(struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data)))
    end = parts[0].end  # of IHDR
    return b"".join([content[:end], *chunks, content[end:]])


def _jpeg_with(content: bytes, parts: list[Part], origin: Origin) -> bytes:
    data = XMP_HEAD + _xmp(origin)
    # JFIF and EXIF must come first.
    leading = [part.end for part in parts if part.kind[0] in (APP0, APP1)]
    end = max(leading, default=2)
    return b"".join([content[:end], b"\xff\xe1", struct.pack(">H", len(data) + 2), data, content[end:]])


def _webp_with(content: bytes, parts: list[Part], origin: Origin) -> bytes:
    data = _xmp(origin)
    # RIFF pads a chunk to an even length.
    xmp = b"XMP " + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    first = parts[0]
    end = parts[-1].end
    if first.kind == b"VP8X":
        flags = content[first.start + 8] | WEBP_XMP_FLAG
        body = content[first.start : first.start + 8] + bytes([flags]) + content[first.start + 9 : end]
    else:
        body = _extended_head(content, first) + content[first.start : end]
    body += xmp
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _extended_head(content: bytes, first: Part) -> bytes:
    """Return the chunk VP8X for a WebP without one. A file with more than pixels needs it."""
    data = content[first.start + 8 : first.start + 18]
    flags = WEBP_XMP_FLAG
    if first.kind == b"VP8L":
        bits = struct.unpack("<I", data[1:5])[0]
        width = (bits & 0x3FFF) + 1
        height = (bits >> 14 & 0x3FFF) + 1
        flags |= WEBP_ALPHA_FLAG if bits >> 28 & 1 else 0
    else:
        width, height = (edge & 0x3FFF for edge in struct.unpack("<HH", data[6:10]))
    edges = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"VP8X" + struct.pack("<I", 10) + bytes([flags, 0, 0, 0]) + edges
