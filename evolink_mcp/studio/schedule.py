"""When to read a task next: pure functions. A read too many costs EvoLink a query, one too late costs the user time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

FIRST_READ_S = 9.0
FIRST_READ_MIN_S, FIRST_READ_MAX_S = 3.0, 15.0
READ_MIN_S, READ_MAX_S = 2.5, 5.0
# Near the end, from this percentage on, this many reads follow each other faster.
SPRINT_FROM, SPRINT_READS, SPRINT_S = 90.0, 5, 1.5
# Progress below this percentage says nothing about the end.
TRUSTED_FROM = 5.0
STILL_READS = 2
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.5, 8.0
# The last of so many repeats comes about two days after the first.
SLOWEST_S, SLOW_REPEATS_MAX = 3600.0, 58


@dataclass(slots=True)
class Schedule:
    """When to read one task next.

    `estimate_s` is EvoLink's own estimate of the task's duration. `draw` gives random numbers in [0, 1).
    """

    estimate_s: float | None = None
    draw: Callable[[], float] = random.random
    _reads: int = 0
    _sprints: int = 0
    _progress: float = 0.0
    _still: int = 0
    _trusted: bool = True

    def next_s(self, elapsed_s: float, progress: float | None = None) -> float:
        """Seconds from now until the next read; `elapsed_s` seconds after the task was accepted, at `progress` percent."""
        self._reads += 1
        if self._reads == 1 and elapsed_s < FIRST_READ_MIN_S:
            return self._first()
        base = min(max(0.04 * elapsed_s, READ_MIN_S), READ_MAX_S)
        return self._stretch(base, elapsed_s, progress) * (0.9 + 0.2 * self.draw())

    def _first(self) -> float:
        if self.estimate_s is None:
            return FIRST_READ_S
        # An estimate below the usual minimum is itself the best moment.
        return min(max(0.3 * self.estimate_s, min(FIRST_READ_MIN_S, self.estimate_s)), FIRST_READ_MAX_S)

    def _stretch(self, base: float, elapsed_s: float, progress: float | None) -> float:
        """Progress that rises is trusted: far from the end read less often, near it more often, for a few reads."""
        if progress is None or progress < self._progress:
            self._trusted = self._trusted and progress is None
            return base
        self._still = 0 if progress > self._progress else self._still + 1
        self._progress = progress
        if not self._trusted or progress < TRUSTED_FROM:
            return base
        if progress >= SPRINT_FROM:
            self._sprints += 1
            return SPRINT_S if self._sprints <= SPRINT_READS else base
        if self._still >= STILL_READS:  # progress that stands still says nothing about the end
            return base
        remaining = elapsed_s * (100 - progress) / progress
        return min(max(remaining / 2, base), 2 * base)


def backoff_s(attempt: int, draw: Callable[[], float] = random.random) -> float:
    """Full jitter: between 0.5 s and a bound that doubles from 1 s to 8 s (attempt counts from 0)."""
    bound = min(2.0 ** min(attempt, 10), BACKOFF_MAX_S)
    return BACKOFF_MIN_S + (bound - BACKOFF_MIN_S) * draw()


def slower_s(first_s: float, repeat: int) -> float:
    """What is tried for days is tried ever more slowly: after `first_s`, twice that … an hour (repeat counts from 0)."""
    return min(first_s * 2.0**repeat, SLOWEST_S)


@dataclass(slots=True)
class RetryBudget:
    """Tokens for quick repeats of failed reads, shared by all tasks, so that repeats do not make an outage worse.

    As in botocore's standard mode: 500 tokens, 14 for a lost answer, 5 for any other failure, 1 back per success.
    """

    capacity: int = 500
    tokens: int = field(default=500)

    def spend(self, *, lost: bool) -> bool:
        """Take the price of one repeat; False when the budget does not allow it."""
        price = 14 if lost else 5
        if self.tokens < price:
            return False
        self.tokens -= price
        return True

    def earn(self) -> None:
        """Give one token back after a success."""
        self.tokens = min(self.capacity, self.tokens + 1)
