"""The thread of the SQLite journal. Actions that wait at the same time share one transaction, and so one write to the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from evolink_mcp.journal.paid_record import PaidTask

if TYPE_CHECKING:
    import sqlite3

GROUP_MAX = 100  # a write takes about 0.2 ms, and other programs wait for the write lock meanwhile

Act = Callable[["sqlite3.Connection"], Any]


class Outcome(NamedTuple):
    """The result of an action, or its error."""

    result: Any
    error: Exception | None

    @classmethod
    def of(cls, call: Callable[[], Any], *expected: type[Exception]) -> Outcome:
        """Call a function. Raise only the `expected` errors."""
        try:
            return cls(call(), None)
        except expected:
            raise
        except Exception as error:  # noqa: BLE001 - at the edge of the thread, every other error belongs to the caller
            return cls(None, error)


class Action(NamedTuple):
    """An action on the journal. `paid_task` is added to the record of paid tasks before it."""

    act: Act
    paid_task: PaidTask | None
    future: Future[Any]

    def settle(self, outcome: Outcome) -> None:
        """Give the caller the result or the error."""
        if outcome.error is not None:
            self.future.set_exception(outcome.error)
        else:
            self.future.set_result(outcome.result)

    def run_alone(self, run: Callable[[Act], Any]) -> None:
        """Call `run` with the action, and give the caller the result or the error."""
        self.settle(Outcome.of(partial(run, self.act)))


class ActionFile(Protocol):
    """The file of the journal. Its methods block."""

    def record_paid(self, task: PaidTask) -> None:
        """Add a paid task to the record."""
        ...

    def run(self, act: Act) -> Any:
        """Run one action alone."""
        ...

    def run_together(self, actions: Sequence[Action]) -> list[Action]:
        """Run actions in one transaction, and settle them. Return those that did not start."""
        ...


class ActionThread:
    """One thread runs all actions in the order of their calls."""

    def __init__(self, file: ActionFile) -> None:
        self._file = file
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._waiting = deque[Action]()

    def submit(self, act: Act, paid_task: PaidTask | None = None) -> Future[Any]:
        """Run an action soon. A cancelled future stops an action that has not started."""
        action = Action(act, paid_task, Future())
        self._waiting.append(action)
        self._executor.submit(self._run_waiting)
        return action.future

    def call(self, function: Callable[[], None]) -> Future[None]:
        """Call a function after the actions that wait now."""
        return self._executor.submit(function)

    def _run_waiting(self) -> None:
        actions = self._next_actions()
        try:
            self._run(actions)
        except BaseException as error:
            # Each caller needs an answer.
            for action in actions:
                if not action.future.done():
                    action.future.set_exception(error)
            raise

    def _run(self, actions: list[Action]) -> None:
        for action in actions:
            if action.paid_task is not None:
                self._file.record_paid(action.paid_task)
        while len(actions) > 1:
            actions = self._file.run_together(actions)
        for action in actions:
            action.run_alone(self._file.run)

    def _next_actions(self) -> list[Action]:
        """Return the next actions that are not cancelled. An earlier run may have taken all."""
        actions: list[Action] = []
        while self._waiting and len(actions) < GROUP_MAX:
            action = self._waiting.popleft()
            if action.future.set_running_or_notify_cancel():
                actions.append(action)
        return actions
