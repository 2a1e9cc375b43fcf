"""The sidecar, a small JSON file beside each saved picture: what was asked, which task made it, what it holds."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anyio.to_thread

from evolink_mcp import __version__
from evolink_mcp.api.task import as_dict, is_task_id
from evolink_mcp.journal.entry import Entry, Picture, iso
from evolink_mcp.pictures.folders import move_to_free_name, open_plain, part_file, patiently
from evolink_mcp.sanitize import scrub

log = logging.getLogger(__name__)

MAKER = "evolink-mcp"
SUFFIX = ".json"
SIDECAR_MAX_BYTES = 1 << 20
# A callback address may hold a secret, and people pass pictures on together with their sidecars.
LEFT_OUT = ("prompt", "callback_url")


def sidecar_path(picture: Path) -> Path:
    """The sidecar's path: hero.png.json beside hero.png, so that it is never taken for a hero.json."""
    return picture.with_name(picture.name + SUFFIX)


def made_as(picture: Path, sha256: str | None) -> tuple[str | None, int | None]:
    """Task and index of the picture in this file, by its sidecar; (None, None) if that is unknown or of another picture."""
    facts = _ours(sidecar_path(picture)) or {}
    task_id, index = facts.get("task_id"), facts.get("index")
    if is_task_id(task_id) and isinstance(index, int) and sha256 is not None and facts.get("sha256") == sha256:
        return task_id, index
    return None, None


def sidecar(entry: Entry, picture: Picture) -> dict[str, Any]:
    """The sidecar's content; times in UTC, sizes in pixels and bytes."""
    return scrub({
        "made_by": f"{MAKER} {__version__}",
        "prompt": entry.request.get("prompt"),
        "request": {name: value for name, value in entry.request.items() if name not in LEFT_OUT},
        "references": [asdict(one) for one in entry.references],
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
    """Write a saved picture's sidecar. If it cannot be written, the log says so, and nothing else happens."""
    assert picture.path is not None
    path, facts = sidecar_path(Path(picture.path)), sidecar(entry, picture)
    try:
        if not await anyio.to_thread.run_sync(_write, path, facts):
            log.warning("%s is not ours, so the picture's facts were not written", path)
    except OSError as error:
        log.warning("%s cannot be written (%s)", path, error.strerror or type(error).__name__)


def _write(path: Path, facts: dict[str, Any]) -> bool:
    """Write the whole file. What is there already stays if it is not ours or belongs to the same picture."""
    content = json.dumps(facts, ensure_ascii=False, indent=2).encode() + b"\n"
    with part_file(path.parent, content) as part:
        if move_to_free_name(part, path):
            return True
        there = _ours(path)
        if there is not None and there.get("sha256") != facts["sha256"]:  # it belonged to a picture that is gone
            patiently(os.replace, part, path)
        return there is not None


def _ours(path: Path) -> dict[str, Any] | None:
    """The sidecar at `path`, if evolink-mcp wrote it."""
    try:
        with open_plain(path) as file:
            data = json.loads(file.read(SIDECAR_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    facts = as_dict(data)
    return facts if str(facts.get("made_by")).startswith(MAKER) else None
