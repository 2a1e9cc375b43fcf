"""Refused links, deleted files, absent folders, and the state of a task without a key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from conftest import Clock, Open, PlainSimulator, World

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

REQUEST = {"prompt": "a fox", "size": "1024x640", "quality": "low"}
NO_KEY = {"EVOLINK_API_KEY": ""}
LINK_LIVES_S = 24 * 3600


async def call(world: World, tool: str, arguments: dict[str, Any]) -> Any:
    async with world.client() as client:
        return await client.call_tool(tool, arguments)


class RenewsLinks(httpx.ASGITransport):
    """Refuse each first link with `status`. From the second read on, a task has other links, which work."""

    def __init__(self, simulator: PlainSimulator, status: int, *, has_new_links: bool = True) -> None:
        super().__init__(simulator.app)
        self.status = status
        self.has_new_links = has_new_links
        self.is_refusing = True
        self.reads = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.startswith("/pictures/"):
            if self.is_refusing and request.url.query != b"fresh":
                return httpx.Response(self.status, stream=httpx.ByteStream(b""))
            request = httpx.Request("GET", request.url.copy_with(query=None), headers=request.headers)
        response = await super().handle_async_request(request)
        if not request.url.path.startswith("/v1/tasks/task-"):
            return response
        self.reads += 1
        payload = json.loads(await response.aread())
        if self.reads > 1 and self.has_new_links:
            payload["results"] = [f"{link}?fresh" for link in payload["results"]]
            payload.pop("result_data", None)
        return httpx.Response(200, stream=httpx.ByteStream(json.dumps(payload).encode()))


@pytest.mark.parametrize("status", [403, 404, 410])
@pytest.mark.parametrize("count", [1, 3])
async def test_a_refused_link_is_replaced_by_one_more_read_of_the_task(
    open_world: Open, status: int, count: int
) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0)
    transport = RenewsLinks(simulator, status)
    async with open_world(simulator=simulator, clock=clock, transport=transport) as world:
        answer = await call(world, "generate_image", {**REQUEST, "n": count})
    images = answer.structured_content["images"]
    assert [Path(image["path"]).is_file() for image in images] == [True] * count
    assert [image["url"].endswith("?fresh") for image in images] == [True] * count
    assert (transport.reads, world.posts) == (2, 1)


async def test_a_link_that_stays_refused_costs_one_more_read_and_the_answer_has_the_link(open_world: Open) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0)
    transport = RenewsLinks(simulator, 404, has_new_links=False)
    async with open_world(simulator=simulator, clock=clock, transport=transport) as world:
        answer = await call(world, "generate_image", REQUEST)
    assert (answer.is_error, answer.structured_content["charged"]) == (True, "yes")
    assert answer.structured_content["images"][0]["url"].startswith("http")
    assert (transport.reads, world.posts) == (2, 1)


@pytest.mark.parametrize("age_s", [60, LINK_LIVES_S + 60])
async def test_a_deleted_image_is_downloaded_again_from_a_fresh_link(open_world: Open, age_s: float) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0)
    transport = RenewsLinks(simulator, 403)
    transport.is_refusing = False
    async with open_world(simulator=simulator, clock=clock, transport=transport) as world:
        answer = await call(world, "generate_image", REQUEST)
        task_id = answer.structured_content["task_id"]
        world.files[0].unlink()
        transport.is_refusing = True
        simulator.clock = lambda: clock.now - age_s
        clock.now += age_s
        repeat = await call(world, "get_task", {"task_id": task_id})
    assert not repeat.is_error
    assert Path(repeat.structured_content["images"][0]["path"]).is_file()


@pytest.mark.parametrize("age_s", [60, LINK_LIVES_S + 60])
async def test_a_deleted_image_that_cannot_be_downloaded_is_missing_and_keeps_its_facts(
    open_world: Open, age_s: float
) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0)
    transport = RenewsLinks(simulator, 403, has_new_links=False)
    transport.is_refusing = False
    async with open_world(simulator=simulator, clock=clock, transport=transport) as world:
        purchase = await call(world, "generate_image", REQUEST)
        task_id = purchase.structured_content["task_id"]
        (path,) = world.files
        content = path.read_bytes()
        path.unlink()
        clock.now += age_s
        transport.is_refusing = True
        missing = await call(world, "get_task", {"task_id": task_id})
        path.write_bytes(content)
        restored_task = await call(world, "get_task", {"task_id": task_id})
    (image,) = missing.structured_content["images"]
    headline = missing.content[0].text.splitlines()[0]
    assert missing.is_error
    assert missing.structured_content["charged"] == "yes"
    assert "saved" not in headline
    assert "moved or deleted" in missing.content[0].text
    assert (image["resource_uri"], image["markdown"]) == (None, None)
    facts = ("path", "sha256", "width", "height", "bytes", "mime_type")
    assert [image[name] for name in facts] == [purchase.structured_content["images"][0][name] for name in facts]
    assert not restored_task.is_error
    assert restored_task.structured_content["images"][0]["error"] is None
    assert "1 picture saved" in restored_task.content[0].text.splitlines()[0]


@pytest.mark.parametrize("age_s", [60, LINK_LIVES_S + 60])
async def test_an_absent_folder_is_not_created_and_its_images_keep_path_size_and_hash(
    open_world: Open, tmp_path: Path, age_s: float
) -> None:
    folder = tmp_path / "pictures"
    async with open_world() as world:
        purchase = await call(world, "generate_image", {**REQUEST, "n": 2})
        task_id = purchase.structured_content["task_id"]
        folder.rename(tmp_path / "unplugged")
        world.clock.now += age_s
        missing = await call(world, "get_task", {"task_id": task_id})
        task_list = await call(world, "list_tasks", {"detail": True})
        assert not folder.exists()
    async with open_world(simulator=world.simulator, clock=world.clock) as world:
        (tmp_path / "unplugged").rename(folder)
        restored_task = await call(world, "get_task", {"task_id": task_id})
    facts = ("path", "sha256", "width", "height", "bytes")
    for answer in (
        missing.structured_content,
        task_list.structured_content["tasks"][0],
        restored_task.structured_content,
    ):
        for image, before in zip(answer["images"], purchase.structured_content["images"], strict=True):
            assert [image[name] for name in facts] == [before[name] for name in facts]
    assert missing.is_error
    assert missing.structured_content["error"]["code"] == "file_missing"
    assert "saved" not in missing.content[0].text.splitlines()[0]
    assert not restored_task.is_error
    assert "2 pictures saved" in restored_task.content[0].text.splitlines()[0]
    assert len(world.files) == 2


async def test_one_missing_image_of_two_is_counted_in_the_headline(open_world: Open) -> None:
    async with open_world() as world:
        purchase = await call(world, "generate_image", {**REQUEST, "n": 2})
        world.clock.now += LINK_LIVES_S + 60
        world.files[0].unlink()
        answer = await call(world, "get_task", {"task_id": purchase.structured_content["task_id"]})
    assert "1 picture saved, 1 missing" in answer.content[0].text.splitlines()[0]
    assert not answer.is_error


# --- without a key ---


async def test_without_a_key_get_task_reports_the_state_of_a_paid_task(open_world: Open) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=10**9)
    async with open_world(simulator=simulator, clock=clock) as world:
        purchase = await call(world, "generate_image", {**REQUEST, "wait_seconds": 0})
    task_id = purchase.structured_content["task_id"]
    async with open_world(NO_KEY, simulator=simulator, clock=clock) as world:
        answer = await call(world, "get_task", {"task_id": task_id})
    facts = answer.structured_content
    assert (facts["task_id"], facts["status"], facts["charged"]) == (task_id, "pending", "unknown")
    assert facts["request"]["prompt"] == "a fox"
    assert facts["error"]["code"] == "key_missing"
    assert facts["next_action"] is None
    assert "failed" not in answer.content[0].text


async def test_without_a_key_get_task_shows_a_saved_image(open_world: Open) -> None:
    async with open_world() as world:
        purchase = await call(world, "generate_image", REQUEST)
    async with open_world(NO_KEY, simulator=world.simulator, clock=world.clock) as world:
        answer = await call(world, "get_task", {"task_id": purchase.structured_content["task_id"]})
        view = await call(world, "view_image", {"task_id": purchase.structured_content["task_id"]})
    facts = answer.structured_content
    assert (answer.is_error, facts["status"], facts["charged"]) == (False, "completed", "yes")
    assert facts["images"] == purchase.structured_content["images"]
    assert view.content[0].type == "image"


async def test_without_a_key_an_unknown_task_is_not_called_failed(open_world: Open) -> None:
    async with open_world(NO_KEY) as world:
        answer = await call(world, "get_task", {"task_id": "task-unified-1-abc"})
    facts = answer.structured_content
    assert (facts["status"], facts["charged"], facts["created_at"]) == ("unknown", "unknown", None)
    assert facts["error"]["code"] == "key_missing"
    assert facts["next_action"] is None


async def test_without_a_key_a_synced_list_shows_the_journal_and_the_reason(open_world: Open) -> None:
    async with open_world() as world:
        bought = await call(world, "generate_image", REQUEST)
    async with open_world(NO_KEY, simulator=world.simulator, clock=world.clock) as world:
        answer = await call(world, "list_tasks", {"sync": True})
    facts = answer.structured_content
    assert (answer.is_error, facts["synced"], facts["error"]) == (False, False, None)
    assert [task["task_id"] for task in facts["tasks"]] == [bought.structured_content["task_id"]]
    assert "could not be read: no EvoLink API key is set." in answer.content[0].text
