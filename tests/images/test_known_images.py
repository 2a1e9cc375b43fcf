"""An earlier image is found by anything that a person or a model still has: ID, URI, URL, path, Markdown or "last"."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import KEY, Open, World
from drawings import drawing

pytestmark = pytest.mark.anyio
DAY_S = 86_400.0
BASE_URL = {"EVOLINK_BASE_URL": "https://api.evolink.ai"}
OTHER_KEY = "sk-another-0123456789abcdef"

NAMES: list[Any] = [
    pytest.param(lambda task_id, _: task_id, id="task ID"),
    pytest.param(lambda task_id, _: f" {task_id}\n", id="blanks"),
    pytest.param(lambda task_id, _: f"`{task_id}`", id="backticks"),
    pytest.param(lambda task_id, _: f"“{task_id}”", id="typographic quotes"),
    pytest.param(lambda task_id, _: f"evolink://tasks/{task_id}", id="task URI"),
    pytest.param(lambda task_id, _: f"evolink://images/{task_id}", id="image URI without index"),
    pytest.param(lambda _, image: image["resource_uri"], id="image URI"),
    pytest.param(lambda _, image: f"<{image['resource_uri']}>", id="image URI in angle brackets"),
    pytest.param(lambda _, image: image["url"], id="URL"),
    pytest.param(lambda _, image: image["url"] + "?token=2", id="URL with another query"),
    pytest.param(lambda _, image: image["path"], id="path"),
    pytest.param(lambda _, image: f"'{image['path']}'", id="quoted path"),
    pytest.param(lambda _, image: Path(image["path"]).name, id="file name"),
    pytest.param(lambda _, image: Path(image["path"]).as_uri(), id="file URI"),
    pytest.param(lambda _, image: image["markdown"], id="Markdown"),
    pytest.param(lambda _, image: f'- ![it]({image["url"]} "a title")', id="Markdown with the URL"),
    pytest.param(lambda *_: "last", id="last"),
    pytest.param(lambda *_: "Last ", id="last in another case"),
]


@pytest.fixture
async def world(open_world: Open) -> AsyncIterator[World]:
    """Yield a world whose links look like EvoLink's. Links of loopback hosts are no valid references."""
    async with open_world(BASE_URL) as opened:
        yield opened


async def buy(world: World, prompt: str = "sim:fast a harbour", **more: Any) -> dict[str, Any]:
    answer = await call(world, "generate_image", prompt=prompt, **more)
    assert answer.is_error is False
    return answer.structured_content


async def call(world: World, tool: str, **arguments: Any) -> Any:
    with anyio.fail_after(300):
        async with world.client() as client:
            return await client.call_tool(tool, arguments)


def purchase_bodies(world: World) -> list[dict[str, Any]]:
    """Return the bodies of all purchases."""
    return [json.loads(r.body) for r in world.simulator.requests if r.path == "/v1/images/generations"]


# --- get_task and view_image ---


@pytest.mark.parametrize("name", NAMES)
async def test_get_task_view_image_and_an_edit_find_the_image_by_any_name(
    world: World, name: Callable[[str, dict[str, Any]], str]
) -> None:
    await buy(world, "sim:fast an older picture")
    purchase = await buy(world)
    (image,) = purchase["images"]
    text = name(purchase["task_id"], image)
    world.clock.now += 2 * DAY_S  # EvoLink's link has expired

    task = await call(world, "get_task", task_id=text)
    assert task.structured_content["task_id"] == purchase["task_id"]
    assert task.structured_content["images"][0]["path"] == image["path"]
    view = await call(world, "view_image", task_id=text)
    assert view.content[0].type == "image"
    assert image["path"] in view.content[1].text
    edit = await buy(world, "sim:fast at night", image_urls=[text])
    (reference,) = edit["references"]
    assert (reference["task_id"], reference["index"]) == (purchase["task_id"], 0)
    assert reference["sha256"] == image["sha256"]
    assert purchase_bodies(world)[-1]["image_urls"] == [reference["url"]]
    assert reference["url"] != image["url"]
    assert len(world.simulator.uploads) == 1


async def test_a_live_link_of_a_known_image_is_sent_unchanged_and_its_origin_is_recorded(world: World) -> None:
    purchase = await buy(world)
    (image,) = purchase["images"]
    edit = await buy(world, "sim:fast at night", image_urls=[image["url"]])
    assert purchase_bodies(world)[-1]["image_urls"] == [image["url"]]
    assert world.simulator.uploads == {}
    (reference,) = edit["references"]
    assert (reference["task_id"], reference["index"], reference["sha256"]) == (purchase["task_id"], 0, image["sha256"])


