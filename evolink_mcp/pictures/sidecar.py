"""A small JSON file beside each saved picture: what was asked, which task made it, and what the file holds."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio.to_thread

from evolink_mcp import __version__
from evolink_mcp.journal.entry import Entry, Picture, iso
from evolink_mcp.pictures.folders import PART_PREFIX, PART_SUFFIX, move_to_free_name, open_plain
from evolink_mcp.sanitize import scrub

log = logging.getLogger(__name__)

MAKER = "evolink-mcp"
SUFFIX = ".json"
SIDECAR_MAX_BYTES = 1 << 20
# A callback address may hold a secret, and pictures are passed on with what lies beside them.
LEFT_OUT = ("prompt", "callback_url")


def sidecar_path(picture: Path) -> Path:
    """Where a picture's facts lie: hero.png.json beside hero.png, so that a hero.json is never meant."""
    return picture.with_name(picture.name + SUFFIX)


def sidecar(entry: Entry, picture: Picture) -> dict[str, Any]:
    """What stands in it; times in UTC."""
    return scrub({
        "made_by": f"{MAKER} {__version__}",
        "prompt": entry.request.get("prompt"),
        "request": {name: value for name, value in entry.request.items() if name not in LEFT_OUT},
        "task_id": entry.task_id,
        "index": picture.index,
        "created_at": iso(entry.created_at),
        "path": picture.path,
        "url": picture.url,
        "url_expires_at": iso(picture.url_expires_at),
        "mime_type": picture.mime_type,
        "width": picture.width,
        "height": picture.height,
        "bytes": picture.bytes,
        "sha256": picture.sha256,
    })  # fmt: skip


async def lay_beside(entry: Entry, picture: Picture) -> None:
    """Write the facts of a saved picture beside it; that they cannot be written is worth a line in the log only."""
    assert picture.path is not None
    path, facts = sidecar_path(Path(picture.path)), sidecar(entry, picture)
    try:
        if not await anyio.to_thread.run_sync(_write, path, facts):
            log.warning("%s is not ours, so the picture's facts were not written", path)
    except OSError as error:
        log.warning("%s cannot be written (%s)", path, error.strerror or type(error).__name__)


def _write(path: Path, facts: dict[str, Any]) -> bool:
    """Put the file there whole, or leave what is there: someone else's file, or this picture's facts already."""
    handle, name = tempfile.mkstemp(prefix=PART_PREFIX, suffix=PART_SUFFIX, dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(json.dumps(facts, ensure_ascii=False, indent=2).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if move_to_free_name(part, path):
            return True
        there = _ours(path)
        if there is not None and there.get("sha256") != facts["sha256"]:  # of a picture that is gone: its name was free
            os.replace(part, path)
        return there is not None
    finally:
        with suppress(OSError):
            part.unlink()


def _ours(path: Path) -> dict[str, Any] | None:
    """What lies at `path`, if this server wrote it."""
    try:
        with open_plain(path) as file:
            data = json.loads(file.read(SIDECAR_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) and str(data.get("made_by")).startswith(MAKER) else None
