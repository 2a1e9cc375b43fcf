"""The schedule of looks by simulation: how late the end is noticed, and at the price of how many looks.

No real time passes. A task lasts 10 to 130 s: log-normal, half of them below 52 s, nine of ten between 22 and 109 s.
Counted are looks at the unfinished task, which EvoLink pays for; the one that finds the end is needed in any case.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import mean

from benchmarks.figures import Figure, share
from evolink_mcp.studio.schedule import Schedule

TITLE = "Looks"
SHORTEST_S, LONGEST_S = 10.0, 130.0
Progress = Callable[[float, float], float | None]
Next = Callable[[float, float | None], float]


def run(quick: bool) -> list[Figure]:
    times = 4_000 if quick else 20_000
    estimated, unestimated = _Trial(times, estimate=True), _Trial(times, estimate=False)
    honest = _Trial(times, estimate=True, progress=_honest)
    honest_unestimated = _Trial(times, estimate=False, progress=_honest)
    stuck = _Trial(times, estimate=True, progress=lambda elapsed, lasts: 50.0)
    fixed = {seconds: _Trial(times, fixed_s=seconds) for seconds in (2.0, 5.0)}
    trials = {
        "with an estimate": estimated,
        "without": unestimated,
        "with honest progress": honest,
        "honest progress, no estimate": honest_unestimated,
        "progress that stands still": stuck,
    }
    figures = [Figure(f"mean lag ÷ mean duration, {name}", 100 * t.relative, "%", 2.6) for name, t in trials.items()]
    figures += [Figure(f"mean lag, {name}", t.lag, "s", 2.2) for name, t in trials.items()]
    figures += [Figure(f"lag of the slowest 5 %, {name}", t.late, "s", 5) for name, t in trials.items()]
    figures += [
        Figure("looks at a 100 s task, with an estimate", estimated.looks_100, "", 32),
        Figure("looks at a 100 s task, with an estimate and honest progress", honest.looks_100, "", 20),
        Figure("looks at a 100 s task, without an estimate", unestimated.looks_100, "", None,
               "the first look comes at 9 s, not at 15 s"),
        Figure("looks at a 100 s task, honest progress, no estimate", honest_unestimated.looks_100, ""),
        Figure("looks a task, every 2 s ÷ ours with an estimate", fixed[2.0].looks / estimated.looks, "×", None,
               f"{fixed[2.0].looks:.1f} and {estimated.looks:.1f} looks, lag {fixed[2.0].lag:.2f} and {estimated.lag:.2f} s"),
        Figure("looks a task, every 5 s ÷ ours with an estimate", fixed[5.0].looks / estimated.looks, "×", None,
               f"{fixed[5.0].looks:.1f} and {estimated.looks:.1f} looks, lag {fixed[5.0].lag:.2f} and {estimated.lag:.2f} s"),
        Figure("lag, every 5 s ÷ ours with honest progress", fixed[5.0].lag / honest.lag, "×", None,
               f"for {fixed[5.0].looks:.1f} and {honest.looks:.1f} looks"),
    ]  # fmt: skip
    return figures


class _Trial:
    """Many tasks, the same ones for every trial; lags in seconds."""

    def __init__(
        self, times: int, *, estimate: bool = False, progress: Progress | None = None, fixed_s: float | None = None
    ) -> None:
        dice = random.Random(20)
        lags: list[float] = []
        looks: list[int] = []
        durations: list[float] = []
        for _ in range(times):
            lasts, error = _duration(dice), dice.uniform(0.7, 1.4)
            lag, seen = _watched(lasts, _next(estimate, lasts * error, fixed_s, dice), progress)
            lags.append(lag)
            looks.append(seen)
            durations.append(lasts)
        self.lag, self.looks, self.late = mean(lags), mean(looks), share(lags, 0.95)
        self.relative = self.lag / mean(durations)
        hundred = [_watched(100.0, _next(estimate, 100.0, fixed_s, dice), progress)[1] for _ in range(times // 4)]
        self.looks_100 = mean(hundred)


def _duration(dice: random.Random) -> float:
    while True:
        if SHORTEST_S <= (lasts := dice.lognormvariate(4.0, 0.55)) <= LONGEST_S:
            return lasts


def _next(estimate: bool, estimate_s: float, fixed_s: float | None, dice: random.Random) -> Next:
    if fixed_s is not None:
        # A fixed rhythm meets the end at any phase: only its first look is drawn.
        first = [fixed_s * dice.random()]
        return lambda elapsed, progress: first.pop() if first else fixed_s
    return Schedule(estimate_s if estimate else None, dice.random).next_s


def _watched(lasts_s: float, next_s: Next, progress: Progress | None) -> tuple[float, int]:
    """Seconds between the end and the look that finds it, and the looks before."""
    elapsed, told, looks = 0.0, None, 0
    while True:
        elapsed += next_s(elapsed, told)
        if elapsed >= lasts_s:
            return elapsed - lasts_s, looks
        looks += 1
        told = progress(elapsed, lasts_s) if progress else None


def _honest(elapsed: float, lasts: float) -> float:
    return float(int(100 * elapsed / lasts))
