"""No answer stops the polls wrongly: a settled status stays, and a completed task without links is polled again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from conftest import Clock, Open, PlainSimulator

from evolink_mcp.api.task import Task
from evolink_mcp.studio.poller import merge

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

REQUEST = {"prompt": "a fox", "size": "1024x640", "quality": "low"}
A, B, C = "https://x.example/a", "https://x.example/b", "https://x.example/c"
COMPLETED = Task(
    "task-unified-1-a", status="completed", results=(A, B), credits_used=5.48, billing="charged", created=9.0
)


class ChangesReads(httpx.ASGITransport):
    """Change each answer about one task. `change` gets the answer and the number of the read, from 1."""

    def __init__(self, simulator: PlainSimulator, change: Callable[[dict[str, Any], int], None]) -> None:
        super().__init__(simulator.app)
        self.change = change
        self.reads = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        if not request.url.path.startswith("/v1/tasks/task-"):
            return response
        payload = json.loads(await response.aread())
        self.reads += 1
        self.change(payload, self.reads)
        return httpx.Response(response.status_code, stream=httpx.ByteStream(json.dumps(payload).encode()))


def remove_links(payload: dict[str, Any]) -> None:
    payload["results"] = []
    payload.pop("result_data", None)


@pytest.mark.journal_file
@pytest.mark.parametrize("status", ["processing", "pending", "reviewing", "failed"])
async def test_a_completed_task_without_links_is_followed_although_its_next_status_is_older(
    open_world: Open, status: str
) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0)

    def change(payload: dict[str, Any], read: int) -> None:
        if read <= 12:
            remove_links(payload)
        if 1 < read <= 12:
            payload.update(status=status, progress=50)

    async def pause(seconds: float) -> None:
        await anyio.sleep(0.001)

    transport = ChangesReads(simulator, change)
    async with (
        open_world(simulator=simulator, clock=clock, transport=transport, pause=pause) as world,
        world.client() as client,
    ):
        answer = await client.call_tool("generate_image", REQUEST)
        assert answer.structured_content["status"] == "completed"
        assert answer.structured_content["charged"] == "yes"
        while not world.files:
            await anyio.sleep(0.01)
        answer = await client.call_tool("get_task", {"task_id": answer.structured_content["task_id"]})
    assert answer.structured_content["images"][0]["path"] == str(world.files[0])
    assert world.posts == 1


@pytest.mark.parametrize("status", ["processing", "pending", "failed", "cancelled", "reviewing"])
async def test_a_completed_task_keeps_status_links_and_charge(status: str) -> None:
    newer = Task(COMPLETED.id, status=status, progress=50.0, credits_used=0.0, billing="released")
    assert merge(COMPLETED, newer) == COMPLETED


@pytest.mark.parametrize("status", ["failed", "cancelled"])
async def test_a_failed_task_stays_failed_unless_evolink_completes_it(status: str) -> None:
    before = Task(COMPLETED.id, status=status, billing="released")
    assert merge(before, Task(COMPLETED.id, status="processing")) == before
    assert merge(before, COMPLETED) == COMPLETED


@pytest.mark.parametrize(
    ("newer", "expected"),
    [((), (A, B)), ((A,), (A, B)), ((B,), (A, B)), ((C,), (C, B)), ((C, A), (C, A)), ((A, B, C), (A, B, C))],
)
async def test_earlier_links_survive_an_answer_that_omits_them(
    newer: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert merge(COMPLETED, replace(COMPLETED, results=newer)).results == expected


async def test_a_placeholder_before_the_end_does_not_become_the_charge() -> None:
    before = Task(COMPLETED.id, status="processing", credits_used=9.9, billing="reserved")
    merged = merge(before, replace(COMPLETED, credits_used=None, billing=None))
    assert (merged.credits_used, merged.billing) == (None, None)
