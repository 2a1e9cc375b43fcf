"""The stdio transport between two pipes: IDs, cancellations, deliveries, and answers that cannot be written."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import pytest
from mcp.server.mcpserver import Context, MCPServer
from mcp.shared.message import SessionMessage
from mcp_types import JSONRPCResponse
from stdio_ends import Pipes, no_answer

from evolink_mcp.server.server import serve_streams
from evolink_mcp.server.startup_answers import StartupAnswers
from evolink_mcp.tools.delivery import delivery_of
from evolink_mcp.transports.stdio import serve_stdio

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

VERSION = "2025-11-25"
INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}},
}


def request(request_id: Any, method: str = "ping", **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}


def call(request_id: Any, tool: str) -> dict[str, Any]:
    return request(request_id, "tools/call", name=tool, arguments={})


def cancellation(request_id: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": request_id}}


class Client:
    """The client's side of the pipes, in a coroutine."""

    def __init__(self, pipes: Pipes) -> None:
        self._pipes = pipes

    async def send(self, *messages: dict[str, Any]) -> None:
        lines = [json.dumps(message).encode() for message in messages]
        await anyio.to_thread.run_sync(lambda: self._pipes.send(*lines))

    async def receive(self) -> dict[str, Any]:
        return await anyio.to_thread.run_sync(self._pipes.receive, abandon_on_cancel=True)

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        await self.send(message)
        return await self.receive()


class Tools:
    """A server with tools that wait for the test, and the deliveries of their answers."""

    def __init__(self) -> None:
        self.server = MCPServer("test", log_level="WARNING")
        self.has_started = anyio.Event()
        self.may_answer = anyio.Event()
        self.is_settled = anyio.Event()
        self.deliveries: list[bool] = []
        self.server.tool()(self.hold)
        self.server.tool()(self.fail_to_record)

    async def hold(self, ctx: Context) -> str:
        self._record(ctx)
        self.has_started.set()
        await self.may_answer.wait()
        return "done"

    async def fail_to_record(self, ctx: Context) -> str:
        delivery = delivery_of(ctx)
        assert delivery is not None
        delivery.when_settled(self._fail)
        self._record(ctx)
        return "done"

    def _record(self, ctx: Context) -> None:
        delivery = delivery_of(ctx)
        assert delivery is not None
        delivery.when_settled(self._record_settlement)

    async def _record_settlement(self, has_arrived: bool) -> None:
        self.deliveries.append(has_arrived)
        self.is_settled.set()

    async def _fail(self, has_arrived: bool) -> None:
        raise KeyError("no such entry")


@asynccontextmanager
async def open_client(
    serve: Callable[..., Any],
    startup_answers: StartupAnswers | None = None,
    early_messages: list[dict[str, Any]] | None = None,
    **options: Any,
) -> AsyncGenerator[Client]:
    """Serve between two pipes. The client sends `early_messages` before the server exists. Ends by EOF, with exit code 0."""
    startup_answers = startup_answers or StartupAnswers(None)
    pipes = Pipes()
    client = Client(pipes)
    codes: list[int] = []
    try:
        lines = pipes.open(startup_answers.answer if early_messages else no_answer)
        if early_messages:
            await client.send(*early_messages)
            for _ in early_messages:
                await client.receive()
        async with anyio.create_task_group() as group:

            async def run() -> None:
                codes.append(await serve_stdio(lines, startup_answers, serve, **options))

            group.start_soon(run)
            yield client
            pipes.close_stdin()
    finally:
        pipes.close()
    assert codes == [0]


@asynccontextmanager
async def open_tools() -> AsyncGenerator[tuple[Client, Tools]]:
    tools = Tools()
    async with open_client(partial(serve_streams, tools.server)) as client:
        assert "result" in await client.ask(INITIALIZE)
        yield client, tools


@pytest.mark.parametrize("second_id", [5, "5"])
async def test_an_id_in_use_is_refused_without_an_id_and_the_first_request_keeps_it(second_id: Any) -> None:
    """An error with the ID would look like the answer of the first request."""
    async with open_tools() as (client, tools):
        await client.send(call(5, "hold"))
        await tools.has_started.wait()
        refusal = await client.ask(request(second_id))
        assert (refusal["id"], refusal["error"]["code"]) == (None, -32600)
        assert "the request 5 has no answer yet" in refusal["error"]["message"]
        tools.may_answer.set()
        answer = await client.receive()
        assert (answer["id"], answer["result"]["content"][0]["text"]) == (5, "done")
        assert (await client.ask(request(second_id)))["result"] == {}
        await tools.is_settled.wait()
    assert tools.deliveries == [True]


