"""Read EvoLink's answers about tasks and credits, tolerantly.

Unknown fields are ignored, and invalid values become None. Only an answer without a task ID is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from evolink_mcp.api.request import IMAGES_MAX, TASK_ID_PATTERN, URL_MAX_CHARS
from evolink_mcp.errors import Charged, Unreadable
from evolink_mcp.sanitize import harmless, word

COMPLETED = "completed"
FAILED = "failed"
CANCELLED = "cancelled"
# Epoch seconds beyond this (the year 5138) are milliseconds.
LATEST_S = 1e11
# Far above every price, time and count of EvoLink.
NUMBER_MAX = 1e15
LINKS_MAX = IMAGES_MAX
# Python refuses to convert an integer of more than 4,300 digits to text.
ID_NUMBER_MAX = 10**40
SETTLED = frozenset({COMPLETED, FAILED, CANCELLED})
# Without the ranges of invisible characters, bidi controls and surrogates.
_LINK = re.compile(r"https?://[\x21-\x7e\u00a1-\u1fff\u3001-\ud7ff\uf900-\ufdff]+")
_ID = re.compile(r"[\x21-\x7e]{1,256}")  # shown in any form; only an ID that passes `is_task_id` becomes part of a path
# Other clients of EvoLink count these words as final too.
_SPELLINGS = {"canceled": CANCELLED, "expired": FAILED, "error": FAILED}


@dataclass(frozen=True, slots=True)
class TaskError:
    """EvoLink's reason for a failed task, made harmless."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Task:
    """One state of a task at EvoLink.

    `progress` is in percent, `created` in epoch seconds, `estimated_time_s` in seconds from the start. `results` are
    the links to the images. `credits_reserved` and `credits_used` are for the whole task. `billing` is EvoLink's state
    of the charge ("charged", "released" …). `links_left_out` is the number of links beyond LINKS_MAX.
    """

    id: str
    status: str = "pending"
    progress: float | None = None
    created: float | None = None
    model: str | None = None
    results: tuple[str, ...] = ()
    error: TaskError | None = None
    estimated_time_s: float | None = None
    credits_reserved: float | None = None
    credits_used: float | None = None
    billing: str | None = None
    links_left_out: int = 0

    @property
    def settled(self) -> bool:
        """Whether the status is final."""
        return self.status in SETTLED

    @property
    def has_credits(self) -> bool:
        """Whether EvoLink named the charge or the reservation."""
        return self.credits_used is not None or self.credits_reserved is not None

    @property
    def charged(self) -> Charged:
        """Whether the account paid. EvoLink charges completed tasks and returns the reservation of failed ones."""
        # Only newer answers of EvoLink have `billing`. It reports the charge itself, so it precedes the status.
        if self.billing in ("charged", "released"):
            return "yes" if self.billing == "charged" else "no"
        if self.status == COMPLETED or (self.credits_used or 0) > 0:
            return "yes"
        return "no" if self.status == FAILED else "unknown"


@dataclass(frozen=True, slots=True)
class Balance:
    """`GET /v1/credits`: remaining and used credits of the account and of this key. None: EvoLink did not name them."""

    account_remaining: float | None
    account_used: float | None
    key_remaining: float | None
    key_used: float | None
    key_unlimited: bool | None


def read_task(data: Any) -> Task:
    """Read a task. Unknown fields are ignored, and invalid values become None.

    Raises:
        Unreadable: `data` has no ID in visible ASCII characters.
    """
    payload = as_dict(data)
    # Some clients of EvoLink report that its gateway sometimes wraps a task in `data`.
    if not isinstance(payload.get("id"), str) and isinstance(payload.get("data"), dict):
        payload = as_dict(payload["data"])
    name = payload.get("id")
    if isinstance(name, int) and not isinstance(name, bool) and abs(name) < ID_NUMBER_MAX:
        name = str(name)
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise Unreadable("EvoLink's answer names no task")
    info = as_dict(payload.get("task_info"))
    usage = as_dict(payload.get("usage"))
    billing = as_dict(payload.get("billing"))
    status = _text(payload.get("status"))
    model = _text(payload.get("model"))
    charge = _text(billing.get("charge_status"))
    status_word = "pending" if status is None else word(status, 40).lower()
    # By EvoLink's page, `charged_credits` is a placeholder before the charge.
    used = _number(billing.get("charged_credits")) if charge == "charged" else None
    if used is None:
        used = _number(usage.get("credits_used"))
    if used is None:
        used = _number(as_dict(usage.get("cost")).get("credits"))
    links, links_left_out = _results(payload)
    return Task(
        id=name,
        status=_SPELLINGS.get(status_word, status_word),
        progress=_number(payload.get("progress"), 0, 100),
        # A single task has `created`, a row of the list has `created_at`. Each ID contains the time.
        created=_moment(payload.get("created")) or _moment(payload.get("created_at")) or _moment_in(name),
        model=None if model is None else harmless(model, 80),
        results=links,
        links_left_out=links_left_out,
        error=_error(payload.get("error"), status_word),
        estimated_time_s=_number(info.get("estimated_time"), 0, 86_400),
        credits_reserved=_number(usage.get("credits_reserved"), 0),
        credits_used=used,
        billing=charge,
    )


