"""Times as people say them: today, yesterday, 7d, or ISO 8601; days are the user's own."""

from __future__ import annotations

import re
from datetime import datetime

from evolink_mcp.errors import Refused
from evolink_mcp.sanitize import harmless

DAY_S = 86_400.0
JUST_BEFORE_A_SECOND = 0.999999


def start_of_day(now: float) -> float:
    """Local midnight before `now`, in epoch seconds."""
    return datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0).timestamp()


def instant(text: str, now: float, *, end: bool = False) -> float:
    """A time in words as epoch seconds: ISO 8601, today, yesterday, or 7d (so many days before now).

    Local time where no zone is given, as for the caps, which count the user's days. With `end` the last moment of what
    is named: of a day, or of a second.

    Raises:
        Refused: it is no such time.
    """
    said = text.strip().lower()
    if said in ("today", "yesterday"):
        midnight = start_of_day(now - (DAY_S if said == "yesterday" else 0))
        return _end_of_day(midnight) if end else midnight
    if days := re.fullmatch(r"([0-9]{1,4}) ?d(?:ays?)?", said):
        return now - int(days[1]) * DAY_S
    try:
        moment = datetime.fromisoformat(text.strip()).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise Refused(
            f"“{harmless(text, 40)}” is no time that can be read here",
            code="invalid_arguments",
            advice="Give something like 2026-11-22, 2026-11-22T10:00:00Z, today, yesterday or 7d.",
        ) from error
    if not end:
        return moment
    if re.fullmatch(r"[0-9]{4}-?[0-9]{2}-?[0-9]{2}", said):
        return _end_of_day(moment)
    return moment if "." in said else moment + JUST_BEFORE_A_SECOND


def _end_of_day(midnight: float) -> float:
    # Not simply 24 hours later: a day may have 23 or 25.
    return start_of_day(midnight + 1.5 * DAY_S) - 1 + JUST_BEFORE_A_SECOND
