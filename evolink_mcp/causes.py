"""The causes of failures. Each has one text for the answers of the tools, `doctor` and the log, and one next step.

`api.failures` finds the cause of an exception or of an HTTP answer, `folder_fault` that of a failed write.
"""

from __future__ import annotations

import errno
import re
import sys
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Cause:
    """The code for programs, a sentence without its full stop, and the next step.

    Both texts may have fields such as {host}. `retryable`: the same call may succeed later.
    """

    code: str
    meaning: str
    next_step: str
    retryable: bool = False

    def about(self, **fields: object) -> Cause:
        """Return the cause with its fields filled in."""
        return replace(self, meaning=self.meaning.format(**fields), next_step=self.next_step.format(**fields))


# --- no connection: nothing was sent ---

UNREACHABLE = "unreachable"

NAME_UNKNOWN = Cause(
    UNREACHABLE,
    "the name {host} cannot be resolved (DNS)",
    "Check the network connection, the DNS and {setting}, then call again.",
    True,
)
CONNECTION_REFUSED = Cause(
    UNREACHABLE, "{host} refuses the connection", "Check {setting} and the firewall, then call again.", True
)
NO_ROUTE = Cause(
    UNREACHABLE, "there is no network route to {host}", "Connect this machine to the network, then call again.", True
)
CONNECTION_FORBIDDEN = Cause(
    UNREACHABLE,
    "the system does not allow this server to connect to {host}",
    "Allow the network for this server: in the sandbox settings of the MCP host, or in the firewall of the machine.",
)
CONNECTION_SLOW = Cause(
    UNREACHABLE,
    "{host} accepts no connection within {seconds:.0f} s",
    "Check the network and the firewall. If the network needs a proxy, set HTTPS_PROXY in the environment of this "
    "server and restart it.",
    True,
)
NO_CONNECTION = Cause(
    UNREACHABLE, "{reason}, host {host}", "Check the network, the proxy and {setting}, then call again.", True
)
CERTIFICATE_UNTRUSTED = Cause(
    UNREACHABLE,
    "the certificate of {host} is not trusted ({reason}{issuer})",
    "A firewall or a virus scanner may replace certificates. Set SSL_CERT_FILE to a PEM file with its root certificate in "
    "the environment of this server, or add the certificate to the certificate store of the system. Then restart "
    "the server.",
)
CERTIFICATE_DATE = Cause(
    UNREACHABLE,
    "the certificate of {host} is not valid today ({reason}{issuer})",
    "Check the date of this machine. If it is right, the operator of {host} must renew the certificate.",
)
CERTIFICATE_NAME = Cause(
    UNREACHABLE,
    "the certificate of {host} is for another name ({reason}{issuer})",
    "Check {setting}, and whether the network has a login page: open a website in a browser.",
)
NO_TLS = Cause(
    UNREACHABLE, "{host} does not answer with TLS ({reason})", "Check the port and the scheme of {setting}.", True
)
PROXY_SILENT = Cause(
    UNREACHABLE,
    "the {proxy} does not answer",
    "Start the proxy, or correct or remove {variable} in the environment of this server. Then restart the server.",
    True,
)
PROXY_LOGIN = Cause(
    UNREACHABLE,
    "the {proxy} requires a user name and a password (HTTP 407)",
    "Write them into {variable} in the environment of this server, as http://user:password@host:port. Then restart the "
    "server.",
)
PROXY_REFUSAL = Cause(
    UNREACHABLE,
    "the {proxy} refuses the connection to {host} ({reason})",
    "Ask the administrator of the proxy to allow {host}, or correct {variable} in the environment of this server.",
    True,
)

ENVIRONMENT_UNUSABLE = Cause(
    "unusable_environment",
    "no connection to EvoLink can be prepared ({reason}): {variable} cannot be used",
    "Correct {variable} in the environment of this server and restart it.",
)

# --- an answer that is not EvoLink's ---

WEB_PAGE = Cause(
    "blocked_by_network",
    "a web page answered instead of EvoLink's API (HTTP {status}{title})",
    "A firewall, a proxy or a login page of the network sent it. Ask the administrator of the network to allow {host}, or "
    "use another network. The API key is not the cause.",
)
REDIRECT = Cause(
    "blocked_by_network",
    "{host} redirects to {target} (HTTP {status})",
    "Check {setting}, and whether the network has a login page: open a website in a browser.",
)
WRONG_ADDRESS = Cause(
    "wrong_address",
    "EvoLink's API has no such address at {host}",
    "Check {setting}: EvoLink's is {default}, without a path.",
)

# --- folders and disks ---

