"""Find an earlier task or image by anything that a person or a model still has: ID, URI, URL, path, Markdown, "last"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import anyio.to_thread

from evolink_mcp.api.request import TASK_ID_PATTERN, is_remote
from evolink_mcp.errors import ImageUnknown
from evolink_mcp.images.folders import Folders
from evolink_mcp.images.moved_files import MovedFiles
from evolink_mcp.images.sidecar import origin_of
from evolink_mcp.journal.entry import Entry, ResultImage
from evolink_mcp.journal.journal import Journal
from evolink_mcp.pasted import file_name_of, path_readings, undecorate
from evolink_mcp.sanitize import harmless

# Entries that one search reads.
CANDIDATES_MAX = 50
TEXT_MAX_CHARS = 8_192
NEWEST_WORDS = ("last", "latest", "newest")

_TASK_ID = TASK_ID_PATTERN.strip("^$")
# Only the case of the scheme does not matter: an ID in other letters is not EvoLink's.
_TASK = re.compile(rf"(?i:evolink://tasks/|evolink://images/)?({_TASK_ID})/?")
_IMAGE = re.compile(rf"(?i:evolink://images/)?({_TASK_ID})/([0-9]{{1,2}})")
_TASK_ID_IN_URL = re.compile(rf"/({_TASK_ID})/")


@dataclass(frozen=True, slots=True)
class KnownImage:
    """A task, and one of its images if the text names one.

    A whole task has no `index`. A task that is not in the journal has no `entry`.
    """

    task_id: str
    index: int | None = None
    entry: Entry | None = None

    @property
    def image(self) -> ResultImage | None:
        """The image that the text names, if the journal has it."""
        images = self.entry.images if self.entry else ()
        return next((image for image in images if image.index == self.index), None)


def names_file(text: str) -> bool:
    """Return whether a text can only be a path: it is no ID, no URI, no URL and not "last"."""
    bare = undecorate(text)
    is_known_form = bare.lower() in NEWEST_WORDS or _IMAGE.fullmatch(bare) or _TASK.fullmatch(bare) or is_remote(bare)
    return not is_known_form and not bare.lower().startswith(("data:", "evolink:"))


class KnownImages:
    """The earlier tasks and images of one profile.

    With `is_local` False (callers on other machines) a path names no image, and no file is read.
    """

    def __init__(self, journal: Journal, folders: Folders, *, is_local: bool = True) -> None:
        self.is_local = is_local
        self._journal = journal
        self._folders = folders
        self._files = MovedFiles(folders.allowed)

    async def find(self, text: str) -> KnownImage | None:
        """Return the task or image that a text names, or None.

        The text may be a task ID, an `evolink://tasks/…` or `evolink://images/…` URI, the image's EvoLink URL (also an
        expired one), the path of its file (also the earlier one of a moved file), a Markdown line with any of these, or
        "last" for the newest image. Quotes and blanks around it are ignored. No HTTP request is sent.

        Raises:
            JournalUnwritable: the journal cannot be read.
        """
        if len(text) > TEXT_MAX_CHARS:
            return None
        bare = undecorate(text)
        if bare.lower() in NEWEST_WORDS:
            return await self._newest()
        if match := _IMAGE.fullmatch(bare):
            return await self._with_entry(match[1], int(match[2]))
        if match := _TASK.fullmatch(bare):
            return await self._with_entry(match[1], None)
        if is_remote(bare):
            return await self._by_url(bare)
        if self.is_local and bare and names_file(text):
            return await self._by_path(text)
        return None

    async def find_task(self, text: str) -> KnownImage:
        """Return the task or image that a text names. The journal may not have the task.

        Raises:
            ImageUnknown: the text names none.
            JournalUnwritable: the journal cannot be read.
        """
        match = await self.find(text)
        if match is None:
            raise ImageUnknown(f"“{harmless(text, 120)}” is neither a task ID nor an earlier picture")
        return match

    async def find_task_id(self, text: str) -> str:
        """Return the ID of the task that a text names. A text with an ID needs no journal.

        Raises:
            ImageUnknown: the text names none.
            JournalUnwritable: the journal cannot be read.
        """
        bare = undecorate(text) if len(text) <= TEXT_MAX_CHARS else ""
        if match := _IMAGE.fullmatch(bare) or _TASK.fullmatch(bare):
            return match[1]
        return (await self.find_task(text)).task_id

    async def find_image(self, text: str, index: int | None = None) -> tuple[Entry, ResultImage]:
        """Return the entry and the image that a text names. `index` counts only if the text names a task.

        Raises:
            ImageUnknown: the journal has no such image, or the task has several images and `index` is None.
            JournalUnwritable: the journal cannot be read.
        """
        match = await self.find_task(text)
        entry = match.entry
        if entry is None:
            raise ImageUnknown(
                f"this server has no picture of {match.task_id}", advice="Call get_task with this id first."
            )
        chosen = match.index if match.index is not None else index
        if chosen is None and len(entry.images) > 1:
            uris = f"evolink://images/{match.task_id}/0 … /{len(entry.images) - 1}"
            raise ImageUnknown(f"{match.task_id} has {len(entry.images)} pictures", advice=f"Name one of them: {uris}.")
        image = next((image for image in entry.images if image.index == (chosen or 0)), None)
        if image is None:
            raise ImageUnknown(
                f"there is no picture {chosen or 0} of {match.task_id} here (status {entry.status})",
                advice="Call get_task with this id first.",
            )
        return entry, image

    async def _newest(self) -> KnownImage | None:
        for entry in await self._journal.recent(CANDIDATES_MAX, status="completed"):
            if entry.task_id is not None and any(image.is_saved for image in entry.images):
                return KnownImage(entry.task_id, None, entry)
        return None

    async def _with_entry(self, task_id: str, index: int | None) -> KnownImage:
        return KnownImage(task_id, index, await self._journal.by_task(task_id))

    async def _by_url(self, url: str) -> KnownImage | None:
        bare = _without_query(url)
        for entry in await self._journal.by_image(bare, CANDIDATES_MAX):
            # EvoLink may have sent a newer link since the image was saved. Callers may have either of them.
            links = [(image.index, image.url) for image in entry.images]
            links += enumerate(entry.task.results) if entry.task else ()
            index = next((index for index, link in links if _without_query(link) == bare), None)
            if index is not None and entry.task_id is not None:
                return KnownImage(entry.task_id, index, entry)
        # A link to an object store has the name of the object.
        path = unquote(urlsplit(bare).path)
        match = _TASK_ID_IN_URL.search(path)
        entry = await self._journal.by_task(match[1]) if match else None
        for image in entry.images if entry else ():
            if match and image.object_name and path.endswith("/" + image.object_name):
                return KnownImage(match[1], image.index, entry)
        return None

    async def _by_path(self, text: str) -> KnownImage | None:
        """Return the image of a path: by the content of the file that is there, else by the journal's record."""
        readings = path_readings(text, self._folders.system)
        file = self._folders.find(text)
        if file is not None:
            sha256 = await anyio.to_thread.run_sync(self._files.hash_of, file)
            if sha256 is not None and (by_content := await self._by_content(file, sha256)) is not None:
                return by_content
        paths = {str(path) for reading in readings for path in self._folders.places(reading)}
        same_name: dict[tuple[str, int], KnownImage] = {}
        for name in dict.fromkeys(file_name_of(reading) for reading in readings):
            if not name:
                continue
            for entry in await self._journal.recent(CANDIDATES_MAX, words=(name,)):
                for image in entry.images:
                    if image.path is None or entry.task_id is None:
                        continue
                    match = KnownImage(entry.task_id, image.index, entry)
                    if image.path in paths:
                        return match
                    if file_name_of(image.path) == name:
                        same_name[entry.task_id, image.index] = match
        # A file with this name and other content is another image. Several matches are ambiguous.
        return next(iter(same_name.values())) if len(same_name) == 1 and file is None else None

    async def origin_of(self, file: Path, sha256: str | None) -> KnownImage | None:
        """Return the task and index of the image in a file, or None. `sha256` is the hash of its content.

        Raises:
            JournalUnwritable: the journal cannot be read.
        """
        if sha256 is None:
            return None
        task_id, index = await anyio.to_thread.run_sync(origin_of, file, sha256)
        return await self._with_entry(task_id, index) if task_id is not None else await self._by_hash(file, sha256)

    async def _by_content(self, file: Path, sha256: str) -> KnownImage | None:
        # The sidecar also knows the task of an image that another journal has.
        return await self._by_hash(file, sha256) or await self.origin_of(file, sha256)

    async def _by_hash(self, file: Path, sha256: str) -> KnownImage | None:
        matches = [
            (KnownImage(entry.task_id, image.index, entry), image.path)
            for entry in await self._journal.by_image(sha256, CANDIDATES_MAX)
            for image in entry.images
            if image.sha256 == sha256 and entry.task_id is not None
        ]
        # Two tasks may have the same content. The one with this path comes first.
        matches.sort(key=lambda match: match[1] != str(file))
        return matches[0][0] if matches else None


def _without_query(url: str) -> str:
    return url.partition("#")[0].partition("?")[0]
