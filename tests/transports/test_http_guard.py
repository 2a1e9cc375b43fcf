"""Silent and excess connections are closed, and they do not keep other clients out."""

from __future__ import annotations

import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio.abc import SocketStream
from starlette.responses import PlainTextResponse

from evolink_mcp.transports.connections import ConnectionLimits
from evolink_mcp.transports.http import DescriptorWarning, serve_app
from evolink_mcp.transports.http_guard import BODY_TIMEOUT_S, HttpGuard

pytestmark = pytest.mark.anyio

REQUEST = b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\nhi"
LIMITS = ConnectionLimits.for_descriptors(1_024)


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await PlainTextResponse("hello")(scope, receive, send)


@asynccontextmanager
async def served(limits: ConnectionLimits = LIMITS, body_timeout_s: float = BODY_TIMEOUT_S) -> AsyncIterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ready = anyio.Event()
    guard = HttpGuard(app, (), 1000, body_timeout_s=body_timeout_s)
    with anyio.fail_after(300):
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: serve_app(guard, "127.0.0.1", port, ready=lambda _: ready.set(), limits=limits))
            await ready.wait()
            yield port
            signal.raise_signal(signal.SIGTERM)


async def everything_from(stream: SocketStream) -> bytes:
    """Read until the other side closes the connection."""
    received = b""
    try:
        while True:
            received += await stream.receive()
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        return received


@pytest.mark.parametrize("sent", [b"", b"POST / HTTP/1.1\r\nhost: local"])
async def test_a_connection_without_a_complete_request_head_is_closed(sent: bytes) -> None:
    async with (
        served(replace(LIMITS, request_head_timeout_s=0.05)) as port,
        await anyio.connect_tcp("127.0.0.1", port) as stream,
    ):
        if sent:
            await stream.send(sent)
        assert await everything_from(stream) == b""


async def test_a_body_that_does_not_arrive_in_time_is_answered_with_408() -> None:
    async with served(body_timeout_s=0.05) as port, await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(REQUEST[:-1])
        assert b" 408 " in await stream.receive()


async def test_a_connection_above_the_limit_gets_503_and_the_first_ones_still_work() -> None:
    async with served(replace(LIMITS, served_max=3)) as port:
        early = [await anyio.connect_tcp("127.0.0.1", port) for _ in range(3)]
        for stream in early:  # the server has accepted each of them
            await stream.send(REQUEST)
            assert b" 200 " in await stream.receive()
        async with await anyio.connect_tcp("127.0.0.1", port) as late:
            assert (await everything_from(late)).startswith(b"HTTP/1.1 503 Service Unavailable")
        await early[0].send(REQUEST)
        assert b" 200 " in await early[0].receive()
        for stream in early:
            await stream.aclose()


def test_exhausted_descriptors_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio calls its handler for each connection that it cannot accept, and would log a traceback each time."""
    handle = DescriptorWarning()
    other_errors: list[Any] = []
    loop: Any = SimpleNamespace(default_exception_handler=other_errors.append)
    for _ in range(1_000):
        handle(loop, {"message": "socket.accept() out of system resource", "exception": OSError(24, "too many")})
    handle(loop, {"message": "something else"})
    assert caplog.text.count("out of file descriptors") == 1
    assert other_errors == [{"message": "something else"}]


@pytest.mark.parametrize(
    ("descriptors", "at_once", "served_max"), [(256, 8, 120), (1_024, 16, 816), (65_536, 512, 60_864)]
)
def test_few_descriptors_mean_few_connections(descriptors: int, at_once: int, served_max: int) -> None:
    limits = ConnectionLimits.for_descriptors(descriptors)
    assert (limits.accepted_at_once, limits.served_max) == (at_once, served_max)
