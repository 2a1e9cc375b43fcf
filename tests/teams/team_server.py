"""A server with tenants in the test's process: a tokens file, a simulated EvoLink, and HTTP clients."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
from conftest import TEST_CLIENT, PlainSimulator
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client
from shared import shared_decoder

from evolink_mcp.studio.jobs import Sleep
from evolink_mcp.teams.adopter import Adopter
from evolink_mcp.teams.app import Readiness, guarded_app, hostnames_of, metrics_for, tenants_app
from evolink_mcp.teams.authenticator import TeamAuthenticator
from evolink_mcp.teams.oauth import Issuer
from evolink_mcp.teams.settings import TeamSettings
from evolink_mcp.teams.studios import Studios
from evolink_mcp.teams.tenants import Tenants
from evolink_mcp.teams.tokens import Tokens
from evolink_mcp.teams.uploads import UploadApp
from evolink_mcp.transports.http import mcp_app
from evolink_mcp.transports.http_guard import HttpGuard

INITIALIZE = {
    "jsonrpc": "2.0", "id": 1, "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "x", "version": "1"}},
}  # fmt: skip
HEADERS = {"accept": "application/json, text/event-stream", "content-type": "application/json"}


def block(name: str, token: str, **extra: Any) -> str:
    lines = [f"{word} = {value!r}".replace("'", '"') for word, value in extra.items()]
    digest = hashlib.sha256(token.encode()).hexdigest()
    return "\n".join(["[[token]]", f'name = "{name}"', f'sha256 = "{digest}"', *lines, ""])


class ShiftedClock:
    """The real time plus `shift_s`, so that a test can let links expire."""

    def __init__(self) -> None:
        self.shift_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.shift_s


def guard_of(
    studios: Studios,
    authenticator: TeamAuthenticator,
    group: Any,
    tenants: Tenants[UploadApp] | None = None,
    adopter: Adopter | None = None,
) -> HttpGuard:
    """Assemble the app of a server as `evolink-mcp http` does."""
    hostnames = hostnames_of((), studios.settings)
    tenants = tenants or tenants_of(studios, authenticator, group)
    readiness = Readiness(studios.settings, authenticator, studios.database)
    adopter = adopter or Adopter(studios, tenants, authenticator)
    guard = guarded_app(tenants, studios, authenticator, hostnames, readiness, adopter.receive_callback)
    metrics_for(studios, guard, readiness)
    return guard


def tenants_of(
    studios: Studios, authenticator: TeamAuthenticator, group: Any, transport: str = "http"
) -> Tenants[UploadApp]:
    hostnames = hostnames_of((), studios.settings)
    make_mcp_app = partial(mcp_app, transport=transport, host="127.0.0.1", hostnames=hostnames)
    return tenants_app(studios, authenticator, group, make_mcp_app)


class TeamServer:
    """A server with tenants in this process. Each call comes from a real client over HTTP."""

    def __init__(
        self, guard: HttpGuard, simulator: PlainSimulator, studios: Studios, adopter: Adopter, clock: ShiftedClock
    ) -> None:
        self.guard = guard
        self.adopter = adopter
        self.simulator = simulator
        self.studios = studios
        self.clock = clock

    def http(self, token: str | None = None, **extra: str) -> httpx.AsyncClient:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        headers = {**HEADERS, **headers, **{name.replace("_", "-"): value for name, value in extra.items()}}
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.guard), base_url="http://localhost", headers=headers
        )

    @asynccontextmanager
    async def client(self, token: str, mode: Any = "auto", **extra: str) -> AsyncIterator[Client]:
        async with (
            self.http(token, **extra) as http,
            Client(
                streamable_http_client("http://localhost/mcp", http_client=http), client_info=TEST_CLIENT, mode=mode
            ) as client,
        ):
            yield client

    async def call(self, token: str, tool: str, mode: str = "auto", **arguments: Any) -> Any:
        async with self.client(token, mode) as client:
            return await client.call_tool(tool, arguments)

    @property
    def posts(self) -> int:
        return sum(request.path == "/v1/images/generations" for request in self.simulator.requests)


@asynccontextmanager
async def open_team_server(
    tmp_path: Path,
    *blocks: str,
    simulator: PlainSimulator | None = None,
    issuer: Issuer | None = None,
    transport: str = "http",
    pause: Sleep = anyio.sleep,
    **environ: str,
) -> AsyncIterator[TeamServer]:
    """Open a server. `blocks` are the tokens file. All tenants spend from one simulated account."""
    (tmp_path / "tokens.toml").write_text("".join(blocks))
    simulator = simulator or PlainSimulator()
    settings = TeamSettings.from_environment(
        {
            "EVOLINK_API_KEY": "sk-test-key",
            "EVOLINK_BASE_URL": "http://127.0.0.1:9",
            "EVOLINK_MCP_DATA_DIR": str(tmp_path / "data"),
            "EVOLINK_MCP_OUTPUT_DIR": str(tmp_path / "pictures"),
            "EVOLINK_MCP_TOKENS_FILE": str(tmp_path / "tokens.toml"),
            **environ,
        }
    )
    assert settings.tokens_file is not None
    with anyio.fail_after(300):
        async with AsyncExitStack() as stack:
            group = await stack.enter_async_context(anyio.create_task_group())
            clock = ShiftedClock()
            upstream = httpx.ASGITransport(simulator.app)
            studios = Studios(settings, None, shared_decoder(), group, transport=upstream, clock=clock, pause=pause)
            authenticator = TeamAuthenticator(
                Tokens(settings.tokens_file),
                issuer,
                accepts_caller_keys=settings.has_caller_keys,
                server_key=settings.key,
            )
            tenants = tenants_of(studios, authenticator, group, transport)
            adopter = Adopter(studios, tenants, authenticator)
            guard = guard_of(studios, authenticator, group, tenants, adopter)
            yield TeamServer(guard, simulator, studios, adopter, clock)
            group.cancel_scope.cancel()


REQUEST = {"prompt": "sim:fast a fox", "size": "1024x640"}
ANNA, BERT = block("anna", "a"), block("bert", "b")
