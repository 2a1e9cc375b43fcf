"""Read a task until it is settled. A read that fails never fails the task."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import anyio

from evolink_mcp.api.task import COMPLETED, Task
from evolink_mcp.errors import RateLimited, Rejected, Unreadable
from evolink_mcp.journal.entry import Phase
from evolink_mcp.studio.durations import DurationHistory
from evolink_mcp.studio.events import JournalWriter
from evolink_mcp.studio.jobs import Job, Sleep
from evolink_mcp.studio.poller import Poller
from evolink_mcp.studio.schedule import SLOW_REPEATS_MAX, RetryBudget, Schedule, backoff_s, slower_s
from evolink_mcp.teams.callbacks import BACKSTOP_S
from evolink_mcp.teams.metrics import Metrics

log = logging.getLogger(__name__)

MISSED_MAX = 3
NOT_FOUND_READS = 4  # about 10 s in all
FIRST_REFUSAL_WAIT_S = 2.0


class TaskFollower:
    """Watches any number of jobs, and tells `recorder` every state of every task."""

    def __init__(
        self,
        poller: Poller,
        recorder: JournalWriter,
        durations: DurationHistory,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Sleep = anyio.sleep,
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._poller = poller
        self._recorder = recorder
        self._durations = durations
        self._clock = clock
        self._sleep = sleep
        self._budget = RetryBudget()
        self._missed = 0  # callbacks that did not come, since the last one that did

    async def watch(self, job: Job) -> None:
        """Return when the job's task is settled.

        Raises:
            Rejected: EvoLink does not accept the key (401) or does not know the task (404), or has refused to tell of
                it for two days; the id stays in the journal.
        """
        self._poller.watchers += 1
        try:
            await self._until_settled(job)
        finally:
            self._poller.watchers -= 1

    async def _until_settled(self, job: Job) -> None:
        task = job.entry.task
        assert task is not None
        # Only a job that has just bought its task waits before the first read. Any other task may be done already.
        age = 0.0 if job.heard_from else max(0.0, self._clock() - job.entry.created_at)
        accepted = anyio.current_time() - age
        schedule = Schedule(await self._durations.expected(job.entry))
        at_once = not job.heard_from
        looked = anyio.current_time()
        failures = 0
        missing = 0
        refusals = 0
        while not task.settled:
            if not at_once:
                rest_s = schedule.next_s(anyio.current_time() - accepted, task.progress)
                if job.called_back and self._missed < MISSED_MAX:
                    rest_s = max(rest_s, BACKSTOP_S)
                await job.rest(rest_s, self._sleep)
            at_once = False
            try:
                seen = await self._poller.read(task.id, job.entry.account)
            except RateLimited as error:
                at_once = error.retry_after_s != 0  # the poller waits as long as EvoLink asks
            except Rejected as error:
                # An external task may belong to another account.
                if job.entry.phase == Phase.EXTERNAL or error.http_status == 401:
                    raise
                if error.http_status == 404:
                    # EvoLink may answer 404 for a task that it has just made: only a 404 that lasts counts.
                    missing += 1
                    if missing == NOT_FOUND_READS:
                        raise
                    continue
                # Any other no may be a fault of one moment, and the picture is paid: ask again, ever more slowly.
                if refusals == SLOW_REPEATS_MAX:
                    raise
                job.problem = error.problem
                log.info("EvoLink refuses to tell of %s: %s", task.id, error.code)
                await job.rest(slower_s(FIRST_REFUSAL_WAIT_S, refusals), self._sleep)
                refusals += 1
                at_once = True
            except Unreadable as error:
                failures += 1
                log.info("a look at %s failed: %s", task.id, error.code)
                if self._budget.spend(lost=error.http_status is None):
                    await self._sleep(backoff_s(min(failures, 3)))
                    at_once = True
            else:
                failures = missing = refusals = 0
                job.problem = None
                self._budget.earn()
                task = merged(task, seen)
                looked, before = anyio.current_time(), looked
                if task.settled:
                    self._metrics.settled(task.credits_used if task.charged == "yes" else None, looked - before)
                job.heard_from = True
                job.seen_running = job.seen_running or not task.settled
                await self._recorder.task_seen(job, task)
        if job.called_back:
            self._count_callback(job)
        if task.status == COMPLETED and age == 0.0:
            await self._durations.add(job.entry, anyio.current_time() - accepted)

    def _count_callback(self, job: Job) -> None:
        """Where EvoLink's callbacks do not come, its tasks are looked at as if there were none."""
        self._missed = 0 if job.told else self._missed + 1
        if self._missed == MISSED_MAX:
            log.warning("EvoLink has not called back for %d tasks: can it reach EVOLINK_MCP_PUBLIC_URL?", self._missed)


def merged(before: Task, seen: Task) -> Task:
    """The newer state, and from `before` what the newer answer does not tell any more."""
    return replace(
        seen,
        estimated_time_s=seen.estimated_time_s if seen.estimated_time_s is not None else before.estimated_time_s,
        credits_reserved=seen.credits_reserved if seen.credits_reserved is not None else before.credits_reserved,
        created=seen.created or before.created,
        results=seen.results or before.results,
    )
