"""The ASGI app of a server with tenants: each tenant's MCP endpoint, and the paths beside it, behind one HTTP guard."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio
import anyio.abc
import httpx2 as httpx
from starlette.types import ASGIApp

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.app.wiring import server_for
from evolink_mcp.errors import EvolinkError, JournalUnwritable, Rejected
from evolink_mcp.studio.callback_history import MISSING
from evolink_mcp.studio.studio import Studio
from evolink_mcp.teams.authenticator import TeamAuthenticator
from evolink_mcp.teams.callback_routes import CallbackEndpoint, ReceiveCallback
from evolink_mcp.teams.callbacks import PATH as CALLBACKS
from evolink_mcp.teams.object_store import PATH as PICTURES
from evolink_mcp.teams.settings import TeamSettings
from evolink_mcp.teams.studios import Studios, callbacks_of
from evolink_mcp.teams.tenants import LateApp, Tenants, unlisted_max_for
from evolink_mcp.teams.tokens import Tenant
from evolink_mcp.teams.uploads import UPLOADS_PATH, StoredPictures, UploadApp
from evolink_mcp.transports.connections import descriptor_limit
from evolink_mcp.transports.http import LARGE_BODIES, REQUEST_MAX_BYTES, SSE_MESSAGES_PATH
from evolink_mcp.transports.http_calls import PATH as MCP_PATH
from evolink_mcp.transports.http_guard import Endpoint, HttpGuard

if TYPE_CHECKING:
    from evolink_mcp.teams.database import Database
    from evolink_mcp.teams.metrics_endpoint import MetricsCollector

log = logging.getLogger(__name__)

# Load balancers read /readyz every few seconds, and a check of the key is a request to EvoLink.
KEY_CHECK_INTERVAL_S = 60.0
# The readiness probe of deploy/kubernetes waits 6 s, longer than both checks together.
KEY_CHECK_TIMEOUT_S = 3.0
ENTRIES_TIMEOUT_S = 2.0
NO_DATABASE = "the database does not answer"

MakeMcpApp = Callable[..., ASGIApp]  # `mcp_app` with its transport and its host


def hostnames_of(allowed: Sequence[str], settings: TeamSettings) -> list[str]:
    """Return the hostnames that the server answers to: those of --allowed-host and the one of the public URL."""
    public = urlsplit(settings.public_url or "").hostname
    return [*allowed, *([public] if public else [])]


class Readiness:
    """Whether this server can do paid work: the database answers and EvoLink accepts the key."""

    def __init__(
        self,
        settings: TeamSettings,
        authenticator: TeamAuthenticator | None = None,
        database: Database | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._settings = settings
        self._authenticator = authenticator
        self._database = database
        self._client = EvolinkClient(settings.key, base_url=settings.base_url, transport=transport)
        self._lock = anyio.Lock()
        self._checked_at = -KEY_CHECK_INTERVAL_S
        self._key_problem: str | None = None
        self._entries_problem: str | None = None

    @property
    def problem(self) -> str | None:
        """The known reason why this server can do no paid work, if there is one."""
        if self._database is not None and not self._database.is_alive:
            return NO_DATABASE
        if self._entries_problem is not None:
            return self._entries_problem
        if self._settings.key is None and not self._tenants_have_keys():
            return self._settings.key_problem or "no EvoLink API key is set"
        return self._key_problem

    async def check(self) -> str | None:
        """Read an entry, and ask EvoLink at most once per KEY_CHECK_INTERVAL_S whether it accepts the key. Return the problem.

        The check reads the balance, which is free. If EvoLink does not answer in time, the last result stays.
        """
        async with self._lock:
            if self._database is not None and self._database.is_alive:
                self._entries_problem = await self._try_entries(self._database)
            if self._client.has_key and anyio.current_time() - self._checked_at >= KEY_CHECK_INTERVAL_S:
                # Also after a failed check, so that an unreachable EvoLink does not delay each probe.
                self._checked_at = anyio.current_time()
                with anyio.move_on_after(KEY_CHECK_TIMEOUT_S):
                    await self._check_key()
        return self.problem

    async def _try_entries(self, database: Database) -> str | None:
        with anyio.move_on_after(ENTRIES_TIMEOUT_S):
            try:
                await database.try_entries()
            except JournalUnwritable as error:
                log.warning("%s", error.message)
                return NO_DATABASE
            return None
        return f"the database did not return an entry within {ENTRIES_TIMEOUT_S:.0f} s"

    async def _check_key(self) -> None:
        try:
            await self._client.balance()
            self._key_problem = None
        except Rejected as error:
            # 402, 403 and 429 do not prove that EvoLink does not know the key.
            self._key_problem = "EvoLink does not accept the key" if error.http_status == 401 else None
        except EvolinkError:
            pass

    def _tenants_have_keys(self) -> bool:
        authenticator = self._authenticator
        if authenticator is None:
            return False
        return authenticator.accepts_caller_keys or any(tenant.evolink_key for tenant in authenticator.tenants.values())


def studio_mcp_app(studio: Studio, settings: TeamSettings, studios: Studios, make_mcp_app: MakeMcpApp) -> ASGIApp:
    """Return the ASGI app of one studio for MCP."""
    server = server_for(studio, settings, secrets=settings.secrets)
    return make_mcp_app(server, studio.journal, turns=studios.turns)


def studio_app(app: ASGIApp, studio: Studio, settings: TeamSettings, studios: Studios) -> UploadApp:
    """Return the ASGI app of one studio: `app` for MCP, and `PUT /uploads`."""
    return UploadApp(
        app,
        studio,
        lambda: studios.can_close(studio),
        studios.upload_limit,
        studios.upload_pace,
        day_max_bytes=int(settings.upload_mb_per_day * 1_000_000),
    )


def tenants_app(
    studios: Studios, authenticator: TeamAuthenticator, group: anyio.abc.TaskGroup, make_mcp_app: MakeMcpApp
) -> Tenants[UploadApp]:
    """Return the ASGI app of all tenants. Their studios run in `group`."""
    if studios.database is not None:
        authenticator.rates = studios.database.rates

    @asynccontextmanager
    async def open_app(tenant: Tenant) -> AsyncGenerator[UploadApp]:
        async with studios.open(tenant) as (studio, settings), AsyncExitStack() as stack:
            make = partial(studio_mcp_app, studio, settings, studios, make_mcp_app)
            yield studio_app(LateApp(make, studios.turns, stack), studio, settings, studios)

    return Tenants(
        group,
        open_app,
        lambda tenant: authenticator.tenants.get(tenant.name) == tenant,
        unlisted_max=unlisted_max_for(descriptor_limit()),
    )


def guarded_app(
    app: ASGIApp,
    studios: Studios,
    authenticator: TeamAuthenticator | None,
    hostnames: Sequence[str],
    readiness: Readiness,
    receive_callback: ReceiveCallback,
) -> HttpGuard:
    """Return `app` behind the HTTP guard, with the paths for callbacks, stored images and OAuth metadata."""
    endpoints: list[Endpoint] = []
    if (callbacks := callbacks_of(studios.settings)) is not None:
        endpoints.append(
            Endpoint(
                ("POST",),
                CALLBACKS,
                CallbackEndpoint(callbacks, receive_callback, studios.metrics.count_callback),
            )
        )
    store = studios.object_store
    if store is not None and store.is_folder:
        endpoints.append(Endpoint(("GET", "HEAD"), PICTURES, StoredPictures(store)))
    if authenticator is not None and authenticator.issuer is not None:
        from evolink_mcp.teams.oauth import METADATA_PATH

        # RFC 9728 appends the path of the MCP endpoint. Clients also try the address without it.
        metadata = authenticator.issuer.metadata_app
        endpoints += [Endpoint(("GET",), METADATA_PATH, metadata), Endpoint(("GET",), f"{METADATA_PATH}/", metadata)]
    return HttpGuard(
        app,
        hostnames,
        REQUEST_MAX_BYTES,
        authenticator=authenticator,
        not_ready=readiness.check,
        health_notes=lambda: [MISSING] if studios.misses_callbacks else [],
        endpoints=endpoints,
        large_bodies=LARGE_BODIES,
        app_routes=(MCP_PATH, "/sse", SSE_MESSAGES_PATH, UPLOADS_PATH),
        observer=studios.metrics,
    )


def metrics_for(studios: Studios, guard: HttpGuard, readiness: Readiness) -> MetricsCollector | None:
    """Publish `/metrics` at the guard. Return None if prometheus-client is not installed."""
    if find_spec("prometheus_client") is None:
        return None
    from evolink_mcp.teams.metrics_endpoint import PATH, MetricsCollector, MetricsPage

    # With a separate token, Prometheus needs no token of a tenant.
    token = studios.settings.metrics_token
    metrics = MetricsCollector(
        studios.metrics,
        studios.statuses,
        lambda: guard.open_requests,
        lambda: readiness.problem is None,
        studios.database,
    )
    guard.add_endpoint(Endpoint(("GET",), PATH, MetricsPage(metrics, token), is_public=token is not None))
    return metrics
