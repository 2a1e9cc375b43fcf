"""Download and save each image of a completed task, once."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial

import anyio

from evolink_mcp.api import sizes
from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.request import GenerationRequest
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
from evolink_mcp.studio.derive import Deriver
from evolink_mcp.studio.events import Failed, Saved
from evolink_mcp.studio.jobs import ImageRequest, Job, Timing
from evolink_mcp.studio.journal_writer import JournalWriter
from evolink_mcp.studio.poller import merge
from evolink_mcp.studio.schedule import backoff_s

# EvoLink's documentation: a link lives 24 h.
LINK_LIVES_S = 24 * 3600
# Of a completed task that lacks links. The wait grows with each one.
REREADS_MAX = 3
REREAD_AFTER_S = 0.5
DOWNLOAD_REPEATS_MAX = 4
UNUSABLE_REPEATS_MAX = 1  # of a complete download that is no usable image
DOWNLOADS_AT_ONCE = 4  # of all tasks of a studio
# An RGBA image without compression.
BYTES_PER_PIXEL = 4


class ImageSaver:
    """Save images in the image store and record each one.

    `preview_edge` is the longest edge of a waiting caller's previews in pixels. None chooses it by the number of images.
    """

    def __init__(
        self,
        client: EvolinkClient,
        image_store: ImageStore,
        deriver: Deriver,
        writer: JournalWriter,
        timing: Timing,
        *,
        preview_edge: int | None = None,
    ) -> None:
        self._client = client
        self._image_store = image_store
        self._deriver = deriver
        self._writer = writer
        self._timing = timing
        self._preview_edge = preview_edge
        self._slots = anyio.CapacityLimiter(DOWNLOADS_AT_ONCE)

    async def check_space(self, request: ImageRequest, size_rule: str) -> None:
        """Check before the POST that the images of a request can be saved.

        Raises:
            FolderRefused, DownloadFailed: the image store cannot save them. Nothing was charged.
        """
        await self._image_store.check_space(request.save_as, space_of(request.request, size_rule))

    async def prepare(self) -> None:
        """Start the decoder while EvoLink works on the task, so that the first image does not wait for it."""
        await self._image_store.decoder.start()

    async def save(self, job: Job) -> None:
        """Save each image that is not saved yet. This server owns the entry, so no other server saves it too.

        An image that cannot be downloaded keeps its URL and an error. The first error becomes the job's problem. If the
        request has a `fit`, each saved image gets its exact copy.
        """
        await self._reread_links(job)
        task = job.entry.task
        assert task is not None
        images = self._images(job, task)
        self._writer.show_images(job, _in_order(images))
        # A moved file needs no download.
        present_entry = await self._image_store.locate(job.entry)
        indexes = {image.index for image in present_entry.images if image.needs_download}
        links = _FreshLinks(job, self._client, self._writer, self._timing)
        async with anyio.create_task_group() as group:
            for image in list(images.values()):
                if image.index in indexes:
                    group.start_soon(self._save_image, job, images, image, links)
        entry = await self._deriver.with_exact_copies(job.entry)
        if entry is not job.entry:
            await self._writer.record_images(job, entry.images)

    async def save_copies(self, job: Job) -> None:
        """Save the images again under the name that the deduplicated request wants."""
        images = {image.index: image for image in job.entry.images}
        copy_name = job.copy_name
        # Before the copies, so that a request that joins meanwhile can set its own name.
        job.copy_name = None
        for image in job.entry.images:
            images[image.index] = await self._image_store.copy(job.entry, image, copy_name)
        await self._writer.record_images(job, _in_order(images))

    def _images(self, job: Job, task: Task) -> dict[int, ResultImage]:
        """Return the task's images by index, with the facts of those that were saved before."""
        # A link lives 24 h from the task's end. A job that saw the task running knows the end: now. Any other job uses
        # the start of the task, which is earlier.
        now = self._timing.clock()
        ended_at = now if job.has_seen_running else task.created or job.entry.created_at
        images = {index: ResultImage(index, url, ended_at + LINK_LIVES_S) for index, url in enumerate(task.results)}
        for image in job.entry.images:
            # A deleted image keeps its path and its facts until it is saved again.
            if not image.is_rejected:
                image = replace(image, error=None, is_lost=False, is_unusable=False)
            images[image.index] = image
        return images

    async def _save_image(
        self, job: Job, images: dict[int, ResultImage], image: ResultImage, links: _FreshLinks
    ) -> None:
        async with self._slots:
            try:
                images[image.index] = await self._download(job, images, image.index, links)
            except EvolinkError as error:
                is_unusable = isinstance(error, PictureUnusable)
                is_lost = is_unusable or (isinstance(error, DownloadFailed) and not error.retryable)
                images[image.index] = replace(
                    images[image.index],
                    error=error.message,
                    is_lost=is_lost,
                    is_unusable=is_unusable,
                    is_rejected=isinstance(error, PictureRejected),
                )
                job.problem = job.problem or error.problem
                event = Failed(job.entry, images[image.index])
            else:
                event = Saved(job.entry, images[image.index])
        # Each image is recorded at once: after a crash, the next server downloads only the others.
        await self._writer.record_images(job, _in_order(images))
        self._writer.events.publish(event)

    async def _download(self, job: Job, images: dict[int, ResultImage], index: int, links: _FreshLinks) -> ResultImage:
        """Return the saved image. A new link replaces a refused one in `images`."""
        # Without a waiting caller no answer shows a preview.
        edge = edge_of(len(job.entry.images), self._preview_edge) if job.callers else 0
        repeats = 0
        while True:
            image = images[index]
            try:
                fetch = partial(download, self._client, image.url, budget=job.download_budget)
                return await self._image_store.save(job.entry, image, fetch, edge)
            except StoreUnusable:  # the store has repeated the request itself
                raise
            except DownloadFailed as error:
                if isinstance(error, LinkExpired) and (fresh := await links.replace(image)) is not None:
                    images[index] = fresh
                    continue
                if isinstance(error, LinkExpired) and image.url_expires_at > self._timing.clock():
                    # The link is too young to expire. Some servers of the image host may not know it yet.
                    error = DownloadFailed("EvoLink's link to the picture is refused")
                last = UNUSABLE_REPEATS_MAX if isinstance(error, PictureUnusable) else DOWNLOAD_REPEATS_MAX
                if not error.retryable or repeats >= last:
                    raise error
                await self._timing.sleep(backoff_s(repeats))
                repeats += 1

    async def _reread_links(self, job: Job) -> None:
        """Read a completed task again if it lacks links. It is never bought again."""
        task = job.entry.task
        assert task is not None
        requested = job.entry.request.get("n", 1)
        for attempt in range(REREADS_MAX):
            # EvoLink often makes fewer images than requested. Then one more read is enough.
            if len(task.results) >= requested or (task.results and attempt > 0):
                return
            await self._timing.sleep(REREAD_AFTER_S * (attempt + 1))
            with suppress(EvolinkError):
                task = merge(task, await self._client.task(task.id))
                await self._writer.record_poll(job, task)


