"""list_tasks: the journal's purchases and the account's other tasks, within every host's size limit."""

from __future__ import annotations

import base64
import difflib
import json
import math
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import anyio.to_thread
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp_types import CallToolResult
from pydantic import BaseModel, Field, Strict

from evolink_mcp.api.request import WHOLE, Arguments, OrNull, ignore_case
from evolink_mcp.api.task import Task
from evolink_mcp.errors import Refused
from evolink_mcp.journal.entry import Entry
from evolink_mcp.journal.journal import Sums
from evolink_mcp.journal.rows import fold
from evolink_mcp.sanitize import harmless, quoted
from evolink_mcp.studio.studio import Studio
from evolink_mcp.studio.times import instant
from evolink_mcp.tools.adapter import READS, flat_tool, format_error_as, result
from evolink_mcp.tools.schemas import ErrorOut
from evolink_mcp.tools.sums import amount, periods, sums_text
from evolink_mcp.tools.task_answer import list_facts, shorten_request, split_price_changes, task_out
from evolink_mcp.tools.task_text import row_text, task_text
from evolink_mcp.tools.waiting import mcp_host_of

# The summary, the notes and the frame of an answer, in characters.
SUMMARY_MAX_CHARS = 10_000
LIST_MAX = 50
# A search without a match suggests words from this many entries, for this many words of the query. Each of these words costs up
# to 50 ms of CPU time.
HINT_ENTRIES = 1_000
HINT_WORDS = 3
NEAREST_CUTOFF = 0.6  # similarity of a suggestion
WORD = re.compile(r"[^\W\d_]{3,}")

# Models that fill in every argument need a member for the default. Gemini refuses an empty string in an enum.
ANY_STATUS = "any"
Status = Annotated[
    Literal["any", "pending", "processing", "completed", "failed", "cancelled", "unknown"],
    ignore_case("any", "pending", "processing", "completed", "failed", "cancelled", "unknown"),
]


class ListTasksArguments(Arguments):
    """The arguments of list_tasks."""

    limit: Annotated[int, Strict(), Field(ge=1, le=LIST_MAX, description="Number of tasks."), WHOLE] = 10
    status: Annotated[Status, Field(description="Status of the tasks.")] = ANY_STATUS
    query: Annotated[str | OrNull, Field(description="Words to find.")] = None
    since: Annotated[str | OrNull, Field(description="ISO 8601, today, yesterday or 7d.")] = None
    until: Annotated[str | OrNull, Field(description="As since.")] = None
    cursor: Annotated[str | OrNull, Field(description="next_cursor of an answer.")] = None
    detail: Annotated[bool, Strict(), Field(description="Complete tasks.")] = False
    sync: Annotated[bool, Strict(), Field(description="Resolve unknown outcomes with EvoLink's list.")] = False


class TaskList(BaseModel):
    """The answer of list_tasks.

    `spent` has the confirmed charges since local midnight ("today"), and of the last 7 and 30 days. `reserved` has the
    price ceilings of undecided charges. `synced` is null without `sync`, and false if EvoLink's list could not be read.
    """

    tasks: list[dict[str, Any]] = []
    next_cursor: str | None = None
    spent: dict[str, dict[str, float]] = {}
    reserved: dict[str, dict[str, float]] = {}
    synced: bool | None = None
    error: ErrorOut | None = None
    notes: list[str] = []


def list_tasks_tool(studio: Studio) -> Tool:
    """Return the tool."""

    async def list_tasks(req: ListTasksArguments, ctx: Context[Any, Any]) -> CallToolResult:
        """List purchases, newest first: prompts, files, costs, unknown outcomes. Finds a picture or a lost task ID by
        words. Free of charge."""
        # With SQLite a server adopts later entries of dead servers only at a call.
        await studio.wake()
        external_tasks, problem = await studio.sync(req.limit) if req.sync else ([], None)
        out, text = await task_list(studio, req, external_tasks, problem, mcp_host_of(ctx).answer_max)
        return result(text, out)

    return flat_tool(
        list_tasks, ListTasksArguments, TaskList, format_error_as(TaskList), title="List tasks", annotations=READS
    )


async def task_list(
    studio: Studio, req: ListTasksArguments, external_tasks: list[Task], problem: str | None, answer_max: int
) -> tuple[TaskList, str]:
    """Return the journal's entries and the account's other tasks, newest first, as data and as text.

    `problem` is the reason why the account's list could not be read. The answer has at most `answer_max` characters.

    Raises:
        Refused: a time or the cursor is invalid.
    """
    now = studio.now()
    since = instant(req.since, now) if req.since else None
    until = instant(req.until, now, end=True) if req.until else None
    words = tuple((req.query or "").split())
    after = _position(req.cursor) if req.cursor else None
    status = None if req.status == ANY_STATUS else req.status
    # One entry more than the page shows whether a next page exists.
    entries = await studio.journal.recent(req.limit + 1, status, since, until, words, after)
    listed = entries[: req.limit]
    # Tasks from EvoLink's list have no prompt to search, and no position for a cursor.
    if after is None and not words:
        external = [Entry.external(task, task.created or 0.0) for task in external_tasks]
        listed += [
            entry
            for entry in external
            if status in (None, entry.status) and (since or 0) <= entry.created_at <= (until or math.inf)
        ]
        listed.sort(key=lambda entry: entry.created_at, reverse=True)
    visible = await studio.image_store.entries_for_caller(listed)
    texts, tasks = _within_limit(visible, studio.has_other_key, answer_max - SUMMARY_MAX_CHARS, detail=req.detail)
    # The cursor is a position in the journal, so a task of EvoLink's list cannot be one.
    last = next((entry for entry in reversed(listed[: len(texts)]) if entry.is_written), None)
    has_more = len(texts) < len(listed) or len(entries) > req.limit
    sums = {name: await studio.journal.sums_since(start) for name, start in periods(now).items()}
    bill_texts, rule_texts = split_price_changes(await studio.take_price_changes())
    notes = [*bill_texts, *rule_texts]
    if words and not entries and after is None:
        notes.append(await _search_hint(studio, words))
    if problem:
        notes.append(f"EvoLink's list of the account's tasks could not be read: {problem}.")
    if external_tasks:
        notes.append(
            f"{len(external_tasks)} of the account's tasks were not bought with this server. get_task fetches their pictures."
        )
    out = TaskList(
        tasks=tasks,
        next_cursor=_cursor(last) if has_more and last is not None else None,
        spent={name: amount(each.spent) for name, each in sums.items()},
        reserved={name: amount(each.reserved) for name, each in sums.items()},
        synced=None if not req.sync else problem is None,
        notes=notes,
    )
    return out, _text(req, out, texts, sums, bill_texts)


