"""Pictures over HTTP, for callers on other machines: they bring reference pictures, and fetch what lies in the store."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import BinaryIO
from urllib.parse import quote

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from evolink_mcp.errors import EvolinkError, JournalUnwritable, KeyMissing, Refused
from evolink_mcp.images.inspect import MAGIC
from evolink_mcp.images.references import REFERENCE_MAX_BYTES, UPLOAD_LIVES_S, References
from evolink_mcp.journal.entry import iso
from evolink_mcp.teams.object_store import ObjectStore

UPLOADS = "/uploads"
UPLOAD_WITHIN_S = 120.0
UPLOADS_AT_ONCE = 4
TYPES = {suffix: mime_type for _, _, mime_type, suffix in MAGIC}


class Uploads:
    """`PUT /uploads` before `app`: the body is a picture, the answer names the URI that `image_urls` takes.

    `references` are those of the caller's own studio, so nobody else finds the picture; `is_idle` says whether it has
    nothing under way.
    """

    def __init__(
        self, app: ASGIApp, references: References, clock: Callable[[], float], is_idle: Callable[[], bool]
    ) -> None:
        self._app = app
        self._references = references
        self._clock = clock
        self._is_idle = is_idle
        self._slots = anyio.CapacityLimiter(UPLOADS_AT_ONCE)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way for this caller."""
        return self._is_idle()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"].rstrip("/") != UPLOADS:
            await self._app(scope, receive, send)
        elif scope["method"] != "PUT":
            await _refused(405, "PUT a picture here", allow="PUT")(scope, receive, send)
        elif self._slots.available_tokens < 1:
            again = _refused(503, "as many uploads as may be are under way; try again", **{"retry-after": "5"})
            await again(scope, receive, send)
        else:
            async with self._slots:
                await (await self._taken(Request(scope, receive)))(scope, receive, send)

    async def _taken(self, request: Request) -> Response:
        too_large = _refused(413, f"a picture may have {REFERENCE_MAX_BYTES >> 20} MB at most", connection="close")
        said = request.headers.get("content-length", "")
        if said.isascii() and said.isdigit() and int(said[:15]) > REFERENCE_MAX_BYTES:
            return too_large
        with tempfile.TemporaryFile() as file:
            size = -1
            with anyio.move_on_after(UPLOAD_WITHIN_S):
                size = await _written(request, file)
            if size < 0:
                return _refused(408, f"the picture did not come within {UPLOAD_WITHIN_S:.0f} s", connection="close")
            if size > REFERENCE_MAX_BYTES:
                return too_large
            return await self._sent_on(file, size)

    async def _sent_on(self, file: BinaryIO, size: int) -> Response:
        file.seek(0)
        try:
            # The studio closes what it reads, and reads it twice.
            found = await self._references.upload(lambda: _again(file))
        except (JournalUnwritable, KeyMissing) as error:
            return _refused(503, f"{error.message}. {error.advice}")
        except Refused as error:
            return _refused(400, f"{error.message}. {error.advice}")
        except EvolinkError as error:
            return _refused(
                502, f"EvoLink did not take the picture: {error.message}. Nothing was charged. {error.advice}"
            )
        width, height = found.size or (None, None)
        return JSONResponse(
            {
                "uri": f"evolink://uploads/{found.sha256}",
                "mime_type": found.mime_type,
                "width": width,
                "height": height,
                "bytes": size,
                "expires_at": iso(self._clock() + UPLOAD_LIVES_S),
            },
            201,
        )


class StoredPictures:
    """`GET /pictures/…`: whoever has a link that the team signed gets the picture from the folder."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        name = self._store.linked(scope["path"])
        if name is None:
            await _refused(404, "there is no such link, or its time is over; get_task makes a new one")(
                scope, receive, send
            )
            return
        try:
            async with self._store.reading(name) as (size, parts):
                file = PurePosixPath(name).name
                headers = {
                    "content-length": str(size),
                    "content-disposition": f"inline; filename*=UTF-8''{quote(file)}",
                    "cache-control": "private, max-age=3600",
                    "x-content-type-options": "nosniff",
                    "content-security-policy": "default-src 'none'; sandbox",
                }
                kind = TYPES.get(PurePosixPath(name).suffix, "application/octet-stream")
                response = StreamingResponse(parts, headers=headers, media_type=kind)
                if scope["method"] == "HEAD":
                    response = Response(None, headers=headers, media_type=kind)
                await response(scope, receive, send)
        except EvolinkError as error:
            await _refused(404 if not error.retryable else 503, error.message)(scope, receive, send)


def _refused(status: int, text: str, **headers: str) -> Response:
    return JSONResponse({"error": text}, status, headers)


async def _written(request: Request, file: BinaryIO) -> int:
    """Write the body to `file`; returns its size in bytes, or more than REFERENCE_MAX_BYTES where it is too large."""
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > REFERENCE_MAX_BYTES:
                break
            file.write(part)
    except ClientDisconnect:
        return -1
    return size


def _again(file: BinaryIO) -> BinaryIO:
    """The file from its start, under a handle of its own."""

    handle = os.dup(file.fileno())
    os.lseek(handle, 0, os.SEEK_SET)
    return os.fdopen(handle, "rb")
