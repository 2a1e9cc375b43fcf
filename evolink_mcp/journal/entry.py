"""The entry of one purchase. It is written before the POST is sent."""

from __future__ import annotations

import hashlib
import hmac
import json
import uuid
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

from evolink_mcp.api.models import model_named
from evolink_mcp.api.task import COMPLETED, Task
from evolink_mcp.errors import Charged, Problem

# The error of an entry whose answer was lost, while its only candidate is not confirmed.
UNCONFIRMED = Problem(
    # Journals contain this code, so it cannot become "unconfirmed".
    "adopted",
    "The answer to this request was lost; this task is a guess, found in the account's list by its time and price",
    False,
    "Check that the picture is the one that was asked for; get_task with its id confirms it.",
)


# Arguments of a request that only this server uses.
OWN_ARGUMENTS = frozenset(["fit"])


class Phase(StrEnum):
    """The progress of the POST."""

    INTENT = "intent"  #: The entry is written, the POST has not started
    SENDING = "sending"  #: The POST is in progress
    SUBMITTED = "submitted"  #: EvoLink accepted the request, the entry has a task
    REFUSED = "refused"  #: EvoLink rejected the request, nothing was charged
    UNSENT = "unsent"  #: No byte was sent, nothing was charged
    UNKNOWN = "unknown"  #: The POST was sent, its answer was lost
    EXTERNAL = "external"  #: Another client of the account bought the task


class Stage(Enum):
    """The completeness of an entry."""

    OPEN = 1  #: The POST, the task or a download is unfinished
    DELIVERABLE = 2  #: The result is complete, except for downloads that failed and can be repeated
    FINAL = 3  #: No server can do anything more


@dataclass(frozen=True, slots=True)
class DerivedFile:
    """A file that was made from an image without a purchase.

    `target` is the size that the caller named. `path` is a local file, `object_name` its name in the object store. Width
    and height are in pixels, `bytes` is the size of the file, `sha256` is in hex. `url` is set only in the answer to a
    remote caller.
    """

    target: str
    mime_type: str
    width: int
    height: int
    bytes: int
    sha256: str
    path: str | None = None
    object_name: str | None = None
    url: str | None = None


