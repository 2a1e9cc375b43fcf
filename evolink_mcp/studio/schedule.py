"""When to poll a task next. An early poll costs EvoLink a query, a late one costs the user time.

Everything except `DurationHistory` is a pure function.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import Any, cast

from evolink_mcp.api.models import DEFAULT_MODEL, TYPICAL_S, duration_group
from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.entry import Entry
from evolink_mcp.journal.journal import Journal

log = logging.getLogger(__name__)

# The duration of an unknown group.
DEFAULT_TYPICAL_S = TYPICAL_S[DEFAULT_MODEL.default_quality]
# The standard deviation of the logarithm of the durations.
USUAL_SPREAD = 0.4
# One task in ten follows another distribution with a much larger spread.
OUTLIER_SHARE = 0.1
OUTLIER_SPREAD = 1.0
# One poll costs as much as this detection lag.
POLL_COST_S = 0.075
# Two polls of a task are at least this far apart. EvoLink's fastest known image takes 10 s.
REST_MIN_S = 0.7
REST_MAX_SHARE = 0.4  # of the usual duration
REST_MIN_SHARE = 0.025  # of the age of the task
REST_OLD_MAX_S = 5.0  # after the usual duration
ENOUGH_TASKS = 5  # of one quality, to use their median
RECENT_TASKS = 12  # of one quality, that count
# An estimate that is this many times shorter than usual is used at once: EvoLink has changed.
MUCH_SHORTER = 4.0
# EvoLink's estimates are used if their error is below this share of the error of the medians.
ESTIMATE_ERROR_SHARE = 0.7
# From this percentage on, this many polls follow each other faster.
SPRINT_PERCENT = 90.0
SPRINT_POLLS = 5
SPRINT_S = 1.5
# Progress below this percentage, or equal in this many further polls, does not predict the end.
TRUSTED_PERCENT = 5.0
STILL_POLLS = 2
BACKOFF_MIN_S = 0.5
BACKOFF_MAX_S = 8.0
# SLOW_REPEATS_MAX repeats take about two days.
SLOWEST_S = 3600.0
SLOW_REPEATS_MAX = 58
# The stored durations of an account.
DURATIONS_FACT = "durations"
DURATIONS_MAX = 60
WRITE_EVERY = 5  # tasks
COUNTED_MIN_S = 1.0  # shorter durations are ignored

Duration = tuple[str, float | None, float]  # quality, EvoLink's estimate and the true duration, both in seconds


@dataclass(frozen=True, slots=True)
class Expected:
    """The expected duration of a task: the median in seconds, and the standard deviation of the logarithm."""

    median_s: float = DEFAULT_TYPICAL_S
    spread: float = USUAL_SPREAD

    def rest_s(self, elapsed_s: float) -> float:
        """Return the best rest before the next poll, `elapsed_s` seconds after the start.

        Inspection theory: the best interval is √(2·cost ÷ hazard). The hazard is the chance per second that the task
        ends now, if it did not end before.
        """
        rest = REST_MIN_S
        longest = max(REST_MAX_SHARE * self.median_s, REST_MIN_S)
        if elapsed_s >= self.median_s:
            longest = min(longest, REST_OLD_MAX_S)
        while rest < longest and rest * rest * self._hazard(elapsed_s + rest / 2) < 2 * POLL_COST_S:
            rest *= 1.1
        old = min(REST_MIN_SHARE * elapsed_s, REST_OLD_MAX_S)
        return max(min(rest, longest), old)

    def _hazard(self, at_s: float) -> float:
        ends = 0.0
        lasts = 0.0
        for share, spread in ((1 - OUTLIER_SHARE, self.spread), (OUTLIER_SHARE, OUTLIER_SPREAD)):
            z = math.log(at_s / self.median_s) / spread
            ends += share * math.exp(-z * z / 2) / (at_s * spread * math.sqrt(2 * math.pi))
            lasts += share * math.erfc(z / math.sqrt(2)) / 2
        return ends / lasts if lasts > 0 else 0.0


def expected(quality: str, estimate_s: float | None, durations: Sequence[Duration]) -> Expected:
    """Return the expected duration of a task. `durations` are the account's last ones, the newest last.

    Use EvoLink's estimate if its past errors are small, else the median of recent tasks, else the published median.
    """
    estimated = [duration for duration in durations if duration[1]][-2 * RECENT_TASKS :]
    if estimate_s and len(estimated) >= 2 * ENOUGH_TASKS:
        errors = [math.log(took_s / (estimate or took_s)) for _, estimate, took_s in estimated]
        errors_of_medians = [math.log(took_s / _median(name, durations)) for name, _, took_s in estimated]
        if stdev(errors) < ESTIMATE_ERROR_SHARE * stdev(errors_of_medians):
            return Expected(estimate_s * math.exp(fmean(errors)), max(stdev(errors), USUAL_SPREAD / 2))
    usual = _median(quality, durations)
    if (
        estimate_s is not None
        and len(_of_quality(quality, durations)) < ENOUGH_TASKS
        and estimate_s < usual / MUCH_SHORTER
    ):
        usual = max(estimate_s, REST_MIN_S / 4)
    return Expected(usual)


def _of_quality(quality: str, durations: Sequence[Duration]) -> list[float]:
    return [took_s for name, _, took_s in durations if name == quality][-RECENT_TASKS:]


def _median(quality: str, durations: Sequence[Duration]) -> float:
    recent = _of_quality(quality, durations)
    return median(recent) if len(recent) >= ENOUGH_TASKS else TYPICAL_S.get(quality, DEFAULT_TYPICAL_S)


class DurationHistory:
    """The durations of the account's tasks that this server followed from start to end. All servers share them.

    Durations below `counted_min_s` are ignored.
    """

    def __init__(self, journal: Journal, *, counted_min_s: float = COUNTED_MIN_S) -> None:
        self._journal = journal
        self._counted_min_s = counted_min_s
        self._durations: deque[Duration] = deque(maxlen=DURATIONS_MAX)
        self._unwritten = 0
        self._is_read = False

    async def expected(self, entry: Entry) -> Expected:
        """Return the expected duration of the entry's task."""
        if not self._is_read:
            self._is_read = True
            await self._read()
        estimate_s = entry.task.estimated_time_s if entry.task else None
        return expected(_quality(entry), estimate_s, self._durations)

    async def add(self, entry: Entry, took_s: float) -> None:
        """Add the duration of a completed task."""
        if took_s < self._counted_min_s:
            return
        self._durations.append((_quality(entry), entry.task.estimated_time_s if entry.task else None, took_s))
        self._unwritten += 1
        if self._unwritten >= WRITE_EVERY:
            await self.write()

    async def write(self) -> None:
        """Store the new durations. If the journal cannot be written, only this server knows them."""
        if self._unwritten:
            self._unwritten = 0
            try:
                await self._journal.save_fact(DURATIONS_FACT, json.dumps(list(self._durations)))
            except JournalUnwritable as error:
                log.info("%s", error.message)

    async def _read(self) -> None:
        try:
            rows: object = json.loads(await self._journal.fact(DURATIONS_FACT) or "[]")
        except (JournalUnwritable, ValueError, RecursionError):
            return
        for row in cast("list[Any]", rows) if isinstance(rows, list) else []:
            if (duration := self._duration_of(row)) is not None:
                self._durations.append(duration)

    def _duration_of(self, row: Any) -> Duration | None:
        """Return one stored row, or None if it is invalid."""
        try:
            quality, estimate_s, took_s = row
            estimate_s = None if estimate_s is None else float(estimate_s)
            took_s = float(took_s)
        except (TypeError, ValueError, OverflowError):
            return None
        is_valid = math.isfinite(took_s) and took_s >= self._counted_min_s and math.isfinite(estimate_s or 0.0)
        return (str(quality), estimate_s, took_s) if is_valid else None


