"""Whether an answer reached its caller: known only when it was written to a connection that was still there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from mcp.server.mcpserver import Context

from evolink_mcp.studio.jobs import guarded

SCOPE_KEY = "evolink_mcp.delivery"  # where the HTTP transport keeps it in the ASGI scope

Act = Callable[[bool], Awaitable[None]]


class Delivery:
    """The way of one call's answer to its client. The transport settles it; a tool says what is to be done then."""

    def __init__(self) -> None:
        self._acts: list[Act] = []

    @property
    def awaited(self) -> bool:
        """Whether anybody wants to know."""
        return bool(self._acts)

    def when_settled(self, act: Act) -> None:
        """Await `act(arrived)` once it is known whether the answer was written."""
        self._acts.append(act)

    async def settle(self, arrived: bool) -> None:
        """Await every act: the answer was written, or its client is gone. An act that fails ends nothing else."""
        acts = self._acts
        self._acts = []
        for act in acts:
            await guarded(act, arrived)


def delivery_of(ctx: Context[Any, Any]) -> Delivery | None:
    """The delivery of this call's answer; None where the transport cannot tell."""
    request = ctx.request_context.request
    if isinstance(request, Delivery):
        return request
    scope: dict[str, Any] = getattr(request, "scope", None) or {}
    found = scope.get(SCOPE_KEY)
    return found if isinstance(found, Delivery) else None
