"""An order, and the job that carries it out."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

import anyio

from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.errors import EvolinkError, Problem
from evolink_mcp.journal.entry import Entry, Phase

log = logging.getLogger(__name__)

INTERNAL_FAULT = Problem(
    "internal_error", "the server had an internal fault", True, "Call list_tasks: what was bought is listed there."
)
Sleep = Callable[[float], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """What a caller wants, validated. Credits: `at_most` it costs, `max_credits` is the caller's own cap.

    `client` is the name of the program that the caller uses, as it says itself.
    """

    request: GenerationRequest
    at_most: float
    save_as: str | None = None
    max_credits: float | None = None
    force_new: bool = False
    client: str | None = None


class Job:
    """The work on one entry. The studio runs it to its end; calls may wait for it and may leave.

    `joined`: an identical order took this job over instead of buying. `problem`: what stopped it, if anything did.
    `heard_from`: EvoLink has answered since this job started. `seen_running`: EvoLink has answered before the task
    was settled. `callers`: how many calls wait for it. `copy_as`: the name under which a caller who has joined wants
    the pictures. `learned`: its pictures have shown this size rule. `before_sending` is the scope of all that happens
    before the request is sent; `following` is that of the work on a task that it has.
    `elsewhere`: another server works on it. `called_back`: EvoLink tells its end at an address of ours,
    and has `told` it. `is_draining`: the server is about to end, so callers leave now. `audited`: its end is told to the
    audit, with the name of the `client` that bought it.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.joined = False
        self.problem: Problem | None = None
        self.finished = False
        self.heard_from = False
        self.seen_running = False
        self.callers = 0
        self.copy_as: str | None = None
        self.learned: str | None = None
        self.before_sending = anyio.CancelScope()
        self.following: anyio.CancelScope | None = None
        self.elsewhere = False
        self.called_back = self.told = False
        self.is_draining = False
        self.audited = False
        self.client: str | None = None
        self._changed = anyio.Event()
        self._poll_wanted = False
        self._woken = False
        self._resting: anyio.CancelScope | None = None

    def change_to(self, entry: Entry) -> None:
        """Set the new state of the entry and wake every iterator of `states`."""
        self.entry = entry
        self._changed.set()
        self._changed = anyio.Event()

    def finish(self) -> None:
        """Nothing more will be done: end every iterator of `states`."""
        self.finished = True
        self.change_to(self.entry)

    def let_go(self) -> None:
        """Callers are to leave now: the server is about to end, and another one goes on with the job."""
        self.is_draining = True
        self.change_to(self.entry)

    def abandon(self) -> None:
        """Nobody wants it any more: it is not bought, unless the request is on its way already."""
        if self.entry.phase == Phase.INTENT:
            self.before_sending.cancel()

    def poll_now(self) -> None:
        """End the present or the next rest at once: a caller is about to leave and wants the newest state."""
        self._poll_wanted = True
        self.wake()

    def wake(self) -> None:
        """End the present or the next rest at once: there is something new."""
        self._woken = True
        if self._resting is not None:
            self._resting.cancel()

    async def rest(self, seconds: float, sleep: Sleep) -> bool:
        """Sleep for `seconds`, or until `wake` or `poll_now` is called; not at all if one was since the last rest.

        Returns whether `poll_now` was called.
        """
        with anyio.CancelScope() as self._resting:
            if not self._woken:
                await sleep(seconds)
        self._woken = False
        wanted, self._poll_wanted = self._poll_wanted, False
        return wanted

    async def states(self, heartbeat_s: float = 4.0) -> AsyncGenerator[Entry, None]:
        """Yield the entry now, at every change and at least every `heartbeat_s` seconds, until the job is finished."""
        yield self.entry
        while not self.finished:
            changed = self._changed
            with anyio.move_on_after(heartbeat_s):
                await changed.wait()
            yield self.entry


async def guarded(act: Callable[..., Awaitable[None]], *args: object) -> Problem | None:
    """Await `act` to its end and return what went wrong, if anything; nothing that it raises ends the server."""
    try:
        await act(*args)
    except EvolinkError as error:
        return error.problem
    except Exception:
        log.exception("something failed unexpectedly")
        return INTERNAL_FAULT
    return None
