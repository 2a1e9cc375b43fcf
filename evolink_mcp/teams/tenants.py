"""Each tenant has a server, a journal's part and pictures of their own: a request only ever reaches its tenant's."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import anyio
import anyio.abc
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.lifespan.on import LifespanOn

from evolink_mcp.teams.tokens import Tenant

log = logging.getLogger(__name__)

SHUTDOWN_WITHIN_S = 0.5
SCOPE_KEY = "evolink.tenant"
# The app of a tenant that nobody has called for so long is closed, if it may be.
IDLE_S, LOOK_EVERY_S = 3600.0, 60.0


class TenantApp(Protocol):
    """A tenant's ASGI app. `is_idle`: nothing is under way in it, so it can be closed and opened again at the next call."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        ...

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        ...


OpenApp = Callable[[Tenant], AbstractAsyncContextManager[TenantApp]]


class Tenants:
    """An ASGI app behind the door, which says whose request it is; each tenant's own app is opened by `open_app`.

    The apps live in `group`. A tenant of whom the tokens file says something new gets a new app; what the old one has
    under way goes on. An app that is idle is closed after a while, unless its tenant `stays`. `sleep` is for tests.
    """

    def __init__(
        self,
        group: anyio.abc.TaskGroup,
        open_app: OpenApp,
        stays: Callable[[Tenant], bool] = lambda tenant: True,
        *,
        sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
    ) -> None:
        self._group = group
        self._open_app = open_app
        self._stays = stays
        self._sleep = sleep
        self._apps: dict[Tenant, TenantApp] = {}
        self._requests: Counter[Tenant] = Counter()
        self._called: dict[Tenant, float] = {}
        self._opening = anyio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
        else:
            tenant = scope[SCOPE_KEY]
            self._requests[tenant] += 1
            try:
                app = await self.app(tenant)
                await app(scope, receive, send)
            finally:
                self._requests[tenant] -= 1
                self._called[tenant] = anyio.current_time()

    async def app(self, tenant: Tenant) -> TenantApp:
        """The tenant's app, opened if it is not yet."""
        if tenant not in self._apps:
            async with self._opening:
                if tenant not in self._apps:
                    self._apps[tenant] = await self._group.start(self._serve, tenant)
        return self._apps[tenant]

    async def _serve(self, tenant: Tenant, *, task_status: anyio.abc.TaskStatus[TenantApp]) -> None:
        async with self._open_app(tenant) as app:
            log.info("a server for the tenant %s is open", tenant.name)
            self._called[tenant] = anyio.current_time()
            task_status.started(app)
            while self._stays(tenant) or not self._is_idle(tenant, app):
                await self._sleep(LOOK_EVERY_S)
            # Nothing is awaited since then, so no request can have come.
            del self._apps[tenant], self._called[tenant], self._requests[tenant]
        log.info("the server for the tenant %s is closed: nobody has called for a while", tenant.name)

    def _is_idle(self, tenant: Tenant, app: TenantApp) -> bool:
        called = anyio.current_time() - self._called[tenant]
        return tenant in self._apps and not self._requests[tenant] and called >= IDLE_S and app.is_idle


@asynccontextmanager
async def lifespan(app: ASGIApp) -> AsyncGenerator[None]:
    """Run the lifespan of an ASGI app that no server runs by itself."""
    config = uvicorn.Config(app, lifespan="on", log_config=None)
    config.load()
    life = LifespanOn(config)
    await life.startup()
    if life.should_exit:
        raise RuntimeError("the tenant's app did not start")
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(SHUTDOWN_WITHIN_S):
            await life.shutdown()


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
