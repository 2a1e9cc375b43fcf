"""References: a local picture, a data: URI or an earlier result becomes a URL that EvoLink can read."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
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
from evolink_mcp.errors import DownloadFailed, JournalUnwritable, ReferenceRefused
from evolink_mcp.images.checked_image import Checked, Found, check_mask, sha256_of, with_pictures
from evolink_mcp.images.folders import Folders, open_plain
from evolink_mcp.images.image_store import Keeping
from evolink_mcp.images.sidecar import made_as
from evolink_mcp.images.unusable import Reason, UnusableImage
from evolink_mcp.journal.backend import Journal
from evolink_mcp.sanitize import harmless

REFERENCE_MAX_BYTES = 50 << 20
IN_MEMORY_MAX = 4
UPLOAD_LIVES_S = 71 * 3600
LINK_MARGIN_S = 600
UPLOAD_URI = re.compile(r"evolink://uploads/([0-9a-f]{64})")
IMAGE_URI = re.compile(r"evolink://images/(task-unified-[0-9A-Za-z_-]{1,115})/([0-9]{1,2})")
T = TypeVar("T")


class References:
    """Turns the references of a request into URLs. With `local` False (HTTP transports) it reads no local file."""

    def __init__(
        self,
        client: EvolinkClient,
        journal: Journal,
        folders: Folders,
        keeping: Keeping,
        *,
        local: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._journal = journal
        self._folders = folders
        self._keeping = keeping
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
            check_mask(mask, found[0])
            found.append(mask)
        return Checked(body, tuple(found), given)

    async def upload(self, checked: Checked) -> dict[str, Any]:
        """The body to send: each local picture is uploaded, once for each content, and replaced by its URL.

        Raises:
            EvolinkError: an upload failed; it costs nothing and may be repeated.
        """
        urls = [picture.url or await self._upload(picture) for picture in checked.found]
        return with_pictures(checked.body, urls) if urls else checked.body

    async def take(self, read: Callable[[], BinaryIO]) -> Found:
        """Send a picture of a caller elsewhere to EvoLink, which keeps it for 72 h: `evolink://uploads/` + its SHA-256.

        Raises:
            ReferenceRefused: it cannot be a reference.
            JournalUnwritable: it could not be noted, so no order would find it.
            EvolinkError: EvoLink did not take it.
        """
        found = await self._checked(read, "the upload", is_mask=False)
        until = self._clock() + UPLOAD_LIVES_S
        url = await self._upload(found, anew=True)
        await self._journal.remember_upload(sha256_of(found.mark) or "", url, until)
        return replace(found, url=url)

    async def _taken(self, digest: str) -> Found:
        url = await self._journal.find_upload(digest, self._clock() + LINK_MARGIN_S)
        if url is None:
            raise ReferenceRefused(
                "there is no such upload of yours, or its 72 hours are over", advice="PUT it to /uploads again."
            )
        return Found(f"sha256:{digest}", url)

    async def _find(self, source: str, *, is_mask: bool = False) -> Found:
        """A URL that EvoLink can read already, or a checked picture of this machine."""
        if is_remote(source):
            return Found(source, url=source)
        shown = harmless(source, 80)
        if earlier := IMAGE_URI.fullmatch(source):
            found = await self._earlier(earlier[1], int(earlier[2]), is_mask)
            return replace(found, task_id=earlier[1], index=int(earlier[2]))
        if upload := UPLOAD_URI.fullmatch(source):
            return await self._taken(upload[1])
        scheme = source[:8].lower()
        if scheme.startswith("evolink:"):
            raise ReferenceRefused(
                f"“{shown}” is no earlier picture",
                advice="Use evolink://images/{task_id}/{index}, or the uri of an upload.",
            )
        if scheme.startswith("data:"):
            return await self._checked(partial(_decoded, source), "the data: URI", is_mask)
        if not self._local:
            raise ReferenceRefused(
                f"“{shown}” is a local file, and this server does not read its files for remote callers",
                advice="Give a public URL or a data: URI, or PUT the file to /uploads of this server and give its uri.",
            )
        path = self._folders.readable(_file_path(source) if scheme.startswith("file:") else source)
        found = await self._checked(partial(self._folders.opened, path), f"“{shown}”", is_mask)
        task_id, index = await anyio.to_thread.run_sync(made_as, path, sha256_of(found.mark))
        return replace(found, task_id=task_id, index=index)

    async def _earlier(self, task_id: str, index: int, is_mask: bool) -> Found:
        entry = await self._journal.by_task(task_id)
        picture = next((p for p in entry.pictures if p.index == index), None) if entry else None
        if picture is None:
            raise ReferenceRefused(
                f"there is no picture {index} of {task_id} here", advice="Call get_task with this id first."
            )
        url = picture.url if picture.url_expires_at - LINK_MARGIN_S > self._clock() else None
        here: Path | None = None
        if picture.here and (is_mask or url is None):
            with suppress(OSError, DownloadFailed):
                here = await self._keeping.file(task_id, picture)
        if url is not None and here is None:
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
            check = partial(self._keeping.decoder.check_reference, content, is_mask=is_mask, order=mark)
            facts = await _border(check, shown)
        transparent = bool(facts.transparent) if is_mask else None
        return Found(mark, None, facts.mime_type, (facts.width, facts.height), transparent, read)

    async def _upload(self, picture: Found, *, anew: bool = False) -> str:
        """EvoLink's URL for the picture; the same content is sent once, even if several calls need it at once.

        What is sent is upright and carries no metadata. `anew`: it is sent even if EvoLink has it for some hours yet.
        """
        assert picture.read is not None
        assert picture.mime_type is not None
        async with self._uploading.setdefault(picture.mark, anyio.Lock()), self._in_memory:
            content, _ = await _border(partial(_content, picture.read, picture.mark), "a reference")
            normalize = partial(self._keeping.decoder.normalize, content, order=picture.mark)
            content = await _border(normalize, "a reference")
            digest = await anyio.to_thread.run_sync(_sha256, content)
            now = self._clock()
            with suppress(JournalUnwritable):
                if not anew and (url := await self._journal.find_upload(digest, now + LINK_MARGIN_S)):
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
    except UnusableImage as error:
        raise ReferenceRefused(
            f"{shown} cannot be a reference: {error}", advice="Use a whole .png, .jpg or .webp."
        ) from error
    except OSError as error:
        raise ReferenceRefused(f"{shown} cannot be read ({error.strerror})", advice="Check its rights.") from error


async def _content(read: Callable[[], BinaryIO], checked_mark: str | None = None) -> tuple[bytes, str]:
    """The picture's bytes in memory, and their mark. It must be `checked_mark`, if given: a file may change later.

    Raises:
        UnusableImage: more than REFERENCE_MAX_BYTES, or changed.
        OSError: it cannot be read.
    """

    def whole() -> tuple[bytes, str]:
        with read() as file:
            content = file.read(REFERENCE_MAX_BYTES + 1)
        if len(content) > REFERENCE_MAX_BYTES:
            raise UnusableImage(Reason.TOO_MANY_BYTES)
        mark = f"sha256:{_sha256(content)}"
        if checked_mark not in (None, mark):
            raise UnusableImage(Reason.CHANGED)
        return content, mark

    return await anyio.to_thread.run_sync(whole, abandon_on_cancel=True)


def _sha256(content: bytes) -> str:
    """In hex; for 50 MB it takes so long that it belongs into a thread."""
    return hashlib.sha256(content).hexdigest()


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
