"""Bytes become a picture on disk, whole or not at all; a picture becomes a preview within a byte budget."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, TypeVar

import anyio.to_thread

from evolink_mcp.api.sizes import MAX_PIXELS
from evolink_mcp.errors import DownloadFailed, FolderRefused
from evolink_mcp.pictures.folders import PICTURE_SUFFIXES, open_plain

if TYPE_CHECKING:
    from PIL.Image import Image

MAGIC: tuple[tuple[bytes, int, str, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", 0, "image/png", ".png"),
    (b"\xff\xd8\xff", 0, "image/jpeg", ".jpg"),
    (b"WEBP", 8, "image/webp", ".webp"),
)
FORMATS = ("PNG", "JPEG", "WEBP")
# (longest edge, WebP quality): the first that fits the budget is taken.
LADDER = ((1.0, 80), (0.75, 60), (0.5, 50), (0.25, 40))
# Halve by averaging before resampling where more than 1.5 times the target is left: half the time, and no one sees it.
REDUCING_GAP = 1.5
PART = (".evolink-", ".part")
PART_LIVES_S = 3600
_SWEPT: set[Path] = set()
T = TypeVar("T")
_ONE_WORKER: list[anyio.CapacityLimiter] = []


@dataclass(frozen=True, slots=True)
class Kept:
    """A picture on disk: type by its bytes, size in pixels, content hash."""

    path: Path
    mime_type: str
    width: int
    height: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What a picture's bytes say of themselves."""

    mime_type: str
    suffix: str
    width: int
    height: int
    has_alpha: bool


class NotAPicture(ValueError):
    """The bytes are not a whole PNG, JPEG or WebP picture within the limits."""


def sniff(head: bytes) -> tuple[str, str] | None:
    """(MIME type, suffix) by magic bytes; None for anything but PNG, JPEG and WebP."""
    for magic, offset, mime_type, suffix in MAGIC:
        if head[offset : offset + len(magic)] == magic and (offset == 0 or head[:4] == b"RIFF"):
            return mime_type, suffix
    return None


def examine(file: BinaryIO, *, max_pixels: int = MAX_PIXELS, max_side: int = MAX_PIXELS, whole: bool = True) -> Facts:
    """Type and size of the picture in `file`; with `whole`, every pixel is decoded once. Blocks: run it in a thread.

    Raises:
        NotAPicture: not one of the three types, too large, or damaged.
    """
    known = sniff(file.read(16))
    if known is None:
        raise NotAPicture("it is not a PNG, JPEG or WebP picture")
    file.seek(0)
    with _opened(file, max_pixels, max_side) as image:
        if whole:
            image.load()
        return Facts(*known, image.width, image.height, image.has_transparency_data)


@contextmanager
def _opened(file: BinaryIO, max_pixels: int = MAX_PIXELS, max_side: int = MAX_PIXELS) -> Iterator[Image]:
    """The picture in `file`, not decoded yet: the one border to Pillow, which has many names for a damaged file."""
    from PIL import Image as pil

    pil.MAX_IMAGE_PIXELS = None  # judged here, before anything is decoded
    try:
        with pil.open(file, formats=FORMATS) as image:
            if image.width * image.height > max_pixels or max(image.size) > max_side:
                raise NotAPicture(f"it is too large: {image.width}×{image.height} pixels")
            yield image
    except NotAPicture:
        raise
    except (OSError, SyntaxError, EOFError, ValueError, IndexError, struct.error) as error:
        raise NotAPicture("it is damaged or incomplete") from error


async def in_picture_thread(call: Callable[[], T]) -> T:
    """Run picture work in the one worker thread that is kept for it, so that the event loop never stalls."""
    if not _ONE_WORKER:
        _ONE_WORKER.append(anyio.CapacityLimiter(1))
    return await anyio.to_thread.run_sync(call, limiter=_ONE_WORKER[0])


