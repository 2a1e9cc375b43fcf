"""Save result images: check the downloaded file, give it a free name, never overwrite another file.

`ImageStore` is the interface for the studio. `LocalImageStore` saves into the user's folders.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import anyio.to_thread

from evolink_mcp.api.targets import ICO
from evolink_mcp.causes import folder_fault
from evolink_mcp.errors import (
    DecoderUnavailable,
    DownloadFailed,
    EvolinkError,
    FolderRefused,
    JournalUnwritable,
    PictureRejected,
    PictureUnusable,
    Refused,
)
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.images.folders import (
    NAME_MAX_BYTES,
    PART_PREFIX,
    PART_SUFFIX,
    Folders,
    build_name,
    check_writable,
    cut_to_bytes,
    free_bytes_of,
    make_folder,
    move_to_free_name,
    open_plain,
    stem_of,
)
from evolink_mcp.images.inspect import SUFFIX_OF, ImageFacts
from evolink_mcp.images.metadata import Origin, with_origin
from evolink_mcp.images.moved_files import MovedFiles
from evolink_mcp.images.sidecar import SUFFIX, write_derived_sidecar, write_sidecar
from evolink_mcp.images.structure import parts_of
from evolink_mcp.images.unusable import UnusableImage
from evolink_mcp.journal.entry import DerivedFile, Entry, ResultImage
from evolink_mcp.journal.journal import Journal
from evolink_mcp.pasted import clean_file_name
from evolink_mcp.sanitize import harmless

try:
    import fcntl
except ImportError:
    fcntl = None

OUTPUT_VARIABLE = "EVOLINK_MCP_OUTPUT_DIR"
PROMPT_MAX_CHARS = 48  # of the prompt in a file name
ID_MAX_CHARS = 8  # of the task ID in a file name
# Bytes of a name that follow the prompt or `save_as`: the index of the image, the number of a taken name, the suffix.
ENDING_MAX_BYTES = len("-9" + "-9999" + ".webp")
# Bytes of the prompt in a file name. The rest is for the task ID, the ending and the suffix of the sidecar.
PROMPT_MAX_BYTES = NAME_MAX_BYTES - len("-12345678") - ENDING_MAX_BYTES - len(SUFFIX)
# Far above the longest download (120 s), so that no server still writes the file.
UNFINISHED_MAX_AGE_S = 3600
ICO_SUFFIX = ".ico"
BLOCK_BYTES = 1 << 20
ENTRIES_SEARCHED = 1000  # of the journal, for images in a missing folder

Fetch = Callable[[BinaryIO], Awaitable[int]]


class ImageStore(Protocol):
    """The storage for the result images of one profile.

    `is_permanent`: the images stay longer than EvoLink's links. `decoder` decodes the images of the whole server.
    """

    is_permanent: bool
    decoder: Decoder

    def check_name(self, save_as: str) -> str:
        """Check a file name before the purchase. Return it without quotes and other decorations of a pasted name.

        Raises:
            FolderRefused: this store cannot use the name.
        """
        ...

    async def check_space(self, save_as: str | None, size: int) -> None:
        """Check before the purchase that images with `size` bytes together can be saved.

        Raises:
            FolderRefused: the folder is missing, cannot be written or has no space. Nothing was charged.
        """
        ...

    async def save(self, entry: Entry, image: ResultImage, fetch: Fetch, preview_edge: int = 0) -> ResultImage:
        """Download an image and save it. Return it with its facts and its place.

        With a `preview_edge` (pixels) the same decoding makes a preview for the cache.

        Raises:
            FolderRefused, StoreUnusable: the store cannot be written.
            PictureUnusable: the downloaded file is not a complete image.
        """
        ...

    async def copy(self, entry: Entry, image: ResultImage, save_as: str | None) -> ResultImage:
        """Save a second copy of a saved image, under the name that another caller wants."""
        ...

    async def save_derived(self, derivative: Derivative) -> DerivedFile:
        """Save a file that was made from an image, under a free name. The same content is saved once.

        Raises:
            FolderRefused, StoreUnusable: the store cannot be written, or keeps no files. Nothing was charged.
        """
        ...

    async def link_derived(self, file: DerivedFile) -> tuple[str, float] | None:
        """Return a link to a derived file of a remote caller, and its expiry in epoch seconds."""
        ...

    async def local_file(self, task_id: str, image: ResultImage) -> Path:
        """Return a file on this machine that holds the saved image.

        Raises:
            OSError: the file is gone.
            EvolinkError: the image cannot be downloaded from its store.
        """
        ...

    async def locate(self, entry: Entry) -> Entry:
        """Return the entry with the present paths of files that a user moved. The journal keeps the recorded paths."""
        ...

    async def entry_for_caller(self, entry: Entry) -> Entry:
        """Return the entry with the paths and links that the caller can use."""
        ...

    async def entries_for_caller(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return the entries with the paths and links that the caller can use, for a list. It reads no content."""
        ...


