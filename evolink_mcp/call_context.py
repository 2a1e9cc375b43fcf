"""The ID and the deadline of the call that a coroutine works for.

A coroutine inherits both from the one that starts it. A purchase keeps the ID of its HTTP request after the call ends, but
it has no deadline. Over stdio there is no request ID.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import anyio

REQUEST_ID: ContextVar[str | None] = ContextVar("evolink_mcp_request_id", default=None)
_DUE_AT: ContextVar[float | None] = ContextVar("evolink_mcp_due_at", default=None)  # anyio's clock
# The ID becomes a part of log lines and headers, so it must not contain line breaks.
_WELLFORMED_ID = re.compile(r"[A-Za-z0-9-]{1,64}")


def request_id_for(proposal: str) -> str:
    """Return the ID that a proxy proposes, if it is well-formed, or a new one."""
    return proposal if _WELLFORMED_ID.fullmatch(proposal) else uuid.uuid4().hex


@contextmanager
def due_within(seconds: float) -> Generator[None]:
    """Let the journal answer within this time, for a call that must answer soon."""
    token = _DUE_AT.set(anyio.current_time() + seconds)
    try:
        yield
    finally:
        _DUE_AT.reset(token)


def remaining_s() -> float | None:
    """Return the time until the deadline of the current call. None: the call has no deadline."""
    due_at = _DUE_AT.get()
    return None if due_at is None else max(0.0, due_at - anyio.current_time())


@contextmanager
def without_deadline() -> Generator[None]:
    """Start coroutines that continue after the current call."""
    token = _DUE_AT.set(None)
    try:
        yield
    finally:
        _DUE_AT.reset(token)


@contextmanager
def outside_request() -> Generator[None]:
    """Start coroutines that belong to no request or to another one."""
    token = REQUEST_ID.set(None)
    try:
        with without_deadline():
            yield
    finally:
        REQUEST_ID.reset(token)
