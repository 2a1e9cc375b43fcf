"""Image endpoints for remote callers: upload a reference image, and download a stored image by a signed link."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import BinaryIO
from urllib.parse import quote

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from evolink_mcp.errors import EvolinkError, JournalUnwritable, KeyMissing, Refused
from evolink_mcp.images.inspect import MAGIC
from evolink_mcp.images.references import REFERENCE_MAX_BYTES
from evolink_mcp.journal.entry import iso
from evolink_mcp.studio.studio import Studio
from evolink_mcp.studio.times import DAY_S, start_of_day
from evolink_mcp.teams.object_store import ObjectStore

UPLOADS_PATH = "/uploads"
QUOTA = "uploads"  # its name in the journal
UPLOAD_TIMEOUT_S = 120.0
# The temporary files of uploads in progress.
PROCESS_MAX_BYTES = 400 << 20
TENANT_MAX_BYTES = 2 * REFERENCE_MAX_BYTES
# Without this limit, eight fast uploads took most of the time of the event loop.
BYTES_PER_S = 20 << 20
BURST_BYTES = 8 << 20
MIME_TYPES = {suffix: mime_type for _, _, mime_type, suffix in MAGIC}


class ByteLimit:
    """A limit for bytes that several uploads use at the same time."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._used_bytes = 0

    def has_room(self, size: int) -> bool:
        """Return whether `size` more bytes fit."""
        return self._used_bytes + size <= self._max_bytes

    @contextmanager
    def used(self, size: int) -> Generator[None]:
        """Use `size` bytes inside this context."""
        self._used_bytes += size
        try:
            yield
        finally:
            self._used_bytes -= size


