"""Find or buy, then run the jobs: work on the entries of this server and watch those of other servers."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

import anyio
import anyio.abc

from evolink_mcp.api.task import COMPLETED, Task
from evolink_mcp.call_context import outside_request, without_deadline
from evolink_mcp.errors import EvolinkError, JournalUnwritable, TaskKnown
from evolink_mcp.journal.entry import Entry, Phase, Stage
from evolink_mcp.journal.journal import Notification
from evolink_mcp.studio.events import Adopted, Changed, Finished
from evolink_mcp.studio.jobs import Callback, Job, JobState, PreparedRequest, Timing, guarded
from evolink_mcp.studio.journal_writer import JournalWriter
from evolink_mcp.studio.limits import Limits
from evolink_mcp.studio.poller import TaskFollower, merge
from evolink_mcp.studio.purchase import INTERRUPTED, Purchaser
from evolink_mcp.studio.save import LINK_LIVES_S, ImageSaver
from evolink_mcp.studio.schedule import SLOW_REPEATS_MAX, slower_s

log = logging.getLogger(__name__)

# Until then an earlier result can still be downloaded.
DEDUPLICATE_WITHIN_S = LINK_LIVES_S
# The longest time by which a call may precede the cancellation of the same call.
LATE_CANCELLATION_S = 1.0
REPEAT_AFTER_S = 5.0  # the wait before the first repeat of an unfinished job
# No repeat can solve these problems: the key must change, or EvoLink does not know the task.
FINAL_PROBLEMS = ("unauthorized", "not_found", "key_missing")


class JobRunner:
    """Run jobs in `group`. An entry has at most one job on this server and at most one owner among all servers."""

    def __init__(
        self,
        group: anyio.abc.TaskGroup,
        writer: JournalWriter,
        limits: Limits,
        purchaser: Purchaser,
        follower: TaskFollower,
        saver: ImageSaver,
        timing: Timing,
    ) -> None:
        self.jobs: list[Job] = []
        self._group = group
        self._journal = writer.journal
        self._writer = writer
        self._limits = limits
        self._purchaser = purchaser
        self._follower = follower
        self._saver = saver
        self._timing = timing
        self._attended_jobs: set[Job] = set()
        self._adopted_keys: set[str] = set()
        self._repeat_keys: set[str] = set()
        self._repeats: dict[str, int] = {}
        self._stop_listening = self._journal.listen(self._receive)
        self._journal.when_lost(self._stop_following)

    async def stop(self) -> None:
        """Wait until no POST is in progress, then stop listening to other servers."""
        try:
            for job in list(self.jobs):
                await job.wait_while(Phase.SENDING)
        finally:
            self._stop_listening()

    async def find_or_buy(self, prepared: PreparedRequest) -> Job:
        """Return the job of an earlier undelivered identical purchase, or buy. The caller is registered with the job.

        Claim and registration are one step, and so are record and job. A cancellation between them cannot lose one.

        Raises:
            FolderRefused, DownloadFailed: the images could not be saved.
            TooManyRunning, OverBudget: a limit forbids the purchase.
            JournalUnwritable: earlier purchases are unknown or the new one was not recorded. Nothing was sent.
        """
        if not prepared.request.force_new:
            job = await self._find(prepared)
            if job is not None:
                return job
        # After the search, because an earlier purchase is returned even if its folder is full.
        await self._saver.check_space(prepared.request, prepared.size_rule)
        with self._limits.place(self.jobs):
            # An upload is free, so a cancellation may still stop the call here.
            entry = await self._purchaser.entry_for(prepared)
            with anyio.CancelScope(shield=True):
                try:
                    entry = await self._limits.admit(prepared.request, entry)
                except JournalUnwritable:
                    # The entry may be recorded although the answer was lost. It must not count as running.
                    self._writer.withdraw(entry.key)
                    raise
                job = self._begin(entry, self._buy, client=prepared.request.client, is_audited=True)
                self.attend(job)
                return job
        raise AssertionError("unreachable")

    async def has_earlier(self, prepared: PreparedRequest) -> bool:
        """Return whether `find_or_buy` would find an earlier purchase now. Call `adopt` first.

        Raises:
            JournalUnwritable: earlier purchases are unknown.
        """
        now = self._timing.clock()
        earlier = await self._writer.undelivered(prepared.fingerprint, now - DEDUPLICATE_WITHIN_S)
        return not prepared.request.force_new and any(self._is_reusable(entry, now) for entry in earlier.entries)

    def attend(self, job: Job) -> None:
        """Register one more waiting call with a job, until `depart`."""
        job.callers += 1
        self._attended_jobs.add(job)

    async def depart(self, job: Job) -> None:
        """Remove one waiting call from a job. If it was the last one, an identical call can claim the purchase."""
        job.callers -= 1
        if job.callers:
            return
        self._attended_jobs.discard(job)
        if job.entry.is_written and job.entry.delivered_at is None:
            await self._writer.remove_caller(job.entry.key)

    async def _find(self, prepared: PreparedRequest) -> Job | None:
        # With an interval, a loop adopts the entries, and a call need not wait for it.
        if self._journal.adopt_every_s is None:
            await self.adopt()
        job, is_awaited = await self._claim(prepared)
        if job is None and (is_awaited or self._has_waiting(prepared.fingerprint)):
            # Over HTTP the cancellation of a call may arrive after the same call, sent later.
            await self._timing.sleep(LATE_CANCELLATION_S)
            job, _ = await self._claim(prepared)
        return job

    async def _claim(self, prepared: PreparedRequest) -> tuple[Job | None, bool]:
        """Return the job of an earlier undelivered purchase, and whether a call of another server waits for one.

        A client may repeat a call at another server. Servers with a common file belong to different clients.
        """
        now = self._timing.clock()
        earlier = await self._writer.undelivered(prepared.fingerprint, now - DEDUPLICATE_WITHIN_S)
        is_awaited = earlier.is_awaited and self._journal.can_publish
        for entry in earlier.entries:
            if not self._is_reusable(entry, now):
                continue
            with anyio.CancelScope(shield=True):
                if not await self._writer.claim(entry):
                    continue
                # The purchase may have changed since it was read. An old state must not be continued.
                entry = await self._writer.entry_by_key(entry.key) or entry
                if not self._is_reusable(entry, now):
                    await self._writer.remove_caller(entry.key)
                    continue
                save_as = prepared.request.save_as
                copy_name = save_as if save_as != entry.save_as else None
                job = self.job_of(entry.key) or await self.resume(entry, copy_name=copy_name)
                self.attend(job)
                job.is_deduplicated = True
                job.copy_name = copy_name
                return job, is_awaited
        return None, is_awaited

    def _is_reusable(self, entry: Entry, now: float) -> bool:
        """Return whether an identical request can get this purchase. An abandoned job buys nothing."""
        job = self.job_of(entry.key)
        return entry.is_reusable(now) and not (job is not None and job.is_abandoned)

    def _has_waiting(self, fingerprint: str) -> bool:
        """Return whether a call on this server waits for an identical request."""
        return any(job.entry.fingerprint == fingerprint for job in self._attended_jobs)

    async def adopt(self) -> None:
        """Adopt the open entries of dead servers.

        Raises:
            JournalUnwritable: the open entries are unknown.
        """
        with without_deadline():  # an entry without a job would keep its owner until the server ends
            entries = await self._journal.adopt()
        for entry in entries:
            job = self.job_of(entry.key)
            # The journal has made this server the owner, so the waiting job continues at once.
            if job is not None and job.has_remote_owner:
                job.wake()
            if job is not None or self._writer.is_unwritten(entry.key):
                continue
            if entry.phase == Phase.INTENT:
                job = Job(entry)
                await self._writer.record_phase(job, Phase.UNSENT, error=INTERRUPTED)
                await self._writer.release(job)
                job.finish()
            elif entry.key in self._adopted_keys:  # this server tried before
                await self._writer.release(Job(entry))
            else:
                log.info("adopting %s", entry.task_id or entry.key)
                self._adopted_keys.add(entry.key)
                self._writer.events.publish(Adopted(entry))
                with outside_request():  # another request bought it
                    self._begin(entry, self._continue, is_audited=True)

    def job_of(self, key: str) -> Job | None:
        """Return the unfinished job of the entry on this server, if any."""
        return next((job for job in self.jobs if job.entry.key == key), None)

    def job_of_task(self, task_id: str) -> Job | None:
        """Return the unfinished job of the task on this server, if any."""
        return next((job for job in self.jobs if job.entry.task_id == task_id), None)

    async def resume(self, entry: Entry, *, copy_name: str | None = None) -> Job:
        """Return a job for an entry that may have an owner: work on it, or watch its owner."""
        if not entry.has_work(self._timing.clock()) and copy_name is None:
            job = Job(entry)
            job.finish()
            return job
        # Without the journal a known task can still be followed, because that buys nothing.
        if entry.is_written and not await self._acquire(entry.key, if_unknown=entry.task is not None):
            return self._begin(entry, self._watch_remote)
        return self._begin(entry, self._continue)

    async def confirm(self, job: Job) -> None:
        """Confirm an unconfirmed match, unless another server works on the entry."""
        if await self._acquire(job.entry.key):
            await self._writer.record_confirmation(job)
            await self._writer.release(job)

    async def receive_callback(self, key: str, task_id: str) -> bool:
        """EvoLink called the address of this entry: the task has ended. Poll it. Return whether this server follows the task.

        If the answer to the POST was lost, the callback names the entry's task.
        """
        job = self.job_of(key)
        entry = job.entry if job is not None else await self._writer.entry_by_key(key)
        if entry is None or entry.phase in (Phase.REFUSED, Phase.UNSENT, Phase.EXTERNAL):
            return False
        if not self._journal.is_linked(entry.account):  # a studio with another key of the profile serves it
            return False
        if entry.task is None or entry.is_unconfirmed:
            self._purchaser.reconciler.add_callback(key, task_id)
        if job is not None:
            is_own_task = entry.task_id == task_id
            if job.callback is not Callback.NONE:
                job.callback = Callback.RECEIVED if is_own_task else Callback.EXPECTED
            if is_own_task and not job.has_remote_owner:
                job.poll_now()
                return True
        elif entry.phase in (Phase.SENDING, Phase.UNKNOWN):
            # The owner may be dead and not know the task. Then this server continues the entry with the callback.
            await self.resume(entry)
        elif entry.is_unconfirmed and entry.task_id == task_id:
            await self.confirm(Job(entry))
        return False

    async def _acquire(self, key: str, *, if_unknown: bool = False) -> bool:
        """Become the owner of an entry. Return `if_unknown` if the journal cannot be used."""
        try:
            return await self._journal.acquire(key)
        except JournalUnwritable as error:
            log.warning("%s", error.message)
            return if_unknown

    def _begin(
        self,
        entry: Entry,
        act: Callable[[Job], Awaitable[None]],
        *,
        client: str | None = None,
        is_audited: bool = False,
    ) -> Job:
        job = Job(entry)
        # Before the coroutine starts, so that an entry never gets a second job.
        self.jobs.append(job)
        with without_deadline():
            # The job continues after the call that began it.
            self._group.start_soon(self._run, job, act, client, is_audited)
        return job

    async def _run(self, job: Job, act: Callable[[Job], Awaitable[None]], client: str | None, is_audited: bool) -> None:
        try:
            job.problem = await guarded(act, job) or job.problem
        finally:
            if is_audited:
                self._writer.events.publish(Finished(job.entry, client, self._timing.clock()))
        await self._writer.release(job)
        # An identical request may have joined the job after its images were saved.
        while job.copy_name is not None and await self._acquire(job.entry.key):
            job.problem = await guarded(self._saver.save_copies, job) or job.problem
            await self._writer.release(job)
        # Callers that `finish` wakes must not find this job with `job_of`.
        self.jobs.remove(job)
        job.finish()
        self._repeat_later(job)

    async def _buy(self, job: Job) -> None:
        await self._purchaser.buy(job)
        if job.entry.task is not None:
            job.record_answer(is_running=True)
            # The decoder starts while EvoLink works, and the poll does not wait for it.
            self._group.start_soon(guarded, self._saver.prepare)
        await self._follow(job)

    async def _continue(self, job: Job) -> None:
        """Continue an entry that this server owns. It buys nothing."""
        if job.entry.phase == Phase.INTENT:
            await self._writer.record_phase(job, Phase.UNSENT, error=INTERRUPTED)
        elif job.entry.phase in (Phase.SENDING, Phase.UNKNOWN):
            await self._purchaser.reconciler.reconcile(job)
        await self._follow(job)

    async def _follow(self, job: Job) -> None:
        """Follow the task, if there is one, until it is settled, and save its images."""
        if job.entry.task is None:
            return
        is_owner = False
        with anyio.CancelScope() as job.following_scope:
            try:
                await self._follow_and_save(job)
                is_owner = True
            except TaskKnown:
                await self._find_owner_of_task(job)
        job.following_scope = None
        # Either the lease is lost, or another entry has the task.
        if not is_owner:
            await self._watch_remote(job)

    async def _follow_and_save(self, job: Job) -> None:
        """Follow the task and save its images.

        Raises:
            TaskKnown: another entry has the task.
        """
        assert job.entry.task is not None
        await self._follower.follow(job)
        if await self._purchaser.reconciler.refute(job):
            return
        # A failed task may have images too.
        if job.entry.task.results or job.entry.task.status == COMPLETED:
            job.move_to(JobState.SAVING)
            await self._saver.save(job)
            # The download shows the pixels, which may contradict the request too.
            if await self._purchaser.reconciler.refute(job):
                return
        if job.copy_name is not None:
            await self._saver.save_copies(job)

    async def _find_owner_of_task(self, job: Job) -> None:
        """Another entry has the job's task: it is the same external task, or its own answer disproved a match."""
        entry = job.entry
        newest = None
        if entry.phase == Phase.EXTERNAL and entry.task is not None:
            with suppress(JournalUnwritable):
                newest = await self._writer.entry_by_task(entry.task.id)
        else:
            newest = await self._writer.entry_by_key(entry.key)
        job.change_to(newest or entry)

    async def _watch_remote(self, job: Job) -> None:
        """Watch an entry of another server. Continue it when its owner is dead."""
        job.move_to(JobState.WATCHING)
        is_poll_due = True
        while True:
            entry = await self._writer.entry_by_key(job.entry.key) or job.entry
            if entry.task is not None:
                entry = replace(entry, task=_newer_task(job.entry, entry.task))
            task = entry.task
            if is_poll_due and task is not None and not task.settled:
                with suppress(EvolinkError):  # the answer is only shown, its owner records it
                    entry = replace(entry, task=await self._follower.read_once(task))
                    job.record_answer(is_running=False)
            if entry != job.entry:
                self._writer.show_remote_entry(job, entry)
            if await self._acquire(entry.key):
                break
            # Each poll makes EvoLink query its provider, so only a caller's question causes a further one.
            is_poll_due = await job.rest(self._journal.reread_s, self._timing.idle)
        job.change_to(await self._writer.entry_by_key(job.entry.key) or job.entry)
        job.become_owner()
        if job.entry.has_work(self._timing.clock()) or job.copy_name is not None:
            self._writer.events.publish(Adopted(job.entry))
            await self._continue(job)

    def _receive(self, notification: Notification) -> None:
        """Another server of the profile published something."""
        job = self.job_of(notification.key)
        if notification.is_callback and notification.task_id is not None:
            self._group.start_soon(guarded, self.receive_callback, notification.key, notification.task_id)
        elif job is None:
            if notification.task_id is not None:
                self._writer.events.publish(Changed(notification.task_id))
        elif job.has_remote_owner and notification.task is not None:
            self._writer.show_remote_entry(job, replace(job.entry, task=_newer_task(job.entry, notification.task)))
        elif job.has_remote_owner:
            job.wake()

    def _stop_following(self) -> None:
        """Other servers may adopt this server's entries: watch them from now on. A purchase continues to its end."""
        for job in self.jobs:
            if job.following_scope is not None:
                job.following_scope.cancel()

    def _repeat_later(self, job: Job) -> None:
        """Repeat an unfinished job, more and more slowly, until the links of its images have expired."""
        entry = job.entry
        is_unfinished = entry.is_written and entry.task is not None and entry.stage is not Stage.FINAL
        # Without a problem, EvoLink reports the task as completed and sends no links yet.
        is_repeatable = entry.stage is Stage.OPEN if job.problem is None else job.problem.code not in FINAL_PROBLEMS
        if not is_unfinished or not is_repeatable or entry.key in self._repeat_keys:
            return
        repeats = self._repeats.get(entry.key, 0)
        self._repeats[entry.key] = repeats + 1
        if repeats < SLOW_REPEATS_MAX:
            self._repeat_keys.add(entry.key)
            self._group.start_soon(self._repeat, entry.key, slower_s(REPEAT_AFTER_S, repeats))

    async def _repeat(self, key: str, delay_s: float) -> None:
        await self._timing.idle(delay_s)
        self._repeat_keys.discard(key)
        entry = await self._writer.entry_by_key(key)
        if entry is not None and entry.stage is not Stage.FINAL and not self.job_of(key):
            await self.resume(entry)


def _newer_task(entry: Entry, task: Task) -> Task:
    """Return the state of the entry's task after another server described it."""
    return merge(entry.task, task) if entry.task is not None and entry.task.id == task.id else task
