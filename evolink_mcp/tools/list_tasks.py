"""list_tasks: what was bought, and what else the account has, in one answer that every host accepts."""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Annotated, Any, Literal

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp_types import CallToolResult
from pydantic import BaseModel, Field, Strict

from evolink_mcp.api.costs import usd
from evolink_mcp.api.request import WHOLE, Arguments, OrNull, fold
from evolink_mcp.api.task import Task
from evolink_mcp.errors import Refused
from evolink_mcp.journal.entry import Entry
from evolink_mcp.studio.purchase import start_of_day
from evolink_mcp.studio.studio import Studio
from evolink_mcp.tools.adapter import READS, flat_tool, refuse_as, result
from evolink_mcp.tools.schemas import ErrorOut
from evolink_mcp.tools.task_answer import TaskOut, brief, task_out
from evolink_mcp.tools.task_words import task_text

ANSWER_MAX_CHARS = 600_000
LIST_MAX = 50

Status = Annotated[
    Literal["pending", "processing", "completed", "failed", "cancelled", "unknown"],
    fold("pending", "processing", "completed", "failed", "cancelled", "unknown"),
]


class ListTasksArguments(Arguments):
    """list_tasks."""

    limit: Annotated[int, Strict(), Field(ge=1, le=LIST_MAX, description="How many."), WHOLE] = 10
    status: Annotated[Status | OrNull, Field(description="Only tasks of this status.")] = None
    since: Annotated[str | OrNull, Field(description="Only from this time on, ISO 8601; local without a zone.")] = None
    until: Annotated[str | OrNull, Field(description="Only up to this time.")] = None
    sync: Annotated[
        bool,
        Strict(),
        Field(description="Also ask EvoLink for the account's tasks, and about unknown outcomes."),
    ] = False


class TaskList(BaseModel):
    """What list_tasks answers.

    `credits_today` is what was charged since local midnight, or reserved where the charge is not known yet. `synced`
    is null if EvoLink was not asked, and false if its list could not be read.
    """

    tasks: list[dict[str, Any]] = Field([], description="as get_task answers them, newest first")
    credits_today: float | None = None
    usd_today: float | None = None
    synced: bool | None = None
    error: ErrorOut | None = None
    notes: list[str] = []


def list_tasks_tool(studio: Studio) -> Tool:
    """The tool over one studio."""

    async def list_tasks(req: ListTasksArguments, ctx: Context[Any, Any]) -> CallToolResult:
        """What was bought with this server, newest first: pictures, paths, costs, and calls whose outcome is unknown.
        Use it to find a lost task id or file. Free of charge."""
        await studio.wake()
        elsewhere, problem = await studio.sync(req.limit) if req.sync else ([], None)
        out, text = await task_list(studio, req, elsewhere, problem)
        return result(text, out)

    return flat_tool(
        list_tasks, ListTasksArguments, TaskList, refuse_as(TaskList), title="List tasks", annotations=READS
    )


async def task_list(
    studio: Studio, req: ListTasksArguments, elsewhere: list[Task], problem: str | None
) -> tuple[TaskList, str]:
    """The journal's entries and the account's other tasks, newest first, as data and in words.

    `problem` is why the account's list could not be read, if so.
    """
    since, until = (instant(text) if text else None for text in (req.since, req.until))
    entries = await studio.journal.recent(req.limit, req.status, since, until)
    outs = [task_out(entry) for entry in entries]
    outs += [
        task_out(Entry.bought_elsewhere(task, task.created or 0.0))
        for task in elsewhere
        if req.status in (None, task.status) and (since or 0) <= (task.created or 0) <= (until or math.inf)
    ]
    outs = [brief(out) for out in sorted(outs, key=lambda out: out.created_at or "", reverse=True)]
    outs, left_out = _fitting(outs[: req.limit])
    notes = [f"The account's own list could not be had: {problem}."] if problem else []
    if elsewhere:
        notes.append(f"{len(elsewhere)} of the account's tasks were not bought here; get_task fetches their pictures.")
    if left_out:
        last = outs[-1].created_at if outs else "an earlier time"
        notes.append(f"{left_out} more did not fit into one answer: call again with until={last} for older ones.")
    spent = round(await studio.journal.spent_since(start_of_day(studio.now())), 4)
    lines = [f"{len(outs)} tasks, newest first. Credits charged or reserved today: {spent:g} (${usd(spent):g})."]
    for out in outs:
        lines += ["", task_text(out)]
    text = "\n".join([*lines, "", *(f"Note: {note}" for note in notes)]).rstrip()
    synced = None if not req.sync else problem is None
    tasks = [out.model_dump(mode="json") for out in outs]
    return TaskList(tasks=tasks, credits_today=spent, usd_today=usd(spent), synced=synced, notes=notes), text


def instant(text: str) -> float:
    """ISO 8601 as epoch seconds; local time where no zone is given, as for the caps, which count the user's days.

    Raises:
        Refused: it is no such time.
    """
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise Refused(
            "this is not an ISO 8601 time",
            code="invalid_arguments",
            advice="Give something like 2026-11-22 or 2026-11-22T10:00:00Z.",
        ) from error
    return moment.timestamp()


def _fitting(outs: list[TaskOut]) -> tuple[list[TaskOut], int]:
    """As many tasks as fit into an answer, each as data and as text; and how many were left out."""
    room = ANSWER_MAX_CHARS
    for number, out in enumerate(outs):
        room -= len(out.model_dump_json()) + len(json.dumps(task_text(out), ensure_ascii=False))
        if room < 0:
            return outs[:number], len(outs) - number
    return outs, 0
