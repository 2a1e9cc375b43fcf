"""Words for days, in local time."""

from __future__ import annotations

import time
from datetime import datetime

import pytest

from evolink_mcp.studio.times import instant


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="Windows cannot change the time zone of a process")
@pytest.mark.parametrize(
    "now",
    [
        pytest.param("2026-03-30T00:30+02:00", id="after a day of 23 hours"),
        pytest.param("2026-10-26T23:30+01:00", id="after a day of 25 hours"),
    ],
)
def test_yesterday_is_the_day_before_today_after_the_clocks_changed(monkeypatch: pytest.MonkeyPatch, now: str) -> None:
    """Central Europe: 30 March 2026 follows a day of 23 hours, 26 October one of 25 hours."""
    moment = datetime.fromisoformat(now)
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        yesterday = datetime.fromtimestamp(instant("yesterday", moment.timestamp()))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert (yesterday.day, yesterday.hour) == (moment.day - 1, 0)
