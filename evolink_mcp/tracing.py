"""OpenTelemetry spans around EvoLink and the database. Without an exporter they cost nothing."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from opentelemetry import trace

from evolink_mcp import __version__
from evolink_mcp.call_context import REQUEST_ID


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
