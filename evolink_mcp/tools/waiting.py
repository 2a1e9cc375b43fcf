"""A call follows a job: progress that rises, a heartbeat, and a wait that ends before its host gives up."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing

import anyio

from evolink_mcp.api.task import COMPLETED
from evolink_mcp.journal.entry import Entry
from evolink_mcp.studio.jobs import Job

LAST_LOOK_S = 1.0
FRESH_GRACE_S = 14.0
HEARTBEAT_S = 4.0

Report = Callable[[float, float, str], Awaitable[None]]


async def follow(job: Job, wait_s: float, report: Report) -> None:
    """Watch `job` for `wait_s` seconds, or until it is finished; `report(progress, total, message)` hears of it.

    Just before the end EvoLink is asked once more. A call that knows nothing yet (no id, or nothing newer than the
    journal) waits up to 14 s more: only an answer with the id is one that nothing can be lost from.
    """
    shown = _Rising(report)
    deadline = anyio.current_time() + wait_s
    await _until(job, shown, deadline - min(LAST_LOOK_S, wait_s / 4))
    if job.finished:
        return
    job.look_now()
    await _until(job, shown, deadline)
    if not (job.finished or job.fresh):
        await _until(job, shown, anyio.current_time() + FRESH_GRACE_S, fresh=True)


async def _until(job: Job, shown: _Rising, deadline: float, *, fresh: bool = False) -> None:
    """The deadline is a scope around the consumer: the states know nothing of it."""
    async with aclosing(job.states(HEARTBEAT_S)) as states:
        with anyio.CancelScope(deadline=deadline):
            async for entry in states:
                await shown.tell(entry)
                if fresh and job.fresh:
                    return


class _Rising:
    """Progress as the protocol wants it: every number above the last, 100 only at the end."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._last = 0.0
        self._speak_from = anyio.current_time() + HEARTBEAT_S - 0.1

    async def tell(self, entry: Entry) -> None:
        """Report the entry's state; nothing is said before the task has an id, unless that takes long."""
        if self._last >= 100 or (entry.task is None and anyio.current_time() < self._speak_from):
            return
        known = (entry.task.progress if entry.task else None) or 0.0
        value = 100.0 if entry.ended else min(known, 99.0)
        self._last = value if value > self._last else self._last + (99.9 - self._last) / 100
        await self._report(round(self._last, 4), 100.0, _progress_words(entry))


def _progress_words(entry: Entry) -> str:
    if entry.task is None:
        return "waiting for EvoLink to take the request"
    saved = sum(picture.saved for picture in entry.pictures)
    if entry.status == COMPLETED:
        return f"{entry.task.id} completed, {saved} of {len(entry.task.results)} saved"
    progress = f" {entry.task.progress:.0f} %" if entry.task.progress is not None else ""
    return f"{entry.task.id} {entry.status}{progress}"