@dataclass(frozen=True, slots=True)
class SavedImage:
    """The facts of a saved file, in the fields of `ResultImage`. Width and height are in pixels, `sha256` is in hex."""

    path: str
    mime_type: str
    width: int
    height: int
    bytes: int
    sha256: str
    transparent_share: float | None = None
    alpha_min: int | None = None
    alpha_max: int | None = None
    is_one_colour: bool = False


@dataclass(frozen=True, slots=True)
class Derivative:
    """A finished derived file that is not saved yet.

    Its content is the `length` bytes of `content` from `position` on. `source` is the file of the image that it was made from.
    `task_id` names the task that made that image, if there is one. `sidecar` has the facts of the source.
    """

    content: BinaryIO
    position: int
    length: int
    source: Path
    stem: str
    target: str
    mime_type: str
    width: int
    height: int
    task_id: str | None = None
    sidecar: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def name(self) -> str:
        """The file name without suffix."""
        return f"{cut_to_bytes(self.stem, PROMPT_MAX_BYTES)}-{self.target}"

    @property
    def suffix(self) -> str:
        """The suffix of the type, with its dot."""
        return ICO_SUFFIX if self.mime_type == ICO else SUFFIX_OF[self.mime_type]

    def write(self, into: BinaryIO) -> None:
        """Write the content to a file."""
        self.content.seek(self.position)
        remaining = self.length
        while remaining and (block := self.content.read(min(remaining, BLOCK_BYTES))):
            into.write(block)
            remaining -= len(block)

    def file_facts(self, sha256: str, *, path: str | None = None, object_name: str | None = None) -> DerivedFile:
        """Return the facts of the saved file."""
        return DerivedFile(self.target, self.mime_type, self.width, self.height, self.length, sha256, path, object_name)