_FOLDER = "the folder {folder} cannot be written ({reason})"
_ANOTHER = "or set {variable} to another folder."
FOLDER_UNWRITABLE = Cause("folder_refused", _FOLDER, f"Make it writable, {_ANOTHER}")
NO_FOLDER = Cause("folder_refused", _FOLDER, f"Remove or rename the file that has the name of the folder, {_ANOTHER}")
DISK_FULL = Cause("folder_refused", _FOLDER, f"Free some space on its disk, {_ANOTHER}", True)
READ_ONLY = Cause("folder_refused", _FOLDER, f"Its disk is read-only: mount it for writing, {_ANOTHER}")
FOLDER_FORBIDDEN = Cause("folder_refused", _FOLDER, f"Correct the permissions of the folder, {_ANOTHER}")
FOLDER_PRIVATE = Cause(
    "folder_refused",
    _FOLDER,
    "Allow the MCP host to use it: System Settings › Privacy & Security › Files and Folders. Or correct the permissions "
    f"of the folder, {_ANOTHER}",
)
_BY_ERRNO = {
    errno.ENOSPC: DISK_FULL,
    getattr(errno, "EDQUOT", errno.ENOSPC): DISK_FULL,
    errno.EROFS: READ_ONLY,
    errno.EACCES: FOLDER_FORBIDDEN,
    errno.EPERM: FOLDER_FORBIDDEN,
    errno.ENOTDIR: NO_FOLDER,
    errno.EEXIST: NO_FOLDER,
}


def folder_fault(folder: Path, error: OSError, variable: str, platform: str = sys.platform) -> Cause:
    """Return the cause of a failed write in a folder. `variable` is the setting of the folder."""
    cause = _BY_ERRNO.get(error.errno or 0, FOLDER_UNWRITABLE)
    # macOS refuses Desktop, Documents and Downloads to a program without the user's permission.
    if cause is FOLDER_FORBIDDEN and platform == "darwin":
        cause = FOLDER_PRIVATE
    return cause.about(folder=folder, reason=error.strerror or type(error).__name__, variable=variable)


# --- refusals of EvoLink ---

_REWORD = "Change the prompt or the reference pictures, then call generate_image again."
_LATER = "Wait a minute, then call generate_image again."
_CORRECT = "Correct the argument that the message names."

CONTENT_POLICY = Cause("content_policy_violation", "the content policy does not allow this picture", _REWORD)
KEY_REFUSED = Cause(
    "unauthorized",
    "EvoLink did not accept the API key",
    "Check EVOLINK_API_KEY: it may be deleted, mistyped or of another account. Then restart the server.",
)
KEY_BLOCKED = Cause(
    "unauthorized",
    "EvoLink has disabled this API key or its user, or the key has expired",
    "Create a new key at https://evolink.ai/dashboard/keys, set EVOLINK_API_KEY and restart the server.",
)
ADDRESS_BLOCKED = Cause(
    "forbidden",
    "the API key may not be used from the network address of this machine",
    "Allow this address for the key at https://evolink.ai/dashboard/keys, or use another key.",
)
NO_CREDITS = Cause(
    "insufficient_credits",
    "the account or key does not have enough credits",
    "Top up at https://evolink.ai/dashboard or raise the key's limit. get_balance shows the remaining credits.",
)
NO_PERMISSION = Cause(
    "forbidden",
    "the API key has no permission for this",
    "Use a key that has access to this model, or the key that bought the task.",
)
RATE_LIMIT = Cause(
    "rate_limited", "EvoLink limits the request rate", "Wait a minute, then call again. EvoLink names no time.", True
)
RATE_LIMIT_UNTIL = Cause("rate_limited", "EvoLink limits the request rate", "Call again, but not before {time}.", True)
TASK_UNKNOWN = Cause("not_found", "EvoLink does not know this task", "Check the id. EvoLink deletes old tasks.")

# Answers to an HTTP request by status (docs.evolink.ai, error codes). For 404 see `api.failures`.
BY_STATUS: dict[int, Cause] = {
    400: Cause("invalid_request", "EvoLink refused the request", _CORRECT),
    401: KEY_REFUSED,
    402: NO_CREDITS,
    403: NO_PERMISSION,
    404: TASK_UNKNOWN,
    409: Cause(
        "idempotency_conflict", "EvoLink has another request with the same idempotency key", "Call again.", True
    ),
    413: Cause("too_large", "the request is too large for EvoLink", "Send URLs or smaller pictures."),
    422: Cause("invalid_request", "EvoLink refused the request", _CORRECT),
    429: RATE_LIMIT,
}

