"""Limits for clients that do not read, that only send, or that are many. Other clients still get their answers."""

from __future__ import annotations

import json
import select
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio.abc import SocketStream

from evolink_mcp.errors import FolderRefused
from evolink_mcp.images.folders import PATH_MAX_CHARS, Folders
from evolink_mcp.transports.authentication import CALLER_KEY
from evolink_mcp.transports.connections import ConnectionLimits, UnreadAnswers
from evolink_mcp.transports.http import REQUEST_MAX_BYTES, serve_app
from evolink_mcp.transports.http_calls import Calls
from evolink_mcp.transports.http_guard import HttpGuard
from evolink_mcp.transports.messages import DEPTH_MAX, MEMBERS_MAX, NAME_MAX_CHARS, InvalidMessage, read_message
from evolink_mcp.transports.sse_streams import SseStreams, StreamLimits
from evolink_mcp.transports.turns import CALLS_AT_ONCE, LINES_MAX, Turns, TurnsClosed

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

LIMITS = ConnectionLimits.for_descriptors(1_024)
CHUNK = b"x" * 1024  # asyncio reports an unread answer above 64 KiB


class EndlessAnswers:
    """An app whose answer never ends. `ended_paths` has the paths of clients whose connections ended."""

    def __init__(self) -> None:
        self.ended_paths: list[str] = []
        self.has_changed = anyio.Event()
        self.chunks = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async with anyio.create_task_group() as group:

            async def write() -> None:
                while True:
                    await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
                    self.chunks += 1
                    await anyio.sleep(0)

            group.start_soon(write)
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()
        self.ended_paths.append(scope["path"])
        self.has_changed.set()
        self.has_changed = anyio.Event()


@asynccontextmanager
async def serve(app: Any, limits: ConnectionLimits) -> AsyncIterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ready = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: serve_app(app, "127.0.0.1", port, ready=lambda _: ready.set(), limits=limits))
        await ready.wait()
        yield port
        signal.raise_signal(signal.SIGTERM)


