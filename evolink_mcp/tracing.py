"""OpenTelemetry spans around EvoLink and the database, and the ID of the HTTP request that caused them.

Without an exporter the spans cost nothing. Over stdio there is no request ID.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

from opentelemetry import trace

from evolink_mcp import __version__

# Each coroutine has a copy of it, so a purchase keeps the ID of its HTTP request after the call ends.
REQUEST_ID: ContextVar[str | None] = ContextVar("evolink_mcp_request_id", default=None)
_WELLFORMED_ID = re.compile(r"[A-Za-z0-9-]{1,64}")


def request_id_for(proposal: str) -> str:
    """Return the ID that a proxy proposes, if it is well-formed, or a new one."""
    return proposal if _WELLFORMED_ID.fullmatch(proposal) else uuid.uuid4().hex


@contextmanager
def outside_request() -> Generator[None]:
    """Start coroutines without the ID of the current HTTP request, for work that belongs to no request or to another."""
    token = REQUEST_ID.set(None)
    try:
        yield
    finally:
        REQUEST_ID.reset(token)


@contextmanager
def span(name: str, **attributes: str | int) -> Generator[trace.Span]:
    """Open a client span for one request. `__` in an attribute name means a dot. Never pass a key or a prompt."""
    named = {key.replace("__", "."): value for key, value in attributes.items()}
    if (request_id := REQUEST_ID.get()) is not None:
        named["evolink_mcp.request_id"] = request_id
    # Not the current span of the context: a generator may be closed in another context.
    current = trace.get_tracer("evolink_mcp", __version__).start_span(
        name, kind=trace.SpanKind.CLIENT, attributes=named
    )
    failed = True
    try:
        yield current
        failed = False
    finally:
        if failed:
            current.set_status(trace.StatusCode.ERROR)
        current.end()
