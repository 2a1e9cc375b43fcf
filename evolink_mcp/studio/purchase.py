"""The purchase: written down before the money leaves, sent once, and never repeated unless provably unsent."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime

import anyio

from evolink_mcp.api import costs, sizes
from evolink_mcp.api.client import SUBMIT_DEADLINE_S, EvolinkClient
from evolink_mcp.api.costs import Price
from evolink_mcp.api.request import MODEL, GenerationRequest
from evolink_mcp.api.task import Task
from evolink_mcp.errors import (
    EvolinkError,
    JournalUnwritable,
    OutcomeUnknown,
    OverBudget,
    Problem,
    RateLimited,
    Rejected,
    Unreachable,
)
from evolink_mcp.journal.contract import Journal
from evolink_mcp.journal.entry import ADOPTED, Entry
from evolink_mcp.studio.schedule import backoff_s

log = logging.getLogger(__name__)

REPEATS_MAX = 2
REPEAT_WITHIN_S = 30.0
CLOCK_SKEW_S = 60.0
# After its intent a purchase's task is made within this, as far as two clocks can tell.
SPAN_S = REPEAT_WITHIN_S + SUBMIT_DEADLINE_S + CLOCK_SKEW_S
# A task that somebody fetched by its id may be the one: looking at a candidate must not make the other one certain.
RIVALS = ("sending", "unknown", "found")
# When the account is asked about a lost answer: at once, and again for a task that was still being made.
RECONCILE_AFTER_S = (0.0, 3.0)
# A prompt up to this long costs less than 0.05 credit: too little to refuse a call that compute_size priced.
PROMPT_TOKENS_FREE = 160


@dataclass(frozen=True, slots=True)
class Budget:
    """Caps in credits, from the settings; None means no cap."""

    per_call: float | None = None
    per_day: float | None = None
    confirm_above: float | None = None


class Till:
    """Buys tasks. Holds nothing open; every state it reaches is in the journal before it is acted upon."""

    def __init__(
        self,
        client: EvolinkClient,
        journal: Journal,
        budget: Budget,
        *,
        sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._client = client
        self._journal = journal
        self._sleep = sleep
        self._draw = draw
        self.budget = budget

    def check(self, price: Price, max_credits: float | None) -> None:
        """Refuse a price above the caller's or the owner's cap, before anything is sent.

        Raises:
            OverBudget: names the price and the cap.
        """
        credits = price.credits
        if max_credits is not None and credits > max_credits:
            raise OverBudget(
                f"the computed price is {credits:g} credits (${price.usd:g}), above max_credits={max_credits:g}",
                advice=f"Ask the user; then call again with max_credits={credits:g}, or a smaller size or quality.",
            )
        cap = self.budget.per_call
        if cap is not None and credits > cap:
            raise OverBudget(
                f"the computed price is {credits:g} credits (${price.usd:g}), above the cap of {cap:g} per call",
                advice="Choose a smaller size, quality or n; the cap is EVOLINK_MCP_MAX_CREDITS_PER_CALL.",
            )

    def afford(self, price: Price, now: float) -> None:
        """Refuse early what `open` would refuse anyway, before private pictures are uploaded for it.

        Raises:
            OverBudget, JournalUnwritable: as `open` does, which has the last word.
        """
        spent = self._journal.spent_since(start_of_day(now))
        if self.budget.per_day is not None and spent + price.credits > self.budget.per_day:
            raise self._over_the_day(price.credits, spent)

    def open(self, entry: Entry) -> None:
        """Write the intent down, unless the day's cap forbids it: the cap and the entry are one transaction.

        Raises:
            OverBudget: the day's credits would go above EVOLINK_MCP_MAX_CREDITS_PER_DAY.
            JournalUnwritable: nothing may be bought.
        """
        cap = self.budget.per_day
        spent = self._journal.intend(entry, since=start_of_day(entry.created_at), cap=cap)
        if spent is not None:
            raise self._over_the_day(entry.estimate, spent)

    def _over_the_day(self, credits: float, spent: float) -> OverBudget:
        return OverBudget(
            f"the computed price is {credits:g} credits, and {spent:g} of today's {self.budget.per_day:g} are spent",
            advice="Wait until tomorrow, or let the user raise EVOLINK_MCP_MAX_CREDITS_PER_DAY.",
        )

    async def buy(self, entry: Entry, on_phase: Callable[[Entry], None]) -> Entry:
        """Send the request of an `intent` entry; returns it `submitted`, `refused`, `unsent` or `unknown`.

        `on_phase` hears of every state. A cancelled call leaves the entry `sending`.

        Raises:
            JournalUnwritable: `sending` could not be written down, so nothing was sent.
        """
        sending = replace(entry, phase="sending")

        def on_sending() -> None:
            self._journal.update(sending)
            on_phase(sending)

        used_s = 0.0
        for repeat in range(REPEATS_MAX + 1):
            began = anyio.current_time()
            try:
                task = await self._client.submit(entry.request, idempotency_key=entry.key, on_sending=on_sending)
            except (RateLimited, Unreachable) as error:
                wait = max(error.retry_after_s or 0.0, backoff_s(repeat, self._draw))
                used_s += anyio.current_time() - began + wait
                if repeat == REPEATS_MAX or used_s > REPEAT_WITHIN_S:
                    phase = "refused" if isinstance(error, RateLimited) else "unsent"
                    return self._note(replace(entry, phase=phase, error=error.problem), on_phase)
                log.info("the request was not taken (%s); once more in %.1f s", error.code, wait)
                self._note(entry, on_phase)
                await self._sleep(wait)
            except Rejected as error:
                return self._note(replace(entry, phase="refused", error=error.problem), on_phase)
            except OutcomeUnknown as error:
                lost = self._note(replace(entry, phase="unknown", error=error.problem), on_phase)
                return await self.reconcile(lost, on_phase)
            else:
                return self._accept(entry, task, on_phase)
        raise AssertionError("unreachable")

    async def reconcile(self, entry: Entry, on_phase: Callable[[Entry], None]) -> Entry:
        """Ask the account's task list (read-only) what became of an `unknown` entry.

        Exactly one task of its time that nobody accounts for is adopted; several are named; none leaves it unknown.
        """
        candidates: list[Task] = []
        for wait in RECONCILE_AFTER_S:
            if wait:
                await self._sleep(wait)
            try:
                candidates = await self._unaccounted(entry)
                if len(candidates) == 1 and not self._rivals(entry):
                    log.info("a lost answer was found in the account's list: %s", candidates[0].id)
                    return self._accept(entry, candidates[0], on_phase, ADOPTED)
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
        problem = Problem("outcome_unknown", said, False, advice)
        return self._note(replace(entry, phase="unknown", error=problem), on_phase)

    async def _unaccounted(self, entry: Entry) -> list[Task]:
        """The account's tasks of the entry's time that no journal entry knows."""
        earliest = entry.created_at - CLOCK_SKEW_S
        latest = entry.created_at + SPAN_S
        tasks = [
            task
            for task in await self._client.recent_tasks()
            if task.created is not None and earliest <= task.created <= latest and task.model in (None, MODEL)
        ]
        known = self._journal.known_tasks([task.id for task in tasks])
        return [task for task in tasks if task.id not in known]

    def _rivals(self, entry: Entry) -> bool:
        """Whether another purchase of the same time may own the task: then nobody can say whose it is."""
        near = self._journal.recent(200, since=entry.created_at - SPAN_S, until=entry.created_at + SPAN_S)
        return any(other.key != entry.key and other.phase in RIVALS for other in near)

    def _accept(
        self, entry: Entry, task: Task, on_phase: Callable[[Entry], None], error: Problem | None = None
    ) -> Entry:
        """Note the id in the same breath as the answer: there is no await in here."""
        return self._note(replace(entry, phase="submitted", task=task, error=error), on_phase)

    def _note(self, entry: Entry, on_phase: Callable[[Entry], None]) -> Entry:
        """Write down what became of a request that was let go.

        The caller must hear of it even when the disk is full; what is on disk says then no more than that it was
        sent, and the next start asks EvoLink.
        """
        try:
            self._journal.update(entry)
        except JournalUnwritable as error:
            log.error("%s of %s could not be written down: %s", entry.phase, entry.task_id or entry.key, error.what)
        on_phase(entry)
        return entry


def start_of_day(now: float) -> float:
    """Local midnight before `now`, in epoch seconds."""
    return datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0).timestamp()


def price_of(request: GenerationRequest, rule: str) -> Price:
    """What a request will cost: references as their upper bound, a long prompt as an estimate."""
    tokens = costs.prompt_tokens(request.prompt)
    return costs.price(
        sizes.resolve(request.size, request.resolution, rule).size,
        request.quality,
        request.n,
        references=len(request.image_urls or ()) + (1 if request.mask_url else 0),
        prompt_tokens=tokens if tokens > PROMPT_TOKENS_FREE else 0,
    )
