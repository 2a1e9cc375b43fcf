"""What EvoLink says of a task, read leniently: unknown fields are ignored, odd values become None, nothing raises
but an answer without a task."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from evolink_mcp.api.request import TASK_ID_PATTERN, URL_MAX
from evolink_mcp.errors import Charged, Unreadable
from evolink_mcp.sanitize import harmless

COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
SETTLED = frozenset({COMPLETED, FAILED, CANCELLED})
_LINK = re.compile(r"https?://[\x21-\x7e\u00a1-\u1fff\u3001-\ud7ff\uf900-\ufdff]+")
_SPELLINGS = {"canceled": CANCELLED, "expired": FAILED, "error": FAILED}


@dataclass(frozen=True, slots=True)
class TaskError:
    """Why a task failed, in EvoLink's words (already made harmless)."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Task:
    """One state of a task at EvoLink, as far as it could be read; `progress` in 0..100, times in seconds."""

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

    @property
    def settled(self) -> bool:
        """Whether nothing more will happen to it at EvoLink."""
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
        Unreadable: `data` is not an object with a usable id.
    """
    if isinstance(data, dict) and not isinstance(data.get("id"), str) and isinstance(data.get("data"), dict):
        data = data["data"]
    if not isinstance(data, dict) or not is_task_id(data.get("id")):
        raise Unreadable("EvoLink's answer names no task")
    info, usage, billing = (_dict(data.get(name)) for name in ("task_info", "usage", "billing"))
    word = harmless(data["status"], 40).lower() if isinstance(data.get("status"), str) else "pending"
    # Until it is charged, this figure is a placeholder.
    used = _number(billing.get("charged_credits")) if billing.get("charge_status") == "charged" else None
    if used is None:
        used = _number(usage.get("credits_used"))
    if used is None:
        used = _number(_dict(usage.get("cost")).get("credits"))
    return Task(
        id=data["id"],
        status=_SPELLINGS.get(word, word),
        progress=_number(data.get("progress"), 0, 100),
        created=_number(data.get("created"), 0, 1e11),
        model=harmless(data["model"], 80) if isinstance(data.get("model"), str) else None,
        results=_results(data),
        error=_error(data.get("error"), word),
        estimated_time_s=_number(info.get("estimated_time"), 0, 86_400),
        credits_reserved=_number(usage.get("credits_reserved"), 0),
        credits_used=used,
        billing=billing.get("charge_status") if isinstance(billing.get("charge_status"), str) else None,
    )


def read_tasks(data: Any) -> Iterator[Task]:
    """The tasks of a list, in any of its known shapes; what is no task in it is left out.

    Raises:
        Unreadable: `data` holds no list.
    """
    rows = data.get("data") if isinstance(data, dict) else data
    if isinstance(rows, dict):
        rows = rows.get("tasks") or rows.get("items") or rows.get("list")
    if not isinstance(rows, list):
        raise Unreadable("EvoLink's answer is not a list of tasks")
    for row in rows:
        try:
            yield read_task(row)
        except Unreadable:
            continue


def read_balance(data: Any) -> Balance:
    """`GET /v1/credits`.

    Raises:
        Unreadable: `data` tells of no account and no key.
    """
    data = data.get("data") if isinstance(data, dict) else None
    user, token = ((data.get(k) if isinstance(data, dict) else None) or {} for k in ("user", "token"))
    if not isinstance(user, dict) or not isinstance(token, dict) or not (user or token):
        raise Unreadable("EvoLink's answer about credits makes no sense")
    amounts = [_amount(part.get(name)) for part in (user, token) for name in ("remaining_credits", "used_credits")]
    unlimited = token.get("unlimited_credits")
    return Balance(*amounts, key_unlimited=unlimited if isinstance(unlimited, bool) else None)


def is_task_id(value: object) -> bool:
    """Whether `value` can be a task id: the only ids that ever reach a path."""
    return isinstance(value, str) and re.fullmatch(TASK_ID_PATTERN, value) is not None


def _results(data: dict[str, Any]) -> tuple[str, ...]:
    """Result URLs in order, each once: `results` first, `result_data` only where that is empty.

    What is no link in one line of visible characters is left out: it would be shown, and could say anything.
    """
    urls = [item for item in _list(data.get("results")) if isinstance(item, str)]
    if not urls:
        for item in _list(data.get("result_data")) or [data.get("result_data")]:
            found = [_dict(item).get(name) for name in ("url", "image_url")]
            urls += [url for url in found if isinstance(url, str)][:1]
    return tuple(dict.fromkeys(url for url in urls if len(url) <= URL_MAX and _LINK.fullmatch(url)))


def _error(error: Any, status: str) -> TaskError | None:
    if isinstance(error, dict):
        code = error.get("code")
        return TaskError(
            harmless(code, 80) if isinstance(code, str | int) and code != "" else "unknown_error",
            harmless(error.get("message") or "no reason was given"),
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
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    if isinstance(value, int) and abs(value) > 10**15:
        return None
    return min(max(value, low), high) if math.isfinite(value) else None


def _amount(value: Any) -> float | None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if ok else None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