class LocalImageStore:
    """Save images into the user's folders, each with a sidecar unless `has_sidecars` is False.

    With `has_origin` each file contains its prompt, task ID and model, unless that would break a signature.

    If a paid image cannot be saved there, it is saved into `fallback`. `journal` has the folders of earlier images.
    `free_bytes` returns the free space of a folder's disk.
    """

    is_permanent = True

    def __init__(
        self,
        folders: Folders,
        decoder: Decoder,
        *,
        journal: Journal,
        fallback: Path,
        has_sidecars: bool = True,
        has_origin: bool = False,
        free_bytes: Callable[[Path], int] = free_bytes_of,
    ) -> None:
        self._folders = folders
        self.decoder = decoder
        self._journal = journal
        self._fallback = fallback
        self._has_sidecars = has_sidecars
        self._has_origin = has_origin
        self._free_bytes = free_bytes
        self._sweeper = UnfinishedFiles()
        self._moved_files = MovedFiles(folders.allowed)

    def check_name(self, save_as: str) -> str:
        """See ImageStore."""
        self._folders.target(save_as)
        return clean_file_name(save_as, self._folders.system)

    async def check_space(self, save_as: str | None, size: int) -> None:
        """See ImageStore."""
        folder = self._folders.output if save_as is None else self._folders.target(save_as).parent
        try:
            await self._check_root(folder)
            free = await anyio.to_thread.run_sync(_probe, folder, self._free_bytes)
        except OSError as error:
            raise _unwritable(folder, error) from error
        if free < size:
            raise FolderRefused(
                f"the disk of {folder} has {free / 1e6:.1f} MB of free space, and the pictures may need {size / 1e6:.1f} MB",
                advice="Nothing was sent. Free some space or set EVOLINK_MCP_OUTPUT_DIR, then call again.",
            )

    async def save(self, entry: Entry, image: ResultImage, fetch: Fetch, preview_edge: int = 0) -> ResultImage:
        """See ImageStore."""
        origin = origin_of_entry(entry) if self._has_origin else None
        image = await self._save(entry, image, entry.save_as, fetch, preview_edge, origin)
        if self._has_sidecars:
            await write_sidecar(entry, image)
        return image

    async def copy(self, entry: Entry, image: ResultImage, save_as: str | None) -> ResultImage:
        """See ImageStore. The first file stays."""
        if image.path is None or not image.is_present:
            return image
        return await self._save(entry, image, save_as, partial(_copy_file, Path(image.path)))

    async def save_derived(self, derivative: Derivative) -> DerivedFile:
        """See ImageStore. The folder is that of the source if it is in the output folder, else the output folder."""
        output = self._folders.output.resolve()
        source_folder = derivative.source.resolve().parent
        folder = source_folder if source_folder.is_relative_to(output) else output
        try:
            await self._check_root(folder)
            path, sha256 = await anyio.to_thread.run_sync(save_content, derivative, folder)
        except OSError as error:
            raise _unwritable(folder, error) from error
        file = derivative.file_facts(sha256, path=str(path))
        if self._has_sidecars:
            await write_derived_sidecar(path, {**derivative.sidecar, **_facts_of_derived(file)})
        return file

    async def link_derived(self, file: DerivedFile) -> tuple[str, float] | None:
        """See ImageStore."""
        return None

    async def local_file(self, task_id: str, image: ResultImage) -> Path:
        """See ImageStore. The file may have been moved or renamed."""
        if image.path is None:
            raise FileNotFoundError(f"picture {image.index} of {task_id} was not saved")
        (present,) = await self._locate((image,))
        path = Path(present.path or image.path)
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, "the file was moved or deleted", str(path))
        if await self._holds_other_image(path, image):
            raise FileNotFoundError(errno.ENOENT, "another picture is in the place of the file", str(path))
        return path

    async def _holds_other_image(self, path: Path, image: ResultImage) -> bool:
        """Return whether another image of the journal is in the file. A user may have edited the image in its file."""
        sha256 = await anyio.to_thread.run_sync(self._moved_files.hash_of, path, abandon_on_cancel=True)
        if sha256 is None or image.sha256 in (None, sha256):
            return False
        with suppress(JournalUnwritable):
            return bool(await self._journal.by_image(sha256, 1))
        return False

    async def locate(self, entry: Entry) -> Entry:
        """See ImageStore."""
        return replace(entry, images=tuple(await self._locate(entry.images)))

    async def entry_for_caller(self, entry: Entry) -> Entry:
        """See ImageStore."""
        return await self.locate(entry)

    async def entries_for_caller(self, entries: Sequence[Entry]) -> list[Entry]:
        """See ImageStore."""
        images = [image for entry in entries for image in entry.images]
        # Otherwise a list would compute the hash of every file.
        present_images = iter(await self._locate(images, compares_content=False))
        return [replace(entry, images=tuple(next(present_images) for _ in entry.images)) for entry in entries]

    async def _locate(self, images: Sequence[ResultImage], *, compares_content: bool = True) -> list[ResultImage]:
        if not any(image.path for image in images):
            return list(images)
        locate = partial(self._moved_files.locate, images, compares_content=compares_content)
        # The search only reads, so a cancelled caller need not wait for a slow disk.
        return await anyio.to_thread.run_sync(locate, abandon_on_cancel=True)

    async def _save(
        self,
        entry: Entry,
        image: ResultImage,
        save_as: str | None,
        fetch: Fetch,
        preview_edge: int = 0,
        origin: Origin | None = None,
    ) -> ResultImage:
        """Save an image in its folder, or else in the fallback folder."""
        target = self._target(entry, image.index, save_as)
        save_to = partial(
            save_image,
            fetch,
            decoder=self.decoder,
            preview_edge=preview_edge,
            order=entry.key,
            origin=origin,
            sweeper=self._sweeper,
        )
        reason = None
        try:
            try:
                await self._check_root(target.parent)
            except OSError as error:
                raise _unsaved(target.parent, error) from error
            saved_image = await save_to(target)
        except FolderRefused as error:
            try:
                saved_image = await save_to(self._fallback / _name_of(entry, image.index, save_as))
            except EvolinkError:
                # The first error names the folder that the user chose.
                raise error from None
            reason = error.message
        return replace(image, **asdict(saved_image), fallback_reason=reason)

    async def _check_root(self, folder: Path) -> None:
        """Check that the allowed folder that contains `folder` exists or was not used yet.

        Raises:
            FileNotFoundError: the allowed folder was used before and does not exist now. The server does not create it
                again: its drive or its share may be disconnected.
        """
        root = self._folders.root_of(folder)
        if not root.exists() and await self._was_used(root):
            reason = "it does not exist, and earlier pictures are in it: connect its drive, or create it again"
            raise FileNotFoundError(errno.ENOENT, reason)

    async def _was_used(self, root: Path) -> bool:
        """Return whether a recent image was saved in this folder. If the journal cannot be read, return True."""
        try:
            entries = await self._journal.recent(ENTRIES_SEARCHED)
        except JournalUnwritable:
            return True
        paths = [Path(image.path) for entry in entries for image in entry.images if image.path is not None]
        return any(path.is_relative_to(root) for path in paths)

    def _target(self, entry: Entry, index: int, save_as: str | None) -> Path:
        if save_as is not None:
            # The place may have become a link to the outside since the purchase, and the image is paid.
            with suppress(Refused):
                return self._folders.target(save_as).with_name(_name_of(entry, index, save_as))
        return self._folders.output / default_stem(entry, index)


