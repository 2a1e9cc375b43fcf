"""One server's connections to PostgreSQL: a pool for the journal, and a session that proves that the server is alive.

The session holds and renews the lease, see `lease`. A server stops its work `stop_after_s` after the last answer of its
session. Other servers may adopt its entries `grace_s` later.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from typing import Any, TypeVar

import anyio
import psycopg
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from evolink_mcp.call_context import remaining_s
from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.journal import ALL_PROFILES, RELEASE_CALLERS
from evolink_mcp.teams.database_url import DEFAULT_TIMES, Address, DatabaseTimes
from evolink_mcp.teams.failover import Timelines, WrittenEntries, warn_of_asynchronous_standby
from evolink_mcp.teams.lease import LOCKS, DatabaseConnection, Lease, LeaseLost
from evolink_mcp.teams.request_rates import MinuteCount, RequestRates
from evolink_mcp.teams.schema import CHANNEL, migrate, translate
from evolink_mcp.tracing import span

log = logging.getLogger(__name__)
T = TypeVar("T")


class PooledConnection(psycopg.AsyncConnection[DictRow]):
    """A connection of the pool. `used_at` is the monotonic time of its last use."""

    used_at = -math.inf


# Well below `grace_s`: a server that reconnects in time keeps its entries.
RECONNECT_AFTER_S = 0.5
# The pool ends a series of attempts to connect after this time, and the next action starts a new one. The pauses of a series
# double, so the last pause of a long series would continue for about as long as the outage had lasted.
RECONNECT_TIMEOUT_S = 1.0
CLOSE_WITHIN_S = 2.0  # for the running actions, and for the pool
# Add requests of tenants in a minute, and forget those of earlier minutes. Order and SKIP LOCKED prevent a deadlock with the
# same statement of another server.
ADD_REQUESTS = """WITH forgotten AS (DELETE FROM evolink_requests WHERE (tenant, minute) IN
        (SELECT tenant, minute FROM evolink_requests WHERE minute < %s FOR UPDATE SKIP LOCKED))
    INSERT INTO evolink_requests AS known
    SELECT * FROM unnest(%s::text[], %s::bigint[], %s::integer[]) AS new (tenant, minute, requests) ORDER BY tenant, minute
    ON CONFLICT (tenant, minute) DO UPDATE SET requests = known.requests + excluded.requests
    RETURNING tenant, minute, requests"""
CURRENT_SESSION = "SELECT pg_backend_pid()"
NOTIFY = "SELECT pg_notify(%s, message) FROM unnest(%s::text[]) AS message WHERE evolink_has_other_server(%s)"
# A pooler can give the same session twice by chance, so one test is not enough.
POOLER_TESTS = 2
SHARED_SESSIONS = (
    "a pooler such as PgBouncer gives each transaction another session, and a server needs one session for its lease: "
    "name PostgreSQL itself in EVOLINK_MCP_DATABASE_URL, or set pool_mode = session"
)
PAYLOAD_MAX_BYTES = 7_900  # PostgreSQL's limit is 8,000
POOL_SIZE = 10  # connections; the session of the lease is a further one
POOL_TRIES = 10  # each waits one second for a connection


class Database:
    """The PostgreSQL at `url`, for all journals of one server. Use `open_database`.

    The heartbeat exchanges the counts of `rates` with the other servers.
    """

    def __init__(self, url: str, times: DatabaseTimes = DEFAULT_TIMES) -> None:
        self._address = Address.of(url, times.connect_timeout_s)
        self.times = times
        # One slow heartbeat must not stop the work.
        self._heartbeat_s = times.stop_after_s / 3
        self.written = WrittenEntries()
        self._lease = Lease(times)
        self._timelines = Timelines(times.lease_s, self.written)
        self._alive_until = -math.inf  # monotonic time
        self._ahead_s = 0.0  # of the database's clock
        self.rates = RequestRates(clock=self.now)
        self._is_working = False
        self._session: DatabaseConnection | None = None
        self._deadline: asyncio.TimerHandle | None = None
        # Without autocommit psycopg leaves a transaction open after each statement.
        self._pool: AsyncConnectionPool[PooledConnection] = AsyncConnectionPool(
            self._address.conninfo, connection_class=PooledConnection,
            kwargs={"autocommit": True, "row_factory": dict_row}, min_size=1, max_size=POOL_SIZE,
            open=False, check=self._check, configure=self._check_timeline, reconnect_timeout=RECONNECT_TIMEOUT_S,
        )  # fmt: skip
        self._connected_at = -math.inf  # monotonic time of the start of the session
        self._listeners: list[tuple[str, Callable[[dict[str, Any]], None]]] = []
        self._loss_listeners: list[Callable[[], None]] = []
        self._later_payloads: dict[str, tuple[str, dict[str, Any]]] = {}  # topic -> channel and payload
        self._last_actions: dict[str, asyncio.Task[Any]] = {}  # by the key of the entry
        self._actions: set[asyncio.Task[Any]] = set()
        self.failures = Counter({"action": 0, "session": 0})
        self._heartbeat: asyncio.Task[None] | None = None

    @property
    def owner(self) -> str:
        """The ID of this server. It changes if another server ended the lease."""
        return self._lease.owner

    @property
    def is_alive(self) -> bool:
        """Whether no other server can own the entries of this one. A process that was frozen gets False at once."""
        return time.monotonic() < self._alive_until

    def now(self) -> float:
        """Return the time of the database's clock in epoch seconds. All servers have the same time, to a few milliseconds."""
        return time.time() + self._ahead_s

    @property
    def has_session(self) -> bool:
        """Whether the session is open. `is_alive` stays true for `stop_after_s` without a session."""
        return self._session is not None

    @property
    def listener_count(self) -> int:
        """The number of functions that `listen` and `when_lost` registered."""
        return len(self._listeners) + len(self._loss_listeners)

    def pool_stats(self) -> dict[str, int]:
        """Return the counts of psycopg's pool. `requests_queued` waited for a connection, `requests_wait_ms` in all."""
        return self._pool.get_stats()

    def listen(self, channel: str, receive: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """Call `receive` with each payload on the channel from another server. Return the function that stops it."""
        self._listeners.append(listener := (channel, receive))
        return lambda: self._listeners.remove(listener)

    async def publish(self, channel: str, payload: dict[str, Any]) -> None:
        """Send a payload to the other servers that listen on the channel. Skip one that is too long for PostgreSQL.

        Raises:
            JournalUnwritable: The database does not answer.
        """
        messages = self._messages((channel, payload))
        if messages:
            await self.run(lambda db: db.execute(NOTIFY.encode(), (CHANNEL, messages, self.owner)))

    def publish_later(self, channel: str, payload: dict[str, Any], *, topic: str) -> None:
        """Send a payload with the next heartbeat, so that it needs no transaction. Only the newest of a topic is sent."""
        self._later_payloads[topic] = (channel, payload)

    def when_lost(self, stop: Callable[[], None]) -> Callable[[], None]:
        """Call `stop` when other servers may adopt the entries of this one. Return the function that cancels that."""
        self._loss_listeners.append(stop)
        return lambda: self._loss_listeners.remove(stop)

    async def run(self, act: Callable[[DatabaseConnection], Awaitable[T]], *, key: str | None = None) -> T:
        """Call `act` with a connection in autocommit mode. It continues after the cancellation of its caller.

        Actions with the same `key` run one after the other. They fail at once while `is_alive` is false. The deadline of
        the current call ends an action, after `action_min_s` at the earliest.

        Raises:
            JournalUnwritable: psycopg or the network raised an error, or the call must answer now.
        """
        # The states of an entry must reach the database in the order of their writes.
        before = self._last_actions.get(key) if key is not None else None
        is_late = asyncio.Event()
        task = asyncio.create_task(self._work(act, before, is_late))
        self._actions.add(task)
        if key is not None:
            self._last_actions[key] = task
        task.add_done_callback(lambda task: self._handle_result(task, key))
        limit_s = remaining_s()
        if limit_s is not None:
            limit_s = max(limit_s, self.times.action_min_s)
        with anyio.move_on_after(limit_s):
            # A cancelled caller must not interrupt a write in the middle.
            return await asyncio.shield(task)
        if task.done():
            return task.result()
        is_late.set()
        if before is None or before.done():  # else the next action must still wait for this one
            task.cancel()
        self.failures["action"] += 1
        raise self._address.unwritable(f"it did not answer within the {limit_s:.1f} s that this call had for it")

    async def try_entries(self) -> None:
        """Read one entry.

        Raises:
            JournalUnwritable: The table cannot be read.
        """
        await self.run(lambda db: db.execute("SELECT key FROM evolink_entries LIMIT 1"))

    async def is_dead(self, db: DatabaseConnection, owner: str) -> bool:
        """Return whether a server ended, or did not move its deadline. Then it can never write its entries again."""
        return await self._lease.is_dead(db, owner)

    async def is_silent(self, db: DatabaseConnection, owner: str) -> bool:
        """Return whether a server ended or sent no heartbeat for `stop_after_s`. Then no call waits there."""
        return await self._lease.is_silent(db, owner)

    def unwritable(self, error: Exception) -> JournalUnwritable:
        """Return the error with the database's name and setting, and without a password."""
        return self._address.unwritable(self._address.reason(error))

    async def open(self) -> None:
        """Connect, make or migrate the tables, and start the heartbeat.

        Raises:
            JournalUnwritable: The database cannot be used.
        """
        try:
            self._session = await self._connect()
            await self._refuse_shared_sessions(self._session)
            await migrate(self._session, LOCKS)
            await self._lease.register(self._session)
            await self._take_lease(self._session)
            await self._lease.forget_old(self._session)
            await warn_of_asynchronous_standby(self._session)
            await self._pool.open()
        except (psycopg.Error, OSError, TimeoutError) as error:
            await self._shut()
            raise self.unwritable(error) from error
        except JournalUnwritable as error:
            await self._shut()
            raise self._address.unwritable(error.message) from error
        self._heartbeat = asyncio.create_task(self._run_session())

    async def close(self) -> None:
        """End the session. Other servers adopt unreleased entries after `grace_s`."""
        if self._actions:
            await asyncio.wait(self._actions, timeout=CLOSE_WITHIN_S)
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            await asyncio.wait([self._heartbeat])
        await self._shut()

    # --- the session ---

    async def _run_session(self) -> None:
        while True:
            try:
                if self._session is None:
                    async with AsyncExitStack() as stack:
                        session = await stack.enter_async_context(await self._connect())
                        await self._take_lease(session)
                        stack.pop_all()
                    self._session = session
                    log.info("reconnected to the database")
                await self._send_heartbeat(self._session)
            # Before psycopg.Error, of which LeaseLost is a subclass.
            except LeaseLost as error:
                await self._replace_lease(error)
            except (psycopg.Error, OSError, TimeoutError) as error:
                if self._session is not None:
                    self.failures["session"] += 1
                    log.warning("lost the session with the database: %s", self._address.reason(error))
                    with suppress(psycopg.Error, OSError):
                        await self._session.close()
                    self._session = None
                await asyncio.sleep(RECONNECT_AFTER_S)

    async def _connect(self) -> DatabaseConnection:
        # libpq applies its own timeout to each address of the host separately.
        async with asyncio.timeout(self.times.connect_timeout_s):
            return await psycopg.AsyncConnection[DictRow].connect(
                self._address.conninfo, autocommit=True, row_factory=dict_row
            )

    async def _refuse_shared_sessions(self, session: DatabaseConnection) -> None:
        """Raise JournalUnwritable if a pooler gives each transaction another session. Then no session can hold a lease."""
        own = await _value(session, CURRENT_SESSION)
        for _ in range(POOLER_TESTS):
            async with await self._connect() as other, other.transaction():
                others = await _value(other, CURRENT_SESSION)
                # A pooler gives the session that is idle now to the other connection, and then another one to this.
                if own == others or await _value(session, CURRENT_SESSION) != own:
                    raise JournalUnwritable(SHARED_SESSIONS)

    async def _take_lease(self, session: DatabaseConnection) -> None:
        timeline = await self._timelines.find(session)
        # The database could not record the end of a call during an outage. An identical call at another server would then
        # buy again, because a call here still seems to wait. So the waits end before this server counts as alive.
        await session.execute(translate(RELEASE_CALLERS.format(marks="?", linked=ALL_PROFILES)), (self.owner,))
        await self._lease.take(session)
        await session.execute(f"LISTEN {CHANNEL}".encode())
        await self._timelines.enter(session, timeline, self._lease)
        self._connected_at = time.monotonic()
        self._renew(self._connected_at, await self._lease.renew(session))

    async def _replace_lease(self, error: LeaseLost) -> None:
        """Stop all work under the old number, and continue with a new one."""
        log.warning("%s; this server stops its work and continues with a new lease", error)
        self._stop_work()
        session = self._session
        self._session = None
        with suppress(psycopg.Error, OSError, TimeoutError):
            if session is not None:
                await session.close()
            async with await self._connect() as other:
                await self._lease.register(other)

    async def _send_heartbeat(self, session: DatabaseConnection) -> None:
        """Wait for notifications and send a heartbeat."""
        async for notify in session.notifies(timeout=self._heartbeat_s):
            self._receive(notify)
        sent_at = time.monotonic()
        messages = self._messages(*self._later_payloads.values())
        self._later_payloads.clear()
        # A network that drops all packets causes no error.
        async with asyncio.timeout(2 * self._heartbeat_s), session.transaction() if messages else nullcontext():
            now = await self._lease.renew(session)
            if messages:
                await session.execute(NOTIFY.encode(), (CHANNEL, messages, self.owner))
        self._renew(sent_at, now)
        if requests := self.rates.take_unsent():
            # Not in a transaction with the heartbeat: a server that freezes inside it would block those of the others.
            totals: list[MinuteCount] | None = None
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    totals = await exchange(session, requests)
            finally:
                if totals is None:
                    self.rates.restore_unsent(requests)
                else:
                    self.rates.set_totals(totals)

    def _renew(self, sent_at: float, now: float) -> None:
        """Restart the time in which this server may work. It begins at `sent_at`, because the answer may have waited.

        `now` is the time of the database.
        """
        self._ahead_s = now - time.time()
        self._alive_until = sent_at + self.times.stop_after_s
        self._is_working = True
        self._restart_deadline()

    def _handle_silence(self) -> None:
        if self._is_working:
            log.error("the database has not answered for %.0f s, this server stops its work", self.times.stop_after_s)
        self._stop_work()
        self._restart_deadline()  # jobs may start before the session is back

    def _stop_work(self) -> None:
        self._alive_until = -math.inf
        self._is_working = False
        for stop in self._loss_listeners:
            stop()

    def _restart_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        remaining_s = self._alive_until - time.monotonic() if self._is_working else self.times.stop_after_s
        self._deadline = asyncio.get_running_loop().call_later(max(0.0, remaining_s), self._handle_silence)

    def _messages(self, *payloads: tuple[str, dict[str, Any]]) -> list[str]:
        """Return the messages to channels. Leave out those that are too long for PostgreSQL."""
        messages = [f"{channel} {json.dumps({'by': self.owner, **payload})}" for channel, payload in payloads]
        # json.dumps writes only ASCII, so characters are bytes.
        return [message for message in messages if len(message) <= PAYLOAD_MAX_BYTES]

    def _receive(self, notify: psycopg.Notify) -> None:
        channel, _, message = notify.payload.partition(" ")
        try:
            payload: dict[str, Any] = json.loads(message)
            # PostgreSQL sends a notification to its sender too.
            if payload.pop("by", "") == self.owner:
                return
        except (ValueError, AttributeError):
            log.warning("ignoring unknown notification on channel %s", CHANNEL)
            return
        # A receiver may remove its own registration.
        for listener_channel, receive in list(self._listeners):
            if channel == listener_channel:
                receive(payload)

    async def _shut(self) -> None:
        self._alive_until = -math.inf
        if self._deadline is not None:
            self._deadline.cancel()
        with suppress(psycopg.Error, OSError, TimeoutError):
            if self._session is not None:
                await self._session.close()
            await self._pool.close(timeout=CLOSE_WITHIN_S)

    # --- actions ---

    async def _work(
        self,
        act: Callable[[DatabaseConnection], Awaitable[T]],
        before: asyncio.Task[Any] | None,
        is_late: asyncio.Event,
    ) -> T:
        if before is not None:
            await asyncio.wait([before])
        # The caller has already reported that this action did not happen.
        if is_late.is_set():
            raise self._address.unwritable("its call had no time left")
        # Another server may own the entries already.
        if not self.is_alive:
            raise self._address.unwritable("the session with it was lost")
        try:
            async with AsyncExitStack() as stack:
                stack.enter_context(span("evolink journal", db__system__name="postgresql"))
                return await act(await self._connection(stack))
        except (psycopg.Error, OSError, TimeoutError) as error:
            self.failures["action"] += 1
            raise self.unwritable(error) from error

    async def _connection(self, stack: AsyncExitStack) -> DatabaseConnection:
        """Return a free connection. Wait for one only while `is_alive` is true."""
        for remaining in reversed(range(POOL_TRIES)):
            try:
                connection = await stack.enter_async_context(self._pool.connection(1.0))
            except PoolTimeout:
                if not self.is_alive or not remaining:
                    raise
            else:
                stack.callback(_record_use, connection)
                return connection
        raise AssertionError("unreachable")

    async def _check(self, db: PooledConnection) -> None:
        """Raise an error if the connection is broken, so that the pool replaces it. Skip a connection in recent use."""
        is_recent = time.monotonic() - db.used_at < self.times.check_after_s
        # A restart of the database ends all connections, so those before this session are checked.
        if not is_recent or db.used_at < self._connected_at:
            await db.execute("")

    async def _check_timeline(self, db: PooledConnection) -> None:
        """Raise an error if a new connection leads to a promoted standby, until the session has written the entries back."""
        if not await self._timelines.is_current(db):
            raise psycopg.OperationalError("the database was replaced by another one")

    def _handle_result(self, task: asyncio.Task[Any], key: str | None) -> None:
        self._actions.discard(task)
        if key is not None and self._last_actions.get(key) is task:
            del self._last_actions[key]
        if not task.cancelled():
            task.exception()  # a cancelled caller does not read it


async def exchange(db: DatabaseConnection, requests: list[MinuteCount]) -> list[MinuteCount]:
    """Add the requests of this server to the table. Return those of all servers together, for the same tenants."""
    tenants, minutes, counts = (list(column) for column in zip(*requests, strict=True))
    # A server whose heartbeat is late may still add to the previous minute.
    rows = await (await db.execute(ADD_REQUESTS.encode(), (max(minutes) - 1, tenants, minutes, counts))).fetchall()
    return [MinuteCount(row["tenant"], row["minute"], row["requests"]) for row in rows]


@asynccontextmanager
async def open_database(url: str, times: DatabaseTimes = DEFAULT_TIMES) -> AsyncGenerator[Database]:
    """Open the PostgreSQL at `url`.

    Raises:
        JournalUnwritable: The database cannot be used.
    """
    database = Database(url, times)
    await database.open()
    try:
        yield database
    finally:
        # Without the end of its session, other servers would wait for the deadline of the lease.
        await asyncio.shield(asyncio.ensure_future(database.close()))


def _record_use(db: PooledConnection) -> None:
    db.used_at = time.monotonic()


async def _value(db: DatabaseConnection, statement: str) -> Any:
    """Return the first value of the first row, or None."""
    row = await (await db.execute(statement.encode())).fetchone()
    return next(iter(row.values())) if row is not None else None
