"""What happens to a job is written into the journal and told to whoever waits: one observer for every step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from evolink_mcp.api.task import Task
from evolink_mcp.errors import JournalUnwritable, Problem
from evolink_mcp.journal.contract import Journal
from evolink_mcp.journal.entry import Entry, Phase, Picture, new_key
from evolink_mcp.studio.jobs import Job

log = logging.getLogger(__name__)


class Recorder:
    """Hears of everything that happens to a job. `announce` is called with every new state of an entry.

    Only `sending` refuses when the journal cannot be written. Afterwards the purchase is on disk already and the
    pictures are in their folder, so the caller gets the result and the log names what was not written.
    """

    def __init__(self, journal: Journal, announce: Callable[[Entry], None]) -> None:
        self._journal = journal
        self._announce = announce

    def known(self, task_id: str) -> Entry | None:
        """The task's entry as the journal has it now; None if it has none or cannot be read."""
        with suppress(JournalUnwritable):
            return self._journal.by_task(task_id)
        return None

    def sending(self, job: Job) -> None:
        """The request is about to be sent.

        Raises:
            JournalUnwritable: it could not be written down, so the request must not be sent.
        """
        entry = replace(job.entry, phase="sending")
        self._journal.update(entry)
        self._changed(job, entry)

    def phase_changed(self, job: Job, phase: Phase, *, task: Task | None = None, error: Problem | None = None) -> None:
        """EvoLink's answer to the request, or its absence, has put the entry into `phase`.

        If this cannot be written, the journal still says `sending`, and the next start asks EvoLink.
        """
        entry = replace(job.entry, phase=phase, task=task, error=error)
        try:
            self._journal.update(entry)
        except JournalUnwritable as problem:
            log.error("%s of %s could not be written down: %s", phase, entry.task_id or entry.key, problem.what)
        self._changed(job, entry)

    def task_seen(self, job: Job, task: Task) -> None:
        """EvoLink has told the task's state. Only a new status or new links are written."""
        before = job.entry.task
        entry = replace(job.entry, task=task)
        if not entry.is_written:
            created = task.created or entry.created_at
            entry = replace(entry, key=new_key(), owner=self._journal.owner, created_at=created)
            self.softly(lambda: self._journal.intend(entry))
        elif before is None or (before.status, before.results) != (task.status, task.results):
            self.softly(lambda: self._journal.update(entry))
        self._changed(job, entry)

    def pictures_changed(self, job: Job, pictures: tuple[Picture, ...]) -> None:
        """A picture was saved, or could not be."""
        entry = replace(job.entry, pictures=pictures)
        self.softly(lambda: self._journal.keep(entry))
        self._changed(job, entry)

    def delivered(self, job: Job, at: float) -> None:
        """A caller has the result, since `at` (epoch seconds)."""
        job.change_to(replace(job.entry, delivered_at=at))
        self.softly(lambda: self._journal.deliver(job.entry.key, at))

    def softly(self, write: Callable[[], object]) -> None:
        """Call `write`; that the journal cannot be used is worth a line in the log only."""
        try:
            write()
        except JournalUnwritable as error:
            log.warning("%s", error.what)

    def _changed(self, job: Job, entry: Entry) -> None:
        job.change_to(entry)
        self._announce(entry)
