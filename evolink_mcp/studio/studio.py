"""The way: ask, write it down, pay, write it down, look until done, fetch, keep. Only this room knows the order."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.task import COMPLETED, Balance, Task
from evolink_mcp.errors import EvolinkError, JournalUnwritable, KeyMissing, Problem
from evolink_mcp.journal.contract import Journal
from evolink_mcp.journal.entry import Entry, Picture, fingerprint, new_key
from evolink_mcp.pictures.folders import Folders
from evolink_mcp.pictures.references import References
from evolink_mcp.studio.collect import Collector
from evolink_mcp.studio.jobs import Job, Order, Sleep
from evolink_mcp.studio.poller import Lookout
from evolink_mcp.studio.purchase import Till, price_of
from evolink_mcp.studio.watch import Watcher

log = logging.getLogger(__name__)

RECOVER_AFTER_S = 1.0
RECOVER_WITHIN_S = 48 * 3600
SUBMIT_GRACE_S = 1.0
INTERNAL_FAULT = Problem("internal_error", "the server had an internal fault", True, "Call get_task with the id.")


class Studio:
    """Makes pictures for one account. Use as an async context manager; what is unfinished at its end is resumed
    by the next one. `on_change` hears every new state of an entry."""

    def __init__(
        self,
        client: EvolinkClient,
        journal: Journal,
        folders: Folders,
        references: References,
        till: Till,
        *,
        rule: str = "anchor-edge",
        locks: Path | None = None,
        sidecars: bool = True,
        key_problem: str | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Sleep = anyio.sleep,
    ) -> None:
        self.client = client
        self.journal = journal
        self.folders = folders
        self.till = till
        self.rule = rule
        self.on_change: list[Callable[[Entry], Awaitable[None]]] = []
        self._references = references
        self._locks, self._sidecars = locks, sidecars
        self._key_problem = key_problem
        self._clock, self._sleep = clock, sleep
        self._jobs: list[Job] = []
        self._woken = anyio.Event()

    async def __aenter__(self) -> Studio:
        self._life = self._live()
        await self._life.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._life.__aexit__(*exc)

    @asynccontextmanager
    async def _live(self) -> AsyncIterator[None]:
        timing: Any = {"clock": self._clock, "sleep": self._sleep}
        try:
            async with anyio.create_task_group() as self._group:
                lookout = Lookout(self.client, self._group, sleep=self._sleep)
                self._watcher = Watcher(lookout, self._seen, **timing)
                self._collector = Collector(
                    self.client, self.folders, known=self._known, seen=self._seen, kept=self._kept,
                    locks=self._locks, sidecars=self._sidecars, **timing,
                )  # fmt: skip
                self._group.start_soon(self._recover_later)
                try:
                    yield
                finally:
                    with anyio.CancelScope(shield=True), anyio.move_on_after(SUBMIT_GRACE_S):
                        await self._paid()
                    self._group.cancel_scope.cancel()
        finally:
            self.journal.close()

    async def _paid(self) -> None:
        """Wait until no request is on its way any more."""
        for job in list(self._jobs):
            async with aclosing(job.states()) as states:
                async for entry in states:
                    if entry.phase != "sending":
                        break

    # --- what callers ask for ---

    async def order(self, order: Order) -> Job:
        """Buy a picture, or hand over an identical one that was bought and never delivered.

        Raises:
            EvolinkError: nothing was sent; the error says why. After this the job tells everything else.
        """
        self._need_key()
        self._woken.set()
        if order.save_as is not None:
            self.folders.target(order.save_as)
        checked = await self._references.check(order.request)
        mark = fingerprint(checked.identity)
        if not order.force_new:
            self._take_over()
            if (job := self._undelivered(mark)) is not None:
                return job
        price = price_of(order.request, self.rule)
        self.till.check(price, order.max_credits)
        self.till.afford(price, self._clock())
        body = await self._references.upload(checked)
        entry = Entry(
            key=new_key(),
            owner=self.journal.owner,
            phase="intent",
            created_at=self._clock(),
            fingerprint=mark,
            request=body,
            estimate=price.credits,
            save_as=order.save_as,
            attended=True,
        )
        self.till.open(entry)
        return self._start(entry)

    async def resume(self, task_id: str) -> Job:
        """The task with this id: finished and saved, under way, or bought elsewhere with the same key."""
        self._woken.set()
        if (job := next((job for job in self._jobs if job.entry.task_id == task_id), None)) is not None:
            return job
        entry = self._known(task_id)
        if entry is None:
            entry = Entry.bought_elsewhere(Task(task_id, status="unknown"), self._clock())
        if not entry.has_work(self._clock()):
            job = Job(entry)
            job.finish()
            return job
        self._need_key()
        return self._start(entry)

    def deliver(self, job: Job) -> None:
        """The caller has the result: it will not be handed over again."""
        if job.entry.is_written and job.entry.delivered_at is None:
            now = self._clock()
            job.turn(replace(job.entry, delivered_at=now))
            self._softly(partial(self.journal.deliver, job.entry.key, now))

    @contextmanager
    def attending(self, job: Job) -> Iterator[None]:
        """A call waits for this job. When the last one ends without the result, the next identical order gets it."""
        job.callers += 1
        try:
            yield
        finally:
            job.callers -= 1
            if not job.callers:
                self.leave(job.entry)

    def leave(self, entry: Entry) -> None:
        """Nobody waits for this entry's result any more."""
        if entry.is_written and entry.delivered_at is None:
            self._softly(partial(self.journal.leave, entry.key))

    async def sync(self, limit: int) -> tuple[list[Task], str | None]:
        """Compare with the account's own list, and try again to find what became of lost answers.

        Returns tasks of the account that the journal does not know, and why the list could not be had, if so.
        """
        self._need_key()
        lost = [entry for entry in self.journal.recent(limit, status="unknown") if entry.phase == "unknown"]
        for job in [self._start(entry) for entry in lost if not self._running(entry.key)]:
            async with aclosing(job.states()) as states:
                async for entry in states:
                    if entry.phase != "unknown":
                        break
        try:
            tasks = await self.client.recent_tasks()
        except EvolinkError as error:
            return [], error.what
        known = self.journal.known_tasks([task.id for task in tasks])
        return [task for task in tasks if task.id not in known], None

    def now(self) -> float:
        """The wall clock, in epoch seconds."""
        return self._clock()

    def wake(self) -> None:
        """A caller is here: take up what an earlier server left, or one that has died meanwhile."""
        if self._woken.is_set() and self.client.has_key:
            self._softly(self._take_over)
        self._woken.set()

    async def balance(self) -> Balance:
        """Credits left on the account and the key."""
        self._need_key()
        return await self.client.balance()

    def _need_key(self) -> None:
        if not self.client.has_key:
            raise KeyMissing(self._key_problem or "no EvoLink API key is set")

    # --- jobs ---

    def _undelivered(self, mark: str) -> Job | None:
        """What an identical order bought and nobody received, now attended by this caller."""
        for entry in self.journal.undelivered(mark):
            if entry.worth_joining(self._clock()) and self.journal.claim(entry.key):
                job = self._running(entry.key) or self._start(entry)
                job.joined = True
                return job
        return None

    def _running(self, key: str) -> Job | None:
        return next((job for job in self._jobs if job.entry.key == key), None)

    def _start(self, entry: Entry) -> Job:
        job = Job(entry)
        if not entry.has_work(self._clock()):
            job.finish()
            return job
        self._jobs.append(job)
        self._group.start_soon(self._carry, job)
        return job

    async def _carry(self, job: Job) -> None:
        job.problem = await self._guarded(self._run, job) or job.problem
        self._jobs.remove(job)
        job.finish()

    async def _guarded(self, act: Callable[..., Awaitable[None]], *args: object) -> Problem | None:
        """Do it to its end; whatever goes wrong is told, and is never the server's end."""
        try:
            await act(*args)
        except EvolinkError as error:
            return error.problem
        except Exception:
            log.exception("something failed unexpectedly")
            return INTERNAL_FAULT
        return None

    async def _run(self, job: Job) -> None:
        turn = partial(self._turn, job)
        if job.entry.phase == "intent":
            bought = await self.till.buy(job.entry, turn)
            job.fresh = job.witnessed = bought.phase == "submitted"
        elif job.entry.phase in ("sending", "unknown"):
            await self.till.reconcile(replace(job.entry, phase="unknown"), turn)
        if job.entry.task is None:
            return
        await self._watcher.watch(job)
        if job.entry.task.status == COMPLETED:
            await self._collector.collect(job)

    def _turn(self, job: Job, entry: Entry) -> None:
        # What the caller's side noted meanwhile must not be undone by the till's copy.
        job.turn(replace(entry, delivered_at=job.entry.delivered_at))
        for tell in self.on_change:
            self._group.start_soon(self._guarded, tell, job.entry)

    def _seen(self, job: Job, task: Task) -> None:
        """Note a task's new state; only a change of status or links is worth the disk."""
        before = job.entry.task
        entry = replace(job.entry, task=task)
        if not entry.is_written:
            created = task.created or entry.created_at
            entry = replace(entry, key=new_key(), owner=self.journal.owner, created_at=created)
            self._softly(partial(self.journal.intend, entry))
        elif before is None or (before.status, before.results) != (task.status, task.results):
            self._softly(partial(self.journal.update, entry))
        self._turn(job, entry)

    def _kept(self, job: Job, pictures: tuple[Picture, ...]) -> None:
        entry = replace(job.entry, pictures=pictures)
        self._softly(partial(self.journal.keep, entry))
        self._turn(job, entry)

    # --- what an earlier server left ---

    async def _recover_later(self) -> None:
        with anyio.move_on_after(RECOVER_AFTER_S):
            await self._woken.wait()
        if self.client.has_key:
            self._softly(self._take_over)

    def _take_over(self) -> None:
        for entry in self.journal.adopt():
            if entry.phase == "intent":
                problem = Problem("interrupted", "the server ended before anything was sent", True, "Call again.")
                self._softly(partial(self.journal.update, replace(entry, phase="unsent", error=problem)))
            elif self._clock() - entry.created_at < RECOVER_WITHIN_S and not self._running(entry.key):
                log.info("taking up %s", entry.task_id or entry.key)
                self._start(entry)

    def _known(self, task_id: str) -> Entry | None:
        with suppress(JournalUnwritable):
            return self.journal.by_task(task_id)
        return None

    def _softly(self, write: Callable[[], object]) -> None:
        """Do what is not worth failing for: the purchase itself is on disk, and the picture in its folder."""
        try:
            write()
        except JournalUnwritable as error:
            log.warning("%s", error.what)
