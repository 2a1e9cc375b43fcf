"""Poll tasks until they are settled. Polls that are due at the same time share one batch request."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import anyio
import anyio.abc

from evolink_mcp.api.client import BATCH_MAX, EvolinkClient
from evolink_mcp.api.http import POOL_SIZE, TRANSPORT_ERRORS
from evolink_mcp.api.task import COMPLETED, FAILED, Task
from evolink_mcp.call_context import outside_request
from evolink_mcp.errors import EvolinkError, RateLimited, Rejected, Unreadable
from evolink_mcp.journal.entry import Phase
from evolink_mcp.studio.callback_history import CallbackHistory
from evolink_mcp.studio.events import Events, Polled, Settled
from evolink_mcp.studio.jobs import Callback, Job, Timing, guarded
from evolink_mcp.studio.journal_writer import JournalWriter
from evolink_mcp.studio.schedule import (
    SLOW_REPEATS_MAX,
    DurationHistory,
    RetryBudget,
    Schedule,
    backoff_s,
    slower_s,
)

log = logging.getLogger(__name__)

# A batch collects polls for GATHER_S. With MANY_JOBS a longer time fills it.
GATHER_S = 0.05
MANY_JOBS = 100
GATHER_MANY_S = 0.2
READS_PER_S = 100  # of one account; EvoLink publishes no limit of polls
# EvoLink's answers that mean "no batch reads".
NO_BATCH_STATUS = (400, 404, 405, 501)
# After this many unreadable batches in a row, tasks are polled one by one. A proxy can break a single answer.
UNREADABLE_BATCHES_MAX = 3
RATE_LIMIT_WAIT_S = 5.0  # after a 429 that names no time; a guess, because EvoLink publishes no period
# The interval of polls while a callback is expected. They replace a callback that does not arrive.
BACKSTOP_S = 60.0
NOT_FOUND_READS = 4  # about 10 s in all
FIRST_REFUSAL_WAIT_S = 2.0  # doubles with each refusal


@dataclass(slots=True)
class _Read:
    """One due poll of one task. `end_event` is set when it has a task or an error."""

    task_id: str
    end_event: anyio.Event = field(default_factory=anyio.Event)
    task: Task | None = None
    error: EvolinkError | None = None


class RateLimit:
    """The time until which EvoLink asked an account to wait (HTTP 429), by the event loop's clock.

    `purchases_at` is the time in epoch seconds before which EvoLink accepts no purchase. It may be days away.
    """

    def __init__(self) -> None:
        self.until = 0.0
        self.purchases_at = 0.0

    def extend(self, seconds: float | None) -> None:
        """EvoLink asked for a wait of `seconds`. None: it named no time."""
        self.until = max(self.until, anyio.current_time() + (RATE_LIMIT_WAIT_S if seconds is None else seconds))

    @property
    def remaining_s(self) -> float:
        """Seconds until the end of the wait, 0 if there is none."""
        return max(self.until - anyio.current_time(), 0.0)


class Poller:
    """Read the tasks of one account for all its jobs, also for several studios.

    Its HTTP requests run in `group`, so a cancelled job disturbs no other one.
    """

    def __init__(
        self,
        client: EvolinkClient,
        group: anyio.abc.TaskGroup,
        *,
        events: Events | None = None,
        sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
        monotonic: Callable[[], float] = anyio.current_time,
    ) -> None:
        self.rate_limit = RateLimit()
        self.job_count = 0
        self._client = client
        self._group = group
        self._events = events or Events()
        self._sleep = sleep
        self._monotonic = monotonic
        self._due: dict[str, deque[_Read]] = {}
        self._is_gathering = False
        self._has_batch_reads = True
        self._unreadable_batches = 0
        self._next_read_at = 0.0
        # The deadline of a read includes its wait for a connection. Therefore reads queue here before it starts.
        self._connections = anyio.CapacityLimiter(POOL_SIZE)

    async def read(self, task_id: str, tenant: str = "") -> Task:
        """Return the task's state now. If many reads are due, the tenants take turns.

        Raises:
            EvolinkError: Rejected (401, 403, 404 …), RateLimited, or Unreadable.
        """
        # A single job has no poll to share, so it does not wait for a batch.
        if self.job_count <= 1:
            return await self._read_one(task_id)
        read = _Read(task_id)
        self._due.setdefault(tenant, deque()).append(read)
        if not self._is_gathering:
            self._is_gathering = True
            with outside_request():  # a batch polls the tasks of several requests
                self._group.start_soon(guarded, self._gather)
        await read.end_event.wait()
        if read.error is not None:
            raise read.error
        assert read.task is not None
        return read.task

    async def read_unpaced(self, task_id: str) -> Task:
        """Return the task's state now, outside the pace and the rate limit.

        Raises:
            EvolinkError: the poll failed.
        """
        return await self._client.task(task_id)

    async def _gather(self) -> None:
        """Send due reads until there are none. Reads that become due within GATHER_S share a batch."""
        try:
            while self._due:
                await self._sleep(GATHER_S if self.job_count < MANY_JOBS else GATHER_MANY_S)
                while self._has_batch_reads and (reads := self._next_batch()):
                    # The gathering continues while this batch waits for its answer.
                    self._group.start_soon(guarded, self._answer, reads)
                for read in self._next_batch():
                    await self._keep_pace()
                    self._group.start_soon(guarded, self._answer_alone, read, True)
        finally:
            self._is_gathering = False

    def _next_batch(self) -> list[_Read]:
        """Remove up to BATCH_MAX due reads: one read of each tenant, then a second one, and so on."""
        batch: list[_Read] = []
        while self._due and len(batch) < BATCH_MAX:
            tenant = next(iter(self._due))
            waiting = self._due.pop(tenant)
            batch.append(waiting.popleft())
            if waiting:
                self._due[tenant] = waiting  # behind all other tenants
        return batch

    async def _answer(self, reads: list[_Read]) -> None:
        """Answer these reads with one batch request. Read a task alone if the batch answer lacks facts."""
        tasks: dict[str, Task] = {}
        # Also a cancellation of the batch must end the wait of every job in it.
        error: EvolinkError | None = Unreadable("the poll was interrupted")
        try:
            # The batch endpoint is not documented, so a single task is read with the documented one.
            tasks = await self._read_batch([read.task_id for read in reads]) if len(reads) > 1 else {}
            error = None
        except EvolinkError as caught:
            error = caught
        finally:
            if error is not None:
                for read in reads:
                    read.error = error
                    read.end_event.set()
        if error is not None:
            return
        for read in reads:
            task = tasks.get(read.task_id)
            if task is None or not _is_complete(task):
                self._group.start_soon(guarded, self._answer_alone, read)
            else:
                read.task = task
                read.end_event.set()

    async def _answer_alone(self, read: _Read, is_paced: bool = False) -> None:
        try:
            read.task = await self._read_one(read.task_id, is_paced=is_paced)
        except EvolinkError as error:
            read.error = error
        finally:
            if read.task is None and read.error is None:
                read.error = Unreadable("the poll was interrupted")
            read.end_event.set()

    async def _read_batch(self, task_ids: list[str]) -> dict[str, Task]:
        """Return the tasks of one batch answer, or none if EvoLink has no batch reads."""
        if not self._has_batch_reads:
            return {}
        try:
            await self._keep_pace()
            async with self._connections:
                self._events.publish(Polled("batch"))
                tasks = await self._client.tasks(task_ids)
        except RateLimited as error:
            self.rate_limit.extend(error.retry_after_s)
            raise
        except (Rejected, Unreadable) as error:
            # Only a clear refusal or repeated nonsense proves that there are no batch reads. A broken connection
            # proves nothing.
            if error.http_status is None and isinstance(error.__cause__, TRANSPORT_ERRORS):
                raise
            if error.http_status not in (None, *NO_BATCH_STATUS):
                raise
            self._unreadable_batches += 1
            if error.http_status is not None or self._unreadable_batches >= UNREADABLE_BATCHES_MAX:
                self._has_batch_reads = False
                log.info("EvoLink does not answer batch reads, polling tasks one by one")
            return {}
        self._unreadable_batches = 0
        return tasks

    async def _read_one(self, task_id: str, *, is_paced: bool = False) -> Task:
        if not is_paced:
            await self._keep_pace()
        async with self._connections:
            self._events.publish(Polled("single"))
            try:
                return await self._client.task(task_id)
            except RateLimited as error:
                self.rate_limit.extend(error.retry_after_s)
                raise

    async def _keep_pace(self) -> None:
        """Keep all reads of this account below READS_PER_S and outside EvoLink's rate limit."""
        now = self._monotonic()
        # The time is reserved before the sleep, so that concurrent polls get different times.
        self._next_read_at = max(self._next_read_at + 1 / READS_PER_S, now, self.rate_limit.until)
        if self._next_read_at > now:
            await self._sleep(self._next_read_at - now)


