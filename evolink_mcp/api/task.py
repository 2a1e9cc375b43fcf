"""What EvoLink says of a task, read leniently.

Unknown fields are ignored and odd values become None. Only an answer that names no task is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from evolink_mcp.api.request import TASK_ID_PATTERN, URL_MAX
from evolink_mcp.errors import Charged, Unreadable
from evolink_mcp.sanitize import harmless, word

COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
# Epoch seconds beyond this (the year 5138) are milliseconds.
LATEST_S = 1e11
LINKS_MAX = 10  # the most pictures that can be asked for
ID_NUMBER_MAX = 10**40
SETTLED = frozenset({COMPLETED, FAILED, CANCELLED})
_LINK = re.compile(r"https?://[\x21-\x7e\u00a1-\u1fff\u3001-\ud7ff\uf900-\ufdff]+")
_ID = re.compile(r"[\x21-\x7e]{1,256}")  # kept and shown whatever its form; only `is_task_id` lets one into a path
_SPELLINGS = {"canceled": CANCELLED, "expired": FAILED, "error": FAILED}


@dataclass(frozen=True, slots=True)
class TaskError:
    """Why a task failed, in EvoLink's words (already made harmless)."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Task:
    """One state of a task at EvoLink, as far as it could be read.

    `progress` is in percent, `created` in epoch seconds, `estimated_time_s` in seconds from the start. `results` are
    the links to the pictures. `credits_reserved` and `credits_used` are credits of the whole task. `billing` is
    EvoLink's word for the state of the charge ("charged", "released" …). `links_left_out` counts what it named beyond
    LINKS_MAX.
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
        """Whether EvoLink will not change it any more."""
        return self.status in SETTLED

    @property
    def charged(self) -> Charged:
        """What the account paid: EvoLink charges completed tasks and returns the reservation of failed ones."""
        if self.billing in ("charged", "released"):
            return "yes" if self.billing == "charged" else "no"
        if self.status == COMPLETED or (self.credits_used or 0) > 0:
            return "yes"
        return "no" if self.status == FAILED else "unknown"


@dataclass(frozen=True, slots=True)
class Balance:
    """`GET /v1/credits`: credits left and used of the account and of this key; None where not told."""

    account_remaining: float | None
    account_used: float | None
    key_remaining: float | None
    key_used: float | None
    key_unlimited: bool | None


def read_task(data: Any) -> Task:
    """`data` as a task. Unknown fields are ignored, odd values become None.

    Raises:
        Unreadable: `data` is not an object with an id in visible ASCII characters.
    """
    told = as_dict(data)
    if not isinstance(told.get("id"), str) and isinstance(told.get("data"), dict):
        told = as_dict(told["data"])
    name = told.get("id")
    if isinstance(name, int) and not isinstance(name, bool) and abs(name) < ID_NUMBER_MAX:
        name = str(name)
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise Unreadable("EvoLink's answer names no task")
    info, usage, billing = (as_dict(told.get(name)) for name in ("task_info", "usage", "billing"))
    status, model, charge = (
        _text(value) for value in (told.get("status"), told.get("model"), billing.get("charge_status"))
    )
    status_word = "pending" if status is None else word(status, 40).lower()
    # EvoLink's page: `charged_credits` is a placeholder until the charge has happened.
    used = _number(billing.get("charged_credits")) if charge == "charged" else None
    if used is None:
        used = _number(usage.get("credits_used"))
    if used is None:
        used = _number(as_dict(usage.get("cost")).get("credits"))
    links = _results(told)
    return Task(
        id=name,
        status=_SPELLINGS.get(status_word, status_word),
        progress=_number(told.get("progress"), 0, 100),
        created=_moment(told.get("created")) or _moment(told.get("created_at")) or _moment_in(name),
        model=None if model is None else harmless(model, 80),
        results=links[:LINKS_MAX],
        links_left_out=len(links[LINKS_MAX:]),
        error=_error(told.get("error"), status_word),
        estimated_time_s=_number(info.get("estimated_time"), 0, 86_400),
        credits_reserved=_number(usage.get("credits_reserved"), 0),
        credits_used=used,
        billing=charge,
    )


def read_tasks(data: Any) -> Iterator[Task]:
    """The tasks of a list, in any of its known shapes; what is no task in it is left out.

    Raises:
        Unreadable: `data` holds no list.
    """
    told = as_dict(data)
    rows = told.get("data") if told else data
    if page := as_dict(rows):
        rows = next((page[name] for name in ("tasks", "items", "list") if name in page), None)
    found = as_list(rows)
    if not found and rows != []:
        raise Unreadable("EvoLink's answer is not a list of tasks")
    for row in found:
        try:
            yield read_task(row)
        except Unreadable:
            continue


def read_balance(data: Any) -> Balance:
    """`GET /v1/credits`.

    Raises:
        Unreadable: `data` tells of no account and no key.
    """
    parts = as_dict(as_dict(data).get("data"))
    if any(not isinstance(parts.get(name) or {}, dict) for name in ("user", "token")):
        raise Unreadable("EvoLink's answer about credits makes no sense")
    user, token = as_dict(parts.get("user")), as_dict(parts.get("token"))
    if not (user or token):
        raise Unreadable("EvoLink's answer about credits makes no sense")
    amounts = [_amount(part.get(name)) for part in (user, token) for name in ("remaining_credits", "used_credits")]
    unlimited = token.get("unlimited_credits")
    return Balance(*amounts, key_unlimited=unlimited if isinstance(unlimited, bool) else None)


def is_task_id(value: object) -> bool:
    """Whether `value` has the form of a task id. Only such ids ever become part of a path."""
    return isinstance(value, str) and re.fullmatch(TASK_ID_PATTERN, value) is not None


def _results(data: dict[str, Any]) -> tuple[str, ...]:
    """Result URLs in order, each once: `results` first, `result_data` only where that is empty.

    What is not a link in one line of visible characters is left out: it would be shown, and could say anything.
    """
    urls = [item for item in as_list(data.get("results")) if isinstance(item, str)]
    if not urls:
        for item in as_list(data.get("result_data")) or [data.get("result_data")]:
            found = [as_dict(item).get(name) for name in ("url", "image_url")]
            urls += [url for url in found if isinstance(url, str)][:1]
    return tuple(dict.fromkeys(url for url in urls if len(url) <= URL_MAX and _LINK.fullmatch(url)))


def _error(error: Any, status: str) -> TaskError | None:
    told = as_dict(error)
    if told or error == {}:
        code = told.get("code")
        return TaskError(
            (word(code, 80) if isinstance(code, str | int) else "") or "unknown_error",
            harmless(told.get("message") or "no reason was given"),
        )
    if isinstance(error, str) and error:
        return TaskError("unknown_error", harmless(error))
    return TaskError("expired", "the task expired") if status == "expired" else None


def _number(value: Any, low: float = 0.0, high: float = math.inf) -> float | None:
    """`value` as a number clamped to [low, high]; None for anything that is not one."""
    if isinstance(value, str) and len(value) < 32:
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if (isinstance(value, int) and abs(value) > 10**15) or math.isnan(value):
        return None
    return min(max(value, low), high) if math.isfinite(value) else None


def _moment(value: Any) -> float | None:
    """Epoch seconds from a number of seconds or milliseconds, or from ISO 8601 (UTC where no zone is given)."""
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
    """The time that EvoLink writes into an id: task-unified-1757156493-…, in epoch seconds."""
    found = re.match(r"task-unified-([1-9]\d{9})-", task_id)
    return float(found[1]) if found else None


def _amount(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int) and abs(value) > 10**15:
        return None
    return float(value) if math.isfinite(value) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def as_dict(value: object) -> dict[str, Any]:
    """`value` if it is a JSON object, else an empty one."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def as_list(value: object) -> list[Any]:
    """`value` if it is a JSON list, else an empty one."""
    return cast("list[Any]", value) if isinstance(value, list) else []
