"""The server records a task ID that EvoLink sent, even if the rest of the answer is damaged."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import anyio
import faulty_gateway as gw
import httpx2 as httpx
import pytest
from faulty_gateway import Exchange, Fault, Gateway, QuickSimulator
from pydantic import SecretStr
from shared import CERTIFICATES_READ_ONCE, shared_decoder

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.deadline import awake_deadline
from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.app.settings import Settings
from evolink_mcp.app.wiring import open_studio
from evolink_mcp.journal.entry import Entry
from evolink_mcp.studio.jobs import ImageRequest

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

KEY = "sk-canary-0123456789abcdef"
REQUEST = {"prompt": "sim:fast a fox", "size": "1024x640", "quality": "low"}
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


async def no_sleep(_: float) -> None:
    await anyio.sleep(0)


async def buy(folder: Path, fault: Fault) -> tuple[Entry, QuickSimulator, Gateway]:
    """Buy one image at a gateway with this fault. EvoLink's list of tasks is empty, so it cannot help."""
    simulator = QuickSimulator(duration_s=0)
    empty = gw.before(gw.answers(200, b'{"data": []}'))
    gateway = Gateway(
        simulator, [fault], reads=lambda exchange: empty if exchange.path.startswith("/v1/tasks?") else None
    )
    async with gateway.open():
        settings = Settings.from_environment(
            {
                "EVOLINK_API_KEY": KEY,
                "EVOLINK_BASE_URL": gateway.url,
                "EVOLINK_MCP_DATA_DIR": str(folder / "data"),
                "EVOLINK_MCP_OUTPUT_DIR": str(folder / "pictures"),
            }
        )
        options: Any = {"decoder": shared_decoder(), "http_options": CERTIFICATES_READ_ONCE}
        async with open_studio(settings, sleep=no_sleep, deadline=gw.deadline_at_silence, **options) as studio:
            job = await studio.order(ImageRequest(GenerationRequest.model_validate(REQUEST), 9.0))
            async for _ in job.states():
                pass
            (entry,) = await studio.journal.recent(9)
    return entry, simulator, gateway


def answers(write: Any) -> Fault:
    """Bill the task, then call `write(exchange, body)` with EvoLink's JSON."""

    async def fault(exchange: Exchange) -> None:
        write(exchange, (await exchange.accept()).content)

    return fault


async def answer_and_fall_silent(exchange: Exchange) -> None:
    body = (await exchange.accept()).content
    exchange.send(OK + b"content-length: 9999\r\n\r\n" + body)
    await exchange.writer.drain()
    await gw.silence()


async def answer_in_pieces_and_fall_silent(exchange: Exchange) -> None:
    body = (await exchange.accept()).content
    exchange.send(OK + b"transfer-encoding: chunked\r\n\r\n")
    for start in range(0, len(body), 7):
        piece = body[start : start + 7]
        exchange.send(b"%x\r\n%s\r\n" % (len(piece), piece))
        await exchange.writer.drain()
    await gw.silence()


async def answer_and_reset(exchange: Exchange) -> None:
    body = (await exchange.accept()).content
    exchange.send(OK + b"content-length: 9999\r\n\r\n" + body)
    await exchange.writer.drain()
    await anyio.sleep(0.05)  # a reset discards data that the client has not read
    exchange.reset()


def chunk_body(body: bytes) -> bytes:
    return OK + b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(body), body)


def truncated_gzip(body: bytes) -> bytes:
    """Return gzip data whose end is missing, so that its checksum cannot be compared."""
    return gzip.compress(body)[:-8]


