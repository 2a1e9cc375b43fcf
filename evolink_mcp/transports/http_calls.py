"""The calls that are under way over streamable HTTP: cancelled by another POST, and delivered or not.

Each POST is served on its own, so the SDK cannot connect a `notifications/cancelled` with its call. Clients of the
protocol up to 2025-11-25 send one when they give up, and leave the answer's stream open. So every client that
initializes gets a session id, which only names it: no state is kept for it, and any process may serve it. A call that is
not under way here may be at another server of the team, which is told.
"""

from __future__ import annotations

import uuid
from contextlib import suppress
from typing import cast

import anyio
from mcp.shared.dispatcher import as_request_id, coerce_request_id
from mcp.shared.jsonrpc_dispatcher import cancelled_request_id_from_params
from mcp_types import JSONRPCNotification, JSONRPCRequest, RequestId
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.journal import Journal, Notification
from evolink_mcp.tools.delivery import SCOPE_KEY, Delivery
from evolink_mcp.transports.messages import read_post

PATH = "/mcp"
SESSION_HEADER = b"mcp-session-id"
SESSION = "session "
METHOD_NOT_ALLOWED = 405

Name = tuple[str, RequestId]  # the client, and the id of its request


class Call:
    """One request that is being answered."""

    def __init__(self) -> None:
        self.delivery = Delivery()
        self.cancelled = anyio.Event()
        self.gone = False
        self.begun = False
        self.answered = False


class Calls:
    """An ASGI app around `app`. It stands behind the door, which gives it each body in one message.

    `journal` tells the other servers of its account what was cancelled.
    """

    def __init__(self, app: ASGIApp, journal: Journal) -> None:
        self._app = app
        self._journal = journal
        self._under_way: dict[Name, list[Call]] = {}
        journal.listen(self._heard)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["method"] == "GET" and scope["path"] == PATH:
            # A stream without a request has nothing to say here, and would hold a connection for each client.
            headers = [(b"allow", b"POST"), (b"content-length", b"0")]
            await send({"type": "http.response.start", "status": METHOD_NOT_ALLOWED, "headers": headers})
            await send({"type": "http.response.body"})
        elif scope["method"] == "POST" and scope["path"] == PATH:
            await self._post(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        post = await read_post(scope, receive, send)
        if post is None:
            return
        message, receive = post
        client = _client(scope)
        if isinstance(message, JSONRPCNotification) and message.method == "notifications/cancelled":
            request_id = cancelled_request_id_from_params(message.params)
            if request_id is not None:
                await self._cancel(_name(client, request_id))
        if not isinstance(message, JSONRPCRequest):
            await self._app(scope, receive, send)
            return
        if message.method == "initialize":
            send = _introducing(send)
        call = Call()
        name = _name(client, message.id)
        waiting = self._under_way.setdefault(name, [])
        waiting.append(call)
        try:
            scope = {**scope, SCOPE_KEY: call.delivery}
            await self._app(scope, _until_cancelled(receive, call), _noting(send, call))
            if call.cancelled.is_set() and call.begun and not call.answered:
                await send({"type": "http.response.body"})  # the client still holds the stream: end it properly
        finally:
            waiting.remove(call)
            if not waiting:
                self._under_way.pop(name, None)
            with anyio.CancelScope(shield=True):
                await call.delivery.settle(call.answered and not call.gone)

    async def _cancel(self, name: Name) -> None:
        """Let the call's client vanish. Two calls of one name cannot be told apart, so neither is touched."""
        waiting = self._under_way.get(name, [])
        if len(waiting) == 1:
            waiting[0].cancelled.set()
        elif not waiting and name[0].startswith(SESSION):  # behind a proxy, all others have one address
            with suppress(JournalUnwritable):
                await self._journal.publish(Notification(call=name))

    def _heard(self, news: Notification) -> None:
        if news.call is None or as_request_id(news.call[1]) is None:
            return
        waiting = self._under_way.get(_name(*news.call), [])
        if len(waiting) == 1:
            waiting[0].cancelled.set()


def _until_cancelled(receive: Receive, call: Call) -> Receive:
    """Return a `receive` that also reports a disconnect when the call is cancelled."""

    async def received() -> Message:
        found: list[Message] = []
        async with anyio.create_task_group() as group:

            async def ask() -> None:
                found.append(await receive())
                group.cancel_scope.cancel()

            async def end() -> None:
                await call.cancelled.wait()
                group.cancel_scope.cancel()

            group.start_soon(ask)
            group.start_soon(end)
        message = found[0] if found else {"type": "http.disconnect"}
        call.gone = call.gone or message["type"] == "http.disconnect"
        return message

    return received


def _noting(send: Send, call: Call) -> Send:
    async def noted(message: Message) -> None:
        call.begun = True
        if message["type"] == "http.response.body" and not message.get("more_body"):
            call.answered = not call.gone
        await send(message)

    return noted


def _introducing(send: Send) -> Send:
    async def introduced(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            headers = [pair for pair in message.get("headers", []) if pair[0].lower() != SESSION_HEADER]
            message = {**message, "headers": [*headers, (SESSION_HEADER, uuid.uuid4().hex.encode())]}
        await send(message)

    return introduced


def _client(scope: Scope) -> str:
    """Who sends the request, as far as that can be told: by its session, else by its address and the name it gives."""
    headers = dict(cast("list[tuple[bytes, bytes]]", scope["headers"]))
    if session := headers.get(SESSION_HEADER):
        return SESSION + session.decode("latin-1")
    host = (scope.get("client") or ("", 0))[0]
    return f"{host} {headers.get(b'user-agent', b'').decode('latin-1')}"


def _name(client: str, request_id: RequestId) -> Name:
    """Return the key of a call. "7" and 7 are one ID, as for the SDK."""
    return client, coerce_request_id(request_id)
