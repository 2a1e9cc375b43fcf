"""Set up this process: file descriptors, garbage collection, audit log, deadline for the exit."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from contextlib import suppress

# The Python SDK's client terminates a server 2 s after it closed stdin.
EXIT_WITHIN_S = 1.8
DESCRIPTORS = 8192
# A full collection with 1,000 waiting calls takes a second, so it runs rarely.
GARBAGE_THRESHOLDS = (5_000, 20, 100)


def exit_within_deadline(code: int) -> None:
    """End this process after EXIT_WITHIN_S, even if a thread waits for the disk. The next start completes its work."""
    timer = threading.Timer(EXIT_WITHIN_S, os._exit, (code,))
    timer.daemon = True
    timer.start()


def raise_descriptor_limit() -> None:
    """Allow DESCRIPTORS open files, or as many as the system permits. The default of macOS is 256."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        target = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
        if soft != resource.RLIM_INFINITY and soft < target:
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))


def log_audit_to_stderr() -> None:
    """Write each line of the audit log to stderr without a prefix: it is one JSON object."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    audit = logging.getLogger("evolink_mcp.audit")
    audit.addHandler(handler)
    audit.setLevel(logging.INFO)
    # The handler of the root logger would write each line a second time, with a prefix.
    audit.propagate = False


def log_request_ids() -> None:
    """Begin each log line that belongs to an HTTP request with the ID of the request."""
    from evolink_mcp.call_context import REQUEST_ID  # over stdio it would delay the start

    def add_request_id(record: logging.LogRecord) -> bool:
        request_id = REQUEST_ID.get()
        record.request = f"[{request_id}] " if request_id is not None else ""
        return True

    for handler in logging.getLogger().handlers:
        handler.addFilter(add_request_id)
        handler.setFormatter(logging.Formatter("evolink-mcp: %(levelname)s: %(request)s%(message)s"))


def start_garbage_collection() -> None:
    """Exclude all present objects from garbage collection, then enable it with GARBAGE_THRESHOLDS.

    Imports created half a million objects. They stay until the end.
    """
    gc.freeze()
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    gc.enable()
