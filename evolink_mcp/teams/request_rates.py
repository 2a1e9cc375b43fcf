"""Limit the HTTP requests of each tenant per minute."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from http import HTTPStatus

from evolink_mcp.transports.authentication import AuthFailure

MINUTE_S = 60.0
TENANTS_MAX = 10_000


class RequestRates:
    """The times of the requests of the last minute, by tenant.

    Above `tenants_max` tenants it forgets the tenant whose last request is the oldest. `clock` (seconds) is for tests.
    """

    def __init__(self, *, tenants_max: int = TENANTS_MAX, clock: Callable[[], float] = time.monotonic) -> None:
        self._tenants_max = tenants_max
        self._clock = clock
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of known tenants."""
        return len(self._times)

    def failure(self, tenant: str, limit: int | None) -> AuthFailure | None:
        """Count a request of a tenant. Return the 429 answer if `limit` requests of the last minute are reached."""
        if limit is None:
            return None
        now = self._clock()
        times = self._times.setdefault(tenant, deque())
        self._times.move_to_end(tenant)
        if len(self._times) > self._tenants_max:
            self._times.popitem(last=False)
        while times and times[0] <= now - MINUTE_S:
            times.popleft()
        if len(times) < limit:
            times.append(now)
            return None
        wait_s = int(times[0] + MINUTE_S - now) + 1 if times else int(MINUTE_S)
        text = f"The limit of {limit} requests per minute is reached. Try again in {wait_s} s."
        return AuthFailure(HTTPStatus.TOO_MANY_REQUESTS, text, ((b"retry-after", str(wait_s).encode()),))
