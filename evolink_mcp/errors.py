"""Every way a call can go wrong, and what each means for the money.

EvolinkError
├── Refused                 stopped here: nothing was sent, nothing was charged
│   ├── KeyMissing          no API key is set
│   ├── OverBudget          the computed price is above a cap
│   │   └── TooManyRunning  as many tasks are under way as may be
│   ├── JournalUnwritable   the journal cannot be written, so nothing may be bought
│   ├── ReferenceRefused    a local picture may not or cannot be used
│   ├── TaskUnknown         there is no such task here
│   ├── CallbackRefused     results may not be sent to that host
│   └── FolderRefused       a picture may not or cannot be saved there
├── TaskKnown               another entry of the journal has the task already
├── Unreachable             not one byte of the request left: it may be repeated
├── Rejected                EvoLink answered with a definite no: not charged
│   └── RateLimited         EvoLink asks to wait (429)
├── OutcomeUnknown          a paid request left and its answer was lost: it may have been charged
├── Unreadable              a read (never a purchase) failed: it may be repeated
├── DecoderUnavailable      the process that decodes images does not start
└── DownloadFailed          a finished picture could not be fetched or kept; its task is paid
    ├── LinkExpired         EvoLink's link to it has ended (24 h)
    ├── PictureUnusable     the downloaded file is not a complete image
    │   └── PictureRejected decoding it would cost too much work
    └── StoreUnusable       the team's store of pictures cannot be written or read
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Charged = Literal["no", "yes", "unknown"]


@dataclass(frozen=True, slots=True)
class Problem:
    """What is told about an error, as data: the same fields in every answer."""

    code: str
    message: str
    retryable: bool
    advice: str


class EvolinkError(Exception):
    """`what` happened, the machine `code`, what was `charged`, whether a repeat can help, what to do now."""

    code: str = "error"
    charged: Charged = "no"
    retryable: bool = False
    advice: str = ""

    def __init__(
        self,
        what: str,
        *,
        code: str | None = None,
        charged: Charged | None = None,
        retryable: bool | None = None,
        advice: str | None = None,
        http_status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.code = code or self.code
        self.charged = charged or self.charged
        self.retryable = self.retryable if retryable is None else retryable
        self.advice = self.advice if advice is None else advice
        self.http_status = http_status
        self.retry_after_s = retry_after_s

    @property
    def problem(self) -> Problem:
        """The same as data."""
        return Problem(self.code, self.what, self.retryable, self.advice)


class Refused(EvolinkError):
    """The call was stopped here: nothing was sent, nothing was charged."""

    code = "refused"


class KeyMissing(Refused):
    """No API key is set."""

    code = "key_missing"
    advice = (
        "Set EVOLINK_API_KEY in the configuration of this MCP server and restart it. "
        "Keys are made at https://evolink.ai/dashboard/keys. compute_size and list_tasks work without one."
    )


class OverBudget(Refused):
    """The computed price is above a cap."""

    code = "over_budget"


class TooManyRunning(OverBudget):
    """As many tasks are under way as may be."""

    code = "too_many_running"
    retryable = True
    advice = "Wait for one of them with get_task, then call again."

    @classmethod
    def of(cls, under_way: int, most: int) -> TooManyRunning:
        """The error that names both numbers."""
        return cls(f"as many tasks are under way as may be ({under_way} of {most})")


class JournalUnwritable(Refused):
    """The journal cannot be read or written, so nothing may be bought."""

    code = "journal_unwritable"
    advice = (
        "Nothing is bought that cannot be written down first. Make the folder writable or free some space, "
        "or set EVOLINK_MCP_DATA_DIR to another folder, then call again."
    )


class TaskKnown(EvolinkError):
    """Another entry of the account has this task already."""

    code = "task_known"


class ReferenceRefused(Refused):
    """A local picture may not or cannot be used."""

    code = "reference_refused"


class TaskUnknown(Refused):
    """There is no such task here."""

    code = "not_found"
    advice = "Call list_tasks: it has every task of yours."


class CallbackRefused(Refused):
    """The owner of this server does not allow results to be sent there."""

    code = "callback_refused"
    advice = (
        "Leave callback_url out: get_task tells when the picture is ready. EVOLINK_MCP_CALLBACK_HOSTS allows hosts."
    )


class FolderRefused(Refused):
    """A picture may not or cannot be saved there."""

    code = "folder_refused"


class Unreachable(EvolinkError):
    """Not one byte of the request was sent: it may be repeated."""

    code = "unreachable"
    retryable = True
    advice = "Nothing was sent. Check the network and EVOLINK_BASE_URL, then call again."


class Rejected(EvolinkError):
    """EvoLink answered with a definite no: nothing was charged."""

    code = "rejected"


class RateLimited(Rejected):
    """EvoLink asks to wait (429)."""

    code = "rate_limited"
    retryable = True


class OutcomeUnknown(EvolinkError):
    """A paid request was sent and its answer was lost: it may have been charged."""

    code = "outcome_unknown"
    charged = "unknown"
    advice = (
        "Do not simply repeat it. Call list_tasks with sync=true: if the task exists it is listed there and "
        "get_task fetches its pictures. The same call again only looks for it; force_new=true buys, perhaps a second time."
    )


class Unreadable(EvolinkError):
    """A read, never a purchase, failed: it may be repeated."""

    code = "unreadable"
    retryable = True
    advice = "Call again in a moment; nothing is lost."


class DecoderUnavailable(EvolinkError):
    """The process that decodes images does not start, so the server decodes nothing."""

    code = "decoder_unavailable"
    retryable = True
    advice = "Run evolink-mcp doctor: it names the reason. Then call again."

    def __init__(self) -> None:
        super().__init__("the process that decodes images does not start")


class DownloadFailed(EvolinkError):
    """A finished picture could not be fetched or saved; its task is paid."""

    code = "download_failed"
    charged = "yes"
    retryable = True
    advice = "The picture is paid and its URL is in this answer until it expires: call get_task to try again."


class LinkExpired(DownloadFailed):
    """EvoLink's link to the picture has ended (24 h)."""

    code = "link_expired"
    retryable = False
    advice = "EvoLink keeps results for 24 hours. A picture saved earlier is still in its folder."


