"""MCP over HTTP: streamable HTTP and SSE on uvicorn; it refuses other origins, and ends soon after a signal."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import anyio
import uvicorn
from mcp.server.mcpserver import MCPServer
from mcp.server.transport_security import TransportSecuritySettings

from evolink_mcp.journal.backend import Journal
from evolink_mcp.transports.authentication import Authenticator
from evolink_mcp.transports.http_calls import Calls
from evolink_mcp.transports.http_guard import LOOPBACK_NAMES, Door, Impatient, Page, accepted_at_once
from evolink_mcp.transports.signals import on_stop_signal

log = logging.getLogger(__name__)

REQUEST_MAX_BYTES = 512 << 10
LEAVE_WITHIN_S = 0.3
DRAIN_WITHIN_S, DRAINED_EVERY_S = 7.0, 0.05
# Clients ask something more before they believe an answer: the SDK's own lists the tools.
LINGER_S = 0.5


def door(
    app: Any,
    names: Sequence[str] = (),
    authenticator: Authenticator | None = None,
    not_ready: Callable[[], Awaitable[str | None]] | None = None,
    pages: Sequence[Page] = (),
) -> Door:
    """`app` behind its door: it answers to the names of this machine and to `names`, and to `callers`, if any.

    `not_ready` says why the server cannot do paid work now, if so. `pages` are answered beside
    `app`.
    """
    return Door(app, names, REQUEST_MAX_BYTES, authenticator, not_ready, pages)


def mcp_app(
    server: MCPServer[Any], journal: Journal, *, transport: str, host: str, hostnames: Sequence[str] = ()
) -> Any:
    """The ASGI app that speaks `transport` ("http": streamable HTTP at /mcp, "sse": SSE at /sse) for `server`.

    `journal` is that of its studio, by which the servers of a team hear of each other.
    `host` is the address it will be bound to. It stands behind a `door`, which has the same `hostnames`.
    """
    names = [name.lower() for name in hostnames]
    guard = _guard([*LOOPBACK_NAMES, *names])
    # One byte more than the door lets through, so that it is the door that says what was too much.
    limit = REQUEST_MAX_BYTES + 1
    if transport == "sse":
        return server.sse_app(max_request_body_size=limit, transport_security=guard, host=host)
    app = server.streamable_http_app(
        stateless_http=True, json_response=False, max_request_body_size=limit, transport_security=guard, host=host
    )
    return Calls(app, journal)


async def serve_app(
    app: Any,
    host: str,
    port: int,
    leaving: Callable[[int], None] = lambda code: None,
    ready: Callable[[], None] = lambda: None,
    drained: Callable[[], bool] = lambda: True,
) -> int:
    """Serve an ASGI app until SIGINT or SIGTERM. Returns the exit code: 1 if the port cannot be opened.

    `ready()` is called when the port is open. After a signal `drained()` is called until it says that nothing has to be
    answered any more, for DRAIN_WITHIN_S at most; a second signal ends that. Then `leaving(code)` is called.
    """
    server = _Server(
        # uvicorn's type says int, its code compares floats.
        uvicorn.Config(
            app, host=host, port=port, log_level="warning", http=Impatient, ws="none",
            timeout_graceful_shutdown=LEAVE_WITHIN_S,  # pyright: ignore[reportArgumentType]
            backlog=accepted_at_once(),
        ),
        ready,
    )  # fmt: skip
    code = 0

    draining: asyncio.Task[None] | None = None

    def stop(exit_code: int) -> None:
        nonlocal code, draining
        code = exit_code
        if draining is None and not drained():
            draining = asyncio.create_task(drain())
        else:
            leave()

    async def drain() -> None:
        with anyio.move_on_after(DRAIN_WITHIN_S):
            while not drained():
                await anyio.sleep(DRAINED_EVERY_S)
        await anyio.sleep(LINGER_S)
        leave()

    def leave() -> None:
        leaving(code)
        # Everything paid is in the journal. uvicorn would print a traceback for every open stream.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        server.should_exit = True

    starting = logging.getLogger("uvicorn.error")
    starting.setLevel(logging.CRITICAL)  # why a port cannot be opened is told here
    asyncio.get_running_loop().set_exception_handler(_once_out_of_descriptors())
    with on_stop_signal(stop):
        try:
            await server.serve()
        except SystemExit:
            code = 1
            log.error(
                "%s port %d cannot be opened (%s); choose another one with --port", host, port, _why_not(host, port)
            )
    return code if server.started else 1


def _why_not(host: str, port: int) -> str:
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return "it was busy"
    except OSError as error:
        return os.strerror(error.errno).lower() if error.errno else str(error)


def _once_out_of_descriptors() -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """asyncio prints a traceback for each connection that it has no descriptor for: say that once instead."""
    said = False

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal said
        if "out of system resource" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif not said:
            said = True
            log.error("out of file descriptors: new connections wait (said once); allow more, for example by ulimit -n")

    return handle


def _guard(names: Sequence[str]) -> TransportSecuritySettings:
    """The SDK's own check of Host and Origin, behind that of the door."""
    return TransportSecuritySettings(
        enable_dns_rebinding_protection=True,
        allowed_hosts=[*names, *(f"{name}:*" for name in names)],
        allowed_origins=[
            f"{scheme}://{name}{port}" for scheme in ("http", "https") for name in names for port in ("", ":*")
        ],
    )


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
            self._ready()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave signals to `serve_app`: uvicorn would raise them again before the studio is closed."""
        yield
