"""Parse times of callers: today, yesterday, 7d, or ISO 8601, in local time."""

from __future__ import annotations

import re
from datetime import datetime

from evolink_mcp.errors import Refused
from evolink_mcp.sanitize import harmless

DAY_S = 86_400.0
JUST_BEFORE_A_SECOND = 0.999999


def start_of_day(now: float) -> float:
    """Return the local midnight before `now` in epoch seconds."""
    return datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0).timestamp()


def instant(text: str, now: float, *, end: bool = False) -> float:
    """Return a time as epoch seconds. `text` is ISO 8601, today, yesterday, or 7d (seven days before now).

    Without a zone it is local time, like the daily spending limit. With `end` return the last moment of the named day
    or second.

    Raises:
        Refused: the text is not such a time.
    """
    words = text.strip().lower()
    if words in ("today", "yesterday"):
        midnight = start_of_day(now)
        if words == "yesterday":
            midnight = start_of_day(midnight - 1)  # a day can have 23 or 25 hours
        return _end_of_day(midnight) if end else midnight
    if days := re.fullmatch(r"([0-9]{1,4}) ?d(?:ays?)?", words):
        return now - int(days[1]) * DAY_S
    try:
        moment = datetime.fromisoformat(text.strip()).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise Refused(
            f"the time “{harmless(text, 40)}” is not understood",
            code="invalid_arguments",
            advice="Use a form like 2026-11-22, 2026-11-22T10:00:00Z, today, yesterday or 7d.",
        ) from error
    if not end:
        return moment
    if re.fullmatch(r"[0-9]{4}-?[0-9]{2}-?[0-9]{2}", words):
        return _end_of_day(moment)
    return moment if "." in words else moment + JUST_BEFORE_A_SECOND


def _end_of_day(midnight: float) -> float:
    # A day may have 23 or 25 hours.
    return start_of_day(midnight + 1.5 * DAY_S) - 1 + JUST_BEFORE_A_SECOND
