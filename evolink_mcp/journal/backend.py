"""The interface between the journal and its database."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol, TypeVar

T = TypeVar("T")
Row = Mapping[str, Any]
Statement = tuple[str, Sequence[Any]]  # SQL and its values


class Result(NamedTuple):
    """The rows of a query, or the number of rows that another statement changed."""

    rows: Sequence[Row]
    changed: int


class UniqueViolation(Exception):
    """Another entry of the profile has the task."""


class Connection(Protocol):
    """A connection during one action of the journal.

    SQL uses `?` for a value, `instr` for a part of a text, and the tables `entries`, `links`, `uploads`, `facts` and `sums`.
    """

    async def execute(self, sql: str, values: Sequence[Any] = ()) -> int:
        """Return the number of changed rows.

        Raises:
            UniqueViolation: Another entry of the profile has the task.
        """
        ...

    async def batch(self, *statements: Statement) -> list[Result]:
        """Execute statements in this order, and return their results. Outside a transaction they are one.

        A database on another machine gets all of them in one message.

        Raises:
            UniqueViolation: Another entry of the profile has the task.
        """
        ...

    async def fetch(self, sql: str, values: Sequence[Any] = (), *, lock_rows: bool = False) -> Sequence[Row]:
        """Return all rows. With `lock_rows`, other transactions wait for this one before they change them."""
        ...

    def transaction(self, *locks: str) -> AbstractAsyncContextManager[None]:
        """Run a transaction. Transactions with a common lock run one after the other. Give locks in the same order."""
        ...

    async def is_dead(self, owner: str) -> bool:
        """Return whether this server ended, so that another one can adopt its entries."""
        ...

    async def is_silent(self, owner: str) -> bool:
        """Return whether this server ended or lost its connection, so that none of its calls waits for a result."""
        ...


class Backend(Protocol):
    """A database. Every method raises JournalUnwritable if the database cannot be used."""

    @property
    def owner(self) -> str:
        """The ID of this server."""
        ...

    @property
    def is_open(self) -> bool:
        """Whether the journal was read or written."""
        ...

    @property
    def has_data(self) -> bool:
        """Whether there are entries to read. A read of them creates no database where none was."""
        ...

    @property
    def has_lease(self) -> bool:
        """Whether this server still owns its entries. Without the lease other servers may adopt them."""
        ...

    @property
    def can_publish(self) -> bool:
        """Whether other servers receive notifications. A client may then also repeat a call at another server."""
        ...

    @property
    def reread_s(self) -> float:
        """The interval in which a server reads an entry of another server."""
        ...

    @property
    def adopt_every_s(self) -> float | None:
        """The interval in which a server adopts entries; None: only at a call."""
        ...

    async def run(self, act: Callable[[Connection], Awaitable[T]], *, key: str = "") -> T:
        """Run an action. Actions with the same key run in the order of their calls, also after a cancellation."""
        ...

    def listen(self, channel: str, receive: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """Call `receive` with each payload on the channel from another server. Return the function that stops it."""
        ...

    async def publish(self, channel: str, payload: dict[str, Any]) -> None:
        """Send a payload to the other servers that listen on the channel."""
        ...

    def publish_later(self, channel: str, payload: dict[str, Any], *, topic: str) -> None:
        """Send a payload within about a second. Only the newest payload of a topic is sent."""
        ...

    def when_lost(self, stop: Callable[[], None]) -> Callable[[], None]:
        """Call `stop` when other servers may adopt the entries of this one. Return the function that cancels that."""
        ...

    async def close(self, *, is_released: bool) -> None:
        """Close the database. Without `is_released`, other servers adopt the entries of this one as of a dead server."""
        ...


def clean_text(value: Any) -> Any:
    """Replace NUL and lone surrogates in text, which databases refuse. Return other values unchanged."""
    if not isinstance(value, str):
        return value
    return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
