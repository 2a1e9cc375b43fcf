"""A gateway over real sockets that hands every request to a simulator, and misbehaves where a script says so."""

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

PAY = ("POST", "/v1/images/generations")
REASONS = {200: "OK", 429: "Too Many Requests"}
NEVER_S = 60.0
# Turns of the event loop in which the client, in the same loop, reads everything that was sent.
TURNS_TO_READ = 50
WAITING: list[anyio.CancelScope] = []


@contextmanager
def deadline_at_silence(_: float) -> Iterator[anyio.CancelScope]:
    """A deadline of the HTTP client that passes when a gateway falls silent, not by a clock: a machine may be slow."""
    with anyio.CancelScope() as scope:
        WAITING.append(scope)
        try:
            yield scope
        finally:
            WAITING.remove(scope)


async def silence() -> None:
    """Send nothing more: the deadline of every request in progress passes, after its client has read all data."""
    for _ in range(TURNS_TO_READ):
        await asyncio.sleep(0)
    for scope in WAITING:
        scope.cancel()
    await asyncio.sleep(NEVER_S)


class QuickSimulator(Simulator):
    """Its pictures are flat black, drawn in no time, and it says that they take none."""

    def view(self, *args: Any, **more: Any) -> dict[str, Any]:
        seen = super().view(*args, **more)
        if "estimated_time" in seen.get("task_info", {}):
            seen["task_info"]["estimated_time"] = 0
        return seen

    def _draw(self, task: SimulatedTask, index: int) -> bytes:
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


class Door:
    """Whichever studio is open: building a server and its schemas takes longer than a purchase."""

    studio: Studio

    def subscribe(self, _: object) -> None:
        """The server is built before any studio is open; nobody listens in these tests."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.studio, name)


DOOR: Any = Door()
ONE_SERVER = build_server(DOOR, preview_edge=0)


@dataclass
class Ask:
    """One request on one connection. Nothing reaches the simulator, so nothing is billed, before `accepted`."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    writer: asyncio.StreamWriter
    api: httpx.AsyncClient
    raw: bytes = b""

    async def accepted(self) -> httpx.Response:
        """The simulator's own answer to the request."""
        return await self.api.request(self.method, self.path, headers=self.headers, content=self.body)

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    def answer(self, status: int, body: bytes = b"", *, length: int | None = None, **headers: str) -> None:
        """A whole HTTP answer; `length` lies about the body."""
        said = {"content-type": "application/json", "content-length": str(len(body) if length is None else length)}
        said |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = f"HTTP/1.1 {status} {REASONS.get(status, 'Said')}\r\n" + "".join(
            f"{k}: {v}\r\n" for k, v in said.items()
        )
        self.say(head.encode("latin-1") + b"connection: close\r\n\r\n" + body)

    def relay(self, reply: httpx.Response) -> None:
        self.answer(reply.status_code, reply.content, content_type=reply.headers.get("content-type", ""),
                    **({"retry_after": value} if (value := reply.headers.get("retry-after")) else {}))  # fmt: skip

    def reset(self) -> None:
        """End the connection with RST instead of FIN."""
        sock: Any = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Fault = Callable[[Ask], Awaitable[None]]


async def behave(ask: Ask) -> None:
    """No fault at all."""
    ask.relay(await ask.accepted())


def before(act: Callable[[Ask], object]) -> Fault:
    """Misbehave without taking the request."""

    async def fault(ask: Ask) -> None:
        act(ask)

    return fault


def after(act: Callable[[Ask], object]) -> Fault:
    """Take the request, so that it is billed, then misbehave instead of answering."""

    async def fault(ask: Ask) -> None:
        await ask.accepted()
        act(ask)

    return fault


def says(status: int, body: bytes = b"", **headers: Any) -> Callable[[Ask], None]:
    return lambda ask: ask.answer(status, body, **headers)


def error(status: int, code: str) -> Callable[[Ask], None]:
    told = {"error": {"code": code, "message": f"{code} it is", "type": "invalid_request_error"}}
    return says(status, json.dumps(told).encode())


def closes(_: Ask) -> None:
    """The connection ends without a word."""


async def hang(_: Ask) -> None:
    await silence()


async def accept_and_hang(ask: Ask) -> None:
    await ask.accepted()
    await hang(ask)


async def accept_and_drip(ask: Ask) -> None:
    reply = await ask.accepted()
    ask.say(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(reply.content))
    for byte in reply.content[:3]:
        ask.say(bytes((byte,)))
        await ask.writer.drain()
    await silence()


