"""The door of the HTTP transports: who may knock (Host, Origin), how much may be said, and how long it may take."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from evolink_mcp import __version__
from evolink_mcp.transports.authentication import CALLER_KEY, Authenticator, AuthFailure

# Who asks whether the server is up needs no token.
HEALTH, READINESS = "/healthz", "/readyz"
NAMED = {"name": "evolink-mcp", "version": __version__}
TEXT = b"text/plain; charset=utf-8"
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
ENDING = "it is about to end"
BODY_WITHIN_S = 30.0
SAYS_SOMETHING_WITHIN_S = 10.0
TOLD_WITHIN_S = 1.0
# Kept free of connections: for the journal, EvoLink, pictures and what Python itself opens.
DESCRIPTORS_KEPT = 64
# asyncio takes some turns of its loop from accepting a connection to showing it to us, and as many to close it.
TURNS = 5
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\nconnection: close\r\n"
    b"content-type: text/plain\r\ncontent-length: 46\r\n\r\nToo many connections; try again in a moment.\r\n"
)
DRAINED_MAX_BYTES = 64 << 20
MISDIRECTED, TIMED_OUT, TOO_LARGE = 421, 408, 413
INVALID_REQUEST = -32600
_ID = re.compile(rb'"id"\s*:\s*("(?:[^"\\]|\\.){0,200}"|-?\d{1,18})')


@dataclass(frozen=True, slots=True)
class _Body:
    """A request's body: the message that carries it (or the client's end), its first and last bytes, its size in bytes."""

    message: Message
    ends: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Page:
    """What the door's own app does not answer: these methods of `path`, or of all paths below it if it ends in a slash.

    `is_open`: it needs no token of a caller, because its address is signed or it has a token of its own.
    """

    methods: tuple[str, ...]
    path: str
    app: ASGIApp
    is_open: bool = True

    def answers(self, method: str, path: str) -> bool:
        """Whether this request is for it."""
        below = self.path.endswith("/") and path.startswith(self.path)
        return method in self.methods and (path == self.path or below)


class Door:
    """An ASGI app around `app`. `names` are the host names that may be asked for, besides those of this machine.

    A browser sends the name that a page was loaded from: a name that was rebound to this machine is turned away.
    With `callers`, whoever is none of them is turned away before a body is read, on every path but HEALTH and READINESS,
    which the door answers itself, and on those of the `pages` that are open. `not_ready` says why the server cannot do
    paid work now, if so.
    """

    def __init__(
        self,
        app: ASGIApp,
        names: Sequence[str],
        body_max: int,
        authenticator: Authenticator | None = None,
        not_ready: Callable[[], Awaitable[str | None]] | None = None,
        pages: Sequence[Page] = (),
    ) -> None:
        self._pages = list(pages)
        self._not_ready = not_ready
        self._app = app
        self._authenticator = authenticator
        self._closed = False
        self.open = 0  # requests that are being served
        self._names = frozenset(name.lower() for name in (*LOOPBACK_NAMES, *names))
        self._body_max = body_max

    def add_page(self, page: Page) -> None:
        """Serve one more page."""
        self._pages.append(page)

    def close(self) -> None:
        """The server is about to end: READINESS says so from now on, and a proxy sends new requests elsewhere."""
        self._closed = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self.open += 1
        try:
            await self._serve(scope, receive, send)
        finally:
            self.open -= 1

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(cast("list[tuple[bytes, bytes]]", scope["headers"]))
        origin = headers.get(b"origin")
        if _name_of(headers.get(b"host", b"")) not in self._names:
            await _say(send, MISDIRECTED, "This server does not answer to that host name; see --allowed-host.")
        elif origin is not None and not self._may_call(origin):
            await _say(send, 403, "Pages from elsewhere may not call this server.")
        elif scope["path"] in (HEALTH, READINESS) and scope["method"] in ("GET", "HEAD"):
            await self._tell_of_health(send, await self._why_not() if scope["path"] == READINESS else None)
        else:
            page = next((page for page in self._pages if page.answers(scope["method"], scope["path"])), None)
            entered = None if page is not None and page.is_open else await self._entered(headers)
            app = self._app if page is None else page.app
            if isinstance(entered, AuthFailure):
                await _answer(send, entered.status, entered.text.encode(), TEXT, entered.headers)
            elif scope["method"] == "POST":
                await self._post(app, {**scope, CALLER_KEY: entered}, receive, send)
            else:
                await app({**scope, CALLER_KEY: entered}, receive, send)

    async def _entered(self, headers: dict[bytes, bytes]) -> object | AuthFailure:
        return None if self._authenticator is None else await self._authenticator.authenticate(headers)

    async def _why_not(self) -> str | None:
        if self._closed:
            return ENDING
        return None if self._not_ready is None else await self._not_ready()

    async def _tell_of_health(self, send: Send, why: str | None) -> None:
        told = {"status": "ok", **NAMED} if why is None else {"status": "not ready", "why": why, **NAMED}
        await _answer(send, 200 if why is None else 503, json.dumps(told).encode(), b"application/json")

    def _may_call(self, origin: bytes) -> bool:
        scheme, found, rest = origin.partition(b"://")
        return bool(found) and scheme in (b"http", b"https") and _name_of(rest) in self._names

    async def _post(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Let `app` have the body in one message, once all of it is here."""
        body: _Body | None = None
        with anyio.move_on_after(BODY_WITHIN_S):
            body = await self._body(receive)
        if body is None:
            await _say(send, TIMED_OUT, f"The request did not come within {BODY_WITHIN_S:.0f} s.")
        elif body.size > self._body_max:
            await _refuse(send, _id_in(body.ends), self._too_large())
        else:
            await app(scope, _first(body.message, receive), send)

    async def _body(self, receive: Receive) -> _Body:
        """The whole body; what is too much of it is read and dropped."""
        kept = bytearray()
        size = 0
        head = tail = b""
        while size < DRAINED_MAX_BYTES:
            message = await receive()
            if message["type"] != "http.request":
                return _Body(message, b"", 0)
            part: bytes = message.get("body", b"")
            size += len(part)
            head, tail = (head + part)[:2048], (tail + part)[-512:]
            if size <= self._body_max:
                kept += part
            if not message.get("more_body"):
                break
        whole = {"type": "http.request", "body": bytes(kept), "more_body": False}
        return _Body(whole, head.partition(b'"params"')[0] + tail, size)

    def _too_large(self) -> str:
        limit = self._body_max >> 10
        return (
            f"The request has more than {limit} KiB. A picture in a data: URI may weigh about {limit * 700 // 1000} kB, "
            "because base64 adds a third: give a public URL, or PUT the file to /uploads of this server and give the uri "
            "that it answers."
        )