async def connect(port: int, path: str) -> SocketStream:
    stream = await anyio.connect_tcp("127.0.0.1", port)
    await stream.send(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
    return stream


async def test_an_answer_that_is_not_read_ends_after_its_time() -> None:
    app = EndlessAnswers()
    async with (
        serve(app, replace(LIMITS, unread_timeout_s=0.05)) as port,
        await connect(port, "/unread"),
    ):
        while not app.ended_paths:
            await app.has_changed.wait()
    assert app.ended_paths == ["/unread"]


async def test_the_unread_answers_of_all_connections_have_a_limit_and_the_oldest_one_ends() -> None:
    app = EndlessAnswers()
    limits = replace(LIMITS, unread_max_bytes=100 << 10, unread_timeout_s=1_000)
    async with serve(app, limits) as port, await connect(port, "/first"):
        # The answer to the second client must not wait first. An answer that waits sends no chunk.
        chunks = -1
        while chunks != app.chunks or not chunks:
            chunks = app.chunks
            for _ in range(50):
                await anyio.sleep(0)
        async with await connect(port, "/second"):
            while not app.ended_paths:
                await app.has_changed.wait()
            assert app.ended_paths == ["/first"]
        while len(app.ended_paths) < 2:
            await app.has_changed.wait()


class FakeTransport:
    """A transport with a buffer. Each read of its size returns the next of `sizes`."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = list(sizes)
        self.is_aborted = anyio.Event()

    def get_write_buffer_size(self) -> int:
        return self.sizes.pop(0) if len(self.sizes) > 1 else self.sizes[0]

    def abort(self) -> None:
        self.is_aborted.set()


async def test_a_slow_client_that_reads_keeps_its_answer() -> None:
    """The buffer shrinks between the first checks and does not shrink at the last one."""
    slow: Any = FakeTransport(400, 400, 300, 300, 200, 200, 200)
    unread = UnreadAnswers(replace(LIMITS, unread_timeout_s=0))
    unread.add(slow)
    await slow.is_aborted.wait()
    assert slow.sizes == [200]


class BlockedStreams:
    """An SSE app whose clients do not read. Its first event passes; each later one waits for `release`."""

    def __init__(self) -> None:
        self.posts: list[str] = []
        self.ended_sessions: list[str] = []
        self.is_open: dict[str, anyio.Event] = {"1": anyio.Event(), "2": anyio.Event()}

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        session_id = scope["query_string"].decode().removeprefix("session_id=")
        if scope["method"] == "POST":
            self.posts.append(session_id)
            await send({"type": "http.response.start", "status": 202, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        try:
            await send({"type": "http.response.body", "body": f"data: /messages/?session_id={session_id}".encode()})
            self.is_open[session_id].set()
            await send({"type": "http.response.body", "body": b"an answer that is never read"})
        finally:
            self.ended_sessions.append(session_id)


async def test_a_stream_that_is_not_read_accepts_few_messages_and_the_process_ends_the_slowest_stream() -> None:
    app = BlockedStreams()
    streams = SseStreams(app, "/messages/", StreamLimits(stream_max=2, process_max=3))
    is_blocked = {"1": anyio.Event(), "2": anyio.Event()}

    async def open_stream(session_id: str) -> None:
        async def send(message: dict[str, Any]) -> None:
            if b"never read" in message.get("body", b""):
                is_blocked[session_id].set()
                await anyio.sleep_forever()

        scope = {"type": "http", "method": "GET", "path": "/sse", "query_string": f"session_id={session_id}".encode()}
        await streams(scope, no_message, send)

    async def post(session_id: str) -> int:
        statuses: list[int] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b'{"jsonrpc":"2.0","id":1,"method":"ping"}'}

        async def send(message: dict[str, Any]) -> None:
            statuses.append(message.get("status", 0))

        query = f"session_id={session_id}".encode()
        await streams(
            {"type": "http", "method": "POST", "path": "/messages/", "query_string": query, "headers": []},
            receive,
            send,
        )
        return statuses[0]

    async with anyio.create_task_group() as group:
        for session_id in ("1", "2"):
            group.start_soon(open_stream, session_id)
            await is_blocked[session_id].wait()
        assert [await post("1") for _ in range(4)] == [202, 202, 503, 503]
        assert (await post("2"), app.ended_sessions) == (202, [])
        assert await post("2") == 202
        while not app.ended_sessions:
            await anyio.sleep(0)
        assert app.ended_sessions == ["1"]
        group.cancel_scope.cancel()
    assert app.posts == ["1", "1", "2", "2"]


async def no_message() -> dict[str, Any]:
    await anyio.sleep_forever()
    raise AssertionError("unreachable")


async def test_callers_that_the_server_has_not_accepted_yet_wait_in_the_queue_of_the_system() -> None:
    """The server's loop does not run while they connect. Above the queue's length, the system would drop them."""
    app = HttpGuard(EndlessAnswers(), (), 1_000)
    async with serve(app, replace(LIMITS, accepted_at_once=8)) as port:
        with ExitStack() as stack:
            callers = [stack.enter_context(socket.socket()) for _ in range(200)]
            for caller in callers:
                caller.setblocking(False)
                caller.connect_ex(("127.0.0.1", port))
            waiting = set(callers)
            while waiting:
                ready = select.select([], list(waiting), [], 0.2)[1]
                if not ready:
                    break
                waiting -= set(ready)
            assert len(waiting) == 0


class QueuedCalls:
    """Calls that wait for a turn. `started_lines` has the lines of the calls that began. `end` ends the oldest one."""

    def __init__(self, group: Any, turns: Turns) -> None:
        self.started_lines: list[str] = []
        self._group = group
        self._turns = turns
        self._ends: list[anyio.Event] = []

    async def call(self, *lines: str) -> None:
        for line in lines:
            self._group.start_soon(self._run, line)
            await anyio.wait_all_tasks_blocked()

    async def end(self) -> None:
        self._ends.pop(0).set()
        await anyio.wait_all_tasks_blocked()

    async def _run(self, line: str) -> None:
        async with self._turns.turn(line):
            self.started_lines.append(line)
            end = anyio.Event()
            self._ends.append(end)
            await end.wait()


async def test_the_tenant_whose_last_turn_is_the_longest_ago_is_next() -> None:
    async with anyio.create_task_group() as group:
        calls = QueuedCalls(group, Turns(1, longest_s=1_000))
        await calls.call("other")
        await calls.end()
        await calls.call("hostile", "hostile", "hostile", "hostile", "other", "new")
        for _ in range(6):
            await calls.end()
    assert calls.started_lines == ["other", "hostile", "other", "hostile", "new", "hostile", "hostile"]


async def test_a_cancelled_call_leaves_its_line_and_takes_no_turn() -> None:
    turns = Turns(1, longest_s=1_000)
    async with anyio.create_task_group() as group:
        calls = QueuedCalls(group, turns)
        await calls.call("first")
        with anyio.move_on_after(0):
            async with turns.turn("cancelled"):
                raise AssertionError("the turn is not free")
        await calls.call("second")
        await calls.end()
        assert calls.started_lines == ["first", "second"]
        await calls.end()
        await calls.call("third")
        await calls.end()
    assert calls.started_lines == ["first", "second", "third"]


async def test_a_call_that_is_cancelled_when_its_turn_comes_passes_the_turn_on() -> None:
    async with anyio.create_task_group() as group:
        turns = Turns(1, longest_s=1_000)
        calls = QueuedCalls(group, turns)
        scope = anyio.CancelScope()

        async def take_turn() -> None:
            with scope:
                async with turns.turn("cancelled"):
                    await anyio.sleep_forever()

        async with turns.turn("first"):
            group.start_soon(take_turn)
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
        await calls.call("second")
        await calls.end()
    assert calls.started_lines == ["second"]


async def test_a_server_that_ends_refuses_the_calls_without_a_turn_and_those_with_one_continue() -> None:
    turns = Turns(1, longest_s=1_000)
    refused_calls: list[str] = []

    async def call(name: str) -> None:
        try:
            async with turns.turn(name):
                raise AssertionError("the turn is not free")
        except TurnsClosed:
            refused_calls.append(name)

    async with anyio.create_task_group() as group, turns.turn("first"):
        group.start_soon(call, "second")
        group.start_soon(call, "third")
        await anyio.wait_all_tasks_blocked()
        turns.close()
        await call("fourth")
        await anyio.wait_all_tasks_blocked()
        assert sorted(refused_calls) == ["fourth", "second", "third"]


async def test_an_answer_that_begins_gives_the_turn_back() -> None:
    turns = Turns(1, longest_s=1_000)
    async with turns.turn("unread") as give_back:
        give_back()
        give_back()
        async with turns.turn("other"):
            with anyio.move_on_after(0):
                async with turns.turn("third"):
                    raise AssertionError("the turn is not free")


async def test_a_client_that_does_not_read_its_answer_keeps_no_turn() -> None:
    journal: Any = SimpleNamespace(listen=lambda receive: None)
    calls = Calls(EndlessAnswers(), journal, Turns(1, longest_s=1_000))
    reads_answer = anyio.Event()

    async def call(name: str) -> None:
        body = b'{"jsonrpc":"2.0","id":1,"method":"ping"}'
        scope = {"type": "http", "method": "POST", "path": "/mcp", "headers": [], "client": (name, 1), CALLER_KEY: name}
        requests = [{"type": "http.request", "body": body}]

        async def receive() -> dict[str, Any]:
            return requests.pop() if requests else await no_message()

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body":
                if name == "reads":
                    reads_answer.set()
                await anyio.sleep_forever()

        await calls(scope, receive, send)

    async with anyio.create_task_group() as group:
        group.start_soon(call, "reads nothing")
        await anyio.wait_all_tasks_blocked()
        group.start_soon(call, "reads")
        await reads_answer.wait()
        group.cancel_scope.cancel()


async def test_the_number_of_known_lines_is_limited() -> None:
    turns = Turns(1, longest_s=1_000, lines_max=3)
    for number in range(10):
        async with turns.turn(number):
            pass
    assert turns.line_count == 3


async def test_calls_begin_in_the_order_of_their_arrival_and_few_at_once() -> None:
    turns = Turns(2, longest_s=1_000)
    started_numbers: list[int] = []
    release = [anyio.Event() for _ in range(4)]

    async def call(number: int) -> None:
        async with turns.turn():
            started_numbers.append(number)
            await release[number].wait()

    async with anyio.create_task_group() as group:
        for number in range(4):
            group.start_soon(call, number)
        await anyio.wait_all_tasks_blocked()
        assert started_numbers == [0, 1]
        release[1].set()
        await anyio.wait_all_tasks_blocked()
        assert started_numbers == [0, 1, 2]
        for event in release:
            event.set()
    assert started_numbers == [0, 1, 2, 3]


async def test_a_call_that_waits_gives_its_turn_back() -> None:
    turns = Turns(1, longest_s=0)
    async with turns.turn(), turns.turn(), turns.turn():
        pass


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"list": [0] * MEMBERS_MAX}, "members"),
        ({f"member {number}": 0 for number in range(MEMBERS_MAX)}, "members"),
        ({"x" * (NAME_MAX_CHARS + 1): 0}, "name"),
    ],
)
async def test_a_message_with_too_many_members_is_refused(params: dict[str, Any], reason: str) -> None:
    message = {"jsonrpc": "2.0", "id": 7, "method": "ping", "params": params}
    with pytest.raises(InvalidMessage, match=reason) as refusal:
        read_message(json.dumps(message).encode())
    assert json.loads(refusal.value.body)["id"] == 7


async def test_a_message_at_the_limits_is_accepted() -> None:
    params = {"list": [0] * (MEMBERS_MAX - 10), "x" * NAME_MAX_CHARS: 0}
    message: Any = read_message(json.dumps({"jsonrpc": "2.0", "id": 7, "method": "ping", "params": params}).encode())
    assert message.id == 7


async def test_a_message_with_too_many_levels_is_refused() -> None:
    deep = b"[" * DEPTH_MAX + b"]" * DEPTH_MAX
    with pytest.raises(InvalidMessage):
        read_message(b'{"jsonrpc":"2.0","id":7,"method":"ping","params":{"a":' + deep + b"}}")


async def test_a_long_save_as_is_refused_at_once(tmp_path: Path) -> None:
    folders = Folders(tmp_path, (tmp_path,))
    with pytest.raises(FolderRefused, match="500,000 characters"):
        folders.target("a/" * 250_000)


LIMIT_TEXTS = {
    "Unread answers": f"{LIMITS.unread_max_bytes >> 20} MiB, {LIMITS.unread_timeout_s:g} s without a read",
    "Messages of a client that does not read its SSE stream": (
        f"{StreamLimits().stream_max} per stream, {StreamLimits().process_max} per process"
    ),
    "Callers that the server has not accepted yet": f"{LIMITS.waiting_max:,}",
    "Calls that begin at the same time": f"{CALLS_AT_ONCE}",
    "Tenants with a line of calls": f"{LINES_MAX:,}",
    "Members of a message": f"{MEMBERS_MAX:,}, {DEPTH_MAX} levels, names of {NAME_MAX_CHARS:,} characters",
    "Body of a POST to /mcp": f"{REQUEST_MAX_BYTES >> 10} KiB",
    "Length of save_as": f"{PATH_MAX_CHARS:,} characters",
}


async def test_a_body_above_the_limit_is_not_kept() -> None:
    received: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * (REQUEST_MAX_BYTES + 1), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        received.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("the app must not see this body")

    guard = HttpGuard(app, (), REQUEST_MAX_BYTES)
    headers = [(b"host", b"localhost")]
    await guard({"type": "http", "method": "POST", "path": "/mcp", "headers": headers}, receive, send)
    assert received[0]["status"] == 413


TRIALS = {
    "Unread answers": test_the_unread_answers_of_all_connections_have_a_limit_and_the_oldest_one_ends,
    "Messages of a client that does not read its SSE stream": (
        test_a_stream_that_is_not_read_accepts_few_messages_and_the_process_ends_the_slowest_stream
    ),
    "Callers that the server has not accepted yet": (
        test_callers_that_the_server_has_not_accepted_yet_wait_in_the_queue_of_the_system
    ),
    "Calls that begin at the same time": test_calls_begin_in_the_order_of_their_arrival_and_few_at_once,
    "Tenants with a line of calls": test_the_number_of_known_lines_is_limited,
    "Members of a message": test_a_message_with_too_many_members_is_refused,
    "Body of a POST to /mcp": test_a_body_above_the_limit_is_not_kept,
    "Length of save_as": test_a_long_save_as_is_refused_at_once,
}
