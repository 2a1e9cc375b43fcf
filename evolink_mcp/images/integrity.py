"""Find damage inside an image: decode all pixels, and check that the decoder needs every byte of the data.

A PNG has checksums. The decoders of JPEG and WebP accept damaged data and return other pixels. So their data is decoded
again with two changes. Bytes after the end must change nothing: otherwise the data ended before the last pixel. Other
bytes in place of the last ones must change the image: otherwise the last pixel came before the end of the data.

Runs in the decoder process.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from hashlib import blake2b

from evolink_mcp.images.inspect import OpenImage, open_image
from evolink_mcp.images.structure import Part, parts_of
from evolink_mcp.images.unusable import Reason, UnusableImage

# The decoder has 300 MiB. Pillow needs 4 bytes for a pixel, and WebP the same again in its own buffer.
DECODED_MAX_PIXELS = 40_000_000
WEBP_DECODED_MAX_PIXELS = 20_000_000
STRIP_PIXELS = 1 << 20
BLOCK_BYTES = 1 << 20
# No byte is FF, which would begin a marker in a JPEG.
OTHER_BYTES = bytes(0x35 + (37 * number) % 0x95 for number in range(64))
# In shorter data the last bytes may hold only parts of the image that are cut off.
DATA_MIN_BYTES = 1024
BASELINE = frozenset([b"\xc0", b"\xc1"])
PROGRESSIVE = b"\xc2"
SCAN = b"\xda"


def check_pixels(opened: OpenImage) -> bytes:
    """Decode the image and return a hash of its pixels.

    A JPEG above the memory limit is decoded smaller. Another image above it is not decoded, and the hash is empty.

    Raises:
        UnusableImage: DAMAGED, or Pillow's error as a reason inside the `with` block of `open_image`.
    """
    image = opened.image
    mime_type = opened.facts.mime_type
    pixels = image.width * image.height
    if mime_type == "image/png":
        _check_png(opened.content)
    if pixels > (WEBP_DECODED_MAX_PIXELS if mime_type == "image/webp" else DECODED_MAX_PIXELS):
        if mime_type != "image/jpeg":
            return b""
        _shrink(opened)
    image.load()
    digest = blake2b()
    # A copy of all pixels beside the image would exceed 300 MiB.
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        digest.update(image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())
    return digest.digest()


def check_data(content: bytes, mime_type: str, pixels: bytes, max_pixels: int, max_side: int) -> None:
    """Check that the data of a JPEG or WebP ends with its last pixel. `pixels` is the result of `check_pixels`.

    Raises:
        UnusableImage: DAMAGED.
    """
    if not pixels or mime_type == "image/png":
        return
    parts = parts_of(content, mime_type)
    longer, other = _jpeg_variants(content, parts) if mime_type == "image/jpeg" else _webp_variants(content, parts)
    for variant, must_be_equal in ((longer, True), (other, False)):
        if variant is None:
            continue
        try:
            with open_image(variant, max_pixels, max_side) as opened:
                is_equal = check_pixels(opened) == pixels
        except UnusableImage as error:
            # A variant that was not decoded proves nothing.
            if error.reason is Reason.TOO_MUCH_MEMORY:
                return
            is_equal = False
        if is_equal != must_be_equal:
            raise UnusableImage(Reason.DAMAGED)


def _shrink(opened: OpenImage) -> None:
    """Let Pillow decode a JPEG at a half, a quarter or an eighth of its size. All data is read nevertheless."""
    image = opened.image
    divisor = 2
    while divisor < 8 and image.width * image.height > DECODED_MAX_PIXELS * divisor**2:
        divisor *= 2
    image.draft(image.mode, (image.width // divisor, image.height // divisor))


def _check_png(content: bytes) -> None:
    """Check every checksum of a PNG, and that its compressed data is complete.

    Raises:
        UnusableImage: DAMAGED.
    """
    view = memoryview(content)
    unpacker = zlib.decompressobj()
    try:
        for part in parts_of(content, "image/png"):
            (checksum,) = struct.unpack(">I", view[part.end - 4 : part.end])
            if zlib.crc32(view[part.start + 4 : part.end - 4]) != checksum:
                raise UnusableImage(Reason.DAMAGED)
            if part.kind == b"IDAT":
                data: bytes | memoryview = view[part.start + 8 : part.end - 4]
                # The output may have gigabytes, so it is made in blocks and discarded.
                while data and not unpacker.eof:
                    unpacker.decompress(data, BLOCK_BYTES)
                    data = unpacker.unconsumed_tail
    except (zlib.error, struct.error) as error:
        raise UnusableImage(Reason.DAMAGED) from error
    if not unpacker.eof:
        raise UnusableImage(Reason.DAMAGED)


def _jpeg_variants(content: bytes, parts: list[Part]) -> tuple[bytes | None, bytes | None]:
    """Return the JPEG with more bytes after each scan, and with other bytes at the end of its only scan."""
    kinds = {part.kind for part in parts}
    scans = [part for part in parts if part.kind == SCAN]
    is_baseline = bool(kinds & BASELINE)
    if not scans or not (is_baseline or PROGRESSIVE in kinds):  # arithmetic coding may omit bytes at the end
        return None, None
    longer = b"".join(_inserted(content, [part.end for part in scans], OTHER_BYTES))
    last = scans[-1]
    if not is_baseline or len(scans) > 1:
        return longer, None
    return longer, _with_other_end(content, last.start, last.end)


def _webp_variants(content: bytes, parts: list[Part]) -> tuple[bytes | None, bytes | None]:
    """Return the WebP with more bytes after its image data, and with other bytes at the end of the data."""
    part = next((part for part in parts if part.kind in (b"VP8 ", b"VP8L")), None)
    if part is None:  # an animation
        return None, None
    (length,) = struct.unpack("<I", content[part.start + 4 : part.start + 8])
    end = part.start + 8 + length
    added = OTHER_BYTES[: len(OTHER_BYTES) - length % 2]  # an even length needs no padding
    longer = b"".join(
        [
            content[:4],
            struct.pack("<I", len(content) - 8 + len(added) - (part.end - end)),
            content[8 : part.start + 4],
            struct.pack("<I", length + len(added)),
            content[part.start + 8 : end],
            added,
            content[part.end :],
        ]
    )
    return longer, _with_other_end(content, part.start, end)


def _inserted(content: bytes, positions: list[int], added: bytes) -> Iterator[bytes]:
    start = 0
    for position in positions:
        yield content[start:position]
        yield added
        start = position
    yield content[start:]


def _with_other_end(content: bytes, start: int, end: int) -> bytes | None:
    """Return the content with other bytes at the end of the data [start, end). None if that could change nothing."""
    tail = content[end - len(OTHER_BYTES) : end]
    # The end of a plain area can be one repeated byte, and other bytes there can mean the same pixels.
    if end - start < DATA_MIN_BYTES or len(set(tail)) < 8:
        return None
    return content[: end - len(OTHER_BYTES)] + OTHER_BYTES + content[end:]
