"""Write the sidecar: a small JSON file beside a saved image with its facts, its task and its request."""

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
from evolink_mcp.images.folders import move_patiently, move_to_free_name, open_plain, part_file
from evolink_mcp.journal.entry import Entry, ResultImage, iso
from evolink_mcp.sanitize import scrub

log = logging.getLogger(__name__)

MAKER = "evolink-mcp"
SUFFIX = ".json"
SIDECAR_MAX_BYTES = 1 << 20
# People pass images on together with their sidecars, and a callback address may hold a secret.
PRIVATE_ARGUMENTS = frozenset(["callback_url"])
# Fields of an image that describe the work of this server and not the file.
INTERNAL_FIELDS = frozenset(
    [
        "error",
        "is_lost",
        "is_unusable",
        "is_rejected",
        "object_name",
        "transparent_share",
        "alpha_min",
        "alpha_max",
        "is_one_colour",
        "fallback_reason",
        "derived",
    ]
)


def sidecar_path(image: Path) -> Path:
    """Return the path of the sidecar: hero.png.json beside hero.png. It cannot be confused with a hero.json."""
    return image.with_name(image.name + SUFFIX)


def origin_of(image: Path, sha256: str | None) -> tuple[str | None, int | None]:
    """Return task ID and index of the image in this file, from its sidecar. (None, None) if they are unknown."""
    facts = _own_sidecar(sidecar_path(image)) or {}
    task_id = facts.get("task_id")
    index = facts.get("index")
    # A sidecar may have been copied beside another image, so its hash must fit.
    if is_task_id(task_id) and isinstance(index, int) and sha256 is not None and facts.get("sha256") == sha256:
        return task_id, index
    return None, None


def sidecar(entry: Entry, image: ResultImage) -> dict[str, Any]:
    """Return the content of the sidecar. Times are in UTC, sizes in pixels and bytes."""
    request = {name: value for name, value in entry.request.items() if name not in PRIVATE_ARGUMENTS}
    facts = {name: value for name, value in asdict(image).items() if name not in INTERNAL_FIELDS}
    return scrub(
        {
            "made_by": f"{MAKER} {__version__}",
            "prompt": request.pop("prompt", None),
            "request": request,
            "references": [reference.published for reference in entry.references],
            "task_id": entry.task_id,
            "created_at": iso(entry.created_at),
            **facts,
            "url_expires_at": iso(image.url_expires_at),
        }
    )


async def write_sidecar(entry: Entry, image: ResultImage) -> None:
    """Write the sidecar of a saved image. A failure is only logged: the image is more important."""
    assert image.path is not None
    path = sidecar_path(Path(image.path))
    try:
        if not await anyio.to_thread.run_sync(_write, path, sidecar(entry, image)):
            log.warning("no sidecar for this image: another program wrote %s", path)
    except OSError as error:
        log.warning("%s cannot be written (%s)", path, error.strerror or type(error).__name__)


async def write_derived_sidecar(image: Path, facts: dict[str, Any]) -> None:
    """Write the sidecar of a derived file: its own facts and those of its source. A failure is only logged."""
    path = sidecar_path(image)
    try:
        await anyio.to_thread.run_sync(_write, path, scrub({"made_by": f"{MAKER} {__version__}", **facts}))
    except OSError as error:
        log.warning("%s cannot be written (%s)", path, error.strerror or type(error).__name__)


def _write(path: Path, facts: dict[str, Any]) -> bool:
    """Write the whole file. Return False if a file of another program is there; it stays."""
    content = json.dumps(facts, ensure_ascii=False, indent=2).encode() + b"\n"
    with part_file(path.parent, content) as part:
        if move_to_free_name(part, path):
            return True
        old = _own_sidecar(path)
        if old is not None and old.get("sha256") != facts["sha256"]:  # the old image is gone
            move_patiently(os.replace, part, path)
        return old is not None


def _own_sidecar(path: Path) -> dict[str, Any] | None:
    """Return the sidecar at `path` if evolink-mcp wrote it."""
    try:
        with open_plain(path) as file:
            data = json.loads(file.read(SIDECAR_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    facts = as_dict(data)
    return facts if str(facts.get("made_by")).startswith(MAKER) else None