@dataclass(frozen=True, slots=True)
class ResultImage:
    """One image of a task. `path` is a local file, `object_name` its name in the object store; it may have neither.

    `url_expires_at` is in epoch seconds, `width` and `height` in pixels, `bytes` is the size of the file.
    `error` is the reason of a failed download. `is_lost`: the download is not repeated. `is_unusable`: the downloaded
    data was no image. `is_rejected`: decoding it would cost too much work. `transparent_share` is the share of pixels
    of which at least half of the background shows through, None without transparency. `alpha_min` and `alpha_max` are
    the extreme alpha values of all pixels, 0 (invisible) to 255 (opaque). `fallback_reason` is the reason why the image
    was saved into the data folder and not into its own folder.
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
    is_lost: bool = False
    is_unusable: bool = False
    is_rejected: bool = False
    transparent_share: float | None = None
    alpha_min: int | None = None
    alpha_max: int | None = None
    is_one_colour: bool = False
    object_name: str | None = None
    fallback_reason: str | None = None
    derived: tuple[DerivedFile, ...] = ()

    @property
    def is_saved(self) -> bool:
        """Return whether the download is complete. A user may have deleted the file since."""
        # An image in the object store has no path.
        return self.path is not None or self.sha256 is not None

    @property
    def is_present(self) -> bool:
        """Return whether the image is saved and its file, if it has one, still exists. Reads the disk."""
        return self.is_saved and (self.path is None or Path(self.path).is_file())

    @property
    def is_away(self) -> bool:
        """Return whether the folder of the saved image does not exist, because its drive is disconnected. Reads the disk."""
        return self.path is not None and not Path(self.path).parent.is_dir()

    @property
    def needs_download(self) -> bool:
        """Return whether the image was not saved, or its file was deleted. Reads the disk."""
        return not (self.is_rejected or self.is_present or self.is_away)


@dataclass(frozen=True, slots=True)
class ReferenceImage:
    """One input image of a request.

    `given` is the caller's path or URL, shortened; `url` is the address that EvoLink reads. `sha256` (hex) belongs to a
    local file. `task_id` and `index` name the earlier result that the image is, if known. `source_prompt` is the
    beginning of the prompt of that result, so that its words find this purchase too.
    """

    given: str
    url: str | None = None
    sha256: str | None = None
    task_id: str | None = None
    index: int | None = None
    source_prompt: str | None = None

    @property
    def published(self) -> dict[str, Any]:
        """The fields of answers and sidecars."""
        return {name: value for name, value in asdict(self).items() if name != "source_prompt"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One purchase. Times are epoch seconds, `estimate` is the price ceiling in credits.

    `key` is the `Idempotency-Key`. An external task has none until it is written. `account` identifies the EvoLink
    account of the purchase. `owner` is the server that works on the entry. `caller` is the server with a call that
    waits for the result. Both are empty if there is none. `delivered_at` is the time when a caller got the result.
    Identical requests have the same `fingerprint`. `rule` is the size rule of the pixels and the price.
    `price_factor` is the factor on EvoLink's published prices that the ceiling has.
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
    images: tuple[ResultImage, ...] = ()
    rule: str = "anchor-edge"
    references: tuple[ReferenceImage, ...] = ()
    price_factor: float = 1.0

    @classmethod
    def external(cls, task: Task, created_at: float) -> Entry:
        """Return an unwritten entry for a task that another client bought."""
        return cls("", "", Phase.EXTERNAL, created_at, task=task)

    @property
    def body(self) -> dict[str, Any]:
        """Return the part of the request that goes to EvoLink."""
        return {name: value for name, value in self.request.items() if name not in OWN_ARGUMENTS}

    @property
    def is_written(self) -> bool:
        """Return whether the journal has the entry. Only an external task starts unwritten."""
        return self.key != ""

    @property
    def task_id(self) -> str | None:
        """Return EvoLink's ID of the task; None before EvoLink accepts the request."""
        return self.task.id if self.task else None

    @property
    def status(self) -> str:
        """Return the task's status in EvoLink's words, or `unknown`."""
        if self.task is not None:
            return self.task.status
        return _STATUS_WITHOUT_TASK.get(self.phase, "pending")

    @property
    def is_unconfirmed(self) -> bool:
        """Return whether the task is an unconfirmed match: the only candidate for a lost answer."""
        return self.task is not None and self.error is not None and self.error.code == UNCONFIRMED.code

    @property
    def has_certain_task(self) -> bool:
        """Return whether EvoLink named the task of this purchase, in its answer or in a callback."""
        return self.phase == Phase.SUBMITTED and self.task is not None and not self.is_unconfirmed

    @property
    def charged(self) -> Charged:
        """Return whether EvoLink charged for the entry."""
        if self.is_unconfirmed:
            return "unknown"
        if self.task is not None:
            return self.task.charged
        return "unknown" if self.phase in (Phase.SENDING, Phase.UNKNOWN) else "no"

    @property
    def charge(self) -> float | None:
        """Return EvoLink's confirmed charge in credits. None: EvoLink has not decided it, or the match is unconfirmed."""
        if self.is_unconfirmed:
            return None
        if self.charged == "no" and self.stage is Stage.FINAL:
            return 0.0
        return self.task.credits_used if self.task is not None and self.task.settled else None

    @property
    def spent(self) -> float:
        """Return the confirmed charge of a purchase of this server. Limits and sums count it."""
        return 0.0 if self.phase == Phase.EXTERNAL else self.charge or 0.0

    @property
    def reserved(self) -> float:
        """Return the credits that EvoLink may still charge: the price ceiling, or EvoLink's own higher reservation.

        Running purchases, unknown outcomes and unconfirmed matches reserve it until the charge is decided.
        """
        if self.phase == Phase.EXTERNAL or self.charge is not None:
            return 0.0
        reservation = self.task.credits_reserved if self.task is not None and not self.is_unconfirmed else None
        return max(self.estimate, reservation or 0.0)

    @property
    def stage(self) -> Stage:
        """Return the completeness of the entry. It reads no file: a deleted image counts as saved."""
        if self.task is None:
            return Stage.FINAL if self.phase in _PHASES_WITHOUT_TASK else Stage.OPEN
        if self.task.status != COMPLETED:
            return Stage.FINAL if self.task.settled else Stage.OPEN
        if not self.images or not all(image.is_saved or image.error for image in self.images):
            return Stage.OPEN
        return Stage.FINAL if all(image.is_saved or image.is_lost for image in self.images) else Stage.DELIVERABLE

    @property
    def is_running(self) -> bool:
        """Return whether the entry counts for the limit of running tasks."""
        if self.task is None:
            return self.phase in (Phase.INTENT, Phase.SENDING)
        return not self.task.settled

    @property
    def has_result(self) -> bool:
        """Return whether the caller needs no further call: an image is saved, or nothing was charged."""
        if any(image.is_present for image in self.images):
            return True
        is_settled = self.phase != Phase.INTENT if self.task is None else self.task.settled
        return is_settled and self.charged == "no"

    def has_work(self, now: float) -> bool:
        """Return whether a job can buy, reconcile, poll or download something at `now`."""
        return self.stage is Stage.OPEN or self.phase == Phase.UNKNOWN or self.can_download(now)

    def can_download(self, now: float) -> bool:
        """Return whether an image is not on this computer, and its URL is still valid at `now`.

        For a deleted image EvoLink may send a new URL.
        """
        return any(image.needs_download and (image.is_saved or image.url_expires_at > now) for image in self.images)

    def is_reusable(self, now: float) -> bool:
        """Return whether an identical request can get this purchase: it is running, unknown, or has images."""
        if self.task is None:
            return self.phase in (Phase.INTENT, Phase.SENDING, Phase.UNKNOWN)
        if not self.task.settled:
            return True
        has_images = not self.images or any(image.is_present or image.is_away for image in self.images)
        has_images = has_images or self.can_download(now)
        return self.task.status == COMPLETED and has_images