def _is_complete(task: Task) -> bool:
    """Return whether a batch answer has all facts of a single read: links, credits, the reason of a failure."""
    if task.status == COMPLETED:
        return bool(task.results) and task.credits_used is not None
    return task.status != FAILED or task.error is not None


@dataclass(slots=True)
class _Failures:
    """The failed polls of a task since its last answer."""

    unreadable: int = 0
    not_found: int = 0
    refused: int = 0


class TaskFollower:
    """Poll the tasks of jobs until they are settled. A failed poll never fails a task."""

    def __init__(self, poller: Poller, writer: JournalWriter, durations: DurationHistory, timing: Timing) -> None:
        self._poller = poller
        self._writer = writer
        self._durations = durations
        self._timing = timing
        self._retry_budget = RetryBudget()
        self._callbacks = CallbackHistory(writer.journal)

    @property
    def misses_callbacks(self) -> bool:
        """Whether EvoLink's callbacks do not arrive."""
        return self._callbacks.are_missing

    async def follow(self, job: Job) -> None:
        """Return when the job's task is settled.

        Raises:
            Rejected: EvoLink does not accept the key (401), does not know the task (404), or refused every poll for
                two days. The journal keeps the task ID.
        """
        self._poller.job_count += 1
        try:
            await self._poll_until_settled(job)
        finally:
            self._poller.job_count -= 1

    async def read_once(self, task: Task) -> Task:
        """Poll a task that another server follows.

        Raises:
            EvolinkError: the poll failed.
        """
        return merge(task, await self._poller.read_unpaced(task.id))

    async def _poll_until_settled(self, job: Job) -> None:
        task = job.entry.task
        assert task is not None
        # Only a new purchase rests before its first poll. Any other task may be settled already.
        is_new = job.is_acknowledged
        # The system's clock may have been set back since the purchase.
        age_s = 0.0 if is_new else max(0.0, self._timing.clock() - job.entry.created_at)
        accepted_at = anyio.current_time() - age_s
        polled_at = anyio.current_time()
        schedule = Schedule(await self._durations.expected(job.entry))
        rests_first = is_new
        if job.callback is not Callback.NONE:
            await self._callbacks.read()
        failures = _Failures()
        while not task.settled:
            if rests_first:
                rest_s = schedule.next_s(anyio.current_time() - accepted_at, task.progress)
                if job.callback is not Callback.NONE and not self._callbacks.are_missing:
                    rest_s = max(rest_s, BACKSTOP_S)
                await job.rest(rest_s, self._timing.sleep)
            try:
                newer = await self._poller.read(task.id, job.entry.account)
            except (Rejected, Unreadable) as error:
                rests_first = await self._wait_after(error, job, failures)
                continue
            rests_first = True
            failures = _Failures()
            job.problem = None
            self._retry_budget.earn()
            task = merge(task, newer)
            last_polled_at = polled_at
            polled_at = anyio.current_time()
            await self._writer.record_poll(job, task)
            job.record_answer(is_running=not task.settled)
            if task.settled:
                has_missed_callback = job.callback is Callback.EXPECTED
                self._writer.events.publish(Settled(job.entry, polled_at - last_polled_at, has_missed_callback))
        if job.callback is not Callback.NONE:
            await self._callbacks.add(has_arrived=job.callback is Callback.RECEIVED)
        if task.status == COMPLETED and is_new:
            await self._durations.add(job.entry, anyio.current_time() - accepted_at)

    async def _wait_after(self, error: Rejected | Unreadable, job: Job, failures: _Failures) -> bool:
        """Wait after a failed poll. Return whether the next poll waits for its usual time too.

        Raises:
            Rejected: no further poll can succeed. See `follow`.
        """
        if isinstance(error, RateLimited):
            return error.retry_after_s == 0  # otherwise the poller waits
        if isinstance(error, Unreadable):
            failures.unreadable += 1
            log.info("poll of %s failed: %s", job.entry.task_id, error.code)
            if not self._retry_budget.spend(is_lost=error.http_status is None):
                return True
            await self._timing.sleep(backoff_s(min(failures.unreadable, 3)))
            return False
        # An external task may belong to another account.
        if job.entry.phase == Phase.EXTERNAL or error.http_status == 401:
            raise error
        if error.http_status == 404:
            # EvoLink may answer 404 for a new task. Only repeated 404 answers count.
            failures.not_found += 1
            if failures.not_found == NOT_FOUND_READS:
                raise error
            return True
        # Other refusals may be temporary, and the image is paid. Poll again, more and more slowly.
        if failures.refused == SLOW_REPEATS_MAX:
            raise error
        job.problem = error.problem
        log.info("EvoLink refuses polls of %s: %s", job.entry.task_id, error.code)
        await job.rest(slower_s(FIRST_REFUSAL_WAIT_S, failures.refused), self._timing.sleep)
        failures.refused += 1
        return False


