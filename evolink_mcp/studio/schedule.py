"""How often to look: pure schedules. A look too many costs EvoLink a query, a look too late costs the user seconds."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

FIRST_LOOK_S = 9.0
FIRST_LOOK_MIN_S, FIRST_LOOK_MAX_S = 3.0, 15.0
LOOK_MIN_S, LOOK_MAX_S = 2.5, 5.0
SPRINT_S, SPRINT_LOOKS, SPRINT_FROM = 1.5, 5, 90.0
HONEST_FROM = 5.0
STILL_LOOKS = 2
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.5, 8.0


@dataclass(slots=True)
class Schedule:
    """When to look at one task next. `draw` gives random numbers in [0, 1)."""

    estimate_s: float | None = None
    draw: Callable[[], float] = random.random
    _looks: int = 0
    _sprints: int = 0
    _progress: float = 0.0
    _still: int = 0
    _honest: bool = True

    def next_s(self, elapsed_s: float, progress: float | None = None) -> float:
        """Seconds from now until the next look, `elapsed_s` seconds after the task was accepted."""
        self._looks += 1
        if self._looks == 1 and elapsed_s < FIRST_LOOK_MIN_S:
            return self._first()
        base = min(max(0.04 * elapsed_s, LOOK_MIN_S), LOOK_MAX_S)
        return self._stretch(base, elapsed_s, progress) * (0.9 + 0.2 * self.draw())

    def _first(self) -> float:
        if self.estimate_s is None:
            return FIRST_LOOK_S
        # An estimate below the usual minimum is itself the best time to look.
        return min(max(0.3 * self.estimate_s, min(FIRST_LOOK_MIN_S, self.estimate_s)), FIRST_LOOK_MAX_S)

    def _stretch(self, base: float, elapsed_s: float, progress: float | None) -> float:
        """Progress that rises is believed: far from the end look less, near it look more, for a few looks."""
        if progress is None or progress < self._progress:
            self._honest = self._honest and progress is None
            return base
        self._still = 0 if progress > self._progress else self._still + 1
        self._progress = progress
        if not self._honest or progress < HONEST_FROM:
            return base
        if progress >= SPRINT_FROM:
            self._sprints += 1
            return SPRINT_S if self._sprints <= SPRINT_LOOKS else base
        if self._still >= STILL_LOOKS:  # a number that stands still says nothing about the end
            return base
        remaining = elapsed_s * (100 - progress) / progress
        return min(max(remaining / 2, base), 2 * base)


def backoff_s(attempt: int, draw: Callable[[], float] = random.random) -> float:
    """Full jitter: between 0.5 s and a bound that doubles from 1 s to 8 s (attempt counts from 0)."""
    bound = min(2.0 ** min(attempt, 10), BACKOFF_MAX_S)
    return BACKOFF_MIN_S + (bound - BACKOFF_MIN_S) * draw()


@dataclass(slots=True)
class RetryBudget:
    """Tokens for quick repeats of failed reads, shared by all tasks, so that an outage is not amplified.

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
        self.tokens = min(self.capacity, self.tokens + 1)
