"""Signals that ask this process to end, on every system; anyio's receiver has no implementation on Windows."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143

# Windows sends SIGBREAK for Ctrl-Break and when the console is closed or the user logs off.
STOP_SIGNALS = [
    number for name in ("SIGINT", "SIGTERM", "SIGBREAK") if (number := getattr(signal, name, None)) is not None
]


def leave_on_stop_signal() -> None:
    """End this process at once on every such signal: for a start, when there is nothing to lose."""

    def leave(number: int, _: FrameType | None) -> None:
        os._exit(_exit_code(number))

    for number in STOP_SIGNALS:
        signal.signal(number, leave)


@contextmanager
def on_stop_signal(stop: Callable[[int], None]) -> Generator[None]:
    """Call `stop(exit_code)` in the running event loop for every such signal. Only in the main thread."""
    import asyncio

    loop = asyncio.get_running_loop()

    def hear(number: int, _: FrameType | None) -> None:
        loop.call_soon_threadsafe(stop, _exit_code(number))

    before = {number: signal.signal(number, hear) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(number: int) -> int:
    return INTERRUPTED if number == signal.SIGINT else TERMINATED
