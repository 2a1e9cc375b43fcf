"""Let few calls begin at the same time, and serve tenants in turn."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Hashable
from contextlib import asynccontextmanager

import anyio

CALLS_AT_ONCE = 8
LINES_MAX = 10_000
# A free call needs up to 40 rounds of the event loop, and a busy loop has only a few rounds within `longest_s`. With fewer
# rounds, running calls lost their turns, and a busy server began too many calls.
ROUNDS_MIN = 50


class TurnsClosed(Exception):
    """The server is about to end, and the call has not begun."""


class Turns:
    """Let at most `at_once` calls of the process begin at the same time.

    Each tenant has a line of waiting calls. The line with the oldest last turn is next, so many calls of one tenant delay
    only this tenant. A new line counts as served at its first call. Without turns, 1,000 simultaneous calls share the
    processor and all end at the very end. A call that waits for EvoLink gives its turn back after `longest_s`. Above
    `lines_max` lines, the idle line with the oldest last turn is forgotten.
    """

    def __init__(self, at_once: int = CALLS_AT_ONCE, longest_s: float = 0.1, *, lines_max: int = LINES_MAX) -> None:
        self._free = at_once
        self._longest_s = longest_s
        self._lines_max = lines_max
        # In the order of their last turns, the oldest one first.
        self._lines: OrderedDict[Hashable, deque[anyio.Event]] = OrderedDict()
        self._waiting = 0
        self._is_closed = False

    @property
    def line_count(self) -> int:
        """The number of known lines."""
        return len(self._lines)

    def close(self) -> None:
        """Refuse all calls that have no turn yet. Calls with a turn continue."""
        self._is_closed = True
        for waiting in self._lines.values():
            for turn in waiting:
                turn.set()

    @asynccontextmanager
    async def turn(self, line: Hashable = None) -> AsyncGenerator[Callable[[], None]]:
        """Wait for a turn of the line and hold it inside the context. Yield a function that gives it back earlier.

        Raises:
            TurnsClosed: the server ends, and the call has no turn.
        """
        # Before the try block, because a call without a turn must not give one back.
        await self._acquire(line)
        is_held = True

        def release() -> None:
            nonlocal is_held
            if is_held:
                is_held = False
                self._release()

        rounds = ROUNDS_MIN

        def count_round() -> None:
            nonlocal rounds, timer
            rounds -= 1
            if rounds:
                timer = loop.call_later(self._longest_s / ROUNDS_MIN, count_round)
            else:
                release()

        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._longest_s / ROUNDS_MIN, count_round)
        try:
            yield release
        finally:
            timer.cancel()
            release()

    async def _acquire(self, line: Hashable) -> None:
        if self._is_closed:
            raise TurnsClosed
        waiting = self._lines.setdefault(line, deque())
        if len(self._lines) > self._lines_max:
            self._forget_idle_line()
        if self._free:
            self._free -= 1
            self._lines.move_to_end(line)
            return
        turn = anyio.Event()
        waiting.append(turn)
        self._waiting += 1
        has_turn = False
        try:
            await turn.wait()
            # `close` also wakes calls that are still in their line.
            has_turn = turn not in waiting
        finally:
            if not has_turn:
                self._leave(waiting, turn)
        if not has_turn:
            raise TurnsClosed

    def _leave(self, waiting: deque[anyio.Event], turn: anyio.Event) -> None:
        """Leave the line: the call was cancelled, or no turn will come. The turn may have come in the same moment."""
        if turn in waiting:
            waiting.remove(turn)
            self._waiting -= 1
        else:
            self._release()

    def _release(self) -> None:
        """Give the turn to the next line, or keep it free."""
        if not self._waiting:
            self._free += 1
            return
        line = next(line for line, waiting in self._lines.items() if waiting)
        self._waiting -= 1
        self._lines[line].popleft().set()
        self._lines.move_to_end(line)

    def _forget_idle_line(self) -> None:
        """Forget the idle line with the oldest last turn. Waiting lines stay, so there may be more of them."""
        idle = next((line for line, waiting in self._lines.items() if not waiting), None)
        if idle is not None:
            del self._lines[idle]
