"""Serve MCP over streamable HTTP or SSE with uvicorn, until a signal."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import anyio
import uvicorn
from mcp.server.mcpserver import MCPServer
from mcp.server.transport_security import TransportSecuritySettings

from evolink_mcp.journal.journal import Journal
from evolink_mcp.transports.connections import (
    ConnectionLimits,
    LimitedH11Protocol,
    UnreadAnswers,
    close_port,
    descriptor_limit,
)
from evolink_mcp.transports.http_calls import Calls
from evolink_mcp.transports.http_guard import LargeBodies, accepted_hostnames
from evolink_mcp.transports.signals import on_stop_signal
from evolink_mcp.transports.sse_streams import SseStreams
from evolink_mcp.transports.turns import Turns

log = logging.getLogger(__name__)

SSE_MESSAGES_PATH = "/messages/"
# A call without an image fits: a prompt of 32,000 characters and 16 URLs.
REQUEST_MAX_BYTES = 512 << 10
# An authenticated caller may send an image of 8 MiB as a data: URI: base64 adds a third.
LARGE_BODIES = LargeBodies((8 << 20) * 4 // 3 + REQUEST_MAX_BYTES, at_once=4, timeout_s=60.0)
# Without a limit uvicorn waits until every call has ended, and a call can wait for minutes.
LEAVE_TIMEOUT_S = 0.3
# The whole end must take less than 10 s: with compose.yaml Docker kills the server after 12 s.
DRAIN_TIMEOUT_S = 7.0
DRAIN_CHECK_INTERVAL_S = 0.05
# Clients send further requests before they use an answer: the SDK's client lists the tools.
LINGER_S = 0.5
# The last connections that a proxy opened before the port closed get their answers meanwhile.
LAST_ANSWERS_S = 0.3


def mcp_app(
    server: MCPServer[Any],
    journal: Journal,
    *,
    transport: str,
    host: str,
    hostnames: Sequence[str] = (),
    turns: Turns | None = None,
) -> Any:
    """Return the ASGI app of an MCP server.

    `transport` is "http" (streamable HTTP at /mcp) or "sse" (SSE at /sse). `journal` reports cancellations to the other
    servers of a team. The server will bind to `host`, behind an HTTP guard with the same `hostnames`. The apps of all
    tenants share `turns`.
    """
    security = _security_of(accepted_hostnames(hostnames))
    # One byte more than the HTTP guard accepts, because its error text gives advice.
    limit = LARGE_BODIES.body_max_bytes + 1
    if transport == "sse":
        sse = server.sse_app(max_request_body_size=limit, transport_security=security, host=host)
        # The SDK would log the traceback and the content of each invalid message.
        return SseStreams(sse, SSE_MESSAGES_PATH)
    # Any replica answers any request, so no session may live in a process. The answer is a stream, for progress.
    app = server.streamable_http_app(
        stateless_http=True, json_response=False, max_request_body_size=limit, transport_security=security, host=host
    )
    return Calls(app, journal, Turns() if turns is None else turns)


async def serve_app(
    app: Any,
    host: str,
    port: int,
    leaving: Callable[[int], None] = lambda exit_code: None,
    ready: Callable[[int], object] = lambda port: None,
    drained: Callable[[], bool] = lambda: True,
    limits: ConnectionLimits | None = None,
) -> int:
    """Serve an ASGI app until SIGINT or SIGTERM. Return the exit code: 1 if the port is not available.

    It calls `ready(port)` when the port is open; for port 0 the system chooses one. After a signal it calls `drained()`
    repeatedly until that returns True, for DRAIN_TIMEOUT_S at most; a second signal ends the wait. Then it calls
    `leaving(exit_code)`.
    """
    limits = limits or ConnectionLimits.for_descriptors(descriptor_limit())
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        http=cast("Any", partial(LimitedH11Protocol, limits=limits, unread=UnreadAnswers(limits))),
        ws="none",
        timeout_graceful_shutdown=cast("Any", LEAVE_TIMEOUT_S),  # typed as int, but uvicorn compares floats
        backlog=limits.accepted_at_once,
    )
    server = _Server(config, ready, limits.waiting_max)
    exit_code = 0
    draining: asyncio.Task[None] | None = None

    def stop(signal_exit_code: int) -> None:
        nonlocal exit_code, draining
        exit_code = signal_exit_code
        if draining is None and not drained():
            draining = asyncio.create_task(drain())
        else:
            leave()

    async def drain() -> None:
        with anyio.move_on_after(DRAIN_TIMEOUT_S):
            while not drained():
                await anyio.sleep(DRAIN_CHECK_INTERVAL_S)
        try:
            await anyio.sleep(LINGER_S)
            await server.stop_listening()
            await anyio.sleep(LAST_ANSWERS_S)
        finally:
            leave()

    def leave() -> None:
        leaving(exit_code)
        # uvicorn prints a traceback for every open stream. The journal already has all paid work.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        server.should_exit = True

    # serve_app reports an unavailable port itself, in one line.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    asyncio.get_running_loop().set_exception_handler(DescriptorWarning())
    with on_stop_signal(stop):
        try:
            await server.serve()
        # uvicorn calls sys.exit if it cannot open the port.
        except SystemExit:
            exit_code = 1
            reason = _reason_of_unavailable_port(host, port)
            log.error("%s port %d cannot be opened (%s); choose another one with --port", host, port, reason)
    return exit_code if server.started else 1


def _reason_of_unavailable_port(host: str, port: int) -> str:
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return "it was busy"
    except OSError as error:
        return os.strerror(error.errno).lower() if error.errno else str(error)


class DescriptorWarning:
    """An asyncio exception handler that reports exhausted descriptors once.

    asyncio itself logs a traceback for each connection that it cannot accept.
    """

    def __init__(self) -> None:
        self._is_reported = False

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handle one exception of the event loop."""
        if "out of system resource" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif not self._is_reported:
            self._is_reported = True
            log.error(
                "out of file descriptors: new connections wait (reported once); raise the limit, for example with ulimit -n"
            )


def _security_of(names: Sequence[str]) -> TransportSecuritySettings:
    """Return the settings of the SDK's check of Host and Origin, which runs after the HTTP guard."""
    return TransportSecuritySettings(
        enable_dns_rebinding_protection=True,
        allowed_hosts=[*names, *(f"{name}:*" for name in names)],
        allowed_origins=[
            f"{scheme}://{name}{port}" for scheme in ("http", "https") for name in names for port in ("", ":*")
        ],
    )


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[int], object], waiting_max: int) -> None:
        super().__init__(config)
        self._ready = ready
        self._waiting_max = waiting_max

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            # asyncio uses its `backlog` for the system's queue and for the connections of one round. A short queue
            # leaves callers without any answer: the system drops their SYN, and they repeat it after 1, 3, 7 … s.
            for listener in (one for server in self.servers for one in server.sockets):
                with listener.dup() as copy:
                    copy.listen(self._waiting_max)
            logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
            self._ready(self.servers[0].sockets[0].getsockname()[1])

    async def stop_listening(self) -> None:
        """Close the port. Connections that wait to be accepted are served."""
        make: Callable[..., asyncio.Protocol] = cast("Any", self.config.http_protocol_class)
        make_protocol = partial(make, config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        for server in self.servers:
            await close_port(server, make_protocol)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Let `serve_app` handle signals: uvicorn raises them again before the studio is closed."""
        yield
