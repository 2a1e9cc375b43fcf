"""The way: ask, write it down, pay, write it down, look until done, fetch, keep. Only this room knows the order."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
from filelock import FileLock, Timeout

from evolink_mcp import costs, sizes
from evolink_mcp.client import Balance, EvolinkClient
from evolink_mcp.errors import (
    DownloadFailed,
    EvolinkError,
    JournalUnwritable,
    KeyMissing,
    LinkExpired,
    Problem,
    RateLimited,
    Refused,
    Rejected,
    Unreadable,
)
from evolink_mcp.folders import Folders
from evolink_mcp.images import keep
from evolink_mcp.journal import Entry, Journal, Picture, fingerprint, new_key
from evolink_mcp.lookout import Lookout
from evolink_mcp.models import COMPLETED, GenerationRequest, Task
from evolink_mcp.pace import RetryBudget, Schedule, backoff_s
from evolink_mcp.references import References
from evolink_mcp.till import Till

log = logging.getLogger(__name__)

LINK_LIVES_S = 24 * 3600
RECOVER_AFTER_S = 1.0
RECOVER_WITHIN_S = 48 * 3600
SUBMIT_GRACE_S = 1.0
NOT_FOUND_GRACE_S = 10.0
REREADS_MAX = 3
DOWNLOAD_REPEATS_MAX = 2
DOWNLOADS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Order:
    """What a caller wants, checked; `body` has URLs only, `identity` tells identical orders apart from others."""

    request: GenerationRequest
    save_as: str | None = None
    max_credits: float | None = None
    force_new: bool = False


class Job:
    """One entry on its way, owned by the studio: calls come, watch and go, the job goes on."""

    def __init__(self, entry: Entry, *, joined: bool = False) -> None:
        self.entry = entry
        self.joined = joined
        self.problem: Problem | None = None
        self.started = anyio.current_time()
        self.finished = False
        self._changed = anyio.Event()
        self._nudge = anyio.Event()

    def turn(self, entry: Entry) -> None:
        """The entry has a new state: tell whoever watches."""
        self.entry = entry
        self._changed.set()
        self._changed = anyio.Event()

    def finish(self) -> None:
        self.finished = True
        self.turn(self.entry)

    def look_now(self) -> None:
        """A caller is about to leave: look once more before."""
        self._nudge.set()

    async def rest(self, seconds: float, sleep: Callable[[float], Awaitable[object]]) -> None:
        """Sleep, unless a caller asks for a look."""
        async with anyio.create_task_group() as group:

            async def wake() -> None:
                await self._nudge.wait()
                group.cancel_scope.cancel()

            group.start_soon(wake)
            await sleep(seconds)
            group.cancel_scope.cancel()
        self._nudge = anyio.Event()

    async def states(self, heartbeat_s: float = 4.0) -> AsyncGenerator[Entry, None]:
        """The entry now, at every change, and at least every `heartbeat_s` seconds; ends when the job does."""
        yield self.entry
        while not self.finished:
            changed = self._changed
            with anyio.move_on_after(heartbeat_s):
                await changed.wait()
            yield self.entry


class Studio:
    """Makes pictures for one account. Use as an async context manager; what is unfinished at its end is resumed
    by the next one."""

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
        key_problem: str | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
    ) -> None:
        self.client = client
        self.journal = journal
        self.folders = folders
        self.till = till
        self.rule = rule
        self.on_change: list[Callable[[Entry], None]] = []
        self._references = references
        self._locks = locks
        self._key_problem = key_problem
        self._clock = clock
        self._sleep = sleep
        self._jobs: dict[str, Job] = {}
        self._budget = RetryBudget()
        self._woken = anyio.Event()

    async def __aenter__(self) -> Studio:
        self._life = self._live()
        await self._life.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._life.__aexit__(*exc)

    @asynccontextmanager
    async def _live(self) -> AsyncIterator[None]:
        self._downloads = anyio.CapacityLimiter(DOWNLOADS_AT_ONCE)
        try:
            async with anyio.create_task_group() as self._group:
                self._lookout = Lookout(self.client, self._group, sleep=self._sleep)
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
        for job in list(self._jobs.values()):
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
        price = self.price(order.request)
        self.till.check(price, order.max_credits)
        prepared = await self._references.prepare(order.request)
        mark = fingerprint(prepared.identity)
        if not order.force_new:
            self._resume(self.journal.adopt())
            if (job := self._undelivered(mark)) is not None:
                return job
        entry = Entry(
            key=new_key(),
            owner=getattr(self.journal, "owner", ""),
            phase="intent",
            created_at=self._clock(),
            fingerprint=mark,
            request=prepared.body,
            estimate=price.credits,
            save_as=order.save_as,
            attended=True,
        )
        self.till.open(entry)
        return self._start(entry)

    async def resume(self, task_id: str) -> Job:
        """The task with this id: finished and saved, under way, or bought elsewhere with the same key."""
        self._woken.set()
        entry = self._known(task_id)
        if entry is None:
            entry = Entry("", "", "found", self._clock(), task=Task(task_id, status="unknown"))
        elif job := self._jobs.get(entry.key):
            return job
        if entry.complete and not self._lost_files(entry):
            job = Job(entry)
            job.finish()
            return job
        self._need_key()
        return self._start(self._without_lost_files(entry))

    def deliver(self, job: Job) -> None:
        """The caller has the result: it will not be handed over again."""
        if job.entry.key and job.entry.delivered_at is None:
            job.turn(replace(job.entry, delivered_at=self._clock()))
            self._note(job.entry)

    def leave(self, job: Job) -> None:
        """The caller went without the result: the next identical order gets it."""
        if job.entry.key and job.entry.delivered_at is None:
            with suppress(JournalUnwritable):
                self.journal.leave(job.entry.key)

    async def sync(self, limit: int) -> tuple[list[Task], str | None]:
        """Compare with the account's own list, and try again to find what became of lost answers.

        Returns tasks of the account that the journal does not know, and why the list could not be had, if so.
        """
        self._need_key()
        for entry in self.journal.recent(limit, status="unknown"):
            if entry.phase == "unknown" and entry.key not in self._jobs:
                self._start(entry)
        for job in [job for job in self._jobs.values() if job.entry.phase == "unknown"]:
            async with aclosing(job.states()) as states:
                async for entry in states:
                    if entry.phase != "unknown":
                        break
        try:
            tasks = await self.client.recent_tasks(limit)
        except EvolinkError as error:
            return [], error.what
        known = self.journal.known_tasks([task.id for task in tasks])
        return [task for task in tasks if task.id not in known], None

    def now(self) -> float:
        return self._clock()

    def wake(self) -> None:
        """A caller is here: take up what an earlier server left."""
        self._woken.set()

    async def balance(self) -> Balance:
        """Credits left on the account and the key."""
        self._need_key()
        return await self.client.balance()

    def price(self, request: GenerationRequest) -> costs.Price:
        """What the request will cost, its prompt and references included as estimates."""
        return costs.price(
            self.expected(request.size, request.resolution).size,
            request.quality,
            request.n,
            references=len(request.image_urls or ()) + (1 if request.mask_url else 0),
            prompt_tokens=costs.prompt_tokens(request.prompt),
        )

    def expected(self, size: str, resolution: str) -> sizes.Resolved:
        """The pixels a size and tier mean under this studio's rule."""
        return sizes.resolve(size, resolution, self.rule)

    def _need_key(self) -> None:
        if not self.client.has_key:
            raise KeyMissing(self._key_problem or "no EvoLink API key is set")

    # --- jobs ---

    def _undelivered(self, mark: str) -> Job | None:
        """A bought and never delivered picture of the same order, now attended by this caller."""
        for entry in self.journal.undelivered(mark):
            live = any(p.saved or p.url_expires_at > self._clock() for p in entry.pictures)
            under_way = entry.task is not None and not entry.task.settled
            fetchable = entry.task is not None and entry.task.status == COMPLETED and (live or not entry.pictures)
            if (under_way or fetchable or entry.phase in ("intent", "sending")) and self.journal.claim(entry.key):
                job = self._jobs.get(entry.key) or self._start(self._without_lost_files(entry))
                job.joined = True
                return job
        return None

    def _start(self, entry: Entry) -> Job:
        job = Job(entry)
        if entry.complete and entry.phase != "unknown":
            job.finish()
            return job
        self._jobs[entry.key or entry.task_id or ""] = job
        self._group.start_soon(self._guarded, job)
        return job

    async def _guarded(self, job: Job) -> None:
        """Run a job to its end; whatever happens is the job's, never the server's."""
        try:
            await self._run(job)
        except EvolinkError as error:
            job.problem = error.problem
        except Exception:
            log.exception("a job failed unexpectedly")
            job.problem = Problem(
                "internal_error", "the server had an internal fault", True, "Call get_task with the id."
            )
        finally:
            for name in [name for name, other in self._jobs.items() if other is job]:
                del self._jobs[name]
            job.finish()

    async def _run(self, job: Job) -> None:
        on_phase = partial(self._turn, job)
        if job.entry.phase == "intent":
            await self.till.buy(job.entry, on_phase)
        elif job.entry.phase in ("sending", "unknown"):
            await self.till.reconcile(replace(job.entry, phase="unknown"), on_phase)
        if job.entry.task is None:
            return
        self._lookout.watchers += 1
        try:
            await self._watch(job)
            if job.entry.task.status == COMPLETED:
                await self._collect(job)
        finally:
            self._lookout.watchers -= 1

    def _turn(self, job: Job, entry: Entry) -> None:
        # Delivery is noted by the caller's side meanwhile: it must not be undone.
        job.turn(replace(entry, delivered_at=job.entry.delivered_at))
        for tell in self.on_change:
            tell(job.entry)

    # --- look until done ---

    async def _watch(self, job: Job) -> None:
        """Look at the task until it is settled; a failing look never fails the task."""
        task = job.entry.task
        assert task is not None
        schedule = Schedule(task.estimated_time_s)
        accepted = anyio.current_time() - max(0.0, self._clock() - job.entry.created_at)
        first = job.entry.phase != "submitted" or job.started - accepted > 1.0
        failures = 0
        while not task.settled:
            if not first:
                wait = schedule.next_s(anyio.current_time() - accepted, task.progress)
                await job.rest(wait, self._sleep)
            first = False
            try:
                seen = await self._lookout.look(task.id)
            except Rejected as error:
                early = self._clock() - job.entry.created_at < NOT_FOUND_GRACE_S and job.entry.phase != "found"
                if isinstance(error, RateLimited):
                    await self._sleep(error.retry_after_s if error.retry_after_s is not None else 5.0)
                elif not (error.http_status == 404 and early):
                    raise
                continue
            except Unreadable as error:
                failures += 1
                lost = error.http_status is None
                if self._budget.spend(lost=lost):
                    await self._sleep(backoff_s(min(failures, 3)))
                    first = True
                log.info("a look at %s failed: %s", task.id, error.code)
                continue
            failures = 0
            self._budget.earn()
            task = _merged(task, seen)
            self._seen(job, task)

    def _seen(self, job: Job, task: Task) -> None:
        """Note a task's new state; only a change of status is worth the disk."""
        before = job.entry
        entry = replace(before, task=task)
        if not entry.key:  # a task that this journal did not know
            entry = replace(entry, key=new_key(), owner=getattr(self.journal, "owner", ""),
                            created_at=task.created or entry.created_at)  # fmt: skip
            with suppress(JournalUnwritable):
                self.journal.intend(entry)
        elif before.task is None or before.task.status != task.status or before.task.results != task.results:
            self._note(entry)
        self._turn(job, entry)

    # --- fetch and keep ---

    async def _collect(self, job: Job) -> None:
        """Save every picture that is not saved yet: once, even with another server on the same task."""
        await self._reread(job)
        task = job.entry.task
        assert task is not None
        async with self._alone(task.id):
            if (known := self._known(task.id)) is not None and len(known.pictures) > len(job.entry.pictures):
                self._turn(job, replace(job.entry, pictures=known.pictures))
            expires = self._clock() + LINK_LIVES_S if job.entry.phase != "found" else (task.created or 0) + LINK_LIVES_S
            pictures = {p.index: p for p in job.entry.pictures}
            for index, url in enumerate(task.results):
                pictures.setdefault(index, Picture(index, url, expires))
            self._keep(job, pictures)
            async with anyio.create_task_group() as group:
                for picture in list(pictures.values()):
                    if not picture.saved:
                        group.start_soon(self._fetch, job, pictures, picture)

    async def _fetch(self, job: Job, pictures: dict[int, Picture], picture: Picture) -> None:
        async with self._downloads:
            try:
                kept = await self._download(job, picture)
            except EvolinkError as error:
                pictures[picture.index] = replace(picture, error=error.what)
                job.problem = job.problem or error.problem
            else:
                pictures[picture.index] = replace(
                    picture, path=str(kept.path), mime_type=kept.mime_type, width=kept.width, height=kept.height,
                    bytes=kept.bytes, sha256=kept.sha256, error=None,
                )  # fmt: skip
        self._keep(job, pictures)

    async def _download(self, job: Job, picture: Picture):
        task_id = job.entry.task_id
        target = self.folders.output / f"{task_id}-{picture.index}"
        if job.entry.save_as is not None:
            with suppress(Refused):
                target = self.folders.target(job.entry.save_as)
        for repeat in range(DOWNLOAD_REPEATS_MAX + 1):
            try:
                return await keep(partial(self.client.download, picture.url), target)
            except DownloadFailed as error:
                if isinstance(error, LinkExpired) or not error.retryable or repeat == DOWNLOAD_REPEATS_MAX:
                    raise
                await self._sleep(backoff_s(repeat))
        raise AssertionError("unreachable")

    def _keep(self, job: Job, pictures: dict[int, Picture]) -> None:
        entry = replace(job.entry, pictures=tuple(pictures[index] for index in sorted(pictures)))
        self._note(entry)
        self._turn(job, entry)

    async def _reread(self, job: Job) -> None:
        """A finished task without its links is read again, a few times; it is never bought again."""
        task = job.entry.task
        assert task is not None
        asked = job.entry.request.get("n", 1)
        for attempt in range(REREADS_MAX):
            if task.results and (len(task.results) >= asked or attempt >= 1):
                break
            await self._sleep(0.5 * (attempt + 1))
            with suppress(EvolinkError):
                task = _merged(task, await self.client.task(task.id))
        self._seen(job, task)

    def _alone(self, task_id: str):
        return _FileTurn(self._locks / f"{task_id}.lock" if self._locks else None, self._sleep)

    # --- what an earlier server left ---

    async def _recover_later(self) -> None:
        with anyio.move_on_after(RECOVER_AFTER_S):
            await self._woken.wait()
        if self.client.has_key:
            try:
                self._resume(self.journal.adopt())
            except JournalUnwritable as error:
                log.warning("%s", error.what)

    def _resume(self, entries: list[Entry]) -> None:
        for entry in entries:
            if entry.phase == "intent":
                problem = Problem("interrupted", "the server ended before anything was sent", True, "Call again.")
                self._note(replace(entry, phase="unsent", error=problem))
            elif self._clock() - entry.created_at < RECOVER_WITHIN_S:
                log.info("taking up %s", entry.task_id or entry.key)
                self._start(entry)

    def _known(self, task_id: str) -> Entry | None:
        try:
            return self.journal.by_task(task_id)
        except JournalUnwritable as error:
            log.warning("%s", error.what)
            return None

    def _note(self, entry: Entry) -> None:
        """Write a state down that is not worth failing for: what matters most is on disk already."""
        try:
            self.journal.update(entry)
        except JournalUnwritable as error:
            log.warning("%s", error.what)

    def _lost_files(self, entry: Entry) -> bool:
        return any(p.path and not Path(p.path).is_file() and p.url_expires_at > self._clock() for p in entry.pictures)

    def _without_lost_files(self, entry: Entry) -> Entry:
        """Pictures whose file was moved or deleted, and those that failed before, are to be fetched again."""

        def again(picture: Picture) -> Picture:
            if picture.url_expires_at <= self._clock():
                return picture
            missing = picture.path is not None and not Path(picture.path).is_file()
            return Picture(picture.index, picture.url, picture.url_expires_at) if missing or picture.error else picture

        return replace(entry, pictures=tuple(again(picture) for picture in entry.pictures))


class _FileTurn:
    """One server at a time, by a lock file that dies with its process; without a usable folder, no turns are taken."""

    def __init__(self, path: Path | None, sleep: Callable[[float], Awaitable[object]]) -> None:
        self._lock = FileLock(path, thread_local=False) if path else None
        self._sleep = sleep

    async def __aenter__(self) -> None:
        while self._lock is not None:
            try:
                Path(self._lock.lock_file).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._lock.acquire(blocking=False)
                return
            except Timeout:
                await self._sleep(0.2)
            except OSError:
                self._lock = None

    async def __aexit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()
            with suppress(OSError):
                Path(self._lock.lock_file).unlink()


def _merged(before: Task, seen: Task) -> Task:
    """The newer state; what it does not tell any more is kept."""
    return replace(
        seen,
        estimated_time_s=seen.estimated_time_s if seen.estimated_time_s is not None else before.estimated_time_s,
        credits_reserved=seen.credits_reserved if seen.credits_reserved is not None else before.credits_reserved,
        created=seen.created or before.created,
        results=seen.results or before.results,
    )
