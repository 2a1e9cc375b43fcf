"""A gateway over real sockets. It forwards each request to a simulator, or misbehaves as a test defines."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx2 as httpx

from evolink_mcp.server.server import build_server
from evolink_mcp.simulator.app import SimulatedTask, Simulator
from evolink_mcp.studio.studio import Studio

PURCHASE = ("POST", "/v1/images/generations")
REASONS = {200: "OK", 429: "Too Many Requests"}
NEVER_S = 60.0
# Turns of the event loop in which the client, in the same loop, reads everything that was sent.
TURNS_TO_READ = 50
# The deadlines of all HTTP requests in progress.
DEADLINES: list[anyio.CancelScope] = []


@contextmanager
def deadline_at_silence(_: float) -> Iterator[anyio.CancelScope]:
    """Return a deadline that expires when a gateway sends no more bytes. A slow machine does not change the result."""
    with anyio.CancelScope() as scope:
        DEADLINES.append(scope)
        try:
            yield scope
        finally:
            DEADLINES.remove(scope)


async def silence() -> None:
    """Send no more bytes. The deadline of every HTTP request expires after its client has read all data."""
    for _ in range(TURNS_TO_READ):
        await asyncio.sleep(0)
    for scope in DEADLINES:
        scope.cancel()
    await asyncio.sleep(NEVER_S)


class QuickSimulator(Simulator):
    """A simulated EvoLink with black images and an estimated time of 0 s."""

    def view(self, *args: Any, **options: Any) -> dict[str, Any]:
        answer = super().view(*args, **options)
        if "estimated_time" in answer.get("task_info", {}):
            answer["task_info"]["estimated_time"] = 0
        return answer

    def draw(self, task: SimulatedTask, index: int) -> bytes:
        width, height = task.size
        rows = (b"\0" + bytes(-(-width // 8))) * height
        parts = (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        )
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in parts
        )


class CurrentStudio:
    """The studio that a test opened last. One server serves all tests, because building its schemas takes long."""

    studio: Studio

    def subscribe(self, _: object) -> None:
        """Do nothing: the server is built before any studio is open."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.studio, name)


CURRENT: Any = CurrentStudio()
ONE_SERVER = build_server(CURRENT, preview_edge=0)


