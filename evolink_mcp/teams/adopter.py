"""Search unfinished entries of dead servers for all tenants, and open closed tenants that have one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AsyncExitStack

import anyio

from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.all_profiles import Orphan, find_entry, release_dead_servers
from evolink_mcp.journal.backend import Connection
from evolink_mcp.journal.entry import Phase
from evolink_mcp.journal.profile import profile_name
from evolink_mcp.studio.jobs import guarded
from evolink_mcp.teams.authenticator import TeamAuthenticator
from evolink_mcp.teams.studios import Studios
from evolink_mcp.teams.tenants import TenantLimitReached, Tenants
from evolink_mcp.teams.tokens import Tenant
from evolink_mcp.teams.uploads import UploadApp

log = logging.getLogger(__name__)

# A job that failed releases its entry, and its studio repeats the job. Another studio tries the entry after this time.
TRY_AGAIN_AFTER_S = 3600.0


class Adopter:
    """Let the tenants of this server adopt entries. A tenant without work stays closed and costs the database nothing.

    A closed tenant is opened with its key in the tokens file, or with the server's key. `clock` (seconds) is for tests.
    """

    def __init__(
        self,
        studios: Studios,
        tenants: Tenants[UploadApp],
        authenticator: TeamAuthenticator,
        *,
        clock: Callable[[], float] = anyio.current_time,
    ) -> None:
        self._studios = studios
        self._tenants = tenants
        self._authenticator = authenticator
        self._clock = clock
        self._tried: dict[str, float] = {}  # times of the last tries, by the key of the entry
        self._foreign: set[tuple[Tenant, str]] = set()  # accounts that the key of the tenant cannot read

    async def run(self) -> None:
        """Search now, and with PostgreSQL forever. With SQLite, later entries are adopted at a call of their tenant."""
        async with self._studios.open_backend() as backend:
            interval_s = backend.adopt_every_s
        while True:
            try:
                await self.adopt()
            except JournalUnwritable as error:
                log.warning("%s", error.message)
            if interval_s is None:
                return
            await anyio.sleep(interval_s)

    async def adopt(self) -> None:
        """Search once for the entries of all tenants, and adopt those that this server has a key for.

        Raises:
            JournalUnwritable: the entries are unknown.
        """
        async with self._studios.open_backend() as backend:
            # A search must not create the journal file of SQLite.
            if not backend.has_data:
                return
            orphans = await backend.run(lambda db: release_dead_servers(db, backend.owner))
        earliest = self._clock() - TRY_AGAIN_AFTER_S
        self._tried = {key: tried_at for key, tried_at in self._tried.items() if tried_at > earliest}
        by_profile: dict[str, list[Orphan]] = {}
        for orphan in orphans:
            # An owner that died since the last search is a reason to try again at once.
            if orphan.owner or orphan.key not in self._tried:
                by_profile.setdefault(orphan.profile, []).append(orphan)
        async with anyio.create_task_group() as group:
            for profile, of_profile in by_profile.items():
                group.start_soon(guarded, self._adopt, profile_name(profile), of_profile)

    async def receive_callback(self, channel: str, key: str, task_id: str) -> None:
        """Pass a callback on. If it can change an entry of a closed tenant, open the tenant first.

        Raises:
            JournalUnwritable: the database is not usable.
            TenantLimitReached: the tenant cannot be opened now.
        """
        async with AsyncExitStack() as stack:
            if all(app.studio.journal.channel != channel for app in self._tenants.open_apps.values()):
                tenant = await self._tenant_of_lost_answer(key)
                if tenant is not None:
                    app = await stack.enter_async_context(self._tenants.use(tenant))
                    await app.studio.adopt()  # it also tests which accounts the key can read
            await self._studios.receive_callback(channel, key, task_id)

    async def _adopt(self, name: str, orphans: list[Orphan]) -> None:
        """Adopt entries of one tenant: with its open studios first, then with the key that this server has for it."""
        # An open studio may have a key that only its caller sends.
        tenants = [tenant for tenant in self._tenants.open_apps if tenant.name == name]
        known_tenant = self._tenant_named(name)
        if known_tenant is not None and known_tenant not in tenants:
            tenants.append(known_tenant)
        for tenant in tenants:
            # Each try opens a studio and asks EvoLink.
            if all((tenant, orphan.account) in self._foreign for orphan in orphans):
                continue
            try:
                async with self._tenants.use(tenant) as app:
                    is_certain = await app.studio.adopt()
            # The next search tries again.
            except TenantLimitReached:
                return
            journal = app.studio.journal
            for orphan in orphans:
                if journal.is_linked(orphan.account):
                    self._tried[orphan.key] = self._clock()
                # Without a clear answer of EvoLink the key may still belong to the account.
                elif is_certain:
                    self._foreign.add((tenant, orphan.account))
            orphans = [orphan for orphan in orphans if not journal.is_linked(orphan.account)]

    async def _tenant_of_lost_answer(self, key: str) -> Tenant | None:
        """Return the tenant of an entry with a lost answer. It may have no job, so a studio must receive its callback.

        None: there is no such entry, its task is certain, or this server has no key for the tenant.
        """

        async def read(db: Connection) -> Tenant | None:
            match = await find_entry(db, key)
            if match is None:
                return None
            profile, entry = match
            is_lost = entry.phase in (Phase.SENDING, Phase.UNKNOWN) or entry.is_unconfirmed
            return self._tenant_named(profile_name(profile)) if is_lost else None

        async with self._studios.open_backend() as backend:
            return await backend.run(read)

    def _tenant_named(self, name: str) -> Tenant | None:
        """Return the tenant with the key that this server has for it. None: it has none."""
        tenant = self._authenticator.tenants.get(name, Tenant(name))
        has_key = tenant.evolink_key is not None or self._studios.settings.key is not None
        return tenant if has_key else None
