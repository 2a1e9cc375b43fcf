"""One entry on its way, and the turn-taking of servers that work on the same task."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import anyio
from filelock import FileLock, Timeout

from evolink_mcp.errors import Problem
from evolink_mcp.journal import Entry

Sleep = Callable[[float], Awaitable[object]]


class Job:
    """One entry on its way, owned by the studio: calls come, watch and go, the job goes on.

    `fresh` once EvoLink has said something in this job's life; `problem` is what kept it from its end.
    """

    def __init__(self, entry: Entry, *, joined: bool = False) -> None:
        self.entry = entry
        self.joined = joined
        self.problem: Problem | None = None
        self.started = anyio.current_time()
        self.finished = False
        self.fresh = False
        self._changed = anyio.Event()
        self._nudge = anyio.Event()

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
        self._nudge.set()

    async def rest(self, seconds: float, sleep: Sleep) -> None:
        """Sleep, unless a caller asks for a look."""
        async with anyio.create_task_group() as group:

            async def wake() -> None:
                await self._nudge.wait()
                group.cancel_scope.cancel()

            group.start_soon(wake)
            await sleep(seconds)
            group.cancel_scope.cancel()
        self._nudge = anyio.Event()

    async def states(self, heartbeat_s: float = 4.0) -> AsyncGenerator[Entry, None]:
        """The entry now, at every change, and at least every `heartbeat_s` seconds; ends when the job does."""
        yield self.entry
        while not self.finished:
            changed = self._changed
            with anyio.move_on_after(heartbeat_s):
                await changed.wait()
            yield self.entry


class FileTurn:
    """One server at a time, by a lock file that dies with its process; without a usable folder, no turns are taken."""

    def __init__(self, path: Path | None, sleep: Sleep) -> None:
        self._lock = FileLock(path, thread_local=False) if path else None
        self._sleep = sleep

    async def __aenter__(self) -> None:
        while self._lock is not None:
            try:
                Path(self._lock.lock_file).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._lock.acquire(blocking=False)
                return
            except Timeout:
                await self._sleep(0.2)
            except OSError:
                self._lock = None

    async def __aexit__(self, *_: object) -> None:
        if self._lock is not None:
            with suppress(OSError):
                self._lock.release()
                Path(self._lock.lock_file).unlink()