def descriptors() -> int:
    """How many files and connections this process may have open."""
    if sys.platform == "win32":
        return 8_192
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1_000_000 if soft == resource.RLIM_INFINITY else soft


def accepted_at_once() -> int:
    """How many connections are accepted in one turn of the loop: few where there are few descriptors."""
    return min(max(descriptors() // 64, 8), 512)


def told_at_once() -> int:
    """How many connections beyond `connections_max` are kept until their request is here and can be answered."""
    return 4 * accepted_at_once()


def connections_max() -> int:
    """How many connections are served at once: as many as there are descriptors, but for what is kept free."""
    return max(descriptors() - DESCRIPTORS_KEPT - TURNS * accepted_at_once() - told_at_once(), 1)


class Impatient(H11Protocol):
    """A connection that says nothing, or only half a request's head, is closed; beyond a number, new ones are told so."""

    def connection_made(self, transport: Any) -> None:
        """Accept the connection, unless there are too many."""
        super().connection_made(transport)
        beyond = len(self.connections) - connections_max()
        self._too_much = beyond > 0
        self._patience = self.loop.call_later(
            TOLD_WITHIN_S if self._too_much else SAYS_SOMETHING_WITHIN_S, self._hang_up
        )
        if beyond > told_at_once():
            self._tell_full()

    def data_received(self, data: bytes) -> None:
        """The other side says something. What is too much is told now: before, the answer could be lost on its way."""
        if self._too_much:
            self._tell_full()
        else:
            super().data_received(data)

    def _tell_full(self) -> None:
        self.transport.write(FULL)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side has gone."""
        self._patience.cancel()
        super().connection_lost(exc)

    def _hang_up(self) -> None:
        if self._too_much:
            self._tell_full()
        elif cast("Any", self.cycle) is None:
            self.transport.close()


def _name_of(host: bytes) -> str:
    """A host's name without its port, in small letters; IPv6 addresses keep their brackets."""
    text = host.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text.partition("]")[0] + "]"
    return text.partition(":")[0]


def _id_in(body: bytes) -> Any:
    """The id of a JSON-RPC message that is not read as a whole; None if it cannot be seen."""
    found = _ID.search(body)
    try:
        return json.loads(found[1]) if found else None
    except ValueError:
        return None


def _first(message: Message, receive: Receive) -> Receive:
    """`message`, and then what `receive` has."""
    left = [message]

    async def received() -> Message:
        return left.pop() if left else await receive()

    return received


async def _refuse(send: Send, name: Any, told: str) -> None:
    error = {"jsonrpc": "2.0", "id": name, "error": {"code": INVALID_REQUEST, "message": told}}
    await _answer(send, TOO_LARGE, json.dumps(error).encode(), b"application/json")


async def _say(send: Send, status: int, text: str) -> None:
    await _answer(send, status, text.encode(), TEXT)


async def _answer(
    send: Send, status: int, body: bytes, content_type: bytes, more: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
