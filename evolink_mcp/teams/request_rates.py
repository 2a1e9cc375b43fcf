"""Limit the HTTP requests of each tenant per minute."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from http import HTTPStatus

from evolink_mcp.transports.authentication import AuthFailure

MINUTE_S = 60.0
TENANTS_MAX = 10_000
REQUESTS_PER_MINUTE = 600


class RequestRates:
    """The requests of each tenant in its current minute. The minute begins with a request.

    `default` is the limit of a tenant that has no other one. Above `tenants_max` tenants it forgets the tenant whose last request
    is the oldest. `clock` (seconds) is for tests.
    """

    def __init__(
        self,
        *,
        default: int = REQUESTS_PER_MINUTE,
        tenants_max: int = TENANTS_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._default = default
        self._tenants_max = tenants_max
        self._clock = clock
        self._counts: OrderedDict[str, tuple[float, int]] = OrderedDict()  # the begin of the minute, and its requests

    def __len__(self) -> int:
        """Return the number of known tenants."""
        return len(self._counts)

    def failure(self, tenant: str, limit: int | None) -> AuthFailure | None:
        """Count a request of a tenant. Return the 429 answer if the `limit` of this minute is reached."""
        limit = self._default if limit is None else limit
        now = self._clock()
        begin, count = self._counts.get(tenant, (now, 0))
        if now >= begin + MINUTE_S:
            begin = now
            count = 0
        is_allowed = count < limit
        self._counts[tenant] = (begin, count + is_allowed)
        self._counts.move_to_end(tenant)
        if len(self._counts) > self._tenants_max:
            self._counts.popitem(last=False)
        if is_allowed:
            return None
        wait_s = int(begin + MINUTE_S - now) + 1
        text = f"The limit of {limit} requests per minute is reached. Try again in {wait_s} s."
        return AuthFailure(HTTPStatus.TOO_MANY_REQUESTS, text, ((b"retry-after", str(wait_s).encode()),))
