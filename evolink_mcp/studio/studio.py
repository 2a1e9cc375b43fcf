"""The steps of an order, whose order only this module knows: ask, write down, pay, write down, read, fetch, save."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import anyio

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.task import Balance, Task
from evolink_mcp.errors import EvolinkError, KeyMissing, Refused, TaskUnknown
from evolink_mcp.images.references import CheckedRequest, References
from evolink_mcp.images.store import ImageStore
from evolink_mcp.journal.entry import Entry, Phase, Stage, fingerprint, new_key, with_defaults
from evolink_mcp.journal.journal import Journal, Notification
from evolink_mcp.studio.deduplication import Joining
from evolink_mcp.studio.durations import DurationHistory
from evolink_mcp.studio.events import JournalWriter
from evolink_mcp.studio.jobs import ImageRequest, Job, Sleep, guarded
from evolink_mcp.studio.limits import Budget, Limits
from evolink_mcp.studio.poller import Poller
from evolink_mcp.studio.purchase import Purchaser
from evolink_mcp.studio.reconcile import Reconciler
from evolink_mcp.studio.runner import JobRunner
from evolink_mcp.studio.save import ImageSaver
from evolink_mcp.studio.size_rule import AUTO, SizeRule
from evolink_mcp.studio.watch import TaskFollower
from evolink_mcp.teams.callbacks import Callbacks
from evolink_mcp.teams.metrics import Audit, Metrics

log = logging.getLogger(__name__)

RECOVER_AFTER_S = 1.0
SUBMIT_GRACE_S = 1.0
CLOSE_GRACE_S = 0.3
SYNC_WAITS_S = 15.0

Subscriber = Callable[[str], Awaitable[None]]


class Studio:
    """Makes pictures for one account. Use as an async context manager. The next studio resumes what is unfinished.

    `rule` is the setting of the size rule. `key_problem` says why there is no usable key, if so. `budget`
    holds the owner's caps. `poller` reads for all studios of the account, if there are several. `sleep` waits
    within a job; `pause` between two tries of what could not be finished.
    """

    def __init__(
        self,
        client: EvolinkClient,
        journal: Journal,
        image_store: ImageStore,
        references: References,
        budget: Budget,
        *,
        rule: str = AUTO,
        preview_edge: int | None = None,
        callback_hosts: frozenset[str] | None = None,
        shared: bool = False,
        callbacks: Callbacks | None = None,
        key_problem: str | None = None,
        poller: Poller | None = None,
        metrics: Metrics | None = None,
        audit: Audit | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Sleep = anyio.sleep,
        pause: Sleep = anyio.sleep,
    ) -> None:
        self.client, self.journal, self.budget = client, journal, budget
        self.image_store, self.references = image_store, references
        self.size_rule = SizeRule(journal, rule)
        self._recorder = JournalWriter(journal, self._announce)
        lost = Reconciler(client, journal, self._recorder, shared=shared, sleep=sleep)
        self._durations = DurationHistory(journal)
        self._purchases = Purchaser(
            client, journal, self._recorder, budget, lost,
            callbacks=callbacks, sleep=sleep, metrics=metrics, pause=poller.pause if poller else None,
        )  # fmt: skip
        self._poller = poller
        self._preview_edge = preview_edge
        self._limits = Limits(budget.running, callback_hosts)
        self._shared = shared  # others spend from the account: what the journal does not have may be theirs
        self._key_problem = key_problem
        self._metrics, self._audit, self._draining = metrics, audit, False
        self.now = clock  # the wall clock, in epoch seconds
        self._clock, self._sleep, self._pause = clock, sleep, pause
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
        timing: Any = {"clock": self._clock, "sleep": self._sleep, "metrics": self._metrics}
        try:
            async with anyio.create_task_group() as self._group:
                poller = self._poller or Poller(
                    self.client, self._group, sleep=self._sleep, pause=self._purchases.pause, metrics=self._metrics
                )
                watcher = TaskFollower(poller, self._recorder, self._durations, **timing)
                collector = ImageSaver(
                    self.client, self.image_store, self._recorder, preview_edge=self._preview_edge, **timing
                )
                self._runner = JobRunner(
                    self.client, self.journal, self._recorder, self._purchases, watcher, collector, self.size_rule, self._group,
                    audit=self._audit, clock=self._clock, pause=self._pause,
                )  # fmt: skip
                self._joining = Joining(
                    self.journal, self._recorder, self._runner, clock=self._clock, sleep=self._sleep
                )
                self._group.start_soon(self._recorder.write_what_was_not, self._pause)
                self._group.start_soon(self._recover_later)
                try:
                    yield
                finally:
                    with anyio.CancelScope(shield=True), anyio.move_on_after(SUBMIT_GRACE_S):
                        await self._runner.requests_answered()
                    self._runner.stop_listening()
                    self._group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_GRACE_S):
                await self._durations.write()
                await self.journal.close()

    async def order(self, order: ImageRequest) -> Job:
        """Buy a picture, or hand over an identical one that was bought and never delivered.

        Raises:
            EvolinkError: nothing was sent, and the error says why. Whatever happens later is told by the job.
        """
        self._need_key()
        if self._draining:
            raise Refused("this server is about to end", code="draining", retryable=True, advice="Call again.")
        self._woken.set()
        if order.save_as is not None:
            self.image_store.check_name(order.save_as)
        self._limits.check_callback(order.request.callback_url)
        checked = await self.references.check(order.request)
        mark = fingerprint(with_defaults(checked.identity))
        if not order.force_new:
            job = await self._joining.job_for(order, (mark, fingerprint(checked.identity)))
            if job is not None:
                return job
        with self._limits.place(self._runner.jobs):
            return await self._bought(order, checked, mark)

    async def _bought(self, order: ImageRequest, checked: CheckedRequest, mark: str) -> Job:
        await self._purchases.check_caps(order.at_most, order.max_credits, self._clock())
        body = await self.references.upload_all(checked)
        entry = Entry(
            key=new_key(),
            owner=self.journal.owner,
            phase=Phase.INTENT,
            created_at=self._clock(),
            fingerprint=mark,
            request=body,
            estimate=order.at_most,
            save_as=order.save_as,
            account=self.journal.account,
            caller=self.journal.owner,
            rule=self.size_rule.current,
            references=checked.references(body),
        )
        await self._purchases.intend(entry)
        return self._runner.buy(entry, order.client)

    async def resume(self, task_id: str) -> Job:
        """The job of the task with this id: finished, under way, or bought elsewhere with the same key.

        Who asks for a finished guess by its id has looked at it: it counts as this purchase's task from then on.

        Raises:
            KeyMissing: something is left to do at EvoLink, and there is no key.
            TaskUnknown: others spend from this account too, and the journal does not have this task.
        """
        await self.wake()
        job = next((job for job in self._runner.jobs if job.entry.task_id == task_id), None)
        if job is None:
            entry = await self._recorder.known(task_id)
            if entry is None and self._shared:
                raise TaskUnknown(f"there is no task {task_id} here")
            if entry is None or entry.account != self.journal.account:
                entry = Entry.external(Task(task_id, status="unknown"), self._clock())
            if entry.has_work(self._clock()):
                self._need_key()
            job = await self._runner.go_on(entry)
        if job.entry.is_unconfirmed and job.entry.stage is not Stage.OPEN:
            await self._runner.confirm(job)
        return job

    async def entry(self, task_id: str) -> Entry | None:
        """A task's entry as it is now: as its job here has it, else as the journal has it; None if there is none.

        Raises:
            JournalUnwritable: the journal cannot be read.
        """
        job = next((job for job in self._runner.jobs if job.entry.task_id == task_id), None)
        return job.entry if job is not None else await self.journal.by_task(task_id)

    async def deliver(self, job: Job) -> None:
        """The caller has the result: no identical order gets it again. Without a key nothing is changed."""
        if self.client.has_key and job.entry.is_written and job.entry.delivered_at is None:
            await self._recorder.delivered(job, self._clock())

    @asynccontextmanager
    async def attending(self, job: Job) -> AsyncGenerator[None]:
        """A call waits for this job. If the last call ends without the result, the next identical order gets it."""
        self.attend(job)
        try:
            yield
        except anyio.get_cancelled_exc_class():
            if job.callers == 1:
                job.abandon()
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await self.depart(job)

    def attend(self, job: Job) -> None:
        """One more call waits for this job, until `depart`."""
        job.callers += 1

    async def depart(self, job: Job) -> None:
        """One call less waits for this job."""
        job.callers -= 1
        if not job.callers:
            await self.leave(job.entry)

    async def leave(self, entry: Entry) -> None:
        """Nobody waits for this entry's result any more."""
        if entry.is_written and entry.delivered_at is None:
            await self._recorder.softly(self.journal.leave(entry.key))

    async def sync(self, limit: int) -> tuple[list[Task], str | None]:
        """Read the account's task list, and look again for the tasks of lost answers.

        Returns the account's tasks that the journal does not know, and why the list could not be read, if so.
        """
        self._need_key()
        if self._shared:
            return [], "others spend from this account too, so its own list is not shown"
        lost = [entry for entry in await self.journal.recent(limit, status="unknown") if entry.phase == Phase.UNKNOWN]
        for job in [await self._runner.go_on(entry) for entry in lost if not self._runner.running(entry.key)]:
            with anyio.move_on_after(SYNC_WAITS_S):
                async with aclosing(job.states()) as states:
                    async for entry in states:
                        if entry.phase != Phase.UNKNOWN:
                            break
        try:
            tasks = await self.client.recent_tasks()
        except EvolinkError as error:
            return [], error.message
        known = await self.journal.known_tasks([task.id for task in tasks])
        return [task for task in tasks if task.id not in known], None

    @property
    def jobs(self) -> list[Job]:
        """The jobs of this server, in the order of their start."""
        return self._runner.jobs

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way here, and everything is written down."""
        return not self._runner.jobs and not self._recorder.has_unwritten

    @property
    def task_statuses(self) -> list[str]:
        """The states of the tasks that this server works on."""
        return [job.entry.status for job in self._runner.jobs if not job.elsewhere]

    def drain(self) -> bool:
        """Take no new order, and let the calls that wait answer with their tasks' ids; True once none waits any more."""
        self._draining = True
        for job in self._runner.jobs:
            if not job.is_draining:
                job.let_go()
        return not any(job.callers for job in self._runner.jobs)

    async def wake(self) -> None:
        """A caller is here: take over what a server left that is not running any more."""
        self._woken.set()
        if self.client.has_key:
            await self._recorder.softly(self._runner.take_over())

    async def balance(self) -> Balance:
        """Credits left on the account and the key."""
        self._need_key()
        return await self.client.balance()

    async def called_back(self, key: str, task_id: str) -> None:
        """EvoLink says that the order with this key has ended as this task; other servers of the account are told too."""
        await self._runner.called_back(key, task_id)
        await self._recorder.softly(self.journal.publish(Notification(key, task_id, is_callback=True)))

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call `subscriber` with the id of every task whose state changes; what it raises is logged and ends nothing."""
        self._subscribers.append(subscriber)

    def _need_key(self) -> None:
        if not self.client.has_key:
            raise KeyMissing(self._key_problem or "no EvoLink API key is set")

    def _announce(self, task_id: str) -> None:
        for subscriber in self._subscribers:
            self._group.start_soon(guarded, subscriber, task_id)

    async def _recover_later(self) -> None:
        with anyio.move_on_after(RECOVER_AFTER_S):
            await self._woken.wait()
        while self.client.has_key:
            await self._recorder.softly(self._runner.take_over())
            if self.journal.adopt_every_s is None:
                return
            await self._pause(self.journal.adopt_every_s)
