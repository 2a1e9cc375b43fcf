"""References: a local picture, a data: URI or an earlier result becomes a URL that EvoLink can read."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote, unquote_to_bytes, urlsplit
from urllib.request import url2pathname
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.request import GenerationRequest, is_remote
from evolink_mcp.errors import JournalUnwritable, ReferenceRefused
from evolink_mcp.journal.contract import Journal
from evolink_mcp.journal.entry import Reference
from evolink_mcp.pictures.child import in_child
from evolink_mcp.pictures.folders import Folders, open_plain
from evolink_mcp.pictures.inspect import NotAPicture
from evolink_mcp.pictures.sidecar import made_as
from evolink_mcp.pictures.upright import check_reference, presentable
from evolink_mcp.sanitize import harmless

REFERENCE_MAX_BYTES = 50 << 20
IN_MEMORY_MAX = 4
GIVEN_MAX = 300  # characters
UPLOAD_LIVES_S = 71 * 3600
LINK_MARGIN_S = 600
IMAGE_URI = re.compile(r"evolink://images/(task-unified-[0-9A-Za-z_-]{1,115})/([0-9]{1,2})")
MASK_ADVICE = "Use a PNG of the picture's size that is transparent where something is to be redrawn."
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Found:
    """A picture that may be referred to.

    `mark` stands for its content wherever it is known; `url` is where EvoLink can read it already, and `read` opens it
    if it is a local one. Type and size (pixels, upright) are None for a picture that is not here; `transparent`, whether
    some pixels are, is known of a mask that is here. `task_id` and `index` name the earlier picture that it is, if known.
    """

    mark: str
    url: str | None = None
    mime_type: str | None = None
    size: tuple[int, int] | None = None
    transparent: bool | None = None
    read: Callable[[], BinaryIO] | None = None
    task_id: str | None = None
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Checked:
    """A request whose references may be used: its body, the pictures that were found, and what the caller gave."""

    body: dict[str, Any]
    found: tuple[Found, ...] = ()
    given: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two requests identical: the same fields, and the same pictures wherever they come from."""
        return _with(self.body, [picture.mark for picture in self.found]) if self.found else self.body

    def references(self, sent: dict[str, Any]) -> tuple[Reference, ...]:
        """What the order is made from; `sent` is the body that goes to EvoLink."""
        urls = [*sent.get("image_urls", []), *filter(None, [sent.get("mask_url")])]
        found = self.found or tuple(Found(url) for url in urls)
        return tuple(
            Reference(_shown(given), url, _sha256_of(one.mark), one.task_id, one.index)
            for given, url, one in zip(self.given, urls, found, strict=True)
        )


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
        self._in_memory = anyio.CapacityLimiter(IN_MEMORY_MAX)
        self._uploading: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()

    async def check(self, request: GenerationRequest) -> Checked:
        """Check every reference; nothing is sent.

        Raises:
            ReferenceRefused: one cannot be used.
        """
        body = request.body()
        sources = list(request.image_urls or [])
        given = (*sources, *filter(None, [request.mask_url]))
        if all(map(is_remote, given)):
            return Checked(body, given=given)
        found = [await self._find(source) for source in sources]
        if request.mask_url:
            mask = await self._find(request.mask_url, is_mask=True)
            _check_mask(mask, found[0])
            found.append(mask)
        return Checked(body, tuple(found), given)

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
            found = await self._earlier(earlier[1], int(earlier[2]), is_mask)
            return replace(found, task_id=earlier[1], index=int(earlier[2]))
        scheme = source[:8].lower()
        if scheme.startswith("evolink:"):
            raise ReferenceRefused(f"“{shown}” is no earlier picture", advice="Use evolink://images/{task_id}/{index}.")
        if scheme.startswith("data:"):
            return await self._checked(partial(_decoded, source), "the data: URI", is_mask)
        if not self._local:
            raise ReferenceRefused(
                f"“{shown}” is a local file, and this server does not read its files for remote callers",
                advice="Give a public URL or a data: URI, or let the server's owner set EVOLINK_MCP_ALLOWED_DIRS.",
            )
        path = self._folders.readable(_file_path(source) if scheme.startswith("file:") else source)
        found = await self._checked(partial(self._folders.opened, path), f"“{shown}”", is_mask)
        task_id, index = await anyio.to_thread.run_sync(made_as, path, _sha256_of(found.mark))
        return replace(found, task_id=task_id, index=index)

    async def _earlier(self, task_id: str, index: int, is_mask: bool) -> Found:
        entry = await self._journal.by_task(task_id)
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
        found = await self._checked(partial(open_plain, here), f"picture {index} of {task_id}", is_mask)
        return replace(found, url=url) if found.mark == f"sha256:{picture.sha256}" else found

    async def _checked(self, read: Callable[[], BinaryIO], shown: str, is_mask: bool) -> Found:
        async with self._in_memory:
            content, mark = await _border(partial(_content, read), shown)
            facts = await _border(partial(in_child, "reference", check_reference, content, is_mask), shown)
        transparent = bool(facts.transparent) if is_mask else None
        return Found(mark, None, facts.mime_type, (facts.width, facts.height), transparent, read)

    async def _upload(self, picture: Found) -> str:
        """EvoLink's URL for the picture; the same content is sent once, even if several calls need it at once.

        What is sent is upright and carries no metadata.
        """
        assert picture.read is not None
        assert picture.mime_type is not None
        async with self._uploading.setdefault(picture.mark, anyio.Lock()), self._in_memory:
            content, _ = await _border(partial(_content, picture.read, picture.mark), "a reference")
            content = await _border(partial(in_child, "reference", presentable, content), "a reference")
            digest = await anyio.to_thread.run_sync(_sha256, content)
            now = self._clock()
            with suppress(JournalUnwritable):
                if url := await self._journal.find_upload(digest, now + LINK_MARGIN_S):
                    return url
            name = f"{digest[:32]}.{picture.mime_type.removeprefix('image/')}"
            url = await self._client.upload(name, picture.mime_type, io.BytesIO(content))
            with suppress(JournalUnwritable):
                await self._journal.remember_upload(digest, url, now + UPLOAD_LIVES_S)
            return url


