"""References: a local picture, a data: URI or an earlier result becomes a URL that EvoLink can read."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote, unquote_to_bytes, urlsplit
from urllib.request import url2pathname
from weakref import WeakValueDictionary

import anyio

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.request import GenerationRequest, is_remote
from evolink_mcp.errors import JournalUnwritable, ReferenceRefused
from evolink_mcp.journal.contract import Journal
from evolink_mcp.pictures.folders import Folders, open_plain
from evolink_mcp.pictures.inspect import NotAPicture, examine, in_picture_thread
from evolink_mcp.sanitize import harmless

REFERENCE_MAX_BYTES = 50 << 20
REFERENCE_MAX_PIXELS = 178_956_970
REFERENCE_MAX_SIDE = 23_170
UPLOAD_LIVES_S = 71 * 3600
LINK_MARGIN_S = 600
IMAGE_URI = re.compile(r"evolink://images/(task-unified-[0-9A-Za-z_-]{1,115})/([0-9]{1,2})")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Found:
    """A picture that may be referred to.

    `mark` stands for its content wherever it is known; `url` is where EvoLink can read it already, and `read` opens it
    if it is a local one. Type, size (pixels) and alpha are None for a picture that is not here.
    """

    mark: str
    url: str | None = None
    mime_type: str | None = None
    size: tuple[int, int] | None = None
    alpha: bool | None = None
    read: Callable[[], BinaryIO] | None = None


@dataclass(frozen=True, slots=True)
class Checked:
    """A request whose references may be used: its body, and the pictures that were found."""

    body: dict[str, Any]
    found: tuple[Found, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two requests identical: the same fields, and the same pictures wherever they come from."""
        return _with(self.body, [picture.mark for picture in self.found]) if self.found else self.body


