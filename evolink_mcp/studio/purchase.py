"""The purchase: written down before it is sent, sent once, and repeated only when nothing was bought for certain."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from functools import partial

import anyio

from evolink_mcp.api import costs, sizes
from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.errors import (
    EvolinkError,
    OutcomeUnknown,
    OverBudget,
    Problem,
    RateLimited,
    Rejected,
    TaskKnown,
    Unreachable,
)
from evolink_mcp.journal.entry import Entry, Phase
from evolink_mcp.journal.journal import Journal
from evolink_mcp.studio.events import JournalWriter
from evolink_mcp.studio.jobs import Job, Sleep
from evolink_mcp.studio.limits import Budget
from evolink_mcp.studio.poller import RateLimit
from evolink_mcp.studio.reconcile import REPEAT_WITHIN_S, Reconciler
from evolink_mcp.studio.schedule import backoff_s
from evolink_mcp.studio.times import start_of_day
from evolink_mcp.teams.callbacks import Callbacks
from evolink_mcp.teams.metrics import Metrics

log = logging.getLogger(__name__)

REPEATS_MAX = 2
INTERRUPTED = Problem("interrupted", "the server ended before anything was sent", True, "Call again.")
ABANDONED = Problem("cancelled", "the call was cancelled before anything was sent", True, "Call again if it is wanted.")
GIVEN_TWICE = Problem(
    "task_known",
    "EvoLink answered with the task of an earlier order, so this one may not have been made",
    False,
    "Call list_tasks with sync=true to see what the account has; force_new=true buys.",
)


class Purchaser:
    """Buys tasks. Every state is in the journal before anything is done because of it. `lost` finds lost answers.

    `pause` is the account's: while EvoLink asks it to wait, no order is sent.
    """

    def __init__(
        self,
        client: EvolinkClient,
        journal: Journal,
        recorder: JournalWriter,
        budget: Budget,
        lost: Reconciler,
        *,
        callbacks: Callbacks | None = None,
        sleep: Sleep = anyio.sleep,
        pause: RateLimit | None = None,
        metrics: Metrics | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._client = client
        self._journal = journal
        self._recorder = recorder
        self._budget = budget
        self.lost = lost
        self._callbacks = callbacks
        self._sleep = sleep
        self._draw = draw
        self.pause = pause or RateLimit()
        self._metrics = metrics or Metrics()

    async def check_caps(self, at_most: float, max_credits: float | None, now: float) -> None:
        """Refuse what may cost more than a cap before anything is sent or uploaded; `intend` judges the day's cap again.

        Raises:
            OverBudget: names the price and the cap.
            JournalUnwritable: what was spent today cannot be read.
        """
        price = f"the computed price is at most {costs.priced(at_most)}"
        if max_credits is not None and at_most > max_credits:
            raise OverBudget(
                f"{price}, above max_credits={max_credits:g}",
                advice=f"Ask the user; then call again with max_credits={at_most:g}, or a smaller size or quality.",
            )
        cap = self._budget.per_call
        if cap is not None and at_most > cap:
            raise OverBudget(
                f"{price}, above the cap of {costs.priced(cap)} per call",
                advice="Choose a smaller size, quality or n; the cap is EVOLINK_MCP_MAX_CREDITS_PER_CALL.",
            )
        if self._budget.per_day is not None:
            spent = await self._journal.spent_since(start_of_day(now))
            if spent + at_most > self._budget.per_day:
                raise _over_the_day(at_most, spent, self._budget.per_day)

    async def intend(self, entry: Entry) -> None:
        """Write a new entry, unless a limit forbids it: the check and the entry are one transaction.

        Raises:
            TooManyRunning: as many of the account's tasks are under way as may be, here or at other servers.
            OverBudget: the day's credits would go above EVOLINK_MCP_MAX_CREDITS_PER_DAY.
            JournalUnwritable: nothing may be bought.
        """
        cap = self._budget.per_day
        spent = await self._journal.intend(
            entry, since=start_of_day(entry.created_at), cap=cap, running=self._budget.running
        )
        if spent is not None and cap is not None:
            raise _over_the_day(entry.estimate, spent, cap)

    async def buy(self, job: Job) -> None:
        """Send the request of an `intent` entry. It ends `submitted`, `refused`, `unsent` or `unknown`.

        If the server ends while the request is on its way, the entry stays `sending`.
        """
        try:
            with job.before_sending:
                await self._buy(job)
            if job.before_sending.cancelled_caught:
                await self._recorder.phase_changed(job, Phase.UNSENT, error=ABANDONED)
        except TaskKnown:
            await self._recorder.phase_changed(job, Phase.UNKNOWN, error=GIVEN_TWICE)
        except EvolinkError as error:
            if job.entry.phase != Phase.INTENT:  # only what is provably unsent is called so
                raise
            job.problem = error.problem
            await self._recorder.phase_changed(job, Phase.UNSENT, error=error.problem)
        finally:
            if job.entry.phase == Phase.INTENT:
                with anyio.CancelScope(shield=True):
                    await self._recorder.phase_changed(job, Phase.UNSENT, error=INTERRUPTED)
            self._metrics.purchases[job.entry.phase] += 1

    async def _buy(self, job: Job) -> None:
        entry, recorder = job.entry, self._recorder
        body = entry.request
        if self._callbacks is not None:
            body = self._callbacks.addressed(body, entry.account, entry.key)
            job.called_back = "callback_url" not in entry.request
        used_s = 0.0
        if 0 < self.pause.left_s <= REPEAT_WITHIN_S:
            await self._sleep(self.pause.left_s)
        for repeat in range(REPEATS_MAX + 1):
            began = anyio.current_time()
            try:
                task = await self._client.submit(
                    body, idempotency_key=entry.key, on_sending=partial(recorder.sending, job)
                )
            except (RateLimited, Unreachable) as error:
                if isinstance(error, RateLimited):
                    self.pause.ask(error.retry_after_s)
                wait = max(error.retry_after_s or 0.0, backoff_s(repeat, self._draw))
                used_s += anyio.current_time() - began + wait
                if repeat == REPEATS_MAX or used_s > REPEAT_WITHIN_S or not error.retryable:
                    phase = Phase.REFUSED if isinstance(error, RateLimited) else Phase.UNSENT
                    return await recorder.phase_changed(job, phase, error=error.problem)
                log.info("the request was not taken (%s); once more in %.1f s", error.code, wait)
                await recorder.phase_changed(job, Phase.INTENT)
                await self._sleep(wait)
            except Rejected as error:
                return await recorder.phase_changed(job, Phase.REFUSED, error=error.problem)
            except OutcomeUnknown as error:
                await recorder.phase_changed(job, Phase.UNKNOWN, error=error.problem)
                return await self.lost.reconcile(job)
            else:
                # This is written even if the call is cancelled now, so the id cannot be lost.
                return await recorder.phase_changed(job, Phase.SUBMITTED, task=task)
        raise AssertionError("unreachable")


def _over_the_day(at_most: float, spent: float, cap: float) -> OverBudget:
    return OverBudget(
        f"the computed price is at most {costs.priced(at_most)}, and {costs.priced(spent)} of today's "
        f"{costs.priced(cap)} are spent",
        advice="Wait until tomorrow, or let the user raise EVOLINK_MCP_MAX_CREDITS_PER_DAY.",
    )


def price_of(request: GenerationRequest, rules: Iterable[str]) -> float:
    """What a request costs at most, in credits, whichever of these size rules its pictures follow."""
    model = request.image_model
    return costs.at_most(
        [sizes.resolve(request.size, request.resolution, rule, model.limits).size for rule in rules],
        request.quality,
        request.n,
        references=len(request.image_urls or ()) + (1 if request.mask_url else 0),
        prompt_bytes=len(request.prompt.encode("utf-8", "surrogatepass")),
        model=model,
    )
