"""A fault of ours ends one job, and says so; the server and every other job go on."""

from __future__ import annotations

import logging
from typing import Any

import anyio
import pytest
from conftest import World

pytestmark = pytest.mark.anyio

WISH = {"prompt": "sim:fast a fox", "size": "1024x640", "quality": "low"}


async def test_a_fault_while_reading_ends_the_job_with_words_and_the_next_call_works(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fault(_: str) -> Any:
        raise ZeroDivisionError("a fault of ours")

    with anyio.fail_after(300), caplog.at_level(logging.ERROR):
        async with world.client() as client:
            with monkeypatch.context() as patched:
                patched.setattr(world.studio.client, "task", fault)
                answer = await client.call_tool("generate_image", WISH)
            told = answer.structured_content
            again = await client.call_tool("get_task", {"task_id": told["task_id"]})
    assert answer.is_error
    assert (told["error"]["code"], told["charged"]) == ("internal_error", "unknown")
    assert told["next_action"] == {"tool": "get_task", "arguments": {"task_id": told["task_id"]}}
    assert "a fault of ours" not in str(answer)
    assert "ZeroDivisionError" in caplog.text
    assert again.structured_content["status"] == "completed"
    assert world.posts == 1


async def test_a_subscriber_that_fails_disturbs_nobody(world: World, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []

    async def fails(_: str) -> None:
        raise ZeroDivisionError

    async def listens(task_id: str) -> None:
        heard.append(task_id)

    world.studio.subscribe(fails)
    world.studio.subscribe(listens)
    with anyio.fail_after(300), caplog.at_level(logging.ERROR):
        async with world.client() as client:
            answer = await client.call_tool("generate_image", WISH)
    assert answer.structured_content["status"] == "completed"
    assert set(heard) == {answer.structured_content["task_id"]}
    assert "ZeroDivisionError" in caplog.text