async def keep(fetch: Callable[[BinaryIO], Awaitable[int]], target: Path) -> Kept:
    """Fetch a picture into `target`'s folder under its stem and true suffix; never overwrites: -1, -2 …

    Raises:
        FolderRefused: the folder cannot be made or written.
        DownloadFailed: what came is not a whole picture.
    """
    try:
        make_folder(target.parent)
        handle, name = tempfile.mkstemp(prefix=PART[0], suffix=PART[1], dir=target.parent)
    except OSError as error:
        raise _unwritable(target.parent, error) from error
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            await fetch(file)
        return await in_picture_thread(partial(_settle, part, target))
    except NotAPicture as error:
        raise DownloadFailed(f"what EvoLink sent is not usable: {error}") from error
    except OSError as error:
        raise _unwritable(target.parent, error) from error
    finally:
        with suppress(OSError):
            part.unlink()


def _settle(part: Path, target: Path) -> Kept:
    """Check the whole file, make it durable, and give it the first free name."""
    _sweep(target.parent)
    with part.open("rb") as file:
        facts = examine(file)
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    size = part.stat().st_size
    number = 0
    while True:
        stem = target.stem if target.suffix.lower() in PICTURE_SUFFIXES else target.name
        path = target.with_name(f"{stem}{f'-{number}' if number else ''}{facts.suffix}")
        if place(part, path) or _same(path, size, digest):
            break
        number += 1
    _sync_folder(target.parent)
    return Kept(path.resolve(), facts.mime_type, facts.width, facts.height, size, digest)


def _sweep(folder: Path) -> None:
    """Once in a server's life, remove what an earlier one left when it was killed: nothing is written for so long."""
    if folder in _SWEPT:
        return
    _SWEPT.add(folder)
    with suppress(OSError):
        for old in folder.glob("*".join(PART)):
            if time.time() - old.lstat().st_mtime > PART_LIVES_S:
                old.unlink()


def make_folder(folder: Path) -> None:
    """Make `folder` and what is missing above it, for this user only (`mkdir` restricts nothing but the last)."""
    for missing in reversed([place for place in (folder, *folder.parents) if not place.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)


def place(part: Path, path: Path) -> bool:
    """Move `part` to `path` unless something is there: a link where the file system has them, else a claim."""
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return False
        try:
            os.replace(part, path)
        except OSError:
            path.unlink()
            raise
    return True


def _same(path: Path, size: int, digest: str) -> bool:
    """Whether this very picture lies there already, from a run whose journal was lost."""
    try:
        if path.is_symlink() or path.stat().st_size != size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
    except OSError:
        return False


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every system can open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _unwritable(folder: Path, error: OSError) -> FolderRefused:
    return FolderRefused(
        f"the folder {folder} cannot be written ({error.strerror or type(error).__name__})",
        charged="yes",
        advice="Make it writable or set EVOLINK_MCP_OUTPUT_DIR, then call get_task: the picture is kept at EvoLink for 24 h.",
    )


def preview(path: Path, edge: int, budget: int, kind: Literal["webp", "png"] = "webp") -> bytes | None:
    """A small WebP of the picture at `path`, longest edge ≤ `edge` pixels, ≤ `budget` bytes, no metadata.

    None where no step of the ladder fits. Blocks: run it in a thread.

    Raises:
        NotAPicture: too large, damaged, or not a picture (any more).
        OSError: the file cannot be read.
    """
    with open_plain(path) as file, _opened(file) as image:
        image.draft("RGB", (edge, edge))  # a JPEG is decoded at the size that is needed
        mode = "RGBA" if image.has_transparency_data else "RGB"
        step = image.convert(mode) if image.mode != mode else image
        for share, quality in LADDER:
            longest = max(1, int(edge * share))
            # In place, from the step before: a copy of a 4K picture costs as much as the encoding.
            step.thumbnail((longest, longest), reducing_gap=REDUCING_GAP)
            step.info.clear()
            out = io.BytesIO()
            step.save(out, kind, quality=quality, method=2)
            if out.tell() <= budget:
                return out.getvalue()
    return None