class _FreshLinks:
    """New links to the images of one task. EvoLink gets one question, after the first refused link."""

    def __init__(self, job: Job, client: EvolinkClient, writer: JournalWriter, timing: Timing) -> None:
        self._job = job
        self._client = client
        self._writer = writer
        self._timing = timing
        self._lock = anyio.Lock()
        self._has_asked = False

    async def replace(self, image: ResultImage) -> ResultImage | None:
        """Return the image with its new link, or None if EvoLink sends no other one."""
        # Several images may be refused at the same time, and one read renews all links.
        async with self._lock:
            task = self._job.entry.task
            if not self._has_asked and task is not None:
                self._has_asked = True
                with suppress(EvolinkError):
                    await self._writer.record_poll(self._job, merge(task, await self._client.task(task.id)))
        task = self._job.entry.task
        links = task.results if task is not None else ()
        if image.index >= len(links) or links[image.index] == image.url:
            return None
        return replace(image, url=links[image.index], url_expires_at=self._timing.clock() + LINK_LIVES_S)


def space_of(request: GenerationRequest, size_rule: str) -> int:
    """Return the bytes that the images of a request need at most: those of images without compression."""
    model = request.image_model
    size = sizes.resolve(request.size, request.resolution, size_rule, model.limits).size
    pixels = model.limits.pixels_max if size is None else size.width * size.height
    return request.n * pixels * BYTES_PER_PIXEL


def _in_order(images: dict[int, ResultImage]) -> tuple[ResultImage, ...]:
    return tuple(images[index] for index in sorted(images))
