"""Check Host, Origin and token of an HTTP request. Limit the body size and the read time."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evolink_mcp import __version__
from evolink_mcp.transports.authentication import CALLER_KEY, Authenticator, AuthFailure

# Health checks need no token: a load balancer has none.
HEALTH_PATH = "/healthz"
READINESS_PATH = "/readyz"
SERVER_INFO = {"name": "evolink-mcp", "version": __version__}
TEXT_PLAIN = b"text/plain; charset=utf-8"
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
BODY_TIMEOUT_S = 30.0
# The guard reads the rest of a body that is too large: a client reads the answer only after it has sent everything.
DISCARDED_MAX_BYTES = 64 << 20
INVALID_REQUEST = -32600
_ID = re.compile(rb'"id"\s*:\s*("(?:[^"\\]|\\.){0,200}"|-?\d{1,18})')


@dataclass(frozen=True, slots=True)
class _Body:
    """The body of a request as one ASGI message, or the message of a client that disconnected.

    `ends` are the first and the last bytes, with the request ID. `size` is in bytes.
    """

    message: Message
    ends: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint beside MCP: `path`, or all paths below it if it ends in a slash.

    `is_public`: it needs no token of a caller. Its address is signed, or it checks a separate token.
    """

    methods: tuple[str, ...]
    path: str
    app: ASGIApp
    is_public: bool = True

    def matches(self, method: str, path: str) -> bool:
        """Return whether the request is for this endpoint."""
        is_below = self.path.endswith("/") and path.startswith(self.path)
        return method in self.methods and (path == self.path or is_below)