# EvoLink's error codes name a cause more exactly than the status. The first match counts.
_BY_UPSTREAM_CODE = (
    (re.compile(r"content_(policy|filter|violation)|policy_violation|moderat|sensitive|safety|nsfw"), CONTENT_POLICY),
    (
        re.compile(
            r"insufficient_\w*(quota|credits?|balance|funds)|balance_insufficient|quota_not_enough|quota_exhausted|"
            r"daily_quota_exceeded"
        ),
        NO_CREDITS,
    ),
    (re.compile(r"(key|user|account)_(disabled|expired|deleted|banned)"), KEY_BLOCKED),
    (re.compile(r"ip_(restricted|not_allowed|blocked)"), ADDRESS_BLOCKED),
    (re.compile(r"model_access_denied|model_not_allowed|permission_denied"), NO_PERMISSION),
    (re.compile(r"invalid_(api_)?key"), KEY_REFUSED),
)
# Moderation with a general code. These phrases occur in no message about an argument.
_MODERATION = re.compile(
    r"safety system|content[ _-]polic|content (was |is )?(flagged|filtered)|sensitive content|"
    r"(blocked|rejected|flagged|refused|failed) by (the |our )?(\w+ )?(moderation|content)|moderation (blocked|failed)",
    re.IGNORECASE,
)


def cause_of_code(code: str) -> Cause | None:
    """Return the cause that an error code of EvoLink names. None: only the status shows the cause."""
    return next((cause for pattern, cause in _BY_UPSTREAM_CODE if pattern.search(code.lower())), None)


def is_moderation(message: str) -> bool:
    """Return whether the text of an error names moderation as its reason."""
    return _MODERATION.search(message) is not None


# --- failed tasks ---

# Error codes of failed tasks (docs.evolink.ai, task error codes). EvoLink may add codes.
_BY_TASK_CODE = {
    cause.code: cause
    for cause in (
        CONTENT_POLICY,
        Cause("invalid_parameters", "EvoLink could not use an argument", _CORRECT),
        Cause(
            "image_processing_error",
            "EvoLink could not use a reference picture",
            "Check that each reference opens without a login and is a real .png, .jpg or .webp file.",
        ),
        Cause(
            "image_dimension_mismatch",
            "the mask and the picture differ in size",
            "Give a mask with the pixel size of the picture.",
        ),
        Cause(
            "request_cancelled", "the task was cancelled", "Call generate_image again if you still want the picture."
        ),
        Cause("generation_failed_no_content", "the model made no picture from this prompt", _REWORD),
        Cause("service_error", "EvoLink had an internal error", _LATER, True),
        Cause("service_unavailable", "EvoLink's provider is unavailable", _LATER, True),
        Cause("generation_timeout", "the picture took too long at EvoLink", _LATER, True),
        Cause(
            "resource_exhausted",
            "EvoLink is at full capacity",
            "Wait some minutes, then call generate_image again.",
            True,
        ),
        Cause(
            "quota_exceeded",
            "a rate or credit limit was reached",
            "Check get_balance, wait a few seconds, then call generate_image again.",
            True,
        ),
        Cause(
            "resource_not_found",
            "EvoLink did not find a file that the task needs",
            "Check the reference URLs.",
            True,
        ),
        Cause("expired", "the task expired at EvoLink", _LATER, True),
        Cause(
            "unknown_error",
            "EvoLink gives no reason",
            "Try again once. If it fails again, ask support@evolink.ai.",
            True,
        ),
    )
}
_UNKNOWN_FAILURE = Cause("", "EvoLink reports a failure", "Read the message. Change the request or try again once.")


def cause_of_task_code(code: str) -> Cause:
    """Return the cause of a failed task. An unknown code gets a cautious next step."""
    return _BY_TASK_CODE.get(code) or cause_of_code(code) or replace(_UNKNOWN_FAILURE, code=code)


# --- rate limits ---


def clock_time(at: float, now: float) -> str:
    """Return a later time of this machine's clock with its distance: "16:23 (in 60 minutes)". In epoch seconds."""
    seconds = max(at - now, 0.0)
    moment = datetime.fromtimestamp(at)
    if seconds < 90:
        return f"{moment:%H:%M:%S} (in {seconds:.0f} seconds)"
    text = f"{moment:%H:%M}" if moment.date() == datetime.fromtimestamp(now).date() else f"{moment:%Y-%m-%d %H:%M}"
    if seconds < 2 * 3600:
        return f"{text} (in {seconds / 60:.0f} minutes)"
    return f"{text} (in {seconds / 3600:.0f} hours)"


def rate_limit(retry_at: float | None, now: float) -> Cause:
    """Return the cause of a 429. `retry_at`: the end of the wait in epoch seconds; None: EvoLink names none."""
    if retry_at is None or retry_at <= now:
        return RATE_LIMIT
    # The displayed minute begins after the end of the wait.
    displayed = retry_at if retry_at - now < 90 else -(-retry_at // 60) * 60
    return RATE_LIMIT_UNTIL.about(time=clock_time(displayed, now))