_STATUS_WITHOUT_TASK = {
    Phase.REFUSED: "failed",
    Phase.UNSENT: "failed",
    Phase.UNKNOWN: "unknown",
    # After a crash the POST of this entry may have bought.
    Phase.SENDING: "unknown",
}
_PHASES_WITHOUT_TASK = (Phase.REFUSED, Phase.UNSENT, Phase.UNKNOWN)


def iso(seconds: float | None) -> str | None:
    """Return epoch seconds as UTC in ISO 8601, to the second. None stays None."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def new_key() -> str:
    """Return a new idempotency key: 16 to 96 characters of [A-Za-z0-9._-]."""
    return f"evomcp-{uuid.uuid4().hex}"


def account_id_of(key: str, base_url: str) -> str:
    """Return the identity of a key. It is also the account ID, unless the key belongs to an account of an earlier key.

    It does not reveal key or URL.
    """
    return hmac.new(key.encode(), f"account at {base_url.lower()}".encode(), "sha256").hexdigest()[:32]


def with_defaults(body: dict[str, Any]) -> dict[str, Any]:
    """Return the request with EvoLink's defaults, in one spelling. Identical requests become equal."""
    size = str(body.get("size", "auto")).lower().replace("×", "x").replace(" ", "")
    # EvoLink ignores `resolution` without a ratio, so it makes no other request.
    tier = {"resolution": str(body.get("resolution", "1K")).upper()} if ":" in size else {}
    values = {name: value for name, value in body.items() if name != "resolution" and value is not None}
    model = model_named(body.get("model"))
    defaults = {"model": model.name, **model.defaults}
    return {**defaults, **values, "size": size, **tier}


def fingerprint(body: dict[str, Any]) -> str:
    """Return the SHA-256 of a request in hex. The order of its fields does not matter."""
    # ASCII escapes also represent lone surrogates, which UTF-8 cannot encode.
    text = json.dumps(body, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
