"""The exception tree: the meaning of each failed call, and whether it cost money.

EvolinkError
├── Refused                 the server stopped the call: nothing was sent, nothing was charged
│   ├── KeyMissing          no API key is set
│   ├── OtherKey            another API key bought the task
│   ├── OverBudget          the price ceiling is above a spending limit
│   │   └── TooManyRunning  the limit of running tasks is reached
│   ├── JournalUnwritable   the journal cannot be read or written
│   ├── ReferenceRefused    a local reference image is not allowed or not usable
│   ├── TaskUnknown         the task does not exist here
│   ├── ImageUnknown        a text names no earlier task or image
│   ├── CallbackRefused     the settings do not allow this callback host
│   └── FolderRefused       a folder is not allowed or not writable
├── TaskKnown               another journal entry already has the task
├── Unreachable             no byte of the HTTP request was sent: it may be repeated
├── Rejected                EvoLink refused the request: nothing was charged
│   └── RateLimited         EvoLink answered 429
├── OutcomeUnknown          a POST was sent and its answer was lost: it may have been charged
├── Unreadable              a read failed, never a purchase: it may be repeated
├── DecoderUnavailable      the process that decodes images does not start
└── DownloadFailed          an image could not be downloaded or saved: its task is paid
    ├── LinkExpired         the image URL expired 24 h after completion
    ├── PictureUnusable     the downloaded file is not a complete image
    │   └── PictureRejected decoding the downloaded file would cost too much work
    └── StoreUnusable       the object store cannot be written or read
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evolink_mcp.causes import Cause

Charged = Literal["no", "yes", "unknown"]


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as data, for answers and for the journal. `retry_at`: EvoLink refuses purchases before it (epoch seconds)."""

    code: str
    message: str
    retryable: bool
    advice: str
    retry_at: float | None = None


class EvolinkError(Exception):
    """A call failed. `charged` states whether it cost money, `advice` states the next step.

    `retry_after_s` is the wait before the server repeats an HTTP request. `retry_at` (epoch seconds) is the end of a rate
    limit. `cause` is the entry of the table of causes, without EvoLink's own words.
    """

    code: str = "error"
    charged: Charged = "no"
    retryable: bool = False
    advice: str = ""

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        charged: Charged | None = None,
        retryable: bool | None = None,
        advice: str | None = None,
        http_status: int | None = None,
        retry_after_s: float | None = None,
        retry_at: float | None = None,
        cause: Cause | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.charged = charged or self.charged
        self.retryable = self.retryable if retryable is None else retryable
        self.advice = self.advice if advice is None else advice
        self.http_status = http_status
        self.retry_after_s = retry_after_s
        self.retry_at = retry_at
        self.cause = cause

    @property
    def problem(self) -> Problem:
        """The error as data."""
        return Problem(self.code, self.message, self.retryable, self.advice, self.retry_at)


class Refused(EvolinkError):
    """The server stopped the call before it sent anything."""

    code = "refused"


class KeyMissing(Refused):
    """No API key is set."""

    code = "key_missing"
    advice = (
        "Set EVOLINK_API_KEY in the configuration of this MCP server and restart it. "
        "Create a key at https://evolink.ai/dashboard/keys. compute_size and list_tasks work without a key."
    )


class OtherKey(Refused):
    """Another API key bought the task, and the key of this server cannot read it."""

    code = "other_key"
    advice = "Set EVOLINK_API_KEY to the key that bought it, or look at the task on EvoLink's page."


class OverBudget(Refused):
    """The price ceiling is above a spending limit."""

    code = "over_budget"


class TooManyRunning(OverBudget):
    """The limit of running tasks is reached."""

    code = "too_many_running"
    retryable = True
    advice = "Wait for one of them with get_task, then call again."

    @classmethod
    def of(cls, running: int, limit: int) -> TooManyRunning:
        """Return the error with both numbers in its message."""
        return cls(f"the limit of {limit} running tasks is reached ({running} are running)")


class JournalUnwritable(Refused):
    """The journal cannot be read or written."""

    code = "journal_unwritable"
    advice = (
        "The server must record a purchase before it buys. Make the folder writable, free some space, "
        "or set EVOLINK_MCP_DATA_DIR to another folder. Then call again."
    )


