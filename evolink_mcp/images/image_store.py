"""Save result images for callers on other machines."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import anyio.to_thread

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.task import is_task_id
from evolink_mcp.errors import DownloadFailed, FolderRefused, LinkExpired, StoreUnusable
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.images.download import download
from evolink_mcp.images.folders import NAME_MAX_BYTES, PICTURE_SUFFIXES, is_reserved, stem_of
from evolink_mcp.images.store import Fetch, default_stem, save_image
from evolink_mcp.journal.entry import Entry, Picture
from evolink_mcp.sanitize import harmless
from evolink_mcp.teams.object_store import ObjectStore

# Copies of pictures of callers elsewhere, for previews and resources: so long after they were written, so many bytes.
COPY_LIVES_S, COPIES_MAX_BYTES = 3600.0, 2 << 30
SWEEP_AFTER_S = 60.0


class ForCallersElsewhere:
    """Pictures of callers on other machines: in `store`, or nowhere, if None; no path of this machine is shown.

    Copies for previews and resources lie in `copies`, a folder of this server, for a while.
    """

    def __init__(
        self,
        client: EvolinkClient,
        account: str,
        store: ObjectStore | None,
        copies: Path,
        decoder: Decoder,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._account = account
        self._store = store
        self._copies = copies
        self.decoder = decoder
        self._clock = clock
        self._swept = 0.0
        self.is_permanent = store is not None

    def check_name(self, save_as: str) -> None:
        """See ImageStore; here it can be nothing but a name."""
        usable = save_as == Path(save_as).name and save_as not in ("", ".", "..") and "\\" not in save_as
        if not usable or not save_as.isprintable() or len(save_as.encode()) > NAME_MAX_BYTES or is_reserved(save_as):
            raise FolderRefused(
                f"save_as “{harmless(save_as, 80)}” is no plain file name, and this server saves into no folder of callers",
                advice="Give a name such as hero.png, or leave it out.",
            )

    async def save(self, entry: Entry, image: Picture, fetch: Fetch, preview_edge: int = 0) -> Picture:
        """See ImageStore."""
        assert entry.task_id is not None
        copy = self._copy(entry.task_id, image.index)
        await self._sweep()
        with _told_without_paths():
            kept = await save_image(fetch, copy, self.decoder, preview_edge=preview_edge, order=entry.key)
        facts = asdict(kept) | {"path": None}
        if self._store is not None:
            name = _file_name(entry, image.index, Path(kept.path).suffix)
            facts["stored"] = f"{self._account}/{_folder_of(entry.task_id)}/{name}"
            await self._store.put(facts["stored"], Path(kept.path), kept.mime_type)
        return replace(image, **facts)

    async def copy(self, entry: Entry, image: Picture, save_as: str | None) -> Picture:
        """See ImageStore; what is stored keeps the name that it has."""
        return image

    async def local_file(self, task_id: str, image: Picture) -> Path:
        """See ImageStore; it is fetched again if its copy is not here."""
        if image.path is not None and image.here:  # saved before the team had a store
            return Path(image.path)
        copy = self._copy(task_id, image.index)
        found = next((path for path in map(copy.with_suffix, PICTURE_SUFFIXES) if path.is_file()), None)
        if found is not None:
            return found
        await self._sweep()
        with _told_without_paths():
            return Path((await save_image(partial(self._fetch, image), copy, self.decoder, order=task_id)).path)

    async def entry_for_caller(self, entry: Entry) -> Entry:
        """See ImageStore: no path, and a link to what is stored in place of EvoLink's, which ends sooner."""
        return replace(entry, pictures=tuple([await self._linked(image) for image in entry.pictures]))

    async def _linked(self, image: Picture) -> Picture:
        shown = replace(image, path=None)
        if image.stored is None or self._store is None:
            return shown
        try:
            url, until = await self._store.link(image.stored)
        except StoreUnusable:
            return shown
        return replace(shown, url=url, url_expires_at=until)

    async def _fetch(self, image: Picture, into: BinaryIO) -> int:
        if self._store is not None and image.stored is not None:
            try:
                return await self._store.get(image.stored, into)
            except StoreUnusable:
                if image.url_expires_at <= self._clock():
                    raise
                into.seek(0)
                into.truncate()
        if image.url_expires_at <= self._clock():
            raise LinkExpired("EvoLink's link to it has ended, and it is in no store")
        return await download(self._client, image.url, into)

    def _copy(self, task_id: str, index: int) -> Path:
        name = hashlib.sha256(f"{self._account} {task_id} {index}".encode()).hexdigest()[:40]
        return self._copies / name

    async def _sweep(self) -> None:
        if self._clock() - self._swept >= SWEEP_AFTER_S:
            self._swept = self._clock()
            await anyio.to_thread.run_sync(_sweep, self._copies, self._clock())


@contextmanager
def _told_without_paths() -> Generator[None]:
    """A fault of this server's disk, in words that show no path of it."""
    try:
        yield
    except FolderRefused as error:
        raise DownloadFailed("this server's disk cannot take the picture now", code="server_disk") from error


def _sweep(folder: Path, now: float) -> None:
    """Remove copies that are old, and the oldest ones beyond COPIES_MAX_BYTES."""
    with suppress(OSError):
        copies = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in folder.iterdir())
        room = COPIES_MAX_BYTES
        for written, size, path in reversed(copies):
            room -= size
            if room < 0 or written < now - COPY_LIVES_S:
                with suppress(OSError):
                    path.unlink()


def _folder_of(task_id: str) -> str:
    return task_id if is_task_id(task_id) else hashlib.sha256(task_id.encode()).hexdigest()[:40]


def _file_name(entry: Entry, index: int, suffix: str) -> str:
    """The name by which a caller elsewhere gets the picture: as `save_as` says, with the suffix of what it is."""
    if entry.save_as is None:
        return default_stem(entry, index) + suffix
    stem = stem_of(Path(entry.save_as))
    return (stem if index == 0 else f"{stem}-{index}") + suffix
