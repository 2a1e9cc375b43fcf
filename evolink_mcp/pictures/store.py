"""A fetched picture is checked and saved: whole or not at all, under a free name, never over another file."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from evolink_mcp.errors import DownloadFailed, FolderRefused
from evolink_mcp.pictures.folders import PART_PREFIX, PART_SUFFIX, PICTURE_SUFFIXES, make_folder, move_to_free_name
from evolink_mcp.pictures.inspect import NotAPicture, examine, in_picture_thread

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


async def keep(fetch: Callable[[BinaryIO], Awaitable[int]], target: Path) -> Kept:
    """Fetch a picture into `target`'s folder under its stem and true suffix; never overwrites: -1, -2 …

    Raises:
        FolderRefused: the folder cannot be made or written.
        DownloadFailed: what came is not a whole picture.
    """
    try:
        make_folder(target.parent)
        handle, name = tempfile.mkstemp(prefix=PART_PREFIX, suffix=PART_SUFFIX, dir=target.parent)
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
    """Check the whole file, sync it to the disk, and give it the first free name."""
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
        if move_to_free_name(part, path) or _same(path, size, digest):
            break
        number += 1
    _sync_folder(target.parent)
    return Kept(str(path.resolve()), facts.mime_type, facts.width, facts.height, size, digest)


def _sweep(folder: Path) -> None:
    """Once for each folder, remove unfinished files of a killed server; no download takes as long as PART_LIVES_S."""
    if folder in _SWEPT:
        return
    _SWEPT.add(folder)
    with suppress(OSError):
        for old in folder.glob(f"{PART_PREFIX}*{PART_SUFFIX}"):
            if time.time() - old.lstat().st_mtime > PART_LIVES_S:
                old.unlink()


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