def _name_of(entry: Entry, index: int, save_as: str | None) -> str:
    """Return the file name of an image. Its suffix may change with the type of the image."""
    if save_as is None:
        return default_stem(entry, index)
    name = Path(save_as)
    if index == 0:
        return name.name
    # The number is the index of the image. It does not depend on the order of the downloads.
    return f"{cut_to_bytes(name.stem, NAME_MAX_BYTES - ENDING_MAX_BYTES)}-{index}{name.suffix}"


def origin_of_entry(entry: Entry | None) -> Origin | None:
    """Return the origin of the images of an entry, or None if the journal does not know it."""
    if entry is None or entry.task_id is None:
        return None
    return Origin(str(entry.request.get("prompt") or ""), entry.task_id, str(entry.request.get("model") or ""))


def _probe(folder: Path, free_bytes: Callable[[Path], int]) -> int:
    """Check that a file can be created in `folder`. Return the free space in bytes."""
    check_writable(folder)
    return free_bytes(folder)


# --- names ---


def default_stem(entry: Entry, index: int) -> str:
    """Return the default file name of an image, without suffix."""
    # An external task has no request, and EvoLink may return fewer images than requested.
    has_several = max(entry.request.get("n", 1), len(entry.images)) > 1
    name = file_name(str(entry.request.get("prompt", "")), entry.task_id or "")
    return f"{name}-{index}" if has_several else name