async def _border(read: Callable[[], Awaitable[T]], shown: str) -> T:
    """Await `read`; refuse a picture that cannot be a reference, and say why."""
    try:
        return await read()
    except NotAPicture as error:
        raise ReferenceRefused(
            f"{shown} cannot be a reference: {error}", advice="Use a whole .png, .jpg or .webp."
        ) from error
    except OSError as error:
        raise ReferenceRefused(f"{shown} cannot be read ({error.strerror})", advice="Check its rights.") from error


async def _content(read: Callable[[], BinaryIO], checked_mark: str | None = None) -> tuple[bytes, str]:
    """The picture's bytes in memory, and their mark. It must be `checked_mark`, if given: a file may change later.

    Raises:
        NotAPicture: more than REFERENCE_MAX_BYTES, or changed.
        OSError: it cannot be read.
    """

    def whole() -> tuple[bytes, str]:
        with read() as file:
            content = file.read(REFERENCE_MAX_BYTES + 1)
        if len(content) > REFERENCE_MAX_BYTES:
            raise NotAPicture("it has more than 50 MB")
        mark = f"sha256:{_sha256(content)}"
        if checked_mark not in (None, mark):
            raise NotAPicture("it was changed while it was being read")
        return content, mark

    return await anyio.to_thread.run_sync(whole, abandon_on_cancel=True)


def _sha256_of(mark: str) -> str | None:
    kind, _, digest = mark.partition(":")
    return digest if kind == "sha256" else None


def _shown(given: str) -> str:
    """What the caller gave, on one line; a data: URI only by its type and length."""
    if given[:5].lower() == "data:":
        return f"{harmless(given.partition(',')[0], 60)},… ({len(given):,} characters)"
    return harmless(given, GIVEN_MAX)


def _sha256(content: bytes) -> str:
    """In hex; for 50 MB it takes so long that it belongs into a thread."""
    return hashlib.sha256(content).hexdigest()


def _with(body: dict[str, Any], named: list[str]) -> dict[str, Any]:
    count = len(body["image_urls"])
    changed = {**body, "image_urls": named[:count]}
    if "mask_url" in body:
        changed["mask_url"] = named[count]
    return changed


def _check_mask(mask: Found, first: Found) -> None:
    """Check that mask and picture cover each other, as far as both are known here."""
    if mask.mime_type not in (None, "image/png"):
        kind = {"image/jpeg": "a JPEG", "image/webp": "a WebP"}[mask.mime_type]
        raise ReferenceRefused(f"a mask must be a PNG, and this is {kind}", advice=MASK_ADVICE)
    if mask.transparent is False:
        raise ReferenceRefused("the mask has no transparent pixels, so nothing would be redrawn", advice=MASK_ADVICE)
    if mask.size and first.size and mask.size != first.size:
        raise ReferenceRefused(
            "the mask is {}×{} pixels and the first picture {}×{} (both as they are seen, upright)".format(
                *mask.size, *first.size
            ),
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
