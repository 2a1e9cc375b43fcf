"""A local picture, a data: URI or an earlier result becomes a URL that EvoLink can read, before anything is paid."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from evolink_mcp.client import EvolinkClient
from evolink_mcp.errors import JournalUnwritable, ReferenceRefused
from evolink_mcp.folders import Folders
from evolink_mcp.images import Facts, NotAPicture, examine, in_picture_thread
from evolink_mcp.journal import Journal
from evolink_mcp.models import GenerationRequest, is_remote
from evolink_mcp.quoting import harmless

REFERENCE_MAX_BYTES = 50 << 20
REFERENCE_MAX_PIXELS = 178_956_970
REFERENCE_MAX_SIDE = 23_170
UPLOAD_LIVES_S = 71 * 3600
LINK_MARGIN_S = 600
IMAGE_URI = re.compile(r"evolink://images/(task-unified-[0-9A-Za-z_-]{1,115})/(\d{1,2})")


@dataclass(frozen=True, slots=True)
class Local:
    """A picture that lives here: its facts, its hash, and how to open it."""

    facts: Facts
    sha256: str
    open: Callable[[], BinaryIO]


@dataclass(frozen=True, slots=True)
class Prepared:
    """`body` goes to EvoLink; `identity` is the same request with contents in place of upload URLs."""

    body: dict[str, Any]
    identity: dict[str, Any]


class References:
    """Turns the references of a request into URLs. With `local` False (HTTP transports) no file here is read."""

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

    async def prepare(self, request: GenerationRequest) -> Prepared:
        """Check every reference, upload what is local (once per content), and name them all by URL.

        Raises:
            ReferenceRefused: one cannot be used; nothing was uploaded for a refused request.
            EvolinkError: an upload failed; it costs nothing and may be repeated.
        """
        body = request.body()
        sources = list(request.image_urls or [])
        named = [*sources, *([request.mask_url] if request.mask_url else [])]
        if not any(not is_remote(source) for source in named):
            return Prepared(body, body)
        found = [await self._find(source) for source in named]
        if request.mask_url:
            _check_mask(found[-1], found[0])
        urls = [thing if isinstance(thing, str) else await self._upload(thing) for thing in found]
        marks = [thing if isinstance(thing, str) else f"sha256:{thing.sha256}" for thing in found]
        return Prepared(_with(body, urls, len(sources)), _with(body, marks, len(sources)))

    async def _find(self, source: str) -> str | Local:
        """A URL that EvoLink can read already, or a checked local picture."""
        if is_remote(source):
            return source
        shown = harmless(source, 80)
        if earlier := IMAGE_URI.fullmatch(source.strip()):
            return await self._earlier(earlier[1], int(earlier[2]))
        if source.lower().startswith("evolink:"):
            raise ReferenceRefused(f"“{shown}” is no earlier picture", advice="Use evolink://images/{task_id}/{index}.")
        if source.lower().startswith("data:"):
            return await self._checked(partial(io.BytesIO, _decode(source)), "the data: URI")
        if not self._local:
            raise ReferenceRefused(
                f"“{shown}” is a local file, and this server does not read its files for remote callers",
                advice="Give a public URL or a data: URI, or let the server's owner set EVOLINK_MCP_ALLOWED_DIRS.",
            )
        path = self._folders.readable(_file_path(source) if source.lower().startswith("file:") else source)
        return await self._checked(partial(path.open, "rb"), f"“{shown}”")

    async def _earlier(self, task_id: str, index: int) -> str | Local:
        entry = self._journal.by_task(task_id)
        picture = next((p for p in entry.pictures if p.index == index), None) if entry else None
        if picture is None:
            raise ReferenceRefused(
                f"there is no picture {index} of {task_id} here", advice="Call get_task with this id first."
            )
        if picture.url_expires_at - LINK_MARGIN_S > self._clock():
            return picture.url
        if picture.path is None or not Path(picture.path).is_file():
            raise ReferenceRefused(
                f"picture {index} of {task_id} is gone: its link has expired and its file is not there any more",
                advice="Give the path of a copy instead.",
            )
        return await self._checked(partial(Path(picture.path).open, "rb"), f"picture {index} of {task_id}")

    async def _checked(self, opener: Callable[[], BinaryIO], shown: str) -> Local:
        def check() -> Local:
            with opener() as file:
                size = file.seek(0, io.SEEK_END)
                if size > REFERENCE_MAX_BYTES:
                    raise NotAPicture(f"it has {size:,} bytes, more than 50 MB")
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
                file.seek(0)
                facts = examine(file, max_pixels=REFERENCE_MAX_PIXELS, max_side=REFERENCE_MAX_SIDE, whole=False)
            return Local(facts, digest, opener)

        try:
            return await in_picture_thread(check)
        except NotAPicture as error:
            raise ReferenceRefused(
                f"{shown} cannot be a reference: {error}", advice="Use a .png, .jpg or .webp."
            ) from error
        except OSError as error:
            raise ReferenceRefused(f"{shown} cannot be read ({error.strerror})", advice="Check its rights.") from error

    async def _upload(self, picture: Local) -> str:
        now = self._clock()
        with suppress(JournalUnwritable):
            if url := self._journal.find_upload(picture.sha256, now + LINK_MARGIN_S):
                return url
        name = f"{picture.sha256[:32]}{picture.facts.suffix}"
        with picture.open() as file:
            url = await self._client.upload(name, picture.facts.mime_type, file)
        with suppress(JournalUnwritable):
            self._journal.remember_upload(picture.sha256, url, now + UPLOAD_LIVES_S)
        return url


def _with(body: dict[str, Any], urls: list[str], count: int) -> dict[str, Any]:
    changed = {**body, "image_urls": urls[:count]}
    if "mask_url" in body:
        changed["mask_url"] = urls[count]
    return changed


def _check_mask(mask: str | Local, first: str | Local) -> None:
    """What can be known of a mask before paying: remote pictures are judged by EvoLink."""
    if isinstance(mask, str):
        return
    if mask.facts.mime_type != "image/png" or not mask.facts.has_alpha:
        raise ReferenceRefused(
            "the mask has no alpha channel", advice="Use a PNG whose transparent part is to be redrawn."
        )
    if isinstance(first, Local):
        sizes = [(local.facts.width, local.facts.height) for local in (mask, first)]
        if sizes[0] != sizes[1]:
            raise ReferenceRefused(
                "the mask is {0[0]}×{0[1]} pixels and the picture {1[0]}×{1[1]}".format(*sizes),
                advice="Give a mask of the picture's size.",
            )


def _decode(uri: str) -> bytes:
    head, comma, data = uri.partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        if head.lower().endswith(";base64"):
            return base64.b64decode("".join(unquote(data).split()), validate=True)
        return unquote_to_bytes(data)
    except (ValueError, binascii.Error) as error:
        raise ReferenceRefused("the data: URI cannot be decoded", advice="Use data:image/png;base64,…") from error


def _file_path(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise ReferenceRefused("a file: URI must name a file of this machine", advice="Use file:///absolute/path.png.")
    return url2pathname(parts.path)
