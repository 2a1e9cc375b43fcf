"""Count each suspension of a call, and cancel a call at any of them, without a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import anyio
from mcp.server.mcpserver import Context

from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.backend import Connection
from evolink_mcp.journal.sqlite import JournalFile, SqliteConnection, new_owner
from evolink_mcp.tools.delivery import Delivery

T = TypeVar("T")


class StepBackend:
    """A SQLite backend without a thread. An action runs some turns of the event loop after its call, in the order of calls.

    While `locked_actions` is not 0, another program holds the lock: each action fails and lowers the number.
    """

    can_publish = False
    has_lease = True
    reread_s = 1.0
    adopt_every_s = None
    has_data = True

    def __init__(self, folder: Path, turns: int = 1) -> None:
        self.owner = new_owner()
        self.file = JournalFile(folder, self.owner)
        self.locked_actions = 0
        self._turns = turns

    @property
    def is_open(self) -> bool:
        return self.file.is_open

    async def run(self, act: Callable[[Connection], Awaitable[T]], *, key: str = "") -> T:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def wait(turns: int) -> None:
            if turns:
                loop.call_soon(wait, turns - 1)
            else:
                execute()

        def execute() -> None:
            try:
                if self.locked_actions:
                    self.locked_actions -= 1
                    raise JournalUnwritable("another program holds its lock (simulated)")
                value = self.file.run(lambda db: run_now(act(SqliteConnection(db, self.file))))
            except BaseException as error:  # noqa: BLE001 - the caller gets every error
                loop.call_soon(settle, error, None)
            else:
                loop.call_soon(settle, None, value)

        def settle(error: BaseException | None, value: Any) -> None:
            if answer.cancelled():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(value)

        loop.call_soon(wait, self._turns - 1)
        return await answer

    def listen(self, channel: str, receive: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        return lambda: None

    async def publish(self, channel: str, payload: dict[str, Any]) -> None:
        pass

    def publish_later(self, channel: str, payload: dict[str, Any], *, topic: str) -> None:
        pass

    def when_lost(self, stop: Callable[[], None]) -> Callable[[], None]:
        return lambda: None

    async def close(self, *, is_released: bool) -> None:
        self.file.close(keep_lease_file=not is_released)


def run_now(action: Awaitable[T]) -> T:
    """Return the result of an action that never suspends."""
    steps: Any = action
    try:
        steps.send(None)
    except StopIteration as finished:
        return finished.value
    raise AssertionError("an action of the journal waited for the event loop")


class CallContext(Context[Any, Any]):
    """The context of a tool call whose transport reports the delivery of the answer."""

    def __init__(self, delivery: Delivery) -> None:
        async def report_progress(*_: object) -> None:
            await anyio.sleep(0)

        session = SimpleNamespace(client_params=None, client_capabilities=None, report_progress=report_progress)
        request: Any = SimpleNamespace(request=delivery, session=session, protocol_version="2025-11-25", meta=None)
        super().__init__(request_context=request)


class Steps:
    """Await a coroutine and count its suspensions. Call `action` at suspension number `position`, counted from 0."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], action: Callable[[], None], position: int) -> None:
        self.count = 0
        self._coroutine = coroutine
        self._action = action
        self._position = position

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._coroutine.__await__()
        value: Any = None
        error: BaseException | None = None
        while True:
            try:
                awaitable = steps.send(value) if error is None else steps.throw(error)
            except StopIteration as finished:
                return finished.value
            number = self.count
            self.count += 1
            if number == self._position:
                # The caller suspends first, then the cancellation reaches it.
                asyncio.get_running_loop().call_soon(self._action)
            error = None
            value = None
            try:
                value = yield awaitable
            except BaseException as cancellation:  # noqa: BLE001 - a cancellation goes into the coroutine
                error = cancellation