class TaskKnown(EvolinkError):
    """Another journal entry of the account already has this task."""

    code = "task_known"


class ReferenceRefused(Refused):
    """A local reference image is not allowed or not usable."""

    code = "reference_refused"


class TaskUnknown(Refused):
    """The task does not exist here."""

    code = "not_found"
    advice = "Call list_tasks: it lists all your tasks."


class ImageUnknown(Refused):
    """A text names no earlier task or image of this profile."""

    code = "image_unknown"
    advice = (
        "Give a task ID, an evolink:// URI, the picture's URL or path, or last. list_tasks finds a picture by words of its "
        "prompt."
    )


class CallbackRefused(Refused):
    """The settings do not allow this callback host."""

    code = "callback_refused"
    advice = (
        "Leave out callback_url and call get_task for the result. "
        "The owner of this server can allow the host with EVOLINK_MCP_CALLBACK_HOSTS."
    )


class FolderRefused(Refused):
    """A folder is not allowed or not writable."""

    code = "folder_refused"


class Unreachable(EvolinkError):
    """No byte of the HTTP request was sent, so it may be repeated."""

    code = "unreachable"
    retryable = True
    advice = "Nothing was sent. Check the network and EVOLINK_BASE_URL, then call again."


class Rejected(EvolinkError):
    """EvoLink refused the request and charged nothing."""

    code = "rejected"


class RateLimited(Rejected):
    """EvoLink answered 429."""

    code = "rate_limited"
    retryable = True


class OutcomeUnknown(EvolinkError):
    """A POST was sent and its answer was lost, so it may have been charged."""

    code = "outcome_unknown"
    charged = "unknown"
    advice = (
        "Do not buy again yet. Call list_tasks with sync=true: if the task exists, it is in that list, and "
        "get_task fetches its pictures. The same call again only searches for the task. "
        "force_new=true buys, perhaps a second time."
    )

    def __init__(self, message: str, *, task_ids: tuple[str, ...] = (), advice: str | None = None) -> None:
        """`task_ids` are the task IDs in EvoLink's answer, if any. The default advice names them."""
        if advice is None and task_ids:
            advice = (
                f"EvoLink's answer names {', '.join(task_ids[:5])}. Check it with get_task before another purchase. "
                "The same call again only searches for the task."
            )
        super().__init__(message, advice=advice)
        self.task_ids = task_ids


class Unreadable(EvolinkError):
    """A read failed, never a purchase, so it may be repeated."""

    code = "unreadable"
    retryable = True
    advice = "Nothing is lost. Wait a moment, then call again."


class DecoderUnavailable(EvolinkError):
    """The process that decodes images does not start, so the server decodes nothing."""

    code = "decoder_unavailable"
    retryable = True
    advice = "Run evolink-mcp doctor: it names the reason. Then call again."


class DownloadFailed(EvolinkError):
    """An image could not be downloaded or saved; its task is paid."""

    code = "download_failed"
    charged = "yes"
    retryable = True
    advice = "The picture is paid. Its URL is in this answer until it expires. Call get_task to try again."


class LinkExpired(DownloadFailed):
    """The image URL expired 24 h after completion."""

    code = "link_expired"
    retryable = False
    advice = "EvoLink deletes results after 24 hours. A picture that was saved before is still in its folder."


class PictureUnusable(DownloadFailed):
    """The downloaded file is not a complete image. Only get_task downloads it again."""

    code = "picture_unusable"
    advice = "The picture is paid. Its URL is in this answer until it expires. get_task downloads it again."


class PictureRejected(PictureUnusable):
    """Decoding the downloaded file would cost too much work. The server never downloads it again."""

    code = "picture_rejected"
    retryable = False
    advice = "The picture is paid. Its URL is in this answer until it expires. This server does not download it again."


class StoreUnusable(DownloadFailed):
    """The object store cannot be written or read."""

    code = "store_unusable"
    advice = (
        "The picture is paid, and EvoLink keeps it for 24 hours. Call get_task later. If the error stays, "
        "the owner of this server must check EVOLINK_MCP_STORE."
    )
