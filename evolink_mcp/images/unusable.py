"""Reasons why a file cannot be used as an image."""

from __future__ import annotations

from enum import IntEnum


class Reason(IntEnum):
    """Why a file cannot be used. The decoder process sends this number; the server builds the text."""

    NOT_AN_IMAGE = 1  #: No magic bytes of PNG, JPEG or WebP
    DAMAGED = 2  #: The decoder rejected the bytes
    INCOMPLETE = 3  #: The file ends before the image does
    TOO_LARGE = 4  #: More pixels than the limit
    TOO_MANY_PARTS = 5  #: More scans, segments, chunks or fill bytes than the limit
    TOO_MUCH_MEMORY = 6  #: The decoder reached its memory limit
    TOO_MUCH_TIME = 7  #: The decoder reached its CPU limit
    DECODER_FAILED = 8  #: The decoder process ended or sent an invalid answer
    DECODER_LATE = 9  #: The deadline passed, but not by the decoder's own CPU time
    ROTATED_TOO_LARGE = 10  #: The metadata rotate an image that is too large to rotate here
    MASK_TOO_LARGE = 11  #: The mask has more pixels than the decoder's memory holds
    TOO_MANY_BYTES = 12  #: The file is larger than EvoLink accepts
    CHANGED = 13  #: The content changed between two reads
    ABOVE_MAX_BYTES = 14  #: No quality makes the derived file short enough
    HEIC_TOO_LARGE = 15  #: The HEIC photo has more pixels than the memory of its decoder holds


_TEXTS = {
    Reason.NOT_AN_IMAGE: "it is not a PNG, JPEG or WebP image",
    Reason.DAMAGED: "it is damaged or incomplete",
    Reason.INCOMPLETE: "it is damaged or incomplete: the end is missing",
    Reason.TOO_LARGE: "it is too large",
    Reason.TOO_MANY_PARTS: "it has more scans, segments, chunks or fill bytes than a real image needs",
    Reason.TOO_MUCH_MEMORY: "decoding it needs too much memory",
    Reason.TOO_MUCH_TIME: "decoding it takes too much CPU time",
    Reason.DECODER_FAILED: "the decoder failed on it",
    Reason.DECODER_LATE: "the decoder did not finish in time",
    Reason.ROTATED_TOO_LARGE: "its metadata rotate it, and it is too large to rotate here: save it upright",
    Reason.MASK_TOO_LARGE: "a mask may have at most 50 megapixels",
    Reason.TOO_MANY_BYTES: "it has more than 50 MB",
    Reason.CHANGED: "it changed while the server read it",
    Reason.HEIC_TOO_LARGE: "a HEIC photo may have at most 25 megapixels: export it as JPEG",
    Reason.ABOVE_MAX_BYTES: "it has more bytes than max_bytes in every quality",
}
_HOSTILE = frozenset(
    [
        Reason.TOO_LARGE,
        Reason.TOO_MANY_PARTS,
        Reason.TOO_MUCH_MEMORY,
        Reason.TOO_MUCH_TIME,
        Reason.DECODER_FAILED,
    ]
)


class UnusableImage(ValueError):
    """A file cannot be used as an image. `size` is width and height in pixels for TOO_LARGE, else None."""

    def __init__(self, reason: Reason, size: tuple[int, int] | None = None) -> None:
        text = _TEXTS[reason]
        super().__init__(text if size is None else f"{text}: {size[0]}×{size[1]} pixels")
        self.reason = reason
        self.size = size

    @property
    def is_hostile(self) -> bool:
        """Whether a second attempt would cost the same work and fail again."""
        return self.reason in _HOSTILE
