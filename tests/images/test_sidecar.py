"""The sidecar: the same facts as every answer, written completely, never over another file, and optional."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import KEY, Open, World
from drawings import drawing
from PIL import Image

pytestmark = pytest.mark.anyio
SHARED = ("index", "path", "url", "url_expires_at", "mime_type", "width", "height", "bytes", "sha256")


async def buy(world: World, prompt: str = "sim:fast a fox", **fields: Any) -> Any:
    with anyio.fail_after(300):
        async with world.client() as client:
            return await client.call_tool("generate_image", {"prompt": prompt, **fields})


def sidecar_of(image: dict[str, Any]) -> Path:
    return Path(image["path"] + ".json")


@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.parametrize("options", [{}, {"save_as": "a b/hero (1).png", "size": "16:9", "output_format": "webp"}])
async def test_a_picture_is_the_same_in_text_structure_resource_sidecar_and_on_disk(
    world: World, mode: str, options: dict[str, Any]
) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            answer = await client.call_tool("generate_image", {"prompt": "sim:fast a fox", "n": 2, **options})
            facts, text = answer.structured_content, answer.content[0].text
            (page,) = (await client.read_resource(f"evolink://tasks/{facts['task_id']}")).contents
            assert len(facts["images"]) == 2
            for image in facts["images"]:
                (blob,) = (await client.read_resource(image["resource_uri"])).contents
                content = Path(image["path"]).read_bytes()
                with Image.open(image["path"]) as picture:
                    assert (image["width"], image["height"]) == picture.size
                    assert image["mime_type"] == picture.get_format_mimetype() == blob.mime_type
                assert hashlib.sha256(content).hexdigest() == image["sha256"]
                assert len(content) == image["bytes"]
                record = json.loads(sidecar_of(image).read_text("utf-8"))
                assert {name: image[name] for name in SHARED} == {name: record[name] for name in SHARED}
                for name in ("path", "url", "sha256", "resource_uri", "url_expires_at", "markdown"):
                    assert image[name] in text
                assert (
                    f"{image['width']}×{image['height']} pixels, {image['mime_type']}, {image['bytes']:,} bytes" in text
                )
                assert image["path"] in image["markdown"]
    assert json.loads(page.text)["images"] == facts["images"]


async def test_the_sidecar_has_the_request_of_the_image(world: World) -> None:
    answer = await buy(world, size="16:9", quality="low", callback_url="https://hooks.evolink-team.dev/x?token=hush")
    facts = answer.structured_content
    record = json.loads(sidecar_of(facts["images"][0]).read_text("utf-8"))
    assert record["made_by"].startswith("evolink-mcp ")
    assert record["prompt"] == "sim:fast a fox"
    assert record["request"] == {"model": "gpt-image-2", "size": "16:9", "quality": "low"}
    assert (record["task_id"], record["created_at"]) == (facts["task_id"], facts["created_at"])
    assert set(record) == {"made_by", "prompt", "request", "references", "task_id", "created_at", *SHARED}


async def test_neither_the_key_nor_a_callback_address_is_in_the_sidecar(world: World) -> None:
    answer = await buy(world, callback_url="https://hooks.evolink-team.dev/x?token=hush")
    sidecar = sidecar_of(answer.structured_content["images"][0]).read_text("utf-8")
    assert KEY not in sidecar
    assert "hush" not in sidecar


async def test_only_the_owner_can_read_the_sidecar_and_no_other_file_stays(world: World) -> None:
    answer = await buy(world)
    (image,) = answer.structured_content["images"]
    assert stat.S_IMODE(sidecar_of(image).stat().st_mode) == 0o600
    assert {Path(image["path"]), sidecar_of(image)} == set((world.folder / "pictures").iterdir())


@pytest.mark.parametrize(
    ("value", "has_sidecar"),
    [("", True), ("1", True), ("on", True), ("0", False), ("off", False), ("${SIDECAR}", True)],
)
async def test_the_setting_disables_the_sidecar(open_world: Open, value: str, has_sidecar: bool) -> None:
    async with open_world({"EVOLINK_MCP_SIDECAR": value}) as world:
        answer = await buy(world)
        assert sidecar_of(answer.structured_content["images"][0]).exists() is has_sidecar


def write_file(path: Path, content: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)


@pytest.mark.parametrize(
    "foreign",
    [
        pytest.param("{}", id="JSON of somebody"),
        pytest.param('{"made_by": "another-tool", "sha256": "1"}', id="JSON of another tool"),
        pytest.param('["made_by", "evolink-mcp"]', id="a list"),
        pytest.param("not JSON", id="no JSON"),
        pytest.param("", id="empty"),
        pytest.param("[" * 100_000, id="brackets without end"),
    ],
)
async def test_a_file_of_another_program_stays(world: World, foreign: str) -> None:
    path = world.folder / "pictures" / "hero.png.json"
    write_file(path, foreign)
    answer = await buy(world, save_as="hero.png")
    (image,) = answer.structured_content["images"]
    assert (answer.is_error, Path(image["path"]).name) == (False, "hero.png")
    assert path.read_text() == foreign


async def test_a_link_at_the_path_of_the_sidecar_is_not_followed(world: World) -> None:
    path, secret = world.folder / "pictures" / "hero.png.json", world.folder / "settings.json"
    write_file(secret, '{"made_by": "evolink-mcp", "sha256": "1"}')
    path.parent.mkdir()
    path.symlink_to(secret)
    answer = await buy(world, save_as="hero.png")
    assert answer.is_error is False
    assert secret.read_text() == '{"made_by": "evolink-mcp", "sha256": "1"}'
    assert path.is_symlink()


async def test_a_pipe_at_the_path_of_the_sidecar_does_not_block_the_image(world: World) -> None:
    path = world.folder / "pictures" / "hero.png.json"
    path.parent.mkdir()
    os.mkfifo(path)
    answer = await buy(world, save_as="hero.png")
    assert answer.is_error is False


async def test_the_sidecar_of_a_deleted_picture_is_replaced_by_the_next_one_of_its_name(world: World) -> None:
    first = (await buy(world, save_as="hero.png")).structured_content
    Path(first["images"][0]["path"]).unlink()
    second = (await buy(world, "sim:fast a cat", save_as="hero.png")).structured_content
    (image,) = second["images"]
    record = json.loads(sidecar_of(image).read_text("utf-8"))
    assert Path(image["path"]).name == "hero.png"
    assert (record["task_id"], record["sha256"]) == (second["task_id"], image["sha256"])


async def test_the_sidecar_is_restored_with_a_deleted_image(world: World) -> None:
    facts = (await buy(world)).structured_content
    (image,) = facts["images"]
    before = json.loads(sidecar_of(image).read_text("utf-8"))
    Path(image["path"]).unlink()
    sidecar_of(image).unlink()
    with anyio.fail_after(300):
        async with world.client() as client:
            await client.call_tool("get_task", {"task_id": facts["task_id"]})
    assert json.loads(sidecar_of(image).read_text("utf-8")) == before


async def test_an_image_is_saved_although_its_sidecar_cannot_be_written(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_fsync = os.fsync

    def fail_for_sidecars(handle: int) -> None:
        if os.fstat(handle).st_size < 2_000:
            raise OSError(28, "No space left on device")
        real_fsync(handle)

    monkeypatch.setattr(os, "fsync", fail_for_sidecars)
    answer = await buy(world)
    (image,) = answer.structured_content["images"]
    assert answer.is_error is False
    assert [Path(image["path"])] == list((world.folder / "pictures").iterdir())
    assert "cannot be written (No space left on device)" in caplog.text


async def test_a_task_of_another_client_gets_a_sidecar_with_the_known_facts(open_world: Open, world: World) -> None:
    """Another client with the same key bought the image, so this server does not know the request."""
    await buy(world, wait_seconds=0)
    (task_id,) = world.simulator.tasks
    world.clock.now += 60
    environ = {
        "EVOLINK_MCP_DATA_DIR": str(world.folder / "data2"),
        "EVOLINK_MCP_OUTPUT_DIR": str(world.folder / "pictures2"),
    }
    async with open_world(environ, simulator=world.simulator, clock=world.clock) as second:
        with anyio.fail_after(300):
            async with second.client() as client:
                facts = (await client.call_tool("get_task", {"task_id": task_id})).structured_content
    record = json.loads(sidecar_of(facts["images"][0]).read_text("utf-8"))
    assert (record["prompt"], record["request"], record["task_id"]) == (None, {}, task_id)


async def test_a_sidecar_is_refused_as_a_reference(open_world: Open, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    write_file(folder / "cat.png.json", "{}")
    (folder / "cat.png").write_bytes(drawing())
    async with open_world() as world:
        answer = await buy(world, image_urls=[str(folder / "cat.png.json")])
    assert answer.is_error is True
    assert world.simulator.requests == []
