"""What happens to a job is written into the journal and told to whoever waits: one observer for every step."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

import anyio

from evolink_mcp.api.task import Task
from evolink_mcp.errors import JournalUnwritable, Problem, TaskKnown
from evolink_mcp.journal.entry import Entry, Phase, ResultImage, new_key
from evolink_mcp.journal.journal import Journal, Notification
from evolink_mcp.studio.jobs import Job, Sleep

log = logging.getLogger(__name__)

WRITE_AGAIN_AFTER_S = 2.0
TAKEN = "another server works on this order"


class JournalWriter:
    """Hears of everything that happens to a job. `announce` is called with the task of every new state.

    Only `sending` refuses when the journal cannot be written. Afterwards the purchase is on disk already and the
    pictures are in their folder, so the caller gets the result, and what could not be written is written as soon as
    that is possible.

    While a write is awaited the job may change: every method therefore changes the fields that it is about, and no
    other.
    """

    def __init__(self, journal: Journal, announce: Callable[[str], None]) -> None:
        self._journal = journal
        self._announce = announce
        self._unwritten: dict[str, Job] = {}
        self._something_unwritten = anyio.Event()

    async def known(self, task_id: str) -> Entry | None:
        """The task's entry as it is known now; None if the journal has none or cannot be read."""
        for job in self._unwritten.values():
            if job.entry.task_id == task_id:
                return job.entry
        with suppress(JournalUnwritable):
            return await self._journal.by_task(task_id)
        return None

    async def known_by_key(self, key: str) -> Entry | None:
        """The entry as it is known now; None if the journal has none or cannot be read.

        What could not be written down yet is newer than what the journal has.
        """
        if key in self._unwritten:
            return self._unwritten[key].entry
        with suppress(JournalUnwritable):
            return await self._journal.by_key(key)
        return None

    def is_unwritten(self, key: str) -> bool:
        """Whether the journal still has an older state of this entry."""
        return key in self._unwritten

    @property
    def has_unwritten(self) -> bool:
        """Whether anything could not be written down yet."""
        return bool(self._unwritten)

    async def sending(self, job: Job) -> None:
        """The request is about to be sent.

        Raises:
            JournalUnwritable: it could not be written down, so the request must not be sent.
        """
        if not await self._journal.update(replace(job.entry, phase=Phase.SENDING)):
            raise JournalUnwritable(TAKEN, advice="Call again: you will get what that server buys.")
        self._changed(job, replace(job.entry, phase=Phase.SENDING))

    async def phase_changed(
        self, job: Job, phase: Phase, *, task: Task | None = None, error: Problem | None = None
    ) -> None:
        """EvoLink's answer to the request, or its absence, has put the entry into `phase`.

        It is written even if the caller is cancelled meanwhile.

        Raises:
            TaskKnown: another entry has this task; nothing is changed.
        """
        with anyio.CancelScope(shield=True):
            entry = replace(job.entry, phase=phase, task=task, error=error)
            await self._write(job, entry, self._journal.update)
        self._changed(job, replace(job.entry, phase=phase, task=task, error=error))

    async def task_seen(self, job: Job, task: Task) -> None:
        """EvoLink has told the task's state. Only a settled status or new links are written.

        Raises:
            TaskKnown: another server has just written down the same task, which was bought elsewhere.
        """
        before = job.entry.task
        entry = replace(job.entry, task=task)
        if not entry.is_written:
            created = task.created or entry.created_at
            journal = self._journal
            entry = replace(entry, key=new_key(), owner=journal.owner, account=journal.account, created_at=created)
            await self.softly(self._journal.intend(entry))
            self._changed(job, entry)
            return
        if entry != job.entry:
            self._changed(job, entry)
        settles = before is None or (before.status != task.status and task.settled)
        if settles or (before is not None and before.results != task.results):
            await self._write(job, entry, self._journal.update)
        elif before != task:
            await self.softly(self._journal.publish(Notification(entry.key, task.id, task)))

    def seen_elsewhere(self, job: Job, entry: Entry) -> None:
        """Another server has changed the entry that this job watches; nothing is written."""
        self._changed(job, entry)

    def told_elsewhere(self, task_id: str) -> None:
        """Another server has changed the entry of this task, which no job here is about."""
        self._announce(task_id)

    def pictures_expected(self, job: Job, pictures: tuple[ResultImage, ...]) -> None:
        """These pictures are about to be fetched. They follow from the task, so nothing is written."""
        if pictures != job.entry.images:
            self._changed(job, replace(job.entry, images=pictures))

    async def pictures_changed(self, job: Job, pictures: tuple[ResultImage, ...]) -> None:
        """A picture was saved, or could not be."""
        if pictures != job.entry.images:
            self._changed(job, replace(job.entry, images=pictures))
            await self._write(job, job.entry, self._journal.update_images)

    async def confirmed(self, job: Job) -> None:
        """Somebody has looked at a guess by its id, so it counts as this purchase's task from now on."""
        self._changed(job, replace(job.entry, error=None))
        await self._write(job, job.entry, self._journal.update)

    async def delivered(self, job: Job, at: float) -> None:
        """A caller has the result, since `at` (epoch seconds)."""
        job.change_to(replace(job.entry, delivered_at=at))
        await self.softly(self._journal.deliver(job.entry.key, at))

    async def ended(self, job: Job) -> None:
        """This server has nothing left to do for the entry now. What is not written down yet stays its own."""
        if job.entry.is_written and not self.is_unwritten(job.entry.key):
            await self.softly(self._journal.release(job.entry.key))

    async def softly(self, write: Awaitable[object]) -> None:
        """Await `write`; that the journal cannot be used is worth a line in the log only."""
        try:
            await write
        except JournalUnwritable as error:
            log.warning("%s", error.message)

    async def write_what_was_not(self, sleep: Sleep) -> None:
        """For ever: write what could not be written, as soon as it can be."""
        while True:
            await self._something_unwritten.wait()
            await sleep(WRITE_AGAIN_AFTER_S)
            await self.flush()

    async def flush(self) -> None:
        """Try once to write the newest state of everything that could not be written."""
        for key, job in list(self._unwritten.items()):
            if self._unwritten.get(key) is not job:
                continue  # written meanwhile
            try:
                await self._write(job, job.entry, self._journal.update_images)
            except TaskKnown as error:
                log.warning("%s was not written down: %s", job.entry.phase, error.message)
            if key not in self._unwritten and job.finished:
                await self.softly(self._journal.release(key))
        if not self._unwritten:
            self._something_unwritten = anyio.Event()

    async def _write(self, job: Job, entry: Entry, write: Callable[[Entry], Awaitable[bool]]) -> None:
        try:
            if not await write(entry):
                log.warning("%s was not written down: %s", entry.phase, TAKEN)
        except JournalUnwritable as error:
            log.error("%s of %s could not be written down: %s", entry.phase, entry.task_id or entry.key, error.message)
            self._unwritten[entry.key] = job
            self._something_unwritten.set()
        except TaskKnown:
            self._unwritten.pop(entry.key, None)
            raise
        else:
            self._unwritten.pop(entry.key, None)

    def _changed(self, job: Job, entry: Entry) -> None:
        job.change_to(entry)
        if entry.task_id is not None:
            self._announce(entry.task_id)
