"""Record each step of a job in the journal, change the job and publish the event."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

import anyio

from evolink_mcp.api.task import Task
from evolink_mcp.errors import JournalUnwritable, Problem, TaskKnown
from evolink_mcp.journal.entry import Entry, Phase, ResultImage, new_key
from evolink_mcp.journal.journal import Journal, Learn, Undelivered
from evolink_mcp.studio.events import Changed, Delivered, Events
from evolink_mcp.studio.jobs import Job, JobState, Sleep

log = logging.getLogger(__name__)

# The waits before a refused write is repeated, each twice the last. Two repeats are within the second in which another
# server waits for the end of a call.
WRITE_AGAIN_AFTER_S = 0.25
WRITE_AGAIN_MAX_S = 2.0
OWNED_BY_OTHER = "another server works on this order"


class JournalWriter:
    """Record each step of a job in the journal, change the job and publish the event.

    Only `record_sending` refuses if the journal cannot be written. After it the purchase is on disk, so the caller gets
    the result, and `flush_loop` writes the rest when the journal works again.

    A job can change while a write is in progress. Therefore each method changes only the fields of its step.
    """

    def __init__(self, journal: Journal, events: Events, learn: Learn | None = None) -> None:
        """`learn` returns the facts about the account that a new state of an entry changes."""
        self.journal = journal
        self.events = events
        self._learn = learn
        self._unwritten: dict[str, Job] = {}
        self._departed: set[str] = set()  # keys of entries without a waiting call, for the journal
        self._withdrawn: set[str] = set()  # keys of entries without a purchase, for the journal
        self._deliveries: dict[str, float] = {}  # times of deliveries that the journal could not record
        self._has_unwritten = anyio.Event()

    async def entry_by_task(self, task_id: str) -> Entry | None:
        """Return the newest state of the task's entry. None: the journal has no entry of this task.

        Raises:
            JournalUnwritable: the journal cannot be read.
        """
        for job in self._unwritten.values():
            if job.entry.task_id == task_id:
                return job.entry
        return await self.journal.by_task(task_id)

    async def entry_by_key(self, key: str) -> Entry | None:
        """Return the newest state of an entry. None: it does not exist, or the journal cannot be read."""
        if key in self._unwritten:
            return self._unwritten[key].entry
        with suppress(JournalUnwritable):
            return await self.journal.by_key(key)
        return None

    def is_unwritten(self, key: str) -> bool:
        """Return whether the journal holds an older state of this entry."""
        return key in self._unwritten

    @property
    def has_unwritten(self) -> bool:
        """Whether the journal holds an older state of any entry."""
        return bool(self._unwritten or self._departed or self._deliveries or self._withdrawn)

    async def undelivered(self, fingerprint: str, since: float) -> Undelivered:
        """Return the newest state of identical purchases that no caller got.

        Raises:
            JournalUnwritable: earlier purchases are unknown.
        """
        undelivered = await self.journal.undelivered((fingerprint,), since)
        # A call may end during the read, so check its end after it.
        entries = [
            entry for entry in undelivered.entries if entry.caller != self.journal.owner or entry.key in self._departed
        ]
        newest = [
            replace(self._unwritten[entry.key].entry, caller=entry.caller) if entry.key in self._unwritten else entry
            for entry in entries
        ]
        newest = [entry for entry in newest if entry.key not in self._deliveries and entry.delivered_at is None]
        return replace(undelivered, entries=newest)

    async def claim(self, entry: Entry) -> bool:
        """Let a call of this server wait for an undelivered entry. Return False if another call waits for it.

        Raises:
            JournalUnwritable: it was not recorded.
        """
        # Otherwise a repeated write of the departure could follow the claim and undo it.
        self._departed.discard(entry.key)
        try:
            is_claimed = await self.journal.claim(entry.key, entry.caller)
        except JournalUnwritable:
            # The claim may be recorded although its answer was lost. It would hide the entry from identical calls.
            self._departed.add(entry.key)
            self._has_unwritten.set()
            raise
        if is_claimed:
            self._departed.discard(entry.key)  # another claim may have failed meanwhile
        return is_claimed

    async def remove_caller(self, key: str) -> None:
        """No call of this server waits for the entry any more. An identical call can claim it from now on."""
        self._departed.add(key)
        await self._remove_caller(key)

    def withdraw(self, key: str) -> None:
        """The journal did not confirm this new entry, so its purchase does not begin. It may be recorded: end it later."""
        self._withdrawn.add(key)
        self._has_unwritten.set()

    async def record_sending(self, job: Job) -> None:
        """The POST is about to start.

        Raises:
            JournalUnwritable: the journal did not record it, so the POST must not start.
        """
        is_recorded = await self.journal.update(replace(job.entry, phase=Phase.SENDING))
        # This process may have been frozen since the write. Then another server owns the entry now.
        if not is_recorded or not self.journal.has_lease:
            raise JournalUnwritable(OWNED_BY_OTHER, advice="Call again to get the purchase of that server.")
        job.move_to(JobState.SENDING)
        self._change(job, replace(job.entry, phase=Phase.SENDING))

    async def record_phase(
        self, job: Job, phase: Phase, *, task: Task | None = None, error: Problem | None = None
    ) -> None:
        """The POST has a new outcome. A cancellation does not stop this write.

        Raises:
            TaskKnown: another entry has this task. Nothing is changed.
        """
        with anyio.CancelScope(shield=True):
            entry = replace(job.entry, phase=phase, task=task, error=error)
            await self._write(job, entry, self.journal.update)
        if phase == Phase.SUBMITTED:
            job.move_to(JobState.RUNNING)
        elif phase == Phase.INTENT:
            job.move_to(JobState.PREPARED)
        self._change(job, replace(job.entry, phase=phase, task=task, error=error))

    async def record_poll(self, job: Job, task: Task) -> None:
        """EvoLink described the task. The journal records a settled status and new links. Other servers learn every change.

        Raises:
            TaskKnown: another server recorded the same external task at the same time.
        """
        before = job.entry.task
        entry = replace(job.entry, task=task)
        if not entry.is_written:
            journal = self.journal
            created_at = task.created or entry.created_at
            entry = replace(entry, key=new_key(), owner=journal.owner, account=journal.account, created_at=created_at)
            await self.ignore_unwritable(self.journal.intend(entry))
            self._change(job, entry)
            return
        if entry != job.entry:
            self._change(job, entry)
        # Only these changes cost a write. All others are visible in the next poll.
        is_settled = before is None or (before.status != task.status and task.settled)
        if is_settled or (before is not None and before.results != task.results):
            await self._write(job, entry, self.journal.update)
        if before != task:
            self.journal.publish_progress(entry.key, task)

    def show_remote_entry(self, job: Job, entry: Entry) -> None:
        """Another server changed the entry that this job watches."""
        self._change(job, entry)

    def show_images(self, job: Job, images: tuple[ResultImage, ...]) -> None:
        """The download of these images starts. They follow from the task, so the journal records nothing."""
        if images != job.entry.images:
            self._change(job, replace(job.entry, images=images))

    async def record_images(self, job: Job, images: tuple[ResultImage, ...]) -> None:
        """An image was saved or failed."""
        if images != job.entry.images:
            self._change(job, replace(job.entry, images=images))
            await self._write(job, job.entry, self.journal.update_images)

    async def withdraw_match(self, job: Job, problem: Problem) -> None:
        """The unconfirmed match was wrong: the outcome is unknown again, and the images do not belong to the entry."""
        self._change(job, replace(job.entry, phase=Phase.UNKNOWN, task=None, images=(), error=problem))
        await self._write(job, job.entry, self.journal.update_images)

    async def record_confirmation(self, job: Job) -> None:
        """A caller or a callback confirmed the unconfirmed match."""
        self._change(job, replace(job.entry, error=None))
        await self._write(job, job.entry, self.journal.update)

    async def record_delivery(self, job: Job, at: float) -> None:
        """A caller has the result since `at` (epoch seconds)."""
        job.change_to(replace(job.entry, delivered_at=at))
        await self._deliver(job.entry.key, at)
        self.events.publish(Delivered(job.entry))

    async def release(self, job: Job) -> None:
        """This server stops its work on the entry. It stays the owner while the journal holds an older state."""
        if job.entry.is_written and not self.is_unwritten(job.entry.key):
            await self.ignore_unwritable(self.journal.release(job.entry.key))

    async def ignore_unwritable(self, write: Awaitable[object]) -> None:
        """Await a write that is not necessary. Log it if the journal cannot be used."""
        try:
            await write
        except JournalUnwritable as error:
            log.warning("%s", error.message)

    async def flush_loop(self, sleep: Sleep) -> None:
        """Repeat failed writes until the coroutine is cancelled."""
        while True:
            await self._has_unwritten.wait()
            wait_s = WRITE_AGAIN_AFTER_S
            # `flush` replaces the event when everything is written.
            while self._has_unwritten.is_set():
                await sleep(wait_s)
                await self.flush()
                wait_s = min(2 * wait_s, WRITE_AGAIN_MAX_S)

    async def flush(self) -> None:
        """Try once to write the newest state of each unwritten entry."""
        for key, job in list(self._unwritten.items()):
            if self._unwritten.get(key) is not job:
                continue  # its own job wrote it during this loop
            try:
                await self._write(job, job.entry, self.journal.update_images)
            except TaskKnown as error:
                log.warning("%s was not recorded: %s", job.entry.phase, error.message)
            if key not in self._unwritten and job.is_finished:
                await self.ignore_unwritable(self.journal.release(key))
        for key, at in list(self._deliveries.items()):
            await self._deliver(key, at)
        for key in list(self._departed):
            if key in self._departed:  # no call claimed it during this loop
                await self._remove_caller(key)
        with suppress(JournalUnwritable):
            for key in list(self._withdrawn):
                await self.journal.withdraw(key)
                self._withdrawn.discard(key)
        if not self.has_unwritten:
            self._has_unwritten = anyio.Event()

    async def _deliver(self, key: str, at: float) -> None:
        try:
            await self.journal.deliver(key, at)
        except JournalUnwritable as error:
            log.warning("the delivery of %s was not recorded: %s", key, error.message)
            self._deliveries[key] = at
            self._has_unwritten.set()
        else:
            self._deliveries.pop(key, None)

    async def _remove_caller(self, key: str) -> None:
        try:
            await self.journal.remove_caller(key)
        except JournalUnwritable as error:
            log.warning("the end of the call for %s was not recorded: %s", key, error.message)
            self._has_unwritten.set()
        else:
            self._departed.discard(key)

    async def _write(self, job: Job, entry: Entry, write: Callable[[Entry, Learn | None], Awaitable[bool]]) -> None:
        try:
            if not await write(entry, self._learn):
                log.warning("%s was not recorded: %s", entry.phase, OWNED_BY_OTHER)
        except JournalUnwritable as error:
            log.error("%s of %s was not recorded: %s", entry.phase, entry.task_id or entry.key, error.message)
            self._unwritten[entry.key] = job
            self._has_unwritten.set()
        except TaskKnown:
            self._unwritten.pop(entry.key, None)
            raise
        else:
            self._unwritten.pop(entry.key, None)

    def _change(self, job: Job, entry: Entry) -> None:
        job.change_to(entry)
        if entry.task_id is not None:
            self.events.publish(Changed(entry.task_id))
