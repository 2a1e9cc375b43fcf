"""The studio of one account: order, resume, deliver. It builds all parts and connects them."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

import anyio
import anyio.abc

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.task import Balance, Task
from evolink_mcp.call_context import outside_request, remaining_s
from evolink_mcp.errors import EvolinkError, JournalUnwritable, KeyMissing, OtherKey, Refused, TaskUnknown
from evolink_mcp.images.references import CheckedRequest, References
from evolink_mcp.images.store import ImageStore
from evolink_mcp.journal.entry import Entry, Phase, Stage, fingerprint, with_defaults
from evolink_mcp.journal.journal import Journal, Notification
from evolink_mcp.studio.accounts import AccountLinker
from evolink_mcp.studio.derive import Deriver
from evolink_mcp.studio.events import Changed, Event, Events, Subscriber
from evolink_mcp.studio.jobs import ImageRequest, Job, PreparedRequest, Timing, guarded
from evolink_mcp.studio.journal_writer import JournalWriter
from evolink_mcp.studio.limits import Limits, SpendingLimits
from evolink_mcp.studio.poller import Poller, TaskFollower
from evolink_mcp.studio.prices import CHANGES_FACT, AccountPrices, Change, read_changes
from evolink_mcp.studio.purchase import CallbackAddresses, Purchaser
from evolink_mcp.studio.reconcile import Reconciler
from evolink_mcp.studio.runner import JobRunner
from evolink_mcp.studio.save import ImageSaver
from evolink_mcp.studio.schedule import DurationHistory
from evolink_mcp.studio.size_rule import AUTO
from evolink_mcp.studio.times import DAY_S

log = logging.getLogger(__name__)

# Some MCP hosts start a second server and end it at once. Until then a start without a call writes nothing.
ADOPT_AFTER_S = 1.0
# Both together below 2 s: then the client of the MCP SDK kills a server that has not ended.
SUBMIT_GRACE_S = 1.0
CLOSE_GRACE_S = 0.3
OTHER_KEY = OtherKey("another API key bought it, so this server does not poll it").problem
# list_tasks waits this long for the reconciliation of each lost answer. An MCP host ends a call after 60 s.
SYNC_WAITS_S = 15.0
# An adoption waits this long for the test of a new key. The next adoption repeats an unfinished test.
LINK_WITHIN_S = 5.0
TASK_CONTINUES = "The task continues. Call get_task again in a minute."


@dataclass(frozen=True, slots=True, kw_only=True)
class StudioOptions:
    """The options of a studio.

    `size_rule`: the setting of the size rule. `preview_edge`: the longest edge of previews in pixels. `callback_hosts`:
    the hostnames that callers' callbacks may use, None allows all. `is_shared`: other callers use the account too.
    `retention_days`: the age at which finished entries lose their request; None keeps it. `has_metadata`: derived files
    contain prompt, task ID and model.
    `key_problem`: the reason why there is no usable key. `callbacks`: the addresses for EvoLink's callbacks. `poller`:
    a poller that several studios of the account share. `is_maintained`: the server process calls `adopt` and removes old
    requests for all its studios, so this studio has no loop for that. `subscribers` receive the events of all jobs.
    """

    spending_limits: SpendingLimits = field(default_factory=SpendingLimits)
    size_rule: str = AUTO
    preview_edge: int | None = None
    callback_hosts: frozenset[str] | None = None
    is_shared: bool = False
    retention_days: float | None = None
    has_metadata: bool = False
    key_problem: str | None = None
    callbacks: CallbackAddresses | None = None
    poller: Poller | None = None
    is_maintained: bool = False
    subscribers: tuple[Subscriber, ...] = ()
    timing: Timing = field(default_factory=Timing)


@asynccontextmanager
async def run_studio(
    client: EvolinkClient,
    journal: Journal,
    image_store: ImageStore,
    references: References,
    options: StudioOptions,
) -> AsyncGenerator[Studio]:
    """Run a studio. At the end its unfinished jobs stop, and the next studio resumes them."""
    durations = DurationHistory(journal)
    try:
        async with anyio.create_task_group() as group:
            studio = Studio(client, journal, image_store, references, durations, options, group)
            try:
                yield studio
            finally:
                # A POST in progress gets time to record its task ID before everything is cancelled.
                await studio.stop()
                group.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_GRACE_S):
            # Both writes survive a cancellation, and the deadline lets the process end although the disk hangs.
            await durations.write()
            await journal.close()


class Studio:
    """Buy and save images for one account. `run_studio` starts and stops it."""

    def __init__(
        self,
        client: EvolinkClient,
        journal: Journal,
        image_store: ImageStore,
        references: References,
        durations: DurationHistory,
        options: StudioOptions,
        group: anyio.abc.TaskGroup,
    ) -> None:
        timing = options.timing
        events = Events(options.subscribers)
        prices = AccountPrices(journal, options.size_rule)
        writer = JournalWriter(journal, events, prices.learn)
        # The studios of one account share a poller, so that all its tasks share batches and one rate limit.
        poller = options.poller or Poller(client, group, events=events, sleep=timing.sleep)
        self.client = client
        self.journal = journal
        self.image_store = image_store
        self.references = references
        self.known_images = references.known_images
        deriver = Deriver(image_store, references, journal, has_origin=options.has_metadata)
        self.deriver = deriver
        self.spending_limits = options.spending_limits
        self.prices = prices
        self.rate_limit = poller.rate_limit
        self.now = timing.clock  # epoch seconds
        self._options = options
        self._timing = timing
        self._group = group
        self._events = events
        self._writer = writer
        self._limits = Limits(journal, options.spending_limits, prices, options.callback_hosts, timing.clock)
        self._purchaser = Purchaser(
            client,
            writer,
            Reconciler(client, writer, is_shared=options.is_shared, timing=timing),
            references,
            self._limits,
            poller.rate_limit,
            options.callbacks,
            timing,
        )
        self._follower = TaskFollower(poller, writer, durations, timing)
        self._runner = JobRunner(
            group,
            writer,
            self._limits,
            self._purchaser,
            self._follower,
            ImageSaver(client, image_store, deriver, writer, timing, preview_edge=options.preview_edge),
            timing,
        )
        self._linker = AccountLinker(client, journal, timing)
        self._refuses_orders = False
        self._has_caller = anyio.Event()
        group.start_soon(writer.flush_loop, timing.idle)
        if not options.is_maintained:
            group.start_soon(self._adopt_loop)
            if options.retention_days is not None:
                group.start_soon(self._forget_loop, options.retention_days * DAY_S)

    async def stop(self) -> None:
        """Give POSTs in progress SUBMIT_GRACE_S seconds to end."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(SUBMIT_GRACE_S):
            await self._runner.stop()

    async def prepare(self, request: ImageRequest) -> PreparedRequest:
        """Run every check that needs no purchase. It has no side effects.

        Raises:
            EvolinkError: a check failed. Nothing was sent.
        """
        request = self._with_checked_name(request)
        self._limits.check_callback(request.request.callback_url)
        return self._prepare_checked(request, await self.references.check(request.request))

    def _with_checked_name(self, request: ImageRequest) -> ImageRequest:
        if request.save_as is None:
            return request
        return replace(request, save_as=self.image_store.check_name(request.save_as))

    def _prepare_checked(self, request: ImageRequest, references: CheckedRequest) -> PreparedRequest:
        return PreparedRequest(
            request, references, fingerprint(with_defaults(references.identity)), self.prices.current.rule
        )

    async def prepare_series(self, requests: Sequence[ImageRequest]) -> list[PreparedRequest]:
        """Run every check of a series before its first purchase. The requests differ only in prompt and file name.

        The reference images are checked once. The spending limits count all requests without an earlier purchase.

        Raises:
            EvolinkError: a check failed. Nothing was sent.
        """
        self._need_key()
        first = await self.prepare(requests[0])
        series = [first]
        for request in requests[1:]:
            request = self._with_checked_name(request)
            series.append(self._prepare_checked(request, replace(first.references, body=request.request.body())))
        await self._linker.link()
        # An unsent entry of a dead server becomes final here, so it does not count as an earlier purchase.
        await self._runner.adopt()
        new = [prepared.request for prepared in series if not await self._runner.has_earlier(prepared)]
        await self._limits.check_series(new, self._runner.jobs)
        return series

    async def order(self, request: ImageRequest, prepared: PreparedRequest | None = None) -> Job:
        """Buy images, or return an earlier identical purchase that was not delivered.

        The caller is registered with the job until `depart`. `ordered` does both. `prepared` is the result of
        `prepare_series` for this request.

        Raises:
            EvolinkError: nothing was sent. The job reports all later errors.
        """
        self._need_key()
        if self._refuses_orders:
            raise Refused("this server is about to end", code="draining", retryable=True, advice="Call again.")
        self._has_caller.set()
        if prepared is None:
            prepared = await self.prepare(request)
        # An undelivered purchase of an earlier key counts as an identical purchase too.
        await self._linker.link()
        job = await self._runner.find_or_buy(prepared)
        job.notes = prepared.references.notes
        return job

    @asynccontextmanager
    async def ordered(self, request: ImageRequest, prepared: PreparedRequest | None = None) -> AsyncGenerator[Job]:
        """Order, and wait for the job inside this context. See `order`.

        Raises:
            EvolinkError: nothing was sent.
        """
        job = await self.order(request, prepared)
        async with self._registered(job):
            yield job

    async def resume(self, task_id: str) -> Job:
        """Return the job of this task: finished, running, or external.

        A call for a finished unconfirmed match confirms it. Without a key, and for a task of another account, the job has the
        state of the journal.

        Raises:
            TaskUnknown: other callers use the account too, and the journal does not have this task.
            JournalUnwritable: other callers use the account too, and the journal cannot be read.
        """
        await self.wake()
        job = self._runner.job_of_task(task_id)
        if job is None:
            entry = await self._recorded_entry(task_id)
            if entry is None:
                entry = Entry.external(Task(task_id, status="unknown"), self.now())
            present_entry = await self.image_store.locate(entry)
            if not self.client.has_key or (entry.is_written and not self.journal.is_linked(entry.account)):
                return self._recorded_job(present_entry)
            # A moved file needs no download. The journal keeps its recorded path.
            job = await self._runner.resume(entry if present_entry.has_work(self.now()) else present_entry)
        if job.entry.is_unconfirmed and job.entry.stage is not Stage.OPEN:
            await self._runner.confirm(job)
        return job

    async def _recorded_entry(self, task_id: str) -> Entry | None:
        """Return the entry of a task. None: it has no entry, but the key can read the task at EvoLink.

        Raises:
            TaskUnknown, JournalUnwritable: see `resume`.
        """
        try:
            entry = await self._writer.entry_by_task(task_id)
        except JournalUnwritable as error:
            if self._options.is_shared:  # the task may belong to another caller
                raise JournalUnwritable(
                    error.message, advice=TASK_CONTINUES, charged="unknown", retryable=True
                ) from error
            # Without the journal, a poll of the task is still possible and free.
            return None
        if entry is None and self._options.is_shared:
            raise TaskUnknown(f"there is no task {task_id} here")
        return entry

    async def other_profile_of(self, task_id: str) -> str | None:
        """Return the other profile of this journal that bought a task. Only a caller on this machine gets it.

        None: there is none, or the journal cannot be read.
        """
        if not self.known_images.is_local or self._options.is_shared:
            return None
        with suppress(JournalUnwritable):
            if await self.journal.by_task(task_id) is None:
                return await self.journal.other_profile_of(task_id)
        return None

    def _recorded_job(self, entry: Entry) -> Job:
        """Return a finished job with the state that the journal has. Only another key could change it."""
        job = Job(entry)
        if entry.has_work(self.now()):
            job.problem = OTHER_KEY if self.client.has_key else self._key_missing().problem
        job.finish()
        return job

    def has_other_key(self, entry: Entry) -> bool:
        """Return whether the key of this server cannot act for the account of the entry."""
        return self.client.has_key and entry.is_written and not self.journal.is_linked(entry.account)

    async def entry(self, task_id: str) -> Entry | None:
        """Return the newest entry of a task, from its job or from the journal. None: there is none.

        Raises:
            JournalUnwritable: the journal cannot be read.
        """
        job = self._runner.job_of_task(task_id)
        return job.entry if job is not None else await self.journal.by_task(task_id)

    async def deliver(self, job: Job) -> None:
        """The caller has the result, so no identical request gets it again. Without a key nothing is recorded."""
        if self.client.has_key and job.entry.is_written and job.entry.delivered_at is None:
            await self._writer.record_delivery(job, self._timing.clock())

    @asynccontextmanager
    async def attending(self, job: Job) -> AsyncGenerator[None]:
        """Wait for this job inside the context. If the last call ends without the result, an identical one gets it."""
        self.attend(job)
        async with self._registered(job):
            yield

    @asynccontextmanager
    async def _registered(self, job: Job) -> AsyncGenerator[None]:
        """Remove a registered call from its job at the end. If it is the last call and is cancelled, do not buy."""
        try:
            yield
        except anyio.get_cancelled_exc_class():
            # Other calls still wait for the purchase.
            if job.callers == 1:
                job.abandon()
            raise
        finally:
            with anyio.CancelScope(shield=True):
                # Without this record, no identical call could get the purchase.
                await self.depart(job)

    def attend(self, job: Job) -> None:
        """Register one more waiting call with a job, until `depart`."""
        self._runner.attend(job)

    async def depart(self, job: Job) -> None:
        """Remove one waiting call from a job."""
        await self._runner.depart(job)

    async def claim(self, entry: Entry) -> None:
        """A client has the handle of this entry and will ask for it, so an identical call must buy."""
        await self._writer.ignore_unwritable(self._writer.claim(entry))

    async def remove_caller(self, entry: Entry) -> None:
        """No client waits for this entry any more."""
        if entry.is_written and entry.delivered_at is None:
            await self._writer.remove_caller(entry.key)

    async def sync(self, limit: int) -> tuple[list[Task], str | None]:
        """Read the account's task list and reconcile lost answers again.

        Return the tasks that the journal does not know, and the reason if the list could not be read.
        """
        if not self.client.has_key:
            return [], self._key_missing().message
        if self._options.is_shared:
            return [], "other callers use this account too, so its task list is not shown"
        entries = await self.journal.recent(limit, status="unknown")
        entries = [entry for entry in entries if self.journal.is_linked(entry.account)]
        # A job already reconciles its own entry.
        lost = [entry for entry in entries if entry.phase == Phase.UNKNOWN and not self._runner.job_of(entry.key)]
        for job in [await self._runner.resume(entry) for entry in lost]:
            with anyio.move_on_after(SYNC_WAITS_S):
                await job.wait_while(Phase.UNKNOWN)
        try:
            tasks = await self.client.recent_tasks()
        except EvolinkError as error:
            return [], error.message
        known_ids = await self.journal.known_tasks([task.id for task in tasks])
        return [task for task in tasks if task.id not in known_ids], None

    @property
    def jobs(self) -> list[Job]:
        """The jobs of this server, in the order of their start."""
        return self._runner.jobs

    async def flush(self) -> None:
        """Try once to write everything that the journal could not record."""
        await self._writer.flush()

    @property
    def has_unwritten(self) -> bool:
        """Whether the journal holds an older state of any entry."""
        return self._writer.has_unwritten

    @property
    def is_idle(self) -> bool:
        """Whether no job runs and the journal is complete."""
        return not self._runner.jobs and not self.has_unwritten

    @property
    def misses_callbacks(self) -> bool:
        """Whether EvoLink's callbacks did not arrive for the last tasks of the account."""
        return self._follower.misses_callbacks

    @property
    def task_statuses(self) -> list[str]:
        """The statuses of the tasks that this server works on."""
        return [job.entry.status for job in self._runner.jobs if not job.has_remote_owner]

    def drain(self, *, refuses_orders: bool = True) -> bool:
        """Answer waiting calls with their task IDs. Return True if no call waits any more.

        With `refuses_orders` no call can buy any more. Without, calls that have begun still buy and get their task IDs.
        """
        self._refuses_orders = refuses_orders
        for job in self._runner.jobs:
            if not job.is_draining:
                job.drain()
        return not any(job.callers for job in self._runner.jobs)

    async def wake(self) -> None:
        """A caller is here: adopt the entries of dead servers now. The adoption continues if the call must answer first."""
        self._has_caller.set()
        is_adopted = anyio.Event()

        async def adopt() -> None:
            await guarded(self._writer.ignore_unwritable, self.adopt())
            is_adopted.set()

        with outside_request():
            self._group.start_soon(adopt)
        with anyio.move_on_after(remaining_s()):
            await is_adopted.wait()

    async def adopt(self) -> bool:
        """Adopt the entries of dead servers. Return whether it is certain which accounts the key can read.

        Raises:
            JournalUnwritable: the open entries are unknown.
        """
        if self.client.has_key:
            # EvoLink may be slow, and the entries of known accounts need no link.
            with anyio.move_on_after(LINK_WITHIN_S):
                await self._linker.try_to_link()
            await self._runner.adopt()
        return self._linker.is_complete

    async def take_price_changes(self) -> dict[str, Change]:
        """Return the price changes that no answer has reported, by their kind. Of several servers one gets each change."""
        try:
            return read_changes(await self.journal.take_fact(CHANGES_FACT))
        except JournalUnwritable as error:
            log.info("%s", error.message)
            return {}

    async def balance(self) -> Balance:
        """Return the remaining credits of the account and the key."""
        self._need_key()
        return await self.client.balance()

    async def receive_callback(self, key: str, task_id: str) -> None:
        """EvoLink called the address of this entry. Unless this server follows the task, notify the others of the account."""
        if not await self._runner.receive_callback(key, task_id):
            await self._writer.ignore_unwritable(self.journal.publish(Notification(key, task_id, is_callback=True)))

    def subscribe(self, subscriber: Callable[[str], Awaitable[None]]) -> None:
        """Await `subscriber` with the ID of each changed task. Its errors are logged and stop nothing."""

        def start(event: Event) -> None:
            if isinstance(event, Changed):
                # A slow subscriber must not delay the job that published the event.
                self._group.start_soon(guarded, subscriber, event.task_id)

        self._events.subscribe(start)

    def _need_key(self) -> None:
        if not self.client.has_key:
            raise self._key_missing()

    def _key_missing(self) -> KeyMissing:
        return KeyMissing(self._options.key_problem or "no EvoLink API key is set")

    async def _forget_loop(self, max_age_s: float) -> None:
        """Remove old requests from the journal: after the first call, because a start must not write, then every day."""
        await self._has_caller.wait()
        while True:
            now = self._timing.clock()
            await self._writer.ignore_unwritable(self.journal.forget(now - max_age_s, now))
            await self._timing.idle(DAY_S)

    async def _adopt_loop(self) -> None:
        with anyio.move_on_after(ADOPT_AFTER_S):
            await self._has_caller.wait()
        while self.client.has_key:
            await self._linker.try_to_link()
            await self._writer.ignore_unwritable(self._runner.adopt())
            if self.journal.adopt_every_s is None:
                return
            await self._timing.idle(self.journal.adopt_every_s)
