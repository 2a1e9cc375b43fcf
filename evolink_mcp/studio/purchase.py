"""The purchase: written down before it is sent, sent once, and repeated only when nothing was bought for certain."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial

import anyio

from evolink_mcp.api import costs, sizes
from evolink_mcp.api.client import SUBMIT_DEADLINE_S, EvolinkClient
from evolink_mcp.api.costs import Price
from evolink_mcp.api.request import MODEL, GenerationRequest
from evolink_mcp.api.task import Task
from evolink_mcp.errors import (
    EvolinkError,
    OutcomeUnknown,
    OverBudget,
    Problem,
    RateLimited,
    Rejected,
    Unreachable,
)
from evolink_mcp.journal.contract import Journal
from evolink_mcp.journal.entry import ADOPTED, Entry
from evolink_mcp.studio.jobs import Job, Sleep
from evolink_mcp.studio.recorder import Recorder
from evolink_mcp.studio.schedule import backoff_s

log = logging.getLogger(__name__)

REPEATS_MAX = 2
REPEAT_WITHIN_S = 30.0
CLOCK_SKEW_S = 60.0
# EvoLink makes a purchase's task within this time after the entry was written, if the two clocks agree.
SPAN_S = REPEAT_WITHIN_S + SUBMIT_DEADLINE_S + CLOCK_SKEW_S
# Entries that may own a task that is found by its time. `found` counts too: the user may have called get_task on one
# of two candidates, and that does not make the other one certain.
RIVALS = ("sending", "unknown", "found")
# When the account's list is read for a lost answer: at once, and again because the task may not be listed yet.
RECONCILE_AFTER_S = (0.0, 3.0)
# A prompt up to this long costs less than 0.05 credit: too little to refuse a call that compute_size priced.
PROMPT_TOKENS_FREE = 160


@dataclass(frozen=True, slots=True)
class Budget:
    """Caps in credits, from the settings; None means no cap."""

    per_call: float | None = None
    per_day: float | None = None
    confirm_above: float | None = None


class Purchases:
    """Buys tasks. Every state is in the journal before anything is done because of it."""

    def __init__(
        self,
        client: EvolinkClient,
        journal: Journal,
        recorder: Recorder,
        budget: Budget,
        *,
        sleep: Sleep = anyio.sleep,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._client = client
        self._journal = journal
        self._recorder = recorder
        self._budget = budget
        self._sleep = sleep
        self._draw = draw

    def check_caps(self, price: Price, max_credits: float | None, now: float) -> None:
        """Refuse a price above a cap before anything is sent or uploaded; `intend` judges the day's cap again.

        Raises:
            OverBudget: names the price and the cap.
            JournalUnwritable: what was spent today cannot be read.
        """
        credits = price.credits
        if max_credits is not None and credits > max_credits:
            raise OverBudget(
                f"the computed price is {credits:g} credits (${price.usd:g}), above max_credits={max_credits:g}",
                advice=f"Ask the user; then call again with max_credits={credits:g}, or a smaller size or quality.",
            )
        cap = self._budget.per_call
        if cap is not None and credits > cap:
            raise OverBudget(
                f"the computed price is {credits:g} credits (${price.usd:g}), above the cap of {cap:g} per call",
                advice="Choose a smaller size, quality or n; the cap is EVOLINK_MCP_MAX_CREDITS_PER_CALL.",
            )
        spent = self._journal.spent_since(start_of_day(now))
        if self._budget.per_day is not None and spent + credits > self._budget.per_day:
            raise _over_the_day(credits, spent, self._budget.per_day)

    def intend(self, entry: Entry) -> None:
        """Write a new entry, unless the day's cap forbids it: the check and the entry are one transaction.

        Raises:
            OverBudget: the day's credits would go above EVOLINK_MCP_MAX_CREDITS_PER_DAY.
            JournalUnwritable: nothing may be bought.
        """
        cap = self._budget.per_day
        spent = self._journal.intend(entry, since=start_of_day(entry.created_at), cap=cap)
        if spent is not None and cap is not None:
            raise _over_the_day(entry.estimate, spent, cap)

    async def buy(self, job: Job) -> None:
        """Send the request of an `intent` entry. It ends `submitted`, `refused`, `unsent` or `unknown`.

        If the call is cancelled while the request is on its way, the entry stays `sending`.

        Raises:
            JournalUnwritable: `sending` could not be written, so nothing was sent.
        """
        entry, recorder = job.entry, self._recorder
        used_s = 0.0
        for repeat in range(REPEATS_MAX + 1):
            began = anyio.current_time()
            try:
                task = await self._client.submit(
                    entry.request, idempotency_key=entry.key, on_sending=partial(recorder.sending, job)
                )
            except (RateLimited, Unreachable) as error:
                wait = max(error.retry_after_s or 0.0, backoff_s(repeat, self._draw))
                used_s += anyio.current_time() - began + wait
                if repeat == REPEATS_MAX or used_s > REPEAT_WITHIN_S:
                    phase = "refused" if isinstance(error, RateLimited) else "unsent"
                    return recorder.phase_changed(job, phase, error=error.problem)
                log.info("the request was not taken (%s); once more in %.1f s", error.code, wait)
                recorder.phase_changed(job, "intent")
                await self._sleep(wait)
            except Rejected as error:
                return recorder.phase_changed(job, "refused", error=error.problem)
            except OutcomeUnknown as error:
                recorder.phase_changed(job, "unknown", error=error.problem)
                return await self.reconcile(job)
            else:
                # No await between the answer and this note: a cancelled call cannot lose the id.
                return recorder.phase_changed(job, "submitted", task=task)
        raise AssertionError("unreachable")

    async def reconcile(self, job: Job) -> None:
        """Ask the account's task list (read-only) what became of a request whose answer was lost.

        If exactly one task of that time belongs to no other entry, it is taken. If there are several, they are named.
        If there is none, the outcome stays unknown.
        """
        entry = job.entry
        candidates: list[Task] = []
        for wait in RECONCILE_AFTER_S:
            if wait:
                await self._sleep(wait)
            try:
                candidates = await self._candidates(entry)
                if len(candidates) == 1 and not self._has_rivals(entry):
                    log.info("a lost answer was found in the account's list: %s", candidates[0].id)
                    return self._recorder.phase_changed(job, "submitted", task=candidates[0], error=ADOPTED)
            except EvolinkError as error:
                log.info("the account's tasks could not be compared: %s", error.code)
            if candidates:
                break
        said = entry.error.message if entry.error else "the answer to the request was lost"
        advice = OutcomeUnknown.advice
        if candidates:
            ids = ", ".join(task.id for task in candidates[:5])
            advice = (
                f"It may be one of these tasks of the account: {ids}. Look at them with get_task before buying again."
            )
        return self._recorder.phase_changed(job, "unknown", error=Problem("outcome_unknown", said, False, advice))

    async def _candidates(self, entry: Entry) -> list[Task]:
        """The account's tasks of the entry's time that belong to no entry of the journal."""
        earliest = entry.created_at - CLOCK_SKEW_S
        latest = entry.created_at + SPAN_S
        tasks = [
            task
            for task in await self._client.recent_tasks()
            if task.created is not None and earliest <= task.created <= latest and task.model in (None, MODEL)
        ]
        known = self._journal.known_tasks([task.id for task in tasks])
        return [task for task in tasks if task.id not in known]

    def _has_rivals(self, entry: Entry) -> bool:
        """Whether another purchase of the same time may own the task: then nobody can say whose it is."""
        near = self._journal.recent(200, since=entry.created_at - SPAN_S, until=entry.created_at + SPAN_S)
        return any(other.key != entry.key and other.phase in RIVALS for other in near)


def _over_the_day(credits: float, spent: float, cap: float) -> OverBudget:
    return OverBudget(
        f"the computed price is {credits:g} credits, and {spent:g} of today's {cap:g} are spent",
        advice="Wait until tomorrow, or let the user raise EVOLINK_MCP_MAX_CREDITS_PER_DAY.",
    )


def start_of_day(now: float) -> float:
    """Local midnight before `now`, in epoch seconds."""
    return datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0).timestamp()


def price_of(request: GenerationRequest, rule: str) -> Price:
    """The price of a request by one size rule: an upper bound for references, an estimate for a long prompt."""
    tokens = costs.prompt_tokens(request.prompt)
    return costs.price(
        sizes.resolve(request.size, request.resolution, rule).size,
        request.quality,
        request.n,
        references=len(request.image_urls or ()) + (1 if request.mask_url else 0),
        prompt_tokens=tokens if tokens > PROMPT_TOKENS_FREE else 0,
    )
