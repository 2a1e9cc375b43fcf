"""Limit the HTTP requests of each tenant per minute, at all servers together."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import NamedTuple

from evolink_mcp.transports.authentication import AuthFailure

MINUTE_S = 60
TENANTS_MAX = 10_000
REQUESTS_PER_MINUTE = 600


class MinuteCount(NamedTuple):
    """The requests of a tenant in a minute. `minute` counts from the epoch."""

    tenant: str
    minute: int
    requests: int


@dataclass(slots=True)
class _Count:
    """The requests of one minute: those at this server, the part of them that it has not sent to the other servers yet, and
    those at the other servers.
    """

    minute: int
    own: int = 0
    unsent: int = 0
    others: int = 0


class RequestRates:
    """The requests of each tenant in the current minute of `clock` (epoch seconds).

    `default` is the limit of a tenant that has no other one. Above `tenants_max` tenants it forgets the tenant whose last request
    is the oldest. The servers of a team exchange their counts with `take_unsent` and `set_totals`.
    """

    def __init__(
        self,
        *,
        default: int = REQUESTS_PER_MINUTE,
        tenants_max: int = TENANTS_MAX,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._default = default
        self._tenants_max = tenants_max
        self._clock = clock
        self._counts: OrderedDict[str, _Count] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of known tenants."""
        return len(self._counts)

    def failure(self, tenant: str, limit: int | None) -> AuthFailure | None:
        """Count a request of a tenant. Return the 429 answer if the `limit` of this minute is reached."""
        limit = self._default if limit is None else limit
        now = self._clock()
        minute = int(now // MINUTE_S)
        count = self._counts.get(tenant)
        if count is None or count.minute != minute:
            count = self._counts[tenant] = _Count(minute)
        self._counts.move_to_end(tenant)
        if len(self._counts) > self._tenants_max:
            self._counts.popitem(last=False)
        if count.own + count.others < limit:
            count.own += 1
            count.unsent += 1
            return None
        wait_s = int((minute + 1) * MINUTE_S - now) + 1
        text = f"The limit of {limit} requests per minute is reached. Try again in {wait_s} s."
        return AuthFailure(HTTPStatus.TOO_MANY_REQUESTS, text, ((b"retry-after", str(wait_s).encode()),))

    def take_unsent(self) -> list[MinuteCount]:
        """Return the requests that the other servers do not know yet."""
        unsent: list[MinuteCount] = []
        for tenant, count in self._counts.items():
            if count.unsent:
                unsent.append(MinuteCount(tenant, count.minute, count.unsent))
                count.unsent = 0
        return unsent

    def restore_unsent(self, counts: Iterable[MinuteCount]) -> None:
        """Take back counts of `take_unsent`: the other servers did not get them."""
        for item in counts:
            count = self._counts.get(item.tenant)
            if count is not None and count.minute == item.minute:
                count.unsent += item.requests

    def set_totals(self, totals: Iterable[MinuteCount]) -> None:
        """Receive the requests at all servers together."""
        for total in totals:
            count = self._counts.get(total.tenant)
            if count is not None and count.minute == total.minute:
                # The total contains the own requests that were sent before.
                count.others = max(0, total.requests - (count.own - count.unsent))
