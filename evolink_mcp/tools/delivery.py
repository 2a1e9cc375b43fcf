"""The delivery of an answer: complete when the transport has written it to an open connection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from mcp.server.mcpserver import Context

from evolink_mcp.studio.jobs import guarded

SCOPE_KEY = "evolink_mcp.delivery"  # the key in the ASGI scope of an HTTP request

Act = Callable[[bool], Awaitable[None]]


class Delivery:
    """The delivery of one call's answer. A tool adds actions, the transport settles the delivery."""

    def __init__(self) -> None:
        self._acts: list[Act] = []

    @property
    def is_awaited(self) -> bool:
        """Whether an action waits for the delivery."""
        return bool(self._acts)

    def when_settled(self, act: Act) -> None:
        """Await `act(is_written)` when the delivery is settled."""
        self._acts.append(act)

    async def settle(self, is_written: bool) -> None:
        """Run the actions: the answer was written, or the connection is closed. A failing action ends nothing else."""
        # A second settlement must not run an action again: each one removes a waiting call from its job.
        acts = self._acts
        self._acts = []
        for act in acts:
            await guarded(act, is_written)


def delivery_of(ctx: Context[Any, Any]) -> Delivery | None:
    """Return the delivery of this call's answer. None: the transport does not report it."""
    request = ctx.request_context.request
    # The stdio transport passes the delivery itself as the request. HTTP passes a Starlette request.
    if isinstance(request, Delivery):
        return request
    scope: dict[str, Any] = getattr(request, "scope", None) or {}
    delivery = scope.get(SCOPE_KEY)
    return delivery if isinstance(delivery, Delivery) else None
