"""What tests let a child process do. It imports next to nothing: the child would wait for it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def works_for_ever(mark: str) -> None:
    Path(mark).write_text(str(os.getpid()))
    while True:
        time.sleep(1)


def wants_too_much_memory() -> int:
    return len(b"x" * (400 << 20))


def dies(parent: int) -> None:
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            time.sleep(1)


def fails() -> None:
    raise FileNotFoundError(2, "gone")