@pytest.mark.parametrize("name", [5, "5"])
async def test_a_cancelled_call_is_not_delivered_and_its_id_is_free(name: Any) -> None:
    async with open_tools() as (client, tools):
        await client.send(call(5, "hold"))
        await tools.has_started.wait()
        await client.send(cancellation(name))
        await tools.is_settled.wait()
        assert (await client.ask(request(5)))["result"] == {}
    assert tools.deliveries == [False]


@pytest.mark.parametrize("name", [[5], {"id": 5}, None, 5.0, True, "", "\ud800", [[]]])
async def test_a_cancellation_without_a_good_id_cancels_nothing(name: Any) -> None:
    async with open_tools() as (client, tools):
        await client.send(call(5, "hold"))
        await tools.has_started.wait()
        await client.send(cancellation(name))
        assert (await client.ask(request(6)))["id"] == 6
        tools.may_answer.set()
        assert (await client.receive())["result"]["content"][0]["text"] == "done"
        await tools.is_settled.wait()
    assert tools.deliveries == [True]


async def test_a_delivery_that_cannot_be_recorded_ends_neither_the_others_nor_the_server() -> None:
    async with open_tools() as (client, tools):
        assert "result" in await client.ask(call(5, "fail_to_record"))
        await tools.is_settled.wait()
        assert (await client.ask(request(6)))["result"] == {}
    assert tools.deliveries == [True]


async def test_an_id_that_was_answered_early_may_be_used_and_cancelled_at_once() -> None:
    tools = Tools()
    answers = {(method, VERSION): b'{"early":true}' for method in ("initialize", "tools/list", "ping")}
    early_messages = [INITIALIZE, request(2, "tools/list"), request(3)]
    async with open_client(partial(serve_streams, tools.server), StartupAnswers(answers), early_messages) as client:
        tools.may_answer.set()
        await client.send(cancellation(1), cancellation(2), cancellation(3), call(1, "hold"))
        assert (await client.receive())["result"]["content"][0]["text"] == "done"
        for number in (1, 2, 3):
            assert await client.ask(request(number)) == {"jsonrpc": "2.0", "id": number, "result": {}}


async def answer_everything(read: Any, write: Any, value: Any = None) -> None:
    """Serve without the SDK. The request 5 gets a result with `value`."""
    async for session_message in read:
        request_id = session_message.message.id
        result = {"a": value} if request_id == 5 else {}
        await write.send(SessionMessage(JSONRPCResponse(jsonrpc="2.0", id=request_id, result=result)))


@pytest.mark.parametrize(
    ("value", "result"),
    [pytest.param("\ud800", {"a": "?"}, id="a lone surrogate"), pytest.param(float("nan"), {"a": None}, id="NaN")],
)
async def test_a_value_that_json_does_not_allow_is_replaced(value: Any, result: dict[str, Any]) -> None:
    async with open_client(partial(answer_everything, value=value)) as client:
        assert await client.ask(request(5)) == {"jsonrpc": "2.0", "id": 5, "result": result}


@pytest.mark.parametrize(
    "value", [object(), {"\ud800": float("inf")}], ids=["an object", "Infinity beside a surrogate"]
)
async def test_a_result_that_is_not_json_becomes_an_error_and_the_later_ones_are_written(value: Any) -> None:
    async with open_client(partial(answer_everything, value=value)) as client:
        refusal = await client.ask(request(5))
        assert (refusal["id"], refusal["error"]["code"]) == (5, -32603)
        assert await client.ask(request(6)) == {"jsonrpc": "2.0", "id": 6, "result": {}}


async def test_a_request_that_the_server_has_no_room_for_is_refused_and_its_id_is_free() -> None:
    can_read = anyio.Event()

    async def serve(read: Any, write: Any) -> None:
        await can_read.wait()
        await answer_everything(read, write)

    async with open_client(serve, messages_max=1) as client:
        await client.send(request(7))
        refusal = await client.ask(request(6))
        assert (refusal["id"], refusal["error"]["code"]) == (6, -32600)
        can_read.set()
        assert (await client.receive())["id"] == 7
        assert await client.ask(request(6)) == {"jsonrpc": "2.0", "id": 6, "result": {}}
