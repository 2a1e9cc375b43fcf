"""The second record of paid tasks: a text file beside the journal. It restores entries that the journal lost.

Each line is the row of one task in JSON, as it was when EvoLink returned the task ID. Lines are only appended.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolink_mcp.api.task import as_dict
from evolink_mcp.journal.backend import Row, clean_text
from evolink_mcp.journal.entry import Entry, Phase
from evolink_mcp.journal.rows import COLUMNS, readable_entries, values_of

log = logging.getLogger(__name__)

FILE_NAME = "paid-tasks.jsonl"
# The part of the file that is read first. The rest is read only if the journal lacks one of these entries.
TAIL_BYTES = 64 << 10
_COLUMNS = ("profile", *COLUMNS)
# An older version wrote lines with fewer columns.
_DEFAULTS = dict(zip(_COLUMNS, ("", *values_of(Entry("", "", Phase.SUBMITTED, 0.0))), strict=True))


@dataclass(frozen=True, slots=True)
class PaidTask:
    """A purchase with a task, and the profile that bought it (the column `profile` of the journal)."""

    profile: str
    entry: Entry

    @property
    def values(self) -> list[Any]:
        """The row of the table `entries`."""
        return [clean_text(value) for value in (self.profile, *values_of(self.entry))]


def readable_tasks(rows: Iterable[Row]) -> list[PaidTask]:
    """Return the paid tasks of rows of the table `entries`. Skip damaged rows."""
    entries = ((row["profile"], entry) for row in rows for entry in readable_entries([row]))
    return [PaidTask(profile, entry) for profile, entry in entries if entry.has_certain_task]


class PaidRecord:
    """The file in `folder`. All methods block.

    Raises (every method):
        OSError: the file cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self._path_text = str(self.path)
        self._known_keys: set[str] = set()
        self._read_to = 0

    def append(self, tasks: Iterable[PaidTask]) -> None:
        """Write one line for each task that has none yet, and sync the file to the disk."""
        # After a deletion of the file, every task needs its line again.
        if not self.exists():
            self._known_keys.clear()
        new = [task for task in tasks if task.entry.key not in self._known_keys]
        if not new:
            return
        # With O_APPEND and one write, POSIX does not mix the lines of two servers.
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(handle, "r+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
            # A crash may have left a line without an end.
            start = b"\n" if end and file.read(1) != b"\n" else b""
            file.write(start + b"".join(map(_line_of, new)))
            os.fsync(handle)
        self._known_keys.update(task.entry.key for task in new)

    def is_read(self) -> bool:
        """Return whether there is a file and `read_new` has returned all its lines."""
        try:
            status = os.stat(self._path_text)
        except FileNotFoundError:
            return False
        # A folder in this place must not count as read, also if its size is equal.
        return status.st_size == self._read_to and stat.S_ISREG(status.st_mode)

    def exists(self) -> bool:
        """Return whether there is a file."""
        return self.path.is_file()

    def read_all(self) -> list[PaidTask]:
        """Return the tasks of all lines, oldest first. Damaged lines are skipped."""
        self._read_to = 0
        return self.read_new()

    def read_tail(self) -> list[PaidTask]:
        """Return the tasks of the last lines."""
        # The first line of this part is usually incomplete, and `_row_of` skips it.
        self._read_to = max(0, self._size() - TAIL_BYTES)
        return self.read_new()

    def read_new(self) -> list[PaidTask]:
        """Return the tasks of the lines that were appended since the last read."""
        size = self._size()
        if size < self._read_to:
            self._read_to = 0
        if size == self._read_to:
            return []
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            data = file.read()
        # Another server may be writing the last line.
        complete = data[: data.rfind(b"\n") + 1]
        self._read_to += len(complete)
        tasks = readable_tasks(row for row in map(_row_of, complete.splitlines()) if row)
        self._known_keys.update(task.entry.key for task in tasks)
        return tasks

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0


def _line_of(task: PaidTask) -> bytes:
    return json.dumps(dict(zip(_COLUMNS, task.values, strict=True)), ensure_ascii=False).encode() + b"\n"


def _row_of(line: bytes) -> dict[str, Any]:
    """Return a row of the table `entries`, or an empty one if the line is damaged."""
    try:
        values = as_dict(json.loads(line))
    except (ValueError, RecursionError):
        return {}
    return {**_DEFAULTS, **values} if values.get("key") else {}
