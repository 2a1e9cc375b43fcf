"""Everything that was bought, or may have been: one entry per purchase, written before the money leaves.

An entry goes `intent` → `sending` → `submitted`, or ends as `refused` (a definite no), `unsent` (provably
nothing left) or `unknown` (it left and the answer was lost). `found` marks a task bought elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from evolink_mcp.api.task import COMPLETED, Task, TaskError
from evolink_mcp.errors import Charged, Problem

Phase = Literal["intent", "sending", "submitted", "refused", "unsent", "unknown", "found"]
# The columns of an entry, as they are read and as they are written beside the key.
COLUMNS = "key, owner, phase, created_at, fingerprint, estimate, save_as, delivered_at, attended, request, task, error, pictures"
WRITTEN = (
    "owner", "phase", "created_at", "fingerprint", "task_id", "status", "complete", "attended", "delivered_at",
    "estimate", "credits", "charged", "request", "save_as", "task", "error", "pictures",
)  # fmt: skip
# What `update` writes; `keep` writes the pictures, too.
STATE = {"phase", "task_id", "status", "complete", "credits", "charged", "task", "error"}


# What stays to be said of an entry whose answer was lost and whose task was found by its time.
ADOPTED = Problem(
    "adopted",
    "The answer to this request was lost; the task was found in the account's list by its time alone",
    False,
    "Check that the picture is the one that was asked for.",
)


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a task: where EvoLink has it (for 24 h) and where it was saved; times in epoch seconds.

    `error` says why it could not be had, `lost` that trying again cannot help.
    """

    index: int
    url: str
    url_expires_at: float
    path: str | None = None
    mime_type: str | None = None
    width: int | None = None
    height: int | None = None
    bytes: int | None = None
    sha256: str | None = None
    error: str | None = None
    lost: bool = False

    @property
    def saved(self) -> bool:
        return self.path is not None

    @property
    def here(self) -> bool:
        """Whether its file still lies where it was saved."""
        return self.path is not None and Path(self.path).is_file()


@dataclass(frozen=True, slots=True)
class Entry:
    """One purchase. `key` goes out as `Idempotency-Key`; `estimate` and `credits` are credits, times epoch seconds."""

    key: str
    owner: str
    phase: Phase
    created_at: float
    fingerprint: str = ""
    request: dict[str, Any] = field(default_factory=dict)
    estimate: float = 0.0
    save_as: str | None = None
    attended: bool = False
    delivered_at: float | None = None
    task: Task | None = None
    error: Problem | None = None
    pictures: tuple[Picture, ...] = ()

    @property
    def task_id(self) -> str | None:
        return self.task.id if self.task else None

    @property
    def status(self) -> str:
        """What became of it, in the API's words; `unknown` where nobody can say."""
        if self.task is not None:
            return self.task.status
        return {"refused": "failed", "unsent": "failed", "unknown": "unknown", "sending": "unknown"}.get(
            self.phase, "pending"
        )

    @property
    def charged(self) -> Charged:
        """What was paid for it, as far as anyone can know."""
        if self.task is not None:
            return self.task.charged
        return "unknown" if self.phase in ("sending", "unknown") else "no"

    @property
    def complete(self) -> bool:
        """Whether nothing is under way any more: settled, and every picture that came is saved or has failed."""
        return self._at_its_end(all(picture.saved or picture.error for picture in self.pictures))

    @property
    def conclusive(self) -> bool:
        """Whether this is an end that a caller can live with: pictures here, or nothing bought for certain."""
        return any(picture.saved for picture in self.pictures) or (
            self.charged == "no" and self.phase != "intent" and (self.task is None or self.task.settled)
        )

    @property
    def closed(self) -> bool:
        """Whether nothing is left to do for the next server either: every picture is saved, or lost for good."""
        return self._at_its_end(all(picture.saved or picture.lost for picture in self.pictures))

    def to_fetch(self, now: float) -> bool:
        """Whether a picture is missing here whose link still lives: never saved, moved or deleted."""
        return any(picture.url_expires_at > now and not picture.here for picture in self.pictures)

    def worth_joining(self, now: float) -> bool:
        """Under way, of unknown outcome, or completed with pictures that can still be had."""
        if self.task is None:
            return self.phase in ("intent", "sending", "unknown")
        if not self.task.settled:
            return True
        here = any(picture.here for picture in self.pictures)
        return self.task.status == COMPLETED and (here or not self.pictures or self.to_fetch(now))

    def _at_its_end(self, pictures_are: bool) -> bool:
        if self.task is None:
            return self.phase in ("refused", "unsent", "unknown")
        if self.task.status != COMPLETED:
            return self.task.settled
        return bool(self.pictures) and pictures_are


def iso(seconds: float | None) -> str | None:
    """An entry's epoch seconds as people and hosts read them: UTC in ISO 8601, to the second."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def new_key() -> str:
    """A fresh idempotency key: 16 to 96 characters of [A-Za-z0-9._-]."""
    return f"evomcp-{uuid.uuid4().hex}"


def fingerprint(body: dict[str, Any]) -> str:
    """The same for identical requests, whatever the order of their fields."""
    said = json.dumps(body, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(said.encode()).hexdigest()


def row_of(entry: Entry) -> tuple[Any, ...]:
    """An entry as (key, *WRITTEN)."""
    return (
        entry.key, entry.owner, entry.phase, entry.created_at, entry.fingerprint, entry.task_id, entry.status,
        entry.closed, entry.attended, entry.delivered_at, entry.estimate,
        entry.task.credits_used if entry.task and entry.task.settled else None, entry.charged,
        json.dumps(entry.request), entry.save_as,
        json.dumps(asdict(entry.task)) if entry.task else None,
        json.dumps(asdict(entry.error)) if entry.error else None,
        json.dumps([asdict(picture) for picture in entry.pictures]),
    )  # fmt: skip


def entry_of(row: Any) -> Entry:
    """The reverse, from COLUMNS; raises anything for what makes no sense."""
    *plain, attended, request, task, error, pictures = row
    names = ("key", "owner", "phase", "created_at", "fingerprint", "estimate", "save_as", "delivered_at")
    return Entry(
        **dict(zip(names, plain, strict=True)),
        attended=bool(attended),
        request=dict(json.loads(request)),
        task=_task(json.loads(task)) if task else None,
        error=Problem(**json.loads(error)) if error else None,
        pictures=tuple(Picture(**picture) for picture in json.loads(pictures)),
    )


def _task(data: dict[str, Any]) -> Task:
    error = data.pop("error")
    return Task(**{**data, "results": tuple(data["results"]), "error": TaskError(**error) if error else None})
