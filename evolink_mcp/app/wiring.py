"""Open a studio and build its MCP server from the settings."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, replace
from typing import Any

import anyio
import httpx2 as httpx
from mcp.server.mcpserver import MCPServer

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.deadline import Deadline, awake_deadline
from evolink_mcp.api.http import DEFAULT_HTTP_OPTIONS, HttpOptions, Observe, ignore
from evolink_mcp.app.environment import decoder_environment
from evolink_mcp.app.settings import Settings
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.images.references import References
from evolink_mcp.images.store import ImageStore, LocalImageStore
from evolink_mcp.journal.entry import account_id_of
from evolink_mcp.journal.journal import Journal
from evolink_mcp.journal.sqlite import SqliteJournal
from evolink_mcp.server.server import build_server
from evolink_mcp.studio.events import Subscriber
from evolink_mcp.studio.jobs import Sleep, Timing
from evolink_mcp.studio.poller import Poller
from evolink_mcp.studio.purchase import CallbackAddresses
from evolink_mcp.studio.studio import Studio, StudioOptions, run_studio
from evolink_mcp.tools.names import TOOL_NAMES

MakeJournal = Callable[[str, str], Journal]
MakeImageStore = Callable[[EvolinkClient, Journal, Decoder], ImageStore]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudioParts:
    """The parts of a studio that a team or an HTTP server replaces.

    `tenant`: the only caller; the studio shows no other tenant's entries. `has_other_tenants`: other tenants spend from
    the same account. `make_journal` takes the identity of the key and the profile. `make_image_store` takes the client,
    the journal and the decoder. `is_maintained`: see StudioOptions. `observe` receives the outcome of each HTTP request
    to EvoLink.
    """

    tenant: str = ""
    has_remote_callers: bool = False
    has_other_tenants: bool = False
    make_journal: MakeJournal | None = None
    make_image_store: MakeImageStore | None = None
    poller: Poller | None = None
    is_maintained: bool = False
    callbacks: CallbackAddresses | None = None
    subscribers: tuple[Subscriber, ...] = ()
    observe: Observe = ignore


@asynccontextmanager
async def open_studio(
    settings: Settings,
    parts: StudioParts = StudioParts(),
    *,
    decoder: Decoder | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
    http_options: HttpOptions = DEFAULT_HTTP_OPTIONS,
    clock: Callable[[], float] = time.time,
    sleep: Sleep = anyio.sleep,
    pause: Sleep = anyio.sleep,
    deadline: Deadline = awake_deadline,
) -> AsyncGenerator[Studio]:
    """Open a studio for the profile, the key and the folders of the settings. A tenant is a profile too.

    Without `parts` it serves one person on this machine. Without a `decoder` it starts its own.
    `transport`, `http_options`, `clock` (epoch seconds), `sleep`, `pause` and `deadline` are for tests.
    """
    client = EvolinkClient(
        settings.key,
        base_url=settings.base_url,
        files_base_url=settings.files_base_url,
        transport=transport,
        clock=clock,
        deadline=deadline,
        options=http_options,
        observe=parts.observe,
    )
    # Without a key the journal shows all entries of the profile and adopts none.
    identity = account_id_of(settings.key.get_secret_value(), settings.base_url) if settings.key else ""
    profile = parts.tenant or settings.profile
    # Allowed folders are for a server without tenants. A tenant gets no local files.
    is_local = not parts.has_remote_callers or (bool(settings.allowed_dirs) and not parts.tenant)
    # Remote callers may use only the output folder, unless the owner of the server allowed folders explicitly.
    folders = settings.folders if is_local else replace(settings.folders, allowed=(settings.folders.output,))
    async with AsyncExitStack() as stack:
        if decoder is None:
            # First, so it closes last: a download of the closing studio may still use it.
            decoder = stack.enter_context(closing(Decoder(decoder_environment())))
        if parts.make_journal is None:
            journal: Journal = SqliteJournal(settings.data_dir, identity, profile=profile, clock=clock)
        else:
            journal = parts.make_journal(identity, profile)
        if parts.make_image_store is None:
            image_store: ImageStore = LocalImageStore(
                folders,
                decoder,
                journal=journal,
                # A paid image must be saved even if the output folder becomes unwritable.
                fallback=settings.data_dir / "pictures",
                has_sidecars=settings.has_sidecars,
                has_origin=settings.has_metadata,
            )
        else:
            image_store = parts.make_image_store(client, journal, decoder)
        options = StudioOptions(
            spending_limits=replace(settings.spending_limits, tenant=parts.tenant),
            size_rule=settings.size_rule,
            preview_edge=settings.preview.edge,
            callback_hosts=settings.callback_hosts,
            is_shared=parts.has_other_tenants,
            retention_days=settings.retention_days,
            has_metadata=settings.has_metadata,
            key_problem=settings.key_problem,
            callbacks=parts.callbacks,
            poller=parts.poller,
            is_maintained=parts.is_maintained,
            subscribers=parts.subscribers,
            timing=Timing(clock, sleep, pause),
        )
        references = References(client, journal, folders, image_store, local=is_local, clock=clock)
        await stack.enter_async_context(client)
        yield await stack.enter_async_context(run_studio(client, journal, image_store, references, options))


def server_for(studio: Studio, settings: Settings, *, secrets: Sequence[str] | None = None) -> MCPServer[Any]:
    """Build the MCP server of an open studio. The first of the `secrets` seals the state that a client carries."""
    return build_server(
        studio,
        wait_s=settings.wait_s,
        preview_edge=settings.preview.edge,
        has_previews_for_all=settings.preview.is_for_all,
        has_resource_links=settings.has_resource_links,
        published=TOOL_NAMES if settings.tools is None else settings.tools,
        secrets=secrets,
    )