async def _search_hint(studio: Studio, words: tuple[str, ...]) -> str:
    """Return the nearest words of earlier purchases, for a search without a match."""
    texts = await studio.journal.recent_words(HINT_ENTRIES)
    return await anyio.to_thread.run_sync(_nearest_words, words, texts)


def _nearest_words(words: tuple[str, ...], texts: list[str]) -> str:
    unknown = [word for word in words if not any(fold(word) in text for text in texts)]
    if not unknown:
        return "Each word occurs in a task, but no task has all of them. Search for fewer words."
    # Without digits, because numbers and task IDs are no suggestions.
    vocabulary = set(WORD.findall(" ".join(texts)))
    hints: list[str] = []
    for word in unknown[:HINT_WORDS]:
        nearest = difflib.get_close_matches(fold(word), vocabulary, n=3, cutoff=NEAREST_CUTOFF)
        meant = f" Did you mean {' or '.join(map(quoted, nearest))}?" if nearest else ""
        hints.append(f"No task has the word {quoted(word, 40)}.{meant}")
    return " ".join(hints)


def _text(
    req: ListTasksArguments, out: TaskList, texts: list[str], sums: dict[str, Sums], bill_texts: list[str]
) -> str:
    """Return the list as text. `bill_texts` are the notes of its first line."""
    filters = [
        f"{name} “{harmless(value, 80)}”"
        for name in ("status", "query", "since", "until")
        if (value := getattr(req, name)) and (name, value) != ("status", ANY_STATUS)
    ]
    count = {0: "No task", 1: "1 task"}.get(len(texts), f"{len(texts)} tasks")
    condition = f" with {', '.join(filters)}" if filters else ""
    head = f"{count}{condition}{', newest first' if len(texts) > 1 else ''}. {sums_text(sums)}"
    head = " ".join([*bill_texts, head])
    notes = [f"Note: {note}" for note in out.notes if note not in bill_texts]
    sync_report = ["EvoLink's list of the account's tasks was read."] if out.synced else []
    older = [f"For older tasks call list_tasks with cursor={json.dumps(out.next_cursor)}."] if out.next_cursor else []
    return "\n\n".join([head, *texts, *older, *sync_report, *notes])


def _within_limit(
    entries: list[Entry], has_other_key: Callable[[Entry], bool], remaining_chars: int, *, detail: bool
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return as many entries as fit into an answer, as text and as data.

    With `detail` an entry that is too large for every answer is a short row.
    """
    texts: list[str] = []
    tasks: list[dict[str, Any]] = []
    total_chars = remaining_chars
    for entry in entries:
        data, text = _facts_of(entry, is_other=has_other_key(entry), detail=detail)
        # Otherwise no page could contain this entry, and the list would end before it.
        if detail and _chars_of(data, text) > total_chars:
            data, text = _facts_of(entry, is_other=has_other_key(entry), detail=False)
        remaining_chars -= _chars_of(data, text)
        if remaining_chars < 0:
            break
        texts.append(text)
        tasks.append(data)
    return texts, tasks


def _facts_of(entry: Entry, *, is_other: bool, detail: bool) -> tuple[dict[str, Any], str]:
    """Return an entry as data and as text. `is_other`: another key bought it."""
    if not detail:
        data = list_facts(entry, has_other_key=is_other)
        return data, row_text(data)
    task = shorten_request(task_out(entry, has_other_key=is_other))
    return task.model_dump(mode="json"), task_text(task)


def _chars_of(data: dict[str, Any], text: str) -> int:
    # json.dumps writes other scripts as escapes, so this is an upper limit of the answer's size.
    return len(json.dumps(data)) + len(json.dumps(text))


def _cursor(entry: Entry) -> str:
    """Return the entry's position in the list as one opaque word."""
    # Several entries can have the same time, so the position also needs the key.
    return base64.urlsafe_b64encode(json.dumps([entry.created_at, entry.key]).encode()).decode().rstrip("=")


def _position(cursor: str) -> tuple[float, str]:
    try:
        created, key = json.loads(base64.urlsafe_b64decode(cursor.strip() + "=" * (-len(cursor.strip()) % 4)))
        return float(created), str(key)
    # A forged cursor may contain JSON of any shape and depth.
    except (ValueError, TypeError, RecursionError) as error:
        raise Refused(
            "the cursor is not from list_tasks",
            code="invalid_arguments",
            advice="Pass next_cursor of an answer unchanged, or leave cursor out.",
        ) from error
