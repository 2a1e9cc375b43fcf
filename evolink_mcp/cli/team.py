"""A tenant's settings, studio and server: what the tokens file says goes before what the environment says."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
from mcp.server.mcpserver import MCPServer

from evolink_mcp.cli.settings import Settings
from evolink_mcp.cli.wiring import open_studio, server_for
from evolink_mcp.journal.contract import Journal
from evolink_mcp.pictures.folders import Folders
from evolink_mcp.transports.auth import Tenant, Tokens
from evolink_mcp.transports.tenants import lifespan

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
    make_app: Callable[[MCPServer[Any], Journal], Any],
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
        app = make_app(server_for(studio, its), studio.journal)
        async with lifespan(app):
            yield app


def why_not_ready(settings: Settings, tokens: Tokens | None, database: Database | None) -> str | None:
    """Why nothing can be bought at this server now, if so: its database is gone, or there is no key for anybody."""
    if database is not None and not database.alive:
        return "the database does not answer"
    if settings.key is None and not any(tenant.evolink_key for tenant in (tokens.tenants if tokens else ())):
        return settings.key_problem or "no EvoLink API key is set"
    return None
