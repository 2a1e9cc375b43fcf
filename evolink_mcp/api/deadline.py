"""A deadline that does not count the time while the process or the machine was suspended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol

import anyio

# The context manager yields a cancel scope. Its `cancelled_caught` is true after the deadline.
Deadline = Callable[[float], AbstractContextManager[anyio.CancelScope]]


class Timer(Protocol):
    """The handle of a function that the event loop calls later."""

    def cancel(self) -> None:
        """Do not call the function."""
        ...


CallLater = Callable[[float, Callable[[], None]], Timer]

STEP_S = 1.0
# A step that takes this much longer than STEP_S was interrupted by a suspension.
LATE_S = 2.0
# After a suspension an answer may wait in the socket, or arrive when the network is back.
AFTER_SUSPENSION_S = 20.0


@contextmanager
def awake_deadline(
    seconds: float,
    *,
    clock: Callable[[], float] = time.time,
    step_s: float = STEP_S,
    late_s: float = LATE_S,
    after_suspension_s: float = AFTER_SUSPENSION_S,
    call_later: CallLater | None = None,
) -> Generator[anyio.CancelScope]:
    """Cancel the block after `seconds` of running time. A suspension ends no block: at least `after_suspension_s` remain.

    The time is counted in steps of `step_s`. A step that `clock` (epoch seconds) shows as `late_s` too long does not count.
    `call_later` is the event loop's. Its clock cannot detect a suspension: on Linux it stops while the machine sleeps.
    """
    start_timer: CallLater = asyncio.get_running_loop().call_later if call_later is None else call_later
    with anyio.CancelScope() as scope:
        remaining_s = seconds

        def start_step() -> Timer:
            length_s = min(step_s, remaining_s)
            return start_timer(length_s, partial(end_step, length_s, clock()))

        def end_step(length_s: float, began: float) -> None:
            nonlocal remaining_s, timer
            if clock() - began > length_s + late_s:
                remaining_s = max(remaining_s, after_suspension_s)
            else:
                remaining_s -= length_s
            if remaining_s > 0:
                timer = start_step()
            else:
                scope.cancel()

        timer = start_step()
        try:
            yield scope
        finally:
            timer.cancel()
