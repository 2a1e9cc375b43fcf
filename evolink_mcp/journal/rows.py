"""The conversion between an entry and a row of the table `entries`."""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from evolink_mcp.api.task import Task, TaskError
from evolink_mcp.errors import Problem
from evolink_mcp.journal.backend import Row
from evolink_mcp.journal.entry import DerivedFile, Entry, Phase, ReferenceImage, ResultImage, Stage

log = logging.getLogger(__name__)

# EvoLink's credits have no limit, and the databases cannot add infinite numbers. A larger number counts as this one.
CREDITS_MAX = 1e15

# The combining marks of Latin, Greek and Cyrillic letters. Migrations of the journal contain this range too.
_ACCENTS = re.compile("[\u0300-\u036f]")


def fold(text: str) -> str:
    """Return the text without case, width and accents, as searches compare it: “Ｃafé” is “cafe”.

    Marks that make another letter stay, for example in Japanese and Hindi.
    """
    letters = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text).casefold())
    return unicodedata.normalize("NFC", _ACCENTS.sub("", letters))


def search_text(entry: Entry) -> str:
    """Return the text that a search reads: prompt, file names, task ID and the prompts of sources, one per line."""
    names = [Path(image.path).name for image in entry.images if image.path]
    sources = [reference.source_prompt for reference in entry.references if reference.source_prompt]
    parts = [entry.request.get("prompt", ""), *names, entry.save_as or "", entry.task_id or "", *sources]
    return "\n".join(fold(str(part)) for part in parts)


# Columns that repeat a part of the entry, so that SQL can search and add.
DERIVED: dict[str, Callable[[Entry], Any]] = {
    "task_id": lambda entry: entry.task_id,
    "status": lambda entry: entry.status,
    "closed": lambda entry: entry.stage is Stage.FINAL,
    "spent": lambda entry: min(entry.spent, CREDITS_MAX),
    "reserved": lambda entry: min(entry.reserved, CREDITS_MAX),
    "words": search_text,
}
COLUMNS = (*(field.name for field in fields(Entry)), *DERIVED)
# The columns that `Journal.update` writes. `Journal.update_images` writes the images too.
STATE_COLUMNS = ("phase", "task", "error", *DERIVED)

_DECODERS: dict[str, Callable[[Any], Any]] = {
    "phase": Phase,
    "request": lambda text: dict(json.loads(text)),
    "task": lambda text: task_from_dict(json.loads(text)) if text else None,
    "error": lambda text: Problem(**json.loads(text)) if text else None,
    "images": lambda text: tuple(image_from_dict(image) for image in json.loads(text)),
    "references": lambda text: tuple(ReferenceImage(**image) for image in json.loads(text)),
}


# The fields of an entry and their decoders. None: the column has the value.
_FIELDS = tuple((field.name, _DECODERS.get(field.name)) for field in fields(Entry))


def values_of(entry: Entry, columns: Iterable[str] = COLUMNS) -> list[Any]:
    """Return the values of the columns. Objects become JSON."""
    return [_encode(DERIVED[name](entry) if name in DERIVED else getattr(entry, name)) for name in columns]


def entry_of(row: Row) -> Entry:
    """Return the entry of a row.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, RecursionError: The row is damaged.
    """
    return Entry(**{name: row[name] if decode is None else decode(row[name]) for name, decode in _FIELDS})


def readable_entries(rows: Iterable[Row]) -> list[Entry]:
    """Return the entries of the rows. Log a damaged row and skip it."""
    entries: list[Entry] = []
    for row in rows:
        try:
            entries.append(entry_of(row))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            log.error("skipping the damaged journal entry %s", row["key"])
    return entries


def image_from_dict(data: dict[str, Any]) -> ResultImage:
    """Return the image of its fields, as `dataclasses.asdict` returns them."""
    derived = tuple(DerivedFile(**file) for file in data.pop("derived", ()))
    return ResultImage(**data, derived=derived)


def task_from_dict(data: dict[str, Any]) -> Task:
    """Return the task of its fields, as `dataclasses.asdict` returns them."""
    error = data.pop("error")
    results = data.pop("results")
    return Task(**data, results=tuple(results), error=TaskError(**error) if error else None)


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    return json.dumps(value, default=_fields_of)


def _fields_of(value: Any) -> dict[str, Any]:
    data = asdict(value)
    if isinstance(value, Problem) and value.retry_at is None:
        del data["retry_at"]  # a server of an earlier version does not know it
    return data
