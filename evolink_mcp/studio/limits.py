"""The owner's limits: credits per call and day, running tasks, and the hosts of callbacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from evolink_mcp.api import costs, sizes
from evolink_mcp.api.urls import host_of
from evolink_mcp.errors import CallbackRefused, OverBudget, TooManyRunning
from evolink_mcp.studio.times import start_of_day

if TYPE_CHECKING:  # the settings import this module before the first answer
    from evolink_mcp.api.request import GenerationRequest
    from evolink_mcp.journal.entry import Entry
    from evolink_mcp.journal.journal import Journal, Sums
    from evolink_mcp.studio.jobs import ImageRequest, Job
    from evolink_mcp.studio.prices import AccountPrices, Prices


@dataclass(frozen=True, slots=True)
class SpendingLimits:
    """The spending limits in credits and the largest number of running tasks. None: no limit.

    `total_per_day` counts all profiles of the server. `tenant` is the HTTP caller to whom the other limits belong.
    """

    per_call: float | None = None
    per_day: float | None = None
    confirm_above: float | None = None
    running: int | None = None
    total_per_day: float | None = None
    tenant: str = ""

    def advice(self, variable: str, field: str) -> str:
        """Return the sentence that names a limit's place: a variable, or a field of the tenant's token."""
        if self.tenant:
            return f"The operator of this server sets {field} of the tenant {self.tenant}."
        return f"The user can raise {variable}."


class Limits:
    """Check requests against the spending limits. `callback_hosts` are those that callbacks may use, None allows all."""

    def __init__(
        self,
        journal: Journal,
        limits: SpendingLimits,
        prices: AccountPrices,
        callback_hosts: frozenset[str] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._journal = journal
        self._limits = limits
        self._prices = prices
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

    def check_call(self, request: ImageRequest) -> None:
        """Check the limits of one call.

        Raises:
            OverBudget: names the price, the limit and the largest size and quality that fit.
        """
        self._check_call(request, request.price_ceiling, self._prices.current)

    async def check_series(self, requests: Sequence[ImageRequest], jobs: Iterable[Job]) -> None:
        """Check the limits for all purchases of a series before the first one. `jobs` are the jobs of this server.

        The limit per call applies to each purchase, the limits per day to the sum of the price ceilings.

        Raises:
            TooManyRunning: the series has more purchases than may run beside `jobs`.
            OverBudget, JournalUnwritable: as `check_call` and `check_days`.
        """
        limit = self._limits.running
        running = self._running(jobs)
        if limit is not None and running + len(requests) > limit:
            raise TooManyRunning(
                f"the limit of {limit} running tasks allows {max(limit - running, 0)} more, and the series needs "
                f"{len(requests)}",
                advice="Give fewer prompts, or wait for running tasks with get_task.",
            )
        for request in requests:
            self.check_call(request)
        if requests:
            await self.check_days(requests)

    async def check_days(self, requests: Sequence[ImageRequest]) -> None:
        """Check the limits per day before anything is uploaded. `admit` checks them again.

        Raises:
            OverBudget: names the price, the limit and the largest size and quality that fit.
            JournalUnwritable: today's sums cannot be read.
        """
        prices = self._prices.current
        ceiling = sum(request.price_ceiling for request in requests)
        midnight = start_of_day(self._clock())
        for limit, read, is_total in (
            (self._limits.per_day, self._journal.sums_since, False),
            (self._limits.total_per_day, self._journal.total_since, True),
        ):
            if limit is not None:
                sums = await read(midnight)
                if sums.total + ceiling > limit:
                    raise self._over_daily_limit(
                        requests[0], ceiling, sums, prices, is_total=is_total, purchases=len(requests)
                    )

    async def admit(self, request: ImageRequest, entry: Entry) -> Entry:
        """Record a new entry unless a limit forbids it, and return it.

        One transaction reads the account's prices, computes the price ceiling again, checks the limits and records the
        entry. So no server buys by an old price.

        Raises:
            TooManyRunning: the account's limit of running tasks is reached, here or on other servers.
            OverBudget: a limit is reached, or the ceiling rose above what the caller or the user approved.
            JournalUnwritable: the entry was not recorded, so nothing may be bought.
        """
        from evolink_mcp.journal.journal import DailyLimitReached  # the journal is not needed for the first answer

        prices = self._prices.current

        def reprice(facts: Mapping[str, str]) -> Entry:
            nonlocal prices
            prices = self._prices.of(facts)
            ceiling = prices.ceiling(request.request)
            # The caller and the user saw the lower ceiling.
            if ceiling > request.price_ceiling:
                self._check_call(request, ceiling, prices)
                self._check_approval(ceiling)
            return replace(entry, estimate=ceiling, rule=prices.rule, price_factor=prices.factor)

        try:
            return await self._journal.intend(
                entry,
                since=start_of_day(entry.created_at),
                day_limit=self._limits.per_day,
                total_limit=self._limits.total_per_day,
                running_max=self._limits.running,
                reprice=reprice,
            )
        except DailyLimitReached as reached:
            ceiling = reached.entry.estimate
            raise self._over_daily_limit(request, ceiling, reached.sums, prices, is_total=reached.is_total) from None

    def _check_call(self, request: ImageRequest, ceiling: float, prices: Prices) -> None:
        """Check the limits of one call.

        Raises:
            OverBudget: the price ceiling is above one of them.
        """
        price = f"the computed price is at most {costs.format_credits(ceiling)}"
        limit = request.max_credits
        if limit is not None and ceiling > limit:
            raise OverBudget(
                f"{price}, above max_credits={limit:g}",
                advice=f"Ask the user; then call again with max_credits={ceiling:g}, or a smaller size or quality. "
                f"{largest_text(request, prices, limit)}",
            )
        limit = self._limits.per_call
        if limit is not None and ceiling > limit:
            place = self._limits.advice("EVOLINK_MCP_MAX_CREDITS_PER_CALL", "max_credits_per_call")
            raise OverBudget(
                f"{price}, above the limit of {costs.format_credits(limit)} per call",
                advice=f"{largest_text(request, prices, limit)} {place}",
            )

    def _check_approval(self, ceiling: float) -> None:
        """Check a price ceiling that rose after the user saw it.

        Raises:
            OverBudget: the user must approve it.
        """
        limit = self._limits.confirm_above
        if limit is not None and ceiling > limit:
            raise OverBudget(
                f"EvoLink's prices changed: the highest possible charge is now {costs.format_credits(ceiling)}",
                code="confirmation_needed",
                advice="Call again, so that the user can approve the new price.",
            )

    def _over_daily_limit(
        self, request: ImageRequest, ceiling: float, sums: Sums, prices: Prices, *, is_total: bool, purchases: int = 1
    ) -> OverBudget:
        limit = (self._limits.total_per_day if is_total else self._limits.per_day) or 0.0
        series = f" of {purchases} pictures" if purchases > 1 else ""
        price = f"the computed price{series} is at most {costs.format_credits(ceiling)}"
        reserved = f" and {costs.format_credits(sums.reserved)} reserved" if sums.reserved else ""
        used = f"{costs.format_credits(sums.spent)} of today's {costs.format_credits(limit)} are spent{reserved}"
        place = self._limits.advice("EVOLINK_MCP_MAX_CREDITS_PER_DAY", "max_credits_per_day")
        if is_total:
            place = "" if self._limits.tenant else "The user can raise EVOLINK_MCP_TOTAL_CREDITS_PER_DAY."
            # The sums of all profiles would show a tenant the spending of the others.
            used = f"the server's limit of {costs.format_credits(limit)} per day for all users leaves less"
        largest = largest_text(request, prices, (limit - sums.total) / purchases, is_series=purchases > 1)
        # A call that alone is above the limit does not fit tomorrow either.
        wait = f"The limit starts again at midnight. {largest}" if ceiling <= limit else largest
        return OverBudget(f"{price}, and {used}", advice=f"{wait} {place}".strip())

    def _running(self, jobs: Iterable[Job]) -> int:
        """Return the number of running tasks, with the purchases that are about to become jobs."""
        return self._ordering + sum(job.entry.is_running for job in jobs)

    @contextmanager
    def place(self, jobs: Iterable[Job]) -> Generator[None]:
        """Reserve a place for one more running task beside `jobs`.

        Raises:
            TooManyRunning: the limit of running tasks is reached.
        """
        running = self._running(jobs)
        limit = self._limits.running
        if limit is not None and running >= limit:
            raise TooManyRunning.of(running, limit)
        # Until it is a job, a request counts here: its uploads take time. The journal counts the tasks of all servers.
        self._ordering += 1
        try:
            yield
        finally:
            self._ordering -= 1


def largest_text(request: ImageRequest, prices: Prices, credits: float, *, is_series: bool = False) -> str:
    """Return the sentence that names the largest size and quality for these credits. `is_series`: of each picture."""
    best = largest_that_fits(request.request, prices, credits)
    if best is None:
        return (
            "No size and quality fits for all of them: give fewer prompts."
            if is_series
            else "No size and quality fits."
        )
    arguments = {"size": f'"{best.size}"', "quality": f'"{best.quality}"'}
    if sizes.takes_resolution(best.size):
        arguments["resolution"] = f'"{best.resolution}"'
    if best.n != request.request.n:
        arguments["n"] = str(best.n)
    words = ", ".join(f"{name}={value}" for name, value in arguments.items())
    each = " for each picture" if is_series else ""
    return f"The largest that fits{each} is {words}: at most {costs.format_credits(prices.ceiling(best))}{each}."


def largest_that_fits(request: GenerationRequest, prices: Prices, credits: float) -> GenerationRequest | None:
    """Return the most expensive variant of a request for these credits. None: no variant fits.

    Keep the number of images and the quality if possible, then auto or the pixels. The shape stays; for auto it is 1:1.
    """
    model = request.image_model
    own_size = request.size if not sizes.takes_resolution(request.size) else None
    highest = model.qualities[request.quality].tile_base
    qualities = [name for name, quality in model.qualities.items() if quality.tile_base <= highest]
    qualities.sort(key=lambda name: model.qualities[name].tile_base, reverse=True)
    for n in dict.fromkeys((request.n, 1)):
        for quality in qualities:
            variants = [
                request.model_copy(update={"size": size, "resolution": tier, "quality": quality, "n": n})
                for size, tier in _smaller_sizes(request, prices.rule)
            ]
            fitting = [variant for variant in variants if prices.ceiling(variant) <= credits]
            if fitting:
                return fitting[0] if fitting[0].size == own_size else max(fitting, key=prices.ceiling)
    return None


def _smaller_sizes(request: GenerationRequest, rule: str) -> list[tuple[str, str]]:
    """Return the request's own size and the smaller tiers of its shape, as size and resolution."""
    limits = request.image_model.limits
    tiers = list(limits.tiers)
    requested = (request.size, request.resolution)
    if sizes.takes_resolution(request.size, limits):
        tier = next((tier for tier in tiers if tier.upper() == request.resolution.upper()), tiers[-1])
        return [(request.size, each) for each in tiers[: tiers.index(tier) + 1]]
    size = sizes.resolve(request.size, request.resolution, rule, limits).size
    if size is None:
        return [requested, *(("1:1", tier) for tier in tiers)]
    ratio = sizes.nearest_ratios(size.width, size.height, limits)[0]
    cells = [(tier, sizes.resolve(ratio, tier, rule, limits).size) for tier in tiers]
    return [requested, *((ratio, tier) for tier, cell in cells if cell is not None and cell.pixels <= size.pixels)]
