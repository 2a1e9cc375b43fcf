"""Handle the signals that end this process, on every system. The signal receiver of anyio does not work on Windows."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

# Shells report the end by a signal as 128 plus its number.
INTERRUPTED = 130
TERMINATED = 143

# Windows sends SIGBREAK for Ctrl-Break and when the console is closed or the user logs off.
STOP_SIGNALS = [
    number for name in ("SIGINT", "SIGTERM", "SIGBREAK") if (number := getattr(signal, name, None)) is not None
]


def leave_on_stop_signal() -> None:
    """End this process at once after a stop signal. Only for the start, which has no work to lose."""

    def leave(number: int, _: FrameType | None) -> None:
        os._exit(_exit_code(number))

    for number in STOP_SIGNALS:
        signal.signal(number, leave)


@contextmanager
def on_stop_signal(stop: Callable[[int], None]) -> Generator[None]:
    """Call `stop(exit_code)` in the running event loop for each stop signal. Only for the main thread."""
    import asyncio

    loop = asyncio.get_running_loop()

    def handle(number: int, _: FrameType | None) -> None:
        # Only this call wakes a sleeping event loop from a signal handler.
        loop.call_soon_threadsafe(stop, _exit_code(number))

    previous_handlers = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def _exit_code(number: int) -> int:
    return INTERRUPTED if number == signal.SIGINT else TERMINATED
