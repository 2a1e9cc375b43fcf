"""The poll schedule, tested with many simulated tasks and without real time."""

from __future__ import annotations

import random

import pytest

from evolink_mcp.api.models import TYPICAL_S
from evolink_mcp.studio.schedule import (
    BACKOFF_MAX_S,
    BACKOFF_MIN_S,
    ENOUGH_TASKS,
    RECENT_TASKS,
    REST_MIN_S,
    REST_OLD_MAX_S,
    SPRINT_POLLS,
    SPRINT_S,
    Duration,
    Expected,
    RetryBudget,
    Schedule,
    backoff_s,
    expected,
)

JITTER = 0.1
ELAPSED = [0.0, 4.0, 12.5, 40.0, 62.5, 90.0, 125.0, 600.0, 86_400.0]
MEDIUM = Expected(TYPICAL_S["medium"])


def middle() -> float:
    """Return the random number that adds no jitter."""
    return 0.5


def next_wait_s(elapsed_s: float, expectation: Expected = MEDIUM) -> float:
    """Return the time until the next poll without progress."""
    return expectation.rest_s(elapsed_s)


# --- the expected duration ---


@pytest.mark.parametrize("quality", TYPICAL_S)
@pytest.mark.parametrize("estimate_s", [None, 100.0, 45.0, 1e9, float("inf")])
def test_without_experience_the_published_median_of_the_quality_is_expected(
    quality: str, estimate_s: float | None
) -> None:
    assert expected(quality, estimate_s, []).median_s == TYPICAL_S[quality]


def test_another_quality_is_taken_for_medium() -> None:
    assert expected("strange", None, []).median_s == TYPICAL_S["medium"]


def test_an_estimate_that_is_much_shorter_is_used_at_once() -> None:
    assert expected("high", 8.0, []).median_s == 8.0
    assert next_wait_s(0.0, expected("low", 0.0, [])) == REST_MIN_S


def test_the_accounts_own_recent_tasks_replace_the_median() -> None:
    old: list[Duration] = [("high", 100.0, 900.0)] * 20
    recent: list[Duration] = [("high", 100.0, float(duration_s)) for duration_s in range(60, 60 + RECENT_TASKS)]
    assert expected("high", 100.0, [*old, *recent]).median_s == pytest.approx(65.5)
    assert expected("high", 100.0, recent[: ENOUGH_TASKS - 1]).median_s == TYPICAL_S["high"]
    assert expected("low", 100.0, recent).median_s == TYPICAL_S["low"]


def test_an_estimate_is_used_if_earlier_estimates_were_more_accurate() -> None:
    dice = random.Random(1)
    durations = [dice.lognormvariate(4.0, 0.6) for _ in range(30)]
    accurate: list[Duration] = [("medium", duration_s / 1.2, duration_s) for duration_s in durations]
    assert expected("medium", 30.0, accurate).median_s == pytest.approx(36.0)
    constant: list[Duration] = [("medium", 100.0, duration_s) for duration_s in durations]
    assert expected("medium", 30.0, constant) == expected("medium", None, constant)


# --- the time between polls ---


def test_polls_are_frequent_near_the_expected_end() -> None:
    first, at_the_median, long_after = next_wait_s(0.0), next_wait_s(48.0), next_wait_s(480.0)
    assert first > 5 * at_the_median
    assert at_the_median < long_after <= REST_OLD_MAX_S


@pytest.mark.parametrize("draw", [0.0, 0.25, 0.999999])
def test_jitter_stays_within_a_tenth(draw: float) -> None:
    for elapsed_s in ELAPSED:
        assert abs(Schedule(MEDIUM, lambda: draw).next_s(elapsed_s) / next_wait_s(elapsed_s) - 1) <= JITTER + 1e-9


