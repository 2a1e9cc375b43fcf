"""Store the images of remote callers in the object store, or only at EvoLink."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import anyio.to_thread

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.task import is_task_id
from evolink_mcp.errors import Charged, DownloadFailed, FolderRefused, LinkExpired, StoreUnusable
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.images.download import download
from evolink_mcp.images.folders import (
    NAME_MAX_BYTES,
    PATH_MAX_CHARS,
    PICTURE_SUFFIXES,
    check_writable,
    cut_to_bytes,
    free_bytes_of,
    is_reserved,
    stem_of,
)
from evolink_mcp.images.store import (
    ENDING_MAX_BYTES,
    Derivative,
    Fetch,
    UnfinishedFiles,
    default_stem,
    origin_of_entry,
    save_content,
    save_image,
)
from evolink_mcp.journal.entry import DerivedFile, Entry, ResultImage
from evolink_mcp.journal.journal import Journal
from evolink_mcp.pasted import PathSystem, clean_file_name, name_fault
from evolink_mcp.sanitize import harmless
from evolink_mcp.teams.object_store import MARKER, ObjectStore

# Previews and resources need a local copy. It saves a download while the caller looks at the image.
COPY_LIFETIME_S = 3600.0
COPIES_MAX_BYTES = 2 << 30
SWEEP_INTERVAL_S = 60.0


class RemoteImageStore:
    """An image store for callers on other machines. Answers never show a path of this server.

    It stores images in `object_store`. Without one, the answer has only EvoLink's link. `copies` is a local folder for
    temporary copies; previews and resources use them. With `has_origin` each stored image contains its prompt, task ID and
    model, unless that would break a signature.
    """

    def __init__(
        self,
        client: EvolinkClient,
        journal: Journal,
        object_store: ObjectStore | None,
        copies: Path,
        decoder: Decoder,
        *,
        has_origin: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._journal = journal
        self._profile = journal.channel
        self._object_store = object_store
        self._store_id: str | None = None  # unknown until the first order
        self._copies = copies
        self.decoder = decoder
        self._has_origin = has_origin and object_store is not None
        self._clock = clock
        self._swept_at = 0.0
        self._sweeper = UnfinishedFiles()
        self.is_permanent = object_store is not None

    def check_name(self, save_as: str) -> str:
        """See ImageStore. Accept only a plain file name."""
        save_as = clean_file_name(save_as, PathSystem(is_windows=False)) if len(save_as) <= PATH_MAX_CHARS else save_as
        is_plain = save_as == Path(save_as).name and save_as not in ("", ".", "..") and "\\" not in save_as
        if not is_plain or not save_as.isprintable() or len(save_as.encode()) > NAME_MAX_BYTES or is_reserved(save_as):
            raise FolderRefused(
                f"save_as “{harmless(save_as, 80)}” is no plain file name, and this server saves into no folder of callers",
                advice="Give a name such as hero.png, or leave it out.",
            )
        if fault := name_fault(save_as):
            raise FolderRefused(
                f"save_as “{harmless(save_as, 80)}” is no plain file name: it {fault}",
                advice="Give a name such as hero.png, or leave it out.",
            )
        return save_as

    async def check_space(self, save_as: str | None, size: int) -> None:
        """See ImageStore. Each image needs a local copy first, and a folder store its marker."""
        await self._check_marker(charged="no")
        try:
            await anyio.to_thread.run_sync(check_writable, self._copies)
            free = await anyio.to_thread.run_sync(free_bytes_of, self._copies)
        except OSError:
            free = 0
        if free < size:
            raise DownloadFailed(
                "this server's disk cannot take the picture now",
                code="server_disk",
                charged="no",
                advice="Nothing was sent. The owner of this server must free some space. Then call again.",
            )

    async def save(self, entry: Entry, image: ResultImage, fetch: Fetch, preview_edge: int = 0) -> ResultImage:
        """See ImageStore."""
        assert entry.task_id is not None
        copy = self._copy_path(entry.task_id, image.index)
        await self._sweep()
        with _without_paths():
            file = await save_image(
                fetch,
                copy,
                self.decoder,
                preview_edge=preview_edge,
                order=entry.key,
                origin=origin_of_entry(entry) if self._has_origin else None,
                sweeper=self._sweeper,
            )
        # The other servers do not have this copy, and the sweep deletes it after an hour.
        facts = asdict(file) | {"path": None}
        if self._object_store is not None:
            # Otherwise the image would be stored below an empty mount point.
            await self._check_marker(charged="yes")
            name = _object_name(entry, image.index, Path(file.path).suffix)
            facts["object_name"] = f"{self._profile}/{_folder_of(entry.task_id)}/{name}"
            await self._object_store.put(facts["object_name"], Path(file.path), file.mime_type)
        return replace(image, **facts)

    async def _check_marker(self, *, charged: Charged) -> None:
        """Check that a folder store is the one that the journal knows. Its share may not be mounted.

        A new store gets its marker. The journal of another server may know the store already.

        Raises:
            StoreUnusable: the folder has no marker, or that of another store.
        """
        store = self._object_store
        if store is None or not store.is_folder:
            return
        try:
            # The ID of a store never changes, so the journal is read once.
            self._store_id = self._store_id or await self._journal.store_id(store.location_hash)
            marker = await store.read_marker() if self._store_id is not None else await store.ensure_marker()
        except StoreUnusable as error:
            raise _unmounted(error.message, charged) from error
        if marker is None:
            store.count_failure("mount")
            raise _unmounted("the folder for pictures has no marker file", charged)
        # The journal learns the ID after the file is complete, so a crash between them changes nothing.
        self._store_id = self._store_id or await self._journal.add_store_id(store.location_hash, marker)
        if marker != self._store_id:
            store.count_failure("mount")
            raise _unmounted("the folder for pictures is another store", charged)

    async def copy(self, entry: Entry, image: ResultImage, save_as: str | None) -> ResultImage:
        """See ImageStore. A stored image keeps its first name."""
        return image

    async def save_derived(self, derivative: Derivative) -> DerivedFile:
        """See ImageStore. The name of a stored file has a part of its hash, so that it replaces no other content."""
        if self._object_store is None:
            raise FolderRefused(
                "this server keeps no files for callers on other machines, so it makes no copies",
                advice="Download the picture from its link and change it on your machine.",
            )
        await self._sweep()
        try:
            path, sha256 = await anyio.to_thread.run_sync(save_content, derivative, self._copies)
        except OSError as error:
            raise DownloadFailed(
                "this server's disk cannot take the file now", code="server_disk", charged="no"
            ) from error
        try:
            await self._check_marker(charged="no")
            folder = _folder_of(derivative.task_id or "derived")
            # Another call can make a different file for the same target.
            name = f"{self._profile}/{folder}/{derivative.name}-{sha256[:8]}{derivative.suffix}"
            await self._object_store.put(name, path, derivative.mime_type)
        finally:
            with suppress(OSError):
                path.unlink()
        return derivative.file_facts(sha256, object_name=name)

    async def link_derived(self, file: DerivedFile) -> tuple[str, float] | None:
        """See ImageStore."""
        if self._object_store is None or file.object_name is None:
            return None
        return await self._object_store.link(file.object_name)

    async def local_file(self, task_id: str, image: ResultImage) -> Path:
        """See ImageStore. Download the image again if there is no copy."""
        if image.path is not None and image.is_present:  # saved before the team had an object store
            return Path(image.path)
        copy = self._copy_path(task_id, image.index)
        existing = next((path for path in map(copy.with_suffix, PICTURE_SUFFIXES) if path.is_file()), None)
        if existing is not None:
            return existing
        await self._sweep()
        with _without_paths():
            return Path((await save_image(partial(self._fetch, image), copy, self.decoder, order=task_id)).path)

    async def locate(self, entry: Entry) -> Entry:
        """See ImageStore. Callers cannot move objects."""
        return entry

    async def entries_for_caller(self, entries: Sequence[Entry]) -> list[Entry]:
        """See ImageStore."""
        return [await self.entry_for_caller(entry) for entry in entries]

    async def entry_for_caller(self, entry: Entry) -> Entry:
        """See ImageStore. Replace EvoLink's links by links to the object store, which live longer."""
        return replace(entry, images=tuple([await self._with_link(image) for image in entry.images]))

    async def _with_link(self, image: ResultImage) -> ResultImage:
        derived = tuple([await self._linked_copy(file) for file in image.derived])
        visible = replace(image, path=None, derived=derived)
        if image.object_name is None or self._object_store is None:
            return visible
        try:
            url, expires_at = await self._object_store.link(image.object_name)
        except StoreUnusable:
            return visible
        return replace(visible, url=url, url_expires_at=expires_at)

    async def _linked_copy(self, file: DerivedFile) -> DerivedFile:
        try:
            link = await self.link_derived(file)
        except StoreUnusable:
            link = None
        return replace(file, path=None, url=link[0] if link else None)

    async def _fetch(self, image: ResultImage, into: BinaryIO) -> int:
        if self._object_store is not None and image.object_name is not None:
            try:
                return await self._object_store.get(image.object_name, into)
            except StoreUnusable:
                # EvoLink still has the image until then.
                if image.url_expires_at <= self._clock():
                    raise
                into.seek(0)  # the store may have failed after a part of the image
                into.truncate()
        if image.url_expires_at <= self._clock():
            raise LinkExpired("EvoLink's link to it has ended, and it is in no store")
        return await download(self._client, image.url, into)

    def _copy_path(self, task_id: str, index: int) -> Path:
        # The name of a copy must show neither the profile nor the task to other users of this machine.
        name = hashlib.sha256(f"{self._profile} {task_id} {index}".encode()).hexdigest()[:40]
        return self._copies / name

    async def _sweep(self) -> None:
        if self._clock() - self._swept_at >= SWEEP_INTERVAL_S:
            self._swept_at = self._clock()
            await anyio.to_thread.run_sync(_remove_old_copies, self._copies, self._clock())


