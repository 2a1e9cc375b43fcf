"""Connections that say nothing do not stay, and do not keep others out."""

from __future__ import annotations

import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio.abc import SocketStream

from evolink_mcp.transports import http, http_guard

pytestmark = pytest.mark.anyio

ASK = b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\nhi"


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await http_guard._say(send, 200, "hello")


@asynccontextmanager
async def served() -> AsyncIterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ready = anyio.Event()
    with anyio.fail_after(300):
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: http.serve_app(http_guard.Door(app, (), 1000), "127.0.0.1", port, ready=ready.set))
            await ready.wait()
            yield port
            signal.raise_signal(signal.SIGTERM)


async def rest(stream: SocketStream) -> bytes:
    """All that comes until the other side closes."""
    seen = b""
    try:
        while True:
            seen += await stream.receive()
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        return seen


@pytest.mark.parametrize("said", [b"", b"POST / HTTP/1.1\r\nhost: local"])
async def test_a_connection_that_says_nothing_or_half_is_closed(monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(http_guard, "SAYS_SOMETHING_WITHIN_S", 0.05)
    async with served() as port, await anyio.connect_tcp("127.0.0.1", port) as stream:
        if said:
            await stream.send(said)
        assert await rest(stream) == b""


async def test_a_body_that_does_not_come_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "BODY_WITHIN_S", 0.05)
    async with served() as port, await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(ASK[:-1])
        assert b" 408 " in await stream.receive()


async def test_beyond_a_number_new_connections_are_told_and_the_old_ones_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_guard, "connections_max", lambda: 3)
    async with served() as port:
        early = [await anyio.connect_tcp("127.0.0.1", port) for _ in range(3)]
        for stream in early:  # each is known to the server
            await stream.send(ASK)
            assert b" 200 " in await stream.receive()
        async with await anyio.connect_tcp("127.0.0.1", port) as late:
            assert (await rest(late)).startswith(b"HTTP/1.1 503 Service Unavailable")
        await early[0].send(ASK)
        assert b" 200 " in await early[0].receive()
        for stream in early:
            await stream.aclose()


def test_that_descriptors_are_used_up_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio calls its handler for every connection that it cannot accept, with a traceback each."""
    handle = http._once_out_of_descriptors()
    seen: list[Any] = []
    loop: Any = SimpleNamespace(default_exception_handler=seen.append)
    for _ in range(1_000):
        handle(loop, {"message": "socket.accept() out of system resource", "exception": OSError(24, "too many")})
    handle(loop, {"message": "something else"})
    assert caplog.text.count("out of file descriptors") == 1
    assert seen == [{"message": "something else"}]


@pytest.mark.parametrize(("limit", "at_once", "most"), [(256, 8, 120), (1_024, 16, 816), (65_536, 512, 60_864)])
def test_few_descriptors_are_shared_out_carefully(
    monkeypatch: pytest.MonkeyPatch, limit: int, at_once: int, most: int
) -> None:
    monkeypatch.setattr(http_guard, "descriptors", lambda: limit)
    assert (http_guard.accepted_at_once(), http_guard.connections_max()) == (at_once, most)
