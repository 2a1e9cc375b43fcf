"""The sums of credits as `list_tasks` and the command line show them."""

from __future__ import annotations

from collections.abc import Mapping

from evolink_mcp.api.costs import usd
from evolink_mcp.journal.journal import Sums
from evolink_mcp.studio.times import DAY_S, start_of_day

_TITLES = {"today": "today", "7d": "7 days", "30d": "30 days"}


def periods(now: float) -> dict[str, float]:
    """Return the start of each period in epoch seconds: the local day of `now`, and the last 7 and 30 days."""
    return {"today": start_of_day(now), "7d": now - 7 * DAY_S, "30d": now - 30 * DAY_S}


def amount(credits: float) -> dict[str, float]:
    """Return credits with their public price in US dollars."""
    return {"credits": credits, "usd": usd(credits)}


def sums_text(sums: Mapping[str, Sums]) -> str:
    """Return the sums of the periods as two sentences: confirmed charges, then reserved credits."""
    spent = f"Spent: {_amounts({name: each.spent for name, each in sums.items()})}."
    if not any(each.reserved for each in sums.values()):
        return f"{spent} Reserved: 0."
    reserved = _amounts({name: each.reserved for name, each in sums.items()})
    return f"{spent} Reserved for undecided charges: {reserved}."


def _amounts(credits: Mapping[str, float]) -> str:
    """Return the amounts of the periods. Only the first one names the unit, because the list has a size limit."""
    texts = [f"{_TITLES[name]} {value:g} (${usd(value):g})" for name, value in credits.items()]
    return ", ".join([texts[0].replace(" (", " credits (", 1), *texts[1:]])
