"""An unexpected error ends one job with an error message. The server and all other jobs continue."""

from __future__ import annotations

import logging

import anyio
import httpx2 as httpx
import pytest
from conftest import Clock, Open, PlainSimulator, World

pytestmark = pytest.mark.anyio

REQUEST = {"prompt": "sim:fast a fox", "size": "1024x640", "quality": "low"}


class FirstPollRaises(httpx.ASGITransport):
    """A transport whose first poll raises an error that the package does not expect."""

    polls = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.startswith("/v1/tasks/"):
            self.polls += 1
            if self.polls == 1:
                raise ZeroDivisionError("an unexpected error")
        return await super().handle_async_request(request)


async def test_an_unexpected_error_of_a_poll_ends_the_job_and_the_next_call_works(
    open_world: Open, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock)
    with anyio.fail_after(300), caplog.at_level(logging.ERROR):
        async with (
            open_world(simulator=simulator, clock=clock, transport=FirstPollRaises(simulator.app)) as world,
            world.client() as client,
        ):
            answer = await client.call_tool("generate_image", REQUEST)
            facts = answer.structured_content
            repeat = await client.call_tool("get_task", {"task_id": facts["task_id"]})
    assert answer.is_error
    assert (facts["error"]["code"], facts["charged"]) == ("internal_error", "unknown")
    assert facts["next_action"] == {"tool": "get_task", "arguments": {"task_id": facts["task_id"]}}
    assert "an unexpected error" not in str(answer)
    assert "ZeroDivisionError" in caplog.text
    assert repeat.structured_content["status"] == "completed"
    assert world.posts == 1


async def test_a_subscriber_that_fails_does_not_disturb_other_subscribers(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    task_ids: list[str] = []

    async def fail(_: str) -> None:
        raise ZeroDivisionError

    async def receive(task_id: str) -> None:
        task_ids.append(task_id)

    world.studio.subscribe(fail)
    world.studio.subscribe(receive)
    with anyio.fail_after(300), caplog.at_level(logging.ERROR):
        async with world.client() as client:
            answer = await client.call_tool("generate_image", REQUEST)
    assert answer.structured_content["status"] == "completed"
    assert set(task_ids) == {answer.structured_content["task_id"]}
    assert "ZeroDivisionError" in caplog.text
