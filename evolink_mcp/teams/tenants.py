"""Route each HTTP request to the app of its tenant. Each tenant has its own studio, MCP server and part of the journal."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Generic, Protocol, TypeVar

import anyio
import anyio.abc
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.lifespan.on import LifespanOn

from evolink_mcp.call_context import outside_request
from evolink_mcp.teams.tokens import Tenant
from evolink_mcp.transports.authentication import CALLER_KEY
from evolink_mcp.transports.turns import Turns

log = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S = 0.5
# To open a tenant costs as much as many calls.
IDLE_TIMEOUT_S = 3600.0
IDLE_CHECK_INTERVAL_S = 60.0
# An open app of a person with a JWT holds 0.3 MB, and descriptors while it works.
UNLISTED_MAX = 256
DESCRIPTORS_PER_APP = 8
NEW_TENANTS = "new tenants"  # their line of turns


def unlisted_max_for(descriptors: int) -> int:
    """Return how many apps of people with a JWT may be open in a process with this number of descriptors."""
    return max(1, min(UNLISTED_MAX, descriptors // DESCRIPTORS_PER_APP))


class TenantLimitReached(Exception):
    """All open apps have running work, so no app of another tenant can be opened."""


class TenantApp(Protocol):
    """The ASGI app of a tenant."""

    @property
    def is_idle(self) -> bool:
        """Whether the app has no running work. An idle app can be closed and opened again."""
        ...

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        ...


AppT = TypeVar("AppT", bound=TenantApp)


class LateApp:
    """An ASGI app that `make` builds at the first request. That costs as much as many calls, and most of the memory.

    It needs one of the `turns` of the process. All new tenants wait in one line. The lifespan of the app ends with `stack`.
    """

    def __init__(self, make: Callable[[], ASGIApp], turns: Turns, stack: AsyncExitStack) -> None:
        self._make = make
        self._turns = turns
        self._stack = stack
        self._app: ASGIApp | None = None
        self._lock = anyio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        app = self._app or await self._started_app()
        await app(scope, receive, send)

    async def _started_app(self) -> ASGIApp:
        async with self._lock:
            if self._app is None:
                async with self._turns.turn(NEW_TENANTS):
                    with outside_request():  # the app serves later requests too
                        app = self._make()
                        await self._stack.enter_async_context(lifespan(app))
                        self._app = app
            return self._app


class Tenants(Generic[AppT]):
    """An ASGI app behind the HTTP guard, which authenticates the tenant of each request.

    `open_app` opens the app of a tenant at its first request; it runs in `group`. If the tokens file changes a tenant, the
    tenant gets a new app, and the old app finishes its work. After IDLE_TIMEOUT_S without a request an idle app is closed.
    `is_listed` returns whether the tokens file has the tenant. At most `unlisted_max` apps of other tenants are open: for a
    further one, the idle app with the oldest last request is closed. If there is no idle app, the answer is 503. `sleep`
    and `clock` (seconds) are for tests.
    """

    def __init__(
        self,
        group: anyio.abc.TaskGroup,
        open_app: Callable[[Tenant], AbstractAsyncContextManager[AppT]],
        is_listed: Callable[[Tenant], bool] = lambda tenant: True,
        *,
        unlisted_max: int = UNLISTED_MAX,
        sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
        clock: Callable[[], float] = anyio.current_time,
    ) -> None:
        self._group = group
        self._open_app = open_app
        self._is_listed = is_listed
        self._unlisted_max = unlisted_max
        self._sleep = sleep
        self._clock = clock
        self._apps: dict[Tenant, AppT] = {}
        self._open_requests: Counter[Tenant] = Counter()
        self._last_request_at: dict[Tenant, float] = {}
        self._closing: dict[Tenant, anyio.Event] = {}
        self._ends: dict[Tenant, anyio.Event] = {}  # of closing apps
        self._lock = anyio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        if scope["type"] == "lifespan":
            await _serve_lifespan(receive, send)
            return
        try:
            async with self.use(scope[CALLER_KEY]) as app:
                await app(scope, receive, send)
        except TenantLimitReached:
            text = "This server has too many people with running work. Try again in a minute."
            await PlainTextResponse(text, 503, {"retry-after": "60"})(scope, receive, send)

    @property
    def open_apps(self) -> dict[Tenant, AppT]:
        """The apps that are open and not about to close."""
        return dict(self._apps)

    @asynccontextmanager
    async def use(self, tenant: Tenant) -> AsyncGenerator[AppT]:
        """Open the app of the tenant if necessary, and keep it open inside the context.

        Raises:
            TenantLimitReached: all open apps have running work.
        """
        # Before the first await, so that the app cannot close meanwhile.
        self._open_requests[tenant] += 1
        try:
            yield await self._app_of(tenant)
        finally:
            self._open_requests[tenant] -= 1
            if tenant in self._apps:
                self._last_request_at[tenant] = self._clock()
            elif not self._open_requests[tenant]:
                del self._open_requests[tenant]

    async def _app_of(self, tenant: Tenant) -> AppT:
        if tenant not in self._apps:
            async with self._lock:
                if tenant not in self._apps:
                    # The closing app releases all entries of the tenant, so the new app must not own one yet.
                    for end in [end for closing, end in self._ends.items() if closing.name == tenant.name]:
                        await end.wait()
                    if not self._is_listed(tenant):
                        self._make_room()
                    with outside_request():  # the app serves later requests too
                        self._apps[tenant] = await self._group.start(self._run, tenant)
        return self._apps[tenant]

    def _make_room(self) -> None:
        """Close an idle app if the limit of apps is reached."""
        unlisted = [tenant for tenant in self._apps if not self._is_listed(tenant)]
        if len(unlisted) < self._unlisted_max:
            return
        idle = [tenant for tenant in unlisted if not self._open_requests[tenant] and self._apps[tenant].is_idle]
        if not idle:
            raise TenantLimitReached
        self._close(min(idle, key=lambda tenant: self._last_request_at[tenant]))

    async def _run(self, tenant: Tenant, *, task_status: anyio.abc.TaskStatus[AppT]) -> None:
        closing = anyio.Event()
        async with self._open_app(tenant) as app, anyio.create_task_group() as group:
            log.info("opened the server of tenant %s", tenant.name)
            self._last_request_at[tenant] = self._clock()
            self._closing[tenant] = closing
            task_status.started(app)
            group.start_soon(self._close_when_idle, tenant, app, closing)
            await closing.wait()
            group.cancel_scope.cancel()
        self._ends.pop(tenant).set()
        log.info("closed the idle server of tenant %s", tenant.name)

    async def _close_when_idle(self, tenant: Tenant, app: AppT, closing: anyio.Event) -> None:
        while not closing.is_set():
            if self._can_close(tenant, app):
                self._close(tenant)
            else:
                await self._sleep(IDLE_CHECK_INTERVAL_S)

    def _close(self, tenant: Tenant) -> None:
        """Close an idle app. No request can arrive between the check and this call, because there is no await."""
        del self._apps[tenant], self._last_request_at[tenant], self._open_requests[tenant]
        self._ends[tenant] = anyio.Event()
        self._closing.pop(tenant).set()

    def _can_close(self, tenant: Tenant, app: AppT) -> bool:
        silence_s = self._clock() - self._last_request_at[tenant]
        is_unused = tenant in self._apps and not self._open_requests[tenant]
        return is_unused and silence_s >= IDLE_TIMEOUT_S and app.is_idle


@asynccontextmanager
async def lifespan(app: ASGIApp) -> AsyncGenerator[None]:
    """Run the lifespan of an ASGI app. uvicorn runs only the lifespan of the outermost app."""
    config = uvicorn.Config(app, lifespan="on", log_config=None)
    config.load()
    life = LifespanOn(config)
    await life.startup()
    if life.should_exit:
        raise RuntimeError("the tenant's app did not start")
    try:
        yield
    finally:
        # The cancellation of the server must not skip the end of the SDK's session manager.
        with anyio.CancelScope(shield=True), anyio.move_on_after(SHUTDOWN_TIMEOUT_S):
            await life.shutdown()


async def _serve_lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
