"""Where EvoLink calls back: an address needs no token, because only this team can have made it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.teams.callbacks import Callbacks
from evolink_mcp.transports.http_calls import message_in

Tell = Callable[[str, str, str], Awaitable[None]]  # of an account's order, by its key: this task has ended


class CalledBack:
    """`POST` below PATH, behind the door, which gives it each body in one message."""

    def __init__(self, callbacks: Callbacks, tell: Tell) -> None:
        self._callbacks = callbacks
        self._tell = tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        order = self._callbacks.read(scope["path"])
        task_id = message_in((await receive()).get("body", b"")).get("id")  # nothing else of it is read
        if order is None:
            answer = JSONResponse({"error": "there is no such address"}, 404)
        elif not isinstance(task_id, str):
            answer = JSONResponse({"error": "the body names no task"}, 400)
        else:
            answer = await self._told(*order, task_id)
        await answer(scope, receive, send)

    async def _told(self, account: str, key: str, task_id: str) -> JSONResponse:
        try:
            await self._tell(account, key, task_id)
        except JournalUnwritable:
            return JSONResponse({"error": "come again"}, 503)  # EvoLink tries again
        return JSONResponse({"status": "ok"})