def file_name(prompt: str, task_id: str) -> str:
    """Return a readable name: the first words of the prompt and the last characters of the task ID."""
    text = unicodedata.normalize("NFC", harmless(prompt, 4 * PROMPT_MAX_CHARS)).lower()
    # Marks are parts of letters in Thai and Hindi.
    words = "".join(char if unicodedata.category(char)[0] in "LMN" else " " for char in text).split()
    while words and words[0] in ("a", "an", "the"):
        del words[0]
    name = ""
    for word in words:
        longer = f"{name}-{word}" if name else word
        if len(longer) > PROMPT_MAX_CHARS or len(longer.encode()) > PROMPT_MAX_BYTES:
            name = name or cut_to_bytes(word[:PROMPT_MAX_CHARS], PROMPT_MAX_BYTES)
            break
        name = longer
    # All task IDs begin with the same word and a time, so only the end is distinctive.
    end = re.sub(r"[^0-9A-Za-z]", "", task_id)[-ID_MAX_CHARS:]
    return "-".join(filter(None, (name, end))) or "picture"


# --- files ---


async def save_image(
    fetch: Fetch,
    target: Path,
    decoder: Decoder,
    *,
    preview_edge: int = 0,
    order: str = "",
    origin: Origin | None = None,
    sweeper: UnfinishedFiles | None = None,
) -> SavedImage:
    """Download an image into the folder of `target`, under its stem and the suffix of its type. Never overwrite a file.

    With a `preview_edge` (pixels) the same decoding makes a preview for the cache. `order` names the purchase. `origin` is
    written into the file, unless that would break a signature. `sweeper` removes the unfinished files of killed servers
    from the folder.

    Raises:
        FolderRefused: the folder cannot be made or written.
        PictureUnusable: the downloaded file is not a complete image.
        DownloadFailed: no decoder process starts, so the file cannot be checked.
    """
    try:
        make_folder(target.parent)
        # The unfinished file is in the final folder, because a hard link needs the same file system.
        handle, name = tempfile.mkstemp(prefix=PART_PREFIX, suffix=PART_SUFFIX, dir=target.parent)
    except OSError as error:
        raise _unsaved(target.parent, error) from error
    part = Path(name)
    try:
        with os.fdopen(handle, "w+b") as file:
            with suppress(OSError):  # some file systems have no locks
                _lock(file.fileno())
            await fetch(file)
            file.flush()
            facts, preview = await decoder.check(file, edge=preview_edge, order=order)
            if origin is not None:
                await anyio.to_thread.run_sync(_add_origin, file, facts.mime_type, origin)
        if sweeper is not None:
            await anyio.to_thread.run_sync(sweeper.remove_from, target.parent, abandon_on_cancel=True)
        saved_image = await anyio.to_thread.run_sync(_finish, part, target, facts, abandon_on_cancel=True)
        if preview is not None:
            with suppress(OSError):
                decoder.previews.add(Path(saved_image.path), preview_edge, preview)
        return saved_image
    except UnusableImage as error:
        refusal = PictureRejected if error.is_hostile else PictureUnusable
        raise refusal(f"the file that EvoLink sent is not usable: {error}") from error
    except DecoderUnavailable as error:
        raise DownloadFailed(error.message, code=error.code, advice=f"The picture is paid. {error.advice}") from error
    except OSError as error:
        raise _unsaved(target.parent, error) from error
    finally:
        with suppress(OSError):
            part.unlink()


def _add_origin(file: BinaryIO, mime_type: str, origin: Origin) -> None:
    """Write the origin into a file that the decoder has checked. A file with a signature stays as it is."""
    file.seek(0)
    content = file.read()
    described = with_origin(content, mime_type, parts_of(content, mime_type), origin)
    if described is not None:
        file.seek(0)
        file.write(described)
        file.truncate()
        file.flush()


