"""Measure the journal of a team with many entries in PostgreSQL.

    python tests/teams/years.py [--entries 1000000] [--tenants 20]

It writes some entries with the journal and copies their rows with other IDs, words and times. The output is JSON: the
median and the slowest of `--repeats` calls in milliseconds, for each kind of list, and for the writes of an order.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import psycopg

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from child_processes import patient_times  # noqa: E402
from cluster import run_cluster  # noqa: E402

from evolink_mcp.api.task import Task  # noqa: E402
from evolink_mcp.journal.all_profiles import release_dead_servers  # noqa: E402
from evolink_mcp.journal.entry import Entry, ResultImage, fingerprint, new_key  # noqa: E402
from evolink_mcp.teams.database import Database, open_database  # noqa: E402
from evolink_mcp.teams.postgres import PostgresConnection, PostgresJournal  # noqa: E402

ACCOUNT = "a1"
INTERVAL_S = 30.0  # one order of the team each half minute is a million in a year
DAY_S = 86_400.0
STATUSES = ("completed",) * 49 + ("failed",)
# Copy the first entries of a tenant. Each word of the prompt that names a number gets the number of the copy.
COPY = """INSERT INTO evolink_entries ({columns}) SELECT {values}
    FROM generate_series({first}, {last}) AS number
    JOIN (SELECT *, row_number() OVER (ORDER BY created_at) - 1 AS place FROM evolink_entries) AS template
    ON template.place = number % {templates}"""
CHANGES = {
    "key": "'evomcp-' || md5(number::text)",
    "task_id": "'task-unified-' || lpad(number::text, 10, '0') || '-yearsago'",
    "created_at": "{now} - ({last} - number) * {apart}",
    "delivered_at": "{now} - ({last} - number) * {apart} + 60",
    "fingerprint": "md5(number::text) || md5(number::text)",
}
# `words` has the text of prompt, file names and task ID, in lower case.
NUMBERED = ("task", "request", "images", "words")
SUMS = """INSERT INTO evolink_sums SELECT profile, evolink_slot(created_at), sum(spent), sum(reserved)
    FROM evolink_entries GROUP BY 1, 2"""


def entry(number: int, created_at: float, status: str) -> Entry:
    task_id = f"task-unified-{number:010d}-yearsago"
    request = {
        "model": "gpt-image-2",
        "prompt": f"A calm sunset over the ocean, picture {number:010d}.",
        "size": "16:9",
    }
    url = f"https://files.example.com/{task_id}/0.png"
    images = (ResultImage(0, url, created_at + DAY_S, f"/pictures/{task_id}-0.png", "image/png", 2048, 1152, 10**6),)
    is_completed = status == "completed"
    task = Task(
        task_id, status, 100.0, created_at, "gpt-image-2", (url,) * is_completed, credits_used=3.9 * is_completed
    )
    return Entry(
        new_key(), "", "submitted", created_at, fingerprint(request), request, 3.9, None, ACCOUNT, "", created_at + 60,
        task, images=images if is_completed else (),
    )  # fmt: skip


async def fill(database: Database, url: str, count: int, tenants: int) -> None:
    templates = tenants * len(STATUSES)
    now = time.time()
    for number in range(templates):
        journal = PostgresJournal(database, ACCOUNT, profile=f"tenant{number % tenants}")
        await journal.intend(entry(number, now - (count - number) * INTERVAL_S, STATUSES[number // tenants]))
    await asyncio.to_thread(copy, url, templates, count - 1, now)


def copy(url: str, templates: int, last: int, now: float) -> None:
    """Copy the rows of the templates. Triggers and the index of words are off meanwhile, because one statement is faster."""
    with psycopg.connect(url, autocommit=True) as db:
        row = db.execute("SELECT pg_get_indexdef('evolink_entries_words'::regclass)").fetchone()
        columns = [
            name for (name,) in db.execute(
                "SELECT column_name FROM information_schema.columns WHERE table_name = 'evolink_entries'"
            )
        ]  # fmt: skip
        values = [
            CHANGES.get(name, f'template."{name}"').format(now=now, last=last, apart=INTERVAL_S) for name in columns
        ]
        values = [
            f"replace({value}, lpad(place::text, 10, '0'), lpad(number::text, 10, '0'))" if name in NUMBERED else value
            for name, value in zip(columns, values, strict=True)
        ]  # fmt: skip
        names = ", ".join(f'"{name}"' for name in columns)
        db.execute("DROP INDEX evolink_entries_words")
        db.execute("ALTER TABLE evolink_entries DISABLE TRIGGER USER")
        db.execute(COPY.format(
            columns=names, values=", ".join(values), first=templates, last=last, templates=templates
        ).encode())  # fmt: skip
        db.execute("TRUNCATE evolink_sums")
        db.execute(SUMS)
        db.execute("ALTER TABLE evolink_entries ENABLE TRIGGER USER")
        assert row is not None
        db.execute(row[0].encode())
        db.execute("VACUUM ANALYZE")


async def measure(repeats: int, action: Callable[[], Awaitable[Any]]) -> dict[str, float]:
    times: list[float] = []
    for _ in range(repeats):
        started_at = time.perf_counter()
        await action()
        times.append(1000 * (time.perf_counter() - started_at))
    return {"median_ms": median(times), "slowest_ms": max(times)}


async def run(url: str, count: int, tenants: int, repeats: int) -> dict[str, Any]:
    async with open_database(url, patient_times()) as database:
        started_at = time.perf_counter()
        await fill(database, url, count, tenants)
        fill_s = time.perf_counter() - started_at
        journal = PostgresJournal(database, ACCOUNT, profile="tenant7")
        now = time.time()
        number = next(number for number in range(count - 1, 0, -1) if number % tenants == 7)  # the newest of tenant7
        assert len(await journal.recent(10, words=("sunset",))) == 10
        assert len(await journal.recent(10, words=(f"{number:010d}",))) == 1

        async def order() -> None:
            new_entry = replace(
                entry(0, time.time(), "completed"), task=None, images=(), delivered_at=None, phase="intent"
            )
            new_entry = await journal.intend(
                replace(new_entry, key=new_key(), owner=journal.owner), day_limit=1e9, since=now, running_max=1000
            )
            await journal.update(sending := replace(new_entry, phase="sending"))
            task = Task(f"task-unified-{time.time_ns()}-neworder", "pending")
            await journal.update(replace(sending, phase="submitted", task=task))

        lists = {
            "10 entries": lambda: journal.recent(10),
            "10 failed entries": lambda: journal.recent(10, status="failed"),
            "10 entries of a week": lambda: journal.recent(10, since=now - 7 * DAY_S, until=now - DAY_S),
            "search: a word of all": lambda: journal.recent(10, words=("sunset",)),
            "search: a word of one": lambda: journal.recent(10, words=(f"{number:010d}",)),
            "search: a word of none": lambda: journal.recent(10, words=("unicorn",)),
            "credits of 30 days": lambda: journal.sums_since(now - 30 * DAY_S),
        }
        return {
            "entries": count,
            "filled_s": fill_s,
            "lists": {name: await measure(repeats, action) for name, action in lists.items()},
            "order": await measure(repeats, order),
            "search for dead servers": await measure(
                repeats,
                lambda: database.run(lambda db: release_dead_servers(PostgresConnection(db, database), database.owner)),
            ),
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--tenants", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    with run_cluster() as cluster:
        print(json.dumps(asyncio.run(run(cluster.database(), options.entries, options.tenants, options.repeats))))


if __name__ == "__main__":
    main()