async def test_an_expired_link_of_a_mask_is_replaced_by_its_file(world: World, tmp_path: Path) -> None:
    picture = await buy(world, size="1024x1024")
    mask = await buy(world, "sim:fast a mask", size="1024x1024", background="transparent")
    world.clock.now += 2 * DAY_S
    edit = await buy(world, "sim:fast red", image_urls=[picture["images"][0]["url"]], mask_url=mask["images"][0]["url"])
    assert [reference["task_id"] for reference in edit["references"]] == [picture["task_id"], mask["task_id"]]
    assert purchase_bodies(world)[-1]["mask_url"] not in (mask["images"][0]["url"], None)


async def test_the_url_of_an_unknown_image_is_sent_unchanged(world: World) -> None:
    url = "https://files.evolink.ai/somebody/else.png"
    edit = await buy(world, "sim:fast at night", image_urls=[f"![x]({url})"])
    assert purchase_bodies(world)[-1]["image_urls"] == [url]
    assert edit["references"][0]["task_id"] is None


async def test_an_expired_link_without_its_file_is_refused_before_the_purchase(world: World) -> None:
    (image,) = (await buy(world))["images"]
    Path(image["path"]).unlink()
    world.clock.now += 2 * DAY_S
    answer = await call(world, "generate_image", prompt="sim:fast at night", image_urls=[image["url"]])
    assert answer.is_error is True
    assert "its link has expired and its file is not there any more" in answer.content[0].text
    assert len(purchase_bodies(world)) == 1


async def test_a_task_with_several_images_needs_an_index_as_a_reference(world: World) -> None:
    purchase = await buy(world, n=3)
    answer = await call(world, "generate_image", prompt="sim:fast blue", image_urls=[purchase["task_id"]])
    assert answer.is_error is True
    assert f"evolink://images/{purchase['task_id']}/0 … /2" in answer.content[0].text
    assert len(purchase_bodies(world)) == 1
    edit = await buy(world, "sim:fast blue", image_urls=[f"![x](<{purchase['images'][2]['path']}>)"])
    assert edit["references"][0]["index"] == 2


async def test_an_index_in_the_name_wins_over_the_argument(world: World) -> None:
    purchase = await buy(world, n=3)
    view = await call(world, "view_image", task_id=purchase["images"][2]["resource_uri"], index=1)
    assert f"Picture 2 of {purchase['task_id']}" in view.content[1].text
    view = await call(world, "view_image", task_id=purchase["task_id"], index=1)
    assert f"Picture 1 of {purchase['task_id']}" in view.content[1].text


@pytest.mark.parametrize(
    "text", ["last", "no such thing", "/nowhere/x.png", "https://example.org/x.png", "evolink://x"]
)
async def test_an_unknown_name_is_refused_with_the_names_that_work(world: World, text: str) -> None:
    answer = await call(world, "get_task", task_id=text)
    assert answer.is_error is True
    assert answer.structured_content["error"]["code"] == "image_unknown"
    assert "Give a task ID, an evolink:// URI" in answer.content[0].text
    assert world.simulator.requests == []


async def test_view_image_shows_another_image_of_an_allowed_folder_by_its_path(world: World) -> None:
    world.settings.output_dir.mkdir()
    file = world.settings.output_dir / "drawn by hand.png"
    file.write_bytes(drawing())
    view = await call(world, "view_image", path=str(file))
    assert view.content[0].type == "image"
    assert str(file) in view.content[1].text
    outside = await call(world, "view_image", path="/etc/passwd")
    assert outside.is_error is True
    assert "outside the allowed folders" in outside.content[0].text
    neither = await call(world, "view_image")
    assert "give task_id or path" in neither.content[0].text


# --- moved files ---


@pytest.mark.parametrize(
    "place", [pytest.param("2026/november/{name}", id="subfolder"), pytest.param("logo final.png", id="new name")]
)
async def test_a_moved_file_is_found_by_its_earlier_path_and_not_downloaded_again(world: World, place: str) -> None:
    purchase = await buy(world)
    (image,) = purchase["images"]
    old = Path(image["path"])
    new = old.parent / place.format(name=old.name)
    new.parent.mkdir(parents=True, exist_ok=True)
    old.rename(new)
    requests = len(world.simulator.requests)
    for text in (str(old), str(new), purchase["task_id"], image["url"]):
        task = await call(world, "get_task", task_id=text)
        (saved_image,) = task.structured_content["images"]
        assert (saved_image["path"], saved_image["error"]) == (str(new), None)
        assert saved_image["markdown"].endswith(f"({new})" if " " not in str(new) else f"(<{new}>)")
    assert len(world.simulator.requests) == requests
    task_list = await call(world, "list_tasks")
    assert task_list.structured_content["tasks"][0]["paths"] == [str(new)]
    world.clock.now += 2 * DAY_S
    edit = await buy(world, "sim:fast at night", image_urls=[str(old)])
    assert edit["references"][0]["task_id"] == purchase["task_id"]


