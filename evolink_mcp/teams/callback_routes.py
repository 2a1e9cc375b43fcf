"""The callback endpoint. It needs no token: only this team can sign its addresses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, cast

from pydantic_core import from_json
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.teams.callbacks import Callbacks
from evolink_mcp.teams.tenants import TenantLimitReached

ReceiveCallback = Callable[
    [str, str, str], Awaitable[None]
]  # of the profile's channel, the entry's key and the task ID


class CallbackEndpoint:
    """`POST /callbacks/{signed}`. The HTTP guard passes each body as one message."""

    def __init__(self, callbacks: Callbacks, receive_callback: ReceiveCallback, count: Callable[[str], None]) -> None:
        """`count` receives the outcome of each callback: `received`, `refused` or `postponed`."""
        self._callbacks = callbacks
        self._receive_callback = receive_callback
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        purchase = self._callbacks.read(scope["path"])
        task_id = _task_id_in((await receive()).get("body", b""))
        if purchase is None:
            self._count("refused")
            response = JSONResponse({"error": "there is no such address"}, 404)
        elif not isinstance(task_id, str):
            self._count("refused")
            response = JSONResponse({"error": "the body names no task"}, 400)
        else:
            response = await self._pass_on(*purchase, task_id)
        await response(scope, receive, send)

    async def _pass_on(self, channel: str, key: str, task_id: str) -> JSONResponse:
        try:
            await self._receive_callback(channel, key, task_id)
        except (JournalUnwritable, TenantLimitReached):
            self._count("postponed")
            return JSONResponse({"error": "the server cannot record it now; try again"}, 503)  # EvoLink tries again
        self._count("received")
        return JSONResponse({"status": "ok"})


def _task_id_in(body: bytes) -> object:
    """Return the task ID in a callback. The rest of the body is not trusted."""
    try:
        value: object = from_json(body)
    except ValueError:
        return None
    return cast("dict[str, Any]", value).get("id") if isinstance(value, dict) else None
