"""The servers of tenants behind one door: settings, studios and apps, and what needs no token."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anyio
import anyio.abc
import httpx2 as httpx
from mcp.server.mcpserver import MCPServer

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.app.wiring import callbacks_of, open_studio, server_for, store_of
from evolink_mcp.errors import EvolinkError, JournalUnwritable, Rejected
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.journal.entry import account_mark
from evolink_mcp.studio.poller import Poller
from evolink_mcp.studio.studio import Studio
from evolink_mcp.teams.callback_routes import CalledBack
from evolink_mcp.teams.callbacks import PATH as CALLBACKS
from evolink_mcp.teams.callers import Callers
from evolink_mcp.teams.metrics import Metrics
from evolink_mcp.teams.oauth import METADATA
from evolink_mcp.teams.object_store import PATH as PICTURES
from evolink_mcp.teams.object_store import ObjectStore
from evolink_mcp.teams.settings import TeamSettings
from evolink_mcp.teams.tenants import Tenants, lifespan
from evolink_mcp.teams.tokens import Tenant
from evolink_mcp.teams.uploads import StoredPictures, Uploads
from evolink_mcp.transports.http import door, web_app
from evolink_mcp.transports.http_guard import Door, Page

if TYPE_CHECKING:
    from evolink_mcp.teams.database import Database
    from evolink_mcp.teams.metrics_endpoint import MetricsEndpoint

LOOK_EVERY_S = 5.0
ASK_AGAIN_AFTER_S, ASK_WITHIN_S = 60.0, 3.0


def settings_of(tenant: Tenant, settings: TeamSettings) -> TeamSettings:
    """The server's settings with what the tokens file says of this tenant."""
    per_call = settings.max_credits_per_call if tenant.max_credits_per_call is None else tenant.max_credits_per_call
    per_day = settings.max_credits_per_day if tenant.max_credits_per_day is None else tenant.max_credits_per_day
    tools = tenant.tools
    if settings.tools is not None:
        tools = settings.tools if tools is None else settings.tools & tools
    return replace(
        settings,
        key_text=tenant.evolink_key.get_secret_value() if tenant.evolink_key else settings.key_text,
        max_credits_per_call=per_call,
        max_credits_per_day=per_day,
        max_running=tenant.max_running,
        tools=tools,
    )


@asynccontextmanager
async def open_tenant(
    tenant: Tenant,
    settings: TeamSettings,
    make_app: Callable[[MCPServer[Any], Studio], Any],
    transport: httpx.AsyncBaseTransport | None = None,
    *,
    database: Database | None = None,
    poller: Poller | None = None,
    decoder: Decoder | None = None,
    store: ObjectStore | None = None,
    metrics: Metrics | None = None,
) -> AsyncGenerator[Any]:
    """The ASGI app of a tenant: a studio and a server of its own, with the lifespan that `make_app`'s app needs.

    `database` is the team's, open, if there is one. `transport` is for tests.
    """
    its = settings_of(tenant, settings)
    async with open_studio(
        its,
        remote=True,
        tenant=tenant.name,
        shared=tenant.shares_account,
        database=database,
        poller=poller,
        decoder=decoder,
        store=store,
        metrics=metrics,
        transport=transport,
    ) as studio:
        app = make_app(server_for(studio, its), studio)
        if database is not None and tenant.evolink_key is None:
            from evolink_mcp.teams.orphans import TENANT

            with suppress(JournalUnwritable):
                await studio.journal.learn(TENANT, tenant.name)
        async with lifespan(app):
            yield app


def why_not_ready(settings: TeamSettings, callers: Callers | None, database: Database | None) -> str | None:
    """Why nothing can be bought at this server now, if so: its database is gone, or there is no key for anybody."""
    if database is not None and not database.alive:
        return "the database does not answer"
    keys = callers is not None and (callers.own_keys or any(tenant.evolink_key for tenant in callers.tenants))
    if settings.key is None and not keys:
        return settings.key_problem or "no EvoLink API key is set"
    return None


