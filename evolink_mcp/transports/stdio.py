"""MCP over stdin and stdout: it ends soon after EOF, SIGTERM and Ctrl-C, and writes only protocol to stdout.

The SDK's own transport stays blocked in its reader thread after a signal, drops what it cannot parse without an
answer, and does not tell when an answer was written. This one uses the `wires`, which have a thread for each direction.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, cast

import anyio
from mcp.shared.message import ServerMessageMetadata, SessionMessage
from mcp_types import JSONRPCError, JSONRPCNotification, JSONRPCRequest, JSONRPCResponse, jsonrpc_message_adapter
from pydantic import ValidationError

from evolink_mcp.sanitize import scrub
from evolink_mcp.server.startup_answers import StartupAnswers
from evolink_mcp.tools.delivery import Delivery
from evolink_mcp.transports.signals import on_stop_signal
from evolink_mcp.transports.stdio_lines import INVALID_REQUEST, Wires, error_line

LEAVE_WITHIN_S = 1.5
PARSE_ERROR = -32700

Serve = Callable[[Any, Any], Awaitable[None]]


async def serve_stdio(
    wires: Wires, opening: StartupAnswers, serve: Serve, leaving: Callable[[int], None] = lambda code: None
) -> int:
    """Run `serve(read_stream, write_stream)` over the wires. What `opening` has answered is not answered again.

    `leaving(code)` is called when the end has begun. Returns the exit code: 0 after EOF, 130 after SIGINT, 143 after
    SIGTERM. Threads may still block on stdin then.
    """
    if sys.platform == "win32":
        from mcp.os.win32.utilities import rebind_std_handle_to_fd

        for fd in (0, 1):
            rebind_std_handle_to_fd(fd)
    deliveries: dict[str | int, Delivery] = {}
    to_server, from_client = anyio.create_memory_object_stream[SessionMessage | Exception](100_000)
    to_client, from_server = anyio.create_memory_object_stream[SessionMessage](0)
    token = anyio.lowlevel.current_token()
    code = 0

    def deliver(message: SessionMessage | None) -> None:
        if message is None:
            leaving(code)
            to_server.close()
            return
        said = message.message
        if isinstance(said, JSONRPCRequest):
            delivery = deliveries[said.id] = Delivery()
            message.metadata = ServerMessageMetadata(request_context=delivery)
        elif isinstance(said, JSONRPCNotification) and said.method == "notifications/cancelled":
            name = (said.params or {}).get("requestId", "")
            deliveries.pop(name, None)
            if name in opening.answered:
                return  # it came too late: the SDK would keep silent, or say that the request was cancelled
        to_server.send_nowait(message)

    def take(line: bytes | None) -> None:
        message = None if line is None else _parsed(line, wires)
        if line is None or message is not None:
            with suppress(RuntimeError, anyio.ClosedResourceError, anyio.BrokenResourceError):  # we are closing
                anyio.from_thread.run_sync(deliver, message, token=token)

    def settle(delivery: Delivery) -> None:
        with suppress(RuntimeError):  # the loop has ended
            anyio.from_thread.run_sync(lambda: group.start_soon(delivery.settle, True), token=token)

    async def send_all() -> None:
        async for message in from_server:
            said = message.message
            delivery = None
            if isinstance(said, JSONRPCResponse | JSONRPCError) and said.id is not None:
                delivery = deliveries.pop(said.id, None)
                if said.id in opening.answered:
                    opening.answered.discard(said.id)
                    continue
            told = partial(settle, delivery) if delivery is not None and delivery.awaited else None
            wires.write(_dump(message), told)

    def stop(exit_code: int) -> None:
        nonlocal code
        code = exit_code
        deliver(None)  # as if the client had closed stdin: a request that is being paid for may finish
        group.start_soon(leave_late)

    async def leave_late() -> None:
        await anyio.sleep(LEAVE_WITHIN_S)
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        with on_stop_signal(stop):
            group.start_soon(send_all)
            group.start_soon(anyio.to_thread.run_sync, wires.take_lines, take)
            async with from_client, to_client:
                await serve(from_client, to_client)
            await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
    wires.flush()
    return code


def _parsed(line: bytes, wires: Wires) -> SessionMessage | None:
    """The line as a message; None if it is none, which its sender is told."""
    try:
        message = jsonrpc_message_adapter.validate_json(line, by_name=False)
    except ValidationError:
        # Python takes lone surrogates as JSON, pydantic does not: let the tool refuse them in words.
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            wires.write(error_line(None, PARSE_ERROR, "Parse error"))
            return None
        try:
            message = jsonrpc_message_adapter.validate_python(data, by_name=False)
        except ValidationError:
            wires.write(error_line(_id_in(line), INVALID_REQUEST, "Invalid request"))
            return None
    if isinstance(message, JSONRPCNotification) and (name := _id_in(line)) is not None:
        # An id that is neither text nor an integer makes it look like a notification, which nobody answers.
        wires.write(error_line(name, INVALID_REQUEST, "Invalid request: an id is a string or an integer"))
        return None
    return SessionMessage(message)


def _id_in(line: bytes) -> str | float | None:
    """The id in a message as it came; None if there is none that can be sent back."""
    try:
        data = json.loads(line, parse_constant=lambda _: None) if b'"id"' in line else None
    except (ValueError, RecursionError):
        return None
    name = cast("dict[str, Any]", data).get("id") if isinstance(data, dict) else None
    return name if isinstance(name, str | int | float) else None


def _dump(message: SessionMessage) -> bytes:
    try:
        return message.message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n"
    except (ValueError, UnicodeEncodeError):
        data = scrub(message.message.model_dump(mode="python", by_alias=True, exclude_unset=True))
        return json.dumps(data).encode() + b"\n"
