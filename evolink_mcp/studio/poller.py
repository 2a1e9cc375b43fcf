"""Reads of unfinished tasks: reads that are due at the same time go out as one batch request."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import anyio
import anyio.abc

from evolink_mcp.api.client import BATCH_MAX, EvolinkClient
from evolink_mcp.api.http import POOL_SIZE, TRANSPORT_ERRORS
from evolink_mcp.api.task import COMPLETED, FAILED, Task
from evolink_mcp.errors import EvolinkError, RateLimited, Rejected, Unreadable
from evolink_mcp.studio.jobs import guarded
from evolink_mcp.teams.metrics import Metrics

log = logging.getLogger(__name__)

# Among many watchers a batch that waits a little longer is full.
GATHER_S, MANY, GATHER_MANY_S = 0.05, 100, 0.2
READS_PER_S = 100
# EvoLink's answers that say: there are no batch reads here.
NO_BATCH_STATUS = (400, 404, 405, 501)
UNREADABLE_BATCHES_MAX = 3
RATE_LIMIT_WAIT_S = 5.0


@dataclass(slots=True)
class _Read:
    """One watcher's read of one task; `done` is set when it has a task or an error."""

    task_id: str
    done: anyio.Event = field(default_factory=anyio.Event)
    task: Task | None = None
    error: EvolinkError | None = None


class RateLimit:
    """EvoLink has asked an account to slow down (429): until when, by the loop's clock, everything of it waits."""

    def __init__(self) -> None:
        self.until = 0.0

    def ask(self, seconds: float | None) -> None:
        """EvoLink asks to wait for so long; None leaves it to us."""
        self.until = max(self.until, anyio.current_time() + (RATE_LIMIT_WAIT_S if seconds is None else seconds))

    @property
    def left_s(self) -> float:
        """Seconds from now until it is over; 0 where there is none."""
        return max(self.until - anyio.current_time(), 0.0)


class Poller:
    """Reads tasks of one account for any number of watchers, of several studios too.

    Its requests run in `group`: a watcher that ends disturbs no other.
    """

    def __init__(
        self,
        client: EvolinkClient,
        group: anyio.abc.TaskGroup,
        *,
        sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
        monotonic: Callable[[], float] = anyio.current_time,
        pause: RateLimit | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._client = client
        self._group = group
        self._sleep = sleep
        self._monotonic = monotonic
        self._due: dict[str, deque[_Read]] = {}
        self._gathering = False
        self.pause = pause or RateLimit()
        self._batch_works = True
        self._unreadable_batches = 0
        self._next_read_at = 0.0
        # The deadline of a read includes its wait for a connection, so reads queue here instead, before it starts.
        self._connections = anyio.CapacityLimiter(POOL_SIZE)
        self.watchers = 0

    async def read(self, task_id: str, who: str = "") -> Task:
        """The task's state now; where many reads are due, everybody (`who`) has a turn.

        Raises:
            EvolinkError: Rejected (401, 403, 404 …), RateLimited, or Unreadable.
        """
        if self.watchers <= 1:
            return await self._read_one(task_id)
        read = _Read(task_id)
        self._due.setdefault(who, deque()).append(read)
        if not self._gathering:
            self._gathering = True
            self._group.start_soon(guarded, self._gather)
        await read.done.wait()
        if read.error is not None:
            raise read.error
        assert read.task is not None
        return read.task

    async def _gather(self) -> None:
        """Send what is due, until nothing is: what comes within GATHER_S goes together."""
        try:
            while self._due:
                await self._sleep(GATHER_S if self.watchers < MANY else GATHER_MANY_S)
                while self._batch_works and (reads := self._in_turns(BATCH_MAX)):
                    self._group.start_soon(guarded, self._answer, reads)
                for read in self._in_turns(BATCH_MAX):
                    await self._keep_pace()
                    self._group.start_soon(guarded, self._answer_alone, read, True)
        finally:
            self._gathering = False

    def _in_turns(self, most: int) -> list[_Read]:
        """Take reads out of what is due: one of everybody, then another one of everybody who has more."""
        taken: list[_Read] = []
        while self._due and len(taken) < most:
            who = next(iter(self._due))
            waiting = self._due.pop(who)
            taken.append(waiting.popleft())
            if waiting:
                self._due[who] = waiting  # behind all others
        return taken

    async def _answer(self, reads: list[_Read]) -> None:
        """Answer these reads by one batch request; what the batch does not tell in full is read alone."""
        found: dict[str, Task] = {}
        error: EvolinkError | None = Unreadable("the look at the task was interrupted")
        try:
            found = await self._read_batch([read.task_id for read in reads]) if len(reads) > 1 else {}
            error = None
        except EvolinkError as caught:
            error = caught
        finally:
            if error is not None:
                for read in reads:
                    read.error = error
                    read.done.set()
        if error is not None:
            return
        for read in reads:
            task = found.get(read.task_id)
            if task is None or not _told_in_full(task):
                self._group.start_soon(guarded, self._answer_alone, read)
            else:
                read.task = task
                read.done.set()

    async def _answer_alone(self, read: _Read, paced: bool = False) -> None:
        try:
            read.task = await self._read_one(read.task_id, paced=paced)
        except EvolinkError as error:
            read.error = error
        finally:
            if read.task is None and read.error is None:
                read.error = Unreadable("the look at the task was interrupted")
            read.done.set()

    async def _read_batch(self, task_ids: list[str]) -> dict[str, Task]:
        """What one batch request tells of these tasks; nothing where EvoLink does not answer batch reads."""
        if not self._batch_works:
            return {}
        try:
            await self._keep_pace()
            async with self._connections:
                self._metrics.looks["batch"] += 1
                found = await self._client.tasks(task_ids)
        except RateLimited as error:
            self.pause.ask(error.retry_after_s)
            raise
        except (Rejected, Unreadable) as error:
            # A broken connection says nothing about batch reads: only a definite no does, or repeated nonsense.
            if error.http_status is None and isinstance(error.__cause__, TRANSPORT_ERRORS):
                raise
            if error.http_status not in (None, *NO_BATCH_STATUS):
                raise
            self._unreadable_batches += 1
            if error.http_status is not None or self._unreadable_batches >= UNREADABLE_BATCHES_MAX:
                self._batch_works = False
                log.info("EvoLink does not answer batch reads; tasks are read one by one")
            return {}
        self._unreadable_batches = 0
        return found

    async def _read_one(self, task_id: str, *, paced: bool = False) -> Task:
        if not paced:
            await self._keep_pace()
        async with self._connections:
            self._metrics.looks["single"] += 1
            try:
                return await self._client.task(task_id)
            except RateLimited as error:
                self.pause.ask(error.retry_after_s)
                raise

    async def _keep_pace(self) -> None:
        """Keep all reads of this account below READS_PER_S, and none while EvoLink has asked to wait."""
        now = self._monotonic()
        self._next_read_at = max(self._next_read_at + 1 / READS_PER_S, now, self.pause.until)
        if self._next_read_at > now:
            await self._sleep(self._next_read_at - now)


def _told_in_full(task: Task) -> bool:
    """Whether a batch tells all that a single read would: links and price of a completed task, reason of a failed one."""
    if task.status == COMPLETED:
        return bool(task.results) and task.credits_used is not None
    return task.status != FAILED or task.error is not None
