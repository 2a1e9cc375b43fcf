"""When to look next: the schedule's promises, over many tasks, without any time passing."""

from __future__ import annotations

import random

import pytest

from evolink_mcp.studio.schedule import (
    BACKOFF_MAX_S,
    BACKOFF_MIN_S,
    FIRST_READ_S,
    SPRINT_READS,
    SPRINT_S,
    RetryBudget,
    Schedule,
    backoff_s,
)

JITTER = 0.1
ELAPSED = [4.0, 12.5, 62.5, 63.0, 90.0, 125.0, 600.0, 86_400.0]


def middle() -> float:
    """A draw that adds no jitter."""
    return 0.5


def plain(elapsed_s: float) -> float:
    """The rhythm as it is promised: 4 % of the elapsed time, between 2.5 and 5 seconds."""
    return min(max(0.04 * elapsed_s, 2.5), 5.0)


def later(schedule: Schedule) -> Schedule:
    """The same schedule after its first look."""
    schedule.next_s(0.0)
    return schedule


@pytest.mark.parametrize(
    ("estimate_s", "first_s"),
    [
        pytest.param(None, FIRST_READ_S, id="no estimate"),
        pytest.param(10.0, 3.0, id="never before three seconds"),
        pytest.param(30.0, 9.0, id="three tenths of the estimate"),
        pytest.param(50.0, 15.0, id="exactly at the most"),
        pytest.param(1000.0, 15.0, id="never after fifteen seconds"),
        pytest.param(3.0, 3.0, id="at the least"),
        pytest.param(1.0, 1.0, id="a shorter estimate is itself the time to look"),
        pytest.param(0.0, 0.0, id="done at once"),
    ],
)
def test_the_first_look_follows_the_estimate(estimate_s: float | None, first_s: float) -> None:
    assert first_s == pytest.approx(Schedule(estimate_s, middle).next_s(0.0))


@pytest.mark.parametrize("elapsed_s", ELAPSED)
def test_then_the_rhythm_slows_with_the_age_of_the_task(elapsed_s: float) -> None:
    assert plain(elapsed_s) == pytest.approx(later(Schedule(30.0, middle)).next_s(elapsed_s))


@pytest.mark.parametrize("elapsed_s", ELAPSED)
def test_a_task_taken_up_again_is_not_waited_for_like_a_new_one(elapsed_s: float) -> None:
    """A server that restarts looks at an old task in the plain rhythm, not after another 15 seconds."""
    assert plain(elapsed_s) == pytest.approx(Schedule(100.0, middle).next_s(elapsed_s))


@pytest.mark.parametrize("draw", [0.0, 0.25, 0.999999])
def test_jitter_stays_within_a_tenth(draw: float) -> None:
    for elapsed_s in ELAPSED:
        assert abs(later(Schedule(30.0, lambda: draw)).next_s(elapsed_s) / plain(elapsed_s) - 1) <= JITTER + 1e-9


def test_a_rest_is_never_long_and_never_nothing_whatever_is_told() -> None:
    dice = random.Random(1)
    for _ in range(300):
        schedule = Schedule(dice.choice([None, 0.5, 20.0, 90.0, 1e9]), dice.random)
        elapsed_s = schedule.next_s(0.0)
        for _ in range(60):
            rest_s = schedule.next_s(elapsed_s, dice.choice([None, 0.0, 5.0, 100.0, dice.uniform(0, 100)]))
            assert SPRINT_S * (1 - JITTER) <= rest_s <= 2 * 5.0 * (1 + JITTER)
            elapsed_s += rest_s


def test_honest_progress_spares_looks_but_never_more_than_half_of_them() -> None:
    schedule = later(Schedule(100.0, middle))
    for elapsed_s in (10.0, 20.0, 40.0, 60.0):
        assert 2 * plain(elapsed_s) == pytest.approx(schedule.next_s(elapsed_s, progress=elapsed_s))


def test_near_the_end_the_stretch_shrinks_to_what_is_left() -> None:
    schedule = later(Schedule(100.0, middle))
    schedule.next_s(80.0, progress=80.0)
    assert pytest.approx(schedule.next_s(88.0, progress=88.0)) == (100.0 - 88.0) / 2


def test_the_sprint_is_short() -> None:
    schedule = later(Schedule(100.0, middle))
    rests = [schedule.next_s(90.0 + n, progress=90.0 + n / 10) for n in range(SPRINT_READS + 3)]
    assert pytest.approx(rests[:SPRINT_READS]) == [SPRINT_S] * SPRINT_READS
    assert rests[SPRINT_READS:] == pytest.approx([plain(90.0 + n) for n in range(SPRINT_READS, SPRINT_READS + 3)])


@pytest.mark.parametrize("progress", [None, 0.0, 4.9])
def test_progress_that_says_nothing_changes_nothing(progress: float | None) -> None:
    schedule = later(Schedule(100.0, middle))
    for elapsed_s in (20.0, 40.0, 80.0):
        assert plain(elapsed_s) == pytest.approx(schedule.next_s(elapsed_s, progress=progress))


