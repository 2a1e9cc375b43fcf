"""Every picture of a completed task is fetched and saved, once."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import anyio

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.task import Task
from evolink_mcp.errors import DownloadFailed, EvolinkError, LinkExpired, Refused
from evolink_mcp.journal.entry import Picture
from evolink_mcp.pictures.downloads import download
from evolink_mcp.pictures.folders import Folders
from evolink_mcp.pictures.sidecar import lay_beside
from evolink_mcp.pictures.store import Kept, keep
from evolink_mcp.studio.jobs import Job, Sleep, TaskLock
from evolink_mcp.studio.recorder import Recorder
from evolink_mcp.studio.schedule import backoff_s
from evolink_mcp.studio.watch import merged

LINK_LIVES_S = 24 * 3600
REREADS_MAX = 3
REREAD_AFTER_S = 0.5
REPEATS_MAX = 2
DOWNLOADS_AT_ONCE = 4


class Collector:
    """Saves pictures into `folders`, and tells `recorder` of each one."""

    def __init__(
        self,
        client: EvolinkClient,
        folders: Folders,
        recorder: Recorder,
        *,
        locks: Path | None = None,
        sidecars: bool = True,
        clock: Callable[[], float] = time.time,
        sleep: Sleep = anyio.sleep,
    ) -> None:
        self._client = client
        self._folders = folders
        self._recorder = recorder
        self._locks = locks
        self._sidecars = sidecars
        self._clock = clock
        self._sleep = sleep
        self._slots = anyio.CapacityLimiter(DOWNLOADS_AT_ONCE)

    async def collect(self, job: Job) -> None:
        """Save every picture that is not saved yet: once, even with another server on the same task.

        A picture that cannot be fetched keeps its URL and says why. The first such reason becomes the job's problem.
        """
        await self._reread(job)
        task = job.entry.task
        assert task is not None
        async with TaskLock(self._locks, task.id, self._sleep):
            pictures = self._pictures(job, task)
            self._recorder.pictures_changed(job, _ordered(pictures))
            async with anyio.create_task_group() as group:
                for picture in list(pictures.values()):
                    if not picture.saved:
                        group.start_soon(self._fetch, job, pictures, picture)

    def _pictures(self, job: Job, task: Task) -> dict[int, Picture]:
        """The task's pictures by index, with what this or another server has saved of them before."""
        # A link is valid for 24 h after the task's end. Only a job that saw the task run knows that moment: it is now.
        # For any other job the task's start is the safe assumption.
        ended = self._clock() if job.seen_running else task.created or job.entry.created_at
        expires = ended + LINK_LIVES_S
        pictures = {index: Picture(index, url, expires) for index, url in enumerate(task.results)}
        known = self._recorder.known(task.id)
        for picture in (*job.entry.pictures, *(known.pictures if known else ())):
            if picture.saved and not picture.here and picture.url_expires_at > self._clock():
                picture = Picture(picture.index, picture.url, picture.url_expires_at)
            if picture.saved or not pictures.get(picture.index, picture).saved:
                pictures[picture.index] = replace(picture, error=None, lost=False)
        return pictures

    async def _fetch(self, job: Job, pictures: dict[int, Picture], picture: Picture) -> None:
        async with self._slots:
            try:
                kept = await self._download(job, picture)
            except EvolinkError as error:
                lost = isinstance(error, DownloadFailed) and not error.retryable
                pictures[picture.index] = replace(picture, error=error.what, lost=lost)
                job.problem = job.problem or error.problem
            else:
                pictures[picture.index] = replace(picture, **asdict(kept))
                if self._sidecars:
                    await lay_beside(job.entry, pictures[picture.index])
        self._recorder.pictures_changed(job, _ordered(pictures))

    async def _download(self, job: Job, picture: Picture) -> Kept:
        target = self._folders.output / f"{job.entry.task_id}-{picture.index}"
        if job.entry.save_as is not None:
            with suppress(Refused):
                wanted = self._folders.target(job.entry.save_as)
                # Several pictures are numbered by their index, not by the order in which they arrive.
                stem = wanted.stem if picture.index == 0 else f"{wanted.stem}-{picture.index}"
                target = wanted.with_name(stem + wanted.suffix)
        for repeat in range(REPEATS_MAX + 1):
            try:
                return await keep(partial(download, self._client, picture.url), target)
            except DownloadFailed as error:
                if isinstance(error, LinkExpired) and picture.url_expires_at > self._clock():
                    # Refused before its time: the link may not be known to every server of the host yet.
                    error = DownloadFailed("EvoLink's link to the picture is refused")
                if not error.retryable or repeat == REPEATS_MAX:
                    raise error
                await self._sleep(backoff_s(repeat))
        raise AssertionError("unreachable")

    async def _reread(self, job: Job) -> None:
        """Read a completed task that lacks its links again, a few times. It is never bought again."""
        task = job.entry.task
        assert task is not None
        asked = job.entry.request.get("n", 1)
        for attempt in range(REREADS_MAX):
            # Fewer pictures than asked are common and final: one more read is enough for them.
            if len(task.results) >= asked or (task.results and attempt > 0):
                return
            await self._sleep(REREAD_AFTER_S * (attempt + 1))
            with suppress(EvolinkError):
                task = merged(task, await self._client.task(task.id))
                self._recorder.task_seen(job, task)


def _ordered(pictures: dict[int, Picture]) -> tuple[Picture, ...]:
    return tuple(pictures[index] for index in sorted(pictures))
