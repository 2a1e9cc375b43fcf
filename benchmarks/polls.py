"""Simulate the poll schedule: the detection lag and the number of polls.

No real time passes. The qualities low, medium and high occur 1:2:1. Half of their tasks take less than 10, 48 and 126 s, as
EvoLink published; the durations are log-normal. Earlier durations improve the schedule of later tasks, as in a server. Only
polls of the unfinished task count, because each schedule needs the poll that detects the end.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

from benchmarks.figures import Figure, share
from evolink_mcp.api.models import TYPICAL_S
from evolink_mcp.studio.schedule import DURATIONS_MAX, Duration, Schedule, expected

TITLE = "Polls"
FIXED_S = 3.5
CONSTANT_S = 100.0  # the estimate that EvoLink's page shows
PHASE_TASKS = 40
Progress = Callable[[float, float], float]
Next = Callable[[float, float | None], float]


@dataclass(frozen=True, slots=True)
class Trial:
    """The tasks of a trial.

    `spread`: spread of durations around their median. `estimate(duration_s, dice)`: EvoLink's estimate in seconds. `factor(n)`:
    the factor of the duration of task n.
    """

    spread: float = 0.35
    estimate: Callable[[float, random.Random], float | None] = lambda duration_s, dice: CONSTANT_S
    factor: Callable[[int], float] = lambda number: 1.0
    progress: Progress | None = None


TRIALS = {
    "spread 0.35": Trial(),
    "spread 0.6": Trial(0.6),
    "no estimate": Trial(estimate=lambda duration_s, dice: None),
    "estimates wrong by −30 to +40 %": Trial(estimate=lambda duration_s, dice: duration_s * dice.uniform(0.7, 1.4)),
    f"twice as long, every other {PHASE_TASKS} tasks": Trial(
        factor=lambda number: 2.0 if number // PHASE_TASKS % 2 else 1.0
    ),
    f"half as long, every other {PHASE_TASKS} tasks": Trial(
        factor=lambda number: 0.5 if number // PHASE_TASKS % 2 else 1.0
    ),
    "spread 0.6, and twice as long": Trial(0.6, factor=lambda number: 2.0 if number // PHASE_TASKS % 2 else 1.0),
    "correct progress": Trial(progress=lambda elapsed, duration_s: float(int(100 * elapsed / duration_s))),
    "constant progress": Trial(progress=lambda elapsed, duration_s: 50.0),
}


def run(quick: bool) -> list[Figure]:
    task_count = 1_000 if quick else 4_000
    figures: list[Figure] = []
    for name, trial in TRIALS.items():
        scheduled = _Result(trial, task_count)
        fixed = _Result(trial, task_count, fixed_s=FIXED_S)
        # The lag of a fixed interval with as many polls as the schedule. It is half the interval.
        equal_lag_s = fixed.lag * fixed.polls / scheduled.polls
        has_target = name == "spread 0.35"
        figures += [
            Figure(f"mean lag: {name}", scheduled.lag, "s", 1.3 if has_target else None,
                   f"95 % within {scheduled.lag_95:.1f} s; "
                   f"{100 * scheduled.lag / scheduled.duration:.1f} % of the mean duration"),
            Figure(f"polls per task: {name}", scheduled.polls, "", 15 if has_target else None,
                   f"every {FIXED_S} s: {fixed.polls:.1f} polls, lag {fixed.lag:.2f} s"),
            Figure(f"lag ÷ lag of a fixed interval with as many polls: {name}", scheduled.lag / equal_lag_s, "×", 1,
                   f"fixed: {equal_lag_s:.2f} s"),
        ]  # fmt: skip
    return figures


class _Result:
    """The result of a trial with many tasks, the same for each schedule. Lags and durations are in seconds."""

    def __init__(self, trial: Trial, task_count: int, *, fixed_s: float | None = None) -> None:
        dice, jitter = random.Random(20), random.Random(21)
        lags: list[float] = []
        polls: list[int] = []
        durations: list[float] = []
        earlier_durations: list[Duration] = []
        for number in range(task_count):
            quality = dice.choice(["low", "medium", "medium", "high"])
            duration_s = TYPICAL_S[quality] * trial.factor(number) * dice.lognormvariate(0.0, trial.spread)
            estimate = trial.estimate(duration_s, dice)
            if fixed_s is None:
                schedule: Next = Schedule(
                    expected(quality, estimate, earlier_durations[-DURATIONS_MAX:]), jitter.random
                ).next_s
            else:
                schedule = _fixed(fixed_s, jitter)
            lag, poll_count = _poll_to_end(duration_s, schedule, trial.progress)
            lags.append(lag)
            polls.append(poll_count)
            durations.append(duration_s)
            earlier_durations.append((quality, estimate, duration_s + lag))
        self.lag = mean(lags)
        self.polls = mean(polls)
        self.lag_95 = share(lags, 0.95)
        self.duration = mean(durations)


def _fixed(every_s: float, dice: random.Random) -> Next:
    """Return a fixed interval with a random first poll, because the end can fall anywhere in the interval."""
    first = [every_s * dice.random()]
    return lambda elapsed, progress: first.pop() if first else every_s


def _poll_to_end(duration_s: float, next_s: Next, progress: Progress | None) -> tuple[float, int]:
    """Return the seconds between the end and its detection, and the number of polls before."""
    elapsed = 0.0
    last_progress: float | None = None
    polls = 0
    while True:
        elapsed += next_s(elapsed, last_progress)
        if elapsed >= duration_s:
            return elapsed - duration_s, polls
        polls += 1
        last_progress = progress(elapsed, duration_s) if progress else None