def _quality(entry: Entry) -> str:
    return duration_group(entry.request.get("model"), entry.request.get("quality"))


@dataclass(slots=True)
class Schedule:
    """The polls of one task. `draw` returns random numbers in [0, 1)."""

    expected: Expected = field(default_factory=Expected)
    draw: Callable[[], float] = random.random
    _sprint_polls: int = 0
    _progress: float = 0.0
    _still_polls: int = 0
    _is_trusted: bool = True

    def next_s(self, elapsed_s: float, progress: float | None = None) -> float:
        """Return the seconds until the next poll, `elapsed_s` seconds after EvoLink accepted the task.

        `progress` is in percent, None if EvoLink did not report it.
        """
        base = self.expected.rest_s(elapsed_s)
        return self._stretch(base, elapsed_s, progress) * (0.9 + 0.2 * self.draw())

    def _stretch(self, base: float, elapsed_s: float, progress: float | None) -> float:
        """Adapt the rest to rising progress: fewer polls far from the end, a few quick ones near it."""
        if progress is None or progress < self._progress:
            self._is_trusted = self._is_trusted and progress is None
            return base
        self._still_polls = 0 if progress > self._progress else self._still_polls + 1
        self._progress = progress
        if not self._is_trusted or progress < TRUSTED_PERCENT:
            return base
        if progress >= SPRINT_PERCENT:
            self._sprint_polls += 1
            return min(SPRINT_S, base) if self._sprint_polls <= SPRINT_POLLS else base
        if self._still_polls >= STILL_POLLS:
            return base
        remaining = elapsed_s * (100 - progress) / progress
        return min(max(remaining / 2, base), 2 * base)


def backoff_s(attempt: int, draw: Callable[[], float] = random.random) -> float:
    """Return a random wait between 0.5 s and a bound that doubles from 1 s to 8 s. `attempt` counts from 0."""
    bound = min(2.0 ** min(attempt, 10), BACKOFF_MAX_S)
    return BACKOFF_MIN_S + (bound - BACKOFF_MIN_S) * draw()


def slower_s(first_s: float, repeat: int) -> float:
    """Return a wait that doubles from `first_s` to one hour. `repeat` counts from 0."""
    return min(first_s * 2.0**repeat, SLOWEST_S)


@dataclass(slots=True)
class RetryBudget:
    """Tokens for quick repeats of failed polls. All tasks share them, so that repeats do not make an outage worse.

    As in botocore's standard mode: 500 tokens, 14 for a lost answer, 5 for any other failure, 1 back per success.
    """

    capacity: int = 500
    tokens: int = field(default=500)

    def spend(self, *, is_lost: bool) -> bool:
        """Pay for one repeat. Return False if there are too few tokens."""
        price = 14 if is_lost else 5
        if self.tokens < price:
            return False
        self.tokens -= price
        return True

    def earn(self) -> None:
        """Return one token after a success."""
        self.tokens = min(self.capacity, self.tokens + 1)
