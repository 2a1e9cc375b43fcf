"""A fetched picture is checked and saved: whole or not at all, under a free name, never over another file."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import anyio.to_thread

from evolink_mcp.errors import DecoderUnavailable, DownloadFailed, FolderRefused, PictureRejected, PictureUnusable
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.images.folders import PART_PREFIX, PART_SUFFIX, make_folder, move_to_free_name, stem_of
from evolink_mcp.images.inspect import ImageFacts
from evolink_mcp.images.previews import remember
from evolink_mcp.images.unusable import UnusableImage

try:
    import fcntl
except ImportError:
    fcntl = None

PART_LIVES_S = 3600
_SWEPT: set[Path] = set()


@dataclass(frozen=True, slots=True)
class Kept:
    """A saved picture, in the fields of `Picture`: type by its bytes, edges in pixels, file size, SHA-256 in hex."""

    path: str
    mime_type: str
    width: int
    height: int
    bytes: int
    sha256: str
    transparent: float | None = None
    one_colour: bool = False


async def keep(
    fetch: Callable[[BinaryIO], Awaitable[int]],
    target: Path,
    decoder: Decoder,
    *,
    preview_edge: int = 0,
    order: str = "",
) -> Kept:
    """Download an image into the folder of `target`, under its stem and the suffix of its type. Never overwrite a file.

    With a `preview_edge` (pixels) the same decoding makes a preview for the cache. `order` names the purchase.

    Raises:
        FolderRefused: the folder cannot be made or written.
        PictureUnusable: the downloaded file is not a complete image.
        DownloadFailed: no decoder process starts, so the file cannot be checked.
    """
    try:
        make_folder(target.parent)
        handle, name = tempfile.mkstemp(prefix=PART_PREFIX, suffix=PART_SUFFIX, dir=target.parent)
    except OSError as error:
        raise _unwritable(target.parent, error) from error
    part = Path(name)
    try:
        with os.fdopen(handle, "w+b") as file:
            with suppress(OSError):  # not every file system has locks
                _lock(file.fileno())
            await fetch(file)
            file.flush()
            facts, small = await decoder.check(file, edge=preview_edge, order=order)
        kept = await anyio.to_thread.run_sync(_settle, part, target, facts, abandon_on_cancel=True)
        if small is not None:
            with suppress(OSError):
                remember(Path(kept.path), preview_edge, small)
        return kept
    except UnusableImage as error:
        refusal = PictureRejected if error.is_hostile else PictureUnusable
        raise refusal(f"the file that EvoLink sent is not usable: {error}") from error
    except DecoderUnavailable as error:
        raise DownloadFailed(error.what, code=error.code, advice=f"The picture is paid. {error.advice}") from error
    except OSError as error:
        raise _unwritable(target.parent, error) from error
    finally:
        with suppress(OSError):
            part.unlink()


def _settle(part: Path, target: Path, facts: ImageFacts) -> Kept:
    """Sync the checked file to the disk and give it the first free name."""
    _sweep(part.parent)
    with part.open("r+b") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    size = part.stat().st_size
    number = 0
    while True:
        path = target.with_name(f"{stem_of(target)}{f'-{number}' if number else ''}{facts.suffix}")
        if move_to_free_name(part, path) or _same(path, size, digest):
            break
        number += 1
    _sync_folder(target.parent)
    return Kept(
        str(path.resolve()),
        facts.mime_type,
        facts.width,
        facts.height,
        size,
        digest,
        facts.transparent,
        facts.is_one_colour,
    )


def _sweep(folder: Path) -> None:
    """Once for each folder, remove unfinished files of killed servers: old ones that nobody is writing."""
    if folder in _SWEPT:
        return
    _SWEPT.add(folder)
    with suppress(OSError):
        for old in folder.glob(f"{PART_PREFIX}*{PART_SUFFIX}"):
            with suppress(OSError):
                if time.time() - old.lstat().st_mtime > PART_LIVES_S:
                    with old.open("rb") as file:
                        _lock(file.fileno())
                    old.unlink()


def _lock(handle: int) -> None:
    """Lock an unfinished file, so that no other server removes it whatever the clock says.

    Windows needs no lock: a file that is open cannot be removed there.

    Raises:
        OSError: another process has locked it.
    """
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _same(path: Path, size: int, digest: str) -> bool:
    """Whether this very picture is there already, saved by a server whose journal was lost."""
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
