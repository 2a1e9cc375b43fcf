"""Look at a task until it is settled: a failing look never fails the task."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import anyio

from evolink_mcp.api.task import Task
from evolink_mcp.errors import RateLimited, Rejected, Unreadable
from evolink_mcp.studio.jobs import Job, Sleep
from evolink_mcp.studio.poller import Lookout
from evolink_mcp.studio.schedule import RetryBudget, Schedule, backoff_s

log = logging.getLogger(__name__)

NOT_FOUND_LOOKS = 4  # some 10 s apart in all
RATE_LIMIT_WAIT_S = 5.0


class Watcher:
    """Watches any number of jobs. `seen(job, task)` hears every state of every task."""

    def __init__(
        self,
        lookout: Lookout,
        seen: Callable[[Job, Task], None],
        *,
        clock: Callable[[], float] = time.time,
        sleep: Sleep = anyio.sleep,
    ) -> None:
        self._lookout = lookout
        self._seen = seen
        self._clock = clock
        self._sleep = sleep
        self._budget = RetryBudget()

    async def watch(self, job: Job) -> None:
        """Return when the job's task is settled.

        Raises:
            Rejected: EvoLink will not tell about this task (401, 403, 404); the id stays in the journal.
        """
        self._lookout.watchers += 1
        try:
            await self._until_settled(job)
        finally:
            self._lookout.watchers -= 1

    async def _until_settled(self, job: Job) -> None:
        task = job.entry.task
        assert task is not None
        # A job that has just bought its task waits for its first look; any other one is late already.
        age = 0.0 if job.fresh else max(0.0, self._clock() - job.entry.created_at)
        accepted = anyio.current_time() - age
        schedule = Schedule(task.estimated_time_s)
        at_once = not job.fresh
        failures = 0
        missing = 0
        while not task.settled:
            if not at_once:
                await job.rest(schedule.next_s(anyio.current_time() - accepted, task.progress), self._sleep)
            at_once = False
            try:
                seen = await self._lookout.look(task.id)
            except RateLimited as error:
                await self._sleep(RATE_LIMIT_WAIT_S if error.retry_after_s is None else error.retry_after_s)
                at_once = error.retry_after_s != 0
            except Rejected as error:
                # EvoLink may not know a task yet that it has just made: a 404 counts when it lasts.
                missing += 1
                if error.http_status != 404 or job.entry.phase == "found" or missing == NOT_FOUND_LOOKS:
                    raise
            except Unreadable as error:
                failures += 1
                log.info("a look at %s failed: %s", task.id, error.code)
                if self._budget.spend(lost=error.http_status is None):
                    await self._sleep(backoff_s(min(failures, 3)))
                    at_once = True
            else:
                failures = 0
                missing = 0
                self._budget.earn()
                task = merged(task, seen)
                job.fresh = True
                job.witnessed = job.witnessed or not task.settled
                self._seen(job, task)


def merged(before: Task, seen: Task) -> Task:
    """The newer state; what it does not tell any more is kept."""
    return replace(
        seen,
        estimated_time_s=seen.estimated_time_s if seen.estimated_time_s is not None else before.estimated_time_s,
        credits_reserved=seen.credits_reserved if seen.credits_reserved is not None else before.credits_reserved,
        created=seen.created or before.created,
        results=seen.results or before.results,
    )
