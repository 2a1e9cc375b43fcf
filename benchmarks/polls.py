"""The rhythm of looks by simulation: how late the end is noticed, and at the price of how many looks.

No real time passes. Qualities low, medium and high come 1:2:1; their tasks last as EvoLink has published it (half of
them less than 10, 48 and 126 s), log-normal. The duration of one task improves the schedule of the next, as in a server.
Counted are looks at the unfinished task, which EvoLink pays for; the one that finds the end is needed in any case.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

from benchmarks.figures import Figure, share
from evolink_mcp.api.models import TYPICAL_S
from evolink_mcp.studio.schedule import DURATIONS_MAX, Duration, Schedule, expected

TITLE = "Looks"
FIXED_S = 3.5
CONSTANT_S = 100.0  # the estimate that EvoLink's page shows
REGIME = 40  # tasks
Progress = Callable[[float, float], float]
Next = Callable[[float, float | None], float]


@dataclass(frozen=True, slots=True)
class Trial:
    """`spread`: of durations around their median. `estimate(lasts, dice)` in s; `times(n)`: how much longer task n lasts."""

    spread: float = 0.35
    estimate: Callable[[float, random.Random], float | None] = lambda lasts, dice: CONSTANT_S
    times: Callable[[int], float] = lambda number: 1.0
    progress: Progress | None = None


TRIALS = {
    "spread 0.35": Trial(),
    "spread 0.6": Trial(0.6),
    "no estimate": Trial(estimate=lambda lasts, dice: None),
    "estimates wrong by −30 to +40 %": Trial(estimate=lambda lasts, dice: lasts * dice.uniform(0.7, 1.4)),
    f"all last twice as long, every other {REGIME} tasks": Trial(
        times=lambda number: 2.0 if number // REGIME % 2 else 1.0
    ),
    f"half as long, every other {REGIME} tasks": Trial(times=lambda number: 0.5 if number // REGIME % 2 else 1.0),
    "spread 0.6, and twice as long": Trial(0.6, times=lambda number: 2.0 if number // REGIME % 2 else 1.0),
    "honest progress": Trial(progress=lambda elapsed, lasts: float(int(100 * elapsed / lasts))),
    "progress that stands still": Trial(progress=lambda elapsed, lasts: 50.0),
}


def run(quick: bool) -> list[Figure]:
    times = 1_000 if quick else 4_000
    figures: list[Figure] = []
    for name, trial in TRIALS.items():
        ours, fixed = _Seen(trial, times), _Seen(trial, times, fixed_s=FIXED_S)
        # A fixed rhythm's lag is half its interval: this one has as many looks as ours.
        as_many = fixed.lag * fixed.looks / ours.looks
        promised = name == "spread 0.35"
        figures += [
            Figure(f"mean lag: {name}", ours.lag, "s", 1.3 if promised else None,
                   f"95 of 100 within {ours.late:.1f} s; {100 * ours.lag / ours.duration:.1f} % of the mean duration"),
            Figure(f"looks a task: {name}", ours.looks, "", 15 if promised else None,
                   f"every {FIXED_S} s: {fixed.looks:.1f} looks, lag {fixed.lag:.2f} s"),
            Figure(f"lag ÷ that of a fixed rhythm with as many looks: {name}", ours.lag / as_many, "×", 1,
                   f"fixed: {as_many:.2f} s"),
        ]  # fmt: skip
    return figures


class _Seen:
    """Many tasks of a trial, the same ones for every rhythm; lags and durations in seconds."""

    def __init__(self, trial: Trial, times: int, *, fixed_s: float | None = None) -> None:
        dice, jitter = random.Random(20), random.Random(21)
        lags: list[float] = []
        looks: list[int] = []
        durations: list[float] = []
        taken: list[Duration] = []
        for number in range(times):
            quality = dice.choice(["low", "medium", "medium", "high"])
            lasts = TYPICAL_S[quality] * trial.times(number) * dice.lognormvariate(0.0, trial.spread)
            estimate = trial.estimate(lasts, dice)
            if fixed_s is None:
                rhythm: Next = Schedule(expected(quality, estimate, taken[-DURATIONS_MAX:]), jitter.random).next_s
            else:
                rhythm = _fixed(fixed_s, jitter)
            lag, seen = _watched(lasts, rhythm, trial.progress)
            lags.append(lag)
            looks.append(seen)
            durations.append(lasts)
            taken.append((quality, estimate, lasts + lag))
        self.lag, self.looks, self.late, self.duration = mean(lags), mean(looks), share(lags, 0.95), mean(durations)


def _fixed(every_s: float, dice: random.Random) -> Next:
    """Return a fixed interval. Only the first poll is random, because the end can have any phase."""
    first = [every_s * dice.random()]
    return lambda elapsed, progress: first.pop() if first else every_s


def _watched(lasts_s: float, next_s: Next, progress: Progress | None) -> tuple[float, int]:
    """Return the detection lag in seconds, and the number of polls before the end."""
    elapsed, told, looks = 0.0, None, 0
    while True:
        elapsed += next_s(elapsed, told)
        if elapsed >= lasts_s:
            return elapsed - lasts_s, looks
        looks += 1
        told = progress(elapsed, lasts_s) if progress else None