def read_tasks(data: Any) -> Iterator[Task]:
    """Read a list of tasks in any of its known shapes. Items that are not tasks are skipped.

    Raises:
        Unreadable: `data` has no list.
    """
    payload = as_dict(data)
    rows = payload.get("data") if payload else data
    if page := as_dict(rows):
        rows = next((page[name] for name in ("tasks", "items", "list") if name in page), None)
    items = as_list(rows)
    # An account without tasks has an empty list. Any other value without items is no list.
    if not items and rows != []:
        raise Unreadable("EvoLink's answer is not a list of tasks")
    for item in items:
        try:
            yield read_task(item)
        except Unreadable:
            continue


def read_balance(data: Any) -> Balance:
    """Read the answer of `GET /v1/credits`.

    Raises:
        Unreadable: `data` describes neither an account nor a key.
    """
    parts = as_dict(as_dict(data).get("data"))
    if any(not isinstance(parts.get(name) or {}, dict) for name in ("user", "token")):
        raise Unreadable("EvoLink's answer about credits makes no sense")
    user = as_dict(parts.get("user"))
    token = as_dict(parts.get("token"))
    if not (user or token):
        raise Unreadable("EvoLink's answer about credits makes no sense")
    amounts = [_amount(part.get(name)) for part in (user, token) for name in ("remaining_credits", "used_credits")]
    unlimited = token.get("unlimited_credits")
    return Balance(*amounts, key_unlimited=unlimited if isinstance(unlimited, bool) else None)


def is_task_id(value: object) -> bool:
    """Return whether `value` has the form of a task ID. Only such an ID becomes part of a path."""
    return isinstance(value, str) and re.fullmatch(TASK_ID_PATTERN, value) is not None


def _results(data: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """Return at most LINKS_MAX result URLs, and the number of further ones, in order without duplicates.

    They are in `results` or, if that is empty, in `result_data`. Text that is not one URL of visible characters is
    dropped, because users see the links. The further ones are counted without that check.
    """
    # EvoLink documents only `results`. It sends `result_data` as a list or as one object.
    urls = [item for item in as_list(data.get("results")) if isinstance(item, str)]
    if not urls:
        for item in as_list(data.get("result_data")) or [data.get("result_data")]:
            values = [as_dict(item).get(name) for name in ("url", "image_url")]
            urls += [url for url in values if isinstance(url, str)][:1]
    distinct = list(dict.fromkeys(urls))
    links: list[str] = []
    checked = 0
    for url in distinct:
        if len(links) == LINKS_MAX:
            break
        checked += 1
        if len(url) <= URL_MAX_CHARS and _LINK.fullmatch(url):
            links.append(url)
    return tuple(links), len(distinct) - checked


def _error(error: Any, status: str) -> TaskError | None:
    payload = as_dict(error)
    if payload or error == {}:
        code = payload.get("code")
        return TaskError(
            # EvoLink's codes are strings or integers.
            (word(code, 80) if isinstance(code, str | int) else "") or "unknown_error",
            harmless(payload.get("message") or "no reason was given"),
        )
    if isinstance(error, str) and error:
        return TaskError("unknown_error", harmless(error))
    return TaskError("expired", "the task expired") if status == "expired" else None


def _number(value: Any, low: float = 0.0, high: float = math.inf) -> float | None:
    """Return `value` as a number clamped to [low, high]. None: it is not a number."""
    if isinstance(value, str) and len(value) < 32:
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # A larger integer may not fit into a float, and sums of larger floats may overflow. NaN fails the comparison too.
    return min(max(value, low), high) if abs(value) <= NUMBER_MAX else None


def _moment(value: Any) -> float | None:
    """Return epoch seconds from seconds, milliseconds, or ISO 8601 (UTC if there is no zone)."""
    # A minus sign at the start belongs to a number.
    if isinstance(value, str) and "-" in value[1:] and len(value) <= 40:
        try:
            moment = datetime.fromisoformat(value.strip())
        except ValueError:
            return None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    number = _number(value)
    if number is None or number == 0:
        return None
    seconds = number / 1000 if number > LATEST_S else number
    return seconds if seconds <= LATEST_S else None


def _moment_in(task_id: str) -> float | None:
    """Return the time in a task ID, in epoch seconds: task-unified-1757156493-…"""
    # Ten digits are a time from 2001 to 2286.
    match = re.match(r"task-unified-([1-9]\d{9})-", task_id)
    return float(match[1]) if match else None


def _amount(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int) and abs(value) > 10**15:
        return None
    return float(value) if math.isfinite(value) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def as_dict(value: object) -> dict[str, Any]:
    """Return `value` if it is a JSON object, else an empty one."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def as_list(value: object) -> list[Any]:
    """Return `value` if it is a JSON list, else an empty one."""
    return cast("list[Any]", value) if isinstance(value, list) else []
