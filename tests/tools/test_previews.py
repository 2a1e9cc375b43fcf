"""Previews: without metadata, and in answers below the size limit of every host."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import TEST_CLIENT, Open, World
from drawings import SECRET, drawing, image_with_metadata, noise
from mcp.client import Client
from PIL import Image

from evolink_mcp.api.task import COMPLETED, Task
from evolink_mcp.app.wiring import server_for
from evolink_mcp.images.previews import preview
from evolink_mcp.journal.entry import Entry, ResultImage, new_key

pytestmark = pytest.mark.anyio
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])
UHD = (3840, 2160)
ANSWER_MAX = 700_000
NEVER_ABOVE = 900_000
LIST_MAX = 50
LONGEST_PROMPT = "\U0001f98a" * 32_000


@pytest.fixture(scope="module")
def uhd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a 4K image of noise, more than 20 MB."""
    path = tmp_path_factory.mktemp("uhd") / "noise.png"
    path.write_bytes(noise(UHD, compress_level=1))
    return path


@pytest.fixture(scope="module")
def uhd_jpeg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same as JPEG. A preview of it takes a tenth of the time."""
    path = tmp_path_factory.mktemp("uhd") / "noise.jpg"
    path.write_bytes(noise(UHD, "JPEG", quality=95))
    return path


async def add_task(world: World, number: int, picture: Path, *, pictures: int = 10, **request: Any) -> str:
    """Add a completed task with saved images to the journal. Return its id."""
    task_id = f"task-unified-{1_790_000_000 + number}-abcdefgh"
    now = world.clock()
    saved_images: list[ResultImage] = []
    for index in range(pictures):
        path = world.folder / "pictures" / f"{task_id}-{index}{picture.suffix}"
        path.parent.mkdir(exist_ok=True)
        os.link(picture, path)
        url = f"https://cdn.example.org/{task_id}/{'0' * 60}-{index}.png"
        saved_images.append(
            ResultImage(
                index, url, now + 86_400, str(path), "image/png", *UHD, path.stat().st_size, "0123456789abcdef" * 4
            )
        )
    task = Task(task_id, COMPLETED, 100.0, now, results=tuple(image.url for image in saved_images), credits_used=42.0)
    body = {"model": "gpt-image-2", "prompt": "a fox", "size": "16:9", "resolution": "4K", "n": pictures, **request}
    journal = world.studio.journal
    entry = Entry(new_key(), journal.owner, "submitted", now - number, request=body, task=task,
                  images=tuple(saved_images), account=journal.account)  # fmt: skip
    await journal.intend(entry)
    return task_id


def length(answer: Any) -> int:
    """Return the length of the answer as JSON with everything beyond ASCII escaped, the longest form."""
    return len(json.dumps(json.loads(answer.model_dump_json(by_alias=True, exclude_none=True))))


def previews_in(answer: Any) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(b.data))) for b in answer.content if b.type == "image"]


def chunks(webp: bytes) -> set[bytes]:
    """Return the names of the chunks of a WebP file."""
    names: set[bytes] = set()
    position = 12
    while position < len(webp):
        names.add(webp[position : position + 4])
        size = int.from_bytes(webp[position + 4 : position + 8], "little")
        position += 8 + size + size % 2
    return names


# --- size of answers ---


@ERAS
@pytest.mark.parametrize(
    ("request_", "pictures"),
    [
        pytest.param({}, 10, id="short prompt"),
        pytest.param({"prompt": LONGEST_PROMPT}, 10, id="longest prompt"),
        pytest.param({"prompt": '"\\' * 16_000}, 10, id="prompt of quotes"),
        pytest.param(
            {"prompt": LONGEST_PROMPT, "image_urls": ["https://e.org/" + "x" * 8_000] * 16}, None, id="longest request"
        ),
    ],
)
async def test_an_answer_with_ten_4k_images_is_below_the_limit(
    world: World, uhd_jpeg: Path, mode: str, request_: dict[str, Any], pictures: int | None
) -> None:
    await check_ten_images(world, uhd_jpeg, mode, request_, pictures)


async def test_an_answer_with_ten_4k_pngs_is_below_the_limit(world: World, uhd: Path) -> None:
    await check_ten_images(world, uhd, "auto", {}, 10)


async def check_ten_images(
    world: World, picture: Path, mode: str, request_: dict[str, Any], pictures: int | None
) -> None:
    task_id = await add_task(world, 1, picture, **request_)
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            answer = await client.call_tool("get_task", {"task_id": task_id})
            task = await client.read_resource(f"evolink://tasks/{task_id}")
    assert length(answer) < NEVER_ABOVE
    assert len(answer.model_dump_json(by_alias=True)) < ANSWER_MAX
    assert length(task) < NEVER_ABOVE
    assert pictures is None or len(previews_in(answer)) == pictures
    assert all(max(picture.size) <= 512 for picture in previews_in(answer))


@ERAS
async def test_the_longest_list_is_below_the_limit_and_its_pages_are_complete(
    world: World, uhd: Path, mode: str
) -> None:
    for number in range(LIST_MAX + 1):
        await add_task(world, number, uhd, prompt=LONGEST_PROMPT)
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            arguments = {"limit": LIST_MAX, "detail": True}
            answer = await client.call_tool("list_tasks", arguments)
            parts = [answer]
            while cursor := parts[-1].structured_content["next_cursor"]:
                parts.append(await client.call_tool("list_tasks", {**arguments, "cursor": cursor}))
    ids = [task["task_id"] for part in parts for task in part.structured_content["tasks"]]
    assert len(answer.structured_content["tasks"]) >= 15
    assert len(set(ids)) == len(ids) == LIST_MAX + 1
    assert all(length(part) < NEVER_ABOVE for part in parts)


async def test_a_list_of_the_longest_requests_is_below_the_limit(world: World, uhd: Path) -> None:
    for number in range(LIST_MAX):
        await add_task(world, number, uhd, prompt=LONGEST_PROMPT, image_urls=["https://e.org/" + "x" * 8_000] * 16)
    with anyio.fail_after(300):
        async with world.client() as client:
            answer = await client.call_tool("list_tasks", {"limit": LIST_MAX, "detail": True})
    assert length(answer) < NEVER_ABOVE


@pytest.mark.parametrize("edge", [64, 1024, 2048])
async def test_view_image_of_a_4k_image_is_below_the_limit(world: World, uhd: Path, edge: int) -> None:
    task_id = await add_task(world, 1, uhd, pictures=1)
    with anyio.fail_after(300):
        async with world.client() as client:
            answer = await client.call_tool("view_image", {"task_id": task_id, "max_edge": edge})
    (picture,) = previews_in(answer)
    assert length(answer) < NEVER_ABOVE
    assert max(picture.size) <= edge
    assert max(picture.size) >= min(edge, 512)


@pytest.mark.parametrize(
    ("count", "edge"),
    [pytest.param(1, 1024, id="one"), pytest.param(2, 768, id="two"), pytest.param(10, 512, id="ten")],
)
async def test_more_images_get_smaller_previews(world: World, count: int, edge: int) -> None:
    with anyio.fail_after(300):
        async with world.client() as client:
            arguments = {"prompt": "sim:fast a fox", "size": "16:9", "resolution": "2K", "n": count}
            answer = await client.call_tool("generate_image", arguments)
    pictures = previews_in(answer)
    assert [(edge, edge * 9 // 16)] * count == [picture.size for picture in pictures]
    assert {picture.format for picture in pictures} == {"WEBP"}


# --- contents of answers ---


@ERAS
async def test_the_text_comes_first_and_has_the_markdown_line(world: World, mode: str) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            answer = await client.call_tool(
                "generate_image", {"prompt": "sim:fast a fox", "save_as": "a (b)/my fox.png"}
            )
    path = world.folder / "pictures" / "a (b)" / "my fox.png"
    assert [block.type for block in answer.content] == ["text", "image"]
    assert f"![sim:fast a fox](<{path}>)" in answer.content[0].text
    assert answer.structured_content["images"][0]["markdown"] == f"![sim:fast a fox](<{path}>)"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_preview_has_no_metadata(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture"
    path.write_bytes(image_with_metadata(kind))
    assert SECRET.encode() in path.read_bytes()
    small = preview(path.read_bytes(), 128, 100_000)
    assert small is not None
    assert SECRET.encode() not in small
    assert chunks(small) <= {b"VP8 ", b"VP8L", b"VP8X", b"ALPH"}


@pytest.mark.parametrize(
    ("picture", "mode"),
    [
        pytest.param(drawing(mode="RGBA"), "RGBA", id="transparent PNG"),
        pytest.param(drawing(mode="RGBA", kind="WEBP"), "RGBA", id="transparent WebP"),
        pytest.param(drawing(mode="LA"), "RGBA", id="transparent grey"),
        pytest.param(drawing(mode="L"), "RGB", id="grey"),
        pytest.param(drawing(mode="P"), "RGB", id="palette"),
        pytest.param(drawing(mode="1"), "RGB", id="black and white"),
        pytest.param(drawing(mode="CMYK", kind="JPEG"), "RGB", id="JPEG for print"),
        pytest.param(drawing((1, 3000)), "RGB", id="a line"),
    ],
)
def test_a_preview_of_every_image_mode_keeps_transparency(tmp_path: Path, picture: bytes, mode: str) -> None:
    path = tmp_path / "picture"
    path.write_bytes(picture)
    small = preview(path.read_bytes(), 32, 100_000)
    assert small is not None
    with Image.open(io.BytesIO(small)) as small_image:
        assert small_image.mode == mode
        assert max(small_image.size) <= 32


def test_a_small_image_is_not_enlarged(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(drawing((64, 48)))
    with Image.open(io.BytesIO(preview(path.read_bytes(), 1024, 100_000) or b"")) as small_image:
        assert small_image.size == (64, 48)


@pytest.mark.parametrize("budget", [525_000, 100_000, 15_000, 100])
def test_a_preview_is_within_its_budget_or_none(tmp_path: Path, budget: int) -> None:
    path = tmp_path / "picture"
    path.write_bytes(noise((1600, 1200)))
    small = preview(path.read_bytes(), 1024, budget)
    assert (small is None) == (budget == 100)
    assert small is None or len(small) <= budget


# --- unreadable files ---


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_text("a letter"), id="a letter"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:900]), id="cut"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), id="a folder"),
        pytest.param(lambda path: (path.unlink(), os.mkfifo(path)), id="a pipe"),
    ],
)
async def test_an_unreadable_image_file_is_no_error_of_the_task(world: World, change: Any) -> None:
    with anyio.fail_after(300):
        async with world.client() as client:
            facts = (await client.call_tool("generate_image", {"prompt": "sim:fast a fox", "n": 2})).structured_content
            change(Path(facts["images"][0]["path"]))
            world.clock.now += 25 * 3600  # the link has expired, so the file cannot be downloaded again
            repeat = await client.call_tool("get_task", {"task_id": facts["task_id"]})
            view = await client.call_tool("view_image", {"task_id": facts["task_id"]})
    assert repeat.is_error is False
    assert len(previews_in(repeat)) == 1
    assert view.is_error is True
    assert facts["images"][0]["path"] in view.content[0].text


# --- settings ---


@pytest.mark.parametrize(
    ("setting", "edge"),
    [("", 1024), ("auto", 1024), ("256", 256), ("64", 64), ("off", None), ("${PREVIEW}", 1024)],
)
async def test_the_setting_decides_the_size_of_previews(open_world: Open, setting: str, edge: int | None) -> None:
    async with open_world({"EVOLINK_MCP_PREVIEW": setting}) as world:
        with anyio.fail_after(300):
            async with Client(server_for(world.studio, world.settings), client_info=TEST_CLIENT) as client:
                arguments = {"prompt": "sim:fast a fox", "size": "2048x1152"}
                answer = await client.call_tool("generate_image", arguments)
    assert answer.is_error is False
    assert [max(picture.size) for picture in previews_in(answer)] == ([edge] if edge else [])


@pytest.mark.parametrize(("setting", "count"), [("", 0), ("0", 0), ("1", 2)])
async def test_the_setting_decides_about_resource_links(open_world: Open, setting: str, count: int) -> None:
    async with open_world({"EVOLINK_MCP_RESOURCE_LINKS": setting}) as world:
        with anyio.fail_after(300):
            async with Client(server_for(world.studio, world.settings)) as client:
                answer = await client.call_tool("generate_image", {"prompt": "sim:fast a fox", "n": 2})
                links = [block for block in answer.content if block.type == "resource_link"]
                assert len(links) == count
                for link, image in zip(links, answer.structured_content["images"], strict=bool(count)):
                    assert (str(link.uri), link.mime_type) == (image["resource_uri"], image["mime_type"])
                    assert (await client.read_resource(str(link.uri))).contents


# --- view_image ---


@ERAS
async def test_view_image_returns_the_image_without_structured_content(world: World, mode: str) -> None:
    """Several hosts give the model only the structured content if an answer has one."""
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            facts = (await client.call_tool("generate_image", {"prompt": "sim:fast a fox", "n": 2})).structured_content
            (tool,) = [tool for tool in (await client.list_tools()).tools if tool.name == "view_image"]
            answer = await client.call_tool("view_image", {"task_id": facts["task_id"], "index": 1, "max_edge": 300})
            beyond = await client.call_tool("view_image", {"task_id": facts["task_id"], "index": 2})
    assert tool.output_schema is None
    assert answer.structured_content is None
    assert [block.type for block in answer.content] == ["image", "text"]
    assert facts["images"][1]["path"] in answer.content[1].text
    assert [max(picture.size) for picture in previews_in(answer)] == [300]
    assert beyond.is_error is True
    assert "no saved picture 2" in beyond.content[0].text
    assert world.posts == 1