def raw_deflate(body: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(body) + compressor.flush()


def wrap_in_error(body: bytes) -> bytes:
    """Return an error whose message quotes EvoLink's answer."""
    return json.dumps({"error": {"code": "upstream_error", "message": f"got {body.decode()}"}}).encode()


FAULTS: dict[str, Fault] = {
    "a content-length that is too large": answers(
        lambda exchange, body: exchange.answer(200, body, length=len(body) + 99)
    ),
    "a content-length that is too small": answers(
        lambda exchange, body: exchange.answer(200, body, length=len(body) - 9)
    ),
    "chunks without an end": answers(lambda exchange, body: exchange.send(chunk_body(body))),
    "chunks that end in garbage": answers(lambda exchange, body: exchange.send(chunk_body(body) + b"zz\r\n")),
    "a reset after the body": answer_and_reset,
    "silence after the body": answer_and_fall_silent,
    "small chunks and silence": answer_in_pieces_and_fall_silent,
    "half of the JSON": answers(lambda exchange, body: exchange.answer(200, body[: len(body) // 2], length=len(body))),
    "garbage behind the JSON": answers(lambda exchange, body: exchange.answer(200, body + b"<html>oops")),
    "a wrong byte in the JSON": answers(lambda exchange, body: exchange.answer(200, body[:-1] + b', "x": "\xff"}')),
    "very deep JSON": answers(lambda exchange, body: exchange.answer(200, body[:-1] + b', "x": ' + b"[" * 100_000)),
    "a very long answer": answers(lambda exchange, body: exchange.answer(200, body[:-1] + b" " * (2 << 20) + b"}")),
    "gzip": answers(lambda exchange, body: exchange.answer(200, gzip.compress(body), content_encoding="gzip")),
    "gzip without its end": answers(
        lambda exchange, body: exchange.answer(200, truncated_gzip(body), content_encoding="gzip")
    ),
    "gzip without a header that says so": answers(lambda exchange, body: exchange.answer(200, gzip.compress(body))),
    "zlib": answers(lambda exchange, body: exchange.answer(200, zlib.compress(body), content_encoding="deflate")),
    "raw deflate": answers(lambda exchange, body: exchange.answer(200, raw_deflate(body), content_encoding="deflate")),
    "plain text that claims to be gzip": answers(
        lambda exchange, body: exchange.answer(200, body, content_encoding="gzip")
    ),
    "plain text that claims to be br": answers(
        lambda exchange, body: exchange.answer(200, body, content_encoding="br")
    ),
    **{
        f"HTTP {status}": answers(lambda exchange, body, status=status: exchange.answer(status, body))
        for status in (202, 302, 400, 402, 404, 408, 409, 429, 500, 502, 503, 504, 520)
    },
    "gzip with HTTP 500": answers(
        lambda exchange, body: exchange.answer(500, gzip.compress(body), content_encoding="gzip")
    ),
    "task_id instead of id": answers(
        lambda exchange, body: exchange.answer(
            200, json.dumps({"data": [{"task_id": json.loads(body)["id"]}]}).encode()
        )
    ),
    "another id beside task_id": answers(
        lambda exchange, body: exchange.answer(
            200, json.dumps({"id": "req-7", "task_id": json.loads(body)["id"]}).encode()
        )
    ),
    "an error that quotes the JSON": answers(lambda exchange, body: exchange.answer(502, wrap_in_error(body))),
}


@pytest.mark.parametrize("fault", [pytest.param(fault, id=name) for name, fault in FAULTS.items()])
async def test_an_id_that_arrived_is_the_task_of_the_purchase(fault: Fault, tmp_path: Path) -> None:
    entry, simulator, gateway = await buy(tmp_path, fault)
    assert [entry.task_id] == list(simulator.tasks)
    assert (entry.phase, entry.status, entry.charged, entry.is_unconfirmed) == ("submitted", "completed", "yes", False)
    assert [Path(str(image.path)).is_file() for image in entry.images] == [True]
    assert gateway.posts == 1


async def test_complete_json_with_an_id_ends_the_read_although_the_connection_stays_open(tmp_path: Path) -> None:
    async def answer_and_stay_open(exchange: Exchange) -> None:
        body = (await exchange.accept()).content
        exchange.send(OK + b"content-length: 9999\r\n\r\n" + body)
        await anyio.sleep_forever()

    with anyio.fail_after(60):
        entry, simulator, _ = await buy(tmp_path, answer_and_stay_open)
    assert [entry.task_id] == list(simulator.tasks)


async def test_only_the_deadline_limits_the_wait_for_the_answer_to_a_purchase() -> None:
    """A read timeout of the HTTP client would count the time of a suspension."""
    timeouts: list[dict[str, float | None]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        timeouts.append(request.extensions["timeout"])
        return httpx.Response(200, stream=httpx.ByteStream(b'{"id": "task-unified-1790000000-abcd1234"}'))

    async def on_sending() -> None:
        pass

    async with EvolinkClient(SecretStr(KEY), transport=httpx.MockTransport(answer)) as client:
        await client.submit({"prompt": "a fox"}, idempotency_key="evomcp-1234567890", on_sending=on_sending)
    assert [(each["connect"], each["read"], each["write"]) for each in timeouts] == [(10.0, None, None)]


NO_ID: dict[str, Fault] = {
    "an id that is cut": answers(lambda ask, body: ask.answer(200, body[: body.index(b"task-unified") + 20], length=999)),
    "a refusal with the id of a request": answers(lambda exchange, _: exchange.answer(502, b'{"id": "req-7", "error": {}}')),
    "a bomb": answers(
        lambda exchange, _: exchange.answer(200, gzip.compress(b" " * (64 << 20)), content_encoding="gzip")
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", [pytest.param(fault, id=name) for name, fault in NO_ID.items()])
async def test_an_answer_without_a_complete_task_id_leaves_the_outcome_unknown(fault: Fault, tmp_path: Path) -> None:
    entry, _, gateway = await buy(tmp_path, fault)
    assert (entry.phase, entry.task_id, entry.charged) == ("unknown", None, "unknown")
    assert gateway.posts == 1


# --- suspension -----------------------------------------------------------------------------------------------


class Suspension:
    """The clock and the timers of a process that is suspended. `resume` calls the timers that are due."""

    def __init__(self) -> None:
        self.now = 1_790_000_000.0
        self._timers: list[tuple[float, Callable[[], None]]] = []

    def clock(self) -> float:
        return self.now

    def call_later(self, delay_s: float, action: Callable[[], None]) -> Suspension:
        self._timers = [(self.now + delay_s, action)]
        return self

    def cancel(self) -> None:
        self._timers = []

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass. Call the timer once if it is due, as an event loop does."""
        self.now += seconds
        due = [action for due_at, action in self._timers if due_at <= self.now]
        self._timers = [(due_at, action) for due_at, action in self._timers if due_at > self.now]
        for action in due:
            action()

    def deadline(self, seconds: float) -> AbstractContextManager[anyio.CancelScope]:
        return awake_deadline(seconds, clock=self.clock, call_later=self.call_later)


@pytest.fixture
def slow_host() -> Iterator[tuple[str, threading.Event, threading.Event]]:
    """Yield the URL of a host in a thread, the event of its request, and the event of its answer."""
    is_requested = threading.Event()
    is_answered = threading.Event()
    body = b'{"id": "task-unified-1790000000-abcd1234", "status": "pending"}'

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            data = b""
            while b"fox" not in data:
                data += connection.recv(65_536)
            is_requested.set()
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
            is_answered.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", is_requested, is_answered
        thread.join()


@pytest.mark.parametrize("running_s", [0.0, 74.0], ids=["early", "in the last second"])
async def test_an_answer_that_arrived_during_a_suspension_is_read_before_the_deadline_counts(
    running_s: float, slow_host: tuple[str, threading.Event, threading.Event]
) -> None:
    url, is_requested, is_answered = slow_host
    suspension = Suspension()

    async def suspend() -> None:
        while not is_requested.is_set():
            await anyio.sleep(0)
        # Nothing is awaited from here on, like in a stopped process: the answer arrives, then the timer is due.
        is_answered.wait()
        suspension.advance(82.0)

    async def on_sending() -> None:
        for _ in range(int(running_s)):
            suspension.advance(1.0)

    client = EvolinkClient(SecretStr(KEY), base_url=url, deadline=suspension.deadline)
    async with client, anyio.create_task_group() as group:
        group.start_soon(suspend)
        task = await client.submit({"prompt": "a fox"}, idempotency_key="evomcp-1234567890", on_sending=on_sending)
    assert task.id == "task-unified-1790000000-abcd1234"


async def test_a_deadline_counts_running_time_only() -> None:
    suspension = Suspension()
    with suspension.deadline(75.0) as scope:
        for _ in range(74):
            suspension.advance(1.0)
        suspension.advance(3600.0)
        assert not scope.cancel_called
        for _ in range(19):
            suspension.advance(1.0)
        assert not scope.cancel_called
        suspension.advance(1.0)
        assert scope.cancel_called
