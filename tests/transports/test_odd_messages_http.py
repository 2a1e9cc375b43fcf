"""Odd messages over streamable HTTP and SSE: each is accepted or refused, none is an internal error."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from child_processes import ANSWER_TIMEOUT_S
from hypothesis import HealthCheck, given, settings
from odd_messages import CASES, FIRST_MESSAGES, LINES, Case, proofs

from evolink_mcp.app.settings import Settings
from evolink_mcp.app.wiring import open_studio
from evolink_mcp.server.server import build_server
from evolink_mcp.teams.tenants import lifespan
from evolink_mcp.transports.http import REQUEST_MAX_BYTES, mcp_app
from evolink_mcp.transports.http_guard import HttpGuard

ERAS = pytest.mark.parametrize("era", ["legacy", "modern"])
FUZZ = settings(
    max_examples=150, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
VERSION = {"legacy": "2025-11-25", "modern": "2026-07-28"}
SURROGATES = (b"\xed\xa0\x80", b"\\ud", b"\\uD")
BODY_MAX = 512 << 10


class Reply:
    """The reply to one HTTP request."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Return the JSON-RPC messages in the body, which is JSON or a stream of events."""
        lines = [line.removeprefix(b"data: ") for line in self.body.splitlines() if line.startswith((b"data: {", b"{"))]
        return [json.loads(line) for line in lines]


class AsgiClient:
    """An ASGI app, called without a network. It has no API key, so it can buy nothing."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._number = 0

    async def request(self, method: str, target: str, body: bytes | None, headers: dict[bytes, bytes]) -> Reply:
        """Send a request. Without a body, the client disconnects before the body is complete."""
        reply = Reply()
        whole = {"type": "http.request", "body": body, "more_body": False}
        part = {"type": "http.request", "body": b"{", "more_body": True}
        messages = [whole] if body is not None else [part, {"type": "http.disconnect"}]

        async def receive() -> Any:
            if messages:
                return messages.pop(0)
            await anyio.sleep_forever()
            raise AssertionError("unreachable")

        async def send(message: Any) -> None:
            reply.status = message.get("status", reply.status)
            reply.body += message.get("body", b"")

        with anyio.fail_after(ANSWER_TIMEOUT_S):
            await self._app(self._scope(method, target, headers), receive, send)
        return reply

    def _scope(self, method: str, target: str, headers: dict[bytes, bytes]) -> dict[str, Any]:
        path, _, query = target.partition("?")
        headers = {
            b"host": b"localhost",
            b"accept": b"application/json, text/event-stream",
            b"content-type": b"application/json",
            **headers,
        }
        return {
            "type": "http", "http_version": "1.1", "method": method, "scheme": "http", "path": path, "root_path": "",
            "raw_path": path.encode(), "query_string": query.encode(), "headers": list(headers.items()),
            "client": ("127.0.0.1", 1), "server": ("localhost", 80), "extensions": {},
        }  # fmt: skip

    async def post(self, era: str, body: bytes) -> Reply:
        """Send a message as clients of this era do, with the headers that repeat parts of it."""
        headers = {b"mcp-protocol-version": VERSION[era].encode(), b"mcp-session-id": b"odd"}
        if era == "modern":
            headers |= _routing(body)
        return await self.request("POST", "/mcp", body, headers)

    async def check_good_requests(self, era: str) -> None:
        """Check that good requests get their results."""
        self._number += 1
        for name, request in proofs(era, self._number).items():
            reply = await self.post(era, json.dumps(request).encode())
            (answer,) = reply.messages
            assert (reply.status, answer["id"], "result" in answer) == (200, name, True), answer

    @asynccontextmanager
    async def stream(self) -> AsyncGenerator[Stream]:
        """Open an SSE session."""
        chunk_sink, chunks = anyio.create_memory_object_stream[bytes](10_000)
        closing = anyio.Event()

        async def receive() -> Any:
            await closing.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await chunk_sink.send(message["body"])

        async with chunk_sink, chunks, anyio.create_task_group() as group:
            group.start_soon(self._app, self._scope("GET", "/sse", {}), receive, send)
            with anyio.fail_after(ANSWER_TIMEOUT_S):
                target = (await _event(chunks)).decode()
            yield Stream(self, target, chunks)
            closing.set()


class Stream:
    """A session of SSE: messages go by POST, answers come in the stream."""

    def __init__(self, client: AsgiClient, target: str, chunks: Any) -> None:
        self._client = client
        self._target = target
        self._chunks = chunks
        self._number = 0

    async def post(self, body: bytes) -> Reply:
        return await self._client.request("POST", self._target, body, {})

    async def receive(self) -> dict[str, Any]:
        with anyio.fail_after(ANSWER_TIMEOUT_S):
            return json.loads(await _event(self._chunks))

    async def check_good_requests(self, era: str) -> None:
        self._number += 1
        requests = proofs(era, self._number)
        for request in requests.values():
            assert (await self.post(json.dumps(request).encode())).status == 202
        waiting = set(requests)
        while waiting:
            answer = await self.receive()
            if answer.get("id") in waiting:
                waiting.remove(answer["id"])
                assert "result" in answer, answer


async def _event(chunks: Any) -> bytes:
    """Return the data of the next event."""
    while True:
        chunk = await chunks.receive()
        for line in chunk.splitlines():
            if line.startswith(b"data: "):
                return line.removeprefix(b"data: ")


def _routing(body: bytes) -> dict[bytes, bytes]:
    """Return the headers with which a client of 2026-07-28 repeats the method and the name of its request."""
    try:
        message = json.loads(body)
        names = {b"mcp-method": message["method"].encode("ascii")}
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return {}
    params = message.get("params")
    name = params.get("name") if isinstance(params, dict) else None
    return names | ({b"mcp-name": name.encode("ascii")} if isinstance(name, str) and name.isascii() else {})


@asynccontextmanager
async def served(folder: Path, transport: str) -> AsyncGenerator[AsgiClient]:
    environ = {
        "EVOLINK_BASE_URL": "http://127.0.0.1:9",
        "EVOLINK_MCP_DATA_DIR": str(folder / "data"),
        "EVOLINK_MCP_OUTPUT_DIR": str(folder / "images"),
    }
    async with open_studio(Settings.from_environment(environ)) as studio:
        app = mcp_app(build_server(studio), studio.journal, transport=transport, host="127.0.0.1")
        async with lifespan(app):
            yield AsgiClient(HttpGuard(app, (), REQUEST_MAX_BYTES))


@contextmanager
def portal_to(folder: Path, transport: str) -> Iterator[tuple[BlockingPortal, AsgiClient]]:
    """Yield a client that hypothesis can call. Its event loop runs in a thread."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(served(folder, transport)) as client:
        yield portal, client


