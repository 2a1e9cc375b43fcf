"""Split an image file into segments or chunks, and refuse a file that would cost the decoder too much work.

All functions take the complete file as bytes. They run in linear time and decode nothing.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from evolink_mcp.images.unusable import Reason, UnusableImage

# A progressive JPEG of mozjpeg has about 12 scans. Each scan costs the decoder one pass over all pixels.
SCANS_MAX = 30
SEGMENTS_MAX = 2_000
# Quantization and Huffman tables: an optimized progressive JPEG has 1 KiB per scan.
TABLE_BYTES_MAX = 64 << 10
# Bytes FF before a marker. Encoders use a few for alignment.
FILL_BYTES_MAX = 64 << 10
CHUNKS_MAX = 20_000
# Chunks of a PNG that hold no pixels, for example text and colour profiles.
OTHER_CHUNKS_MAX = 256
FRAMES_MAX = 1_000
# A marker with the fill bytes before it. Possessive: no second attempt for the same bytes.
_MARKER = re.compile(rb"\xff++([^\xff])")
_END_OF_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # not a stuffed byte, a restart marker or a fill byte
_STANDALONE = frozenset([0x01, *range(0xD0, 0xD8)])  # markers without a length
_TABLES = frozenset([0xC4, 0xCC, 0xDB, 0xDD])  # DHT, DAC, DQT, DRI
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_PNG_PIXELS = frozenset([b"IDAT", b"fdAT", b"fcTL"])


@dataclass(frozen=True, slots=True)
class Part:
    """A JPEG segment with the scan that follows it, or a chunk of a PNG or WebP: the bytes [start, end) of the file.

    `kind` is the number of the marker as one byte, or the four letters of the chunk.
    """

    kind: bytes
    start: int
    end: int


def parts_of(content: bytes, mime_type: str) -> list[Part]:
    """Return all parts of the image in order.

    Raises:
        UnusableImage: INCOMPLETE, DAMAGED or TOO_MANY_PARTS.
    """
    split = {"image/jpeg": _jpeg, "image/png": _png, "image/webp": _webp}[mime_type]
    return list(split(content))


def _jpeg(content: bytes) -> Iterator[Part]:
    position = 2
    scans = segments = fill_bytes = table_bytes = 0
    while True:
        marker = _MARKER.match(content, position)
        if marker is None:
            raise UnusableImage(Reason.INCOMPLETE if _is_fill(content, position) else Reason.DAMAGED)
        number = marker[1][0]
        fill_bytes += marker.end() - position - 2
        segments += 1
        if fill_bytes > FILL_BYTES_MAX or segments > SEGMENTS_MAX:
            raise UnusableImage(Reason.TOO_MANY_PARTS)
        if number == _EOI:
            return
        if number in (0, _SOI):
            raise UnusableImage(Reason.DAMAGED)
        position = marker.end()
        if number in _STANDALONE:
            continue
        length = content[position : position + 2]
        if len(length) < 2:
            raise UnusableImage(Reason.INCOMPLETE)
        start = position - 2
        position += max(struct.unpack(">H", length)[0], 2)
        if number in _TABLES:
            table_bytes += position - start
        if number == _SOS:
            scans += 1
            end_of_scan = _END_OF_SCAN.search(content, position)
            if end_of_scan is None:
                raise UnusableImage(Reason.INCOMPLETE)
            position = end_of_scan.start()
        if scans > SCANS_MAX or table_bytes > TABLE_BYTES_MAX:
            raise UnusableImage(Reason.TOO_MANY_PARTS)
        yield Part(bytes([number]), start, position)


def _is_fill(content: bytes, position: int) -> bool:
    """Return whether only fill bytes follow."""
    return not content[position:].strip(b"\xff")


def _png(content: bytes) -> Iterator[Part]:
    end = 8
    others = 0
    for _ in range(CHUNKS_MAX):
        start = end
        head = content[start : start + 8]
        if len(head) < 8:
            raise UnusableImage(Reason.INCOMPLETE)
        kind = head[4:]
        end = start + 12 + struct.unpack(">I", head[:4])[0]
        others += kind not in _PNG_PIXELS
        if others > OTHER_CHUNKS_MAX:
            raise UnusableImage(Reason.TOO_MANY_PARTS)
        yield Part(kind, start, end)
        if kind == b"IEND":
            return
    raise UnusableImage(Reason.TOO_MANY_PARTS)


def _webp(content: bytes) -> Iterator[Part]:
    if len(content) < 12:
        raise UnusableImage(Reason.INCOMPLETE)
    file_end = 8 + struct.unpack("<I", content[4:8])[0]
    if len(content) < file_end:
        raise UnusableImage(Reason.INCOMPLETE)
    end = 12
    for _ in range(FRAMES_MAX):
        if end >= file_end:
            return
        start = end
        head = content[start : start + 8]
        if len(head) < 8:
            raise UnusableImage(Reason.INCOMPLETE)
        length = struct.unpack("<I", head[4:])[0]
        end = start + 8 + length + length % 2
        yield Part(head[:4], start, end)
    raise UnusableImage(Reason.TOO_MANY_PARTS)