def test_the_time_between_polls_is_positive_for_any_progress() -> None:
    dice = random.Random(1)
    for _ in range(300):
        expectation = expected(dice.choice(["low", "high"]), dice.choice([None, 0.0, 0.5, 20.0, 90.0, 1e9]), [])
        schedule = Schedule(expectation, dice.random)
        elapsed_s = schedule.next_s(0.0)
        for _ in range(60):
            rest_s = schedule.next_s(elapsed_s, dice.choice([None, 0.0, 5.0, 100.0, dice.uniform(0, 100)]))
            longest = max(0.4 * expectation.median_s, REST_OLD_MAX_S)
            assert REST_MIN_S * (1 - JITTER) <= rest_s <= 2 * longest * (1 + JITTER)
            elapsed_s += rest_s


def test_correct_progress_saves_at_most_half_of_the_polls() -> None:
    schedule = Schedule(MEDIUM, middle)
    for elapsed_s in (20.0, 40.0, 60.0):
        assert 2 * next_wait_s(elapsed_s) == pytest.approx(schedule.next_s(elapsed_s, progress=elapsed_s / 1.2))


def test_near_the_end_the_interval_is_half_of_the_remaining_time() -> None:
    expectation = Expected(100.0)
    left_s = 80.0 * (100 - 88) / 88
    assert next_wait_s(80.0, expectation) < left_s / 2 < 2 * next_wait_s(80.0, expectation)
    assert pytest.approx(Schedule(expectation, middle).next_s(80.0, progress=88.0)) == left_s / 2


def test_the_number_of_frequent_polls_is_limited() -> None:
    slow = Expected(200.0)
    schedule = Schedule(slow, middle)
    rests = [schedule.next_s(90.0 + n, progress=90.0 + n / 10) for n in range(SPRINT_POLLS + 3)]
    assert pytest.approx(rests[:SPRINT_POLLS]) == [SPRINT_S] * SPRINT_POLLS
    assert rests[SPRINT_POLLS:] == pytest.approx(
        [next_wait_s(90.0 + n, slow) for n in range(SPRINT_POLLS, SPRINT_POLLS + 3)]
    )


@pytest.mark.parametrize("progress", [None, 0.0, 4.9])
def test_unusable_progress_changes_nothing(progress: float | None) -> None:
    schedule = Schedule(MEDIUM, middle)
    for elapsed_s in (20.0, 40.0, 80.0):
        assert next_wait_s(elapsed_s) == pytest.approx(schedule.next_s(elapsed_s, progress=progress))


def test_progress_that_fell_once_is_ignored_from_then_on() -> None:
    schedule = Schedule(MEDIUM, middle)
    schedule.next_s(20.0, progress=50.0)
    rests = [schedule.next_s(elapsed_s, progress) for elapsed_s, progress in ((30.0, 40.0), (40.0, 60.0), (50.0, 95.0))]
    assert [next_wait_s(30.0), next_wait_s(40.0), next_wait_s(50.0)] == pytest.approx(rests)


def test_a_poll_without_progress_does_not_make_later_progress_untrusted() -> None:
    schedule = Schedule(MEDIUM, middle)
    schedule.next_s(20.0, progress=20.0)
    assert next_wait_s(35.0) == pytest.approx(schedule.next_s(35.0))
    assert 2 * next_wait_s(40.0) == pytest.approx(schedule.next_s(40.0, progress=40.0))


def test_unchanged_progress_is_used_for_one_poll_only() -> None:
    schedule = Schedule(MEDIUM, middle)
    rests = [schedule.next_s(40.0, progress=50.0) for _ in range(4)]
    assert pytest.approx(rests) == [2 * next_wait_s(40.0)] * 2 + [next_wait_s(40.0)] * 2
    assert pytest.approx(schedule.next_s(50.0, progress=60.0)) == 2 * next_wait_s(50.0)


