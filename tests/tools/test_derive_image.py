"""derive_image makes exact files from a saved or local picture: nothing is bought, nothing is overwritten."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Open, World
from drawings import drawing, noise
from PIL import Image

from evolink_mcp.journal.entry import DerivedFile
from evolink_mcp.studio.derive import SOURCE_MAX_BYTES

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
TARGETS = [
    "og", "facebook-cover", "twitter", "twitter-header", "instagram-square", "instagram-portrait", "instagram-story",
    "youtube-thumbnail", "youtube-banner", "linkedin", "linkedin-banner", "pinterest", "hd", "full-hd", "favicon",
    "windows-icon", "apple-touch-icon", "app-icon", "android-icon", "a4-300dpi", "a5", "a6-landscape", "letter",
    "1200x628", "728x90",
]  # fmt: skip


async def buy(client: Any, **arguments: Any) -> Any:
    answer = await client.call_tool(
        "generate_image", {"prompt": "sim:fast a fox", "size": "1024x1024", "output_format": "png", **arguments}
    )
    return answer.structured_content


async def derive(client: Any, **arguments: Any) -> Any:
    answer = await client.call_tool("derive_image", arguments)
    assert not answer.is_error, answer.content[0].text
    return answer.structured_content


async def refusal_text(client: Any, **arguments: Any) -> str:
    answer = await client.call_tool("derive_image", arguments)
    assert answer.is_error
    assert answer.structured_content["error"] is not None or answer.structured_content["files"]
    return answer.content[0].text


def size_of(path: str) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


def local_picture(world: World, name: str = "photo.png", content: bytes | None = None) -> Path:
    path = world.folder / "pictures" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content or noise((400, 300)))
    return path


async def test_25_targets_from_one_paid_picture_are_pixel_exact_and_cost_nothing(world: World) -> None:
    async with world.client() as client:
        task = await buy(client)
        credits = task["credits"]
        assert len(TARGETS) == 25
        out = await derive(client, source=task["task_id"], targets=TARGETS)
        spent = (await client.call_tool("list_tasks", {})).structured_content["spent"]["today"]["credits"]
    assert [file["target"] for file in out["files"]] == TARGETS
    from evolink_mcp.api.targets import parse_target

    for file in out["files"]:
        size = parse_target(file["target"]).size
        assert (file["width"], file["height"]) == (size.width, size.height) == size_of(file["path"])
        content = Path(file["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
    assert spent == credits
    assert world.posts == 1


async def test_text_and_structured_content_have_the_same_facts(world: World) -> None:
    async with world.client() as client:
        task = await buy(client)
        answer = await client.call_tool("derive_image", {"source": task["task_id"], "targets": ["og", "favicon"]})
    text = answer.content[0].text
    for file in answer.structured_content["files"]:
        for name in ("target", "path", "width", "height", "mime_type", "sha256", "markdown"):
            assert str(file[name]) in text
        assert f"{file['bytes']:,}" in text


@pytest.mark.parametrize("form", ["id", "uri", "path", "last", "url", "markdown"])
async def test_the_source_may_be_anything_that_names_the_picture(world: World, form: str) -> None:
    async with world.client() as client:
        task = await buy(client)
        image = task["images"][0]
        source = {
            "id": task["task_id"],
            "uri": image["resource_uri"],
            "path": image["path"],
            "last": "last",
            "url": image["url"],
            "markdown": image["markdown"],
        }[form]
        out = await derive(client, source=source, targets=["64x64"])
    assert out["source"] == image["path"]
    assert Path(out["files"][0]["path"]).parent == Path(image["path"]).parent
    assert Path(out["files"][0]["path"]).name == f"{Path(image['path']).stem}-64x64.png"


async def test_one_of_several_pictures_needs_its_index(world: World) -> None:
    async with world.client() as client:
        task = await buy(client, n=2)
        assert "2 pictures" in await refusal_text(client, source=task["task_id"], targets=["64x64"])
        out = await derive(client, source=task["task_id"], index=1, targets=["64x64"])
    assert Path(out["files"][0]["path"]).name.endswith("-1-64x64.png")


async def test_no_file_is_overwritten_and_the_same_call_makes_no_second_file(world: World) -> None:
    photo = local_picture(world)
    occupied_path = photo.with_name("photo-64x64.png")
    occupied_path.write_bytes(b"mine")
    async with world.client() as client:
        first = await derive(client, source=str(photo), targets=["64x64"])
        second = await derive(client, source=str(photo), targets=["64x64"])
        other = await derive(client, source=str(photo), targets=["64x64"], fit="pad")
    assert occupied_path.read_bytes() == b"mine"
    assert Path(first["files"][0]["path"]).name == "photo-64x64-1.png"
    assert second["files"] == first["files"]
    assert Path(other["files"][0]["path"]).name == "photo-64x64-2.png"
    assert photo.read_bytes() != b"mine"
    assert not list(photo.parent.glob(".evolink-*")), "no unfinished file stays"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
async def test_a_derived_file_and_its_sidecar_are_readable_only_for_this_user(world: World) -> None:
    photo = local_picture(world)
    async with world.client() as client:
        out = await derive(client, source=str(photo), targets=["64x64"])
    path = Path(out["files"][0]["path"])
    assert [oct(os.stat(file).st_mode & 0o777) for file in (path, Path(f"{path}.json"))] == ["0o600", "0o600"]


async def test_a_source_outside_the_output_folder_gets_its_files_in_the_output_folder(
    open_world: Open, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "photo.png").write_bytes(drawing())
    folders = os.pathsep.join([str(photos), str(tmp_path / "pictures")])
    async with open_world({"EVOLINK_MCP_ALLOWED_DIRS": folders}) as world, world.client() as client:
        out = await derive(client, source=str(photos / "photo.png"), targets=["64x64"])
    assert Path(out["files"][0]["path"]) == (tmp_path / "pictures" / "photo-64x64.png").resolve()
    assert [path.name for path in photos.iterdir()] == ["photo.png"]


async def test_sidecar_and_journal_record_the_source(world: World) -> None:
    async with world.client() as client:
        task = await buy(client)
        image = task["images"][0]
        out = await derive(client, source=task["task_id"], targets=["og", "64x64"])
        files = out["files"]
        facts = json.loads(Path(f"{files[0]['path']}.json").read_text("utf-8"))
        assert facts["derived_from"]["path"] == image["path"]
        assert facts["derived_from"]["sha256"] == image["sha256"]
        assert (facts["derived_from"]["task_id"], facts["derived_from"]["index"]) == (task["task_id"], 0)
        assert (facts["target"], facts["sha256"], facts["width"]) == ("og", files[0]["sha256"], 1200)
        entry = await world.studio.journal.by_task(task["task_id"])
        assert entry is not None
        assert [(file.target, file.path) for file in entry.images[0].derived] == [
            (file["target"], file["path"]) for file in files
        ]
        await derive(client, source=task["task_id"], targets=["og"])
        entry = await world.studio.journal.by_task(task["task_id"])
        assert entry is not None
        assert len(entry.images[0].derived) == 2, "the same file is recorded once"


async def test_a_record_of_derived_files_changes_nothing_else_of_the_entry(world: World) -> None:
    async with world.client() as client:
        task = await buy(client)
    before = await world.studio.journal.by_task(task["task_id"])
    file = DerivedFile("og", "image/png", 1200, 630, 9, "0" * 64, "/x.png")
    assert await world.studio.journal.add_derived(task["task_id"], 0, [file])
    assert not await world.studio.journal.add_derived(task["task_id"], 5, [file])
    assert not await world.studio.journal.add_derived("task-unified-1-none", 0, [file])
    after = await world.studio.journal.by_task(task["task_id"])
    assert before is not None
    assert after is not None
    assert after.images[0].derived == (file,)
    assert (after.task, after.phase, after.images[0].path) == (before.task, before.phase, before.images[0].path)


async def test_a_derived_file_can_itself_be_a_source(world: World) -> None:
    async with world.client() as client:
        task = await buy(client)
        banner = (await derive(client, source=task["task_id"], targets=["1200x300"]))["files"][0]["path"]
        small = await derive(client, source=banner, targets=["40x40"], fit="contain")
    assert (small["files"][0]["width"], small["files"][0]["height"]) == (40, 10)
    assert json.loads(Path(f"{small['files'][0]['path']}.json").read_text("utf-8"))["task_id"] == task["task_id"]


async def test_notes_name_an_enlargement_a_lost_transparency_and_a_lowered_quality(world: World) -> None:
    photo = local_picture(world, content=noise((200, 100)))
    clear = local_picture(world, "clear.png", drawing(mode="RGBA"))
    async with world.client() as client:
        out = await derive(client, source=str(photo), targets=["400x200"])
        assert any("400x200 is larger than the source (200x100)" in note for note in out["notes"])
        out = await derive(client, source=str(clear), targets=["20x20"], format="jpg")
        assert any("transparent parts are filled" in note for note in out["notes"])
        out = await derive(client, source=str(photo), targets=["200x100"], format="jpeg", max_bytes=12_000)
        assert out["files"][0]["bytes"] <= 12_000
        assert any("fits max_bytes" in note for note in out["notes"])


async def test_a_target_that_fails_does_not_stop_the_others(world: World) -> None:
    photo = local_picture(world)
    async with world.client() as client:
        out = await derive(client, source=str(photo), targets=["300x300", "8x8"], format="png", max_bytes=2_000)
        large, small = out["files"]
        assert "at least" in large["error"]
        assert large["path"] is None
        assert small["error"] is None
        text = await refusal_text(client, source=str(photo), targets=["300x300"], format="png", max_bytes=2_000)
    smallest = int(text.rpartition("Give max_bytes=")[2].partition(",")[0])
    async with world.client() as client:
        out = await derive(client, source=str(photo), targets=["300x300"], format="png", max_bytes=smallest)
    assert out["files"][0]["bytes"] <= smallest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"targets": ["instagram-sqare"]}, "did you mean instagram-square"),
        ({"targets": ["20000x20000"]}, "the largest target of this shape is 6000x6000"),
        ({"targets": []}, "targets"),
        ({"targets": ["8x8"] * 26}, "25"),
        ({"targets": ["og"], "gravity": "upstairs"}, "a corner such as top-left"),
        ({"targets": ["og"], "gravity": "0.3,1.4"}, "0.3,1"),
        ({"targets": ["og"], "background": "blu"}, "blue"),
        ({"targets": ["og"], "format": "gif"}, "'source', 'png', 'jpeg', 'webp' or 'ico'"),
        ({"targets": ["og"], "quality": 101}, "100"),
        ({"targets": ["og"], "format": "ico"}, "Use 256x256, or the format png"),
        ({"targets": ["og"], "format": "jpeg", "background": "transparent"}, "jpeg cannot be transparent"),
        ({"targets": ["og"], "sizes": "1x1"}, "unknown argument"),
    ],
)
async def test_bad_input_is_refused_with_the_nearest_valid_value_and_makes_no_file(
    world: World, arguments: dict[str, Any], words: str
) -> None:
    photo = local_picture(world)
    async with world.client() as client:
        assert words in await refusal_text(client, source=str(photo), **arguments)
    assert world.files == [photo]


async def test_a_file_outside_the_allowed_folders_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(drawing())
    local_picture(world)
    link = tmp_path / "pictures" / "link.png"
    if sys.platform != "win32":
        link.symlink_to(tmp_path / "secret.png")
    async with world.client() as client:
        for source in (tmp_path / "secret.png", link, tmp_path / "pictures" / ".." / "secret.png"):
            text = await refusal_text(client, source=str(source), targets=["8x8"])
            assert "outside the allowed folders" in text or "no file" in text
    assert not list(tmp_path.rglob("*8x8*"))


async def test_a_file_that_is_no_picture_is_refused(world: World) -> None:
    letter = local_picture(world, "letter.png", b"a letter")
    async with world.client() as client:
        assert "not a PNG, JPEG or WebP" in await refusal_text(client, source=str(letter), targets=["8x8"])


async def test_a_file_above_the_limit_is_refused(world: World) -> None:
    photo = local_picture(world)
    os.truncate(photo, SOURCE_MAX_BYTES + 1)
    async with world.client() as client:
        assert "too large" in await refusal_text(client, source=str(photo), targets=["8x8"])


async def test_a_deleted_picture_is_refused_with_the_next_step(world: World) -> None:
    async with world.client() as client:
        task = await buy(client)
        Path(task["images"][0]["path"]).unlink()
        assert "Call get_task" in await refusal_text(client, source=task["task_id"], targets=["8x8"])


async def test_without_a_key_the_tool_works(open_world: Open) -> None:
    async with open_world({"EVOLINK_API_KEY": ""}) as world, world.client() as client:
        photo = local_picture(world)
        out = await derive(client, source=str(photo), targets=["8x8"])
    assert size_of(out["files"][0]["path"]) == (8, 8)
    assert world.simulator.requests == []


@pytest.mark.parametrize(("setting", "has_metadata"), [("0", False), ("1", True)])
async def test_metadata_are_added_only_by_the_setting(open_world: Open, setting: str, has_metadata: bool) -> None:
    async with open_world({"EVOLINK_MCP_METADATA": setting}) as world, world.client() as client:
        task = await buy(client)
        out = await derive(client, source=task["task_id"], targets=["64x64"], format="png")
        content = Path(out["files"][0]["path"]).read_bytes()
        assert (task["task_id"].encode() in content) is has_metadata
        assert (b"a fox" in content) is has_metadata
