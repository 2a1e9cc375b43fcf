"""Each tenant has a server, a journal's part and pictures of their own: a request only ever reaches its tenant's."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio
import anyio.abc
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.lifespan.on import LifespanOn

from evolink_mcp.transports.auth import Tenant

log = logging.getLogger(__name__)

SHUTDOWN_WITHIN_S = 0.5
SCOPE_KEY = "evolink.tenant"
OpenApp = Callable[[Tenant], AbstractAsyncContextManager[ASGIApp]]


class Tenants:
    """An ASGI app behind the door, which says whose request it is; each tenant's own app is opened by `open_app`.

    The apps live in `group`. A tenant of whom the tokens file says something new gets a new app; what the old one has
    under way goes on.
    """

    def __init__(self, group: anyio.abc.TaskGroup, open_app: OpenApp) -> None:
        self._group = group
        self._open_app = open_app
        self._apps: dict[Tenant, ASGIApp] = {}
        self._opening = anyio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
        else:
            app = await self.app(scope[SCOPE_KEY])
            await app(scope, receive, send)

    async def app(self, tenant: Tenant) -> ASGIApp:
        """The tenant's app, opened if it is not yet."""
        if tenant not in self._apps:
            async with self._opening:
                if tenant not in self._apps:
                    self._apps[tenant] = await self._group.start(self._serve, tenant)
        return self._apps[tenant]

    async def _serve(self, tenant: Tenant, *, task_status: anyio.abc.TaskStatus[ASGIApp]) -> None:
        async with self._open_app(tenant) as app:
            log.info("a server for the tenant %s is open", tenant.name)
            task_status.started(app)
            await anyio.sleep_forever()


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
