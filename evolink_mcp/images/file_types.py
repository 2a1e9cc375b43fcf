"""Name the type of a file that is no PNG, JPEG or WebP by its first bytes, with the way to convert it."""

from __future__ import annotations

import re
from dataclasses import dataclass

# A page or a drawing may begin with comments, and the directory of a camera file with other entries.
HEAD_BYTES = 4096
_EXPORT = "Open it in its program and export it as PNG."
_SAVE_AS_PNG = "Save it as PNG in an image viewer."
_DEVELOP = "Export it as JPEG from the camera's program or a photo program."


@dataclass(frozen=True, slots=True)
class FileType:
    """A type of files: its name with an article, and the next step of the user."""

    name: str
    advice: str


@dataclass(frozen=True, slots=True)
class Signature:
    """The first bytes of a type, as a regular expression that must match at the start of the file."""

    pattern: re.Pattern[bytes]
    type: FileType


HEIC = FileType(
    "a HEIC image",
    "Export it as JPEG, or install the extra heic of evolink-mcp, which converts it. "
    "On an iPhone, Settings > Camera > Formats > Most Compatible takes JPEG photos.",
)


def _signature(pattern: bytes, name: str, advice: str) -> Signature:
    return Signature(re.compile(pattern, re.DOTALL), FileType(name, advice))


# The first match counts. Possessive groups keep the search linear for hostile files.
SIGNATURES = (
    _signature(rb"\Z", "an empty file", "The cloud service may not have downloaded it: open it once, then call again."),
    _signature(
        rb"\0+\Z",
        "a file of zero bytes only",
        "The cloud service may not have downloaded it: open it once, then call again.",
    ),
    _signature(rb"version https://git-lfs\.github\.com/spec/", "a Git LFS pointer", "Run git lfs pull, then call again."),
    # An AVIF file may have the brand mif1 too, so AVIF is before HEIC.
    _signature(rb"....ftyp.{0,60}?avi[fs]", "an AVIF image", _SAVE_AS_PNG),
    Signature(re.compile(rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL), HEIC),
    _signature(rb"....ftypcrx ", "a camera raw file (CR3)", _DEVELOP),
    _signature(rb"....ftyp", "a video", "Save one frame of it as PNG."),
    _signature(rb"GIF8[79]a", "a GIF image", _SAVE_AS_PNG),
    # Camera raw files begin like a TIFF, so they are before it.
    _signature(rb"II\*\0.{4}CR|II\*\0.*?\x12\xc6\x01\0\x04\0\0\0|MM\0\*.*?\xc6\x12\0\x01\0\0\0\x04|FUJIFILMCCD-RAW|IIU\0|IIR[OS]|MMOR",
        "a camera raw file", _DEVELOP),
    _signature(rb"II[*+]\0|MM\0[*+]", "a TIFF image or a camera raw file", _SAVE_AS_PNG),
    _signature(rb"8BP[SB]", "a Photoshop document", _EXPORT),
    _signature(rb"%PDF-", "a PDF document", "Export the page as PNG."),
    _signature(rb"%!PS", "a PostScript document", _EXPORT),
    _signature(rb"\0\0\x01\0", "an ICO icon", _SAVE_AS_PNG),
    _signature(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image", _SAVE_AS_PNG),
    _signature(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "a JPEG 2000 image", _SAVE_AS_PNG),
    _signature(rb"BM.{4}\0\0\0\0", "a BMP image", _SAVE_AS_PNG),
    _signature(
        rb"(\xef\xbb\xbf)?(?>\s+|<!--.*?-->)*+(?i:<(!doctype html|html|head|body)\b)",
        "a web page",
        "The link led to a page and not to the picture: save the picture itself.",
    ),
    _signature(rb"(\xef\xbb\xbf)?(?>\s+|<\?xml.*?\?>|<!--.*?-->|<!DOCTYPE svg.*?>)*+<svg\b", "an SVG drawing", _EXPORT),
    _signature(rb"\x1f\x8b|PK\x03\x04", "a compressed archive", "Unpack it and give the path of the picture."),
)  # fmt: skip


def foreign_type(head: bytes) -> FileType | None:
    """Return the type of a file with these first HEAD_BYTES bytes. None: unknown, or one of the accepted types."""
    return next((signature.type for signature in SIGNATURES if signature.pattern.match(head)), None)
