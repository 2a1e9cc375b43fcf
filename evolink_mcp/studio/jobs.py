"""An order, the job that carries it out, and the lock that keeps two servers from working on one task at once."""

from __future__ import annotations

import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from evolink_mcp.api.costs import Price
from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.errors import Problem
from evolink_mcp.journal.entry import Entry

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCK_FILES = 1024
LOCK_RETRY_S = 0.2
Sleep = Callable[[float], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Order:
    """What a caller wants, validated, and its computed price. `max_credits` is the caller's own cap, in credits."""

    request: GenerationRequest
    price: Price
    save_as: str | None = None
    max_credits: float | None = None
    force_new: bool = False


class Job:
    """The work on one entry. The studio runs it to its end; calls may wait for it and may leave.

    `joined`: an identical order took this job over instead of buying. `problem`: what stopped it, if anything did.
    `heard_from`: EvoLink has answered since this job started. `seen_running`: EvoLink has answered before the task
    was settled. `callers`: how many calls wait for it.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.joined = False
        self.problem: Problem | None = None
        self.finished = False
        self.heard_from = False
        self.seen_running = False
        self.callers = 0
        self._changed = anyio.Event()
        self._poll_wanted = False
        self._resting: anyio.CancelScope | None = None

    def change_to(self, entry: Entry) -> None:
        """Set the new state of the entry and wake every iterator of `states`."""
        self.entry = entry
        self._changed.set()
        self._changed = anyio.Event()

    def finish(self) -> None:
        """Nothing more will be done: end every iterator of `states`."""
        self.finished = True
        self.change_to(self.entry)

    def poll_now(self) -> None:
        """End the present or the next rest at once: a caller is about to leave and wants the newest state."""
        self._poll_wanted = True
        if self._resting is not None:
            self._resting.cancel()

    async def rest(self, seconds: float, sleep: Sleep) -> None:
        """Sleep for `seconds`, or until `poll_now` is called; not at all if it was called since the last rest."""
        with anyio.CancelScope() as self._resting:
            if not self._poll_wanted:
                await sleep(seconds)
        self._poll_wanted = False

    async def states(self, heartbeat_s: float = 4.0) -> AsyncGenerator[Entry, None]:
        """Yield the entry now, at every change and at least every `heartbeat_s` seconds, until the job is finished."""
        yield self.entry
        while not self.finished:
            changed = self._changed
            with anyio.move_on_after(heartbeat_s):
                await changed.wait()
            yield self.entry


class TaskLock:
    """Lets one server at a time save the pictures of a task, by a file lock that ends with its process.

    Without a usable folder nothing is locked. There are at most LOCK_FILES files, and they are never deleted: to
    delete one that another server is about to lock would let both in.
    """

    def __init__(self, folder: Path | None, task_id: str, sleep: Sleep) -> None:
        self._path = folder / f"{zlib.crc32(task_id.encode()) % LOCK_FILES:04}.lock" if folder else None
        self._lock: BaseFileLock | None = None
        self._sleep = sleep

    async def __aenter__(self) -> None:
        if self._path is None:
            return
        from filelock import FileLock, Timeout

        lock = FileLock(self._path, thread_local=False)
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            while self._lock is None:
                try:
                    lock.acquire(blocking=False)
                    self._lock = lock
                except Timeout:
                    await self._sleep(LOCK_RETRY_S)

    async def __aexit__(self, *_: object) -> None:
        if self._lock is not None:
            with suppress(OSError):
                self._lock.release()
