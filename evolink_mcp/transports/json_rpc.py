"""Build JSON-RPC errors as bytes. This module needs no SDK, so stdio can use it before the SDK is imported."""

from __future__ import annotations

import json
import math
import re

TYPE_CHECKING = False  # `typing` takes long to import
if TYPE_CHECKING:
    from typing import TypeGuard

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
INTERNAL_ERROR = -32603
# A number of 18 digits fits into 64 bits.
_ID = re.compile(rb'"id"\s*:\s*("(?:[^"\\]|\\.){0,200}"|-?\d{1,18})')


def error_body(request_id: object, code: int, text: str) -> bytes:
    """Return a JSON-RPC error object. An ID that valid JSON cannot carry becomes null."""
    error = {"code": code, "message": text}
    sendable_id = request_id if is_sendable(request_id) else None
    return json.dumps({"jsonrpc": "2.0", "id": sendable_id, "error": error}, allow_nan=False).encode()


def error_line(request_id: object, code: int, text: str) -> bytes:
    """Return a JSON-RPC error object as a line of stdio."""
    return error_body(request_id, code, text) + b"\n"


def request_id_in(data: bytes) -> object:
    """Return the ID of a request in bytes that cannot be handled as a message. None: there is no such ID."""
    try:
        value: object = json.loads(data.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError):
        return None
    if not _is_request(value):
        return None
    request_id = value.get("id")
    # An invalid byte became U+FFFD, so this may be another ID than the client's.
    return None if isinstance(request_id, str) and "\ufffd" in request_id else request_id


def _is_request(value: object) -> TypeGuard[dict[str, object]]:
    """Return whether a decoded JSON value is a request or a notification."""
    return isinstance(value, dict) and "method" in value


def request_id_in_part(data: bytes) -> object:
    """Return the first ID in a part of a message. None: the part shows no ID."""
    match = _ID.search(data)
    try:
        return None if match is None else json.loads(match[1].decode())
    except ValueError:
        return None


def is_sendable(request_id: object) -> bool:
    """Whether valid JSON can carry this ID in an answer."""
    if isinstance(request_id, str):
        return not any("\ud800" <= char <= "\udfff" for char in request_id)
    return isinstance(request_id, int) or (isinstance(request_id, float) and math.isfinite(request_id))