def test_progress_that_fell_once_is_never_believed_again() -> None:
    schedule = later(Schedule(100.0, middle))
    schedule.next_s(20.0, progress=50.0)
    rests = [schedule.next_s(elapsed_s, progress) for elapsed_s, progress in ((30.0, 40.0), (40.0, 60.0), (50.0, 95.0))]
    assert [plain(30.0), plain(40.0), plain(50.0)] == pytest.approx(rests)


def test_a_look_without_progress_does_not_spoil_belief() -> None:
    schedule = later(Schedule(100.0, middle))
    schedule.next_s(20.0, progress=20.0)
    assert plain(25.0) == pytest.approx(schedule.next_s(25.0))
    assert 2 * plain(30.0) == pytest.approx(schedule.next_s(30.0, progress=30.0))


def test_progress_that_stands_still_is_believed_for_one_look_only() -> None:
    schedule = later(Schedule(100.0, middle))
    rests = [schedule.next_s(30.0, progress=50.0) for _ in range(4)]
    assert pytest.approx(rests) == [5.0, 5.0, 2.5, 2.5]
    assert pytest.approx(schedule.next_s(40.0, progress=60.0)) == 5.0


def looked_at(lasts_s: float, schedule: Schedule, told: object) -> tuple[float, int]:
    """Seconds until the end is noticed, and looks before it; `told(elapsed, lasts)` is the progress."""
    elapsed_s, looks, progress = 0.0, 0, None
    while True:
        elapsed_s += schedule.next_s(elapsed_s, progress)
        if elapsed_s >= lasts_s:
            return elapsed_s - lasts_s, looks
        looks += 1
        progress = told(elapsed_s, lasts_s) if callable(told) else None


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


TOLD = [
    pytest.param(None, 32, id="no progress"),
    pytest.param(lambda elapsed, lasts: float(int(100 * elapsed / lasts)), 20, id="honest progress"),
    pytest.param(lambda elapsed, lasts: 10.0 * int(10 * elapsed / lasts), 20, id="progress in tens"),
    pytest.param(lambda elapsed, lasts: 50.0, 32, id="progress that stands still"),
    pytest.param(lambda elapsed, lasts: min(99.0, 160 * elapsed / lasts), 32, id="progress that promises too much"),
]


@pytest.mark.parametrize(("told", "most_looks"), TOLD)
@pytest.mark.parametrize("estimated", [True, False], ids=["estimate", "no estimate"])
def test_the_end_is_noticed_soon(told: object, most_looks: int, estimated: bool) -> None:
    """Mean lag at most 2.6 % of the mean duration and 2.2 s, at most 5 s for 19 of 20."""
    dice = random.Random(7)
    lasting = [lasts for _ in range(3000) if 10.0 <= (lasts := dice.lognormvariate(4.0, 0.55)) <= 130.0]
    lags = sorted(
        looked_at(lasts_s, Schedule(lasts_s * dice.uniform(0.7, 1.4) if estimated else None, dice.random), told)[0]
        for lasts_s in lasting
    )
    assert mean(lags) <= 0.026 * mean(lasting)
    assert mean(lags) <= 2.2
    assert lags[int(0.95 * len(lags))] <= 5.0


@pytest.mark.parametrize(("told", "most_looks"), TOLD)
def test_a_task_of_100_seconds_costs_few_looks(told: object, most_looks: int) -> None:
    dice = random.Random(7)
    looks = [looked_at(100.0, Schedule(100.0, dice.random), told)[1] for _ in range(500)]
    assert mean([float(n) for n in looks]) <= most_looks


def test_a_slow_task_is_noticed_within_ten_seconds_and_a_bit() -> None:
    """The longest rest is twice five seconds, whatever the progress said before."""
    dice = random.Random(7)
    for _ in range(300):
        lag_s, _ = looked_at(
            dice.uniform(200, 3600), Schedule(60.0, dice.random), lambda elapsed, lasts: 5.0 + elapsed / 100
        )
        assert lag_s <= 2 * 5.0 * (1 + JITTER)


@pytest.mark.parametrize("attempt", [0, 1, 2, 3, 10, 1000])
def test_backoff_is_full_jitter_between_half_a_second_and_eight(attempt: int) -> None:
    least, most = backoff_s(attempt, lambda: 0.0), backoff_s(attempt, lambda: 1.0)
    assert least == BACKOFF_MIN_S
    assert most == min(2.0 ** min(attempt, 10), BACKOFF_MAX_S)


def test_an_outage_is_not_amplified() -> None:
    """500 tokens: 35 quick repeats after lost answers, then none until reads succeed again."""
    budget = RetryBudget()
    assert [budget.spend(lost=True) for _ in range(36)] == [True] * 35 + [False]
    assert [budget.spend(lost=False) for _ in range(3)] == [True, True, False]
    for _ in range(5):
        budget.earn()
    assert budget.spend(lost=False)


def test_the_budget_never_grows_beyond_its_capacity() -> None:
    budget = RetryBudget()
    for _ in range(10_000):
        budget.earn()
    assert budget.tokens == budget.capacity
