"""MCP over stdin and stdout: it ends soon after EOF, SIGTERM and Ctrl-C, and writes only protocol to stdout.

The SDK's own transport stays blocked in its reader thread after a signal, drops what it cannot parse without an
answer, and changes threads twice for each message. This one uses a daemon thread for each direction.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

import anyio
from mcp.shared.message import SessionMessage
from mcp_types import jsonrpc_message_adapter
from pydantic import ValidationError

from evolink_mcp.sanitize import scrub

log = logging.getLogger(__name__)

LINE_MAX_BYTES = 96 << 20
FLUSH_S = 0.3
LEAVE_WITHIN_S = 1.5
PARSE_ERROR, INVALID_REQUEST = -32700, -32600

Serve = Callable[[Any, Any], Awaitable[None]]


async def serve_stdio(serve: Serve) -> int:
    """Run `serve(read_stream, write_stream)` over this process's stdin and stdout.

    Returns the exit code: 0 after EOF, 130 after SIGINT, 143 after SIGTERM. Threads may still block on stdin then.
    """
    wire_in, wire_out = _claim()
    outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    to_server, from_client = anyio.create_memory_object_stream[SessionMessage | Exception](100_000)
    to_client, from_server = anyio.create_memory_object_stream[SessionMessage](0)
    token = anyio.lowlevel.current_token()
    code = 0

    def deliver(message: SessionMessage | None) -> None:
        if message is None:
            to_server.close()
        else:
            to_server.send_nowait(message)

    def arrive(message: SessionMessage | None) -> None:
        anyio.from_thread.run_sync(deliver, message, token=token)

    reader = threading.Thread(target=_read, args=(wire_in, arrive, outbox), daemon=True, name="stdin")
    writer = threading.Thread(target=_write, args=(wire_out, outbox, arrive), daemon=True, name="stdout")

    async def send_all() -> None:
        async for message in from_server:
            outbox.put(_dump(message))

    async with anyio.create_task_group() as group:

        async def stop_on_signal() -> None:
            nonlocal code
            with anyio.open_signal_receiver(*_stop_signals()) as signals:
                async for number in signals:
                    code = 128 + number
                    deliver(None)  # as if the client had closed stdin: a request that is being paid for may finish
                    await anyio.sleep(LEAVE_WITHIN_S)
                    group.cancel_scope.cancel()

        group.start_soon(stop_on_signal)
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


def _stop_signals() -> tuple[signal.Signals, ...]:
    return (signal.SIGINT, signal.SIGTERM) if sys.platform != "win32" else (signal.SIGINT,)


def _claim() -> tuple[int, int]:
    """Keep stdin and stdout for the protocol: other code that reads stdin finds its end, and its prints go to stderr."""
    wire_in, wire_out = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return wire_in, wire_out


def _read(wire: int, arrive: Callable[[SessionMessage | None], None], outbox: queue.SimpleQueue[bytes | None]) -> None:
    rest = bytearray()
    try:
        while chunk := os.read(wire, 1 << 18):
            rest += chunk
            if b"\n" not in chunk:
                if len(rest) > LINE_MAX_BYTES:
                    break
                continue
            *lines, tail = bytes(rest).split(b"\n")
            rest = bytearray(tail)
            for line in lines:
                if line.strip():
                    _take(line, arrive, outbox)
        arrive(None)
    except (OSError, RuntimeError, anyio.ClosedResourceError, anyio.BrokenResourceError):
        log.debug("stdin ended while the server was closing")


def _take(
    line: bytes, arrive: Callable[[SessionMessage | None], None], outbox: queue.SimpleQueue[bytes | None]
) -> None:
    try:
        message = jsonrpc_message_adapter.validate_json(line, by_name=False)
    except ValidationError:
        # Python takes lone surrogates as JSON, pydantic does not: let the tool refuse them in words.
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            outbox.put(_error(None, PARSE_ERROR, "Parse error"))
            return
        try:
            message = jsonrpc_message_adapter.validate_python(data, by_name=False)
        except ValidationError:
            name = cast("dict[str, Any]", data).get("id") if isinstance(data, dict) else None
            outbox.put(_error(name if isinstance(name, str | int) else None, INVALID_REQUEST, "Invalid request"))
            return
    arrive(SessionMessage(message))


def _dump(message: SessionMessage) -> bytes:
    try:
        return message.message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n"
    except (ValueError, UnicodeEncodeError):
        data = scrub(message.message.model_dump(mode="python", by_alias=True, exclude_unset=True))
        return json.dumps(data).encode() + b"\n"


def _error(name: str | int | None, code: int, text: str) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": name, "error": {"code": code, "message": text}}).encode() + b"\n"


def _write(wire: int, outbox: queue.SimpleQueue[bytes | None], arrive: Callable[[SessionMessage | None], None]) -> None:
    try:
        while (data := outbox.get()) is not None:
            view = memoryview(data)
            while view:
                view = view[os.write(wire, view) :]
    except OSError:
        log.debug("stdout was closed by the client")
        with suppress(RuntimeError):  # nobody can be answered any more: end as at the end of stdin
            arrive(None)