class Pace:
    """The speed of all uploads together, which they share. After a pause, `burst_bytes` may arrive at once.

    `clock` (seconds) is for tests.
    """

    def __init__(
        self,
        bytes_per_s: float = BYTES_PER_S,
        burst_bytes: int = BURST_BYTES,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._burst_s = burst_bytes / bytes_per_s
        self._clock = clock
        self._due_at = clock() - self._burst_s

    def delay_s(self, size: int) -> float:
        """Count `size` bytes. Return the seconds that their upload must wait."""
        now = self._clock()
        self._due_at = max(self._due_at, now - self._burst_s) + size / self._bytes_per_s
        return max(self._due_at - now, 0.0)


class UploadApp:
    """`PUT /uploads` in front of `app`. The body is an image; the answer has the URI for `image_urls`.

    `studio` is the caller's studio, so no other tenant can use the image. `is_idle` returns whether the studio has no
    running work. The apps of all tenants share `process_limit` and `pace`. `tenant_max_bytes` limits the uploads of this
    tenant at once, `day_max_bytes` those of a day. `sleep` (seconds) is for tests.
    """

    def __init__(
        self,
        app: ASGIApp,
        studio: Studio,
        is_idle: Callable[[], bool],
        process_limit: ByteLimit,
        pace: Pace,
        *,
        day_max_bytes: int,
        tenant_max_bytes: int = TENANT_MAX_BYTES,
        sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
    ) -> None:
        self.studio = studio
        self._app = app
        self._is_idle = is_idle
        self._process_limit = process_limit
        self._pace = pace
        self._tenant_limit = ByteLimit(tenant_max_bytes)
        self._day_max_bytes = day_max_bytes
        self._sleep = sleep

    @property
    def is_idle(self) -> bool:
        """Whether the studio of this app has no running work."""
        return self._is_idle()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        if scope["type"] != "http" or scope["path"].rstrip("/") != UPLOADS_PATH:
            await self._app(scope, receive, send)
        elif scope["method"] != "PUT":
            await _error(405, "Upload an image with PUT.", allow="PUT")(scope, receive, send)
        else:
            response = await self._accept(Request(scope, receive))
            await response(scope, receive, send)

    async def _accept(self, request: Request) -> Response:
        """Check the limits before the body is read. An upload without a declared size counts as the largest one."""
        declared = request.headers.get("content-length", "")
        # `isdigit` also accepts characters that int() refuses, such as ².
        size = int(declared[:15]) if declared.isascii() and declared.isdigit() else REFERENCE_MAX_BYTES
        if size > REFERENCE_MAX_BYTES:
            return _too_large()
        for limit, owner in ((self._tenant_limit, "you"), (self._process_limit, "this server")):
            if not limit.has_room(size):
                text = f"The limit of bytes that {owner} may upload at once is reached. Try again."
                return _error(503, text, connection="close", **{"retry-after": "5"})
        with self._tenant_limit.used(size), self._process_limit.used(size):
            try:
                now = self.studio.now()
                day = iso(start_of_day(now)) or ""
                # After the limits above: a busy server must not cost the tenant a part of its quota.
                if not await self.studio.journal.spend_quota(QUOTA, day, size, self._day_max_bytes):
                    wait_s = int(start_of_day(now) + DAY_S - now) + 1
                    text = f"Your uploads of today reach {self._day_max_bytes // 1_000_000} MB. Try again tomorrow."
                    return _error(429, text, connection="close", **{"retry-after": str(wait_s)})
            except JournalUnwritable as error:
                return _error(503, f"{error.message}. {error.advice}", connection="close")
            return await self._upload(request)

    async def _upload(self, request: Request) -> Response:
        with tempfile.TemporaryFile() as file:
            size = None
            with anyio.move_on_after(UPLOAD_TIMEOUT_S):
                size = await self._write_body(request, file)
            if size is None:
                text = f"The image did not arrive within {UPLOAD_TIMEOUT_S:.0f} s."
                return _error(408, text, connection="close")
            if size > REFERENCE_MAX_BYTES:
                return _too_large()
            return await self._send_to_evolink(file, size)

    async def _write_body(self, request: Request, file: BinaryIO) -> int | None:
        """Write the body to `file`. Return its size in bytes, or None if the client disconnected.

        The size of a body that is too large is any number above REFERENCE_MAX_BYTES.
        """
        size = 0
        try:
            async for part in request.stream():
                size += len(part)
                if size > REFERENCE_MAX_BYTES:
                    break
                file.write(part)
                # The client waits too, because the buffers of the system are full.
                if delay_s := self._pace.delay_s(len(part)):
                    await self._sleep(delay_s)
        except ClientDisconnect:
            return None
        return size

    async def _send_to_evolink(self, file: BinaryIO, size: int) -> Response:
        file.seek(0)
        try:
            # The studio reads the file twice and closes it each time.
            image = await self.studio.references.upload(lambda: _reopen(file))
        except (JournalUnwritable, KeyMissing) as error:
            return _error(503, f"{error.message}. {error.advice}")
        except Refused as error:
            return _error(400, f"{error.message}. {error.advice}")
        except EvolinkError as error:
            return _error(502, f"EvoLink refused the image: {error.message}. Nothing was charged. {error.advice}")
        width, height = image.size or (None, None)
        facts = {
            "uri": f"evolink://uploads/{image.sha256}",
            "mime_type": image.mime_type,
            "width": width,
            "height": height,
            "bytes": size,
            "expires_at": iso(image.expires_at),
        }
        return JSONResponse(facts, 201)


class StoredPictures:
    """`GET /pictures/…`: return an image of the store's folder to each caller with a signed link."""

    def __init__(self, object_store: ObjectStore) -> None:
        self._object_store = object_store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        name = self._object_store.linked_name(scope["path"])
        if name is None:
            text = "The link is invalid or expired. get_task makes a new one."
            await _error(404, text)(scope, receive, send)
            return
        try:
            async with self._object_store.reading(name) as (size, parts):
                # The content comes from callers: a browser must not run it as a page of this server.
                headers = {
                    "content-length": str(size),
                    "content-disposition": f"inline; filename*=UTF-8''{quote(PurePosixPath(name).name)}",
                    "cache-control": "private, max-age=3600",
                    "x-content-type-options": "nosniff",
                    "content-security-policy": "default-src 'none'; sandbox",
                }
                mime_type = MIME_TYPES.get(PurePosixPath(name).suffix, "application/octet-stream")
                response = StreamingResponse(parts, headers=headers, media_type=mime_type)
                if scope["method"] == "HEAD":
                    response = Response(None, headers=headers, media_type=mime_type)
                await response(scope, receive, send)
        except EvolinkError as error:
            await _error(503 if error.retryable else 404, error.message)(scope, receive, send)


def _too_large() -> Response:
    # The client may still be sending. The closed connection stops it.
    return _error(413, f"An image may have at most {REFERENCE_MAX_BYTES >> 20} MB.", connection="close")


def _error(status: int, text: str, **headers: str) -> Response:
    return JSONResponse({"error": text}, status, headers)


def _reopen(file: BinaryIO) -> BinaryIO:
    """Return a second handle of the file, at its start."""
    # A temporary file has no name on Linux and macOS, so it cannot be opened again.
    handle = os.dup(file.fileno())
    os.lseek(handle, 0, os.SEEK_SET)
    return os.fdopen(handle, "rb")