async def test_a_moved_file_is_not_saved_twice_while_another_image_of_its_task_is_downloaded(world: World) -> None:
    purchase = await buy(world, n=2)
    first, second = (Path(image["path"]) for image in purchase["images"])
    (first.parent / "kept").mkdir()
    first.rename(first.parent / "kept" / "first.png")
    second.unlink()
    task = await call(world, "get_task", task_id=purchase["task_id"])
    assert [image["path"] for image in task.structured_content["images"]] == [
        str(first.parent / "kept" / "first.png"),
        str(second),
    ]
    assert len(world.files) == 2
    by_path = await call(world, "get_task", task_id=str(first))
    assert by_path.structured_content["task_id"] == purchase["task_id"]


async def test_a_file_that_took_the_place_of_an_image_is_not_shown_as_this_image(world: World) -> None:
    first, second = await buy(world, "sim:fast one"), await buy(world, "sim:fast two")
    one, two = (Path(purchase["images"][0]["path"]) for purchase in (first, second))
    one.rename(one.with_name("kept.png"))
    two.rename(one)
    task = await call(world, "get_task", task_id=first["task_id"])
    assert task.structured_content["images"][0]["path"] == str(one.with_name("kept.png"))
    by_path = await call(world, "get_task", task_id=str(one))
    assert by_path.structured_content["task_id"] == second["task_id"]


async def test_a_hidden_folder_and_a_link_are_not_searched(world: World, tmp_path: Path) -> None:
    (image,) = (await buy(world))["images"]
    file = Path(image["path"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    file.rename(elsewhere / file.name)
    (file.parent / "link").symlink_to(elsewhere)
    world.clock.now += 2 * DAY_S
    task = await call(world, "get_task", task_id=image["path"])
    assert "was moved or deleted" in task.structured_content["images"][0]["error"]


async def test_a_disconnected_drive_is_named_as_the_reason(world: World, tmp_path: Path) -> None:
    (image,) = (await buy(world))["images"]
    world.clock.now += 2 * DAY_S
    world.settings.output_dir.rename(tmp_path / "unplugged")
    answer = await call(world, "generate_image", prompt="sim:fast x", image_urls=[image["resource_uri"]])
    assert "its drive or share may be disconnected" in answer.content[0].text


# --- other profiles and keys ---


async def test_a_task_of_another_profile_of_the_journal_is_named(open_world: Open, world: World) -> None:
    purchase = await buy(world, "sim:fast a secret prompt")
    environ = {"EVOLINK_MCP_PROFILE": "second", "EVOLINK_API_KEY": OTHER_KEY, **BASE_URL}
    async with open_world(environ, simulator=world.simulator, clock=world.clock) as other:
        answer = await call(other, "get_task", task_id=purchase["task_id"])
        assert "The profile “default” of this journal bought this task." in answer.structured_content["notes"]
        assert "secret" not in answer.content[0].text
        by_path = await call(other, "get_task", task_id=purchase["images"][0]["url"])
        assert by_path.structured_content["error"]["code"] == "image_unknown"


async def test_a_task_of_another_key_is_shown_with_its_file(open_world: Open, world: World) -> None:
    purchase = await buy(world)
    async with open_world(
        {"EVOLINK_API_KEY": OTHER_KEY, **BASE_URL}, simulator=world.simulator, clock=world.clock
    ) as other:
        answer = await call(other, "get_task", task_id=purchase["images"][0]["path"])
    assert answer.structured_content["images"][0]["path"] == purchase["images"][0]["path"]
    assert any("bought with another key" in note for note in answer.structured_content["notes"])


async def test_a_server_without_a_key_finds_an_image_too(open_world: Open, world: World) -> None:
    purchase = await buy(world)
    assert KEY not in json.dumps(purchase)
    async with open_world({"EVOLINK_API_KEY": "", **BASE_URL}, simulator=world.simulator, clock=world.clock) as other:
        answer = await call(other, "get_task", task_id="last")
    assert answer.structured_content["task_id"] == purchase["task_id"]
