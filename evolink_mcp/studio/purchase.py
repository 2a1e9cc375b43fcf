"""Buy one task: record the entry, send the POST once, and repeat it only if it certainly bought nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import anyio

from evolink_mcp import causes
from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.failures import rejected
from evolink_mcp.errors import EvolinkError, OutcomeUnknown, Problem, RateLimited, Rejected, TaskKnown, Unreachable
from evolink_mcp.images.references import References
from evolink_mcp.journal.entry import Entry, Phase, new_key
from evolink_mcp.studio.events import Purchased
from evolink_mcp.studio.jobs import Callback, Job, PreparedRequest, Timing
from evolink_mcp.studio.journal_writer import JournalWriter
from evolink_mcp.studio.limits import Limits
from evolink_mcp.studio.poller import RateLimit
from evolink_mcp.studio.reconcile import REPEAT_WITHIN_S, Reconciler
from evolink_mcp.studio.schedule import backoff_s

log = logging.getLogger(__name__)

POST_REPEATS_MAX = 2
INTERRUPTED = Problem("interrupted", "the server ended before anything was sent", True, "Call again.")
ABANDONED = Problem("cancelled", "the call was cancelled before anything was sent", True, "Call again if it is wanted.")
ANSWERED_WITH_EARLIER_TASK = Problem(
    "task_known",
    "EvoLink answered with the task of an earlier order, so this one may not have been made",
    False,
    "Call list_tasks with sync=true to see what the account has; force_new=true buys.",
)


class CallbackAddresses(Protocol):
    """The addresses of this server at which EvoLink reports the end of a task."""

    def add_address(self, body: Mapping[str, Any], channel: str, key: str) -> dict[str, Any]:
        """Return the request body with this entry's address, unless the caller gave one."""
        ...


class Purchaser:
    """Buy tasks. The journal records each state before the step that follows from it.

    While EvoLink's rate limit lasts, no POST is sent.
    """

    def __init__(
        self,
        client: EvolinkClient,
        writer: JournalWriter,
        reconciler: Reconciler,
        references: References,
        limits: Limits,
        rate_limit: RateLimit,
        callbacks: CallbackAddresses | None,
        timing: Timing,
    ) -> None:
        self.reconciler = reconciler
        self._client = client
        self._writer = writer
        self._references = references
        self._limits = limits
        self._rate_limit = rate_limit
        self._callbacks = callbacks
        self._timing = timing

    async def entry_for(self, prepared: PreparedRequest) -> Entry:
        """Check the spending limits, upload the reference images and return the entry. The journal does not have it yet.

        Raises:
            RateLimited: EvoLink accepts no purchase before a later time.
            OverBudget: the price ceiling is above a limit.
            EvolinkError: an upload failed.
        """
        request = prepared.request
        self._check_rate_limit()
        self._limits.check_call(request)
        # `admit` checks these limits again. Here they only prevent an upload for a request that they forbid.
        if prepared.references.has_uploads:
            await self._limits.check_days([request])
        body = await self._references.upload_all(prepared.references)
        journal = self._writer.journal
        return Entry(
            key=new_key(),
            owner=journal.owner,
            phase=Phase.INTENT,
            created_at=self._timing.clock(),
            fingerprint=prepared.fingerprint,
            # EvoLink does not know `fit`. The journal keeps it for a server that continues the entry.
            request=body if request.fit is None else {**body, "fit": request.fit},
            estimate=request.price_ceiling,
            save_as=request.save_as,
            account=journal.account,
            # Without a caller, an identical call at another server could claim the purchase at once.
            caller=journal.owner,
            references=prepared.references.references(body),
        )

    def _check_rate_limit(self) -> None:
        now = self._timing.clock()
        may_buy_at = self._rate_limit.purchases_at
        if may_buy_at - now > REPEAT_WITHIN_S:  # a shorter wait is a part of the purchase
            raise rejected(causes.rate_limit(may_buy_at, now), retry_at=may_buy_at)

    async def buy(self, job: Job) -> None:
        """Send the POST of an `intent` entry. The entry ends `submitted`, `refused`, `unsent` or `unknown`.

        If the server ends during the POST, the entry stays `sending`.
        """
        writer = self._writer
        try:
            with job.sending_scope:
                await self._buy(job)
            if job.sending_scope.cancelled_caught:
                await writer.record_phase(job, Phase.UNSENT, error=ABANDONED)
        except TaskKnown:
            # EvoLink returned an earlier task, so it is unknown whether this POST made a further one.
            await writer.record_phase(job, Phase.UNKNOWN, error=ANSWERED_WITH_EARLIER_TASK)
        except EvolinkError as error:
            if job.entry.phase != Phase.INTENT:  # only an entry that certainly was not sent becomes `unsent`
                raise
            job.problem = error.problem
            await writer.record_phase(job, Phase.UNSENT, error=error.problem)
        finally:
            # The entry would reserve credits until another server adopts it.
            if job.entry.phase == Phase.INTENT:
                with anyio.CancelScope(shield=True):
                    await writer.record_phase(job, Phase.UNSENT, error=INTERRUPTED)
            writer.events.publish(Purchased(job.entry))

    async def _buy(self, job: Job) -> None:
        entry = job.entry
        writer = self._writer
        body = self._body_of(job)
        used_s = 0.0
        if 0 < self._rate_limit.remaining_s <= REPEAT_WITHIN_S:
            await self._timing.sleep(self._rate_limit.remaining_s)
        for repeat in range(POST_REPEATS_MAX + 1):
            began = anyio.current_time()
            try:
                # All attempts have the same key. No rule relies on it, because EvoLink does not document idempotency.
                task = await self._client.submit(
                    body, idempotency_key=entry.key, on_sending=partial(writer.record_sending, job)
                )
            except (RateLimited, Unreachable) as error:
                # Both errors prove that EvoLink bought nothing, and their cause may pass.
                if isinstance(error, RateLimited):
                    self._rate_limit.extend(error.retry_after_s)
                    self._rate_limit.purchases_at = max(self._rate_limit.purchases_at, error.retry_at or 0.0)
                wait_s = max(error.retry_after_s or 0.0, backoff_s(repeat))
                used_s += anyio.current_time() - began + wait_s
                if repeat == POST_REPEATS_MAX or used_s > REPEAT_WITHIN_S or not error.retryable:
                    phase = Phase.REFUSED if isinstance(error, RateLimited) else Phase.UNSENT
                    return await writer.record_phase(job, phase, error=error.problem)
                log.info("POST failed (%s), retrying in %.1f s", error.code, wait_s)
                # A crash during the wait must leave an entry that was certainly not sent.
                await writer.record_phase(job, Phase.INTENT)
                await self._timing.sleep(wait_s)
            except Rejected as error:
                return await writer.record_phase(job, Phase.REFUSED, error=error.problem)
            except OutcomeUnknown as error:
                await writer.record_phase(job, Phase.UNKNOWN, error=error.problem)
                return await self.reconciler.reconcile(job, error.task_ids)
            else:
                # The write survives a cancellation, so the task ID cannot be lost.
                return await writer.record_phase(job, Phase.SUBMITTED, task=task)
        raise AssertionError("unreachable")

    def _body_of(self, job: Job) -> dict[str, Any]:
        entry = job.entry
        if self._callbacks is None:
            return entry.body
        # With the caller's own address, EvoLink does not call this server.
        if "callback_url" not in entry.request:
            job.callback = Callback.EXPECTED
        return self._callbacks.add_address(entry.body, self._writer.journal.channel, entry.key)