def names_of(allowed: Sequence[str], settings: TeamSettings) -> list[str]:
    """The host names that a server answers to besides this machine's: the public one needs no `--allowed-host`."""
    public = urlsplit(settings.public_url or "").hostname
    return [*allowed, *([public] if public else [])]


def behind_door(
    app: Any, settings: TeamSettings, names: Sequence[str], callers: Callers | None, studios: Studios
) -> Door:
    """`app` behind its door, with the pages that are answered beside it."""
    pages: list[Page] = []
    accepted = KeyCheck(settings)

    def why() -> str | None:
        return why_not_ready(settings, callers, studios.database) or accepted.problem

    async def why_not() -> str | None:
        await accepted.ask()
        return why()

    if (callbacks := callbacks_of(settings)) is not None:
        pages.append(Page(("POST",), CALLBACKS, CalledBack(callbacks, studios.called_back)))
    store = store_of(settings)
    if store is not None and store.is_folder:
        pages.append(Page(("GET", "HEAD"), PICTURES, StoredPictures(store)))
    if callers is not None and callers.issuer is not None:
        told = callers.issuer.page
        pages += [Page(("GET",), METADATA, told), Page(("GET",), f"{METADATA}/", told)]
    if find_spec("prometheus_client") is not None:
        from evolink_mcp.teams.metrics_endpoint import PATH, MetricsEndpoint, MetricsPage

        token = settings.metrics_token
        endpoint = studios.metrics_endpoint = MetricsEndpoint(
            studios.metrics, studios.statuses, lambda: at.open, lambda: why() is None
        )
        pages.append(Page(("GET",), PATH, MetricsPage(endpoint, token), is_open=token is not None))
    at = door(app, names, callers, why_not, pages)
    return at


