"""One purchase: the entry that is written before its request is sent, and how its state follows from what is known.

An entry goes `intent` → `sending` → `submitted`, or ends as `refused` (EvoLink said no), `unsent` (provably not one
byte was sent) or `unknown` (it was sent and the answer was lost). `found` marks a task that was bought elsewhere.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from evolink_mcp.api.request import MODEL
from evolink_mcp.api.task import COMPLETED, Task
from evolink_mcp.errors import Charged, Problem

Phase = Literal["intent", "sending", "submitted", "refused", "unsent", "unknown", "found"]
# Said of an entry whose answer was lost and whose task was found in the account's list, by its time and price.
ADOPTED = Problem(
    "adopted",
    "The answer to this request was lost; this task is a guess, found in the account's list by its time and price",
    False,
    "Check that the picture is the one that was asked for; get_task with its id confirms it.",
)


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a task: its link at EvoLink, and where it was saved: `path` is a file here, `stored` its name in the
    team's store. A picture of a caller elsewhere may be in neither: then only its link has it.

    `url_expires_at` is in epoch seconds, `width` and `height` in pixels, `bytes` is the file's size. `error` says why
    the picture could not be fetched; `lost` says that it is not tried again, and `unusable` that what came was no
    picture. `is_rejected`: decoding it would cost too much work, so it is never downloaded again. `transparent` is the
    share of its pixels that can be seen through, None without alpha; `one_colour`: all its pixels are alike.
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
    unusable: bool = False
    is_rejected: bool = False
    transparent: float | None = None
    one_colour: bool = False
    stored: str | None = None

    @property
    def saved(self) -> bool:
        """Whether it was fetched whole, and saved if it is saved at all, at any time."""
        return self.path is not None or self.sha256 is not None

    @property
    def here(self) -> bool:
        """Whether it was saved, and its file, if it has one, is still there. Looks at the disk."""
        return self.saved and (self.path is None or Path(self.path).is_file())


@dataclass(frozen=True, slots=True)
class Reference:
    """A picture that an order was made from: what the caller gave, and where EvoLink read it.

    `given` is a path or an address as it was said, long ones cut. `sha256` (hex) is that of a file here; `task_id` and
    `index` name the earlier picture that it is, where that is known.
    """

    given: str
    url: str | None = None
    sha256: str | None = None
    task_id: str | None = None
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One purchase. Times are epoch seconds, `estimate` is the computed price in credits.

    `key` is sent as `Idempotency-Key`; it is empty for a task that was bought elsewhere and is not written down yet.
    `account` is the mark of the key and address it was bought with; empty in entries of 0.1.0. `owner` is the server
    that works on it now, `caller` the server whose call waits for the result; both empty if there is none.
    `delivered_at`: a caller has the result since then. `fingerprint` is the same for identical requests.
    `rule` is the size rule that its pixels and its price were computed by; `references` are what it was made from.
    """

    key: str
    owner: str
    phase: Phase
    created_at: float
    fingerprint: str = ""
    request: dict[str, Any] = field(default_factory=dict[str, Any])
    estimate: float = 0.0
    save_as: str | None = None
    account: str = ""
    caller: str = ""
    delivered_at: float | None = None
    task: Task | None = None
    error: Problem | None = None
    pictures: tuple[Picture, ...] = ()
    rule: str = "anchor-edge"
    references: tuple[Reference, ...] = ()

    @classmethod
    def bought_elsewhere(cls, task: Task, created_at: float) -> Entry:
        """An entry for a task of this account that the journal does not know; it is not written down yet."""
        return cls("", "", "found", created_at, task=task)

    @property
    def is_written(self) -> bool:
        """Whether the journal has it. Only a task that was bought elsewhere begins without being written down."""
        return self.key != ""

    @property
    def task_id(self) -> str | None:
        """EvoLink's id of the task; None while there is none."""
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
    def guessed(self) -> bool:
        """Whether its task was found by time and price, and nobody has confirmed that it is this purchase's."""
        return self.task is not None and self.error is not None and self.error.code == ADOPTED.code

    @property
    def charged(self) -> Charged:
        """What was paid for it, as far as anyone can know."""
        if self.guessed:
            return "unknown"
        if self.task is not None:
            return self.task.charged
        return "unknown" if self.phase in ("sending", "unknown") else "no"

    @property
    def spent(self) -> float:
        """Credits that count for the owner's caps: the charge, or the estimate while that is not known.

        A guess does not count: the purchase it stands for may never have happened.
        """
        if self.phase == "found" or self.guessed or (self.charged == "no" and self.closed):
            return 0.0
        used = self.task.credits_used if self.task is not None and self.task.settled else None
        return self.estimate if used is None else used

    @property
    def ended(self) -> bool:
        """Whether nothing is under way any more: settled, and each picture that came is saved or has failed."""
        return self._over(all(picture.saved or picture.error for picture in self.pictures))

    @property
    def closed(self) -> bool:
        """Whether no server has anything left to do: settled, and each picture is saved or lost for good."""
        return self._over(all(picture.saved or picture.lost for picture in self.pictures))

    @property
    def conclusive(self) -> bool:
        """Whether the caller has an answer that ends the matter: a picture is saved, or certainly nothing was bought."""
        return any(picture.saved for picture in self.pictures) or (
            self.charged == "no" and self.phase != "intent" and (self.task is None or self.task.settled)
        )

    def has_work(self, now: float) -> bool:
        """Whether a job could do something for it now: buy, find a lost answer, follow the task or fetch a picture."""
        return not self.ended or self.phase == "unknown" or self.can_fetch(now)

    def can_fetch(self, now: float) -> bool:
        """Whether an image is missing here (never saved, moved or deleted) and can still be downloaded."""
        return any(
            picture.url_expires_at > now and not picture.here and not picture.is_rejected for picture in self.pictures
        )

    def worth_joining(self, now: float) -> bool:
        """Whether an identical order gets this one: under way, of unknown outcome, or with pictures to be had."""
        if self.task is None:
            return self.phase in ("intent", "sending", "unknown")
        if not self.task.settled:
            return True
        here = any(picture.here for picture in self.pictures)
        return self.task.status == COMPLETED and (here or not self.pictures or self.can_fetch(now))

    def _over(self, pictures_are: bool) -> bool:
        if self.task is None:
            return self.phase in ("refused", "unsent", "unknown")
        if self.task.status != COMPLETED:
            return self.task.settled
        return bool(self.pictures) and pictures_are


