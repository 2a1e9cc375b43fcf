"""A call follows a job: progress rises, the first word is the task's id, silence is broken, the wait ends in time."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import anyio
import pytest
from conftest import World

from evolink_mcp.api.task import Task
from evolink_mcp.journal.entry import Entry
from evolink_mcp.studio.jobs import Job
from evolink_mcp.tools.waiting import follow

pytestmark = pytest.mark.anyio
TASK = "task-unified-1790000000-abcdefgh"


class Heard:
    """What the host was told: (progress, message)."""

    def __init__(self) -> None:
        self.told: list[tuple[float, str]] = []

    async def __call__(self, progress: float, total: float, message: str) -> None:
        assert total == 100
        self.told.append((progress, message))

    @property
    def rises(self) -> bool:
        values = [value for value, _ in self.told]
        return all(a < b for a, b in pairwise(values))


def job(**task: object) -> Job:
    return Job(Entry("k" * 16, "owner", "submitted", 0.0, task=Task(TASK, **task)))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_progress_rises_to_100_and_its_first_word_is_the_task_id(world: World, mode: str) -> None:
    heard = Heard()
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            answer = await client.call_tool("generate_image", {"prompt": "a fox"}, progress_callback=heard)
    assert heard.told[0][1].startswith(answer.structured_content["task_id"])
    assert heard.rises
    assert heard.told[-1][0] == 100


@pytest.mark.parametrize("order", ["sim:backwards", "sim:unknown-status", "sim:poll-500", "sim:poll-429"])
async def test_progress_rises_whatever_evolink_says(world: World, order: str) -> None:
    heard = Heard()
    with anyio.fail_after(300):
        async with world.client() as client:
            answer = await client.call_tool("generate_image", {"prompt": f"{order} a fox"}, progress_callback=heard)
    assert answer.structured_content["status"] == "completed"
    assert heard.rises


async def test_a_job_that_does_not_change_is_still_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evolink_mcp.tools.waiting.HEARTBEAT_S", 0.001)
    heard, waiting = Heard(), job(progress=40)
    waiting.heard_from = True
    with anyio.fail_after(300):
        async with anyio.create_task_group() as group:
            group.start_soon(follow, waiting, 60.0, heard)
            while len(heard.told) < 5:
                await anyio.sleep(0)
            waiting.finish()
    assert heard.rises
    assert all(40 <= value < 100 for value, _ in heard.told)


async def test_a_wait_that_ends_asks_for_one_last_look() -> None:
    waiting = job()
    waiting.heard_from = True
    asked = anyio.Event()
    waiting.poll_now = asked.set  # pyright: ignore[reportAttributeAccessIssue]
    with anyio.fail_after(300):
        await follow(waiting, 0.0, Heard())
    assert asked.is_set()


async def test_a_call_without_an_id_waits_for_it_beyond_its_own_wait() -> None:
    waiting = Job(Entry("k" * 16, "owner", "sending", 0.0))
    with anyio.fail_after(300):
        async with anyio.create_task_group() as group:
            group.start_soon(follow, waiting, 0.0, Heard())
            for _ in range(5):
                await anyio.sleep(0)
            waiting.heard_from = True
            waiting.change_to(replace(waiting.entry, phase="submitted", task=Task(TASK)))
    assert waiting.entry.task_id == TASK
