"""No image is bought that cannot be saved, and a paid image that cannot be saved in its folder is saved elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import anyio
import httpx2 as httpx
import pytest
from conftest import Clock, Open, PlainSimulator, World

from evolink_mcp.errors import FolderRefused
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.images.folders import NAME_MAX_BYTES, Folders
from evolink_mcp.images.store import LocalImageStore, default_stem
from evolink_mcp.journal.entry import Entry, Phase
from evolink_mcp.journal.sqlite import SqliteJournal

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

REQUEST = {"prompt": "a fox", "size": "1024x640", "quality": "low"}
THAI = "ภาพถ่ายทิวทัศน์ยามเย็นของวัดอรุณริมแม่น้ำเจ้าพระยาที่มีเรือหางยาวแล่นผ่าน" * 2
JAPANESE = "夕暮れの海辺に立つ古い灯台とその上を飛ぶ白い鳥の群れを描いた水彩画" * 3
THAI_WORDS = "วัดอรุณ แม่น้ำ ยามเย็น เรือหางยาว แสงแดด ท้องฟ้า สีทอง นกบิน"
RARE = "𠀀" * 60 + " ของวัดอรุณ"
PROMPTS = {"Thai": THAI, "Japanese": JAPANESE, "rare": RARE, "words": THAI_WORDS, "Latin": "x" * 300}


async def call(world: World, tool: str, arguments: dict[str, Any]) -> Any:
    async with world.client() as client:
        return await client.call_tool(tool, arguments)


class PutsFileInPlace(httpx.ASGITransport):
    """Replace a folder by a file when the first image is downloaded, as if a drive was removed after the POST."""

    def __init__(self, simulator: PlainSimulator, folder: Path) -> None:
        super().__init__(simulator.app)
        self.folder = folder

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.startswith("/v1/tasks/") and not self.folder.exists():
            self.folder.write_text("not a folder")
        return await super().handle_async_request(request)


# --- before the POST ---


def put_file_in_place(folder: Path) -> None:
    folder.write_text("not a folder")


def put_file_above(folder: Path) -> None:
    folder.parent.write_text("not a folder")


@pytest.mark.parametrize("damage", [put_file_in_place, put_file_above])
@pytest.mark.parametrize("save_as", [None, "blog/hero.png"])
async def test_nothing_is_bought_for_a_folder_that_cannot_be_written(
    open_world: Open, tmp_path: Path, damage: Callable[[Path], None], save_as: str | None
) -> None:
    folder = tmp_path / "drive" / "pictures"
    damage(folder) if damage is put_file_above else (folder.parent.mkdir(), damage(folder))
    arguments = {**REQUEST, **({"save_as": save_as} if save_as else {})}
    async with open_world({"EVOLINK_MCP_OUTPUT_DIR": str(folder)}) as world:
        answers = [await call(world, "generate_image", arguments) for _ in range(3)]
    for answer in answers:
        assert answer.is_error
        assert answer.structured_content["charged"] == "no"
        assert answer.structured_content["error"]["code"] == "folder_refused"
        assert "Charged: no" in answer.content[0].text
    assert world.posts == 0


async def test_a_folder_that_held_images_and_is_away_is_not_created_again_and_buys_nothing(
    open_world: Open, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    async with open_world() as world:
        await call(world, "generate_image", REQUEST)
    folder.rename(tmp_path / "unplugged")
    async with open_world(simulator=world.simulator, clock=world.clock) as world:
        refusal = await call(world, "generate_image", {**REQUEST, "prompt": "a cat"})
        assert (refusal.structured_content["charged"], world.posts) == ("no", 1)
        assert "connect its drive" in refusal.content[0].text
        assert not folder.exists()
        (tmp_path / "unplugged").rename(folder)
        purchase = await call(world, "generate_image", {**REQUEST, "prompt": "a cat"})
    assert (purchase.is_error, world.posts, len(world.files)) == (False, 2, 2)


async def test_a_check_before_the_purchase_leaves_no_file_and_no_folder(open_world: Open, tmp_path: Path) -> None:
    async with open_world({"EVOLINK_MCP_MAX_CREDITS_PER_CALL": "0.01"}) as world:
        refusal = await call(world, "generate_image", {**REQUEST, "save_as": "blog/hero.png"})
    assert refusal.structured_content["error"]["code"] == "over_budget"
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize(("free", "is_refused"), [(1024 * 640 * 4 * 2 - 1, True), (1024 * 640 * 4 * 2, False)])
async def test_a_disk_needs_space_for_all_images_without_compression(
    tmp_path: Path, decoder: Decoder, free: int, is_refused: bool
) -> None:
    journal = SqliteJournal(tmp_path / "data")
    store = LocalImageStore(
        Folders(tmp_path / "pictures", (tmp_path / "pictures",)),
        decoder,
        journal=journal,
        fallback=tmp_path / "fallback",
        free_bytes=lambda folder: free,
    )
    expected_outcome = pytest.raises(FolderRefused, match="free space") if is_refused else nullcontext()
    with expected_outcome:
        await store.check_space(None, 1024 * 640 * 4 * 2)
    await journal.close()


async def test_an_undelivered_purchase_is_returned_although_nothing_can_be_bought(
    open_world: Open, tmp_path: Path
) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=20)
    async with open_world(simulator=simulator, clock=clock) as world:
        await call(world, "generate_image", {**REQUEST, "wait_seconds": 0})
        while not world.files:
            await anyio.sleep(0.01)
        shutil.move(tmp_path / "pictures", tmp_path / "unplugged")
        repeat = await call(world, "generate_image", REQUEST)
    assert world.posts == 1
    assert repeat.structured_content["charged"] == "yes"


# --- names ---


@pytest.mark.parametrize(
    "prompt", [THAI, JAPANESE, RARE, THAI_WORDS, "x" * 300], ids=["Thai", "Japanese", "rare", "words", "Latin"]
)
@pytest.mark.parametrize("count", [1, 10])
async def test_a_file_name_and_its_sidecar_have_at_most_143_bytes(prompt: str, count: int) -> None:
    entry = Entry("key", "", Phase.SUBMITTED, 0.0, request={"prompt": prompt, "n": count})
    stem = default_stem(entry, count - 1)
    longest = f"{stem}-9999.webp.json"
    assert len(longest.encode()) <= NAME_MAX_BYTES
    assert len(stem) >= 20
    assert "\ufffd" not in stem


@pytest.mark.parametrize("prompt", [THAI, JAPANESE], ids=["Thai", "Japanese"])
async def test_images_of_long_prompts_keep_the_end_of_the_task_id(world: World, prompt: str) -> None:
    answer = await call(world, "generate_image", {**REQUEST, "prompt": prompt, "n": 2})
    names = [Path(image["path"]).name for image in answer.structured_content["images"]]
    end = answer.structured_content["task_id"].replace("-", "")[-8:]
    assert [name.endswith(f"{end}-{index}.png") for index, name in enumerate(names)] == [True, True]
    assert max(len(name.encode()) for name in names) <= NAME_MAX_BYTES


async def test_a_longest_save_as_keeps_the_index_and_gets_the_number_of_a_taken_name(
    world: World, tmp_path: Path
) -> None:
    save_as = "ก" * 46 + ".png"
    assert len(save_as.encode()) == NAME_MAX_BYTES - 1
    for prompt in ("a fox", "a cat"):
        await call(world, "generate_image", {**REQUEST, "prompt": prompt, "save_as": save_as, "n": 2})
    endings = sorted(path.name.lstrip("ก") for path in world.files)
    assert endings == ["-1-1.png", "-1.png", "-1.png", ".png"]
    assert save_as in [path.name for path in world.files]
    assert max(len(path.name.encode()) for path in world.files) <= NAME_MAX_BYTES


async def test_a_save_as_of_more_than_143_bytes_is_refused_before_the_purchase(world: World) -> None:
    refusal = await call(world, "generate_image", {**REQUEST, "save_as": "ก" * 47 + ".png"})
    assert (refusal.structured_content["charged"], world.posts) == ("no", 0)


# --- after the POST ---


async def test_a_paid_image_is_saved_into_the_data_folder_if_its_folder_cannot_be_written(
    open_world: Open, tmp_path: Path
) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=5)
    transport = PutsFileInPlace(simulator, tmp_path / "pictures")
    async with open_world(simulator=simulator, clock=clock, transport=transport) as world:
        answer = await call(world, "generate_image", {**REQUEST, "save_as": "hero.png"})
        view = await call(world, "view_image", {"task_id": answer.structured_content["task_id"]})
    (image,) = answer.structured_content["images"]
    path = tmp_path / "data" / "pictures" / "hero.png"
    assert not answer.is_error
    assert image["path"] == str(path)
    assert path.is_file()
    assert path.with_name("hero.png.json").is_file()
    notes = " ".join(answer.structured_content["notes"])
    assert "data folder" in notes
    assert str(tmp_path / "pictures") in notes
    assert [block.type for block in answer.content] == ["text", "image"]
    assert view.content[0].type == "image"
    assert world.posts == 1


@pytest.mark.journal_file
async def test_if_no_folder_can_be_written_the_answer_has_the_link_and_get_task_saves_later(
    open_world: Open, tmp_path: Path
) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=5)
    transport = PutsFileInPlace(simulator, tmp_path / "pictures")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pictures").write_text("not a folder")
    async with open_world(simulator=simulator, clock=clock, transport=transport) as world:
        answer = await call(world, "generate_image", REQUEST)
        assert answer.is_error
        assert answer.structured_content["charged"] == "yes"
        assert answer.structured_content["images"][0]["url"] is not None
        (tmp_path / "pictures").unlink()
        (tmp_path / "pictures").mkdir()
        repeat = await call(world, "get_task", {"task_id": answer.structured_content["task_id"]})
    assert repeat.structured_content["images"][0]["path"] == str(world.files[0])
    assert world.posts == 1


# --- another save_as ---


async def test_an_identical_order_that_joins_a_job_after_its_images_were_saved_gets_its_own_name(
    open_world: Open, tmp_path: Path
) -> None:
    """The journal is slow to record the end of the first job's work, and the second call gets the same job meanwhile."""
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0)
    is_releasing = anyio.Event()
    may_release = anyio.Event()

    def slow(journal: Any) -> Any:
        class Slow:
            def __getattr__(self, name: str) -> Any:
                return getattr(journal, name)

            async def release(self, key: str) -> None:
                is_releasing.set()
                await may_release.wait()
                await journal.release(key)

        return cast(Any, Slow())

    async with (
        open_world(simulator=simulator, clock=clock, wrap_journal=slow) as world,
        anyio.create_task_group() as group,
    ):
        async with world.client() as client:
            await client.call_tool("generate_image", {**REQUEST, "save_as": "first.png", "wait_seconds": 0})
            await is_releasing.wait()

            async def order_again() -> None:
                answer = await client.call_tool("generate_image", {**REQUEST, "save_as": "second.png"})
                answers.append(answer)

            answers: list[Any] = []
            group.start_soon(order_again)
            while not any(job.callers for job in world.studio.jobs):
                await anyio.sleep(0.01)
            may_release.set()
            while not answers:
                await anyio.sleep(0.01)
        group.cancel_scope.cancel()
    (image,) = answers[0].structured_content["images"]
    assert Path(image["path"]).name == "second.png"
    assert [path.name for path in world.files] == ["first.png", "second.png"]
    assert world.posts == 1
