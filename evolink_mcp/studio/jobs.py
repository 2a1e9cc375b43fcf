"""A request for images, and the job of this server on one journal entry."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum

import anyio

from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.errors import EvolinkError, Problem
from evolink_mcp.images.download import ByteBudget
from evolink_mcp.images.references import CheckedRequest
from evolink_mcp.journal.entry import Entry, Phase

log = logging.getLogger(__name__)

INTERNAL_FAULT = Problem(
    "internal_error", "the server had an internal fault", True, "Call list_tasks: it lists every purchase."
)
Sleep = Callable[[float], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Timing:
    """The clock (epoch seconds) and the two waits of a studio. Tests replace them.

    `sleep` waits within a job. `idle` waits before a job is repeated and between two reads of another server's entry.
    """

    clock: Callable[[], float] = time.time
    sleep: Sleep = anyio.sleep
    idle: Sleep = anyio.sleep


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """A caller's validated request.

    `price_ceiling` is the highest possible charge and `max_credits` the caller's own limit, both in credits. `client`
    is the name of the MCP host. `fit` is the target of exact copies.
    """

    request: GenerationRequest
    price_ceiling: float
    save_as: str | None = None
    max_credits: float | None = None
    force_new: bool = False
    client: str | None = None
    fit: str | None = None


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that passed every check that needs no purchase. Identical requests have the same `fingerprint`."""

    request: ImageRequest
    references: CheckedRequest
    fingerprint: str
    size_rule: str


class JobState(Enum):
    """The progress of a job on this server."""

    PREPARED = "prepared"  #: The entry is in the journal, no byte was sent
    SENDING = "sending"  #: The POST is in progress, or its answer was lost
    RUNNING = "running"  #: The entry has a task, and this server polls it
    SAVING = "saving"  #: The task is completed, its images are downloaded
    WATCHING = "watching"  #: Another server owns the entry
    DONE = "done"  #: This server has nothing left to do


_NEXT_STATES = {
    JobState.PREPARED: {JobState.SENDING, JobState.WATCHING, JobState.DONE},
    JobState.SENDING: {JobState.PREPARED, JobState.RUNNING, JobState.WATCHING, JobState.DONE},
    JobState.RUNNING: {JobState.SAVING, JobState.WATCHING, JobState.DONE},
    JobState.SAVING: {JobState.WATCHING, JobState.DONE},
    JobState.WATCHING: {JobState.PREPARED, JobState.SENDING, JobState.RUNNING, JobState.DONE},
    JobState.DONE: set[JobState](),
}


class IllegalTransition(RuntimeError):
    """A job cannot move from its state to the requested one."""


class Answer(Enum):
    """The knowledge of a task that a job has from EvoLink."""

    NONE = "none"  #: EvoLink has not described the task
    ANY = "any"  #: EvoLink described the task
    RUNNING = "running"  #: EvoLink described the task as running, so this job detects its end


class Callback(Enum):
    """EvoLink's callback for the task of a job."""

    NONE = "none"  #: The request named no address of this server
    EXPECTED = "expected"  #: The callback has not arrived
    RECEIVED = "received"  #: The callback named the task of this job


