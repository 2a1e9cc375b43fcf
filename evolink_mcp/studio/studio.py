"""The steps of an order: ask, write it down, pay, write it down, read until settled, fetch, save.

Only this module knows their order.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.task import COMPLETED, Balance, Task
from evolink_mcp.errors import EvolinkError, KeyMissing, Problem
from evolink_mcp.journal.contract import Journal
from evolink_mcp.journal.entry import Entry, fingerprint, new_key
from evolink_mcp.pictures.folders import Folders
from evolink_mcp.pictures.references import References
from evolink_mcp.studio.collect import Collector
from evolink_mcp.studio.jobs import Job, Order, Sleep
from evolink_mcp.studio.poller import Poller
from evolink_mcp.studio.purchase import Budget, Purchases
from evolink_mcp.studio.recorder import Recorder
from evolink_mcp.studio.watch import Watcher

log = logging.getLogger(__name__)

RECOVER_AFTER_S = 1.0
RECOVER_WITHIN_S = 48 * 3600
SUBMIT_GRACE_S = 1.0
INTERNAL_FAULT = Problem("internal_error", "the server had an internal fault", True, "Call get_task with the id.")
INTERRUPTED = Problem("interrupted", "the server ended before anything was sent", True, "Call again.")

Subscriber = Callable[[Entry], Awaitable[None]]


class Studio:
    """Makes pictures for one account. Use as an async context manager. The next studio resumes what is unfinished.

    `rule` is the size rule that prices are computed by. `locks` is the folder of the task locks. `key_problem` says
    why there is no usable key, if so. `budget` holds the owner's caps.
    """

    def __init__(
        self,
        client: EvolinkClient,
        journal: Journal,
        folders: Folders,
        references: References,
        budget: Budget,
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
        self.budget = budget
        self.rule = rule
        self._recorder = Recorder(journal, self._announce)
        self._purchases = Purchases(client, journal, self._recorder, budget, sleep=sleep)
        self._references = references
        self._locks, self._sidecars = locks, sidecars
        self._key_problem = key_problem
        self._clock, self._sleep = clock, sleep
        self._jobs: list[Job] = []
        self._subscribers: list[Subscriber] = []
        self._woken = anyio.Event()

    async def __aenter__(self) -> Studio:
        self._life = self._live()
        await self._life.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._life.__aexit__(*exc)

    @asynccontextmanager
    async def _live(self) -> AsyncGenerator[None]:
        timing: Any = {"clock": self._clock, "sleep": self._sleep}
        try:
            async with anyio.create_task_group() as self._group:
                poller = Poller(self.client, self._group, sleep=self._sleep)
                self._watcher = Watcher(poller, self._recorder, **timing)
                self._collector = Collector(
                    self.client, self.folders, self._recorder, locks=self._locks, sidecars=self._sidecars, **timing
                )
                self._group.start_soon(self._recover_later)
                try:
                    yield
                finally:
                    with anyio.CancelScope(shield=True), anyio.move_on_after(SUBMIT_GRACE_S):
                        await self._requests_answered()
                    self._group.cancel_scope.cancel()
        finally:
            self.journal.close()

    async def _requests_answered(self) -> None:
        """Wait until no paid request is on its way any more."""
        for job in list(self._jobs):
            async with aclosing(job.states()) as states:
                async for entry in states:
                    if entry.phase != "sending":
                        break

    # --- what callers ask for ---

    async def order(self, order: Order) -> Job:
        """Buy a picture, or hand over an identical one that was bought and never delivered.

        Raises:
            EvolinkError: nothing was sent, and the error says why. Whatever happens later is told by the job.
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
        self._purchases.check_caps(order.price, order.max_credits, self._clock())
        body = await self._references.upload(checked)
        entry = Entry(
            key=new_key(),
            owner=self.journal.owner,
            phase="intent",
            created_at=self._clock(),
            fingerprint=mark,
            request=body,
            estimate=order.price.credits,
            save_as=order.save_as,
            attended=True,
        )
        self._purchases.intend(entry)
        return self._start(entry)

    async def resume(self, task_id: str) -> Job:
        """The job of the task with this id: finished, under way, or bought elsewhere with the same key.

        Raises:
            KeyMissing: something is left to do at EvoLink, and there is no key.
        """
        self._woken.set()
        if (job := next((job for job in self._jobs if job.entry.task_id == task_id), None)) is not None:
            return job
        entry = self._recorder.known(task_id)
        if entry is None:
            entry = Entry.bought_elsewhere(Task(task_id, status="unknown"), self._clock())
        if entry.has_work(self._clock()):
            self._need_key()
        return self._start(entry)

    def deliver(self, job: Job) -> None:
        """The caller has the result: no identical order gets it again."""
        if job.entry.is_written and job.entry.delivered_at is None:
            self._recorder.delivered(job, self._clock())

    @contextmanager
    def attending(self, job: Job) -> Generator[None]:
        """A call waits for this job. If the last call ends without the result, the next identical order gets it."""
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
            self._recorder.softly(partial(self.journal.leave, entry.key))

    async def sync(self, limit: int) -> tuple[list[Task], str | None]:
        """Read the account's task list, and look again for the tasks of lost answers.

        Returns the account's tasks that the journal does not know, and why the list could not be read, if so.
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
        """A caller is here: take over what a server left that is not running any more."""
        if self._woken.is_set() and self.client.has_key:
            self._recorder.softly(self._take_over)
        self._woken.set()

    async def balance(self) -> Balance:
        """Credits left on the account and the key."""
        self._need_key()
        return await self.client.balance()

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call `subscriber` with every new state of every entry; what it raises is logged and ends nothing."""
        self._subscribers.append(subscriber)

    def _need_key(self) -> None:
        if not self.client.has_key:
            raise KeyMissing(self._key_problem or "no EvoLink API key is set")

    # --- jobs ---

    def _undelivered(self, mark: str) -> Job | None:
        """The job of what an identical order bought and nobody received; this caller now waits for it."""
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
        if entry.has_work(self._clock()):
            self._jobs.append(job)
            self._group.start_soon(self._carry_out, job)
        else:
            job.finish()
        return job

    async def _carry_out(self, job: Job) -> None:
        job.problem = await self._guarded(self._run, job) or job.problem
        self._jobs.remove(job)
        job.finish()

    async def _guarded(self, act: Callable[..., Awaitable[None]], *args: object) -> Problem | None:
        """Await `act` to its end and return what went wrong, if anything; nothing that it raises ends the server."""
        try:
            await act(*args)
        except EvolinkError as error:
            return error.problem
        except Exception:
            log.exception("something failed unexpectedly")
            return INTERNAL_FAULT
        return None

    async def _run(self, job: Job) -> None:
        phase = job.entry.phase
        if phase == "intent":
            await self._purchases.buy(job)
            job.heard_from = job.seen_running = job.entry.task is not None
        elif phase in ("sending", "unknown"):
            await self._purchases.reconcile(job)
        if job.entry.task is None:
            return
        await self._watcher.watch(job)
        if job.entry.task.status == COMPLETED:
            await self._collector.collect(job)

    def _announce(self, entry: Entry) -> None:
        for subscriber in self._subscribers:
            self._group.start_soon(self._guarded, subscriber, entry)

    # --- what an earlier server left ---

    async def _recover_later(self) -> None:
        with anyio.move_on_after(RECOVER_AFTER_S):
            await self._woken.wait()
        if self.client.has_key:
            self._recorder.softly(self._take_over)

    def _take_over(self) -> None:
        for entry in self.journal.adopt():
            if entry.phase == "intent":
                self._recorder.phase_changed(Job(entry), "unsent", error=INTERRUPTED)
            elif self._clock() - entry.created_at < RECOVER_WITHIN_S and not self._running(entry.key):
                log.info("taking up %s", entry.task_id or entry.key)
                self._start(entry)