def save_content(derivative: Derivative, folder: Path) -> tuple[Path, str]:
    """Write a derived file into `folder` under the first free name. Return its path and SHA-256.

    Raises:
        OSError: the folder cannot be made or written.
    """
    make_folder(folder)
    handle, name = tempfile.mkstemp(prefix=PART_PREFIX, suffix=PART_SUFFIX, dir=folder)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            derivative.write(file)
        path, _, sha256 = _move(part, folder, derivative.name, derivative.suffix)
        return path, sha256
    finally:
        with suppress(OSError):
            part.unlink()


def _facts_of_derived(file: DerivedFile) -> dict[str, Any]:
    return {name: value for name, value in asdict(file).items() if name != "object_name"}


def _move(part: Path, folder: Path, stem: str, suffix: str) -> tuple[Path, int, str]:
    """Sync a finished file to the disk and give it the first free name. Return its path, size and SHA-256."""
    with part.open("r+b") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        # The sync is before the name: after a power cut, an incomplete file must not have an image's name.
        os.fsync(file.fileno())
    size = part.stat().st_size
    number = 0
    while True:
        path = folder / build_name(stem, f"-{number}{suffix}" if number else suffix)
        if move_to_free_name(part, path) or _has_content(path, size, sha256):
            break
        number += 1
    _sync_folder(folder)
    return path.resolve(), size, sha256


def _finish(part: Path, target: Path, facts: ImageFacts) -> SavedImage:
    """Give the checked file the first free name."""
    path, size, sha256 = _move(part, target.parent, stem_of(target), facts.suffix)
    return SavedImage(
        str(path),
        facts.mime_type,
        facts.width,
        facts.height,
        size,
        sha256,
        None if facts.alpha is None else facts.alpha.transparent_share,
        None if facts.alpha is None else facts.alpha.lowest,
        None if facts.alpha is None else facts.alpha.highest,
        facts.is_one_colour,
    )


class UnfinishedFiles:
    """Remove the unfinished files of killed servers: old files without a lock. Each folder is searched once."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._searched: set[Path] = set()

    def remove_from(self, folder: Path) -> None:
        """Search `folder`, unless this object did so before."""
        if folder in self._searched:
            return
        self._searched.add(folder)
        with suppress(OSError):
            for old in folder.glob(f"{PART_PREFIX}*{PART_SUFFIX}"):
                with suppress(OSError):
                    if self._clock() - old.lstat().st_mtime <= UNFINISHED_MAX_AGE_S:
                        continue
                    with old.open("rb") as file:
                        _lock(file.fileno())
                    old.unlink()


def _lock(handle: int) -> None:
    """Lock an unfinished file, so that no other server removes it even if its clock is wrong.

    Windows needs no lock: it does not remove an open file.

    Raises:
        OSError: another process has locked the file.
    """
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _has_content(path: Path, size: int, sha256: str) -> bool:
    """Return whether the file holds this image already: a server saved it, and then its journal was lost."""
    try:
        # The hash is computed only if the size fits: most taken names belong to other images.
        if path.is_symlink() or path.stat().st_size != size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError:
        return False


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # Windows cannot open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


async def _copy_file(source: Path, into: BinaryIO) -> int:
    def copy() -> int:
        with open_plain(source) as file:
            shutil.copyfileobj(file, into)
        return into.tell()

    return await anyio.to_thread.run_sync(copy)


def _unwritable(folder: Path, error: OSError) -> FolderRefused:
    """Return the error of a write that costs nothing."""
    cause = folder_fault(folder, error, OUTPUT_VARIABLE)
    return FolderRefused(cause.meaning, advice=f"{cause.next_step} Then call again.", cause=cause)


def _unsaved(folder: Path, error: OSError) -> FolderRefused:
    """Return the error of a paid image that could not be written."""
    cause = folder_fault(folder, error, OUTPUT_VARIABLE)
    advice = f"{cause.next_step} Then call get_task: EvoLink keeps the picture for 24 h."
    return FolderRefused(cause.meaning, charged="yes", advice=advice, cause=cause)