async def accept_and_truncate(ask: Ask) -> None:
    reply = await ask.accepted()
    ask.answer(200, reply.content[: len(reply.content) // 2], length=len(reply.content))


async def accept_and_truncate_before_the_id(ask: Ask) -> None:
    reply = await ask.accepted()
    ask.answer(200, reply.content[:12], length=len(reply.content))


async def accept_and_break_chunks(ask: Ask) -> None:
    reply = await ask.accepted()
    half = reply.content[: len(reply.content) // 2]
    ask.say(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\nzz\r\n" % (len(half), half))


async def accept_and_compress(ask: Ask) -> None:
    await ask.accepted()
    ask.answer(200, b"\x1f\x8b\x08\x00 this is no gzip", content_encoding="gzip")


async def inform_then_behave(ask: Ask) -> None:
    ask.say(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>; rel=preload\r\n\r\n")
    await behave(ask)


async def mark_then_behave(ask: Ask) -> None:
    reply = await ask.accepted()
    ask.answer(200, b"\xef\xbb\xbf" + reply.content)


async def envelop(ask: Ask) -> None:
    reply = await ask.accepted()
    ask.answer(200, json.dumps({"code": 200, "data": reply.json()}).encode())


def strangely(kind: str) -> Fault:
    """Take the request and answer 200 with something that names no task."""
    bodies: dict[str, bytes] = {
        "a list": b"[1, 2]", "null": b"null", "a number": b"NaN", "no id": b'{"status": "pending"}', "empty": b"",
        "an odd id": b'{"id": "../../v1/credits"}', "a number as id": b'{"id": 7}', "html": b"<html>Welcome</html>",
        "deep": b"[" * 100_000, "not text": b"\xff\xfe\x00{", "huge": b'{"id": "' + b"x" * (1 << 20) + b'"}',
        "a huge integer": b'{"id": ' + b"9" * 5000 + b"}",
    }  # fmt: skip
    return after(says(200, bodies[kind]))


@dataclass
class Gateway:
    """`purchases` are the faults of the POSTs that buy, in order; the last one stays when `always`.

    `reads` decides about everything else: it returns a fault, or None for good behaviour.
    """

    simulator: Simulator
    purchases: list[Fault] = field(default_factory=list)
    always: bool = False
    reads: Callable[[Ask], Fault | None] = lambda ask: None
    port: int = 0
    posts: int = 0
    seen: list[tuple[str, str]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Gateway]:
        transport = httpx.ASGITransport(self.simulator.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://behind") as self._api:
            self._talks: set[asyncio.Task[Any]] = set()
            server = await asyncio.start_server(self._talk, "127.0.0.1", self.port, limit=1 << 20)
            self.port = server.sockets[0].getsockname()[1]
            try:
                yield self
            finally:
                server.close()
                for talk in self._talks:
                    talk.cancel()
                await asyncio.gather(*self._talks, return_exceptions=True)

    async def dealt_with(self) -> None:
        """Wait until everything is answered that was sent up to now, also by a client that has gone since."""
        async with httpx.AsyncClient() as asking:
            await asking.get(self.url)  # connections are taken in the order in which they came
        if self._talks:
            await asyncio.wait(set(self._talks))

    def _fault(self, ask: Ask) -> Fault:
        self.seen.append((ask.method, ask.path))
        if (ask.method, ask.path) != PAY:
            return self.reads(ask) or behave
        self.posts += 1
        if not self.purchases:
            return behave
        return self.purchases[0] if self.always and len(self.purchases) == 1 else self.purchases.pop(0)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talk = asyncio.current_task()
        assert talk is not None
        self._talks.add(talk)
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError, httpx.HTTPError):
                ask = await self._read(reader, writer)
                await self._fault(ask)(ask)
                await writer.drain()
        except asyncio.CancelledError:
            pass  # asyncio would print a task that a stream's callback owns
        finally:
            self._talks.discard(talk)
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Ask:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        return Ask(method, path, headers, body, writer, self._api, head + body)


def broken_list(ask: Ask) -> Fault | None:
    """The account's own list cannot be had."""
    return before(says(500, b"{}")) if ask.path.startswith("/v1/tasks?") else None


def looks_go_wrong(faults: Iterable[Fault]) -> Callable[[Ask], Fault | None]:
    """The first looks at a task (single or batch) meet these faults, later ones none."""
    left = list(faults)

    def decide(ask: Ask) -> Fault | None:
        return left.pop(0) if left and ask.path.startswith("/v1/tasks/") else None

    return decide
