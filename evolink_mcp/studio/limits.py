"""The owner's limits: credits per call and day, running tasks, and the hosts of callbacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evolink_mcp.api import costs
from evolink_mcp.api.urls import host_of
from evolink_mcp.errors import CallbackRefused, OverBudget, TooManyRunning
from evolink_mcp.studio.times import start_of_day

if TYPE_CHECKING:  # the settings import this module before the first answer
    from evolink_mcp.journal.entry import Entry
    from evolink_mcp.journal.journal import Journal
    from evolink_mcp.studio.jobs import Job


@dataclass(frozen=True, slots=True)
class SpendingLimits:
    """The spending limits in credits and the largest number of running tasks. None: no limit."""

    per_call: float | None = None
    per_day: float | None = None
    confirm_above: float | None = None
    running: int | None = None


class Limits:
    """Check requests against the spending limits. `callback_hosts` are the hostnames that callbacks may use, None allows all."""

    def __init__(
        self,
        journal: Journal,
        limits: SpendingLimits,
        callback_hosts: frozenset[str] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._journal = journal
        self._limits = limits
        self._callback_hosts = callback_hosts
        self._clock = clock
        self._ordering = 0

    def check_callback(self, url: str | None) -> None:
        """Check the host of a caller's callback URL.

        Raises:
            CallbackRefused: the owner does not allow this host.
        """
        if url is None or self._callback_hosts is None:
            return
        host = host_of(url)
        if host not in self._callback_hosts:
            allowed = ", ".join(sorted(self._callback_hosts)) or "no host at all"
            raise CallbackRefused(f"the callback_url names {host}, and this server allows {allowed}")

    async def check_price(self, price_ceiling: float, max_credits: float | None) -> None:
        """Check the spending limits before anything is sent or uploaded. `admit` checks the limit per day again.

        Raises:
            OverBudget: names the price and the limit.
            JournalUnwritable: today's spending cannot be read.
        """
        price = f"the computed price is at most {costs.format_credits(price_ceiling)}"
        if max_credits is not None and price_ceiling > max_credits:
            raise OverBudget(
                f"{price}, above max_credits={max_credits:g}",
                advice=f"Ask the user; then call again with max_credits={price_ceiling:g}, or a smaller size or quality.",
            )
        limit = self._limits.per_call
        if limit is not None and price_ceiling > limit:
            raise OverBudget(
                f"{price}, above the limit of {costs.format_credits(limit)} per call",
                advice="Choose a smaller size, quality or n. EVOLINK_MCP_MAX_CREDITS_PER_CALL sets the limit.",
            )
        if self._limits.per_day is not None:
            spent = (await self._journal.sums_since(start_of_day(self._clock()))).total
            if spent + price_ceiling > self._limits.per_day:
                raise _over_daily_limit(price_ceiling, spent, self._limits.per_day)

    async def admit(self, entry: Entry) -> None:
        """Record a new entry unless a limit forbids it. Check and record are one transaction.

        Raises:
            TooManyRunning: the account's limit of running tasks is reached, here or on other servers.
            OverBudget: the limit of credits per day is reached.
            JournalUnwritable: the entry was not recorded, so nothing may be bought.
        """
        limit = self._limits.per_day
        spent = await self._journal.intend(
            entry, since=start_of_day(entry.created_at), cap=limit, running=self._limits.running
        )
        if spent is not None and limit is not None:
            raise _over_daily_limit(entry.estimate, spent, limit)

    @contextmanager
    def place(self, jobs: Iterable[Job]) -> Generator[None]:
        """Reserve a place for one more running task beside `jobs`.

        Raises:
            TooManyRunning: the limit of running tasks is reached.
        """
        running = self._ordering + sum(job.entry.is_running for job in jobs)
        limit = self._limits.running
        if limit is not None and running >= limit:
            raise TooManyRunning.of(running, limit)
        self._ordering += 1
        try:
            yield
        finally:
            self._ordering -= 1


def _over_daily_limit(price_ceiling: float, spent: float, limit: float) -> OverBudget:
    return OverBudget(
        f"the computed price is at most {costs.format_credits(price_ceiling)}, and {costs.format_credits(spent)} of today's "
        f"{costs.format_credits(limit)} are spent",
        advice="Wait until tomorrow, or let the user raise EVOLINK_MCP_MAX_CREDITS_PER_DAY.",
    )
