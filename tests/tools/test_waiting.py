"""A call follows a job: rising progress, the task ID first, a heartbeat, and an end of the wait in time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import anyio
import pytest
from conftest import Open, World
from faulty_journal import FaultyJournal

from evolink_mcp.api.task import Task
from evolink_mcp.call_context import remaining_s
from evolink_mcp.journal.entry import Entry
from evolink_mcp.studio.jobs import Job
from evolink_mcp.tools.waiting import follow

pytestmark = pytest.mark.anyio
TASK = "task-unified-1790000000-abcdefgh"


class ProgressLog:
    """The progress notifications of a call: (progress, message)."""

    def __init__(self) -> None:
        self.reports: list[tuple[float, str]] = []

    async def __call__(self, progress: float, total: float, message: str) -> None:
        assert total == 100
        self.reports.append((progress, message))

    @property
    def is_rising(self) -> bool:
        values = [value for value, _ in self.reports]
        return all(a < b for a, b in pairwise(values))


def job(**task: object) -> Job:
    return Job(Entry("k" * 16, "owner", "submitted", 0.0, task=Task(TASK, **task)))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_progress_rises_to_100_and_begins_with_the_task_id(world: World, mode: str) -> None:
    log = ProgressLog()
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            answer = await client.call_tool("generate_image", {"prompt": "a fox"}, progress_callback=log)
    assert log.reports[0][1].startswith(answer.structured_content["task_id"])
    assert log.is_rising
    assert log.reports[-1][0] == 100


@pytest.mark.parametrize("order", ["sim:backwards", "sim:unknown-status", "sim:poll-500", "sim:poll-429"])
async def test_progress_rises_with_odd_answers_of_evolink(world: World, order: str) -> None:
    log = ProgressLog()
    with anyio.fail_after(300):
        async with world.client() as client:
            answer = await client.call_tool("generate_image", {"prompt": f"{order} a fox"}, progress_callback=log)
    assert answer.structured_content["status"] == "completed"
    assert log.is_rising


async def test_an_unchanged_job_is_reported_at_each_heartbeat() -> None:
    log, followed_job = ProgressLog(), job(progress=40)
    followed_job.record_answer(is_running=True)
    with anyio.fail_after(300):
        async with anyio.create_task_group() as group:
            group.start_soon(partial(follow, followed_job, anyio.current_time() + 60.0, log, heartbeat_s=0.001))
            while len(log.reports) < 5:
                await anyio.sleep(0)
            followed_job.finish()
    assert log.is_rising
    assert all(40 <= value < 100 for value, _ in log.reports)


async def test_the_end_of_a_wait_requests_one_last_poll() -> None:
    followed_job = job()
    followed_job.record_answer(is_running=True)
    is_polled = anyio.Event()
    followed_job.poll_now = is_polled.set  # pyright: ignore[reportAttributeAccessIssue]
    with anyio.fail_after(300):
        await follow(followed_job, anyio.current_time(), ProgressLog())
    assert is_polled.is_set()


async def test_a_call_without_a_task_id_waits_for_it_beyond_its_wait() -> None:
    followed_job = Job(Entry("k" * 16, "owner", "sending", 0.0))
    with anyio.fail_after(300):
        async with anyio.create_task_group() as group:
            group.start_soon(follow, followed_job, anyio.current_time(), ProgressLog())
            for _ in range(5):
                await anyio.sleep(0)
            followed_job.record_answer(is_running=True)
            followed_job.change_to(replace(followed_job.entry, phase="submitted", task=Task(TASK)))
    assert followed_job.entry.task_id == TASK


@pytest.mark.parametrize(
    ("arguments", "limit_s"), [({"wait_seconds": 0}, 5.0), ({"wait_seconds": 800}, 800.0)], ids=["short", "long"]
)
async def test_the_journal_gets_the_time_of_the_call_and_the_purchase_has_no_deadline(
    open_world: Open, arguments: dict[str, Any], limit_s: float
) -> None:
    times: dict[str, float | None] = {}

    async def record(name: str, method: Any, *args: Any, **options: Any) -> Any:
        times.setdefault(name, remaining_s())
        return await method(*args, **options)

    def wrap(journal: Any) -> FaultyJournal:
        faulty = FaultyJournal(journal)
        faulty.replacements = {name: partial(record, name) for name in ("intend", "update", "by_task", "remove_caller")}
        return faulty

    async with open_world(wrap_journal=wrap) as world, world.client() as client:
        purchase = await client.call_tool("generate_image", {"prompt": "sim:fast a fox", **arguments})
        await client.call_tool("get_task", {"task_id": purchase.structured_content["task_id"], **arguments})
        await client.call_tool("generate_image", {"prompt": "sim:slow=3600 an owl", "wait_seconds": 0})
    # Without the record of its end, an identical call at another server would buy.
    assert (times["update"], times["remove_caller"]) == (None, None)
    for name in ("intend", "by_task"):
        remaining = times[name]
        assert remaining is not None
        assert 0 <= remaining <= limit_s
        assert remaining > 5.0 or limit_s == 5.0
    assert remaining_s() is None
