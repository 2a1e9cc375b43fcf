"""Measure the journal with 10 to 1,000,000 entries of one profile and account, and calls of a server with it."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, middle, share
from benchmarks.processes import SERVERS, Pipe, Standin, environment, standin, timed
from evolink_mcp.api.task import Task
from evolink_mcp.journal.entry import Entry, ResultImage, account_id_of, fingerprint, new_key
from evolink_mcp.journal.sqlite import FILE_NAME, SqliteJournal

TITLE = "Journal"
SIZES = (10, 1_000, 10_000, 100_000, 1_000_000)
QUICK_SIZES = (10, 1_000, 10_000)
TARGET_SIZE = 100_000  # with ten times as many entries each target is twice as high
TEMPLATES = 10
INTERVAL_S = 8.0  # ten thousand tasks in less than a day
DAY_S = 86_400.0
MONTH_S = 30 * DAY_S
ROWS_PER_TRANSACTION = 100_000


def run(quick: bool) -> list[Figure]:
    times = 50 if quick else 200
    sizes = QUICK_SIZES if quick else SIZES
    figures: list[Figure] = []
    with standin("dot") as evolink:
        for count in sizes:
            with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
                env = environment(Path(name), evolink.port)
                fill(Path(env["EVOLINK_MCP_DATA_DIR"]), count, _account(env))
                figures += _figures(env, count, times)
                figures += _calls(env, evolink, count, times // 10)
    return figures


def _target_factor(count: int) -> float:
    return 2.0 if count > TARGET_SIZE else 1.0


def _account(env: dict[str, str]) -> str:
    return account_id_of(env["EVOLINK_API_KEY"], env["EVOLINK_BASE_URL"])


def _figures(env: dict[str, str], count: int, times: int) -> list[Figure]:
    """Return the times of the journal with `count` entries."""
    folder = Path(env["EVOLINK_MCP_DATA_DIR"])
    empty = folder.with_name("empty")
    account = _account(env)
    factor = _target_factor(count)
    _open_journal(empty, account).close()
    now = time.time()
    starts = [
        (timed(lambda: _open_journal(folder, account).close()), timed(lambda: _open_journal(empty, account).close()))
        for _ in range(11)
    ]
    journal = _open_journal(folder, account)
    if (
        len(journal("recent", 20)) != min(20, count)
        or len(journal("recent", 20, words=(f"picture {count - 1}.",))) != 1
    ):
        raise RuntimeError("the journal was not filled as intended")

    def median_ms(action: Callable[[], object]) -> float:
        return middle([timed(action) for _ in range(times)]) * 1000

    task_id = f"task-unified-{count // 2:010d}-benchmark"
    extra_s = middle([full_s for full_s, _ in starts]) - middle([empty_s for _, empty_s in starts])
    with_entries = f"{count:,} entries: "
    figures = [
        Figure(f"{with_entries}extra start", extra_s * 1000, "ms", 20 * factor,
               f"{(folder / FILE_NAME).stat().st_size / 1e6:.0f} MB"),
        Figure(f"{with_entries}an entry by its task ID", median_ms(lambda: journal("by_task", task_id)), "ms", 0.1 * factor),
        Figure(f"{with_entries}a list of 20", median_ms(lambda: journal("recent", 20)), "ms", factor),
        Figure(f"{with_entries}a list of 20 failed ones", median_ms(lambda: journal("recent", 20, "failed")), "ms",
               factor),
        Figure(f"{with_entries}a search that finds one", median_ms(lambda: journal("recent", 20, words=("picture 7.",))), "ms",
               50 * factor),
        Figure(f"{with_entries}a search without a match", median_ms(lambda: journal("recent", 20, words=("unicorn",))), "ms",
               50 * factor),
        Figure(f"{with_entries}a search for two letters without a match",
               middle([timed(lambda: journal("recent", 20, words=("qj",))) for _ in range(3)]) * 1000, "ms", None,
               "no index has words of two letters"),
        Figure(f"{with_entries}credits of 30 days", median_ms(lambda: journal("sums_since", now - MONTH_S)), "ms"),
        Figure(f"{with_entries}reads before a purchase",
               median_ms(lambda: (journal("adopt"), journal("undelivered", ("f" * 64,), now - DAY_S))), "ms"),
    ]  # fmt: skip
    write_s, plain_s = _writes(journal, folder.parent, account, times)
    figures += [
        Figure(f"{with_entries}a durable write", middle(write_s) * 1000, "ms", 0.23 * factor,
               f"95 % within {share(write_s, 0.95) * 1000:.2f} ms"),
        Figure(f"{with_entries}a durable write ÷ 4 KiB written and synced to a plain file", middle(write_s) / middle(plain_s),
               "×", None, f"plain: {middle(plain_s) * 1000:.2f} ms"),
        Figure(f"{with_entries}close", timed(journal.close) * 1000, "ms", 50 * factor),
    ]  # fmt: skip
    return figures


def _calls(env: dict[str, str], evolink: Standin, count: int, times: int) -> list[Figure]:
    """Return the times of calls of a real server with `count` entries, over stdio."""
    lists: list[float] = []
    searches: list[float] = []
    orders: list[float] = []
    factor = _target_factor(count)
    with Pipe(SERVERS["ours"], env) as pipe:
        pipe.initialize()
        pipe.wait_until_ready()
        pipe.call("list_tasks", {})
        for number in range(times):
            lists.append(timed(lambda: pipe.call("list_tasks", {"limit": 10})))
            searches.append(timed(lambda: pipe.call("list_tasks", {"query": "unicorn"})))
            called_at = time.time()
            prompt = f"sim:slow=0.1 owl {number} of {count}"
            answer = pipe.call("generate_image", {"prompt": prompt, "wait_seconds": 60})
            orders.append(evolink.record()["purchased_at"][answer["structuredContent"]["task_id"]] - called_at)
        assert pipe.process.stdin is not None
        pipe.process.stdin.close()
        exit_s = timed(lambda: pipe.process.wait(30))
    server = f"a server with {count:,} entries: "
    return [
        Figure(f"{server}list_tasks of 10", middle(lists) * 1000, "ms", 10 * factor),
        Figure(
            f"{server}list_tasks without a match",
            middle(searches) * 1000,
            "ms",
            50 * factor,
            "with the search for near words",
        ),
        Figure(f"{server}from the call to the POST", middle(orders) * 1000, "ms", 15 * factor),
        Figure(f"{server}from the end of its input to its exit", exit_s * 1000, "ms", 50 * factor),
    ]


class Blocking:
    """Call a journal from synchronous code, on a separate event loop."""

    def __init__(self, folder: Path, account: str) -> None:
        self.journal = SqliteJournal(folder, account)
        self._loop = asyncio.new_event_loop()

    def __call__(self, name: str, *values: Any, **options: Any) -> Any:
        return self._loop.run_until_complete(getattr(self.journal, name)(*values, **options))

    def close(self) -> None:
        self("close")
        self._loop.close()


def _open_journal(folder: Path, account: str) -> Blocking:
    """Open the journal and adopt the entries of dead servers, as a server does at its start."""
    journal = Blocking(folder, account)
    journal("adopt")
    return journal


def _entry(number: int, created_at: float, account: str) -> Entry:
    task_id = f"task-unified-{number:010d}-benchmark"
    prompt = "A calm sunset over the ocean. " * 5 + f"This is picture {number}."
    request = {"model": "gpt-image-2", "prompt": prompt, "size": "16:9"}
    url = f"https://files.example.com/{task_id}/0.png"
    path = f"/pictures/{task_id}-0.png"
    return Entry(
        new_key(), "", "submitted", created_at, fingerprint(request), request, 3.9, None, account, "", created_at + 60,
        Task(task_id, "completed", 100.0, created_at, "gpt-image-2", (url,), credits_used=3.9),
        images=(ResultImage(0, url, created_at + DAY_S, path, "image/png", 2048, 1152, 10**6, "a" * 64),),
    )  # fmt: skip


def fill(folder: Path, count: int, account: str) -> None:
    """Write a few entries with the journal. Copy their rows with other IDs, words and times."""
    now = time.time()
    journal = Blocking(folder, account)
    for number in range(min(TEMPLATES, count)):
        journal("intend", _entry(number, now - (count - number) * INTERVAL_S, account))
    journal.close()
    db = sqlite3.connect(folder / FILE_NAME, isolation_level=None)
    columns = [row[1] for row in db.execute("PRAGMA table_info(entries)")]
    rows = [dict(zip(columns, row, strict=True)) for row in db.execute("SELECT * FROM entries ORDER BY created_at")]
    db.execute("BEGIN")
    for number in range(TEMPLATES, count):
        template = number % TEMPLATES
        row = {
            name: value.replace(f"{template:010d}-benchmark", f"{number:010d}-benchmark")
            .replace(f"picture {template}.", f"picture {number}.") if isinstance(value, str) else value
            for name, value in rows[template].items()
        }  # fmt: skip
        row |= {"key": new_key(), "created_at": now - (count - number) * INTERVAL_S, "fingerprint": f"{number:064x}"}
        db.execute(f"INSERT INTO entries VALUES ({', '.join('?' * len(columns))})", [row[name] for name in columns])
        if number % ROWS_PER_TRANSACTION == 0:
            db.execute("COMMIT")
            db.execute("BEGIN")
    db.execute("COMMIT")
    db.close()


def _writes(journal: Blocking, folder: Path, account: str, times: int) -> tuple[list[float], list[float]]:
    """Return the times of durable updates of one entry and of plain writes of one page, alternating."""
    entry = replace(_entry(10**9, time.time(), account), owner=journal.journal.owner)
    journal("intend", entry)
    handle = os.open(folder / "plain", os.O_CREAT | os.O_WRONLY, 0o600)
    page = b"x" * 4096

    def write_plain() -> None:
        os.write(handle, page)
        os.fsync(handle)

    writes: list[float] = []
    plain_writes: list[float] = []
    for _ in range(times):
        writes.append(timed(lambda: journal("update", entry)))
        plain_writes.append(timed(write_plain))
    os.close(handle)
    return writes, plain_writes