def iso(seconds: float | None) -> str | None:
    """Epoch seconds as people and hosts read them: UTC in ISO 8601, to the second. None stays None."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def new_key() -> str:
    """A fresh idempotency key: 16 to 96 characters of [A-Za-z0-9._-]."""
    return f"evomcp-{uuid.uuid4().hex}"


def account_mark(key: str, base_url: str, tenant: str = "") -> str:
    """What stands for an account, or a tenant's part of it, in the journal.

    It is made from the key, EvoLink's address and the tenant's name, and shows none of them.
    """
    of = f" of {tenant}" if tenant else ""
    return hmac.new(key.encode(), f"account at {base_url.lower()}{of}".encode(), "sha256").hexdigest()[:32]


def with_defaults(body: dict[str, Any]) -> dict[str, Any]:
    """A request with the page's defaults filled in, in one spelling: what two identical requests have in common."""
    size = str(body.get("size", "auto")).lower().replace("×", "x").replace(" ", "")
    tier = {"resolution": str(body.get("resolution", "1K")).upper()} if ":" in size else {}
    said = {name: value for name, value in body.items() if name != "resolution" and value is not None}
    defaults = {"model": MODEL, "quality": "medium", "n": 1, "background": "opaque", "output_format": "png"}
    return {**defaults, **said, "size": size, **tier}


def fingerprint(body: dict[str, Any]) -> str:
    """SHA-256 of a request, in hex: the same for identical requests, whatever the order of their fields."""
    said = json.dumps(body, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(said.encode()).hexdigest()