def _unmounted(problem: str, charged: Charged) -> StoreUnusable:
    advice = f"The owner of this server must mount the folder of EVOLINK_MCP_STORE. It contains the file {MARKER}."
    if charged == "yes":
        advice = f"The picture is paid, and EvoLink keeps it for 24 hours. {advice} Then call get_task."
    return StoreUnusable(problem, charged=charged, advice=advice)


@contextmanager
def _without_paths() -> Generator[None]:
    """Replace an error of the local disk, which names a path, by one that a remote caller may see."""
    try:
        yield
    except FolderRefused as error:
        raise DownloadFailed("this server's disk cannot take the picture now", code="server_disk") from error


def _remove_old_copies(folder: Path, now: float) -> None:
    """Remove copies older than COPY_LIFETIME_S, and the oldest ones beyond COPIES_MAX_BYTES."""
    with suppress(OSError):
        copies = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in folder.iterdir())
        room = COPIES_MAX_BYTES
        for written_at, size, path in reversed(copies):
            room -= size
            if room < 0 or written_at < now - COPY_LIFETIME_S:
                with suppress(OSError):
                    path.unlink()


def _folder_of(task_id: str) -> str:
    # A task ID of unusual form can contain parts of a path.
    return task_id if is_task_id(task_id) else hashlib.sha256(task_id.encode()).hexdigest()[:40]


def _object_name(entry: Entry, index: int, suffix: str) -> str:
    """Return the file name of a stored image: the stem of `save_as`, with the suffix of the image's type."""
    if entry.save_as is None:
        return default_stem(entry, index) + suffix
    stem = cut_to_bytes(stem_of(Path(entry.save_as)), NAME_MAX_BYTES - ENDING_MAX_BYTES)
    return (stem if index == 0 else f"{stem}-{index}") + suffix
