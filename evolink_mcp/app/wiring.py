"""From settings to an open studio and its server: who is given what."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

import anyio
import httpx2 as httpx
from mcp.server.mcpserver import MCPServer

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.app.settings import decoder_environment
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.images.folders import Folders
from evolink_mcp.images.image_store import ForCallersElsewhere
from evolink_mcp.images.references import References
from evolink_mcp.images.store import ImageStore, LocalImageStore
from evolink_mcp.journal.backend import Journal
from evolink_mcp.journal.entry import account_mark
from evolink_mcp.journal.sqlite import SqliteJournal
from evolink_mcp.server.server import build_server
from evolink_mcp.studio.jobs import Sleep
from evolink_mcp.studio.poller import Poller
from evolink_mcp.studio.studio import Studio
from evolink_mcp.teams.callbacks import Callbacks
from evolink_mcp.teams.metrics import Audit, Metrics
from evolink_mcp.teams.object_store import Links, ObjectStore
from evolink_mcp.teams.settings import TeamSettings
from evolink_mcp.tools.schemas import TOOL_NAMES

if TYPE_CHECKING:
    from evolink_mcp.teams.database import Database


@asynccontextmanager
async def open_studio(
    settings: TeamSettings,
    *,
    remote: bool = False,
    tenant: str = "",
    shared: bool = False,
    database: Database | None = None,
    poller: Poller | None = None,
    decoder: Decoder | None = None,
    store: ObjectStore | None = None,
    metrics: Metrics | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
    clock: Callable[[], float] = time.time,
    sleep: Sleep = anyio.sleep,
    pause: Sleep = anyio.sleep,
) -> AsyncGenerator[Studio]:
    """A studio for the settings' account and folders.

    `remote`: its callers may be on other machines. `tenant`: they are this one, and see only what is theirs; `shared`:
    other tenants spend from the same account. `database` is the team's, open, where several tenants use it.
    `poller` reads for all studios of the account. `decoder` and `store` serve the images of all studios.
    `metrics` counts what the studio does.
    `transport`, `clock` (epoch seconds), `sleep` and `pause` are for tests.
    """
    client = EvolinkClient(
        settings.key, base_url=settings.base_url, files_base_url=settings.files_base_url, transport=transport,
        clock=clock,
    )  # fmt: skip
    key = settings.key.get_secret_value() if settings.key else tenant
    account = account_mark(key, settings.base_url, tenant) if key else ""
    local = not remote or (bool(settings.allowed_dirs) and not tenant)
    # Callers elsewhere save into the output folder only, unless the owner named folders for them.
    folders = settings.folders if local else Folders(settings.folders.output, (settings.folders.output,))
    async with AsyncExitStack() as stack:
        journal: Journal
        if settings.database_url is None:
            journal = SqliteJournal(settings.data_dir, account, strict=bool(tenant), clock=clock)
        else:
            from evolink_mcp.teams.database import open_database
            from evolink_mcp.teams.postgres import PostgresJournal

            if database is None:
                database = await stack.enter_async_context(open_database(settings.database_url))
            journal = PostgresJournal(database, account, strict=bool(tenant))
        if decoder is None:
            decoder = stack.enter_context(closing(Decoder(decoder_environment())))
        image_store: ImageStore = LocalImageStore(folders, decoder, sidecars=settings.has_sidecars)
        if tenant or settings.store is not None:
            place = store or store_of(settings, clock)
            image_store = ForCallersElsewhere(
                client, account, place, settings.data_dir / "copies", decoder, clock=clock
            )
        references = References(client, journal, folders, image_store, local=local, clock=clock)
        studio = Studio(
            client, journal, image_store, references, settings.budget,
            rule=settings.size_rule, preview_edge=settings.preview_edge,
            callback_hosts=settings.callback_hosts, shared=shared, callbacks=callbacks_of(settings) if remote else None,
            key_problem=settings.key_problem, poller=poller, metrics=metrics,
            audit=Audit(tenant) if settings.has_audit_log else None, clock=clock, sleep=sleep, pause=pause,
        )  # fmt: skip
        await stack.enter_async_context(client)
        yield await stack.enter_async_context(studio)


def callbacks_of(settings: TeamSettings) -> Callbacks | None:
    """The addresses at which EvoLink tells that a task has ended, if it can reach this server."""
    if settings.public_url is None or settings.secret is None:
        return None
    return Callbacks(settings.public_url, settings.secret)


def store_of(settings: TeamSettings, clock: Callable[[], float] = time.time) -> ObjectStore | None:
    """The store of pictures for callers elsewhere, if there is one."""
    if settings.store is None:
        return None
    links = Links(settings.public_url, settings.secret) if settings.public_url and settings.secret else None
    return ObjectStore(settings.store, settings.store_link_hours, links, clock=clock)


@asynccontextmanager
async def open_team_database(url: str | None) -> AsyncGenerator[Database | None]:
    """The team's PostgreSQL, if there is one.

    Raises:
        JournalUnwritable: it cannot be used.
    """
    if url is None:
        yield None
    else:
        from evolink_mcp.teams.database import open_database

        async with open_database(url) as database:
            yield database


def server_for(studio: Studio, settings: TeamSettings) -> MCPServer[Any]:
    """The MCP server of an open studio."""
    return build_server(
        studio,
        wait_s=settings.wait_s,
        preview_edge=settings.preview_edge,
        resource_links=settings.has_resource_links,
        published=TOOL_NAMES if settings.tools is None else settings.tools,
        secret=settings.secret,
    )
