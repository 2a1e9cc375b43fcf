"""Check Host, Origin and token of an HTTP request. Limit the body size and the read time."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Protocol

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evolink_mcp import __version__
from evolink_mcp.call_context import REQUEST_ID, request_id_for
from evolink_mcp.transports.authentication import CALLER_KEY, Authenticator, AuthFailure
from evolink_mcp.transports.authority import authority_in, canonical, origin_in
from evolink_mcp.transports.json_rpc import INVALID_REQUEST, error_body, request_id_in_part
from evolink_mcp.transports.messages import replay
from evolink_mcp.transports.turns import TurnsClosed

# Health checks need no token: a load balancer has none.
HEALTH_PATH = "/healthz"
READINESS_PATH = "/readyz"
REQUEST_ID_HEADER = b"x-request-id"
SERVER_INFO = {"name": "evolink-mcp", "version": __version__}
TEXT_PLAIN = b"text/plain; charset=utf-8"
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
BODY_TIMEOUT_S = 30.0
# The guard reads the rest of a body that is too large: a client reads the answer only after it has sent everything.
DISCARDED_MAX_BYTES = 64 << 20
WRONG_HOST = AuthFailure(
    HTTPStatus.MISDIRECTED_REQUEST, "This server does not answer to that host name; see --allowed-host."
)
WRONG_ORIGIN = AuthFailure(HTTPStatus.FORBIDDEN, "Web pages of other sites may not call this server.")

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class _Body:
    """The body of a request as one ASGI message, or the message of a client that disconnected.

    `ends` are the first and the last bytes, with the request ID. `size` is in bytes. `is_refused`: the process had no
    place for a large body, so the content is incomplete.
    """

    message: Message
    ends: bytes
    size: int
    is_refused: bool = False


@dataclass(frozen=True, slots=True)
class LargeBodies:
    """Limits of requests with an image as a data: URI, which only authenticated callers may send.

    A body may have `body_max_bytes` and must arrive within `timeout_s`. The process serves `at_once` of them at the same
    time, until their calls end: a call keeps its arguments.
    """

    body_max_bytes: int
    at_once: int
    timeout_s: float


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
        return method in self.methods and self.has(path)

    def has(self, path: str) -> bool:
        """Return whether the path belongs to this endpoint."""
        return path == self.path or (self.path.endswith("/") and path.startswith(self.path))


class Observer(Protocol):
    """Count HTTP requests. A `route` is the path of an endpoint, or `other`."""

    def count_answer(self, route: str, status: int) -> None:
        """Count an HTTP answer."""
        ...

    def count_refusal(self, status: int, *, has_token: bool) -> None:
        """Count a refused HTTP request: not authenticated, or sent to a server that is about to end.

        `has_token`: it had an Authorization header.
        """
        ...


CLOSING = AuthFailure(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "This server is about to end. Nothing was bought. Try again: another server answers.",
    ((b"retry-after", b"1"), (b"connection", b"close")),
)


class HttpGuard:
    """An ASGI app in front of `app`.

    Each HTTP request has an ID: that of its header X-Request-Id, or a new one. The answer repeats it. `app_routes` are the
    paths of `app`. `observer` counts answers by their route.

    It accepts only the hostnames of this machine and `hostnames`. That stops DNS rebinding: a browser sends the hostname
    from which it loaded the page. With an `authenticator` every request needs authentication before the guard reads its
    body; health checks and public endpoints need none. `not_ready` returns the reason why the server can do no paid work
    now, `health_notes` faults that do not stop it. A body may have `body_max_bytes`, and must arrive within
    `body_timeout_s`. `large_bodies` are the limits of authenticated callers; without them `body_max_bytes` is the limit
    of every caller.
    """

    def __init__(
        self,
        app: ASGIApp,
        hostnames: Sequence[str],
        body_max_bytes: int,
        *,
        authenticator: Authenticator | None = None,
        not_ready: Callable[[], Awaitable[str | None]] | None = None,
        health_notes: Callable[[], Sequence[str]] = tuple,
        endpoints: Sequence[Endpoint] = (),
        body_timeout_s: float = BODY_TIMEOUT_S,
        large_bodies: LargeBodies | None = None,
        app_routes: Sequence[str] = (),
        observer: Observer | None = None,
    ) -> None:
        self._app = app
        self._app_routes = frozenset((*app_routes, HEALTH_PATH, READINESS_PATH))
        self._observer = observer
        self._hostnames = frozenset(accepted_hostnames(hostnames))
        self._body_max_bytes = body_max_bytes
        self._authenticator = authenticator
        self._not_ready = not_ready
        self._health_notes = health_notes
        self._endpoints = list(endpoints)
        self._body_timeout_s = body_timeout_s
        self._large_bodies = large_bodies
        self._large_bodies_now = 0
        self._is_closing = False
        self._refuses_requests = False
        self.open_requests = 0
        self.open_calls = 0  # POSTs that `app` has and has not answered

    def add_endpoint(self, endpoint: Endpoint) -> None:
        """Serve one more endpoint beside MCP."""
        self._endpoints.append(endpoint)

    def close(self, *, has_other_servers: bool) -> None:
        """Answer the readiness check with 503, so that a proxy sends new requests to other servers.

        With `has_other_servers` requests to `app` that have not begun get 503, so that the proxy repeats them at another
        server. Without, a client can still finish its calls. Requests in progress continue.
        """
        self._is_closing = True
        self._refuses_requests = has_other_servers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_for(_only_value(scope["headers"], REQUEST_ID_HEADER).decode("latin-1"))
        token = REQUEST_ID.set(request_id)
        self.open_requests += 1
        try:
            await self._serve(scope, receive, self._with_request_id(send, request_id, scope["path"]))
        finally:
            self.open_requests -= 1
        # After an exception the ID stays, because uvicorn logs the exception in this context.
        REQUEST_ID.reset(token)

    def _with_request_id(self, send: Send, request_id: str, path: str) -> Send:
        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (REQUEST_ID_HEADER, request_id.encode())]
                message = {**message, "headers": headers}
                if self._observer is not None:
                    self._observer.count_answer(self._route(path), message["status"])
            await send(message)

        return send_with_id

    def _route(self, path: str) -> str:
        """Return the endpoint of a path. A caller can invent paths, so an unknown one is no value of a metric."""
        if path in self._app_routes:
            return path
        return next((endpoint.path for endpoint in self._endpoints if endpoint.has(path)), "other")

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Also before health checks, so that DNS rebinding does not find this server.
        headers = self._checked(scope["headers"])
        if isinstance(headers, AuthFailure):
            await _send_text(send, headers.status, headers.text)
            return
        scope = {**scope, "headers": headers}
        if scope["path"] in (HEALTH_PATH, READINESS_PATH) and scope["method"] in ("GET", "HEAD"):
            is_readiness = scope["path"] == READINESS_PATH
            problem = await self._readiness_problem() if is_readiness else None
            await self._send_health(send, problem, self._health_notes() if is_readiness else [])
        else:
            await self._dispatch(scope, receive, send, dict(headers))

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send, headers: dict[bytes, bytes]) -> None:
        endpoint = next(
            (candidate for candidate in self._endpoints if candidate.matches(scope["method"], scope["path"])), None
        )
        app = self._app if endpoint is None else endpoint.app
        caller: object | AuthFailure = None
        # Before the body: a caller without a token must not use memory for a body.
        if self._authenticator is not None and (endpoint is None or not endpoint.is_public):
            caller = await self._authenticator.authenticate(headers)
        # Callbacks and stored images begin no paid work, so their endpoints stay.
        if self._refuses_requests and endpoint is None:
            caller = CLOSING
        if isinstance(caller, AuthFailure):
            await self._send_failure(send, caller, headers)
            return
        act = partial(self._post, app) if scope["method"] == "POST" else app
        try:
            await act({**scope, CALLER_KEY: caller}, receive, send)
        # A call without a turn has bought nothing, so a proxy may repeat it.
        except TurnsClosed:
            await self._send_failure(send, CLOSING, headers)

    async def _send_failure(self, send: Send, failure: AuthFailure, headers: dict[bytes, bytes]) -> None:
        if self._observer is not None:
            self._observer.count_refusal(failure.status, has_token=b"authorization" in headers)
        await _send(send, failure.status, failure.text.encode(), TEXT_PLAIN, failure.headers)

    async def _readiness_problem(self) -> str | None:
        if self._is_closing:
            return "the server is about to end"
        return None if self._not_ready is None else await self._not_ready()

    async def _send_health(self, send: Send, problem: str | None, notes: Sequence[str]) -> None:
        status = HTTPStatus.OK if problem is None else HTTPStatus.SERVICE_UNAVAILABLE
        health = {"status": "ok"} if problem is None else {"status": "not ready", "why": problem}
        noted = {"notes": list(notes)} if notes else {}
        await _send(send, status, json.dumps(health | noted | SERVER_INFO).encode(), b"application/json")

    def _checked(self, headers: Headers) -> Headers | AuthFailure:
        """Return the headers, with Host and Origin in the form that the SDK's own check expects."""
        authority = authority_in(_only_value(headers, b"host"))
        if authority is None or authority.hostname not in self._hostnames:
            return WRONG_HOST
        checked = [(name, value) for name, value in headers if name not in (b"host", b"origin")]
        # The SDK compares the text of the header, for which `LOCALHOST` is another host.
        checked.append((b"host", str(authority).encode()))
        if any(name == b"origin" for name, _ in headers):
            origin = origin_in(_only_value(headers, b"origin"))
            if origin is None or origin.authority.hostname not in self._hostnames:
                return WRONG_ORIGIN
            checked.append((b"origin", str(origin).encode()))
        return checked

    async def _post(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the whole body, then pass it to `app` as one message."""
        # A caller without a token could fill all places for large bodies.
        large = self._large_bodies if scope[CALLER_KEY] is not None else None
        body: _Body | None = None
        with ExitStack() as stack:
            with anyio.move_on_after(self._body_timeout_s) as deadline:
                body = await self._body(receive, large, deadline, stack)
            limit = self._body_max_bytes if large is None else large.body_max_bytes
            if body is None:
                await _send_text(send, HTTPStatus.REQUEST_TIMEOUT, "The request did not arrive in time.")
            elif body.size > limit:
                await _send_json_rpc_error(send, request_id_in_part(body.ends), self._too_large(large))
            elif large is not None and body.is_refused:
                text = f"The server handles {large.at_once} requests with an image. Try again."
                await _send(send, HTTPStatus.SERVICE_UNAVAILABLE, text.encode(), TEXT_PLAIN, ((b"retry-after", b"5"),))
            else:
                self.open_calls += 1
                try:
                    await app(scope, replay(body.message, receive), send)
                finally:
                    self.open_calls -= 1

    @contextmanager
    def _large_body(self) -> Generator[None]:
        self._large_bodies_now += 1
        try:
            yield
        finally:
            self._large_bodies_now -= 1

    async def _body(
        self, receive: Receive, large: LargeBodies | None, deadline: anyio.CancelScope, stack: ExitStack
    ) -> _Body:
        """Read the whole body. Discard the bytes above the limit.

        A body above the general limit takes one place of `large` until `stack` closes, and gets its time.
        """
        content = bytearray()
        kept_max_bytes = self._body_max_bytes
        is_refused = False
        size = 0
        head = b""
        tail = b""
        while size < DISCARDED_MAX_BYTES:
            message = await receive()
            if message["type"] != "http.request":
                return _Body(message, b"", 0)
            part: bytes = message.get("body", b"")
            size += len(part)
            if large is not None and kept_max_bytes < size and not is_refused and kept_max_bytes < large.body_max_bytes:
                is_refused = self._large_bodies_now >= large.at_once
                if not is_refused:
                    stack.enter_context(self._large_body())
                    kept_max_bytes = large.body_max_bytes
                # A body of 11 MiB needs more time than a call without an image.
                deadline.deadline = max(deadline.deadline, anyio.current_time() + large.timeout_s)
            # The error needs the ID of the request, also if the guard discards the body.
            head = (head + part)[:2048]
            tail = (tail + part)[-512:]
            if size <= kept_max_bytes:
                content += part
            if not message.get("more_body"):
                break
        whole = {"type": "http.request", "body": bytes(content), "more_body": False}
        # The ID stands before or after params. An `id` inside params is not the ID of the request.
        return _Body(whole, head.partition(b'"params"')[0] + tail, size, is_refused)

    def _too_large(self, large: LargeBodies | None) -> str:
        limit = (self._body_max_bytes if large is None else large.body_max_bytes) >> 10
        return (
            f"The request has more than {limit} KiB. A picture in a data: URI may have about {limit * 700 // 1000} kB, "
            "because base64 adds a third. Give a public URL, or PUT the file to /uploads of this server and give the uri "
            "of the answer."
        )


def accepted_hostnames(hostnames: Sequence[str]) -> list[str]:
    """Return the hostnames of this machine and `hostnames`, in the form that a checked Host header has."""
    return [canonical_name for name in (*LOOPBACK_NAMES, *hostnames) if (canonical_name := canonical(name)) is not None]


def _only_value(headers: Headers, name: bytes) -> bytes:
    """Return the value of a header that occurs once. A header that is missing or repeated has an empty value."""
    values = [value for known_name, value in headers if known_name == name]
    # A proxy and this server could read different values of a repeated header.
    return values[0] if len(values) == 1 else b""


async def _send_json_rpc_error(send: Send, request_id: object, text: str) -> None:
    body = error_body(request_id, INVALID_REQUEST, text)
    await _send(send, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, body, b"application/json")


async def _send_text(send: Send, status: int, text: str) -> None:
    await _send(send, status, text.encode(), TEXT_PLAIN)


async def _send(
    send: Send, status: int, body: bytes, content_type: bytes, extra: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode()), *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
