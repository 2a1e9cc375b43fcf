"""The parts of a picture file are counted before a decoder sees it: a small file can order hours of work.

An honest progressive JPEG has about ten scans, and no honest picture has thousands of segments or empty chunks.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

SCANS_MAX = 60
SEGMENTS_MAX = 2_000
CHUNKS_MAX = 20_000
FRAMES_MAX = 1_000
_BLOCK = 1 << 20
_END_OF_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # neither a stuffed byte, nor a restart, nor filling
_ALONE = frozenset([0x01, *range(0xD0, 0xD8)])  # markers without a length
SOI, EOI, SOS = 0xD8, 0xD9, 0xDA


class TooManyParts(ValueError):
    """The file has more parts than any honest picture."""


class BreaksOff(ValueError):
    """The file ends before the picture does."""


@dataclass(frozen=True, slots=True)
class Part:
    """A segment of a JPEG with the scan that follows it, or a chunk of a PNG or WebP: its bytes are [start, end).

    `kind` is the marker's number as one byte, or the chunk's four letters.
    """

    kind: bytes
    start: int
    end: int


def walk(file: BinaryIO, mime_type: str) -> Iterator[Part]:
    """The parts of the picture in `file`, in order, nothing decoded; linear in the size, constant in memory.

    Raises:
        TooManyParts, BreaksOff: it is no honest or no whole picture.
    """
    return {"image/jpeg": _jpeg, "image/png": _png, "image/webp": _webp}[mime_type](file)


def _jpeg(file: BinaryIO) -> Iterator[Part]:
    file.seek(2)
    scans = segments = 0
    while True:
        marker = _marker(file)
        if marker == EOI:
            return
        if marker in _ALONE:
            continue
        segments += 1
        start = file.tell() - 2
        length = file.read(2)
        if len(length) < 2:
            raise BreaksOff("the end is missing")
        file.seek(max(struct.unpack(">H", length)[0] - 2, 0), 1)
        if marker == SOS:
            scans += 1
            _skip_scan(file)
        if scans > SCANS_MAX or segments > SEGMENTS_MAX:
            raise TooManyParts(f"it has more than {SCANS_MAX} scans or {SEGMENTS_MAX} segments")
        end = file.tell()
        yield Part(bytes([marker]), start, end)
        file.seek(end)


def _marker(file: BinaryIO) -> int:
    byte = file.read(1)
    while byte == b"\xff":
        if (byte := file.read(1)) not in (b"\xff", b""):
            return byte[0]
    raise BreaksOff("the end is missing")


def _skip_scan(file: BinaryIO) -> None:
    """Go to the next marker after a scan's coded data."""
    start = file.tell()
    rest = b""
    while block := file.read(_BLOCK):
        data = rest + block
        if found := _END_OF_SCAN.search(data):
            file.seek(start + found.start())
            return
        start += len(data) - 1
        rest = data[-1:]
    raise BreaksOff("the end is missing")


def _png(file: BinaryIO) -> Iterator[Part]:
    end = 8
    for _ in range(CHUNKS_MAX):
        start = file.seek(end)
        head = file.read(8)
        if len(head) < 8:
            raise BreaksOff("the end is missing")
        end = start + 12 + struct.unpack(">I", head[:4])[0]
        yield Part(head[4:], start, end)
        if head[4:] == b"IEND":
            return
    raise TooManyParts(f"it has more than {CHUNKS_MAX} chunks")


def _webp(file: BinaryIO) -> Iterator[Part]:
    file.seek(4)
    whole = 8 + struct.unpack("<I", file.read(4))[0]
    end = 12
    for _ in range(FRAMES_MAX):
        if end >= whole:
            break
        start = file.seek(end)
        head = file.read(8)
        if len(head) < 8:
            raise BreaksOff("the end is missing")
        length = struct.unpack("<I", head[4:8])[0]
        end = start + 8 + length + length % 2
        yield Part(head[:4], start, end)
    else:
        raise TooManyParts(f"it has more than {FRAMES_MAX} chunks")
    if file.seek(0, 2) < whole:
        raise BreaksOff("the end is missing")
