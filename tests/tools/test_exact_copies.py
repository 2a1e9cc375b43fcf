"""`fit` of generate_image delivers an exact copy beside the paid picture. A failed copy never hides the picture."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Clock, Open, PlainSimulator, World
from PIL import Image

from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.simulator.simulation import SimulatedTask
from evolink_mcp.studio.prices import difference_of

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]


def copies_of(world: World) -> dict[str, tuple[int, int]]:
    """Return the copies in the output folder with their sizes."""
    sizes: dict[str, tuple[int, int]] = {}
    for path in world.files:
        if any(label in path.name for label in ("-1200x628", "-og", "-favicon")):
            with Image.open(path) as image:
                sizes[path.name] = image.size
    return sizes


async def call(client: Any, **arguments: Any) -> Any:
    answer = await client.call_tool("generate_image", {"prompt": "sim:fast a fox", **arguments})
    assert not answer.is_error, answer.content[0].text
    return answer


async def test_the_exact_copy_is_saved_beside_the_picture_and_named_in_the_answer(world: World) -> None:
    async with world.client() as client:
        answer = await call(client, fit="1200 x 628", n=2)
        repeat = await client.call_tool("get_task", {"task_id": answer.structured_content["task_id"]})
    images = answer.structured_content["images"]
    assert copies_of(world) == {Path(image["path"]).stem + "-1200x628.png": (1200, 628) for image in images}
    for result in (answer, repeat):
        for name in copies_of(world):
            assert any(name in note for note in result.structured_content["notes"])
            assert name in result.content[0].text
    assert world.posts == 1
    assert all(Path(image["path"]).is_file() for image in images)


async def test_evolink_gets_no_fit_and_the_request_of_the_answer_names_it(world: World) -> None:
    async with world.client() as client:
        answer = await call(client, fit="og")
    (post,) = [json.loads(r.body) for r in world.simulator.requests if r.path == "/v1/images/generations"]
    assert "fit" not in post
    assert answer.structured_content["request"]["fit"] == "og"
    entry = await world.studio.journal.by_task(answer.structured_content["task_id"])
    assert entry is not None
    assert GenerationRequest.model_validate(entry.body).size == post["size"]
    assert entry.task is not None
    expensive = replace(entry, task=replace(entry.task, credits_used=1_000.0))
    difference = difference_of(expensive)
    assert difference is not None, "a bill is compared with the request, although it has fit"
    assert difference.is_above


async def test_the_answer_as_a_new_request_is_accepted(world: World) -> None:
    async with world.client() as client:
        request = (await call(client, fit="1200x628")).structured_content["request"]
        answer = await client.call_tool("generate_image", {**request, "force_new": True})
    assert not answer.is_error
    assert world.posts == 2


async def test_a_picture_that_is_finished_after_the_wait_gets_its_copy(open_world: Open) -> None:
    async with open_world() as world, world.client() as client:
        answer = await client.call_tool("generate_image", {"prompt": "a fox", "fit": "og", "wait_seconds": 0})
        task_id = answer.structured_content["task_id"]
        assert copies_of(world) == {}
        answer = await client.call_tool("get_task", {"task_id": task_id, "wait_seconds": 900})
    assert list(copies_of(world).values()) == [(1200, 630)]
    assert world.posts == 1


async def test_a_purchase_that_an_identical_call_without_fit_made_gets_the_copy_too(world: World) -> None:
    async with world.client() as client:
        first = await client.call_tool("generate_image", {"prompt": "a fox", "size": "1200x640", "wait_seconds": 0})
        answer = await call(client, prompt="a fox", fit="1200x628", wait_seconds=900)
    assert answer.structured_content["task_id"] == first.structured_content["task_id"]
    assert list(copies_of(world).values()) == [(1200, 628)]
    assert world.posts == 1


class OccupiesFolder(PlainSimulator):
    """Puts a file in the place of the output folder while EvoLink draws. The picture goes to the data folder then."""

    folder: Path

    def draw(self, task: SimulatedTask, index: int) -> bytes:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.write_bytes(b"")
        return super().draw(task, index)


async def test_a_copy_that_fails_leaves_the_paid_picture_and_names_the_next_step(
    open_world: Open, tmp_path: Path
) -> None:
    clock = Clock()
    simulator = OccupiesFolder(clock=clock)
    simulator.folder = tmp_path / "pictures"
    async with open_world(simulator=simulator, clock=clock) as world, world.client() as client:
        answer = await call(client, fit="og")
    image = answer.structured_content["images"][0]
    assert Path(image["path"]).is_file()
    assert answer.structured_content["error"] is None
    (note,) = [note for note in answer.structured_content["notes"] if "derive_image" in note]
    assert f'source="{image["resource_uri"]}", targets=["og"]' in note
    assert note in answer.content[0].text


async def test_without_fit_nothing_is_derived(world: World) -> None:
    async with world.client() as client:
        answer = await call(client)
    assert copies_of(world) == {}
    assert not any("derive_image" in note for note in answer.structured_content["notes"])
