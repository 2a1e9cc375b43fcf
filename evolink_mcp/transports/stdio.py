"""Serve MCP over stdin and stdout. End soon after EOF, SIGTERM and Ctrl-C, and write only protocol to stdout.

The SDK's transport has three faults: after a signal its reader thread blocks the process, it drops malformed lines without
an answer, and it does not report the delivery of an answer. This transport uses `StdioLines`.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
from mcp.shared.dispatcher import coerce_request_id
from mcp.shared.message import ServerMessageMetadata, SessionMessage
from mcp_types import JSONRPCError, JSONRPCMessage, JSONRPCRequest, JSONRPCResponse, RequestId

from evolink_mcp.sanitize import harmless, scrub
from evolink_mcp.server.startup_answers import StartupAnswers
from evolink_mcp.tools.delivery import Delivery
from evolink_mcp.transports.json_rpc import INTERNAL_ERROR, INVALID_REQUEST, error_line
from evolink_mcp.transports.messages import InvalidMessage, read_message
from evolink_mcp.transports.signals import on_stop_signal
from evolink_mcp.transports.stdio_lines import StdioLines

log = logging.getLogger(__name__)

# The Python SDK's client terminates the server 2 s after it closed stdin.
LEAVE_WITHIN_S = 1.5
MESSAGES_MAX = 100_000
ID_MAX_CHARS = 60

Serve = Callable[[Any, Any], Awaitable[None]]


class _Requests:
    """The client's requests without an answer, each with the delivery of its answer.

    The SDK also answers each request of `startup_answers.answered`. This class gives such a request a private ID and drops
    the SDK's answer. So the client may use its ID again at once.
    """

    def __init__(self, startup_answers: StartupAnswers) -> None:
        self._startup_answers = startup_answers
        self._deliveries: dict[RequestId, Delivery] = {}
        self._dropped: set[RequestId] = set()

    def has(self, request_id: RequestId) -> bool:
        """Return whether a request with this ID has no answer yet. "7" and 7 are one ID, as for the SDK."""
        return request_id not in self._startup_answers.answered and coerce_request_id(request_id) in self._deliveries

    def add(self, request: JSONRPCRequest) -> SessionMessage:
        """Add a request. Return the message for the SDK."""
        if request.id in self._startup_answers.answered:
            self._startup_answers.answered.discard(request.id)
            # The SDK still needs the request, for example `initialize`, to know the state of the session.
            request = request.model_copy(update={"id": f"answered {uuid.uuid4()}"})
            self._dropped.add(request.id)
            return SessionMessage(request)
        delivery = Delivery()
        self._deliveries[coerce_request_id(request.id)] = delivery
        unanswered = partial(self._settle_unanswered, request.id)
        return SessionMessage(
            request, ServerMessageMetadata(request_context=delivery, on_request_unanswered=unanswered)
        )

    def is_dropped(self, request_id: RequestId) -> bool:
        """Return whether the transport must drop the answer with this ID."""
        if request_id not in self._dropped:
            return False
        self._dropped.discard(request_id)
        return True

    def remove(self, request_id: RequestId) -> Delivery | None:
        """Remove a request that has its answer. Return the delivery of the answer."""
        return self._deliveries.pop(coerce_request_id(request_id), None)

    async def _settle_unanswered(self, request_id: RequestId) -> None:
        """Settle a request that the client cancelled."""
        delivery = self.remove(request_id)
        if delivery is not None:
            await delivery.settle(False)


async def serve_stdio(
    lines: StdioLines,
    startup_answers: StartupAnswers,
    serve: Serve,
    leaving: Callable[[int], None] = lambda code: None,
    *,
    messages_max: int = MESSAGES_MAX,
) -> int:
    """Run `serve(read_stream, write_stream)` over `lines`. Drop the second answers to requests of `startup_answers`.

    It calls `leaving(code)` when the end begins. `messages_max` limits the messages that `serve` has not read. Return the
    exit code: 0 after EOF, 130 after SIGINT, 143 after SIGTERM. A thread may still block on stdin then.
    """
    # os.dup2 does not change the handles that child processes inherit on Windows.
    if sys.platform == "win32":
        from mcp.os.win32.utilities import rebind_std_handle_to_fd

        for fd in (0, 1):
            rebind_std_handle_to_fd(fd)
    requests = _Requests(startup_answers)
    to_server, from_client = anyio.create_memory_object_stream[SessionMessage | Exception](messages_max)
    # Without a limit the SDK never waits with an answer, so a cancellation cannot lose one that has begun.
    to_client, from_server = anyio.create_memory_object_stream[SessionMessage](math.inf)
    token = anyio.lowlevel.current_token()
    code = 0

    def deliver(message: JSONRPCMessage) -> None:
        if not isinstance(message, JSONRPCRequest):
            to_server.send_nowait(SessionMessage(message))
        elif requests.has(message.id):
            # With the ID, the error would look like the answer to the first request.
            text = (
                f"Invalid request: the request {harmless(message.id, ID_MAX_CHARS)} has no answer yet, use another id"
            )
            lines.write(error_line(None, INVALID_REQUEST, text))
        else:
            session_message = requests.add(message)
            try:
                # A full stream refuses the request: a reader that waits could not read a cancellation.
                to_server.send_nowait(session_message)
            except anyio.WouldBlock:
                requests.remove(message.id)
                raise

    def finish(exit_code: int) -> None:
        try:
            leaving(exit_code)
        finally:
            to_server.close()

    def handle(line: bytes | None) -> None:
        try:
            act = partial(finish, 0) if line is None else partial(deliver, read_message(line, keep_surrogates=True))
        except InvalidMessage as error:
            lines.write(error.body + b"\n")
            return
        with suppress(RuntimeError, anyio.ClosedResourceError, anyio.BrokenResourceError):  # the server is closing
            anyio.from_thread.run_sync(act, token=token)

    def settle(delivery: Delivery) -> None:
        with suppress(RuntimeError):  # the loop has ended
            anyio.from_thread.run_sync(lambda: group.start_soon(delivery.settle, True), token=token)

    async def send_all() -> None:
        with from_server:
            async for message in from_server:
                send(message.message)

    def send(message: JSONRPCMessage) -> None:
        delivery = None
        if isinstance(message, JSONRPCResponse | JSONRPCError) and message.id is not None:
            if requests.is_dropped(message.id):
                return
            delivery = requests.remove(message.id)
        written = partial(settle, delivery) if delivery is not None and delivery.is_awaited else None
        lines.write(_line(message), written)

    def stop(exit_code: int) -> None:
        nonlocal code
        code = exit_code
        finish(exit_code)  # as after EOF: a purchase in progress may finish
        group.start_soon(leave_late)

    async def leave_late() -> None:
        await anyio.sleep(LEAVE_WITHIN_S)
        group.cancel_scope.cancel()

    async with to_server, anyio.create_task_group() as group:
        with on_stop_signal(stop):
            group.start_soon(send_all)
            group.start_soon(anyio.to_thread.run_sync, lines.handle_lines, handle)
            async with from_client, to_client:
                await serve(from_client, to_client)
            # `send_all` needs a turn of the loop for the last answer.
            await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
    lines.flush()
    return code


def _line(message: JSONRPCMessage) -> bytes:
    """Return the message as a line. If JSON cannot carry a result, the line is an error."""
    try:
        return message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n"
    except ValueError:
        log.debug("an answer has text that is not Unicode")
    try:
        data = scrub(message.model_dump(mode="python", by_alias=True, exclude_unset=True))
        return json.dumps(data, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError):
        log.error("an answer cannot be written as JSON")
        return error_line(getattr(message, "id", None), INTERNAL_ERROR, "Internal error: the answer is not JSON")
