"""Compare a journal of ten thousand tasks with an empty one, and a durable write with a plain write."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, middle, share
from benchmarks.processes import timed
from evolink_mcp.api.task import Task
from evolink_mcp.journal.entry import Entry, ResultImage, fingerprint, new_key
from evolink_mcp.journal.sqlite import FILE_NAME, SqliteJournal

TITLE = "Journal"
TASKS = 10_000
TEMPLATES = 20
NOW = 1_790_000_000.0
APART_S = 8.0  # ten thousand tasks in less than a day


def run(quick: bool) -> list[Figure]:
    times = 100 if quick else 400
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        empty, full = Path(name, "empty"), Path(name, "full")
        empty.mkdir()
        fill(full, TASKS)
        _opened(empty).close()
        starts = [(timed(lambda: _opened(full).close()), timed(lambda: _opened(empty).close())) for _ in range(15)]
        journal = _opened(full)
        ids = [f"task-unified-{number:010d}-benchmark" for number in range(0, TASKS, TASKS // times)]
        gets = [timed(lambda task_id=task_id: journal("by_task", task_id)) for task_id in ids]
        if journal("by_task", ids[1]) is None or len(journal("recent", 20)) != 20:
            raise RuntimeError("the journal was not filled as intended")
        lists = [timed(lambda: journal("recent", 20)) for _ in range(times)]
        orders = [
            timed(lambda: (journal("adopt"), journal("undelivered", ("f" * 64,), NOW - 86_400))) for _ in range(times)
        ]
        sums = [timed(lambda: journal("sums_since", NOW - 86_400)) for _ in range(times)]
        writes, bare = _writes(journal, Path(name), times)
        size = (full / FILE_NAME).stat().st_size / 1e6
        journal.close()
    extra = middle([full_s for full_s, _ in starts]) - middle([empty_s for _, empty_s in starts])
    return [
        Figure(f"extra start with {TASKS:,} tasks", extra * 1000, "ms", 20, f"the file has {size:.0f} MB"),
        Figure("an entry by its task ID", middle(gets) * 1000, "ms", 0.1),
        Figure("a list of 20 entries", middle(lists) * 1000, "ms", 1),
        Figure("reads before a purchase", middle(orders) * 1000, "ms", None, "dead owners, identical orders"),
        Figure("credits of the day", middle(sums) * 1000, "ms", None, f"of {TASKS:,} entries in that day"),
        Figure("a durable write", middle(writes) * 1000, "ms", 0.23,
               f"with the switch to the journal's thread; depends on the disk; 95 % within {share(writes, 0.95) * 1000:.2f} ms"),
        Figure("a durable write ÷ 4 KiB written and synced to a plain file", middle(writes) / middle(bare), "×", None,
               f"plain: {middle(bare) * 1000:.2f} ms"),
    ]  # fmt: skip


class Blocking:
    """Call a journal from synchronous code, on a separate event loop."""

    def __init__(self, folder: Path) -> None:
        self.journal = SqliteJournal(folder)
        self._loop = asyncio.new_event_loop()

    def __call__(self, name: str, *values: Any) -> Any:
        return self._loop.run_until_complete(getattr(self.journal, name)(*values))

    def close(self) -> None:
        self("close")
        self._loop.close()


def _opened(folder: Path) -> Blocking:
    """Open the journal and adopt the entries of dead servers, as a server does at its start."""
    journal = Blocking(folder)
    journal("adopt")
    return journal


def _entry(number: int) -> Entry:
    task_id = f"task-unified-{number:010d}-benchmark"
    prompt = f"A calm sunset over the ocean, picture {number}. " * 5
    request = {"model": "gpt-image-2", "prompt": prompt, "size": "16:9"}
    url = f"https://files.example.com/{task_id}/0.png"
    created = NOW - (TASKS - number) * APART_S
    return Entry(
        new_key(), "dead", "submitted", created, fingerprint(request), request, 3.9, None, "", "", created + 60,
        Task(task_id, "completed", 100.0, created, "gpt-image-2", (url,), credits_used=3.9),
        images=(ResultImage(0, url, created + 86_400, f"/pictures/{task_id}-0.png", "image/png", 2048, 1152, 10**6, "a" * 64),),
    )  # fmt: skip


def fill(folder: Path, count: int, account: str = "") -> None:
    """Write a few entries with the journal. Copy their rows with other IDs and times."""
    journal = Blocking(folder)
    for number in range(TEMPLATES):
        journal("intend", replace(_entry(number), account=account))
    journal.close()
    db = sqlite3.connect(folder / FILE_NAME, isolation_level=None)
    columns = [row[1] for row in db.execute("PRAGMA table_info(entries)")]
    rows = [dict(zip(columns, row, strict=True)) for row in db.execute("SELECT * FROM entries ORDER BY created_at")]
    db.execute("BEGIN")
    for number in range(TEMPLATES, count):
        row, like = rows[number % TEMPLATES], f"task-unified-{number % TEMPLATES:010d}-benchmark"
        task_id = f"task-unified-{number:010d}-benchmark"
        row = {k: v.replace(like, task_id) if isinstance(v, str) else v for k, v in row.items()}
        row |= {"key": new_key(), "created_at": NOW - (TASKS - number) * APART_S, "fingerprint": f"{number:064x}"}
        db.execute(f"INSERT INTO entries VALUES ({', '.join('?' * len(columns))})", [row[name] for name in columns])
    db.execute("COMMIT")
    db.close()


def _writes(journal: Blocking, folder: Path, times: int) -> tuple[list[float], list[float]]:
    """Return the times of durable updates of one entry and of plain writes of one page, alternating."""
    entry = replace(_entry(TASKS + 1), owner=journal.journal.owner, created_at=time.time())
    journal("intend", entry)
    handle = os.open(folder / "plain", os.O_CREAT | os.O_WRONLY, 0o600)
    page = b"x" * 4096

    def write_plain() -> None:
        os.write(handle, page)
        os.fsync(handle)

    writes: list[float] = []
    bare: list[float] = []
    for _ in range(times):
        writes.append(timed(lambda: journal("update", entry)))
        bare.append(timed(write_plain))
    os.close(handle)
    return writes, bare
