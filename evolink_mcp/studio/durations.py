"""How long this account's tasks took lately: kept in the journal, so that every server knows it."""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from typing import Any, cast

from evolink_mcp.api.models import duration_group
from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.entry import Entry
from evolink_mcp.journal.journal import Journal
from evolink_mcp.studio.schedule import Expected, Taken, expected

log = logging.getLogger(__name__)

FACT = "durations"
KEPT = 60
WRITTEN_EVERY = 5  # tasks
TAKES_AT_LEAST_S = 1.0


class DurationHistory:
    """What a task's duration is expected to be, learned from those that were watched from start to end."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._taken: deque[Taken] = deque(maxlen=KEPT)
        self._unwritten = 0
        self._is_read = False

    async def expected(self, entry: Entry) -> Expected:
        """How long the task of this entry will take."""
        if not self._is_read:
            self._is_read = True
            await self._read()
        estimate_s = entry.task.estimated_time_s if entry.task else None
        return expected(_quality(entry), estimate_s, self._taken)

    async def add(self, entry: Entry, took_s: float) -> None:
        """The task of this entry was completed `took_s` seconds after it was accepted."""
        if took_s < TAKES_AT_LEAST_S:
            return
        self._taken.append((_quality(entry), entry.task.estimated_time_s if entry.task else None, took_s))
        self._unwritten += 1
        if self._unwritten >= WRITTEN_EVERY:
            await self.write()

    async def write(self) -> None:
        """Note what was learned since it was noted last. If the journal cannot be written, it is known here only."""
        if self._unwritten:
            self._unwritten = 0
            try:
                await self._journal.save_fact(FACT, json.dumps(list(self._taken)))
            except JournalUnwritable as error:
                log.info("%s", error.message)

    async def _read(self) -> None:
        try:
            found: object = json.loads(await self._journal.fact(FACT) or "[]")
        except (JournalUnwritable, ValueError, RecursionError):
            return
        for row in cast("list[Any]", found) if isinstance(found, list) else []:
            if (taken := _taken(row)) is not None:
                self._taken.append(taken)


def _quality(entry: Entry) -> str:
    return duration_group(entry.request.get("model"), entry.request.get("quality"))


def _taken(row: Any) -> Taken | None:
    """One row of what was written down; None if it makes no sense."""
    try:
        quality, estimate_s, took_s = row
        estimate_s = None if estimate_s is None else float(estimate_s)
        took_s = float(took_s)
    except (TypeError, ValueError, OverflowError):
        return None
    fits = math.isfinite(took_s) and took_s >= TAKES_AT_LEAST_S and math.isfinite(estimate_s or 0.0)
    return (str(quality), estimate_s, took_s) if fits else None
