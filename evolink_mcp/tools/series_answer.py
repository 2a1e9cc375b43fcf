"""The answer of generate_images: one short record for each picture of the series, the sums, and the same facts as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from evolink_mcp.api import costs
from evolink_mcp.api.task import COMPLETED, FAILED
from evolink_mcp.errors import EvolinkError
from evolink_mcp.sanitize import harmless, quoted
from evolink_mcp.tools.schemas import ErrorOut, error_out
from evolink_mcp.tools.sums import amount
from evolink_mcp.tools.task_answer import PROMPT_MAX_CHARS, TaskOut
from evolink_mcp.tools.task_text import sentence

RUNNING = "processing"
PARTIAL = "partial"


class SeriesOut(BaseModel):
    """The answer of generate_images.

    `status` is completed, processing (a picture is unfinished), partial (some failed) or failed. `tasks` has one record
    for each prompt in the order of the call, without empty fields. `files` are the paths of all saved pictures. `spent`
    is the sum of the confirmed charges, `reserved` the sum of the charges that are not decided, `at_most` the price
    ceiling of the whole series. `bill_difference` has the sentences about bills that differ from the computed price.
    `error` is set if nothing was bought.
    """

    status: str = FAILED
    tasks: list[dict[str, Any]] = []
    files: list[str] = []
    spent: dict[str, float] = {}
    reserved: dict[str, float] = {}
    at_most: dict[str, float] = {}
    bill_difference: str | None = None
    error: ErrorOut | None = None
    notes: list[str] = []


def series_out(
    prompts: Sequence[str],
    tasks: Sequence[TaskOut],
    reserved: float,
    ceiling: float,
    bill_texts: Sequence[str],
    notes: list[str],
) -> SeriesOut:
    """Return the answer about the tasks of a series, one for each prompt. `reserved` and `ceiling` are credits.

    `bill_texts` are the sentences about new prices of the account.
    """
    credits = round(sum(task.credits or 0.0 for task in tasks), 4)
    unsent = all(task.task_id is None and task.charged == "no" for task in tasks)
    return SeriesOut(
        status=_status(tasks),
        tasks=[_record(prompt, task) for prompt, task in zip(prompts, tasks, strict=True)],
        # resource_uri is null if the user moved or deleted the file.
        files=[image.path for task in tasks for image in task.images if image.path and image.resource_uri],
        spent=amount(credits),
        reserved=amount(round(reserved, 4)),
        at_most=amount(ceiling),
        bill_difference=_bill_difference(tasks, bill_texts),
        # Claude Code drops the structured content of an error, and with it the task IDs of paid pictures.
        error=tasks[0].error if unsent else None,
        notes=notes,
    )


def refusal_of_series(error: EvolinkError) -> SeriesOut:
    """Return the answer to a series of which nothing was bought."""
    return SeriesOut(error=error_out(error.problem))


def series_text(out: SeriesOut) -> str:
    """Return event, charge and next step of the series, then the facts of each picture."""
    bill = f"{out.bill_difference} " if out.bill_difference else ""
    lines = [bill + _headline(out), _money(out)]
    if out.error is not None:
        lines += [out.error.advice, f"Error code: {out.error.code}."]
    for number, task in enumerate(out.tasks, start=1):
        lines += ["", *_task_lines(number, task)]
    if out.notes:
        lines += ["", *(f"Note: {note}" for note in out.notes)]
    return "\n".join(lines)


def _is_saved(task: TaskOut) -> bool:
    return task.status == COMPLETED and any(image.resource_uri for image in task.images)


def _status(tasks: Sequence[TaskOut]) -> str:
    if all(map(_is_saved, tasks)):
        return COMPLETED
    if any(task.error is None and not _is_saved(task) for task in tasks):
        return RUNNING
    return PARTIAL if any(map(_is_saved, tasks)) else FAILED


def _bill_difference(tasks: Sequence[TaskOut], bill_texts: Sequence[str]) -> str | None:
    count = len([task for task in tasks if task.bill_difference])
    texts = [f"Bills that differ from the computed price: {count} of {len(tasks)}."] if count else []
    return " ".join([*texts, *bill_texts]) or None


def _record(prompt: str, task: TaskOut) -> dict[str, Any]:
    """Return the facts of one picture without empty ones."""
    facts: dict[str, Any] = {
        "prompt": harmless(prompt, PROMPT_MAX_CHARS),
        "task_id": task.task_id,
        "status": task.status,
        "progress": None if task.status == COMPLETED else task.progress,
        "charged": task.charged,
        "credits": task.credits,
        "usd": task.usd,
        "bill_difference": task.bill_difference,
        "guess": task.guess or None,
        "images": [image.model_dump(exclude_none=True) for image in task.images],
        "error": task.error.model_dump() if task.error else None,
        "next_action": task.next_action.model_dump() if task.next_action else None,
        "notes": task.notes,
    }
    return {name: value for name, value in facts.items() if value not in (None, [])}


def _headline(out: SeriesOut) -> str:
    if out.error is not None:
        return f"No picture was bought: {sentence(out.error.message)}"
    saved = len([task for task in out.tasks if task["status"] == COMPLETED and _has_file(task)])
    failed = len([task for task in out.tasks if "error" in task and not _has_file(task)])
    running = len(out.tasks) - saved - failed
    parts = [f"{saved} of {len(out.tasks)} pictures are saved"]
    parts += [f"{running} not finished yet"] * bool(running)
    parts += [f"{failed} failed, refused or unknown"] * bool(failed)
    return f"{', '.join(parts)} (status {out.status})."


def _has_file(task: dict[str, Any]) -> bool:
    return any("resource_uri" in image for image in task.get("images", []))


def _money(out: SeriesOut) -> str:
    if out.error is not None:
        return "Charged: no."
    reserved = out.reserved["credits"]
    undecided = f" Reserved for undecided charges: {costs.format_credits(reserved)}." if reserved else ""
    ceiling = f" The price ceiling was {costs.format_credits(out.at_most['credits'])}."
    return f"Charged: {costs.format_credits(out.spent['credits'])}.{undecided}{ceiling}"


def _task_lines(number: int, task: dict[str, Any]) -> list[str]:
    name = task.get("task_id", "no task id")
    bill = f" {task['bill_difference']}" if "bill_difference" in task else ""
    guess = ", unconfirmed match, a guess" if "guess" in task else ""
    progress = f", {task['progress']:.0f} %" if "progress" in task else ""
    credits = f", {costs.format_credits(task['credits'])}" if "credits" in task else ""
    lines = [
        f"{number}. {quoted(task['prompt'], PROMPT_MAX_CHARS)}: {task['status']}{progress}{guess}, {name}. "
        f"Charged: {task['charged']}{credits}.{bill}"
    ]
    for image in task.get("images", []):
        if "resource_uri" in image:
            lines += [image["path"]] if "path" in image else []
            lines.append(image["markdown"])
            lines.append(
                f"{image['width']}×{image['height']} pixels, {image['mime_type']}, {image.get('bytes', 0):,} bytes, "
                f"sha256 {image.get('sha256')}, {image['resource_uri']}"
            )
        if "error" in image:
            lines.append(f"Not saved: {sentence(image['error'])}")
        if "url" in image:
            lines.append(f"{image['url']} (link expires {image['url_expires_at']})")
    if "error" in task:
        error = task["error"]
        lines.append(f"{sentence(error['message'])} {error['advice']} Error code: {error['code']}.")
    if "next_action" in task:
        action = task["next_action"]
        lines.append(f"Next: call {action['tool']} with {json.dumps(action['arguments'])}.")
    lines += [f"Note: {note}" for note in task.get("notes", [])]
    return lines