class Job:
    """The work of this server on one entry. Calls wait for a job and may leave; the job continues.

    `problem`: the error that stopped or delays the job. `callers`: the number of waiting calls. `is_deduplicated`: an
    identical request uses this job. `copy_name`: the file name that this request wants. `is_draining`: the server ends
    soon, so waiting calls answer now. `notes`: remarks about the reference images. `sending_scope` covers all work
    before the POST, `following_scope` the work on the task.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.state = _state_of(entry)
        self.problem: Problem | None = None
        self.callers = 0
        self.copy_name: str | None = None
        self.download_budget = ByteBudget()
        self.callback = Callback.NONE
        self.is_deduplicated = False
        self.is_draining = False
        self.notes: tuple[str, ...] = ()
        self.sending_scope = anyio.CancelScope()
        self.following_scope: anyio.CancelScope | None = None
        self._answer = Answer.NONE
        self._changed = anyio.Event()
        self._wake_reason: str | None = None
        self._rest_scope: anyio.CancelScope | None = None

    @property
    def is_finished(self) -> bool:
        """Whether this server has nothing left to do."""
        return self.state is JobState.DONE

    @property
    def has_remote_owner(self) -> bool:
        """Whether another server owns the entry."""
        return self.state is JobState.WATCHING

    @property
    def is_acknowledged(self) -> bool:
        """Whether EvoLink described the task since this job started."""
        return self._answer is not Answer.NONE

    @property
    def has_seen_running(self) -> bool:
        """Whether this job saw the task before its end, so that it knows the time of the end."""
        return self._answer is Answer.RUNNING

    @property
    def is_abandoned(self) -> bool:
        """Whether the last caller cancelled before the POST."""
        return self.sending_scope.cancel_called

    def move_to(self, state: JobState) -> None:
        """Change the state. To stay in the same state is always legal.

        | from     | to                               | when                                                     |
        |----------|----------------------------------|----------------------------------------------------------|
        | PREPARED | SENDING                          | the POST starts                                          |
        | SENDING  | PREPARED                         | the POST certainly bought nothing and is repeated        |
        | SENDING  | RUNNING                          | the entry has a task                                     |
        | RUNNING  | SAVING                           | the task is completed                                    |
        | WATCHING | PREPARED, SENDING, RUNNING       | this server becomes the owner                            |
        | PREPARED, SENDING, RUNNING, SAVING | WATCHING | another server is the owner                        |
        | any      | DONE                             | the purchase, the task or its images are settled, or the job failed |

        Raises:
            IllegalTransition: the table has no such row.
        """
        if state is self.state:
            return
        if state not in _NEXT_STATES[self.state]:
            raise IllegalTransition(f"a job cannot move from {self.state.value} to {state.value}")
        self.state = state

    def change_to(self, entry: Entry) -> None:
        """Set the new content of the entry and wake every iterator of `states`."""
        self.entry = entry
        self._changed.set()
        self._changed = anyio.Event()

    def become_owner(self) -> None:
        """This server is the owner now: continue in the state that the entry describes."""
        self.move_to(_state_of(self.entry))

    def finish(self) -> None:
        """End the job and every iterator of `states`."""
        self.move_to(JobState.DONE)
        self.change_to(self.entry)

    def record_answer(self, *, is_running: bool) -> None:
        """EvoLink described the task. `is_running`: this job follows the task, and the task is not settled.

        The first answer wakes every iterator of `states`, even if it confirms the known state: a caller may wait for it.
        """
        is_first = self._answer is Answer.NONE
        if is_running:
            self._answer = Answer.RUNNING
        elif is_first:
            self._answer = Answer.ANY
        if is_first:
            self.change_to(self.entry)

    def drain(self) -> None:
        """The server ends soon: let waiting calls answer now. Another server continues the job."""
        self.is_draining = True
        self.change_to(self.entry)

    def abandon(self) -> None:
        """The last caller cancelled: do not buy, unless the POST has started."""
        if self.entry.phase == Phase.INTENT:
            self.sending_scope.cancel()

    def poll_now(self) -> None:
        """End the current or the next rest for a poll: a caller wants the newest state."""
        self._wake("poll")

    def wake(self) -> None:
        """End the current or the next rest: the entry has changed."""
        self._wake(self._wake_reason or "news")

    def _wake(self, reason: str) -> None:
        self._wake_reason = reason
        if self._rest_scope is not None:
            self._rest_scope.cancel()

    async def rest(self, seconds: float, sleep: Sleep) -> bool:
        """Sleep for `seconds` or until `wake` or `poll_now`. An earlier call of one of them since the last rest counts too.

        Return True after `poll_now`.
        """
        with anyio.CancelScope() as self._rest_scope:
            if self._wake_reason is None:
                await sleep(seconds)
        reason = self._wake_reason
        self._wake_reason = None
        return reason == "poll"

    async def states(self, heartbeat_s: float = 4.0) -> AsyncGenerator[Entry, None]:
        """Yield the entry now, at each change and at least every `heartbeat_s` seconds, until the job is finished."""
        while True:
            # Read it before the yield: the entry may change while the consumer works with the earlier state.
            changed = self._changed
            is_last = self.is_finished
            yield self.entry
            if is_last:
                return
            with anyio.move_on_after(heartbeat_s):
                await changed.wait()

    async def wait_while(self, phase: Phase) -> None:
        """Return when the entry has another phase or the job is finished."""
        async with aclosing(self.states()) as states:
            async for entry in states:
                if entry.phase != phase:
                    return


def _state_of(entry: Entry) -> JobState:
    if entry.task is not None:
        return JobState.RUNNING
    return JobState.SENDING if entry.phase in (Phase.SENDING, Phase.UNKNOWN) else JobState.PREPARED


async def guarded(act: Callable[..., Awaitable[object]], *args: object) -> Problem | None:
    """Await `act` and return its error, if any. No error ends the server."""
    try:
        await act(*args)
    except EvolinkError as error:
        return error.problem
    except Exception:
        # In the task group, the error would cancel the jobs of all other requests.
        log.exception("unexpected error")
        return INTERNAL_FAULT
    return None


def guarded_call(act: Callable[..., None], *args: object) -> None:
    """Call `act` and log its error, if any."""
    try:
        act(*args)
    except Exception:
        log.exception("unexpected error")
