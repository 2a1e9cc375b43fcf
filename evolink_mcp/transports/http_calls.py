"""Track the running calls of streamable HTTP: connect cancellations with their calls, and record the delivery of answers.

The SDK serves each POST separately, so it cannot connect `notifications/cancelled` with a call. A client of a protocol up
to 2025-11-25 sends one when it gives up, and keeps the answer's stream open. So this module gives each client a session ID
at `initialize`. The server keeps no state of a session, so any process may serve it. If the call does not run here, another
server of the team may have it, so the cancellation goes to all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any, cast

import anyio
from mcp.shared.dispatcher import as_request_id, coerce_request_id
from mcp.shared.jsonrpc_dispatcher import cancelled_request_id_from_params
from mcp_types import JSONRPCNotification, JSONRPCRequest, RequestId
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.journal import Journal, Notification
from evolink_mcp.tools.client_names import new_session_id
from evolink_mcp.tools.delivery import SCOPE_KEY, Delivery
from evolink_mcp.transports.authentication import CALLER_KEY
from evolink_mcp.transports.messages import read_post
from evolink_mcp.transports.turns import Turns

PATH = "/mcp"
SESSION_HEADER = b"mcp-session-id"
SESSION = "session "

CallKey = tuple[str, RequestId]  # the client and the ID of its request


class Call:
    """One running call."""

    def __init__(self) -> None:
        self.delivery = Delivery()
        self.cancelled = anyio.Event()
        self.is_disconnected = False
        self.is_answer_started = False
        self.is_answered = False


class Calls:
    """An ASGI app in front of `app`. It needs the HTTP guard, which passes each body as one message.

    `journal` publishes cancellations to the other servers of the profile. `turns` are those of the process.
    """

    def __init__(self, app: ASGIApp, journal: Journal, turns: Turns) -> None:
        self._app = app
        self._journal = journal
        self._running: dict[CallKey, list[Call]] = {}
        self._turns = turns
        journal.listen(self._receive_notification)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["method"] == "GET" and scope["path"] == PATH:
            # This server sends nothing without a request, so the stream would only hold a connection per client.
            headers = [(b"allow", b"POST"), (b"content-length", b"0")]
            await send({"type": "http.response.start", "status": HTTPStatus.METHOD_NOT_ALLOWED, "headers": headers})
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
                await self._cancel(_key(client, request_id))
        if not isinstance(message, JSONRPCRequest):
            await self._app(scope, receive, send)
            return
        if message.method == "initialize":
            send = _with_session_id(send, message.params or {})
        call = Call()
        key = _key(client, message.id)
        calls = self._running.setdefault(key, [])
        calls.append(call)
        try:
            scope = {**scope, SCOPE_KEY: call.delivery}
            async with self._turns.turn(scope.get(CALLER_KEY)) as give_back:
                await self._app(scope, _until_cancelled(receive, call), _recording(send, call, give_back))
            # After the disconnect the SDK writes nothing more, but the HTTP answer has no end yet.
            if call.cancelled.is_set() and call.is_answer_started and not call.is_answered:
                await send({"type": "http.response.body"})  # the client keeps the stream open, so end it
        finally:
            calls.remove(call)
            if not calls:
                self._running.pop(key, None)
            # A disconnect cancels this coroutine, and the journal must still learn that the answer did not arrive.
            with anyio.CancelScope(shield=True):
                await call.delivery.settle(call.is_answered and not call.is_disconnected)

    async def _cancel(self, key: CallKey) -> None:
        """End the call as if its client disconnected. If two calls have the same key, cancel neither."""
        calls = self._running.get(key, [])
        # Clients behind one proxy can share address, User-Agent and ID. The wrong call could end.
        if len(calls) == 1:
            calls[0].cancelled.set()
        elif not calls and key[0].startswith(SESSION):  # behind a proxy, clients without a session share one address
            with suppress(JournalUnwritable):
                await self._journal.publish(Notification(call=key))

    def _receive_notification(self, notification: Notification) -> None:
        if notification.call is None or as_request_id(notification.call[1]) is None:
            return
        calls = self._running.get(_key(*notification.call), [])
        if len(calls) == 1:
            calls[0].cancelled.set()


def _until_cancelled(receive: Receive, call: Call) -> Receive:
    """Return a `receive` that also reports a disconnect when the call is cancelled."""

    async def receive_next() -> Message:
        messages: list[Message] = []
        async with anyio.create_task_group() as group:

            async def wait_for_message() -> None:
                messages.append(await receive())
                group.cancel_scope.cancel()

            async def wait_for_cancellation() -> None:
                await call.cancelled.wait()
                group.cancel_scope.cancel()

            group.start_soon(wait_for_message)
            group.start_soon(wait_for_cancellation)
        message = messages[0] if messages else {"type": "http.disconnect"}
        call.is_disconnected = call.is_disconnected or message["type"] == "http.disconnect"
        return message

    return receive_next


def _recording(send: Send, call: Call, give_back: Callable[[], None]) -> Send:
    """Return a `send` that records the progress of the answer, and gives the call's turn back.

    A client that does not read would otherwise keep the turn.
    """

    async def send_and_record(message: Message) -> None:
        call.is_answer_started = True
        if message["type"] == "http.response.body" and not message.get("more_body"):
            call.is_answered = not call.is_disconnected
        if message["type"] == "http.response.body":
            give_back()
        await send(message)

    return send_and_record


def _with_session_id(send: Send, params: Mapping[str, Any]) -> Send:
    """Return a `send` that adds a new session ID to a successful response to `initialize`."""
    client = params.get("clientInfo")
    session_id = new_session_id(cast("dict[str, Any]", client).get("name") if isinstance(client, dict) else None)

    async def send_with_id(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            headers = [pair for pair in message.get("headers", []) if pair[0].lower() != SESSION_HEADER]
            message = {**message, "headers": [*headers, (SESSION_HEADER, session_id.encode())]}
        await send(message)

    return send_with_id


def _client(scope: Scope) -> str:
    """Return the identity of a client: its session ID, or else its address and user agent."""
    headers = dict(cast("list[tuple[bytes, bytes]]", scope["headers"]))
    if session := headers.get(SESSION_HEADER):
        return SESSION + session.decode("latin-1")
    host = (scope.get("client") or ("", 0))[0]
    return f"{host} {headers.get(b'user-agent', b'').decode('latin-1')}"


def _key(client: str, request_id: RequestId) -> CallKey:
    """Return the key of a call. "7" and 7 are one ID, as for the SDK."""
    return client, coerce_request_id(request_id)