@pytest.fixture(autouse=True)
def _no_traceback(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Check that the log has no internal error."""
    caplog.set_level(logging.WARNING)
    yield
    records = caplog.get_records("call")
    assert [r.getMessage() for r in records if r.exc_info or r.levelno >= logging.ERROR] == []


def is_refused(case: Case) -> bool:
    """Return whether HTTP refuses the message. It also refuses lone surrogates, a byte order mark and an empty body."""
    return case.is_error or not case.line.strip() or case.line.startswith((*SURROGATES, b"\xef\xbb\xbf")) or any(
        mark in case.line for mark in SURROGATES
    )  # fmt: skip


@ERAS
def test_every_odd_message_over_http_is_accepted_or_refused(tmp_path: Path, era: str) -> None:
    with portal_to(tmp_path, "http") as (portal, client):

        async def post_all() -> None:
            for name, case in CASES.items():
                reply = await client.post(era, case.line)
                assert reply.status < 500, (name, reply.body)
                if is_refused(case):
                    (error,) = reply.messages
                    assert (reply.status, error["error"]["code"] in (-32600, -32700)) == (400, True), (name, error)
                    assert error["id"] in (case.request_id, None), name
                elif era == "legacy":
                    assert reply.status == (202 if case.is_silent else 200), (name, reply.body)
            await client.check_good_requests(era)

        portal.call(post_all)


@ERAS
def test_no_generated_message_is_an_internal_error_of_http(tmp_path: Path, era: str) -> None:
    with portal_to(tmp_path, "http") as (portal, client):

        @FUZZ
        @given(LINES)
        def post(line: bytes) -> None:
            assert portal.call(client.post, era, line).status < 500
            portal.call(client.check_good_requests, era)

        post()


@ERAS
def test_every_odd_message_over_sse_is_accepted_or_refused(tmp_path: Path, era: str) -> None:
    with portal_to(tmp_path, "sse") as (portal, client):

        async def post_all() -> None:
            async with client.stream() as stream:
                await stream.post(json.dumps(FIRST_MESSAGES[era]).encode())
                for name, case in CASES.items():
                    reply = await stream.post(case.line)
                    if is_refused(case):
                        (error,) = reply.messages
                        assert (reply.status, error["error"]["code"] in (-32600, -32700)) == (400, True), (name, error)
                    else:
                        assert reply.status == 202, name
                await stream.check_good_requests(era)

        portal.call(post_all)


@ERAS
def test_no_generated_message_stops_a_session_of_sse(tmp_path: Path, era: str) -> None:
    with (
        portal_to(tmp_path, "sse") as (portal, client),
        portal.wrap_async_context_manager(client.stream()) as stream,
    ):
        portal.call(stream.post, json.dumps(FIRST_MESSAGES[era]).encode())

        @FUZZ
        @given(LINES)
        def post(line: bytes) -> None:
            assert portal.call(stream.post, line).status < 500
            portal.call(stream.check_good_requests, era)

        post()


@pytest.mark.parametrize("path", ["/mcp", "/messages/", "/nowhere"])
@pytest.mark.parametrize("transport", ["http", "sse"])
def test_a_message_without_a_session_is_refused(tmp_path: Path, transport: str, path: str) -> None:
    with portal_to(tmp_path, transport) as (portal, client):
        for query in ("", "?session_id=", "?session_id=odd", "?session_id=" + "0" * 32, "?session_id=%ED%A0%80"):
            reply = portal.call(client.request, "POST", path + query, b'{"jsonrpc":"2.0","id":1,"method":"ping"}', {})
            is_found = (transport, path) == ("http", "/mcp")
            assert (reply.status == 200, reply.status < 500) == (is_found, True)


@pytest.mark.parametrize("session", [b"", b"\xff\xfe", b"x" * 8_000, b"a b", b"\xed\xa0\x80"])
def test_an_odd_session_header_is_no_error(tmp_path: Path, session: bytes) -> None:
    cancel = b'{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":"%b"}}' % (b"x" * 8_000)
    with portal_to(tmp_path, "http") as (portal, client):
        for body, status in ((cancel, 202), (b'{"jsonrpc":"2.0","id":1,"method":"ping"}', 200)):
            headers = {b"mcp-session-id": session, b"mcp-protocol-version": b"2025-11-25"}
            assert portal.call(client.request, "POST", "/mcp", body, headers).status == status


@pytest.mark.parametrize(("transport", "target"), [("http", "/mcp"), ("sse", "/messages/?session_id=" + "0" * 32)])
def test_a_client_that_disconnects_before_its_body_is_complete_is_no_error(
    tmp_path: Path, transport: str, target: str
) -> None:
    with portal_to(tmp_path, transport) as (portal, client):
        assert portal.call(client.request, "POST", target, None, {}).status < 500
