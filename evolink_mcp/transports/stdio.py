"""MCP over stdin and stdout: it ends soon after EOF, SIGTERM and Ctrl-C, and writes only protocol to stdout.

The SDK's own transport stays blocked in its reader thread after a signal, drops what it cannot parse without an
answer, and does not tell when an answer was written. This one uses a daemon thread for each direction.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

import anyio
from mcp.shared.message import ServerMessageMetadata, SessionMessage
from mcp_types import JSONRPCError, JSONRPCNotification, JSONRPCRequest, JSONRPCResponse, jsonrpc_message_adapter
from pydantic import ValidationError

from evolink_mcp.sanitize import scrub
from evolink_mcp.tools.delivery import Delivery
from evolink_mcp.transports.signals import on_stop_signal

log = logging.getLogger(__name__)

LINE_MAX_BYTES = 96 << 20
FLUSH_S = 0.3
LEAVE_WITHIN_S = 1.5
PARSE_ERROR, INVALID_REQUEST = -32700, -32600
STDERR = 2
NO_WIRE = 1  # the exit code

Serve = Callable[[Any, Any], Awaitable[None]]
# What is to be written, and whose answer it is, if anybody wants to know that it was written.
Outbox = queue.SimpleQueue[tuple[bytes, Delivery | None] | None]


async def serve_stdio(serve: Serve, leaving: Callable[[int], None] = lambda code: None) -> int:
    """Run `serve(read_stream, write_stream)` over this process's stdin and stdout.

    `leaving(code)` is called when the end has begun. Returns the exit code: 0 after EOF, 130 after SIGINT, 143 after
    SIGTERM. Threads may still block on stdin then.
    """
    try:
        wire_in, wire_out = _claim()
    except OSError as error:
        log.error("there is no standard input and output to speak over (%s)", error.strerror)
        return NO_WIRE
    outbox: Outbox = queue.SimpleQueue()
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
        if isinstance(message.message, JSONRPCRequest):
            delivery = deliveries[message.message.id] = Delivery()
            message.metadata = ServerMessageMetadata(request_context=delivery)
        elif isinstance(message.message, JSONRPCNotification) and message.message.method == "notifications/cancelled":
            deliveries.pop((message.message.params or {}).get("requestId", ""), None)
        to_server.send_nowait(message)

    def arrive(message: SessionMessage | None) -> None:
        anyio.from_thread.run_sync(deliver, message, token=token)

    def written(delivery: Delivery) -> None:
        anyio.from_thread.run_sync(lambda: group.start_soon(delivery.settle, True), token=token)

    reader = threading.Thread(target=_read, args=(wire_in, arrive, outbox), daemon=True, name="stdin")
    writer = threading.Thread(target=_write, args=(wire_out, outbox, arrive, written), daemon=True, name="stdout")

    async def send_all() -> None:
        async for message in from_server:
            said = message.message
            delivery = None
            if isinstance(said, JSONRPCResponse | JSONRPCError) and said.id is not None:
                delivery = deliveries.pop(said.id, None)
            outbox.put((_dump(message), delivery if delivery is not None and delivery.awaited else None))

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
            reader.start()
            writer.start()
            async with from_client, to_client:
                await serve(from_client, to_client)
            await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
    outbox.put(None)
    writer.join(FLUSH_S)
    return code


def _claim() -> tuple[int, int]:
    """Keep stdin and stdout for the protocol: other code that reads stdin finds its end, and its prints go to stderr.

    Raises:
        OSError: one of them is closed.
    """
    wire_in, wire_out = _above_standard(0), _above_standard(1)
    with suppress(OSError):  # if they cannot be diverted, only other code's prints could disturb
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        try:
            os.dup2(2, 1)
        except OSError:  # there is no stderr
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.close(nowhere)
        if sys.platform == "win32":
            from mcp.os.win32.utilities import rebind_std_handle_to_fd

            for fd in (0, 1):
                rebind_std_handle_to_fd(fd)
    return wire_in, wire_out


def _above_standard(fd: int) -> int:
    """A copy of `fd` that is no standard descriptor, even if one of those is closed."""
    copy = os.dup(fd)
    if copy > STDERR:
        return copy
    try:
        return _above_standard(fd)
    finally:
        os.close(copy)


def _read(wire: int, arrive: Callable[[SessionMessage | None], None], outbox: Outbox) -> None:
    rest = bytearray()
    too_long = False
    try:
        while chunk := os.read(wire, 1 << 18):
            rest += chunk
            if b"\n" not in chunk:
                if len(rest) > LINE_MAX_BYTES:
                    rest.clear()
                    too_long = True
                continue
            *lines, tail = bytes(rest).split(b"\n")
            rest = bytearray(tail)
            if too_long:
                too_long = False
                del lines[0]
                outbox.put((_error(None, INVALID_REQUEST, f"A line has more than {LINE_MAX_BYTES >> 20} MiB"), None))
            for line in lines:
                if line.strip():
                    _take(line, arrive, outbox)
        arrive(None)
    except (OSError, RuntimeError, anyio.ClosedResourceError, anyio.BrokenResourceError):
        log.debug("stdin ended while the server was closing")


def _take(line: bytes, arrive: Callable[[SessionMessage | None], None], outbox: Outbox) -> None:
    try:
        message = jsonrpc_message_adapter.validate_json(line, by_name=False)
    except ValidationError:
        # Python takes lone surrogates as JSON, pydantic does not: let the tool refuse them in words.
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            outbox.put((_error(None, PARSE_ERROR, "Parse error"), None))
            return
        try:
            message = jsonrpc_message_adapter.validate_python(data, by_name=False)
        except ValidationError:
            outbox.put((_error(_id_in(line), INVALID_REQUEST, "Invalid request"), None))
            return
    if isinstance(message, JSONRPCNotification) and (name := _id_in(line)) is not None:
        # An id that is neither text nor an integer makes it look like a notification, which nobody answers.
        outbox.put((_error(name, INVALID_REQUEST, "Invalid request: an id is a string or an integer"), None))
        return
    arrive(SessionMessage(message))


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


def _error(name: str | float | None, code: int, text: str) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": name, "error": {"code": code, "message": text}}).encode() + b"\n"


def _write(
    wire: int,
    outbox: Outbox,
    arrive: Callable[[SessionMessage | None], None],
    written: Callable[[Delivery], None],
) -> None:
    try:
        while (item := outbox.get()) is not None:
            data, delivery = item
            view = memoryview(data)
            while view:
                view = view[os.write(wire, view) :]
            if delivery is not None:
                with suppress(RuntimeError):  # the loop has ended
                    written(delivery)
    except OSError:
        log.debug("stdout was closed by the client")
        with suppress(RuntimeError):  # nobody can be answered any more: end as at the end of stdin
            arrive(None)
