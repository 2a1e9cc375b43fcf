"""An order, the job that is made of it, and the turn-taking of servers that work on the same task."""

from __future__ import annotations

import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.errors import Problem
from evolink_mcp.journal.entry import Entry

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCKS = 1024
LOCK_LOOK_S = 0.2
Sleep = Callable[[float], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Order:
    """What a caller wants, checked."""

    request: GenerationRequest
    save_as: str | None = None
    max_credits: float | None = None
    force_new: bool = False


class Job:
    """One entry on its way, owned by the studio: calls come, watch and go, the job goes on.

    `fresh` once EvoLink has said something in this job's life, `witnessed` if it saw the task before its end;
    `problem` is what kept it from its own end; `callers` is how many calls wait for it.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.joined = False
        self.problem: Problem | None = None
        self.finished = False
        self.fresh = False
        self.witnessed = False
        self.callers = 0
        self._changed = anyio.Event()
        self._nudged = False
        self._resting: anyio.CancelScope | None = None

    def turn(self, entry: Entry) -> None:
        """The entry has a new state: tell whoever watches."""
        self.entry = entry
        self._changed.set()
        self._changed = anyio.Event()

    def finish(self) -> None:
        self.finished = True
        self.turn(self.entry)

    def look_now(self) -> None:
        """A caller is about to leave: look once more before."""
        self._nudged = True
        if self._resting is not None:
            self._resting.cancel()

    async def rest(self, seconds: float, sleep: Sleep) -> None:
        """Sleep, unless a caller asks for a look, or has asked since the last one."""
        with anyio.CancelScope() as self._resting:
            if not self._nudged:
                await sleep(seconds)
        self._nudged = False

    async def states(self, heartbeat_s: float = 4.0) -> AsyncGenerator[Entry, None]:
        """The entry now, at every change, and at least every `heartbeat_s` seconds; ends when the job does."""
        yield self.entry
        while not self.finished:
            changed = self._changed
            with anyio.move_on_after(heartbeat_s):
                await changed.wait()
            yield self.entry


class FileTurn:
    """One server at a time on one task, by a lock file that dies with its process; without a usable folder, no turns.

    The files are few and stay: removing one that another server is about to lock would let two in at once.
    """

    def __init__(self, folder: Path | None, task_id: str, sleep: Sleep) -> None:
        self._path = folder / f"{zlib.crc32(task_id.encode()) % LOCKS:04}.lock" if folder else None
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
                    await self._sleep(LOCK_LOOK_S)

    async def __aexit__(self, *_: object) -> None:
        if self._lock is not None:
            with suppress(OSError):
                self._lock.release()