class HttpGuard:
    """An ASGI app in front of `app`.

    It accepts only the hostnames of this machine and `hostnames`. That stops DNS rebinding: a browser sends the hostname
    from which it loaded the page. With an `authenticator` every request needs authentication before the guard reads its
    body; health checks and public endpoints need none. `not_ready` returns the reason why the server can do no paid work
    now. A body may have `body_max_bytes`, and must arrive within `body_timeout_s`.
    """

    def __init__(
        self,
        app: ASGIApp,
        hostnames: Sequence[str],
        body_max_bytes: int,
        *,
        authenticator: Authenticator | None = None,
        not_ready: Callable[[], Awaitable[str | None]] | None = None,
        endpoints: Sequence[Endpoint] = (),
        body_timeout_s: float = BODY_TIMEOUT_S,
    ) -> None:
        self._app = app
        self._names = frozenset(name.lower() for name in (*LOOPBACK_NAMES, *hostnames))
        self._body_max_bytes = body_max_bytes
        self._authenticator = authenticator
        self._not_ready = not_ready
        self._endpoints = list(endpoints)
        self._body_timeout_s = body_timeout_s
        self._is_closing = False
        self.open_requests = 0

    def add_endpoint(self, endpoint: Endpoint) -> None:
        """Serve one more endpoint beside MCP."""
        self._endpoints.append(endpoint)

    def close(self) -> None:
        """Answer the readiness check with 503 from now on, so that a proxy sends new requests to other servers."""
        self._is_closing = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self.open_requests += 1
        try:
            await self._serve(scope, receive, send)
        finally:
            self.open_requests -= 1

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(cast("list[tuple[bytes, bytes]]", scope["headers"]))
        origin = headers.get(b"origin")
        if _name_of(headers.get(b"host", b"")) not in self._names:
            await _send_text(
                send,
                HTTPStatus.MISDIRECTED_REQUEST,
                "This server does not answer to that host name; see --allowed-host.",
            )
        elif origin is not None and not self._may_call(origin):
            await _send_text(send, HTTPStatus.FORBIDDEN, "Web pages of other sites may not call this server.")
        elif scope["path"] in (HEALTH_PATH, READINESS_PATH) and scope["method"] in ("GET", "HEAD"):
            await self._send_health(send, await self._readiness_problem() if scope["path"] == READINESS_PATH else None)
        else:
            await self._dispatch(scope, receive, send, headers)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send, headers: dict[bytes, bytes]) -> None:
        endpoint = next(
            (candidate for candidate in self._endpoints if candidate.matches(scope["method"], scope["path"])), None
        )
        app = self._app if endpoint is None else endpoint.app
        caller: object | AuthFailure = None
        if self._authenticator is not None and (endpoint is None or not endpoint.is_public):
            caller = await self._authenticator.authenticate(headers)
        if isinstance(caller, AuthFailure):
            await _send(send, caller.status, caller.text.encode(), TEXT_PLAIN, caller.headers)
        elif scope["method"] == "POST":
            await self._post(app, {**scope, CALLER_KEY: caller}, receive, send)
        else:
            await app({**scope, CALLER_KEY: caller}, receive, send)

    async def _readiness_problem(self) -> str | None:
        if self._is_closing:
            return "the server is about to end"
        return None if self._not_ready is None else await self._not_ready()

    async def _send_health(self, send: Send, problem: str | None) -> None:
        status = HTTPStatus.OK if problem is None else HTTPStatus.SERVICE_UNAVAILABLE
        health = {"status": "ok"} if problem is None else {"status": "not ready", "why": problem}
        await _send(send, status, json.dumps(health | SERVER_INFO).encode(), b"application/json")

    def _may_call(self, origin: bytes) -> bool:
        scheme, found, rest = origin.partition(b"://")
        return bool(found) and scheme in (b"http", b"https") and _name_of(rest) in self._names

    async def _post(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the whole body, then pass it to `app` as one message."""
        body: _Body | None = None
        with anyio.move_on_after(self._body_timeout_s):
            body = await self._body(receive)
        if body is None:
            text = f"The request did not arrive within {self._body_timeout_s:g} s."
            await _send_text(send, HTTPStatus.REQUEST_TIMEOUT, text)
        elif body.size > self._body_max_bytes:
            await _send_json_rpc_error(send, _id_in(body.ends), self._too_large())
        else:
            await app(scope, _first(body.message, receive), send)

    async def _body(self, receive: Receive) -> _Body:
        """Read the whole body. Discard the bytes above the limit."""
        content = bytearray()
        size = 0
        head = b""
        tail = b""
        while size < DISCARDED_MAX_BYTES:
            message = await receive()
            if message["type"] != "http.request":
                return _Body(message, b"", 0)
            part: bytes = message.get("body", b"")
            size += len(part)
            head = (head + part)[:2048]
            tail = (tail + part)[-512:]
            if size <= self._body_max_bytes:
                content += part
            if not message.get("more_body"):
                break
        whole = {"type": "http.request", "body": bytes(content), "more_body": False}
        return _Body(whole, head.partition(b'"params"')[0] + tail, size)

    def _too_large(self) -> str:
        limit = self._body_max_bytes >> 10
        return (
            f"The request has more than {limit} KiB. A picture in a data: URI may have about {limit * 700 // 1000} kB, "
            "because base64 adds a third. Give a public URL, or PUT the file to /uploads of this server and give the uri "
            "of the answer."
        )


def _name_of(host: bytes) -> str:
    """Return the hostname without its port, in lower case. IPv6 addresses keep their brackets."""
    text = host.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text.partition("]")[0] + "]"
    return text.partition(":")[0]


def _id_in(body: bytes) -> Any:
    """Return the ID of an incomplete JSON-RPC message, if it is visible."""
    match = _ID.search(body)
    try:
        return json.loads(match[1]) if match else None
    except ValueError:
        return None


def _first(message: Message, receive: Receive) -> Receive:
    """Return a `receive` that gives `message` first."""
    messages = [message]

    async def receive_next() -> Message:
        return messages.pop() if messages else await receive()

    return receive_next


async def _send_json_rpc_error(send: Send, request_id: Any, text: str) -> None:
    error = {"jsonrpc": "2.0", "id": request_id, "error": {"code": INVALID_REQUEST, "message": text}}
    await _send(send, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, json.dumps(error).encode(), b"application/json")


async def _send_text(send: Send, status: int, text: str) -> None:
    await _send(send, status, text.encode(), TEXT_PLAIN)


async def _send(
    send: Send, status: int, body: bytes, content_type: bytes, extra: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode()), *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