def poll_to_end(lasts_s: float, schedule: Schedule, progress_at: object) -> tuple[float, int]:
    """Return the seconds from the end to its detection, and the polls before. `progress_at(elapsed, lasts)` is the progress."""
    elapsed_s, polls, progress = 0.0, 0, None
    while True:
        elapsed_s += schedule.next_s(elapsed_s, progress)
        if elapsed_s >= lasts_s:
            return elapsed_s - lasts_s, polls
        polls += 1
        progress = progress_at(elapsed_s, lasts_s) if callable(progress_at) else None


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


CORRECT_PROGRESS = pytest.param(lambda elapsed, lasts: float(int(100 * elapsed / lasts)), id="honest progress")
PROGRESSES = [
    pytest.param(None, id="no progress"),
    CORRECT_PROGRESS,
    pytest.param(lambda elapsed, lasts: 10.0 * int(10 * elapsed / lasts), id="progress in tens"),
    pytest.param(lambda elapsed, lasts: 50.0, id="progress that stands still"),
    pytest.param(lambda elapsed, lasts: min(99.0, 160 * elapsed / lasts), id="progress that promises too much"),
]


@pytest.mark.parametrize("progress_at", PROGRESSES)
def test_the_end_is_detected_soon_with_few_polls(progress_at: object) -> None:
    """The qualities occur 1:2:1 and the estimate is constant. At most 15 polls, and a shorter lag than with a fixed interval."""
    dice = random.Random(7)
    results: list[tuple[float, int]] = []
    durations: list[float] = []
    for _ in range(800):
        quality = dice.choice(["low", "medium", "medium", "high"])
        durations.append(TYPICAL_S[quality] * dice.lognormvariate(0.0, 0.35))
        results.append(poll_to_end(durations[-1], Schedule(expected(quality, 100.0, []), dice.random), progress_at))
    lags, polls_mean = sorted(lag for lag, _ in results), mean([float(polls) for _, polls in results])
    assert polls_mean <= 15
    assert mean(lags) <= (1.3 if progress_at is None else 1.7)
    assert lags[int(0.95 * len(lags))] <= 5.0
    assert mean(lags) <= 0.75 * mean(durations) / polls_mean / 2  # the lag of a fixed interval with as many polls


@pytest.mark.parametrize("spread", [0.35, 0.6])
@pytest.mark.parametrize("times", [0.5, 1.0, 2.0])
def test_with_wrong_expectations_the_schedule_is_no_worse_than_a_fixed_interval(spread: float, times: float) -> None:
    """The server learns nothing here, so the usual medians are wrong by this factor."""
    dice = random.Random(7)
    results: list[tuple[float, int]] = []
    durations: list[float] = []
    for _ in range(600):
        quality = dice.choice(["low", "medium", "medium", "high"])
        durations.append(times * TYPICAL_S[quality] * dice.lognormvariate(0.0, spread))
        results.append(poll_to_end(durations[-1], Schedule(expected(quality, 100.0, []), dice.random), None))
    polls_mean = mean([float(polls) for _, polls in results])
    assert mean([lag for lag, _ in results]) <= mean(durations) / polls_mean / 2


def test_the_end_of_a_slow_task_is_detected_within_about_ten_seconds() -> None:
    """The longest interval of an old task is twice five seconds, for any earlier progress."""
    dice = random.Random(7)
    for _ in range(300):
        lag_s, _ = poll_to_end(
            dice.uniform(200, 3600), Schedule(MEDIUM, dice.random), lambda elapsed, lasts: 5.0 + elapsed / 100
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
    assert [budget.spend(is_lost=True) for _ in range(36)] == [True] * 35 + [False]
    assert [budget.spend(is_lost=False) for _ in range(3)] == [True, True, False]
    for _ in range(5):
        budget.earn()
    assert budget.spend(is_lost=False)


def test_the_budget_never_grows_beyond_its_capacity() -> None:
    budget = RetryBudget()
    for _ in range(10_000):
        budget.earn()
    assert budget.tokens == budget.capacity
