"""Read bytes of a client as one JSON-RPC message. Every transport uses this module before the SDK sees a message."""

from __future__ import annotations

import json
from typing import Any, cast

from mcp_types import JSONRPCError, JSONRPCMessage, JSONRPCNotification, jsonrpc_message_adapter
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from evolink_mcp.sanitize import scrub
from evolink_mcp.transports.json_rpc import INVALID_REQUEST, PARSE_ERROR, error_body, is_sendable, request_id_in

BAD_REQUEST = 400
# A call of this server has fewer than 50 members on five levels. pydantic needs more time than this check.
DEPTH_MAX = 200
MEMBERS_MAX = 10_000
NAME_MAX_CHARS = 1_000


class InvalidMessage(Exception):
    """The bytes are not one JSON-RPC message. `body` is the JSON-RPC error that answers them."""

    def __init__(self, code: int, text: str, request_id: object = None) -> None:
        super().__init__(text)
        self.body = error_body(request_id, code, text)


def read_message(data: bytes, *, keep_surrogates: bool = False) -> JSONRPCMessage:
    """Return the message in `data`.

    `keep_surrogates` accepts lone surrogates, which JSON can spell and UTF-8 cannot. A tool then refuses them in words.

    Raises:
        InvalidMessage: `data` is not JSON, is a batch, is no message of JSON-RPC 2.0, or is too deep or too large.
    """
    try:
        value = _decoded(data, keep_surrogates)
    except (ValueError, RecursionError):
        raise InvalidMessage(PARSE_ERROR, "Parse error: this is not JSON in UTF-8", request_id_in(data)) from None
    if not isinstance(value, dict):
        raise InvalidMessage(INVALID_REQUEST, "Invalid request: a message is one JSON object")
    members = cast("dict[str, Any]", value)
    # The ID beside a result or an error is that of a request of the server, so an error must not carry it.
    request_id = members.get("id") if "method" in members or not members.keys() & {"result", "error"} else None
    if (excess := _excess(members)) is not None:
        raise InvalidMessage(INVALID_REQUEST, f"Invalid request: {excess}", request_id)
    try:
        message = jsonrpc_message_adapter.validate_python(value, by_name=False)
    except ValidationError:
        raise InvalidMessage(INVALID_REQUEST, "Invalid request", request_id) from None
    if _has_malformed_id(message, members):
        raise InvalidMessage(INVALID_REQUEST, "Invalid request: an id is a string or an integer", request_id)
    return message


async def read_post(scope: Scope, receive: Receive, send: Send) -> tuple[JSONRPCMessage, Receive] | None:
    """Return the message of a POST, and a `receive` for the app. If the message is invalid, answer 400 and return None.

    The body must come as one ASGI message.
    """
    first = await receive()
    try:
        return read_message(first.get("body", b"")), replay(first, receive)
    except InvalidMessage as error:
        await Response(error.body, BAD_REQUEST, media_type="application/json")(scope, receive, send)
        return None


def replay(first: Message, receive: Receive) -> Receive:
    """Return a `receive` that gives `first`, then everything that `receive` gives."""
    messages = [first]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


def _excess(message: dict[str, Any]) -> str | None:
    """Return the limit that a JSON value exceeds, or None."""
    # Level by level, because a recursion would fail at the depth that it must measure.
    level: list[Any] = [message]
    members = 0
    for _ in range(DEPTH_MAX):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                names = cast("dict[str, Any]", value)
                if max(map(len, names), default=0) > NAME_MAX_CHARS:
                    return f"a name has more than {NAME_MAX_CHARS:,} characters"
                below += names.values()
            elif isinstance(value, list):
                below += cast("list[Any]", value)
        members += len(below)
        if members > MEMBERS_MAX:
            return f"it has more than {MEMBERS_MAX:,} members"
        if not below:
            return None
        level = below
    return f"it has more than {DEPTH_MAX} levels"


def _has_malformed_id(message: JSONRPCMessage, members: dict[str, Any]) -> bool:
    if isinstance(message, JSONRPCNotification):
        # The SDK reads a request with a malformed ID as a notification, and would not answer it.
        return "id" in members
    return not isinstance(message, JSONRPCError) and not is_sendable(message.id)


def _decoded(data: bytes, keep_surrogates: bool) -> object:
    try:
        return from_json(data)
    except ValueError:
        if not keep_surrogates:
            raise
    value: object = json.loads(data.decode("utf-8-sig", "surrogatepass"))
    from_json(json.dumps(scrub(value)))  # the limits of the first reader on depth and on the length of numbers
    return value
