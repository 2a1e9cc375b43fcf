"""A tenant's settings, studio and server: what the tokens file says goes before what the environment says."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx2 as httpx
from mcp.server.mcpserver import MCPServer

from evolink_mcp.cli.settings import Settings
from evolink_mcp.cli.wiring import callbacks_of, open_studio, server_for
from evolink_mcp.pictures.folders import Folders
from evolink_mcp.studio.callbacks import PATH
from evolink_mcp.studio.studio import Studio
from evolink_mcp.transports.auth import Tenant, Tokens
from evolink_mcp.transports.callbacks import CalledBack
from evolink_mcp.transports.tenants import lifespan
from evolink_mcp.transports.web import door

if TYPE_CHECKING:
    from evolink_mcp.journal.database import Database


def settings_of(tenant: Tenant, settings: Settings) -> Settings:
    """The server's settings with what the tokens file says of this tenant, and a folder of its own for pictures."""
    output = settings.folders.output / tenant.name
    budget = settings.budget
    per_call = budget.per_call if tenant.max_credits_per_call is None else tenant.max_credits_per_call
    per_day = budget.per_day if tenant.max_credits_per_day is None else tenant.max_credits_per_day
    allowed = tuple(folder for folder in settings.folders.allowed if folder != settings.folders.output)
    tools = tenant.tools
    if settings.tools is not None:
        tools = settings.tools if tools is None else settings.tools & tools
    return replace(
        settings,
        key_text=tenant.evolink_key.get_secret_value() if tenant.evolink_key else settings.key_text,
        key_problem=None if tenant.evolink_key else settings.key_problem,
        budget=replace(budget, per_call=per_call, per_day=per_day, running=tenant.max_running),
        folders=Folders(output, (output, *allowed)),
        tools=tools,
    )


@asynccontextmanager
async def open_tenant(
    tenant: Tenant,
    settings: Settings,
    make_app: Callable[[MCPServer[Any], Studio], Any],
    transport: httpx.AsyncBaseTransport | None = None,
    *,
    database: Database | None = None,
) -> AsyncGenerator[Any]:
    """The ASGI app of a tenant: a studio and a server of its own, with the lifespan that `make_app`'s app needs.

    `database` is the team's, open, if there is one. `transport` is for tests.
    """
    its = settings_of(tenant, settings)
    async with open_studio(
        its, remote=True, tenant=tenant.name, shared=tenant.shares_account, database=database, transport=transport
    ) as studio:
        app = make_app(server_for(studio, its), studio)
        async with lifespan(app):
            yield app


def why_not_ready(settings: Settings, tokens: Tokens | None, database: Database | None) -> str | None:
    """Why nothing can be bought at this server now, if so: its database is gone, or there is no key for anybody."""
    if database is not None and not database.alive:
        return "the database does not answer"
    if settings.key is None and not any(tenant.evolink_key for tenant in (tokens.tenants if tokens else ())):
        return settings.key_problem or "no EvoLink API key is set"
    return None


def names_of(allowed: Sequence[str], settings: Settings) -> list[str]:
    """The host names that a server answers to besides this machine's: the public one needs no `--allowed-host`."""
    public = urlsplit(settings.public_url or "").hostname
    return [*allowed, *([public] if public else [])]


def behind_door(app: Any, settings: Settings, names: Sequence[str], tokens: Tokens | None, studios: Studios) -> Any:
    """`app` behind its door, which also takes EvoLink's callbacks if there is a public address."""
    callbacks = callbacks_of(settings)
    if callbacks is not None:
        app = CalledBack(app, callbacks, studios.called_back)
    return door(
        app, names, tokens, lambda: why_not_ready(settings, tokens, studios.database),
        open_below=None if callbacks is None else PATH,
    )  # fmt: skip


class Studios:
    """The open studios of this server, by their accounts' marks."""

    def __init__(self, database: Database | None) -> None:
        self.database = database
        self._by_account: dict[str, Studio] = {}

    def add(self, studio: Studio) -> None:
        """It is open from now on, in place of an earlier one of the account."""
        self._by_account[studio.journal.account] = studio

    async def called_back(self, account: str, key: str, task_id: str) -> None:
        """EvoLink says that this task of the account's order has ended; if no studio here knows, other servers may.

        Raises:
            JournalUnwritable: nobody could be told.
        """
        if (studio := self._by_account.get(account)) is not None:
            await studio.called_back(key, task_id)
        elif self.database is not None:
            await self.database.tell(account, {"key": key, "task_id": task_id, "ended": True})
