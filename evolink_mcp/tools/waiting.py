"""Wait for a job: report rising progress and a heartbeat, and answer before the MCP host's limit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import anyio
from mcp.server.mcpserver import Context
from mcp_types import CallToolResult
from pydantic import Field, Strict

from evolink_mcp.api.task import COMPLETED
from evolink_mcp.call_context import due_within
from evolink_mcp.errors import EvolinkError
from evolink_mcp.journal.entry import Entry, Stage
from evolink_mcp.sanitize import harmless
from evolink_mcp.studio.jobs import Job
from evolink_mcp.studio.studio import Studio
from evolink_mcp.tools.adapter import result
from evolink_mcp.tools.client_names import client_name_in
from evolink_mcp.tools.delivery import delivery_of
from evolink_mcp.tools.hosts import HOSTS, WAIT_MAX_S, Host, Hosts, host_named
from evolink_mcp.tools.previews import links, previews
from evolink_mcp.tools.task_answer import (
    TaskOut,
    add_price_changes,
    copy_notes,
    is_error,
    limit_answer,
    refusal_out,
    task_out,
)
from evolink_mcp.tools.task_text import task_text

# A poll just before the end detects a task that finished since the last poll.
LAST_READ_S = 1.0
# Below ANSWER_WITHIN_S, so a late answer still reaches the host before its limit.
ID_GRACE_S = 14.0
# A call with wait_seconds=0 must still record its purchase.
JOURNAL_MIN_S = 5.0
# Some hosts end a call without progress, for example Claude Code over HTTP after 5 min.
HEARTBEAT_S = 4.0
# A slow object store must not delay the answer beyond the host's limit.
FILES_WITHIN_S = 8.0
CLIENT_MAX_CHARS = 120

Report = Callable[[float, float, str], Awaitable[None]]
WaitSeconds = Annotated[
    float,
    Strict(),
    Field(
        ge=0,
        le=WAIT_MAX_S,
        description="Longest wait. The task continues after it.",
    ),
]


@dataclass(frozen=True, slots=True)
class Waiting:
    """Wait for the jobs of one studio and build the answers.

    `wait_s`: the owner's default wait in seconds, None uses the MCP host's. `preview_edge`: the longest edge of previews
    in pixels, None chooses it by the number of images, 0 sends none. `has_previews_for_all`: send previews also to clients
    with the default name of an SDK. `has_resource_links`: add a link for each saved image. `hosts`: the limits of MCP hosts.
    """

    studio: Studio
    wait_s: float | None = None
    preview_edge: int | None = None
    has_previews_for_all: bool = False
    has_resource_links: bool = False
    hosts: Hosts = HOSTS

    @contextmanager
    def call(self, ctx: Context[Any, Any], wait_seconds: float | None = None) -> Generator[float]:
        """Get the job of a call inside this context. Yield the time at which the wait for it ends (anyio's clock).

        The wait includes the preparation of an order, because the host's timeout does. Inside this context the journal
        must answer within the wait, or within JOURNAL_MIN_S if the wait is shorter.
        """
        wait_s = self.wait_for(self.host_of(ctx), wait_seconds)
        # A locked journal would otherwise hold the call until the host gives up.
        with due_within(max(wait_s, JOURNAL_MIN_S)):
            yield anyio.current_time() + wait_s

    async def answer(
        self,
        job: Job,
        ends_at: float,
        ctx: Context[Any, Any],
        notes: list[str],
        *,
        is_deduplicated: bool = False,
        fit: str | None = None,
    ) -> CallToolResult:
        """Wait for the job until `ends_at` and return its state as the answer. The job continues after the wait.

        `fit` is the target of exact copies. A deduplicated purchase may lack them.
        """
        host = self.host_of(ctx)
        async with self.studio.attending(job):
            await follow(job, ends_at, ctx.report_progress)
            entry = job.entry
            if job.is_finished:
                with anyio.move_on_after(FILES_WITHIN_S):
                    entry = await self.studio.deriver.with_exact_copies(entry, fit)
            out = await self.task_of(job, entry, is_deduplicated=is_deduplicated)
            out.notes[:0] = [*notes, *job.notes]
            if self.studio.image_store.is_permanent:
                out.notes += copy_notes(entry, fit)
            add_price_changes(out, await self.studio.take_price_changes())
            if job.problem is not None and not job.is_finished:
                out.notes.append(
                    f"The status could not be read: {job.problem.message}. The server repeats the poll, more and more slowly."
                )
            edge = self.preview_edge_for(host)
            files = await self.files_of(job.entry) if edge != 0 else []
            out = limit_answer(out, host.answer_max)
            decoder = self.studio.image_store.decoder
            room = host.answer_max - 3 * len(out.model_dump_json())
            images = await previews(files if out.status == COMPLETED else [], edge, room, decoder)
            image_links = links(out) if self.has_resource_links else []
            # An answer without the image is no delivery, so an identical call gets the purchase.
            if job.is_finished and job.problem is None and job.entry.has_result:
                await self.hand_over(job, ctx)
        return result(task_text(out), out, *images, *image_links, is_error=is_error(out))

    async def task_of(self, job: Job, entry: Entry, *, is_deduplicated: bool) -> TaskOut:
        """Return the state of a job as an answer. `entry` is that of the job, perhaps with further derived files."""
        return task_out(
            await self.studio.image_store.entry_for_caller(entry),
            problem=job.problem if job.is_finished else None,
            is_deduplicated=is_deduplicated,
            is_running=not job.is_finished,
            has_other_key=self.studio.has_other_key(entry),
        )

    async def files_of(self, entry: Entry) -> list[Path]:
        """Return local files of the saved images. Omit files that need more than FILES_WITHIN_S seconds."""
        if entry.task_id is None:
            return []
        files: list[Path] = []
        with anyio.move_on_after(FILES_WITHIN_S):
            for image in entry.images:
                if image.is_saved:
                    with suppress(OSError, EvolinkError):
                        files.append(await self.studio.image_store.local_file(entry.task_id, image))
        return files

    async def hand_over(self, job: Job, ctx: Context[Any, Any]) -> None:
        """Record the delivery when the transport has written the answer."""
        delivery = delivery_of(ctx)
        # This transport does not report a write, so the answer counts as received.
        if delivery is None:
            await self.studio.deliver(job)
            return
        self.studio.attend(job)  # until the answer is written

        async def settle(is_written: bool) -> None:
            if is_written:
                await self.studio.deliver(job)
            await self.studio.depart(job)

        delivery.when_settled(settle)

    def host_of(self, ctx: Context[Any, Any]) -> Host:
        """Return the MCP host of this call."""
        return mcp_host_of(ctx, self.hosts)

    def preview_edge_for(self, host: Host) -> int | None:
        """Return `preview_edge`, or 0 if the MCP host gets no previews."""
        return self.preview_edge if self.has_previews_for_all or host.has_previews else 0

    def wait_for(self, host: Host, wait_seconds: float | None = None) -> float:
        """Return the wait in seconds: the caller's up to the host's limit, else the owner's, else the host's default."""
        if wait_seconds is None:
            return host.wait_s if self.wait_s is None else self.wait_s
        return min(wait_seconds, host.longest_wait_s)


def client_of(ctx: Context[Any, Any]) -> str | None:
    """Return the name that the MCP host of this call gave, with this request or over HTTP at `initialize`."""
    return _declared_name(ctx) or client_name_in((ctx.headers or {}).get("mcp-session-id", ""))


def buyer_of(ctx: Context[Any, Any]) -> str | None:
    """Return the client of a paid call for the audit: the name of its MCP host, or its User-Agent over HTTP.

    A stateless call of a protocol before 2026-07-28 declares no name.
    """
    name = _declared_name(ctx) or (ctx.headers or {}).get("user-agent")
    return None if name is None else harmless(name, CLIENT_MAX_CHARS)


def _declared_name(ctx: Context[Any, Any]) -> str | None:
    params = ctx.session.client_params
    return params.client_info.name if params else None


def mcp_host_of(ctx: Context[Any, Any], hosts: Hosts = HOSTS) -> Host:
    """Return the MCP host of this call."""
    return host_named(client_of(ctx), hosts)


def format_task_error(error: EvolinkError, _: tuple[str, ...]) -> CallToolResult:
    """Return the answer of generate_image and get_task to an error without a task."""
    out = refusal_out(error)
    return result(task_text(out), out, is_error=True)


async def follow(job: Job, ends_at: float, report: Report, *, heartbeat_s: float = HEARTBEAT_S) -> None:
    """Return at `ends_at` (anyio's clock) or when the job is finished. Call `report(progress, total, message)` meanwhile.

    The task is polled once more shortly before the end. If EvoLink has not answered the POST, wait until ID_GRACE_S
    after the end, so that the answer can name the task ID.
    """
    progress = _Progress(report, heartbeat_s)
    wait_s = max(0.0, ends_at - anyio.current_time())
    # A short wait keeps most of its time for the work before the last poll.
    await _until(job, progress, ends_at - min(LAST_READ_S, wait_s / 4))
    if job.is_finished:
        return
    job.poll_now()
    await _until(job, progress, ends_at)
    if not (job.is_finished or job.is_acknowledged):
        # The preparation may have taken longer than the wait and the grace together.
        grace_ends_at = max(ends_at + ID_GRACE_S, anyio.current_time() + LAST_READ_S)
        await _until(job, progress, grace_ends_at, needs_task_id=True)


async def _until(job: Job, progress: _Progress, deadline: float, *, needs_task_id: bool = False) -> None:
    """Report the job's states until `deadline`. Return earlier if the server drains, or with `needs_task_id` met."""
    # The cancel scope stays outside the generator: anyio forbids a yield inside a scope.
    async with aclosing(job.states(progress.heartbeat_s)) as states:
        with anyio.CancelScope(deadline=deadline):
            async for entry in states:
                await progress.report(entry)
                if job.is_acknowledged if needs_task_id else job.is_draining:
                    return


class _Progress:
    """Progress for MCP: each value is above the one before, and only the end is 100."""

    def __init__(self, report: Report, heartbeat_s: float) -> None:
        self.heartbeat_s = heartbeat_s
        self._report = report
        self._last = 0.0
        # EvoLink usually answers the POST within one heartbeat, so the first message can name the task ID.
        self._first_at = anyio.current_time() + heartbeat_s - 0.1

    async def report(self, entry: Entry) -> None:
        """Report the state of an entry. An entry without a task is reported only after the first heartbeat."""
        if self._last >= 100 or (entry.task is None and anyio.current_time() < self._first_at):
            return
        percent = (entry.task.progress if entry.task else None) or 0.0
        # EvoLink reports 100 % before the images are saved.
        value = 100.0 if entry.stage is not Stage.OPEN else min(percent, 99.0)
        # MCP requires rising values and the SDK does not check it. EvoLink's progress can repeat or fall.
        self._last = value if value > self._last else self._last + (99.9 - self._last) / 100
        await self._report(round(self._last, 4), 100.0, _progress_text(entry))


def _progress_text(entry: Entry) -> str:
    if entry.task is None:
        return "waiting for EvoLink to accept the request"
    saved = sum(image.is_saved for image in entry.images)
    if entry.status == COMPLETED:
        return f"{entry.task.id} completed, {saved} of {len(entry.task.results)} saved"
    progress = f" {entry.task.progress:.0f} %" if entry.task.progress is not None else ""
    return f"{entry.task.id} {entry.status}{progress}"
