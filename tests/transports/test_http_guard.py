"""Silent and excess connections are closed, and they do not keep other clients out."""

from __future__ import annotations

import asyncio
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

from evolink_mcp.transports.connections import ConnectionLimits, close_port
from evolink_mcp.transports.http import DescriptorWarning, serve_app
from evolink_mcp.transports.http_guard import BODY_TIMEOUT_S, HttpGuard
from evolink_mcp.transports.turns import Turns

pytestmark = pytest.mark.anyio

REQUEST = b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\nhi"
LIMITS = ConnectionLimits.for_descriptors(1_024)


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await PlainTextResponse("hello")(scope, receive, send)


@asynccontextmanager
async def serve(limits: ConnectionLimits = LIMITS, body_timeout_s: float = BODY_TIMEOUT_S) -> AsyncIterator[int]:
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


async def read_to_end(stream: SocketStream) -> bytes:
    """Read until the other side closes the connection. Return the data."""
    data = b""
    try:
        while True:
            data += await stream.receive()
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        return data


@pytest.mark.parametrize("data", [b"", b"POST / HTTP/1.1\r\nhost: local"])
async def test_a_connection_without_a_complete_request_head_is_closed(data: bytes) -> None:
    async with (
        serve(replace(LIMITS, request_head_timeout_s=0.05)) as port,
        await anyio.connect_tcp("127.0.0.1", port) as stream,
    ):
        if data:
            await stream.send(data)
        assert await read_to_end(stream) == b""


async def test_a_body_that_does_not_arrive_in_time_is_answered_with_408() -> None:
    async with serve(body_timeout_s=0.05) as port, await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(REQUEST[:-1])
        assert b" 408 " in await stream.receive()


async def test_a_connection_above_the_limit_gets_503_and_the_first_ones_still_work() -> None:
    async with serve(replace(LIMITS, served_max=3)) as port:
        first_streams = [await anyio.connect_tcp("127.0.0.1", port) for _ in range(3)]
        for stream in first_streams:  # the server has accepted each of them
            await stream.send(REQUEST)
            assert b" 200 " in await stream.receive()
        async with await anyio.connect_tcp("127.0.0.1", port) as late_stream:
            assert (await read_to_end(late_stream)).startswith(b"HTTP/1.1 503 Service Unavailable")
        await first_streams[0].send(REQUEST)
        assert b" 200 " in await first_streams[0].receive()
        for stream in first_streams:
            await stream.aclose()


async def test_a_port_that_closes_serves_the_connections_that_wait_to_be_accepted() -> None:
    class Greeter(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            transport.write(b"hello")
            transport.close()

    def read_greeting(client: socket.socket) -> bytes:
        with client:
            return client.recv(100)

    server = await asyncio.get_running_loop().create_server(Greeter, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    clients = [socket.create_connection(address, 60) for _ in range(3)]  # the event loop accepts none meanwhile
    await close_port(server, Greeter)
    assert [await anyio.to_thread.run_sync(read_greeting, client) for client in clients] == [b"hello"] * 3
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, 60)


async def test_a_call_that_has_not_begun_gets_503_when_the_server_ends() -> None:
    """The proxy repeats it at another server. One call waits for its turn, the body of the other one arrives late."""
    turns = Turns(1, longest_s=1_000)
    guard = HttpGuard(AppWithTurns(turns), (), 1000)
    statuses: list[int] = []

    async def call(body_arrives: anyio.Event, method: str = "POST") -> None:
        async def receive() -> dict[str, Any]:
            await body_arrives.wait()
            return {"type": "http.request", "body": b"{}"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        headers = [(b"host", b"localhost")]
        await guard({"type": "http", "method": method, "path": "/mcp", "headers": headers}, receive, send)

    early_body = anyio.Event()
    early_body.set()
    late_body = anyio.Event()
    async with anyio.create_task_group() as group, turns.turn():
        group.start_soon(call, early_body)
        group.start_soon(call, early_body, "GET")
        group.start_soon(call, late_body)
        await anyio.wait_all_tasks_blocked()
        guard.close(has_other_servers=True)
        turns.close()
        late_body.set()
        await anyio.wait_all_tasks_blocked()
        assert (statuses, guard.open_calls) == ([503, 503, 503], 0)


class AppWithTurns:
    """An app that waits for a turn before each answer, as the app for MCP does."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self._turns.turn():
            await PlainTextResponse("hello")(scope, receive, send)


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
