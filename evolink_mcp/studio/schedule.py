"""When to read a task next: pure functions. A read too many costs EvoLink a query, one too late costs the user time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev

from evolink_mcp.api.models import DEFAULT_MODEL, TYPICAL_S

# The duration of an unknown group.
DEFAULT_TYPICAL_S = TYPICAL_S[DEFAULT_MODEL.default_quality]
# By how much durations differ from their median: the standard deviation of their logarithm.
USUAL_SPREAD = 0.4
# One task in ten is of another kind, about which only this much is known.
STRANGE_SHARE, STRANGE_SPREAD = 0.1, 1.0
# A read is worth as much as this many seconds in which nobody knows that the picture is there.
READ_COSTS_S = 0.075
READ_MIN_S = 0.7
# The longest rest, as a part of the usual duration; the shortest, as a part of the age, and the longest after that time.
REST_MAX_SHARE, REST_MIN_OF_AGE, REST_OLD_MAX_S = 0.4, 0.025, 5.0
ENOUGH, RECENT = 5, 12  # so many tasks of one quality tell something; older ones tell nothing any more
# An estimate this many times shorter than usual is believed at once: something has changed.
MUCH_SHORTER = 4.0
# By how much EvoLink's estimates must be nearer to the truth than the medians are, before they are believed.
NEARER = 0.7
# Near the end, from this percentage on, this many reads follow each other faster.
SPRINT_FROM, SPRINT_READS, SPRINT_S = 90.0, 5, 1.5
# Progress below this percentage says nothing about the end.
TRUSTED_FROM = 5.0
STILL_READS = 2
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.5, 8.0
# The last of so many repeats comes about two days after the first.
SLOWEST_S, SLOW_REPEATS_MAX = 3600.0, 58


@dataclass(frozen=True, slots=True)
class Expected:
    """How long a task will take: half of such tasks take less than `median_s` seconds; `spread` is that of the logarithm."""

    median_s: float = DEFAULT_TYPICAL_S
    spread: float = USUAL_SPREAD

    def rest_s(self, elapsed_s: float) -> float:
        """The best time from now to the next read, `elapsed_s` seconds after the start.

        Theory of inspection: the best interval is √(2·cost ÷ hazard), where the hazard is the chance a second that the
        task ends now, if it has not ended before.
        """
        rest = READ_MIN_S
        longest = max(REST_MAX_SHARE * self.median_s, READ_MIN_S)
        if elapsed_s >= self.median_s:
            longest = min(longest, REST_OLD_MAX_S)
        while rest < longest and rest * rest * self._hazard(elapsed_s + rest / 2) < 2 * READ_COSTS_S:
            rest *= 1.1
        old = min(REST_MIN_OF_AGE * elapsed_s, REST_OLD_MAX_S)
        return max(min(rest, longest), old)

    def _hazard(self, at_s: float) -> float:
        ends = lasts = 0.0
        for share, spread in ((1 - STRANGE_SHARE, self.spread), (STRANGE_SHARE, STRANGE_SPREAD)):
            z = math.log(at_s / self.median_s) / spread
            ends += share * math.exp(-z * z / 2) / (at_s * spread * math.sqrt(2 * math.pi))
            lasts += share * math.erfc(z / math.sqrt(2)) / 2
        return ends / lasts if lasts > 0 else 0.0


Taken = tuple[str, float | None, float]  # a task's quality, EvoLink's estimate and what it took, in seconds


def expected(quality: str, estimate_s: float | None, taken: Sequence[Taken]) -> Expected:
    """What to expect of a task, from what the account's last ones took, the newest last.

    The estimate where it has shown to mean something, else the median of the recent ones, else the usual one.
    """
    told = [one for one in taken if one[1]][-2 * RECENT :]
    if estimate_s and len(told) >= 2 * ENOUGH:
        errors = [math.log(took / (said or took)) for _, said, took in told]
        without = [math.log(took / _median(name, taken)) for name, _, took in told]
        if stdev(errors) < NEARER * stdev(without):
            return Expected(estimate_s * math.exp(fmean(errors)), max(stdev(errors), USUAL_SPREAD / 2))
    usual = _median(quality, taken)
    if estimate_s is not None and len(_own(quality, taken)) < ENOUGH and estimate_s < usual / MUCH_SHORTER:
        usual = max(estimate_s, READ_MIN_S / 4)
    return Expected(usual)


def _own(quality: str, taken: Sequence[Taken]) -> list[float]:
    return [took for name, _, took in taken if name == quality][-RECENT:]


def _median(quality: str, taken: Sequence[Taken]) -> float:
    own = _own(quality, taken)
    return median(own) if len(own) >= ENOUGH else TYPICAL_S.get(quality, DEFAULT_TYPICAL_S)


@dataclass(slots=True)
class Schedule:
    """When to read one task next. `draw` gives random numbers in [0, 1)."""

    expected: Expected = field(default_factory=Expected)
    draw: Callable[[], float] = random.random
    _sprints: int = 0
    _progress: float = 0.0
    _still: int = 0
    _trusted: bool = True

    def next_s(self, elapsed_s: float, progress: float | None = None) -> float:
        """Seconds from now until the next read; `elapsed_s` seconds after the task was accepted, at `progress` percent."""
        base = self.expected.rest_s(elapsed_s)
        return self._stretch(base, elapsed_s, progress) * (0.9 + 0.2 * self.draw())

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
            return min(SPRINT_S, base) if self._sprints <= SPRINT_READS else base
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
