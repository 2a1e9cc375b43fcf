"""A call waits for a job: progress that rises, a heartbeat, and an answer before its host gives up."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import anyio
from mcp.server.mcpserver import Context
from mcp_types import CallToolResult
from pydantic import Field, Strict

from evolink_mcp.api.task import COMPLETED
from evolink_mcp.errors import EvolinkError
from evolink_mcp.journal.entry import Entry, Stage
from evolink_mcp.studio.jobs import Job
from evolink_mcp.studio.studio import Studio
from evolink_mcp.tools.adapter import result
from evolink_mcp.tools.delivery import delivery_of
from evolink_mcp.tools.hosts import WAIT_MAX_S, Host, host_named
from evolink_mcp.tools.previews import links, previews
from evolink_mcp.tools.task_answer import is_error, refusal, task_out
from evolink_mcp.tools.task_text import task_text

LAST_READ_S = 1.0
ID_GRACE_S = 14.0
HEARTBEAT_S = 4.0
FILES_WITHIN_S = 8.0

Report = Callable[[float, float, str], Awaitable[None]]
WaitSeconds = Annotated[
    float,
    Strict(),
    Field(
        ge=0,
        le=WAIT_MAX_S,
        description="How long this call waits; the task goes on after it. Default: what this host bears.",
    ),
]


@dataclass(frozen=True, slots=True)
class Waiting:
    """How calls wait for jobs of one studio and answer.

    `wait_s` None lets the host decide how long a call waits. `preview_edge` is the longest edge of previews in pixels:
    None chooses it by the number of pictures, 0 sends none. `resource_links` adds a link for each saved picture.
    """

    studio: Studio
    wait_s: float | None = None
    preview_edge: int | None = None
    resource_links: bool = False

    async def answer(
        self, job: Job, asked_s: float | None, ctx: Context[Any, Any], notes: list[str], *, joined: bool = False
    ) -> CallToolResult:
        """Wait for the job as long as this call may, then say how it stands; the job goes on, however the wait ends."""
        host = mcp_host_of(ctx)
        async with self.studio.attending(job):
            await follow(job, self.wait(host, asked_s), ctx.report_progress)
            out = task_out(
                await self.studio.image_store.entry_for_caller(job.entry),
                problem=job.problem if job.finished else None,
                joined=joined,
                running=not job.finished,
            )
            out.notes[:0] = notes
            if job.learned is not None:
                out.notes.append(f"This account's pictures follow EvoLink's {job.learned} table: seen in this picture's "
                                 "pixels, and computed by it from now on.")  # fmt: skip
            if job.problem is not None and not job.finished:
                out.notes.append(f"EvoLink is asked again, ever more slowly, because {job.problem.message}.")
            files = await self._files(job.entry)
            decoder = self.studio.image_store.decoder
            pictures = await previews(out, files, self.preview_edge, host.answer_max, decoder)
            more = links(out) if self.resource_links else []
            if job.finished and job.problem is None and job.entry.has_result:
                await self._hand_over(job, ctx)
        return result(task_text(out), out, *pictures, *more, is_error=is_error(out))

    async def _files(self, entry: Entry) -> list[Path]:
        """The files of this machine that hold the saved pictures; those that cannot be had soon are left out."""
        if self.preview_edge == 0 or entry.task_id is None:
            return []
        files: list[Path] = []
        with anyio.move_on_after(FILES_WITHIN_S):
            for picture in entry.images:
                if picture.is_saved:
                    with suppress(OSError, EvolinkError):
                        files.append(await self.studio.image_store.local_file(entry.task_id, picture))
        return files

    async def _hand_over(self, job: Job, ctx: Context[Any, Any]) -> None:
        """The job's result is about to be sent. Only an answer that was written counts as delivered."""
        delivery = delivery_of(ctx)
        if delivery is None:
            await self.studio.deliver(job)
            return
        self.studio.attend(job)  # until the answer has left

        async def settled(arrived: bool) -> None:
            if arrived:
                await self.studio.deliver(job)
            await self.studio.depart(job)

        delivery.when_settled(settled)

    def wait(self, host: Host, asked_s: float | None = None) -> float:
        """Seconds: what the caller asks, but never beyond the host's limit; else the owner's setting; else the host's."""
        if asked_s is None:
            return host.wait_s if self.wait_s is None else self.wait_s
        return min(asked_s, host.longest_wait_s)


def client_of(ctx: Context[Any, Any]) -> str | None:
    """The name that the client of this call gave."""
    params = ctx.session.client_params
    return params.client_info.name if params else None


def mcp_host_of(ctx: Context[Any, Any]) -> Host:
    """The host that this call comes from, by the name that its client gave."""
    return host_named(client_of(ctx))


def format_task_error(error: EvolinkError, _: tuple[str, ...]) -> CallToolResult:
    """The answer of generate_image and get_task to an error before there is a task."""
    out = refusal(error)
    return result(task_text(out), out, is_error=True)


async def follow(job: Job, wait_s: float, report: Report) -> None:
    """Watch `job` for `wait_s` seconds, or until it is finished; `report(progress, total, message)` is called meanwhile.

    Shortly before the end the task is read once more. A job of which EvoLink has said nothing yet gets up to ID_GRACE_S
    more: with an answer that names the task id nothing can be lost.
    """
    progress = _Progress(report)
    deadline = anyio.current_time() + wait_s
    await _until(job, progress, deadline - min(LAST_READ_S, wait_s / 4))
    if job.finished:
        return
    job.poll_now()
    await _until(job, progress, deadline)
    if not (job.finished or job.heard_from):
        await _until(job, progress, anyio.current_time() + ID_GRACE_S, heard_from=True)


async def _until(job: Job, progress: _Progress, deadline: float, *, heard_from: bool = False) -> None:
    """Report the job's states until `deadline`, or until EvoLink has been heard from."""
    async with aclosing(job.states(HEARTBEAT_S)) as states:
        with anyio.CancelScope(deadline=deadline):
            async for entry in states:
                await progress.tell(entry)
                if job.heard_from if heard_from else job.is_draining:
                    return


class _Progress:
    """Progress as the protocol wants it: every number is above the last, and 100 comes only at the end."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._last = 0.0
        self._speak_from = anyio.current_time() + HEARTBEAT_S - 0.1

    async def tell(self, entry: Entry) -> None:
        """Report the entry's state; before the task has an id, only if that takes longer than a heartbeat."""
        if self._last >= 100 or (entry.task is None and anyio.current_time() < self._speak_from):
            return
        known = (entry.task.progress if entry.task else None) or 0.0
        value = 100.0 if entry.stage is not Stage.OPEN else min(known, 99.0)
        self._last = value if value > self._last else self._last + (99.9 - self._last) / 100
        await self._report(round(self._last, 4), 100.0, _progress_words(entry))


def _progress_words(entry: Entry) -> str:
    if entry.task is None:
        return "waiting for EvoLink to take the request"
    saved = sum(picture.is_saved for picture in entry.images)
    if entry.status == COMPLETED:
        return f"{entry.task.id} completed, {saved} of {len(entry.task.results)} saved"
    progress = f" {entry.task.progress:.0f} %" if entry.task.progress is not None else ""
    return f"{entry.task.id} {entry.status}{progress}"
