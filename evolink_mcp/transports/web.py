"""MCP over HTTP: streamable HTTP and SSE on uvicorn; it refuses other origins, and ends soon after a signal."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import anyio
import uvicorn
from mcp.server.mcpserver import MCPServer
from mcp.server.transport_security import TransportSecuritySettings

from evolink_mcp.api.urls import is_loopback

log = logging.getLogger(__name__)

REQUEST_MAX_BYTES = 512 << 10
LEAVE_WITHIN_S = 0.3


def web_app(server: MCPServer[Any], transport: str, host: str) -> Any:
    """The ASGI app that speaks `transport` ("http": streamable HTTP at /mcp, "sse": SSE at /sse) for `server`.

    `host` is the address it will be bound to: a loopback address answers only requests that name this machine.
    """
    guard = _guard(host)
    if transport == "sse":
        return server.sse_app(max_request_body_size=REQUEST_MAX_BYTES, transport_security=guard, host=host)
    return server.streamable_http_app(
        stateless_http=True, json_response=False, max_request_body_size=REQUEST_MAX_BYTES,
        transport_security=guard, host=host,
    )  # fmt: skip


async def serve_app(app: Any, host: str, port: int) -> int:
    """Serve an ASGI app until SIGINT or SIGTERM. Returns the exit code: 1 if the port cannot be opened."""
    server = _Server(
        # uvicorn's type says int, its code compares floats.
        uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=LEAVE_WITHIN_S)  # pyright: ignore[reportArgumentType]
    )
    code = 0
    async with anyio.create_task_group() as group:

        async def stop_on_signal() -> None:
            nonlocal code
            watched = (signal.SIGINT,) if sys.platform == "win32" else (signal.SIGINT, signal.SIGTERM)
            with anyio.open_signal_receiver(*watched) as signals:
                async for number in signals:
                    code = 128 + number
                    # Everything paid is in the journal. uvicorn would print a traceback for every open stream.
                    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
                    server.should_exit = True

        group.start_soon(stop_on_signal)
        try:
            await server.serve()
        except SystemExit:
            code = 1
        group.cancel_scope.cancel()
    return code if server.started else 1


def _guard(host: str) -> TransportSecuritySettings:
    """Allow only this machine's names as Host and Origin; a server opened to others on purpose is guarded elsewhere."""
    if not is_loopback(host):
        log.warning("serving %s without authentication: everyone who reaches it spends your credits", host)
        return TransportSecuritySettings(enable_dns_rebinding_protection=False)
    names = ("127.0.0.1", "localhost", "[::1]")
    return TransportSecuritySettings(
        enable_dns_rebinding_protection=True,
        allowed_hosts=[f"{name}:*" for name in names],
        allowed_origins=[f"http://{name}:*" for name in names],
    )


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave signals to `serve_app`: uvicorn would raise them again before the studio is closed."""
        yield