@dataclass
class Exchange:
    """One request on one connection. It reaches the simulator, and is billed, only with `accept`."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    writer: asyncio.StreamWriter
    api: httpx.AsyncClient
    raw: bytes = b""

    async def accept(self) -> httpx.Response:
        """Send the request to the simulator and return its answer."""
        return await self.api.request(self.method, self.path, headers=self.headers, content=self.body)

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def answer(self, status: int, body: bytes = b"", *, length: int | None = None, **headers: str) -> None:
        """Send a complete HTTP answer. `length` is a wrong length of the body."""
        fields = {"content-type": "application/json", "content-length": str(len(body) if length is None else length)}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}\r\n" + "".join(
            f"{k}: {v}\r\n" for k, v in fields.items()
        )
        self.send(head.encode("latin-1") + b"connection: close\r\n\r\n" + body)

    def relay(self, reply: httpx.Response) -> None:
        self.answer(reply.status_code, reply.content, content_type=reply.headers.get("content-type", ""),
                    **({"retry_after": value} if (value := reply.headers.get("retry-after")) else {}))  # fmt: skip

    def reset(self) -> None:
        """End the connection with RST, not FIN."""
        sock: Any = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Fault = Callable[[Exchange], Awaitable[None]]


async def behave(exchange: Exchange) -> None:
    """Answer correctly."""
    exchange.relay(await exchange.accept())


def before(act: Callable[[Exchange], object]) -> Fault:
    """Call `act` and do not accept the request."""

    async def fault(exchange: Exchange) -> None:
        act(exchange)

    return fault


def after(act: Callable[[Exchange], object]) -> Fault:
    """Accept the request, so that it is billed. Then call `act` and do not answer."""

    async def fault(exchange: Exchange) -> None:
        await exchange.accept()
        act(exchange)

    return fault


def answers(status: int, body: bytes = b"", **headers: Any) -> Callable[[Exchange], None]:
    return lambda exchange: exchange.answer(status, body, **headers)


def error(status: int, code: str) -> Callable[[Exchange], None]:
    body = {"error": {"code": code, "message": f"{code} it is", "type": "invalid_request_error"}}
    return answers(status, json.dumps(body).encode())


def sends(data: bytes) -> Callable[[Exchange], None]:
    return lambda exchange: exchange.send(data)


def echoes(exchange: Exchange) -> None:
    """Send the request back."""
    exchange.send(exchange.raw)


def resets(exchange: Exchange) -> None:
    exchange.reset()


def closes(_: Exchange) -> None:
    """End the connection without an answer."""


async def hang(_: Exchange) -> None:
    await silence()


async def accept_and_hang(exchange: Exchange) -> None:
    await exchange.accept()
    await hang(exchange)


async def accept_and_drip(exchange: Exchange) -> None:
    reply = await exchange.accept()
    exchange.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(reply.content))
    for byte in reply.content[:3]:
        exchange.send(bytes((byte,)))
        await exchange.writer.drain()
    await silence()


async def accept_and_truncate(exchange: Exchange) -> None:
    reply = await exchange.accept()
    exchange.answer(200, reply.content[: len(reply.content) // 2], length=len(reply.content))


async def accept_and_truncate_before_the_id(exchange: Exchange) -> None:
    reply = await exchange.accept()
    exchange.answer(200, reply.content[:12], length=len(reply.content))


async def accept_and_break_chunks(exchange: Exchange) -> None:
    reply = await exchange.accept()
    half = reply.content[: len(reply.content) // 2]
    exchange.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\nzz\r\n" % (len(half), half))


async def accept_and_compress(exchange: Exchange) -> None:
    await exchange.accept()
    exchange.answer(200, b"\x1f\x8b\x08\x00 this is no gzip", content_encoding="gzip")


async def inform_then_behave(exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>; rel=preload\r\n\r\n")
    await behave(exchange)


async def answer_with_byte_order_mark(exchange: Exchange) -> None:
    reply = await exchange.accept()
    exchange.answer(200, b"\xef\xbb\xbf" + reply.content)


async def answer_in_envelope(exchange: Exchange) -> None:
    reply = await exchange.accept()
    exchange.answer(200, json.dumps({"code": 200, "data": reply.json()}).encode())


def answer_without_task(kind: str) -> Fault:
    """Accept the request and answer 200 with a body that names no task."""
    bodies: dict[str, bytes] = {
        "a list": b"[1, 2]", "null": b"null", "a number": b"NaN", "no id": b'{"status": "pending"}', "empty": b"",
        "an odd id": b'{"id": "../../v1/credits"}', "a number as id": b'{"id": 7}', "html": b"<html>Welcome</html>",
        "deep": b"[" * 100_000, "not text": b"\xff\xfe\x00{", "huge": b'{"id": "' + b"x" * (1 << 20) + b'"}',
        "a huge integer": b'{"id": ' + b"9" * 5000 + b"}",
    }  # fmt: skip
    return after(answers(200, bodies[kind]))


@dataclass
class Gateway:
    """`purchases` are the faults of the paid POSTs in order. With `always` the last one repeats.

    `reads` returns the fault of any other request, or None for a correct answer.
    """

    simulator: Simulator
    purchases: list[Fault] = field(default_factory=list)
    always: bool = False
    reads: Callable[[Exchange], Fault | None] = lambda exchange: None
    port: int = 0
    posts: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Gateway]:
        transport = httpx.ASGITransport(self.simulator.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://behind") as self._api:
            self._connections: set[asyncio.Task[Any]] = set()
            server = await asyncio.start_server(self._handle_connection, "127.0.0.1", self.port, limit=1 << 20)
            self.port = server.sockets[0].getsockname()[1]
            try:
                yield self
            finally:
                server.close()
                for connection in self._connections:
                    connection.cancel()
                await asyncio.gather(*self._connections, return_exceptions=True)

    async def wait_until_idle(self) -> None:
        """Wait until every request is answered that was sent before, even if its client ended."""
        async with httpx.AsyncClient() as client:
            await client.get(self.url)  # the gateway accepts connections in order
        if self._connections:
            await asyncio.wait(set(self._connections))

    def _fault(self, exchange: Exchange) -> Fault:
        self.requests.append((exchange.method, exchange.path))
        if (exchange.method, exchange.path) != PURCHASE:
            return self.reads(exchange) or behave
        self.posts += 1
        if not self.purchases:
            return behave
        return self.purchases[0] if self.always and len(self.purchases) == 1 else self.purchases.pop(0)

    async def _handle_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError, httpx.HTTPError):
                exchange = await self._read(reader, writer)
                await self._fault(exchange)(exchange)
                await writer.drain()
        except asyncio.CancelledError:
            pass  # asyncio would log the cancellation of a stream's callback
        finally:
            self._connections.discard(connection)
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Exchange:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        return Exchange(method, path, headers, body, writer, self._api, head + body)


def broken_list(exchange: Exchange) -> Fault | None:
    """Answer the task list with an error."""
    return before(answers(500, b"{}")) if exchange.path.startswith("/v1/tasks?") else None


def first_polls_fail(faults: Iterable[Fault]) -> Callable[[Exchange], Fault | None]:
    """Let the first polls, single or batch, fail in these ways. Later polls succeed."""
    remaining = list(faults)

    def decide(exchange: Exchange) -> Fault | None:
        return remaining.pop(0) if remaining and exchange.path.startswith("/v1/tasks/") else None

    return decide
