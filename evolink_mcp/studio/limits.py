"""What the owner allows: how many credits, how many tasks at once, and where results may be sent."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evolink_mcp.api.urls import host_of
from evolink_mcp.errors import CallbackRefused, TooManyRunning

if TYPE_CHECKING:  # settings hold a budget, and nothing of a server's start waits for more than settings
    from evolink_mcp.studio.jobs import Job


@dataclass(frozen=True, slots=True)
class Budget:
    """Caps in credits, from the settings; None means no cap. `running` is how many tasks may be under way at once."""

    per_call: float | None = None
    per_day: float | None = None
    confirm_above: float | None = None
    running: int | None = None


class Limits:
    """`running`: how many tasks may be under way at once; `callback_hosts`: what callbacks may name. None: no limit."""

    def __init__(self, running: int | None, callback_hosts: frozenset[str] | None) -> None:
        self._running = running
        self._callback_hosts = callback_hosts
        self._ordering = 0

    def check_callback(self, url: str | None) -> None:
        """Check where the result would be told.

        Raises:
            CallbackRefused: the owner does not allow this host.
        """
        if url is None or self._callback_hosts is None:
            return
        host = host_of(url)
        if host not in self._callback_hosts:
            allowed = ", ".join(sorted(self._callback_hosts)) or "no host at all"
            raise CallbackRefused(f"the callback_url names {host}, and this server allows {allowed}")

    @contextmanager
    def place(self, jobs: Iterable[Job]) -> Generator[None]:
        """Keep room for one more task beside these jobs, until it is one of them.

        Raises:
            TooManyRunning: as many are under way as may be.
        """
        under_way = self._ordering + sum(job.entry.is_running for job in jobs)
        if self._running is not None and under_way >= self._running:
            raise TooManyRunning.of(under_way, self._running)
        self._ordering += 1
        try:
            yield
        finally:
            self._ordering -= 1
