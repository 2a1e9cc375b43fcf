"""A picture is decoded in a child process, with a deadline and a bound on its memory: a file can order hours of work."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Literal, TypeVar, cast

import anyio
import anyio.to_process
import anyio.to_thread

from evolink_mcp.images.inspect import NotAPicture

log = logging.getLogger(__name__)

DEADLINE_S = 20.0
MEMORY_MAX_BYTES = 300 << 20
CHECKS_AT_ONCE = min(os.cpu_count() or 1, 2)  # each may take MEMORY_MAX_BYTES
Lane = Literal["check", "preview", "reference"]
T = TypeVar("T")
_LANES = {"check": anyio.CapacityLimiter(CHECKS_AT_ONCE)} | {
    lane: anyio.CapacityLimiter(1) for lane in ("preview", "reference")
}
_NO_LIMIT = anyio.CapacityLimiter(math.inf)  # the lanes are the limit


async def in_child(lane: Lane, call: Callable[..., T], *args: object) -> T:
    """`call(*args)` in a child process, few at a time in each lane: a check never waits for a preview.

    `call`, its arguments, its result and what it raises are pickled. A caller that is cancelled kills the child. Where no
    child can be started, a thread does the work, without deadline and bound.

    Raises:
        NotAPicture: it took longer than DEADLINE_S, or the child did not survive it.
    """
    async with _LANES[lane]:
        try:
            # Starting takes as long as the machine likes; only the picture's own time counts. It is not cancelled
            # (a tenth of a second): anyio 4.16 would forget a child that has not said yet that it is there.
            with anyio.CancelScope(shield=True):
                await anyio.to_process.run_sync(_bounded, limiter=_NO_LIMIT)
        except (OSError, anyio.BrokenWorkerProcess) as error:
            log.warning("pictures are decoded inside the server, because no child process starts (%s)", error)
            return await anyio.to_thread.run_sync(partial(call, *args), limiter=_NO_LIMIT, abandon_on_cancel=True)
        try:
            with anyio.fail_after(DEADLINE_S):
                answer = await anyio.to_process.run_sync(_answered, call, args, cancellable=True, limiter=_NO_LIMIT)
        except TimeoutError as error:
            raise NotAPicture(f"it takes longer than {DEADLINE_S:.0f} s to decode") from error
        except anyio.BrokenWorkerProcess as error:
            raise NotAPicture("the decoder does not survive it") from error
    if isinstance(answer, _Raised):
        raise answer.error
    return cast("T", answer)


class _Raised:
    """What `call` raised, apart from what went wrong with the child."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _answered(call: Callable[..., object], args: tuple[object, ...]) -> object:
    """In the child: the result, or what was raised."""
    try:
        return call(*args)
    except MemoryError:
        return _Raised(NotAPicture("it needs too much memory"))
    except (NotAPicture, OSError, ValueError) as error:
        return _Raised(error)


def _bounded() -> None:
    """In the child: no more memory than MEMORY_MAX_BYTES. Only Linux counts it; elsewhere a picture's size is the bound."""
    if sys.platform == "linux":
        import resource

        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_MAX_BYTES, MEMORY_MAX_BYTES))
