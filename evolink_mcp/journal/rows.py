"""An entry as a row of a table, the same in every database; and the text in which an entry is searched."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evolink_mcp.api.task import SETTLED, Task, TaskError
from evolink_mcp.errors import Problem
from evolink_mcp.journal.entry import Entry, Phase, ReferenceImage, ResultImage, Stage

log = logging.getLogger(__name__)

# Every column of an entry, and its value. `task`, `error` and `pictures` hold JSON; `task_id`, `status`, `closed` and
# `spent` repeat parts of it, so that SQL can search them and add them up.
COLUMNS: dict[str, Callable[[Entry], Any]] = {
    "key": lambda entry: entry.key,
    "account": lambda entry: entry.account,
    "owner": lambda entry: entry.owner,
    "caller": lambda entry: entry.caller,
    "phase": lambda entry: entry.phase,
    "created_at": lambda entry: entry.created_at,
    "fingerprint": lambda entry: entry.fingerprint,
    "task_id": lambda entry: entry.task_id,
    "status": lambda entry: entry.status,
    "closed": lambda entry: entry.stage is Stage.FINAL,
    "delivered_at": lambda entry: entry.delivered_at,
    "estimate": lambda entry: entry.estimate,
    "spent": lambda entry: entry.spent,
    "request": lambda entry: json.dumps(entry.request),
    "save_as": lambda entry: entry.save_as,
    "task": lambda entry: json.dumps(asdict(entry.task)) if entry.task else None,
    "error": lambda entry: json.dumps(asdict(entry.error)) if entry.error else None,
    "images": lambda entry: json.dumps([asdict(image) for image in entry.images]),
    "rule": lambda entry: entry.rule,
    "given": lambda entry: json.dumps([asdict(one) for one in entry.references]),
}
# What `Journal.update` writes; `Journal.keep` writes the pictures too.
STATE = ("phase", "task_id", "status", "closed", "spent", "task", "error")


def entry_of(row: Mapping[str, Any]) -> Entry:
    """The entry of a row of COLUMNS.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, RecursionError: the row makes no sense.
    """
    task, error = row["task"], row["error"]
    return Entry(
        key=row["key"],
        owner=row["owner"],
        phase=Phase(row["phase"]),
        created_at=row["created_at"],
        fingerprint=row["fingerprint"],
        request=dict(json.loads(row["request"])),
        estimate=row["estimate"],
        save_as=row["save_as"],
        account=row["account"],
        caller=row["caller"],
        delivered_at=row["delivered_at"],
        task=task_of(json.loads(task)) if task else None,
        error=Problem(**json.loads(error)) if error else None,
        images=tuple(ResultImage(**picture) for picture in json.loads(row["images"])),
        rule=row["rule"],
        references=tuple(ReferenceImage(**one) for one in json.loads(row["given"])),
    )


def readable(rows: Iterable[Any]) -> list[Entry]:
    """The entries of these rows; a row that makes no sense is named in the log and stays where it is."""
    entries: list[Entry] = []
    for row in rows:
        try:
            entries.append(entry_of(dict(row)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            log.error("the journal's entry %s is damaged and left out", row["key"])
    return entries


def visible(account: str, *, has_tenants: bool) -> str:
    """Return the SQL condition of the entries that this account sees.

    Without an account a server sees all entries, except if the journal is shared by tenants.
    """
    if account and not account.isalnum():
        raise ValueError("an account's mark has only letters and digits")
    return f"account = '{account}'" if account or has_tenants else "account = account"


# The SQL condition of what is bought or being bought and not finished by EvoLink. `closed` makes it quick.
UNDER_WAY = (
    f"NOT closed AND (phase IN ('intent', 'sending') OR task_id IS NOT NULL AND status NOT IN {tuple(sorted(SETTLED))})"
)


def selection(
    holds: str,
    status: str | None,
    since: float | None,
    until: float | None,
    words: tuple[str, ...],
    after: tuple[float, str] | None,
) -> tuple[str, list[Any]]:
    """The SQL condition of what `Journal.recent` asks for, with `?` for each of the values.

    `holds` is the condition that an entry has a folded word.
    """
    clauses = ["created_at >= ?", "created_at <= ?"]
    values: list[Any] = [since or 0.0, until if until is not None else 1e12]
    if status is not None:
        clauses.append("status = ?")
        values.append(status)
    for word in words:
        clauses.append(holds)
        values.append(folded(word))
    if after is not None:
        clauses.append("(created_at < ? OR created_at = ? AND key > ?)")
        values += [after[0], *after]
    return " AND ".join(clauses), values


def folded(text: str) -> str:
    """The text as it is searched: without case, each letter in one spelling."""
    return unicodedata.normalize("NFKC", text).casefold()


def searched(request: Any, pictures: Any, save_as: str | None, task_id: str | None) -> list[str]:
    """Where a word is searched, folded: the prompt, the names of the files and the task's id.

    `request` and `pictures` are what the columns of these names hold, as JSON values.
    """
    names = [Path(picture["path"]).name for picture in pictures if picture.get("path")]
    return [folded(str(text)) for text in (request.get("prompt", ""), *names, save_as or "", task_id or "")]


def task_of(data: dict[str, Any]) -> Task:
    """The task of its fields, as `dataclasses.asdict` gives them."""
    error, results = data.pop("error"), data.pop("results")
    return Task(**data, results=tuple(results), error=TaskError(**error) if error else None)