class References:
    """Turns the references of a request into URLs. With `local` False (HTTP transports) it reads no local file."""

    def __init__(
        self,
        client: EvolinkClient,
        journal: Journal,
        folders: Folders,
        *,
        local: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._journal = journal
        self._folders = folders
        self._local = local
        self._clock = clock
        self._turns: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()

    async def check(self, request: GenerationRequest) -> Checked:
        """Check every reference; nothing is sent.

        Raises:
            ReferenceRefused: one cannot be used.
        """
        body = request.body()
        sources = list(request.image_urls or [])
        if all(is_remote(source) for source in (*sources, request.mask_url or "https://")):
            return Checked(body)
        found = [await self._find(source) for source in sources]
        if request.mask_url:
            mask = await self._find(request.mask_url, is_mask=True)
            _check_mask(mask, found[0])
            found.append(mask)
        return Checked(body, tuple(found))

    async def upload(self, checked: Checked) -> dict[str, Any]:
        """The body to send: each local picture is uploaded, once for each content, and replaced by its URL.

        Raises:
            EvolinkError: an upload failed; it costs nothing and may be repeated.
        """
        urls = [picture.url or await self._upload(picture) for picture in checked.found]
        return _with(checked.body, urls) if urls else checked.body

    async def _find(self, source: str, *, is_mask: bool = False) -> Found:
        """A URL that EvoLink can read already, or a checked picture of this machine."""
        if is_remote(source):
            return Found(source, url=source)
        shown = harmless(source, 80)
        if earlier := IMAGE_URI.fullmatch(source):
            return await self._earlier(earlier[1], int(earlier[2]), is_mask)
        scheme = source[:8].lower()
        if scheme.startswith("evolink:"):
            raise ReferenceRefused(f"“{shown}” is no earlier picture", advice="Use evolink://images/{task_id}/{index}.")
        if scheme.startswith("data:"):
            return await self._checked(partial(_decoded, source), "the data: URI")
        if not self._local:
            raise ReferenceRefused(
                f"“{shown}” is a local file, and this server does not read its files for remote callers",
                advice="Give a public URL or a data: URI, or let the server's owner set EVOLINK_MCP_ALLOWED_DIRS.",
            )
        path = self._folders.readable(_file_path(source) if scheme.startswith("file:") else source)
        return await self._checked(partial(self._folders.opened, path), f"“{shown}”")

    async def _earlier(self, task_id: str, index: int, is_mask: bool) -> Found:
        entry = self._journal.by_task(task_id)
        picture = next((p for p in entry.pictures if p.index == index), None) if entry else None
        if picture is None:
            raise ReferenceRefused(
                f"there is no picture {index} of {task_id} here", advice="Call get_task with this id first."
            )
        here = Path(picture.path) if picture.path and Path(picture.path).is_file() else None
        url = picture.url if picture.url_expires_at - LINK_MARGIN_S > self._clock() else None
        if url is not None and not (is_mask and here):
            size = (picture.width, picture.height) if picture.width and picture.height else None
            mark = f"sha256:{picture.sha256}" if picture.sha256 else url
            return Found(mark, url, picture.mime_type, size)
        if here is None:
            raise ReferenceRefused(
                f"picture {index} of {task_id} is gone: its link has expired and its file is not there any more",
                advice="Give the path of a copy instead.",
            )
        found = await self._checked(partial(open_plain, here), f"picture {index} of {task_id}")
        return replace(found, url=url) if found.mark == f"sha256:{picture.sha256}" else found

    async def _checked(self, read: Callable[[], BinaryIO], shown: str) -> Found:
        def check() -> Found:
            with read() as file:
                if (size := file.seek(0, io.SEEK_END)) > REFERENCE_MAX_BYTES:
                    raise NotAPicture(f"it has {size:,} bytes, more than 50 MB")
                file.seek(0)
                facts = examine(file, max_pixels=REFERENCE_MAX_PIXELS, max_side=REFERENCE_MAX_SIDE, whole=False)
                file.seek(0)
                mark = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
            return Found(mark, None, facts.mime_type, (facts.width, facts.height), facts.has_alpha, read)

        return await _border(check, shown)

    async def _upload(self, picture: Found) -> str:
        """EvoLink's URL for the picture; the same content is sent once, even if several calls need it at once."""
        assert picture.read is not None
        assert picture.mime_type is not None
        digest = picture.mark.removeprefix("sha256:")
        async with self._turns.setdefault(digest, anyio.Lock()):
            now = self._clock()
            with suppress(JournalUnwritable):
                if url := self._journal.find_upload(digest, now + LINK_MARGIN_S):
                    return url
            content = await _border(partial(_same_content, picture.read, digest), "a reference")
            name = f"{digest[:32]}.{picture.mime_type.removeprefix('image/')}"
            url = await self._client.upload(name, picture.mime_type, io.BytesIO(content))
            with suppress(JournalUnwritable):
                self._journal.remember_upload(digest, url, now + UPLOAD_LIVES_S)
            return url


async def _border(read: Callable[[], T], shown: str) -> T:
    """Read a picture in the picture thread; refuse one that cannot be a reference, and say why."""
    try:
        return await in_picture_thread(read)
    except NotAPicture as error:
        raise ReferenceRefused(
            f"{shown} cannot be a reference: {error}", advice="Use a whole .png, .jpg or .webp."
        ) from error
    except OSError as error:
        raise ReferenceRefused(f"{shown} cannot be read ({error.strerror})", advice="Check its rights.") from error


def _same_content(read: Callable[[], BinaryIO], digest: str) -> bytes:
    """The checked bytes in memory, so that a file that changes later cannot be sent in their place."""
    with read() as file:
        content = file.read(REFERENCE_MAX_BYTES + 1)
    if hashlib.sha256(content).hexdigest() != digest:
        raise NotAPicture("it was changed while it was being read")
    return content


def _with(body: dict[str, Any], named: list[str]) -> dict[str, Any]:
    count = len(body["image_urls"])
    changed = {**body, "image_urls": named[:count]}
    if "mask_url" in body:
        changed["mask_url"] = named[count]
    return changed


def _check_mask(mask: Found, first: Found) -> None:
    """Check what can be known of a mask before paying; pictures that are not here are left to EvoLink."""
    if mask.mime_type not in (None, "image/png") or mask.alpha is False:
        raise ReferenceRefused(
            "the mask has no alpha channel", advice="Use a PNG whose transparent part is to be redrawn."
        )
    if mask.size and first.size and mask.size != first.size:
        raise ReferenceRefused(
            "the mask is {}×{} pixels and the first picture {}×{}".format(*mask.size, *first.size),
            advice="Give a mask of that picture's size.",
        )


def _decoded(uri: str) -> BinaryIO:
    head, comma, data = uri.partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        if head.lower().endswith(";base64"):
            return io.BytesIO(base64.b64decode("".join(unquote(data).split()), validate=True))
        return io.BytesIO(unquote_to_bytes(data))
    except ValueError as error:
        raise ReferenceRefused("the data: URI cannot be decoded", advice="Use data:image/png;base64,…") from error


def _file_path(uri: str) -> str:
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise ReferenceRefused("the file: URI cannot be read", advice="Use file:///absolute/path.png.") from error
    if parts.netloc.lower() not in ("", "localhost"):
        raise ReferenceRefused("a file: URI must name a file of this machine", advice="Use file:///absolute/path.png.")
    return url2pathname(parts.path)
