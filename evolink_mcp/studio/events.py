"""The events of jobs, and their subscribers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from evolink_mcp.journal.entry import Entry, ResultImage
from evolink_mcp.studio.jobs import guarded_call


@dataclass(frozen=True, slots=True)
class Purchased:
    """The POST of an entry has an outcome: the entry's phase."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Polled:
    """One HTTP request read one task or a batch of tasks."""

    mode: Literal["single", "batch"]


@dataclass(frozen=True, slots=True)
class Changed:
    """The entry of a task has a new state, here or on another server."""

    task_id: str


@dataclass(frozen=True, slots=True)
class Settled:
    """A poll showed the end of a task. The task ended at most `detection_lag_s` seconds before.

    `has_missed_callback`: EvoLink's callback was expected and did not arrive before.
    """

    entry: Entry
    detection_lag_s: float
    has_missed_callback: bool = False


@dataclass(frozen=True, slots=True)
class Saved:
    """An image of a task was saved."""

    entry: Entry
    image: ResultImage


@dataclass(frozen=True, slots=True)
class Failed:
    """An image of a task could not be downloaded or saved."""

    entry: Entry
    image: ResultImage


@dataclass(frozen=True, slots=True)
class Delivered:
    """A caller has the result of an entry."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Adopted:
    """This server continues an unfinished entry of another server, which is dead or released it."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Finished:
    """This server's work on a purchase ended at `at` (epoch seconds). `client` is the MCP host that bought."""

    entry: Entry
    client: str | None
    at: float


Event = Purchased | Polled | Changed | Settled | Saved | Failed | Delivered | Adopted | Finished
Subscriber = Callable[[Event], None]


class Events:
    """Pass each event to all subscribers. The error of one subscriber is logged and stops nothing."""

    def __init__(self, subscribers: Iterable[Subscriber] = ()) -> None:
        self._subscribers = list(subscribers)

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call `subscriber` with every event from now on."""
        self._subscribers.append(subscriber)

    def publish(self, event: Event) -> None:
        """Pass an event to all subscribers."""
        for subscriber in self._subscribers:
            guarded_call(subscriber, event)
