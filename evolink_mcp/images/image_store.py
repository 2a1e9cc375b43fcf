"""Where an account's pictures are kept: in the user's folders, or, for callers elsewhere, in a store or nowhere."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
import unicodedata
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

import anyio.to_thread

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.task import is_task_id
from evolink_mcp.errors import DownloadFailed, FolderRefused, LinkExpired, Refused, StoreUnusable
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.images.download import download
from evolink_mcp.images.folders import NAME_MAX_BYTES, PICTURE_SUFFIXES, Folders, is_reserved, open_plain, stem_of
from evolink_mcp.images.sidecar import lay_beside
from evolink_mcp.images.store import keep
from evolink_mcp.journal.entry import Entry, Picture
from evolink_mcp.sanitize import harmless
from evolink_mcp.teams.object_store import ObjectStore

NAME_MAX, ID_SHOWN = 48, 8  # characters
# Copies of pictures of callers elsewhere, for previews and resources: so long after they were written, so many bytes.
COPY_LIVES_S, COPIES_MAX_BYTES = 3600.0, 2 << 30
SWEEP_AFTER_S = 60.0

Fetch = Callable[[BinaryIO], Awaitable[int]]


class Keeping(Protocol):
    """How the images of one account are stored. `keeps`: whether they stay longer than EvoLink's links.

    `decoder` decodes the images of the whole server.
    """

    keeps: bool
    decoder: Decoder

    def check_name(self, save_as: str) -> None:
        """Check a name before anything is bought.

        Raises:
            FolderRefused: it cannot be used.
        """
        ...

    async def keep(self, entry: Entry, picture: Picture, fetch: Fetch, preview_edge: int = 0) -> Picture:
        """Fetch a picture and keep it: its facts and its place. A preview of `preview_edge` pixels is made with it.

        Raises:
            FolderRefused, StoreUnusable: it cannot be written.
            PictureUnusable: what came is no whole picture.
        """
        ...

    async def copy(self, entry: Entry, picture: Picture, save_as: str | None) -> Picture:
        """Keep a saved picture once more, under the name that another caller wants."""
        ...

    async def file(self, task_id: str, picture: Picture) -> Path:
        """A file of this machine that holds the saved picture now.

        Raises:
            OSError: it is gone.
            EvolinkError: it cannot be fetched from where it is.
        """
        ...

    async def shown(self, entry: Entry) -> Entry:
        """The entry as callers may see it: with places and links that are good for them."""
        ...


class InFolders:
    """Pictures in the user's folders, each with its sidecar unless `sidecars` is False."""

    keeps = True

    def __init__(self, folders: Folders, decoder: Decoder, *, sidecars: bool = True) -> None:
        self._folders = folders
        self.decoder = decoder
        self._sidecars = sidecars

    def check_name(self, save_as: str) -> None:
        """See Keeping."""
        self._folders.target(save_as)

    async def keep(self, entry: Entry, picture: Picture, fetch: Fetch, preview_edge: int = 0) -> Picture:
        """See Keeping."""
        target = self._target(entry, picture.index, entry.save_as)
        kept = await keep(fetch, target, self.decoder, preview_edge=preview_edge, order=entry.key)
        saved = replace(picture, **asdict(kept))
        if self._sidecars:
            await lay_beside(entry, saved)
        return saved

    async def copy(self, entry: Entry, picture: Picture, save_as: str | None) -> Picture:
        """See Keeping; the first file stays."""
        if picture.path is None or not picture.here:
            return picture
        target = self._target(entry, picture.index, save_as)
        kept = await keep(partial(_copied, Path(picture.path)), target, self.decoder, order=entry.key)
        return replace(picture, **asdict(kept))

    async def file(self, task_id: str, picture: Picture) -> Path:
        """See Keeping."""
        if picture.path is None:
            raise FileNotFoundError(f"picture {picture.index} of {task_id} was not saved")
        return Path(picture.path)

    async def shown(self, entry: Entry) -> Entry:
        """See Keeping."""
        return entry

    def _target(self, entry: Entry, index: int, save_as: str | None) -> Path:
        if save_as is not None:
            with suppress(Refused):
                wanted = self._folders.target(save_as)
                # Several pictures are numbered by their index, not by the order in which they arrive.
                stem = wanted.stem if index == 0 else f"{wanted.stem}-{index}"
                return wanted.with_name(stem + wanted.suffix)
        return self._folders.output / _name_of(entry, index)


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
        self.keeps = store is not None

    def check_name(self, save_as: str) -> None:
        """See Keeping; here it can be nothing but a name."""
        usable = save_as == Path(save_as).name and save_as not in ("", ".", "..") and "\\" not in save_as
        if not usable or not save_as.isprintable() or len(save_as.encode()) > NAME_MAX_BYTES or is_reserved(save_as):
            raise FolderRefused(
                f"save_as “{harmless(save_as, 80)}” is no plain file name, and this server saves into no folder of callers",
                advice="Give a name such as hero.png, or leave it out.",
            )

    async def keep(self, entry: Entry, picture: Picture, fetch: Fetch, preview_edge: int = 0) -> Picture:
        """See Keeping."""
        assert entry.task_id is not None
        copy = self._copy(entry.task_id, picture.index)
        await self._sweep()
        with _told_without_paths():
            kept = await keep(fetch, copy, self.decoder, preview_edge=preview_edge, order=entry.key)
        facts = asdict(kept) | {"path": None}
        if self._store is not None:
            name = _file_name(entry, picture.index, Path(kept.path).suffix)
            facts["stored"] = f"{self._account}/{_folder_of(entry.task_id)}/{name}"
            await self._store.put(facts["stored"], Path(kept.path), kept.mime_type)
        return replace(picture, **facts)

    async def copy(self, entry: Entry, picture: Picture, save_as: str | None) -> Picture:
        """See Keeping; what is stored keeps the name that it has."""
        return picture

    async def file(self, task_id: str, picture: Picture) -> Path:
        """See Keeping; it is fetched again if its copy is not here."""
        if picture.path is not None and picture.here:  # saved before the team had a store
            return Path(picture.path)
        copy = self._copy(task_id, picture.index)
        found = next((path for path in map(copy.with_suffix, PICTURE_SUFFIXES) if path.is_file()), None)
        if found is not None:
            return found
        await self._sweep()
        with _told_without_paths():
            return Path((await keep(partial(self._fetch, picture), copy, self.decoder, order=task_id)).path)

    async def shown(self, entry: Entry) -> Entry:
        """See Keeping: no path, and a link to what is stored in place of EvoLink's, which ends sooner."""
        return replace(entry, pictures=tuple([await self._linked(picture) for picture in entry.pictures]))

    async def _linked(self, picture: Picture) -> Picture:
        shown = replace(picture, path=None)
        if picture.stored is None or self._store is None:
            return shown
        try:
            url, until = await self._store.link(picture.stored)
        except StoreUnusable:
            return shown
        return replace(shown, url=url, url_expires_at=until)

    async def _fetch(self, picture: Picture, into: BinaryIO) -> int:
        if self._store is not None and picture.stored is not None:
            try:
                return await self._store.get(picture.stored, into)
            except StoreUnusable:
                if picture.url_expires_at <= self._clock():
                    raise
                into.seek(0)
                into.truncate()
        if picture.url_expires_at <= self._clock():
            raise LinkExpired("EvoLink's link to it has ended, and it is in no store")
        return await download(self._client, picture.url, into)

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


def _name_of(entry: Entry, index: int) -> str:
    several = max(entry.request.get("n", 1), len(entry.pictures)) > 1
    name = file_name(str(entry.request.get("prompt", "")), entry.task_id or "")
    return f"{name}-{index}" if several else name


def _file_name(entry: Entry, index: int, suffix: str) -> str:
    """The name by which a caller elsewhere gets the picture: as `save_as` says, with the suffix of what it is."""
    if entry.save_as is None:
        return _name_of(entry, index) + suffix
    stem = stem_of(Path(entry.save_as))
    return (stem if index == 0 else f"{stem}-{index}") + suffix


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
