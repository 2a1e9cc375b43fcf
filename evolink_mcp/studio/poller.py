"""Reads of unfinished tasks, gathered: many that are due together go out as one batch request."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import anyio
import anyio.abc

from evolink_mcp.api.client import BATCH_MAX, EvolinkClient
from evolink_mcp.api.http import POOL_SIZE, TRANSPORT_ERRORS
from evolink_mcp.api.task import COMPLETED, FAILED, Task
from evolink_mcp.errors import EvolinkError, RateLimited, Rejected, Unreadable

log = logging.getLogger(__name__)

GATHER_S = 0.05
READS_PER_S = 100
NO_BATCH_HERE = (400, 404, 405, 501)
SENSELESS_MAX = 3


@dataclass(slots=True)
class _Wish:
    """One caller who waits for a look at one task."""

    task_id: str
    done: anyio.Event = field(default_factory=anyio.Event)
    task: Task | None = None
    error: EvolinkError | None = None


class Lookout:
    """Looks at tasks for any number of watchers; its requests run in `group`, so no watcher's end disturbs another."""

    def __init__(
        self,
        client: EvolinkClient,
        group: anyio.abc.TaskGroup,
        *,
        sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
        monotonic: Callable[[], float] = anyio.current_time,
    ) -> None:
        self._client = client
        self._group = group
        self._sleep = sleep
        self._monotonic = monotonic
        self._wishes: list[_Wish] = []
        self._batch_works = True
        self._senseless = 0
        self._next_read = 0.0
        # A read's deadline runs while it queues for a connection: so it queues here, before.
        self._at_once = anyio.CapacityLimiter(POOL_SIZE)
        self.watchers = 0

    async def look(self, task_id: str) -> Task:
        """The task's state now.

        Raises:
            EvolinkError: Rejected (401, 403, 404 …), RateLimited, or Unreadable.
        """
        if self.watchers <= 1 or not self._batch_works:
            return await self._read(task_id)
        wish = _Wish(task_id)
        self._wishes.append(wish)
        if len(self._wishes) == 1:
            self._group.start_soon(self._gather)
        await wish.done.wait()
        if wish.error is not None:
            raise wish.error
        assert wish.task is not None
        return wish.task

    async def _gather(self) -> None:
        await self._sleep(GATHER_S)
        wishes, self._wishes = self._wishes, []
        for start in range(0, len(wishes), BATCH_MAX):
            self._group.start_soon(self._grant, wishes[start : start + BATCH_MAX])

    async def _grant(self, wishes: list[_Wish]) -> None:
        try:
            found = await self._together([wish.task_id for wish in wishes]) if len(wishes) > 1 else {}
        except EvolinkError as error:
            for wish in wishes:
                wish.error = error
                wish.done.set()
            return
        for wish in wishes:
            task = found.get(wish.task_id)
            if task is None or not _told_in_full(task):
                self._group.start_soon(self._single, wish)
            else:
                wish.task = task
                wish.done.set()

    async def _single(self, wish: _Wish) -> None:
        try:
            wish.task = await self._read(wish.task_id)
        except EvolinkError as error:
            wish.error = error
        finally:
            if wish.task is None and wish.error is None:
                wish.error = Unreadable("the look at the task was interrupted")
            wish.done.set()

    async def _together(self, task_ids: list[str]) -> dict[str, Task]:
        if not self._batch_works:
            return {}
        try:
            await self._spaced()
            async with self._at_once:
                found = await self._client.tasks(task_ids)
        except RateLimited:
            raise
        except (Rejected, Unreadable) as error:
            # A broken connection says nothing about batch reads: only a definite no, or nonsense again and again.
            if error.http_status is None and isinstance(error.__cause__, TRANSPORT_ERRORS):
                raise
            if error.http_status not in (None, *NO_BATCH_HERE):
                raise
            self._senseless += 1
            if error.http_status is not None or self._senseless >= SENSELESS_MAX:
                self._batch_works = False
                log.info("EvoLink does not answer batch reads; tasks are read one by one")
            return {}
        self._senseless = 0
        return found

    async def _read(self, task_id: str) -> Task:
        await self._spaced()
        async with self._at_once:
            return await self._client.task(task_id)

    async def _spaced(self) -> None:
        """Keep all reads of this process below 100 a second."""
        now = self._monotonic()
        self._next_read = max(self._next_read + 1 / READS_PER_S, now)
        if self._next_read > now:
            await self._sleep(self._next_read - now)


def _told_in_full(task: Task) -> bool:
    """Whether a batch says all that a single read would: an end needs its links and price, or its reason."""
    if task.status == COMPLETED:
        return bool(task.results) and task.credits_used is not None
    return task.status != FAILED or task.error is not None
