"""What every journal promises, wherever it keeps its entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from evolink_mcp.api.task import Task
from evolink_mcp.journal.entry import Entry
from evolink_mcp.journal.rows import task_of


@dataclass(frozen=True, slots=True)
class News:
    """What one server of an account tells the others: an entry has changed, EvoLink has called back, or a call was
    cancelled by its client.

    `key` and `task_id` are the entry's. `task` is what EvoLink has told of it and nobody writes down: the progress.
    `ended`: EvoLink has called back. `call` names a call: its client's session, and the id of the request.
    """

    key: str = ""
    task_id: str | None = None
    task: Task | None = None
    ended: bool = False
    call: tuple[str, str | int] | None = None

    @classmethod
    def of(cls, told: dict[str, Any]) -> News:
        """The news of its fields, as `dataclasses.asdict` gives them; a field that is left out is empty.

        Raises:
            TypeError, ValueError, KeyError, AttributeError: they make no sense.
        """
        task = told.get("task")
        call = told.get("call")
        return cls(
            key=told.get("key", ""),
            task_id=told.get("task_id"),
            task=task_of(task) if task else None,
            ended=bool(told.get("ended")),
            call=(call[0], call[1]) if call else None,
        )


Hear = Callable[[News], None]


class Journal(Protocol):
    """What a journal promises. A write is on disk when its method returns. Entries are never deleted.

    `owner` is this server's mark, `account` the mark of its key (empty without a key). Every method sees the entries of
    this account; without a key it sees all. An entry's state is written only by the server that owns it.

    Times are epoch seconds, sums are credits. A caller that is cancelled does not wait any longer, but what it began
    may still be written.

    Raises (every method):
        JournalUnwritable: it cannot be read or written; the message names the place and the setting.
    """

    @property
    def owner(self) -> str:
        """This server's mark on what it works on."""
        ...

    @property
    def account(self) -> str:
        """The mark of this server's key; empty if it has none."""
        ...

    @property
    def reread_s(self) -> float:
        """How often who waits for another server's work reads it again by itself, in seconds."""
        ...

    @property
    def adopt_every_s(self) -> float | None:
        """How often a server looks for what dead ones left, in seconds; None: only when somebody calls."""
        ...

    def listen(self, hear: Hear) -> Callable[[], None]:
        """Call `hear` with whatever other servers of this account tell, where that can be known. Returns what ends it."""
        ...

    async def tell(self, news: News) -> None:
        """Tell the account's other servers, where that can be done. A changed entry is told by itself."""
        ...

    def when_lost(self, stop: Callable[[], None]) -> None:
        """Call `stop` when other servers are about to take this one for dead: it must stop what it works on."""
        ...

    async def intend(
        self, entry: Entry, *, since: float = 0.0, cap: float | None = None, running: int | None = None
    ) -> float | None:
        """Write a new entry, before anything is sent.

        With a `cap`, the credits spent since `since` and the entry's estimate together must not exceed it. Both happen
        in one transaction. If they do exceed it, nothing is written and the credits already spent are returned.
        `running`: how many of the account's tasks may be under way, this one included.

        Raises:
            TooManyRunning: more would be under way; nothing is written.
            TaskKnown: another entry of the account has this task.
        """
        ...

    async def update(self, entry: Entry) -> bool:
        """Write the entry's phase, task and error. False: it belongs to another server, nothing is written.

        Raises:
            TaskKnown: another entry of the account has this task.
        """
        ...

    async def keep(self, entry: Entry) -> bool:
        """Write the entry's pictures, and what `update` writes."""
        ...

    async def acquire(self, key: str) -> bool:
        """Become the owner of an entry that no living server works on. False: one does."""
        ...

    async def release(self, key: str) -> None:
        """Nobody works on this entry any more."""
        ...

    async def deliver(self, key: str, at: float) -> None:
        """Note that a caller has the result."""
        ...

    async def leave(self, key: str) -> None:
        """Note that no call of this server waits for this entry any more."""
        ...

    async def claim(self, key: str) -> bool:
        """Let a call wait for an entry that nobody waits for and nobody received. False: another call was faster."""
        ...

    async def by_key(self, key: str) -> Entry | None:
        """The entry with this key; None if there is none."""
        ...

    async def by_task(self, task_id: str) -> Entry | None:
        """The entry of this task; None if there is none."""
        ...

    async def recent(
        self,
        limit: int,
        status: str | None = None,
        since: float | None = None,
        until: float | None = None,
        words: tuple[str, ...] = (),
        after: tuple[float, str] | None = None,
    ) -> list[Entry]:
        """At most `limit` entries, newest first; `since` and `until` are included.

        `words`: each is in the prompt, in a file's name or in the task's id, in any case. `after`: only what comes after
        the entry with this `created_at` and key.
        """
        ...

    async def undelivered(self, fingerprints: tuple[str, ...], since: float) -> list[Entry]:
        """Entries of identical requests since then that nobody received and nobody waits for, oldest first.

        A call of a server that has ended, or does not answer, waits for nothing.
        """
        ...

    async def is_awaited(self, fingerprints: tuple[str, ...], since: float) -> bool:
        """Whether a call of another server waits for an identical request, where a client may come back by any server."""
        ...

    async def adopt(self) -> list[Entry]:
        """Take over what is open and has no living owner, and free what dead servers' calls waited for."""
        ...

    async def known_tasks(self, task_ids: list[str]) -> set[str]:
        """Which of these tasks have an entry."""
        ...

    async def spent_since(self, since: float) -> float:
        """Credits of the entries created since then: charged, or estimated while the charge is not known."""
        ...

    async def remember_upload(self, sha256: str, url: str, expires_at: float) -> None:
        """Note that EvoLink has a reference picture of this account under this URL until `expires_at`."""
        ...

    async def find_upload(self, sha256: str, after: float) -> str | None:
        """The URL of an uploaded picture that does not expire before `after`; None if there is none."""
        ...

    async def learn(self, name: str, value: str) -> None:
        """Note what was learned of this account."""
        ...

    async def learned(self, name: str) -> str | None:
        """What was learned of this account; without a key, what all accounts have in common. Creates no file."""
        ...

    async def close(self) -> None:
        """Release everything. What is not finished can be taken over by another server from now on."""
        ...