class PictureUnusable(DownloadFailed):
    """The downloaded file is not a complete image. Only get_task downloads it again."""

    code = "picture_unusable"
    advice = "The picture is paid and its URL is in this answer until it expires; get_task downloads it once more."


class PictureRejected(PictureUnusable):
    """Decoding the downloaded file would cost too much work. The server never downloads it again."""

    code = "picture_rejected"
    retryable = False
    advice = (
        "The picture is paid and its URL is in this answer until it expires. This server does not download it again."
    )


class StoreUnusable(DownloadFailed):
    """The store where the team's pictures lie cannot be written or read."""

    code = "store_unusable"
    advice = (
        "The picture is paid, and EvoLink keeps it for 24 h: call get_task later. If it lasts, the server's owner has "
        "to look at EVOLINK_MCP_STORE."
    )


@dataclass(frozen=True, slots=True)
class Advice:
    """What a code means, what to do, and whether the same request may be repeated."""

    meaning: str
    todo: str
    repeat: bool = False


_REWORD = "Change the prompt or the reference pictures, then call generate_image again."
_LATER = "Wait a minute, then call generate_image again."

# Definite answers to a request, by HTTP status (evolink-api.md, errors; EvoLink's error page).
BY_STATUS: dict[int, tuple[str, Advice]] = {
    400: ("invalid_request", Advice("EvoLink refused the request", "Correct the argument that the message names.")),
    401: ("unauthorized", Advice("EvoLink did not accept the API key",
          "Check EVOLINK_API_KEY (deleted, mistyped, or of another account), then restart the server.")),
    402: ("insufficient_credits", Advice("the account or key has not enough credits",
          "Top up at https://evolink.ai/dashboard or raise the key's limit; get_balance shows what is left.")),
    403: ("forbidden", Advice("the API key may not do this", "Use a key that may use this model, or the task's own key.")),
    404: ("not_found", Advice("EvoLink does not know this task", "Check the id. Old tasks are forgotten by EvoLink.")),
    409: ("idempotency_conflict", Advice("EvoLink knows this request's key with other contents", "Call again.", True)),
    413: ("too_large", Advice("the request is too large for EvoLink", "Send URLs or smaller pictures.")),
    422: ("invalid_request", Advice("EvoLink refused the request", "Correct the argument that the message names.")),
    429: ("rate_limited", Advice("EvoLink asks to slow down", "Wait a moment, then call again.", True)),
}  # fmt: skip

# How a task can fail (docs.evolink.ai, task error codes). The set is open: others get UNKNOWN_FAILURE.
BY_TASK_CODE: dict[str, Advice] = {
    "content_policy_violation": Advice("the content policy does not allow this picture", _REWORD),
    "invalid_parameters": Advice("EvoLink could not use an argument", "Correct the argument that the message names."),
    "image_processing_error": Advice("a reference picture could not be used",
        "Check that each reference opens without a login and is a real .png, .jpg or .webp."),
    "image_dimension_mismatch": Advice("the mask and the picture differ in size", "Give a mask of the same pixel size."),
    "request_cancelled": Advice("the task was cancelled", "Call generate_image again if it is still wanted."),
    "generation_failed_no_content": Advice("the model made no picture of this prompt", _REWORD),
    "service_error": Advice("EvoLink had a fault", _LATER, True),
    "service_unavailable": Advice("EvoLink's provider is unavailable", _LATER, True),
    "generation_timeout": Advice("the picture took too long at EvoLink", _LATER, True),
    "resource_exhausted": Advice("EvoLink is at its capacity", "Wait some minutes, then call generate_image again.", True),
    "quota_exceeded": Advice("a rate or credit limit was reached",
        "Check get_balance, wait a few seconds, then call generate_image again.", True),
    "resource_not_found": Advice("something the task needs was not found", "Check the reference URLs.", True),
    "expired": Advice("the task expired at EvoLink", _LATER, True),
    "unknown_error": Advice("EvoLink gives no reason", "Try once more; if it persists, ask support@evolink.ai.", True),
}  # fmt: skip
UNKNOWN_FAILURE = Advice("EvoLink reports a failure", "Read the message; change the request or try once more.", False)


def advice_for(code: str) -> Advice:
    """The advice for a task's error code; codes nobody documented get a cautious one."""
    return BY_TASK_CODE.get(code, UNKNOWN_FAILURE)
