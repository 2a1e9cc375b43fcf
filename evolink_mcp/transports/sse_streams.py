"""Check the POSTs of SSE, and limit the answers that wait for a client that does not read its stream.

The SDK starts one coroutine for each POST. Its answer waits until the client has read all earlier ones, so a client that
only sends would fill the memory: 4,000 POSTs took 400 MB.
"""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import parse_qs

import anyio
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evolink_mcp.transports.messages import read_post

log = logging.getLogger(__name__)

_SESSION_ID = re.compile(rb"session_id=([0-9A-Za-z-]+)")
TEXT = "This session has too many unread answers. Read the stream, then send this message again."


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """The messages that a client may send while it does not read: on one stream, and on all streams of the process."""

    stream_max: int = 64
    process_max: int = 512


class _Stream:
    """One open stream. `sending_since` is the start of the send in progress, from `time.monotonic`, or None."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.sending_since: float | None = None
        self.waiting = 0  # messages since the send in progress began


class SseStreams:
    """An ASGI app in front of the SDK's SSE app. POSTs go to a path below `posts_path`."""

    def __init__(self, app: ASGIApp, posts_path: str, limits: StreamLimits = StreamLimits()) -> None:
        self._app = app
        self._posts_path = posts_path
        self._limits = limits
        self._streams: dict[str, _Stream] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["method"] == "POST" and scope["path"].startswith(self._posts_path):
            await self._post(scope, receive, send)
        elif scope["method"] == "GET":
            await self._get(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        post = await read_post(scope, receive, send)
        if post is None:
            return
        (session_id,) = parse_qs(scope["query_string"].decode("latin-1")).get("session_id", [""])[:1]
        stream = self._streams.get(session_id)
        # The SDK refuses a POST without an open stream itself.
        if stream is None or self._admit(stream):
            await self._app(scope, post[1], send)
        else:
            headers = {"retry-after": "1"}
            answer = PlainTextResponse(TEXT, HTTPStatus.SERVICE_UNAVAILABLE, headers)
            await answer(scope, receive, send)

    def _admit(self, stream: _Stream) -> bool:
        """Count one more message for this stream. Return False if too many wait for its client to read."""
        # The client reads: its stream has taken every event so far.
        if stream.sending_since is None:
            return True
        if stream.waiting >= self._limits.stream_max:
            return False
        stream.waiting += 1
        if sum(stream.waiting for stream in self._streams.values()) > self._limits.process_max:
            slowest = min(
                (stream for stream in self._streams.values() if stream.waiting),
                key=lambda stream: stream.sending_since or 0.0,
            )
            log.warning("a stream ends, because its client does not read it and too many answers wait")
            slowest.waiting = 0
            slowest.scope.cancel()
        return True

    async def _get(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = _Stream()
        session_id = ""

        async def send_next(message: Message) -> None:
            nonlocal session_id
            # The first event of the stream names the path of its POSTs.
            if not session_id and (match := _SESSION_ID.search(message.get("body", b""))):
                session_id = match[1].decode()
                self._streams[session_id] = stream
            stream.sending_since = time.monotonic()
            await send(message)
            stream.sending_since = None
            stream.waiting = 0

        try:
            with stream.scope:
                await self._app(scope, receive, send_next)
        finally:
            self._streams.pop(session_id, None)
