"""Every picture of a completed task is fetched and saved, once."""

from __future__ import annotations

import re
import shutil
import time
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import anyio
import anyio.to_thread

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.task import Task
from evolink_mcp.errors import DownloadFailed, EvolinkError, LinkExpired, PictureUnusable, Refused
from evolink_mcp.journal.entry import Picture
from evolink_mcp.pictures.downloads import download
from evolink_mcp.pictures.folders import Folders, open_plain
from evolink_mcp.pictures.previews import edge_of
from evolink_mcp.pictures.sidecar import lay_beside
from evolink_mcp.pictures.store import Kept, keep
from evolink_mcp.sanitize import harmless
from evolink_mcp.studio.jobs import Job, Sleep
from evolink_mcp.studio.recorder import Recorder
from evolink_mcp.studio.schedule import backoff_s
from evolink_mcp.studio.watch import merged

LINK_LIVES_S = 24 * 3600
NAME_MAX, ID_SHOWN = 48, 8  # characters
REREADS_MAX = 3
REREAD_AFTER_S = 0.5
REPEATS_MAX = 4
UNUSABLE_REPEATS_MAX = 1
DOWNLOADS_AT_ONCE = 4


class Collector:
    """Saves pictures into `folders`, and tells `recorder` of each one.

    `preview_edge` is the longest edge of the previews that a waiting caller will be shown, as in `Waiting`.
    """

    def __init__(
        self,
        client: EvolinkClient,
        folders: Folders,
        recorder: Recorder,
        *,
        sidecars: bool = True,
        preview_edge: int | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Sleep = anyio.sleep,
    ) -> None:
        self._client = client
        self._folders = folders
        self._recorder = recorder
        self._sidecars = sidecars
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
                if not picture.saved:
                    group.start_soon(self._fetch, job, pictures, picture)

    def _pictures(self, job: Job, task: Task) -> dict[int, Picture]:
        """The task's pictures by index, with what was saved of them before."""
        # A link is valid for 24 h after the task's end. Only a job that saw the task run knows that moment: it is now.
        # For any other job the task's start is the safe assumption.
        ended = self._clock() if job.seen_running else task.created or job.entry.created_at
        expires = ended + LINK_LIVES_S
        pictures = {index: Picture(index, url, expires) for index, url in enumerate(task.results)}
        for picture in job.entry.pictures:
            if picture.saved and not picture.here and picture.url_expires_at > self._clock():
                picture = Picture(picture.index, picture.url, picture.url_expires_at)
            if picture.saved or not pictures.get(picture.index, picture).saved:
                pictures[picture.index] = replace(picture, error=None, lost=False, unusable=False)
        return pictures

    async def _fetch(self, job: Job, pictures: dict[int, Picture], picture: Picture) -> None:
        async with self._slots:
            try:
                kept = await self._download(job, picture)
            except EvolinkError as error:
                unusable = isinstance(error, PictureUnusable)
                lost = unusable or (isinstance(error, DownloadFailed) and not error.retryable)
                pictures[picture.index] = replace(picture, error=error.what, lost=lost, unusable=unusable)
                job.problem = job.problem or error.problem
            else:
                pictures[picture.index] = replace(picture, **asdict(kept))
                if self._sidecars:
                    await lay_beside(job.entry, pictures[picture.index])
        await self._recorder.pictures_changed(job, _ordered(pictures))

    async def copy(self, job: Job) -> None:
        """Save the pictures once more under the name that a caller who has joined wants; the first files stay."""
        pictures = {picture.index: picture for picture in job.entry.pictures}
        for picture in job.entry.pictures:
            if picture.path is not None and picture.here:
                kept = await keep(partial(_copied, Path(picture.path)), self._target(job, picture.index, job.copy_as))
                pictures[picture.index] = replace(picture, **asdict(kept))
        await self._recorder.pictures_changed(job, _ordered(pictures))

    def _target(self, job: Job, index: int, save_as: str | None) -> Path:
        if save_as is not None:
            with suppress(Refused):
                wanted = self._folders.target(save_as)
                # Several pictures are numbered by their index, not by the order in which they arrive.
                stem = wanted.stem if index == 0 else f"{wanted.stem}-{index}"
                return wanted.with_name(stem + wanted.suffix)
        several = max(job.entry.request.get("n", 1), len(job.entry.pictures)) > 1
        name = file_name(str(job.entry.request.get("prompt", "")), job.entry.task_id or "")
        return self._folders.output / (f"{name}-{index}" if several else name)

    async def _download(self, job: Job, picture: Picture) -> Kept:
        target = self._target(job, picture.index, job.entry.save_as)
        edge = edge_of(len(job.entry.pictures), self._preview_edge) if job.callers else 0
        for repeat in range(REPEATS_MAX + 1):
            try:
                return await keep(partial(download, self._client, picture.url), target, preview_edge=edge)
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


def file_name(prompt: str, task_id: str) -> str:
    """A name that people can read: the prompt's first words, and the last letters of the task's id."""
    said = unicodedata.normalize("NFC", harmless(prompt, 4 * NAME_MAX)).lower()
    words = "".join(char if unicodedata.category(char)[0] in "LMN" else " " for char in said).split()
    while words and words[0] in ("a", "an", "the"):
        del words[0]
    name = ""
    for word in words:
        if len(name) + len(word) + bool(name) > NAME_MAX:
            name = name or word[:NAME_MAX]
            break
        name += "-" * bool(name) + word
    end = re.sub(r"[^0-9A-Za-z]", "", task_id)[-ID_SHOWN:]
    return "-".join(filter(None, (name, end))) or "picture"


async def _copied(source: Path, into: BinaryIO) -> int:
    def copy() -> int:
        with open_plain(source) as file:
            shutil.copyfileobj(file, into)
        return into.tell()

    return await anyio.to_thread.run_sync(copy)


def _ordered(pictures: dict[int, Picture]) -> tuple[Picture, ...]:
    return tuple(pictures[index] for index in sorted(pictures))
