"""The main promise, tested with an MCP client: one call, one saved image, one charge."""

from __future__ import annotations

import json

import anyio
import pytest
from conftest import Open, World

pytestmark = pytest.mark.anyio
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])


@ERAS
async def test_one_call_returns_the_images_and_sends_one_post(world: World, mode: str) -> None:
    arguments = {"prompt": "A calm sunset over the ocean", "size": "16:9", "resolution": "2K", "n": 2}
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            answer = await client.call_tool("generate_image", arguments)
    facts = answer.structured_content
    assert answer.is_error is False
    assert facts["status"] == "completed"
    assert [(image["width"], image["height"]) for image in facts["images"]] == [(2048, 1152)] * 2
    assert sorted(image["path"] for image in facts["images"]) == [str(path) for path in world.files]
    assert facts["charged"] == "yes"
    assert world.posts == 1
    body = next(r.body for r in world.simulator.requests if r.path == "/v1/images/generations")
    assert json.loads(body) == {"model": "gpt-image-2", **arguments}


async def test_a_call_whose_wait_ends_returns_a_task_id_and_get_task_completes_it(world: World) -> None:
    with anyio.fail_after(300):
        async with world.client() as client:
            handle = await client.call_tool("generate_image", {"prompt": "sim:slow a fox", "wait_seconds": 0})
            assert handle.is_error is False
            assert handle.structured_content["status"] in ("pending", "processing")
            action = handle.structured_content["next_action"]
            answer = await client.call_tool(action["tool"], action["arguments"])
            repeat = await client.call_tool("get_task", action["arguments"])
    assert answer.structured_content["status"] == "completed"
    assert repeat.structured_content["images"] == answer.structured_content["images"]
    assert world.posts == 1
    assert len([r for r in world.simulator.requests if r.path.startswith("/pictures/")]) == 1


async def test_an_undelivered_purchase_is_returned_before_a_new_one_is_bought(open_world: Open) -> None:
    with anyio.fail_after(300):
        async with open_world() as world, world.client() as client:
            async with anyio.create_task_group() as group:
                group.start_soon(client.call_tool, "generate_image", {"prompt": "sim:slow=1000000 a fox"})
                while world.posts == 0 or (await world.studio.journal.recent(1))[0].task_id is None:
                    await anyio.sleep(0)
                group.cancel_scope.cancel()
            repeat = await client.call_tool("generate_image", {"prompt": "sim:slow=1000000 a fox", "wait_seconds": 0})
            assert "earlier identical call" in repeat.content[0].text
            assert world.posts == 1
            await client.call_tool(
                "generate_image", {"prompt": "sim:slow=1000000 a fox", "wait_seconds": 0, "force_new": True}
            )
            assert world.posts == 2


async def test_the_same_call_after_an_unknown_outcome_searches_again_and_only_force_new_buys(world: World) -> None:
    arguments = {"prompt": "sim:500 a fox"}
    with anyio.fail_after(300):
        async with world.client() as client:
            first = await client.call_tool("generate_image", arguments)
            repeat = await client.call_tool("generate_image", arguments)
            assert (first.structured_content["charged"], repeat.structured_content["charged"]) == ("unknown", "unknown")
            assert "Nothing was sent again" in repeat.content[0].text
            assert world.posts == 1
            await client.call_tool("generate_image", {**arguments, "force_new": True})
            assert world.posts == 2
