"""What the studios of this process do, counted: for whoever watches the server. Nothing is decided by it."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass, field

from evolink_mcp.journal.entry import Entry, iso

AUDIT = logging.getLogger("evolink_mcp.audit")
# Seconds within which the end of a task was known: the bounds of a histogram.
LAG_BOUNDS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


@dataclass(slots=True)
class Metrics:
    """Counts since the start of the process.

    `purchases` by their outcome, `credits` that EvoLink charged, `looks` (requests to read tasks) by their kind,
    `downloads` by their outcome. `lags` counts, below each of LAG_BOUNDS_S and above them all, for how long at most a
    task had ended before it was known: since the look before.
    """

    purchases: Counter[str] = field(default_factory=Counter[str])
    credits: float = 0.0
    looks: Counter[str] = field(default_factory=Counter[str])
    downloads: Counter[str] = field(default_factory=Counter[str])
    lags: Counter[float] = field(default_factory=Counter[float])
    lag_s: float = 0.0

    def settled(self, credits: float | None, lag_s: float) -> None:
        """A task was seen to have ended, `lag_s` after it was seen for the last time before."""
        self.credits += credits or 0.0
        self.lag_s += lag_s
        self.lags[next((bound for bound in LAG_BOUNDS_S if lag_s <= bound), float("inf"))] += 1


@dataclass(frozen=True, slots=True)
class Audit:
    """One JSON line for each purchase, when its work ends here; it holds no prompt and no key."""

    tenant: str

    def tell(self, entry: Entry, client: str | None, now: float) -> None:
        """The purchase has ended here, at `now` in epoch seconds: completed, failed, or goes on at another server."""
        task = entry.task
        AUDIT.info(
            json.dumps(
                {
                    "when": iso(now),
                    "tenant": self.tenant or None,
                    "client": client,
                    "task": entry.task_id,
                    "order": entry.key,
                    "credits": task.credits_used if task and task.settled else 0.0 if entry.charged == "no" else None,
                    "estimate": entry.estimate,
                    "charged": entry.charged,
                    "outcome": entry.status if task else entry.phase,
                },
                ensure_ascii=True,
            )
        )