def merge(before: Task, newer: Task) -> Task:
    """Return the newer state with the facts of `before` that the newer answer omits.

    A settled status never goes back. Only `completed` replaces another settled status.
    """
    is_kept = before.settled and newer.status != COMPLETED
    latest = before if is_kept else newer
    second = newer if is_kept else before
    is_same_status = before.status == newer.status
    return replace(
        latest,
        estimated_time_s=_first(latest.estimated_time_s, second.estimated_time_s),
        credits_reserved=_first(latest.credits_reserved, second.credits_reserved),
        # Before the end of a task EvoLink sends a placeholder for the charge.
        credits_used=_first(latest.credits_used, second.credits_used if is_same_status else None),
        billing=latest.billing or (second.billing if is_same_status else None),
        created=latest.created or second.created,
        results=_merge_links(before.results, newer.results),
        links_left_out=max(before.links_left_out, newer.links_left_out),
    )


def _first(value: float | None, second: float | None) -> float | None:
    return second if value is None else value


def _merge_links(before: tuple[str, ...], newer: tuple[str, ...]) -> tuple[str, ...]:
    """Return the newer links, then the earlier links of the other images. The position of a link is the image's index."""
    if set(newer) <= set(before):
        return before
    return newer + tuple(link for link in before[len(newer) :] if link not in newer)
