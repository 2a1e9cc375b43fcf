"""The studios of one server process: one per tenant and EvoLink key, with the parts that they share."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import httpx2 as httpx

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.http import HttpOptions
from evolink_mcp.app.wiring import MakeImageStore, MakeJournal, StudioParts, open_studio
from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.images.store import ImageStore
from evolink_mcp.journal.all_profiles import old_profiles
from evolink_mcp.journal.backend import Backend
from evolink_mcp.journal.journal import Journal
from evolink_mcp.journal.sqlite import JournalFile, SqliteBackend, new_owner
from evolink_mcp.studio.events import Events
from evolink_mcp.studio.jobs import Sleep
from evolink_mcp.studio.poller import Poller
from evolink_mcp.studio.studio import Studio
from evolink_mcp.studio.times import DAY_S
from evolink_mcp.teams.callbacks import Callbacks
from evolink_mcp.teams.metrics import Audit, Metrics
from evolink_mcp.teams.object_store import Links, ObjectStore
from evolink_mcp.teams.remote_images import RemoteImageStore
from evolink_mcp.teams.settings import TeamSettings
from evolink_mcp.teams.tokens import Tenant
from evolink_mcp.teams.uploads import PROCESS_MAX_BYTES, ByteLimit, Pace
from evolink_mcp.transports.turns import Turns

if TYPE_CHECKING:
    from evolink_mcp.teams.database import Database
    from evolink_mcp.teams.database_url import DatabaseTimes

log = logging.getLogger(__name__)


def tenant_settings(tenant: Tenant, settings: TeamSettings) -> TeamSettings:
    """Return the server's settings with the tenant's key, limits and tools."""
    per_call = settings.max_credits_per_call if tenant.max_credits_per_call is None else tenant.max_credits_per_call
    per_day = settings.max_credits_per_day if tenant.max_credits_per_day is None else tenant.max_credits_per_day
    # A token may remove tools, but never add one that the server does not publish.
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


def callbacks_of(settings: TeamSettings) -> Callbacks | None:
    """Return the signed callback addresses. None: EvoLink cannot reach this server."""
    if settings.public_url is None or settings.secrets is None:
        return None
    return Callbacks(settings.public_url, settings.secrets)


def object_store_of(
    settings: TeamSettings,
    clock: Callable[[], float] = time.time,
    count_failure: Callable[[str], None] = lambda operation: None,
) -> ObjectStore | None:
    """Return the object store of EVOLINK_MCP_STORE, if it is set."""
    if settings.store is None:
        return None
    links = Links(settings.public_url, settings.secrets) if settings.public_url and settings.secrets else None
    return ObjectStore(settings.store, settings.store_link_hours, links, clock=clock, count_failure=count_failure)


@asynccontextmanager
async def open_team_database(url: str | None, times: DatabaseTimes | None = None) -> AsyncGenerator[Database | None]:
    """Open the PostgreSQL database of EVOLINK_MCP_DATABASE_URL, if it is set.

    Raises:
        JournalUnwritable: the database is not usable.
    """
    if url is None:
        yield None
        return
    from evolink_mcp.teams.database import open_database  # psycopg is in the extra `teams`
    from evolink_mcp.teams.database_url import DEFAULT_TIMES

    async with open_database(url, times or DEFAULT_TIMES) as database:
        yield database


def team_parts(
    settings: TeamSettings,
    database: Database | None = None,
    *,
    tenant: str = "",
    has_remote_callers: bool = False,
    object_store: ObjectStore | None = None,
    clock: Callable[[], float] = time.time,
) -> StudioParts:
    """Return the journal, the image store, the callbacks and the audit that the team settings name."""
    return StudioParts(
        tenant=tenant,
        has_remote_callers=has_remote_callers,
        make_journal=None if database is None else _postgres_journal(database),
        # An answer to a tenant must not contain a path of this server.
        make_image_store=_remote_image_store(settings, object_store, clock) if tenant or settings.store else None,
        # A server over stdio has no endpoint for callbacks.
        callbacks=callbacks_of(settings) if has_remote_callers else None,
        subscribers=(Audit(tenant).receive,) if settings.has_audit_log else (),
    )


def _postgres_journal(database: Database) -> MakeJournal:
    from evolink_mcp.teams.postgres import PostgresJournal

    def make(identity: str, profile: str) -> Journal:
        return PostgresJournal(database, identity, profile=profile)

    return make


def _remote_image_store(
    settings: TeamSettings, object_store: ObjectStore | None, clock: Callable[[], float]
) -> MakeImageStore:
    def make(client: EvolinkClient, journal: Journal, decoder: Decoder) -> ImageStore:
        store = object_store or object_store_of(settings, clock)
        return RemoteImageStore(
            client,
            journal,
            store,
            settings.data_dir / "copies",
            decoder,
            has_origin=settings.has_metadata,
            clock=clock,
        )

    return make


@asynccontextmanager
async def open_team_studio(
    settings: TeamSettings, times: DatabaseTimes | None = None, **options: Any
) -> AsyncGenerator[Studio]:
    """Open a studio for one person on this machine with the team's database and object store.

    `options` are those of `open_studio`.
    """
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(open_team_database(settings.database_url, times))
        options.setdefault("clock", time.time if database is None else database.now)
        parts = team_parts(settings, database, clock=options["clock"])
        yield await stack.enter_async_context(open_studio(settings, parts, **options))


class Studios:
    """The open studios of this server process.

    They share the database, the decoder, the object store, the certificates, the turns and the metrics. Studios with the
    same EvoLink key also share a poller, which runs in `group`. The time is that of the database, if there is one.
    `transport`, `clock` (epoch seconds) and `pause` are for tests.
    """

    def __init__(
        self,
        settings: TeamSettings,
        database: Database | None,
        decoder: Decoder,
        group: anyio.abc.TaskGroup,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] | None = None,
        pause: Sleep = anyio.sleep,
    ) -> None:
        if clock is None:
            clock = time.time if database is None else database.now
        self.settings = settings
        self.database = database
        self.metrics = Metrics()
        self.object_store = object_store_of(settings, clock, self.metrics.count_store_failure)
        self.upload_limit = ByteLimit(PROCESS_MAX_BYTES)
        self.upload_pace = Pace()
        self.turns = Turns()
        self._decoder = decoder
        self._group = group
        self._transport = transport
        self._clock = clock
        self._pause = pause
        # The certificates of the system take 0.8 MB and 20 ms of the event loop, so the studios share them.
        self._http_options = HttpOptions(make_ssl_context=cache(httpx.create_ssl_context))
        self._studios: list[Studio] = []
        self._pollers: dict[tuple[str, str], _SharedPoller] = {}

    def __iter__(self) -> Any:
        """Iterate over the open studios."""
        return iter(tuple(self._studios))

    @asynccontextmanager
    async def open(self, tenant: Tenant | None = None) -> AsyncGenerator[tuple[Studio, TeamSettings]]:
        """Open a studio for a tenant. Without a tenant, open it for all callers of the server.

        Yields the studio and its settings.
        """
        settings = self.settings if tenant is None else tenant_settings(tenant, self.settings)
        parts = team_parts(
            settings,
            self.database,
            tenant="" if tenant is None else tenant.name,
            has_remote_callers=True,
            object_store=self.object_store,
            clock=self._clock,
        )
        parts = replace(
            parts,
            has_other_tenants=tenant is not None and tenant.shares_account,
            # The adopter and `forget_loop` maintain the entries of all tenants.
            is_maintained=tenant is not None,
            subscribers=(*parts.subscribers, self.metrics.receive),
            observe=self.metrics.count_upstream,
        )
        options: Any = {
            "decoder": self._decoder,
            "http_options": self._http_options,
            "transport": self._transport,
            "clock": self._clock,
            "pause": self._pause,
        }
        studio: Studio | None = None
        try:
            async with (
                self._shared_poller(None if tenant is None else settings) as poller,
                open_studio(settings, replace(parts, poller=poller), **options) as studio,
            ):
                self._studios.append(studio)
                yield studio, settings
        finally:
            # A closing studio still owns its entries, so it leaves the list only after it is closed.
            if studio in self._studios:
                self._studios.remove(studio)

    @asynccontextmanager
    async def open_backend(self) -> AsyncGenerator[Backend]:
        """Open the database of all journals."""
        if self.database is None:
            backend: Backend = SqliteBackend(JournalFile(self.settings.data_dir, new_owner(), clock=self._clock))
        else:
            from evolink_mcp.teams.postgres import PostgresBackend

            backend = PostgresBackend(self.database)
        try:
            yield backend
        finally:
            await backend.close(is_released=True)

    async def forget_loop(self) -> None:
        """Remove old requests of all tenants from the journal, now and every day."""
        days = self.settings.retention_days
        while days is not None:
            now = self._clock()
            try:
                await self._forget(now - days * DAY_S, now)
            except JournalUnwritable as error:
                log.warning("%s", error.message)
            await self._pause(DAY_S)

    async def _forget(self, before: float, now: float) -> None:
        async with self.open_backend() as backend:
            if backend.has_data:
                for profile in await backend.run(lambda db: old_profiles(db, before, now)):
                    await Journal(backend, profile=profile).forget(before, now)

    def can_close(self, studio: Studio) -> bool:
        """Return whether the studio is idle and the only one of its profile: studios of one profile share entries."""
        return studio.is_idle and self.of(studio.journal.profile) == [studio]

    def of(self, profile: str) -> list[Studio]:
        """Return the open studios of a profile. Callers with different keys have different ones."""
        return [studio for studio in self._studios if studio.journal.profile == profile]

    @property
    def misses_callbacks(self) -> bool:
        """Whether EvoLink's callbacks did not arrive for the last tasks of an account with an open studio."""
        return any(studio.misses_callbacks for studio in self._studios)

    def statuses(self) -> list[str]:
        """Return the status of each task that this process works on."""
        return [status for studio in self._studios for status in studio.task_statuses]

    def drain(self, *, has_other_servers: bool = False) -> bool:
        """Drain all studios. Return whether all are drained.

        With `has_other_servers` calls that wait for their turn are refused, so that a proxy repeats them at another server.
        Calls that have begun still buy, because their client would get an error otherwise.
        """
        if has_other_servers:
            self.turns.close()
        drained = [studio.drain(refuses_orders=not has_other_servers) for studio in self._studios]
        return all(drained)

    async def receive_callback(self, channel: str, key: str, task_id: str) -> None:
        """Pass a callback to the studios of the profile, or to the other servers of the team.

        Raises:
            JournalUnwritable: the database is not usable.
        """
        studios = [studio for studio in self._studios if studio.journal.channel == channel]
        for studio in studios:
            await studio.receive_callback(key, task_id)
        if not studios and self.database is not None:
            await self.database.publish(channel, {"key": key, "task_id": task_id, "is_callback": True})

    @asynccontextmanager
    async def _shared_poller(self, settings: TeamSettings | None) -> AsyncGenerator[Poller | None]:
        """Yield the poller of this EvoLink key, until the last studio of the key closes.

        It batches the polls of all tenants; a 429 slows down only this key.
        """
        if settings is None or settings.key is None or settings.key_text is None:
            yield None
            return
        account = (settings.key_text, settings.base_url)
        shared = self._pollers.get(account)
        if shared is None:
            client = EvolinkClient(
                settings.key,
                base_url=settings.base_url,
                transport=self._transport,
                observe=self.metrics.count_upstream,
            )
            poller = Poller(client, self._group, events=Events([self.metrics.receive]))
            shared = self._pollers[account] = _SharedPoller(poller)
            self._group.start_soon(_hold_open, client, shared.unused)
        shared.studios += 1
        try:
            yield shared.poller
        finally:
            shared.studios -= 1
            if shared.studios == 0:
                del self._pollers[account]
                shared.unused.set()


@dataclass(slots=True)
class _SharedPoller:
    """The poller of an EvoLink key, and the number of open studios that use it."""

    poller: Poller
    studios: int = 0
    unused: anyio.Event = field(default_factory=anyio.Event)


async def _hold_open(client: EvolinkClient, unused: anyio.Event) -> None:
    # The poller outlives the studio of each tenant, so its client does too.
    async with client:
        await unused.wait()
