"""What every journal promises, wherever it keeps its entries."""

from __future__ import annotations

from typing import Protocol

from evolink_mcp.journal.entry import Entry


class Journal(Protocol):
    """What a journal promises. Every write is durable when it returns; entries are never deleted.

    Raises (all methods): JournalUnwritable, naming the place and the setting.
    """

    owner: str

    def intend(self, entry: Entry, *, since: float = 0.0, cap: float | None = None) -> float | None:
        """Write a new entry down, before anything is sent. With a `cap`, credits spent since then and the entry's
        estimate must stay within it, judged in the same transaction: else nothing is written and the sum returned."""
        ...

    def update(self, entry: Entry) -> None:
        """Write the entry's new phase, task and error. Pictures, delivery and attendance have their own verbs, so that
        a late copy in another server undoes nothing."""
        ...

    def keep(self, entry: Entry) -> None:
        """Write down which pictures were saved, and whether any is still to come, together with what `update` writes."""
        ...

    def deliver(self, key: str, at: float) -> None:
        """A caller has the result."""
        ...

    def leave(self, key: str) -> None:
        """No call waits for this entry any more."""
        ...

    def claim(self, key: str) -> bool:
        """Attend an undelivered, unattended entry; False when another call was faster."""
        ...

    def by_key(self, key: str) -> Entry | None:
        """The entry with this key."""
        ...

    def by_task(self, task_id: str) -> Entry | None:
        """The entry of this task."""
        ...

    def recent(
        self, limit: int, status: str | None = None, since: float | None = None, until: float | None = None
    ) -> list[Entry]:
        """Entries, newest first."""
        ...

    def undelivered(self, fingerprint: str) -> list[Entry]:
        """Entries of identical requests that nobody received and nobody waits for, oldest first."""
        ...

    def adopt(self) -> list[Entry]:
        """Take over what dead servers left open; living servers' entries are not touched."""
        ...

    def known_tasks(self, task_ids: list[str]) -> set[str]:
        """Which of these tasks have an entry."""
        ...

    def spent_since(self, since: float) -> float:
        """Credits charged, or estimated where the charge is not known yet, for entries created since then."""
        ...

    def remember_upload(self, sha256: str, url: str, expires_at: float) -> None:
        """A reference picture is at EvoLink under this URL until then."""
        ...

    def find_upload(self, sha256: str, after: float) -> str | None:
        """The URL of an uploaded picture that lives beyond `after`."""
        ...

    def close(self) -> None:
        """Release everything; unfinished entries become adoptable."""
        ...
