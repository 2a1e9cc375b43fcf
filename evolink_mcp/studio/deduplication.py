"""An identical order gets what was bought before and never delivered, so that no broken call is paid twice."""

from __future__ import annotations

import time
from collections.abc import Callable

import anyio

from evolink_mcp.journal.journal import Journal
from evolink_mcp.studio.events import JournalWriter
from evolink_mcp.studio.jobs import ImageRequest, Job, Sleep
from evolink_mcp.studio.runner import JobRunner

JOIN_WITHIN_S = 24 * 3600
GIVING_UP_S = 1.0


class Joining:
    """Looks for what an order may join among the entries of the journal and the jobs of `runner`."""

    def __init__(
        self,
        journal: Journal,
        recorder: JournalWriter,
        runner: JobRunner,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Sleep = anyio.sleep,
    ) -> None:
        self._journal = journal
        self._recorder = recorder
        self._runner = runner
        self._clock = clock
        self._sleep = sleep

    async def job_for(self, order: ImageRequest, marks: tuple[str, ...]) -> Job | None:
        """The job of what an identical order bought and nobody received; None if this order has to buy.

        Raises:
            JournalUnwritable: it cannot be known, so nothing may be bought.
        """
        await self._runner.take_over()
        since = self._clock() - JOIN_WITHIN_S
        job = await self._undelivered(order, marks)
        if job is None and (self._runner.waits_for(marks) or await self._journal.is_awaited(marks, since)):
            # Over HTTP a client's cancelling, or its server's death, may be seen after the same call, sent later.
            await self._sleep(GIVING_UP_S)
            job = await self._undelivered(order, marks)
        return job

    async def _undelivered(self, order: ImageRequest, marks: tuple[str, ...]) -> Job | None:
        """The job of such an entry; this caller now waits for it."""
        now = self._clock()
        for entry in await self._journal.undelivered(marks, now - JOIN_WITHIN_S):
            if self._recorder.is_unwritten(entry.key) or not entry.is_reusable(now):
                continue
            if await self._journal.claim(entry.key):
                other_name = order.save_as if order.save_as != entry.save_as else None
                job = self._runner.running(entry.key) or await self._runner.go_on(entry, copy_as=other_name)
                job.joined = True
                job.copy_as = other_name
                return job
        return None
