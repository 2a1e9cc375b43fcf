"""Every picture of a completed task is fetched and saved, once."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import anyio

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.task import Task
from evolink_mcp.errors import (
    DownloadFailed,
    EvolinkError,
    LinkExpired,
    PictureRejected,
    PictureUnusable,
    StoreUnusable,
)
from evolink_mcp.images.download import download
from evolink_mcp.images.previews import edge_of
from evolink_mcp.images.store import ImageStore
from evolink_mcp.journal.entry import ResultImage
from evolink_mcp.studio.events import JournalWriter
from evolink_mcp.studio.jobs import Job, Sleep
from evolink_mcp.studio.schedule import backoff_s
from evolink_mcp.studio.watch import merged
from evolink_mcp.teams.metrics import Metrics

LINK_LIVES_S = 24 * 3600
REREADS_MAX = 3
REREAD_AFTER_S = 0.5
REPEATS_MAX = 4
UNUSABLE_REPEATS_MAX = 1
DOWNLOADS_AT_ONCE = 4


class ImageSaver:
    """Lets `image_store` keep every picture, and tells `recorder` of each one.

    `preview_edge` is the longest edge of the previews that a waiting caller will be shown, as in `Waiting`.
    """

    def __init__(
        self,
        client: EvolinkClient,
        image_store: ImageStore,
        recorder: JournalWriter,
        *,
        preview_edge: int | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Sleep = anyio.sleep,
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._client = client
        self._image_store = image_store
        self._recorder = recorder
        self._preview_edge = preview_edge
        self._clock = clock
        self._sleep = sleep
        self._slots = anyio.CapacityLimiter(DOWNLOADS_AT_ONCE)

    async def collect(self, job: Job) -> None:
        """Save every picture that is not saved yet. The job's server owns the entry, so no other one saves them too.

        A picture that cannot be fetched keeps its URL and says why. The first such reason becomes the job's problem.
        """
        await self._reread(job)
        task = job.entry.task
        assert task is not None
        pictures = self._pictures(job, task)
        self._recorder.pictures_expected(job, _ordered(pictures))
        async with anyio.create_task_group() as group:
            for picture in list(pictures.values()):
                if not picture.is_saved and not picture.is_rejected:
                    group.start_soon(self._fetch, job, pictures, picture)

    def _pictures(self, job: Job, task: Task) -> dict[int, ResultImage]:
        """The task's pictures by index, with what was saved of them before."""
        # A link is valid for 24 h after the task's end. Only a job that saw the task run knows that moment: it is now.
        # For any other job the task's start is the safe assumption.
        ended = self._clock() if job.seen_running else task.created or job.entry.created_at
        expires = ended + LINK_LIVES_S
        pictures = {index: ResultImage(index, url, expires) for index, url in enumerate(task.results)}
        for picture in job.entry.images:
            if picture.is_saved and not picture.is_present and picture.url_expires_at > self._clock():
                picture = ResultImage(picture.index, picture.url, picture.url_expires_at)
            if picture.is_rejected:
                pictures[picture.index] = picture
            elif picture.is_saved or not pictures.get(picture.index, picture).is_saved:
                pictures[picture.index] = replace(picture, error=None, is_lost=False, is_unusable=False)
        return pictures

    async def _fetch(self, job: Job, pictures: dict[int, ResultImage], picture: ResultImage) -> None:
        async with self._slots:
            try:
                pictures[picture.index] = await self._download(job, picture)
            except EvolinkError as error:
                unusable = isinstance(error, PictureUnusable)
                lost = unusable or (isinstance(error, DownloadFailed) and not error.retryable)
                pictures[picture.index] = replace(
                    picture,
                    error=error.message,
                    is_lost=lost,
                    is_unusable=unusable,
                    is_rejected=isinstance(error, PictureRejected),
                )
                job.problem = job.problem or error.problem
                self._metrics.downloads["failed"] += 1
            else:
                self._metrics.downloads["saved"] += 1
        await self._recorder.pictures_changed(job, _ordered(pictures))

    async def copy(self, job: Job) -> None:
        """Keep the pictures once more under the name that a caller who has joined wants."""
        pictures = {picture.index: picture for picture in job.entry.images}
        for picture in job.entry.images:
            pictures[picture.index] = await self._image_store.copy(job.entry, picture, job.copy_as)
        await self._recorder.pictures_changed(job, _ordered(pictures))

    async def _download(self, job: Job, picture: ResultImage) -> ResultImage:
        edge = edge_of(len(job.entry.images), self._preview_edge) if job.callers else 0
        for repeat in range(REPEATS_MAX + 1):
            try:
                fetch = partial(download, self._client, picture.url)
                return await self._image_store.save(job.entry, picture, fetch, edge)
            except StoreUnusable:  # the store has been asked several times
                raise
            except DownloadFailed as error:
                if isinstance(error, LinkExpired) and picture.url_expires_at > self._clock():
                    # Refused before its time: the link may not be known to every server of the host yet.
                    error = DownloadFailed("EvoLink's link to the picture is refused")
                last = UNUSABLE_REPEATS_MAX if isinstance(error, PictureUnusable) else REPEATS_MAX
                if not error.retryable or repeat >= last:
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
                await self._recorder.task_seen(job, task)


def _ordered(pictures: dict[int, ResultImage]) -> tuple[ResultImage, ...]:
    return tuple(pictures[index] for index in sorted(pictures))
