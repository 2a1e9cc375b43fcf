"""list_tasks: what was bought, and what the account knows besides, in one answer that every host bears."""

from __future__ import annotations

import json
import math
from datetime import datetime

from evolink_mcp.api.task import Task
from evolink_mcp.errors import Refused
from evolink_mcp.journal.entry import Entry
from evolink_mcp.studio.purchase import start_of_day
from evolink_mcp.studio.studio import Studio
from evolink_mcp.tools import task_answer
from evolink_mcp.tools.arguments import ListTasksArguments
from evolink_mcp.tools.shapes import TaskList, TaskOut

ANSWER_MAX_CHARS = 600_000


def task_list(
    studio: Studio, req: ListTasksArguments, elsewhere: list[Task], problem: str | None
) -> tuple[TaskList, str]:
    """The journal's entries and the account's other tasks, newest first; `problem` is why those could not be had."""
    since, until = (instant(text) if text else None for text in (req.since, req.until))
    entries = studio.journal.recent(req.limit, req.status, since, until)
    outs = [task_answer.task_out(entry, rule=studio.rule) for entry in entries]
    outs += [
        task_answer.task_out(Entry.bought_elsewhere(task, task.created or 0.0), rule=studio.rule)
        for task in elsewhere
        if req.status in (None, task.status) and (since or 0) <= (task.created or 0) <= (until or math.inf)
    ]
    outs = [task_answer.brief(out) for out in sorted(outs, key=lambda out: out.created_at or "", reverse=True)]
    outs, left_out = _fitting(outs[: req.limit])
    notes = [f"The account's own list could not be had: {problem}."] if problem else []
    if elsewhere:
        notes.append(f"{len(elsewhere)} of the account's tasks were not bought here; get_task fetches their pictures.")
    if left_out:
        last = outs[-1].created_at if outs else "an earlier time"
        notes.append(f"{left_out} more did not fit into one answer: call again with until={last} for older ones.")
    spent = round(studio.journal.spent_since(start_of_day(studio.now())), 4)
    lines = [f"{len(outs)} tasks, newest first. Credits charged or reserved today: {spent:g}."]
    for out in outs:
        lines += ["", task_answer.task_text(out)]
    text = "\n".join([*lines, "", *(f"Note: {note}" for note in notes)]).rstrip()
    synced = None if not req.sync else problem is None
    tasks = [out.model_dump(mode="json") for out in outs]
    return TaskList(tasks=tasks, credits_today=spent, synced=synced, notes=notes), text


def instant(text: str) -> float:
    """ISO 8601 as epoch seconds, local time where no zone is said: "today" is the user's day, as for the caps.

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
    """As many tasks as an answer bears, each told twice; and how many were left out."""
    room = ANSWER_MAX_CHARS
    for number, out in enumerate(outs):
        room -= len(out.model_dump_json()) + len(json.dumps(task_answer.task_text(out), ensure_ascii=False))
        if room < 0:
            return outs[:number], len(outs) - number
    return outs, 0
