"""Spans of OpenTelemetry around EvoLink and the database, for whoever installs an exporter; without one they are free."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from opentelemetry import trace

from evolink_mcp import __version__


@contextmanager
def span(name: str, **attributes: str | int) -> Generator[trace.Span]:
    """A client's span for one request; `__` in an attribute's name stands for a dot. No key and no prompt belongs here."""
    named = {key.replace("__", "."): value for key, value in attributes.items()}
    # Never the current one of a context: a generator that holds it may be closed in another context.
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
