"""The jobs that are under way: this server works on the entries that it owns, and watches those of other servers."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import replace

import anyio
import anyio.abc

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.task import COMPLETED
from evolink_mcp.errors import EvolinkError, JournalUnwritable, TaskKnown
from evolink_mcp.journal.entry import Entry, Phase, Stage
from evolink_mcp.journal.journal import Journal, Notification
from evolink_mcp.studio.events import JournalWriter
from evolink_mcp.studio.jobs import Job, Sleep, guarded
from evolink_mcp.studio.purchase import INTERRUPTED, Purchaser
from evolink_mcp.studio.save import ImageSaver
from evolink_mcp.studio.schedule import SLOW_REPEATS_MAX, slower_s
from evolink_mcp.studio.size_rule import SizeRule
from evolink_mcp.studio.watch import TaskFollower, merged
from evolink_mcp.teams.metrics import Audit

log = logging.getLogger(__name__)

AGAIN_AFTER_S = 5.0
# Problems that no repeat can mend: another key is needed, or EvoLink does not know the task.
FINAL = ("unauthorized", "not_found", "key_missing")


class JobRunner:
    """Carries out jobs in `group`. An entry has at most one job here, and at most one owner among all servers.

    `pause` waits between two tries of what could not be finished, and between two looks at another server's work.
    """

    def __init__(
        self,
        client: EvolinkClient,
        journal: Journal,
        recorder: JournalWriter,
        purchases: Purchaser,
        watcher: TaskFollower,
        collector: ImageSaver,
        size_rule: SizeRule,
        group: anyio.abc.TaskGroup,
        *,
        audit: Audit | None = None,
        clock: Callable[[], float] = time.time,
        pause: Sleep = anyio.sleep,
    ) -> None:
        self._audit = audit
        self.jobs: list[Job] = []
        self._client, self._journal, self._recorder = client, journal, recorder
        self._purchases, self._watcher, self._collector = purchases, watcher, collector
        self._size_rule = size_rule
        self._group = group
        self._clock, self._pause = clock, pause
        self._taken: set[str] = set()  # keys of the entries that were taken over
        self._later: set[str] = set()  # and of those that are to be tried again
        self._tries: dict[str, int] = {}
        self.stop_listening = journal.listen(self._heard)
        journal.when_lost(self._stop)

    async def take_over(self) -> None:
        """Go on with what is open and has no living owner.

        Raises:
            JournalUnwritable: it cannot be known.
        """
        for entry in await self._journal.adopt():
            if self.running(entry.key) or self._recorder.is_unwritten(entry.key):
                continue
            if entry.phase == Phase.INTENT:
                await self._give_up(left := Job(entry))
                await self._recorder.ended(left)
                left.finish()
            elif entry.key in self._taken:  # this server has tried before
                await self._recorder.ended(Job(entry))
            else:
                log.info("taking up %s", entry.task_id or entry.key)
                self._taken.add(entry.key)
                self._begin(entry, self._go_on).audited = True

    def running(self, key: str) -> Job | None:
        """The job of the entry with this key, if it is under way here."""
        return next((job for job in self.jobs if job.entry.key == key), None)

    async def go_on(self, entry: Entry, *, copy_as: str | None = None) -> Job:
        """The job of an entry that may have an owner: this server works on it, or watches the one that does."""
        if not entry.has_work(self._clock()) and copy_as is None:
            job = Job(entry)
            job.finish()
            return job
        # Where the journal cannot be used, a task can still be followed: nothing is bought by that.
        if entry.is_written and not await self.acquire(entry.key, if_unknown=entry.task is not None):
            return self._begin(entry, self._accompany)
        return self._begin(entry, self._go_on)

    async def requests_answered(self) -> None:
        """Wait until no paid request is on its way any more."""
        for job in list(self.jobs):
            async with aclosing(job.states()) as states:
                async for entry in states:
                    if entry.phase != Phase.SENDING:
                        break

    def waits_for(self, marks: tuple[str, ...]) -> bool:
        """Whether a call waits for the result of an identical order right now."""
        return any(job.callers and job.entry.fingerprint in marks for job in self.jobs)

    async def acquire(self, key: str, *, if_unknown: bool = False) -> bool:
        """Become the entry's owner; `if_unknown` where the journal cannot be used."""
        try:
            return await self._journal.acquire(key)
        except JournalUnwritable as error:
            log.warning("%s", error.message)
            return if_unknown

    def buy(self, entry: Entry, client: str | None = None) -> Job:
        """The job of a new order, which this server has written down. `client` bought it, for the audit."""
        job = self._begin(entry, self._buy)
        job.audited, job.client = True, client
        return job

    def _begin(self, entry: Entry, act: Callable[[Job], Awaitable[None]]) -> Job:
        job = Job(entry)
        self.jobs.append(job)
        self._group.start_soon(self._carry_out, job, act)
        return job

    async def _carry_out(self, job: Job, act: Callable[[Job], Awaitable[None]]) -> None:
        try:
            job.problem = await guarded(act, job) or job.problem
        finally:
            if self._audit is not None and job.audited:
                self._audit.tell(job.entry, job.client, self._clock())
        await self._recorder.ended(job)
        self.jobs.remove(job)
        job.finish()
        self._try_again_later(job)

    async def _buy(self, job: Job) -> None:
        await self._purchases.buy(job)
        job.heard_from = job.seen_running = job.entry.task is not None
        await self._follow(job)

    async def _go_on(self, job: Job) -> None:
        """Do what is left to do for an entry that this server has come to own. It buys nothing."""
        if job.entry.phase == Phase.INTENT:
            await self._give_up(job)
        elif job.entry.phase in (Phase.SENDING, Phase.UNKNOWN):
            await self._purchases.lost.reconcile(job)
        await self._follow(job)

    async def _follow(self, job: Job) -> None:
        """Watch the task, if there is one, until it is settled, and save its pictures."""
        if job.entry.task is None:
            return
        ours = False
        with anyio.CancelScope() as job.following:
            ours = await self._work_on(job)
        job.following = None
        if not ours:
            await self._accompany(job)

    async def _work_on(self, job: Job) -> bool:
        """False: another server works on this task."""
        assert job.entry.task is not None
        try:
            await self._watcher.watch(job)
        except TaskKnown:  # another server has written the same task down, which was bought elsewhere
            job.change_to(await self._recorder.known(job.entry.task.id) or job.entry)
            return False
        if job.entry.task.results or job.entry.task.status == COMPLETED:
            await self._collector.collect(job)
            job.learned = await self._size_rule.learn(job.entry)
        if job.copy_as is not None:
            await self._collector.copy(job)
        return True

    async def _give_up(self, job: Job) -> None:
        """What another server had not sent when it ended is over."""
        await self._recorder.phase_changed(job, Phase.UNSENT, error=INTERRUPTED)

    async def _accompany(self, job: Job) -> None:
        """Watch an entry that another server works on, and go on with it when that one has ended."""
        look = job.elsewhere = True
        while True:
            entry = await self._recorder.known_by_key(job.entry.key) or job.entry
            task = entry.task
            if look and task is not None and not task.settled:
                with suppress(EvolinkError):  # only shown: what is written is the owner's business
                    entry = replace(entry, task=merged(task, await self._client.task(task.id)))
                    job.heard_from = True
            if entry != job.entry:
                self._recorder.seen_elsewhere(job, entry)
            if await self.acquire(entry.key):
                break
            look = await job.rest(self._journal.reread_s, self._pause)
        job.elsewhere = False
        job.change_to(await self._recorder.known_by_key(job.entry.key) or job.entry)
        if job.entry.has_work(self._clock()) or job.copy_as is not None:
            await self._go_on(job)

    def _heard(self, news: Notification) -> None:
        """Another server of this account has done something."""
        job = self.running(news.key)
        if news.is_callback and news.task_id is not None:
            self._group.start_soon(guarded, self.called_back, news.key, news.task_id)
        elif job is None:
            if news.task_id is not None:
                self._recorder.told_elsewhere(news.task_id)
        elif job.elsewhere and news.task is not None:
            self._recorder.seen_elsewhere(job, replace(job.entry, task=news.task))
        elif job.elsewhere:
            job.wake()

    async def called_back(self, key: str, task_id: str) -> None:
        """EvoLink says, at the address that was made for this order, that this task has ended: look at it.

        Where the answer to the order was lost, the task is the order's.
        """
        job = self.running(key)
        entry = job.entry if job is not None else await self._recorder.known_by_key(key)
        if entry is None or entry.phase in (Phase.REFUSED, Phase.UNSENT, Phase.EXTERNAL):
            return
        if entry.task is None or entry.is_unconfirmed:
            self._purchases.lost.told(key, task_id)
        if job is not None:
            job.told = entry.task_id == task_id
            if job.told and not job.elsewhere:
                job.poll_now()
        elif entry.phase in (Phase.SENDING, Phase.UNKNOWN) and await self.acquire(key):
            self._begin(entry, self._go_on)
        elif entry.is_unconfirmed and entry.task_id == task_id:
            await self.confirm(Job(entry))

    async def confirm(self, job: Job) -> None:
        """A guess has proved to be this order's task, unless another server works on it."""
        if await self.acquire(job.entry.key):
            await self._recorder.confirmed(job)
            await self._recorder.ended(job)

    def _stop(self) -> None:
        """Other servers may take over what this one works on: from now on it watches. A purchase goes to its end."""
        for job in self.jobs:
            if job.following is not None:
                job.following.cancel()

    def _try_again_later(self, job: Job) -> None:
        """What could not be finished is tried again, ever more slowly, until the pictures' links have died."""
        entry = job.entry
        problem = job.problem
        unfinished = entry.is_written and entry.task is not None and entry.stage is not Stage.FINAL
        if not unfinished or problem is None or problem.code in FINAL or entry.key in self._later:
            return
        tries = self._tries.get(entry.key, 0)
        self._tries[entry.key] = tries + 1
        if tries < SLOW_REPEATS_MAX:
            self._later.add(entry.key)
            self._group.start_soon(self._go_on_later, entry.key, slower_s(AGAIN_AFTER_S, tries))

    async def _go_on_later(self, key: str, delay_s: float) -> None:
        await self._pause(delay_s)
        self._later.discard(key)
        entry = await self._recorder.known_by_key(key)
        if entry is not None and entry.stage is not Stage.FINAL and not self.running(key):
            await self.go_on(entry)
