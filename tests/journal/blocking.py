"""The journal for tests without an event loop: each call blocks until its end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from anyio.from_thread import start_blocking_portal
from child_processes import patient_times

from evolink_mcp.journal.sqlite import SqliteJournal


class BlockingJournal:
    """A `SqliteJournal` whose methods block; `file` is its file."""

    def __init__(self, folder: Path, identity: str = "", **options: Any) -> None:
        self._journal = SqliteJournal(folder, identity, **options)
        self.file = self._journal.file
        self.folder = folder

    def __getattr__(self, name: str) -> Any:
        return _blocking(self._journal, name, anyio.run)


class BlockingPostgres:
    """A `PostgresJournal` of a separate server. Its methods block. `close` ends the server."""

    def __init__(self, url: str, portal: Any, identity: str = "", *, profile: str = "default") -> None:
        from evolink_mcp.teams.database import Database
        from evolink_mcp.teams.postgres import PostgresJournal

        self.database = Database(url, patient_times(grace_s=0.0))
        self._portal = portal
        portal.call(self.database.open)
        self._journal = PostgresJournal(self.database, identity, profile=profile)

    def __getattr__(self, name: str) -> Any:
        return _blocking(self._journal, name, self._portal.call)

    def close(self) -> None:
        self._portal.call(self._journal.close)
        self.die()

    def die(self) -> None:
        """End as a killed server does. It stays the owner of its entries until other servers adopt them."""
        self._portal.call(self.database.close)


@contextmanager
def open_portal() -> Iterator[Any]:
    """Run an event loop in a separate thread, for `BlockingPostgres`."""
    with start_blocking_portal() as portal:
        yield portal


def _blocking(journal: Any, name: str, run: Callable[..., Any]) -> Any:
    match: Callable[..., Any] = getattr(journal, name)
    if not inspect.iscoroutinefunction(match):
        return match
    return lambda *values, **options: run(partial(match, *values, **options))
