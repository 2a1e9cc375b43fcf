"""One server's way to PostgreSQL: a pool for what the journal does, and a session that shows that the server lives.

The session holds a lock, which PostgreSQL drops when the session ends: by that other servers know that this one is gone.
They wait `GRACE_S` more before they take over what it worked on. A server that has not heard from its session for
`STOP_AFTER_S` stops working on it by itself, which is sooner: no two of them ever work on one entry.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import datetime
from typing import Any, TypeVar

import psycopg
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.teams.database_url import CONNECT_TIMEOUT_S, Address
from evolink_mcp.teams.schema import CHANNEL, migrate
from evolink_mcp.tracing import span

log = logging.getLogger(__name__)
T = TypeVar("T")
Connection = psycopg.AsyncConnection[DictRow]

# The first half of every advisory lock; the second is the server's number, and 0 belongs to the migrations.
LOCKS = 0x65766F6C
GRACE_S = 4.0
STOP_AFTER_S = 3.0
AGAIN_AFTER_S, CLOSE_WITHIN_S = 0.5, 2.0
ALIVE = "UPDATE evolink_servers SET seen_at = clock_timestamp() WHERE number = %s"
FORGET = "DELETE FROM evolink_servers WHERE seen_at < clock_timestamp() - interval '1 day'"
TOLD_MAX_BYTES = 7_900  # PostgreSQL's limit is 8,000
POOL_SIZE, POOL_TRIES = 10, 10  # each of a second


class Database:
    """PostgreSQL at `url`, for all journals of one server. Use `open_database`.

    `owner` is this server's mark. `grace_s` and `stop_after_s` are for tests.
    """

    def __init__(self, url: str, *, grace_s: float = GRACE_S, stop_after_s: float = STOP_AFTER_S) -> None:
        self._address = Address.of(url)
        self.grace_s, self._stop_after_s, self._beat_s = grace_s, stop_after_s, stop_after_s / 3
        self.alive = False
        self._number = 0
        self._backend: tuple[int, datetime | None] = (0, None)  # the session's process there, and when it began
        self._session: Connection | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            self._address.conninfo, connection_class=psycopg.AsyncConnection[DictRow],
            kwargs={"autocommit": True, "row_factory": dict_row}, min_size=1, max_size=POOL_SIZE,
            open=False, check=_check,
        )  # fmt: skip
        self._listeners: list[tuple[str, Callable[[dict[str, Any]], None]]] = []
        self._stops: list[Callable[[], None]] = []
        self._last: dict[str, asyncio.Task[Any]] = {}
        self._running: set[asyncio.Task[Any]] = set()
        self._life: asyncio.Task[None] | None = None

    @property
    def owner(self) -> str:
        """This server's mark on what it works on."""
        return f"server-{self._number}"

    def listen(self, account: str, hear: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """Call `hear` with whatever other servers tell the servers of this account. Returns what ends it."""
        self._listeners.append(listener := (account, hear))
        return lambda: self._listeners.remove(listener)

    async def tell(self, account: str, told: dict[str, Any]) -> None:
        """Tell the other servers of this account; what is too long for PostgreSQL is left out.

        Raises:
            JournalUnwritable: the database is gone.
        """
        said = f"{account} {json.dumps({'by': self.owner, **told})}"
        if len(said) <= TOLD_MAX_BYTES:
            await self.run(lambda db: db.execute("SELECT pg_notify(%s, %s)", (CHANNEL, said)))

    def when_lost(self, stop: Callable[[], None]) -> Callable[[], None]:
        """Call `stop` when this server must not work on what it owned any longer. Returns what ends it."""
        self._stops.append(stop)
        return lambda: self._stops.remove(stop)

    async def run(self, act: Callable[[Connection], Awaitable[T]], *, key: str | None = None) -> T:
        """Call `act` with a connection in autocommit mode. A caller that is cancelled does not end it.

        With `key`, it runs after everything that was asked for this key before. While the database is gone, it fails at
        once.

        Raises:
            JournalUnwritable: for everything that psycopg and the network raise.
        """
        before = self._last.get(key) if key is not None else None
        task = asyncio.create_task(self._work(act, before))
        self._running.add(task)
        if key is not None:
            self._last[key] = task
        task.add_done_callback(lambda done: self._done(done, key))
        return await asyncio.shield(task)

    async def is_dead(self, db: Connection, owner: str) -> bool:
        """Whether this server has been gone for `grace_s`; asked in a transaction, until whose end it stays so."""
        number = _number(owner)
        if not await _value(db, "SELECT pg_try_advisory_xact_lock_shared(%s, %s)", LOCKS, number):
            return False
        gone = "UPDATE evolink_servers SET gone_since = clock_timestamp() WHERE number = %s AND gone_since IS NULL"
        await db.execute(gone.encode(), (number,))
        gone = "SELECT extract(epoch FROM clock_timestamp() - gone_since) >= %s FROM evolink_servers WHERE number = %s"
        return await _value(db, gone, self.grace_s, number) is not False

    async def is_away(self, db: Connection, owner: str) -> bool:
        """Whether this server has ended or is not heard from: no call there waits for anything. In a transaction."""
        number = _number(owner)
        if await _value(db, "SELECT pg_try_advisory_xact_lock_shared(%s, %s)", LOCKS, number):
            return True
        seen = "SELECT extract(epoch FROM clock_timestamp() - seen_at) < %s FROM evolink_servers WHERE number = %s"
        return not await _value(db, seen, self._stop_after_s, number)

    def unwritable(self, error: Exception) -> JournalUnwritable:
        """The error that names the place and the setting, and never a password."""
        return self._address.unwritable(self._address.reason(error))

    async def open(self) -> None:
        """Connect, make or migrate the tables, and begin to live.

        Raises:
            JournalUnwritable: it cannot be used.
        """
        try:
            self._session = await self._connect()
            await migrate(self._session, LOCKS)
            self._number = await _value(self._session, "INSERT INTO evolink_servers DEFAULT VALUES RETURNING number")
            await self._take(self._session)
            await self._session.execute(FORGET.encode())
            await self._pool.open()
        except (psycopg.Error, OSError, TimeoutError) as error:
            await self._shut()
            raise self.unwritable(error) from error
        except JournalUnwritable as error:
            await self._shut()
            raise self._address.unwritable(error.message) from error
        self._life = asyncio.create_task(self._live())

    async def close(self) -> None:
        """End the session: what is not released is taken over by others after `grace_s`."""
        if self._running:
            await asyncio.wait(self._running, timeout=CLOSE_WITHIN_S)
        if self._life is not None:
            self._life.cancel()
            await asyncio.wait([self._life])
        await self._shut()

    # --- the session ---

    async def _live(self) -> None:
        while True:
            try:
                if self._session is None:
                    async with AsyncExitStack() as stack:
                        session = await stack.enter_async_context(await self._connect())
                        await self._take(session)
                        stack.pop_all()
                    self._session = session
                    log.info("the session with the database is there again")
                await self._beat(self._session)
            except (psycopg.Error, OSError, TimeoutError) as error:
                if self._session is not None:
                    log.warning("the session with the database was lost: %s", self._address.reason(error))
                    with suppress(psycopg.Error, OSError):
                        await self._session.close()
                    self._session = None
                await asyncio.sleep(AGAIN_AFTER_S)

    async def _connect(self) -> Connection:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            return await psycopg.AsyncConnection[DictRow].connect(
                self._address.conninfo, autocommit=True, row_factory=dict_row
            )

    async def _take(self, session: Connection) -> None:
        """Hold this server's lock. The session that held it before may still be there for a while, heard by nobody."""
        if not await _value(session, "SELECT pg_try_advisory_lock(%s, %s)", LOCKS, self._number):
            await session.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = %s AND backend_start = %s",
                self._backend,
            )
            raise psycopg.OperationalError("the former session still holds the lock, or another server is testing it")
        await session.execute(
            "INSERT INTO evolink_servers (number) OVERRIDING SYSTEM VALUE VALUES (%s) "
            "ON CONFLICT (number) DO UPDATE SET gone_since = NULL, seen_at = clock_timestamp()",
            (self._number,),
        )
        await session.execute(f"LISTEN {CHANNEL}".encode())
        row = await row_of(session, "SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()")
        self._backend = (row["pid"], row["backend_start"]) if row else (0, None)
        self._lives()

    async def _beat(self, session: Connection) -> None:
        """Wait for changes, and ask now and then whether the session still stands."""
        async for notify in session.notifies(timeout=self._beat_s):
            self._heard(notify)
        async with asyncio.timeout(2 * self._beat_s):
            await session.execute(ALIVE.encode(), (self._number,))
        self._lives()

    def _lives(self) -> None:
        self.alive = True
        self._wait_for_life()

    def _lost(self) -> None:
        if self.alive:
            log.error("the database has not answered for %.0f s: this server stops its work", self._stop_after_s)
        self.alive = False
        self._wait_for_life()  # again: for what begins later
        for stop in self._stops:
            stop()

    def _wait_for_life(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = asyncio.get_running_loop().call_later(self._stop_after_s, self._lost)

    def _heard(self, notify: psycopg.Notify) -> None:
        account, _, said = notify.payload.partition(" ")
        try:
            told: dict[str, Any] = json.loads(said)
            if told.pop("by", "") == self.owner:
                return
        except (ValueError, AttributeError):
            log.warning("something was told on the channel %s that is none of ours", CHANNEL)
            return
        for of, hear in list(self._listeners):
            if account == of:
                hear(told)

    async def _shut(self) -> None:
        self.alive = False
        if self._deadline is not None:
            self._deadline.cancel()
        with suppress(psycopg.Error, OSError, TimeoutError):
            if self._session is not None:
                await self._session.close()
            await self._pool.close(timeout=CLOSE_WITHIN_S)

    # --- what the journal does ---

    async def _work(self, act: Callable[[Connection], Awaitable[T]], before: asyncio.Task[Any] | None) -> T:
        if before is not None:
            await asyncio.wait([before])
        if not self.alive:
            raise self._address.unwritable("the session with it was lost")
        try:
            async with AsyncExitStack() as stack:
                stack.enter_context(span("evolink journal", db__system__name="postgresql"))
                return await act(await self._connection(stack))
        except (psycopg.Error, OSError, TimeoutError) as error:
            raise self.unwritable(error) from error

    async def _connection(self, stack: AsyncExitStack) -> Connection:
        """A free connection; whoever waits for one waits no longer than the database counts as there."""
        for left in reversed(range(POOL_TRIES)):
            try:
                return await stack.enter_async_context(self._pool.connection(1.0))
            except PoolTimeout:
                if not self.alive or not left:
                    raise
        raise AssertionError("unreachable")

    def _done(self, task: asyncio.Task[Any], key: str | None) -> None:
        self._running.discard(task)
        if key is not None and self._last.get(key) is task:
            del self._last[key]
        if not task.cancelled():
            task.exception()  # whoever asked may have been cancelled


@asynccontextmanager
async def open_database(url: str, **more: Any) -> AsyncGenerator[Database]:
    """PostgreSQL at `url`, open; `more` is passed to `Database`.

    Raises:
        JournalUnwritable: it cannot be used.
    """
    database = Database(url, **more)
    await database.open()
    try:
        yield database
    finally:
        await asyncio.shield(asyncio.ensure_future(database.close()))


def _number(owner: str) -> int:
    """The number of a server's mark; of any other mark, 0, which is no server's."""
    number = owner.removeprefix("server-")
    return int(number) if number.isdigit() and len(number) < 10 else 0


async def _check(db: Connection) -> None:
    """A connection that broke in the pool is not given out."""
    await db.execute("")


async def _value(db: Connection, statement: str, *values: Any) -> Any:
    """The one value of the first row; None if there is no row."""
    row = await row_of(db, statement, *values)
    return next(iter(row.values())) if row is not None else None


async def row_of(db: Connection, statement: str, *values: Any) -> DictRow | None:
    """The first row; None if there is none."""
    return await (await db.execute(statement.encode(), values)).fetchone()
