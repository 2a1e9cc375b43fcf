"""The journal for tests that have no event loop: each call is awaited to its end."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from evolink_mcp.journal.sqlite import SqliteJournal


class BlockingJournal:
    """A `SqliteJournal` whose methods block; `file` is its file."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self._journal = SqliteJournal(folder, **more)
        self.file = self._journal._file
        self.folder = folder

    def __getattr__(self, name: str) -> Any:
        found: Callable[..., Any] = getattr(self._journal, name)
        if not inspect.iscoroutinefunction(found):
            return found
        return lambda *values, **named: anyio.run(partial(found, *values, **named))
