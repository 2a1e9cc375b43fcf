"""What this process asks of the system and of Python: descriptors, a quiet memory, and an end in time."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from contextlib import suppress

LEAVE_WITHIN_S = 1.8
DESCRIPTORS = 8192
GARBAGE = (5_000, 20, 100)  # a full search of 1,000 waiting calls takes a second


def leave_in_time(code: int) -> None:
    """End this process soon, even if a thread still waits for the disk: what is not written is left to the next start."""
    end = threading.Timer(LEAVE_WITHIN_S, os._exit, (code,))
    end.daemon = True
    end.start()


def take_descriptors() -> None:
    """Use as many file descriptors as the system allows: macOS gives 256 unless it is asked for more."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def audit_to_stderr() -> None:
    """Write the audit's lines as they are: each is one JSON object."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    audit = logging.getLogger("evolink_mcp.audit")
    audit.addHandler(handler)
    audit.setLevel(logging.INFO)
    audit.propagate = False


def keep_what_stays() -> None:
    """Garbage is searched from now on, but not among half a million objects of the imports, and rarely among the old."""
    gc.freeze()
    gc.set_threshold(*GARBAGE)
    gc.enable()
