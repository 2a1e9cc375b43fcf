"""The messages between the server and its decoder process: fixed binary records with length limits.

Server to decoder: one request record, its options and the file. Decoder to server: one answer record and the payload.
After the answer to DERIVE one record and one file follow for each output. The server checks every field of an answer,
because a hostile image may control the decoder.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from evolink_mcp.api.targets import MIME_TYPES, TARGET_MAX_EDGE
from evolink_mcp.images.derive import QUALITY_MAX, DerivedImage, DerivePlan, Output
from evolink_mcp.images.inspect import SUFFIX_OF, Alpha, ImageFacts
from evolink_mcp.images.unusable import Reason, UnusableImage

# The longest file of an image. `download` and derive_image accept no longer one.
CONTENT_MAX_BYTES = 100 << 20
# A process ends after this many images, so that memory which a library does not release stays limited.
IMAGES_PER_PROCESS = 100
CPU_PER_IMAGE_S = 15.0
# A rotated reference image is encoded again, which can make it larger.
PAYLOAD_MAX_BYTES = 128 << 20
SIDE_MAX = 1 << 20
OPTIONS_MAX_BYTES = 256 << 10
GREETING = struct.Struct("<4sB")
GREETING_MAGIC = b"EVG1"
HEIC_ARGUMENT = "heic"
_REQUEST = struct.Struct("<4sBBIIIQ")
_REQUEST_MAGIC = b"EVR1"
_ANSWER = struct.Struct("<4sBBBIIdBBQ")
_ANSWER_MAGIC = b"EVA1"
_DERIVED = struct.Struct("<4sBBBBIIQQ")
_DERIVED_MAGIC = b"EVD1"
REQUEST_BYTES = _REQUEST.size
ANSWER_BYTES = _ANSWER.size
DERIVED_BYTES = _DERIVED.size
_IS_ENLARGED = 1
_HAS_LOST_ALPHA = 2
_HAS_LOST_PROFILE = 4
_MIME_TYPES = tuple(SUFFIX_OF)
_DERIVED_TYPES = tuple(MIME_TYPES.values())
_IS_USABLE = 0
_HAS_ALPHA = 1
_IS_UPRIGHT = 2
_IS_ONE_COLOUR = 4
_HAS_MEASURED_ALPHA = 8
_HAS_FACTS = 16
_HAS_PAYLOAD = 32


class Operation(IntEnum):
    """One kind of work for the decoder."""

    CHECK = 1  #: Decode a delivered image; answer its facts and, if `edge` is set, a preview
    PREVIEW = 2  #: Make a small copy of a saved image
    CHECK_REFERENCE = 3  #: Decode a reference image completely; for a mask, also measure its transparency
    NORMALIZE = 4  #: Make the copy of a reference image that is uploaded
    DERIVE = 5  #: Make files of exact size; the options are a DerivePlan
    CONVERT_HEIC = 6  #: Make a JPEG or PNG of a HEIC photo


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """Work for the decoder. `edge` is in pixels; `budget`, `content_bytes` and `options_bytes` are in bytes."""

    operation: Operation
    content_bytes: int
    edge: int = 0
    budget: int = 0
    is_mask: bool = False
    options_bytes: int = 0

    def pack(self) -> bytes:
        """Return the record; the options and the content follow it."""
        return _REQUEST.pack(
            _REQUEST_MAGIC,
            self.operation,
            self.is_mask,
            self.edge,
            self.budget,
            self.options_bytes,
            self.content_bytes,
        )

    @classmethod
    def unpack(cls, record: bytes) -> DecodeRequest:
        """Read a record.

        Raises:
            ValueError: it is not a valid request.
        """
        try:
            magic, operation, is_mask, edge, budget, options_bytes, content_bytes = _REQUEST.unpack(record)
        except struct.error as error:
            raise ValueError("a request of the wrong length") from error
        if magic != _REQUEST_MAGIC or content_bytes > CONTENT_MAX_BYTES or options_bytes > OPTIONS_MAX_BYTES:
            raise ValueError("an invalid request")
        return cls(Operation(operation), content_bytes, edge, budget, bool(is_mask), options_bytes)


@dataclass(frozen=True, slots=True)
class DecodeAnswer:
    """The result of a request: facts, and the bytes of a preview or of a normalized image.

    `derived` has each file of DERIVE with its length in bytes.
    """

    facts: ImageFacts | None = None
    payload: bytes | None = None
    derived: tuple[tuple[DerivedImage, int], ...] = ()

    def pack(self) -> bytes:
        """Return the record; the payload follows it."""
        facts = self.facts
        flags = 0
        if self.payload is not None:
            flags |= _HAS_PAYLOAD
        if facts is None:
            return _ANSWER.pack(_ANSWER_MAGIC, _IS_USABLE, 0, flags, 0, 0, 0.0, 0, 0, len(self.payload or b""))
        flags |= _HAS_FACTS
        flags |= _HAS_ALPHA if facts.has_alpha else 0
        flags |= _IS_UPRIGHT if facts.is_upright else 0
        flags |= _IS_ONE_COLOUR if facts.is_one_colour else 0
        flags |= _HAS_MEASURED_ALPHA if facts.alpha is not None else 0
        alpha = facts.alpha or Alpha(0.0, 0, 0)
        return _ANSWER.pack(
            _ANSWER_MAGIC,
            _IS_USABLE,
            _MIME_TYPES.index(facts.mime_type),
            flags,
            facts.width,
            facts.height,
            alpha.transparent_share,
            alpha.lowest,
            alpha.highest,
            len(self.payload or b""),
        )


def pack_refusal(error: UnusableImage) -> bytes:
    """Return the record of an answer to a file that cannot be used."""
    width, height = error.size or (0, 0)
    return _ANSWER.pack(_ANSWER_MAGIC, error.reason, 0, 0, min(width, 2**32 - 1), min(height, 2**32 - 1), 0.0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """A checked answer record: facts, whether a payload follows, and its length in bytes."""

    facts: ImageFacts | None
    has_payload: bool
    payload_bytes: int


def unpack_answer(record: bytes, payload_max_bytes: int) -> AnswerHead:
    """Read and check an answer record.

    Raises:
        UnusableImage: the decoder refused the file, or the record is invalid (DECODER_FAILED).
    """
    try:
        magic, reason, mime_index, flags, width, height, share, lowest, highest, payload_bytes = _ANSWER.unpack(record)
    except struct.error as error:
        raise UnusableImage(Reason.DECODER_FAILED) from error
    if magic != _ANSWER_MAGIC or payload_bytes > payload_max_bytes:
        raise UnusableImage(Reason.DECODER_FAILED)
    if reason != _IS_USABLE:
        is_known = reason in Reason.__members__.values()
        size = (width, height) if width and height else None
        raise UnusableImage(Reason(reason) if is_known else Reason.DECODER_FAILED, size if is_known else None)
    facts = _facts(mime_index, flags, width, height, Alpha(share, lowest, highest)) if flags & _HAS_FACTS else None
    return AnswerHead(facts, bool(flags & _HAS_PAYLOAD), payload_bytes)


def _facts(mime_index: int, flags: int, width: int, height: int, alpha: Alpha) -> ImageFacts:
    is_valid = (
        mime_index < len(_MIME_TYPES)
        and 0 < width <= SIDE_MAX
        and 0 < height <= SIDE_MAX
        and math.isfinite(alpha.transparent_share)
        and 0 <= alpha.transparent_share <= 1
        and alpha.lowest <= alpha.highest
    )
    if not is_valid:
        raise UnusableImage(Reason.DECODER_FAILED)
    return ImageFacts(
        _MIME_TYPES[mime_index],
        width,
        height,
        has_alpha=bool(flags & _HAS_ALPHA),
        is_upright=bool(flags & _IS_UPRIGHT),
        alpha=alpha if flags & _HAS_MEASURED_ALPHA else None,
        is_one_colour=bool(flags & _IS_ONE_COLOUR),
    )


def pack_derived(image: DerivedImage, payload_bytes: int) -> bytes:
    """Return the record of one output; its file follows."""
    flags = _IS_ENLARGED if image.is_enlarged else 0
    flags |= _HAS_LOST_ALPHA if image.has_lost_alpha else 0
    flags |= _HAS_LOST_PROFILE if image.has_lost_profile else 0
    return _DERIVED.pack(
        _DERIVED_MAGIC,
        image.reason or _IS_USABLE,
        _DERIVED_TYPES.index(image.mime_type),
        flags,
        image.quality,
        image.width,
        image.height,
        image.smallest_bytes,
        payload_bytes,
    )


def unpack_derived(record: bytes, output: Output, plan: DerivePlan) -> tuple[DerivedImage, int]:
    """Read and check the record of one output. Return its facts and the length of its file in bytes.

    Raises:
        UnusableImage: the record is invalid (DECODER_FAILED).
    """
    try:
        fields: tuple[Any, ...] = _DERIVED.unpack(record)
    except struct.error as error:
        raise UnusableImage(Reason.DECODER_FAILED) from error
    magic, reason, mime_index, flags, quality, width, height, smallest_bytes, count = fields
    is_refused = reason in Reason.__members__.values()
    # `contain` may be smaller than its target in one edge. Everything else is exact.
    has_size = is_refused or _has_size((width, height), max(output.sizes), is_exact=plan.fit != "contain")
    has_type = mime_index == _DERIVED_TYPES.index(output.mime_type)
    has_length = is_refused == (count == 0) and count <= min(plan.max_bytes or PAYLOAD_MAX_BYTES, PAYLOAD_MAX_BYTES)
    is_known = magic == _DERIVED_MAGIC and (is_refused or reason == _IS_USABLE) and quality <= QUALITY_MAX
    if not (is_known and has_size and has_type and has_length and max(width, height) <= TARGET_MAX_EDGE):
        raise UnusableImage(Reason.DECODER_FAILED)
    image = DerivedImage(
        output.mime_type,
        width,
        height,
        quality,
        is_enlarged=bool(flags & _IS_ENLARGED),
        has_lost_alpha=bool(flags & _HAS_LOST_ALPHA),
        has_lost_profile=bool(flags & _HAS_LOST_PROFILE),
        smallest_bytes=smallest_bytes,
        reason=Reason(reason) if is_refused else None,
    )
    return image, count


def _has_size(size: tuple[int, int], target: tuple[int, int], *, is_exact: bool) -> bool:
    return size == target if is_exact else 0 < size[0] <= target[0] and 0 < size[1] <= target[1]
