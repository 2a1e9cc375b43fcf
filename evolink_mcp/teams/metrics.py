"""Metrics and the audit log: subscribers of the studio's events. Nothing depends on them."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass, field

from evolink_mcp.call_context import REQUEST_ID
from evolink_mcp.journal.entry import iso
from evolink_mcp.studio.events import Adopted, Event, Failed, Finished, Polled, Purchased, Saved, Settled
from evolink_mcp.teams.object_store import OPERATIONS as STORE_OPERATIONS

AUDIT = logging.getLogger("evolink_mcp.audit")
# The upper bounds of the histogram of detection lags, in seconds.
LAG_BOUNDS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
CALLBACK_OUTCOMES = ("received", "missed", "refused", "postponed")
# The reasons of refused callers, by the status of the answer. 0: the HTTP request had no token.
REFUSAL_REASONS = {
    0: "missing",
    400: "bad_key",
    401: "invalid",
    403: "forbidden",
    429: "rate_limit",
    503: "unavailable",
}


@dataclass(slots=True)
class Metrics:
    """Counts since the start of the process.

    `purchases` by outcome, `credits` charged by EvoLink, `polls` (HTTP requests that read tasks) by kind, `downloads`
    by outcome. `lags` counts detection lags by the first of LAG_BOUNDS_S that is not exceeded, `lag_s` is their sum.
    `takeovers` counts adopted entries. `answers` counts HTTP answers by route and status, `upstream` EvoLink's answers by
    request and outcome, `callbacks` by outcome, `store_failures` by operation, and `refusals` the refused callers by reason.
    A counter with known labels starts at 0, because Prometheus cannot see the first increase of a counter that appears
    with it.
    """

    purchases: Counter[str] = field(default_factory=Counter[str])
    credits: float = 0.0
    polls: Counter[str] = field(default_factory=Counter[str])
    downloads: Counter[str] = field(default_factory=Counter[str])
    lags: Counter[float] = field(default_factory=Counter[float])
    lag_s: float = 0.0
    takeovers: int = 0
    answers: Counter[tuple[str, int]] = field(default_factory=Counter[tuple[str, int]])
    upstream: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    callbacks: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(CALLBACK_OUTCOMES, 0)))
    store_failures: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(STORE_OPERATIONS, 0)))
    refusals: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(REFUSAL_REASONS.values(), 0)))

    def receive(self, event: Event) -> None:
        """Count one event."""
        match event:
            case Purchased(entry):
                self.purchases[entry.phase] += 1
            case Polled(mode):
                self.polls[mode] += 1
            case Settled(entry, detection_lag_s, has_missed_callback):
                self.callbacks["missed"] += has_missed_callback
                task = entry.task
                credits = task.credits_used if task is not None and task.charged == "yes" else None
                self.count_settled(credits, detection_lag_s)
            case Saved():
                self.downloads["saved"] += 1
            case Failed():
                self.downloads["failed"] += 1
            case Adopted():
                self.takeovers += 1
            case _:
                pass

    def count_answer(self, route: str, status: int) -> None:
        """Count an HTTP answer of this server."""
        self.answers[route, status] += 1

    def count_refusal(self, status: int, *, has_token: bool) -> None:
        """Count a refused HTTP request, also one that a server about to end refuses. `has_token`: the request had a token."""
        self.refusals[REFUSAL_REASONS.get(status, "invalid") if has_token else "missing"] += 1

    def count_upstream(self, request: str, outcome: str) -> None:
        """Count an HTTP request to EvoLink."""
        self.upstream[request, outcome] += 1

    def count_callback(self, outcome: str) -> None:
        """Count a callback of EvoLink."""
        self.callbacks[outcome] += 1

    def count_store_failure(self, operation: str) -> None:
        """Count a failed operation of the object store."""
        self.store_failures[operation] += 1

    def count_settled(self, credits: float | None, detection_lag_s: float) -> None:
        """Count a settled task."""
        self.credits += credits or 0.0
        self.lag_s += detection_lag_s
        self.lags[next((bound for bound in LAG_BOUNDS_S if detection_lag_s <= bound), float("inf"))] += 1


@dataclass(frozen=True, slots=True)
class Audit:
    """Write one JSON line for each purchase of a tenant. It contains no prompt and no key."""

    tenant: str

    def receive(self, event: Event) -> None:
        """Write the line when this server's work on a purchase ends: completed, failed, or left to another server."""
        if not isinstance(event, Finished):
            return
        entry = event.entry
        task = entry.task
        credits = 0.0 if entry.charged == "no" else None
        if task is not None and task.settled:
            credits = task.credits_used
        AUDIT.info(
            json.dumps(
                {
                    "when": iso(event.at),
                    "tenant": self.tenant or None,
                    "client": event.client,
                    "request": REQUEST_ID.get(),  # the job's coroutine has the ID of the HTTP request that bought
                    "task": entry.task_id,
                    "order": entry.key,
                    "credits": credits,
                    "estimate": entry.estimate,
                    "charged": entry.charged,
                    "outcome": entry.status if task else entry.phase,
                },
                ensure_ascii=True,
            )
        )
