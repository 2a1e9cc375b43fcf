"""What every journal promises, wherever it keeps its entries."""

from __future__ import annotations

from typing import Protocol

from evolink_mcp.journal.entry import Entry


class Journal(Protocol):
    """What a journal promises. A write is on disk when its method returns. Entries are never deleted.

    Times are epoch seconds, sums are credits.

    Raises (every method):
        JournalUnwritable: it cannot be read or written; the message names the place and the setting.
    """

    owner: str

    def intend(self, entry: Entry, *, since: float = 0.0, cap: float | None = None) -> float | None:
        """Write a new entry, before anything is sent.

        With a `cap`, the credits spent since `since` and the entry's estimate together must not exceed it. Both happen
        in one transaction. If they do exceed it, nothing is written and the credits already spent are returned.
        """
        ...

    def update(self, entry: Entry) -> None:
        """Write the entry's phase, task and error, and nothing else: another server may have noted the delivery."""
        ...

    def keep(self, entry: Entry) -> None:
        """Write the entry's pictures, and what `update` writes."""
        ...

    def deliver(self, key: str, at: float) -> None:
        """Note that a caller has the result."""
        ...

    def leave(self, key: str) -> None:
        """Note that no call waits for this entry any more."""
        ...

    def claim(self, key: str) -> bool:
        """Let a call wait for an entry that nobody waits for and nobody received. False: another call was faster."""
        ...

    def by_key(self, key: str) -> Entry | None:
        """The entry with this key; None if there is none."""
        ...

    def by_task(self, task_id: str) -> Entry | None:
        """The entry of this task; None if there is none."""
        ...

    def recent(
        self, limit: int, status: str | None = None, since: float | None = None, until: float | None = None
    ) -> list[Entry]:
        """At most `limit` entries, newest first; `since` and `until` are included."""
        ...

    def undelivered(self, fingerprint: str) -> list[Entry]:
        """Entries of identical requests that nobody received and nobody waits for, oldest first."""
        ...

    def adopt(self) -> list[Entry]:
        """Take over what servers left open that are not running any more; running servers keep theirs."""
        ...

    def known_tasks(self, task_ids: list[str]) -> set[str]:
        """Which of these tasks have an entry."""
        ...

    def spent_since(self, since: float) -> float:
        """Credits of the entries created since then: charged, or estimated while the charge is not known."""
        ...

    def remember_upload(self, sha256: str, url: str, expires_at: float) -> None:
        """Note that EvoLink has a reference picture under this URL until `expires_at`."""
        ...

    def find_upload(self, sha256: str, after: float) -> str | None:
        """The URL of an uploaded picture that does not expire before `after`; None if there is none."""
        ...

    def close(self) -> None:
        """Release everything. What is not finished can be taken over by another server from now on."""
        ...
