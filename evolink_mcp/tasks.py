"""What EvoLink says of a task, read leniently: unknown fields are ignored, odd values become None, nothing raises
but an answer without a task."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from evolink_mcp.errors import Charged, Unreadable
from evolink_mcp.models import TASK_ID_PATTERN, URL_MAX
from evolink_mcp.quoting import harmless

COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
SETTLED = frozenset({COMPLETED, FAILED, CANCELLED})
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
    used = _number(billing.get("charged_credits"))
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


def is_task_id(value: object) -> bool:
    """Whether `value` can be a task id: the only ids that ever reach a path."""
    return isinstance(value, str) and re.fullmatch(TASK_ID_PATTERN, value) is not None


def _results(data: dict[str, Any]) -> tuple[str, ...]:
    """Result URLs in order, each once: `results` first, `result_data` only where that is empty."""
    urls = [item for item in _list(data.get("results")) if isinstance(item, str)]
    if not urls:
        for item in _list(data.get("result_data")) or [data.get("result_data")]:
            found = [_dict(item).get(name) for name in ("url", "image_url")]
            urls += [url for url in found if isinstance(url, str)][:1]
    return tuple(dict.fromkeys(url for url in urls if url and len(url) <= URL_MAX))


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


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