class KeyCheck:
    """Whether EvoLink accepts the server's key: asked when somebody wants to know, and not more often than every minute."""

    def __init__(self, settings: TeamSettings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._client = EvolinkClient(settings.key, base_url=settings.base_url, transport=transport)
        self._asking = anyio.Lock()
        self._asked_at = -ASK_AGAIN_AFTER_S
        self.problem: str | None = None

    async def ask(self) -> None:
        """Ask for the account's balance, which is free; where EvoLink does not answer soon, what was known stays."""
        async with self._asking:
            if not self._client.has_key or anyio.current_time() - self._asked_at < ASK_AGAIN_AFTER_S:
                return
            self._asked_at = anyio.current_time()
            with anyio.move_on_after(ASK_WITHIN_S):
                try:
                    await self._client.balance()
                    self.problem = None
                except Rejected as error:
                    self.problem = "EvoLink does not accept the key" if error.http_status == 401 else None
                except EvolinkError:
                    pass


def app_of(
    studios: Studios, server: MCPServer[Any], studio: Studio, *, command: str, host: str, names: Sequence[str]
) -> Any:
    """The ASGI app of one studio's server, by which `studios` knows it: MCP by `command` ("http" or "sse"), and uploads."""
    studios.add(studio)
    app = web_app(server, studio.journal, command, host, names)
    return Uploads(app, studio.references, studio.now, lambda: studios.may_close(studio))


def tenants_app(
    settings: TeamSettings,
    callers: Callers,
    studios: Studios,
    group: anyio.abc.TaskGroup,
    *,
    command: str = "http",
    host: str = "127.0.0.1",
    names: Sequence[str] = (),
    transport: httpx.AsyncBaseTransport | None = None,
) -> Tenants:
    """The ASGI app of all tenants; their studios live in `group`. `transport` is for tests."""
    store = store_of(settings)
    make = partial(app_of, studios, command=command, host=host, names=names)

    @asynccontextmanager
    async def opened(tenant: Tenant) -> AsyncGenerator[Any]:
        made: list[Studio] = []

        def noting(server: MCPServer[Any], studio: Studio) -> Any:
            made.append(studio)
            return make(server, studio)

        poller = studios.poller_of(settings_of(tenant, settings), group, transport)
        own: Any = {
            "database": studios.database,
            "poller": poller,
            "decoder": studios.decoder,
            "store": store,
            "metrics": studios.metrics,
        }
        try:
            async with open_tenant(tenant, settings, noting, transport, **own) as app:
                yield app
        finally:
            for studio in made:
                studios.remove(studio)

    return Tenants(group, opened, lambda tenant: tenant in callers.tenants)


async def go_on_with_what_was_left(
    studios: Studios, tenants: Tenants, settings: TeamSettings, callers: Callers
) -> None:
    """Open the known tenants, who take up what is theirs; then for ever, with a team's database, look for what dead
    servers left of others who may not call again, such as people of an issuer.
    """
    for tenant in callers.tenants:
        await tenants.app(tenant)
    if studios.database is None:
        return
    from evolink_mcp.teams.orphans import tenants_left

    while True:
        await anyio.sleep(LOOK_EVERY_S)
        with suppress(JournalUnwritable):
            for account, name in (await tenants_left(studios.database, studios.accounts)).items():
                if settings.key_text and account_mark(settings.key_text, settings.base_url, name) == account:
                    await tenants.app(Tenant(name))


class Studios:
    """The open studios of this server, by their accounts' marks. `metrics` counts what all of them do.

    `decoder` decodes the images of all of them.
    """

    def __init__(self, database: Database | None, decoder: Decoder) -> None:
        self.database = database
        self.decoder = decoder
        self.metrics = Metrics()
        self.metrics_endpoint: MetricsEndpoint | None = None
        self._open: list[Studio] = []
        self._by_account: dict[str, Studio] = {}
        self._pollers: dict[tuple[str, str], Poller] = {}

    def add(self, studio: Studio) -> None:
        """It is open from now on, in place of an earlier one of the account."""
        self._open.append(studio)
        self._by_account[studio.journal.account] = studio

    def remove(self, studio: Studio) -> None:
        """It is closed."""
        self._open.remove(studio)
        if self._by_account.get(studio.journal.account) is studio:
            del self._by_account[studio.journal.account]

    def may_close(self, studio: Studio) -> bool:
        """Whether it has nothing under way, and no other one of its account is open: they own entries together."""
        account = studio.journal.account
        return studio.is_idle and not any(one is not studio and one.journal.account == account for one in self._open)

    @property
    def accounts(self) -> list[str]:
        """The marks of the accounts that have a studio here."""
        return list(self._by_account)

    def poller_of(
        self, settings: TeamSettings, group: anyio.abc.TaskGroup, transport: httpx.AsyncBaseTransport | None
    ) -> Poller | None:
        """What reads for all tenants of one key, so that their looks go together and a 429 slows them all, and no others."""
        if settings.key is None or settings.key_text is None:
            return None
        account = (settings.key_text, settings.base_url)
        if account not in self._pollers:
            client = EvolinkClient(settings.key, base_url=settings.base_url, transport=transport)
            self._pollers[account] = Poller(client, group, metrics=self.metrics)
            group.start_soon(_hold_open, client)
        return self._pollers[account]

    def statuses(self) -> list[str]:
        """The states of all tasks that this server works on."""
        return [status for studio in self._open for status in studio.task_statuses]

    def drain(self) -> bool:
        """See Studio.drain, for all of them."""
        drained = [studio.drain() for studio in self._open]
        return all(drained)

    async def called_back(self, account: str, key: str, task_id: str) -> None:
        """EvoLink says that this task of the account's order has ended; if no studio here knows, other servers may.

        Raises:
            JournalUnwritable: nobody could be told.
        """
        if (studio := self._by_account.get(account)) is not None:
            await studio.called_back(key, task_id)
        elif self.database is not None:
            await self.database.tell(account, {"key": key, "task_id": task_id, "ended": True})


async def _hold_open(client: EvolinkClient) -> None:
    async with client:
        await anyio.sleep_forever()
