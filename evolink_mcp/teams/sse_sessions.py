"""SSE at any server of a team: a message whose session's stream is at another server is passed on to that one."""

from __future__ import annotations

import base64
import re
import uuid
from collections import OrderedDict
from contextlib import suppress
from typing import cast
from urllib.parse import parse_qs

import anyio
from anyio.streams.memory import MemoryObjectSendStream
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.backend import Journal, News

# PostgreSQL tells 8,000 bytes at once.
PART_BYTES = 4_500
# Messages of which not all has come yet: the oldest are dropped beyond so many.
UNFINISHED_MAX = 64
WAITING_MAX = 100  # messages of one session that its app has not taken yet
_SESSION = re.compile(rb"session_id=([0-9a-f]{32})")


class Sessions:
    """An ASGI app around the SDK's SSE app. It stands behind the door, which gives it each body in one message.

    `journal` tells the other servers of its account; one that tells nobody (`tells` False) leaves everything to the app.
    """

    def __init__(self, app: ASGIApp, journal: Journal) -> None:
        self._app = app
        self._journal = journal
        self._here: dict[str, tuple[Scope, MemoryObjectSendStream[bytes]]] = {}
        self._unfinished: OrderedDict[str, dict[int, bytes]] = OrderedDict()
        journal.listen(self._heard)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and scope["method"] == "GET" and self._journal.tells:
            await self._stream(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "POST" and self._journal.tells:
            session = parse_qs(scope["query_string"].decode("latin-1")).get("session_id", [""])[0]
            if session in self._here or not re.fullmatch("[0-9a-f]{32}", session):
                await self._app(scope, receive, send)
            else:
                await self._pass_on(session, (await receive()).get("body", b""), scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The stream of one session; what other servers pass on for it is given to the app as a request of its own."""
        mine: list[str] = []
        arrived, coming = anyio.create_memory_object_stream[bytes](WAITING_MAX)

        async def noting(message: Message) -> None:
            if not mine and (found := _SESSION.search(message.get("body", b""))):
                mine.append(found[1].decode())
                self._here[mine[0]] = (scope, arrived)
            await send(message)

        async def give() -> None:
            async for body in coming:
                await self._app(_posted(scope, mine[0], body), _once(body), _unheard)

        try:
            async with arrived, coming, anyio.create_task_group() as group:
                group.start_soon(give)
                await self._app(scope, receive, noting)
                group.cancel_scope.cancel()
        finally:
            for session in mine:
                self._here.pop(session, None)

    async def _pass_on(self, session: str, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        answer = PlainTextResponse("Accepted", 202)
        name, count = uuid.uuid4().hex, max(1, -(-len(body) // PART_BYTES))
        try:
            for number in range(count):
                part = base64.b64encode(body[number * PART_BYTES : (number + 1) * PART_BYTES]).decode()
                await self._journal.tell(News(part=(session, name, number, count, part)))
        except JournalUnwritable:
            answer = PlainTextResponse(
                "The stream of this session is at another server, which cannot be told now.", 503
            )
        await answer(scope, receive, send)

    def _heard(self, news: News) -> None:
        if news.part is None or news.part[0] not in self._here:
            return
        session, name, number, count, part = news.part
        parts = self._unfinished.setdefault(name, {})
        with suppress(ValueError):
            parts[number] = base64.b64decode(part)
        if len(parts) == count:
            del self._unfinished[name]
            with suppress(anyio.WouldBlock):
                self._here[session][1].send_nowait(b"".join(parts[one] for one in sorted(parts)))
        elif len(self._unfinished) > UNFINISHED_MAX:
            self._unfinished.popitem(last=False)


def _posted(stream: Scope, session: str, body: bytes) -> Scope:
    """A request as it would have come to this server, with the host and the caller of the session's stream."""
    kept = [pair for pair in cast("list[tuple[bytes, bytes]]", stream["headers"]) if pair[0] in (b"host", b"origin")]
    headers = [*kept, (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    path = "/messages/"
    query = f"session_id={session}".encode()
    return {
        **stream,
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "headers": headers,
    }


def _once(body: bytes) -> Receive:
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if left:
            return left.pop()
        await anyio.sleep_forever()
        raise AssertionError("unreachable")

    return receive


async def _unheard(_: Message) -> None:
    """What the app answers to a message that was passed on: it was accepted elsewhere already."""
