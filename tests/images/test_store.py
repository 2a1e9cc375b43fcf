"""An image is saved completely or not at all, gets the suffix of its type, and replaces no other file."""

from __future__ import annotations

import hashlib
import io
import os
import random
import stat
import struct
import time
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import anyio
import pytest
from conftest import Open, World
from drawings import drawing, noise, png_without_pixels
from PIL import Image

from evolink_mcp.errors import DownloadFailed, FolderRefused
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.images.inspect import ImageFacts, sniff
from evolink_mcp.images.metadata import Origin
from evolink_mcp.images.previews import check_and_preview
from evolink_mcp.images.store import UnfinishedFiles, save_image
from evolink_mcp.images.unusable import UnusableImage

pytestmark = pytest.mark.anyio
PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700


async def buy(world: World, prompt: str, **options: Any) -> Any:
    with anyio.fail_after(300):
        async with world.client() as client:
            return await client.call_tool("generate_image", {"prompt": prompt, **options})


def examine(content: bytes) -> ImageFacts:
    """Decode all pixels, as the decoder process does."""
    return check_and_preview(content, edge=0)[0]


def files_below(folder: Path) -> list[str]:
    """Return every file below `folder`, also the hidden ones."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def download_of(content: bytes):
    """Return a download of `content` in two pieces."""

    async def fetch(target: BinaryIO) -> int:
        target.write(content[: len(content) // 2])
        await anyio.sleep(0)
        return target.write(content[len(content) // 2 :])

    return fetch


# --- from the purchase to the file ---


@pytest.mark.parametrize(
    ("options", "suffix", "mime_type"),
    [
        pytest.param({}, ".png", "image/png", id="EvoLink's default"),
        pytest.param({"output_format": "jpeg"}, ".jpg", "image/jpeg", id="jpeg"),
        pytest.param({"output_format": "webp", "background": "transparent"}, ".webp", "image/webp", id="webp"),
        pytest.param({"output_format": "jpeg", "save_as": "hero.png"}, ".jpg", "image/jpeg", id="named otherwise"),
    ],
)
async def test_the_suffix_of_a_picture_follows_its_content(
    world: World, options: dict, suffix: str, mime_type: str
) -> None:
    answer = await buy(world, "sim:fast a fox", **options)
    (image,) = answer.structured_content["images"]
    (file,) = world.files
    assert (str(file), file.suffix, mime_type) == (image["path"], suffix, image["mime_type"])
    assert sniff(file.read_bytes()[:16]) == (mime_type, suffix)


def with_credentials() -> bytes:
    """Return a PNG with content credentials (C2PA), a text of another program, and bytes after its end."""
    png = drawing()
    ihdr_end = 8 + 25
    chunks = b""
    for data in (b"caBXjumb-signature", b"tEXtSoftware\0another program"):
        chunks += struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    return png[:ihdr_end] + chunks + png[ihdr_end:] + b"bytes behind the end"


CONTENTS = [
    pytest.param(with_credentials(), id="PNG with content credentials"),
    pytest.param(drawing(kind="JPEG", xmp=b"<x/>"), id="JPEG with XMP"),
    pytest.param(drawing(kind="WEBP", xmp=b"<x/>"), id="WebP with XMP"),
]
ORIGIN = Origin("a fox", "task-unified-1-abc", "gpt-image-2")


@pytest.mark.parametrize("content", [*CONTENTS, pytest.param(drawing(), id="PNG")])
async def test_an_original_is_saved_byte_for_byte(tmp_path: Path, decoder: Decoder, content: bytes) -> None:
    saved_image = await save_image(download_of(content), tmp_path / "fox.png", decoder)
    assert Path(saved_image.path).read_bytes() == content


@pytest.mark.parametrize("content", CONTENTS)
async def test_the_origin_changes_no_file_with_a_signature(tmp_path: Path, decoder: Decoder, content: bytes) -> None:
    saved_image = await save_image(download_of(content), tmp_path / "fox.png", decoder, origin=ORIGIN)
    assert Path(saved_image.path).read_bytes() == content


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
async def test_metadata_are_added_to_the_original_by_the_setting(open_world: Open, kind: str) -> None:
    async with open_world({"EVOLINK_MCP_METADATA": "1"}) as world:
        answer = await buy(world, "sim:fast a fox", output_format=kind)
        (image,) = answer.structured_content["images"]
        content = Path(image["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (image["bytes"], image["sha256"])
        for text in (answer.structured_content["task_id"], "a fox", "gpt-image-2"):
            assert text.encode() in content
        assert examine(content).mime_type == f"image/{kind}"
        # A deleted original is downloaded again and is the same file.
        Path(image["path"]).unlink()
        async with world.client() as client:
            repeat = await client.call_tool("get_task", {"task_id": answer.structured_content["task_id"]})
        assert repeat.structured_content["images"][0]["sha256"] == image["sha256"]
        assert Path(image["path"]).read_bytes() == content


@pytest.mark.parametrize("fault", ["sim:not-a-picture", "sim:truncated-picture"])
async def test_an_incomplete_picture_is_not_saved_but_its_link_is_shown(world: World, fault: str) -> None:
    answer = await buy(world, f"sim:fast {fault} a fox")
    (image,) = answer.structured_content["images"]
    assert answer.is_error is True
    assert answer.structured_content["charged"] == "yes"
    assert (image["path"], image["resource_uri"], image["markdown"]) == (None, None, None)
    assert image["url"].startswith("http")
    assert image["url"] in answer.content[0].text
    assert "not usable" in image["error"]
    assert files_below(world.folder / "pictures") == []
    assert world.posts == 1


async def test_real_pixels_are_compared_with_the_computed_size(world: World) -> None:
    answer = await buy(world, "sim:fast sim:other-size a fox", size="16:9", resolution="2K")
    facts = answer.structured_content
    (image,) = facts["images"]
    assert answer.is_error is False
    assert facts["expected_size"] == {"width": 2048, "height": 1152}
    assert (image["width"], image["height"]) == (1024, 576)
    assert any("Computed 2048×1152" in note and "EvoLink delivered 1024×576" in note for note in facts["notes"])
    assert "EvoLink delivered 1024×576" in answer.content[0].text


async def test_fewer_pictures_than_ordered_are_reported_with_the_charge(world: World) -> None:
    answer = await buy(world, "sim:fast sim:fewer a fox", n=4)
    facts = answer.structured_content
    used = world.simulator.credits(f"{world.settings.key.get_secret_value()}")[1]
    assert answer.is_error is False
    assert len(facts["images"]) == 1
    note = "The request was for 4 pictures and EvoLink delivered 1. EvoLink bills each picture separately."
    assert note in facts["notes"]
    assert f"Note: {note}" in answer.content[0].text
    assert facts["credits"] == pytest.approx(used)
    assert f"{facts['credits']:g} credits" in answer.content[0].text


@pytest.mark.parametrize("name", ["mask_url", "background", "output_format"])
async def test_an_optional_field_is_sent_only_if_the_caller_gives_it(world: World, name: str) -> None:
    await buy(world, "sim:fast a fox")
    (post,) = [r for r in world.simulator.requests if r.path == "/v1/images/generations"]
    assert name.encode() not in post.body


async def test_only_the_owner_can_read_files_and_folders(world: World) -> None:
    old_umask = os.umask(0o022)
    try:
        await buy(world, "sim:fast a fox", save_as="blog/2026/hero.png")
    finally:
        os.umask(old_umask)
    folder = world.folder / "pictures"
    modes = {str(p.relative_to(world.folder)): stat.S_IMODE(p.stat().st_mode) for p in (folder, *folder.rglob("*"))}
    assert modes == {
        "pictures": PRIVATE_FOLDER,
        "pictures/blog": PRIVATE_FOLDER,
        "pictures/blog/2026": PRIVATE_FOLDER,
        "pictures/blog/2026/hero.png": PRIVATE_FILE,
        "pictures/blog/2026/hero.png.json": PRIVATE_FILE,
    }


async def test_a_name_that_is_taken_is_never_overwritten(world: World) -> None:
    folder = world.folder / "pictures"
    folder.mkdir()
    (folder / "hero.png").write_bytes(b"mine")
    (folder / "hero-1.png").symlink_to(world.folder / "nothing")
    (folder / "hero-2.png").mkdir()
    first = await buy(world, "sim:fast a fox", save_as="hero.png")
    second = await buy(world, "sim:fast a cat", save_as="hero.png", n=2)
    names = [Path(image["path"]).name for a in (first, second) for image in a.structured_content["images"]]
    assert sorted(names) == ["hero-1-1.png", "hero-3.png", "hero-4.png"]
    assert (folder / "hero.png").read_bytes() == b"mine"
    assert not (world.folder / "nothing").exists()


async def test_a_folder_that_becomes_a_link_to_the_outside_is_not_followed(world: World) -> None:
    """Minutes may pass before the download. The server checks the path again and uses the output folder."""
    with anyio.fail_after(300):
        async with world.client() as client:
            arguments = {"prompt": "a fox", "save_as": "blog/hero.png", "wait_seconds": 0}
            handle = (await client.call_tool("generate_image", arguments)).structured_content
            (world.folder / "elsewhere").mkdir()
            (world.folder / "pictures").mkdir(exist_ok=True)
            (world.folder / "pictures" / "blog").symlink_to(world.folder / "elsewhere")
            answer = await client.call_tool("get_task", {"task_id": handle["task_id"]})
    (image,) = answer.structured_content["images"]
    assert files_below(world.folder / "elsewhere") == []
    assert Path(image["path"]).parent == world.folder / "pictures"


async def test_a_folder_that_cannot_be_made_costs_nothing(open_world: Open, tmp_path: Path) -> None:
    (tmp_path / "pictures").write_text("a file in the way")
    async with open_world() as world:
        answer = await buy(world, "sim:fast a fox")
        assert answer.is_error is True
        assert (answer.structured_content["charged"], world.posts) == ("no", 0)
        assert str(tmp_path / "pictures") in answer.content[0].text
        (tmp_path / "pictures").unlink()
        repeat = await buy(world, "sim:fast a fox")
        assert repeat.is_error is False
        assert len(world.files) == 1
        assert world.posts == 1


# --- save_image ---


async def test_an_image_that_is_already_saved_is_not_saved_twice(decoder: Decoder, tmp_path: Path) -> None:
    """The journal may be lost, or a server may die after it saved the image and before it recorded it."""
    first = await save_image(download_of(drawing()), tmp_path / "a", decoder)
    second = await save_image(download_of(drawing()), tmp_path / "a", decoder)
    third = await save_image(download_of(drawing(shade=9)), tmp_path / "a", decoder)
    assert (Path(first.path).name, Path(second.path).name, Path(third.path).name) == ("a.png", "a.png", "a-1.png")


async def test_ten_downloads_with_one_name_are_all_saved(tmp_path: Path, decoder: Decoder) -> None:
    pictures = [drawing(shade=shade) for shade in range(10)]
    with anyio.fail_after(300):
        async with anyio.create_task_group() as group:
            for picture in pictures:
                group.start_soon(save_image, download_of(picture), tmp_path / "a.png", decoder)
    assert sorted(pictures) == sorted(path.read_bytes() for path in tmp_path.iterdir())


async def test_file_systems_without_hard_links_get_the_picture_too(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "a.png").write_bytes(b"mine")
    saved_image = await save_image(download_of(drawing()), tmp_path / "a", decoder)
    assert files_below(tmp_path) == ["a-1.png", "a.png"]
    assert drawing() == Path(saved_image.path).read_bytes()
    assert (tmp_path / "a.png").read_bytes() == b"mine"
    assert stat.S_IMODE(Path(saved_image.path).stat().st_mode) == PRIVATE_FILE


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"<html>", id="HTML"),
        pytest.param(drawing((800, 600))[:-200], id="PNG cut"),
        pytest.param(noise((200, 200), "JPEG")[:-900], id="JPEG cut"),
        pytest.param(noise((200, 200), "WEBP")[:-900], id="WebP cut"),
        pytest.param(drawing(kind="GIF"), id="GIF"),
        pytest.param(drawing(kind="BMP"), id="BMP"),
        pytest.param(drawing(kind="TIFF"), id="TIFF"),
        pytest.param(png_without_pixels(3841, 2160), id="more pixels than any size has"),
        pytest.param(png_without_pixels(60_000, 60_000), id="decompression bomb"),
    ],
)
async def test_no_file_remains_of_an_invalid_picture(decoder: Decoder, tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DownloadFailed):
        await save_image(download_of(content), tmp_path / "new" / "a", decoder)
    assert files_below(tmp_path) == []


async def test_a_broken_or_cancelled_download_leaves_no_file(decoder: Decoder, tmp_path: Path) -> None:
    async def fail_download(target: BinaryIO) -> int:
        target.write(drawing())
        raise DownloadFailed("broken")

    async def never_finish(target: BinaryIO) -> int:
        target.write(drawing())
        await anyio.sleep_forever()
        raise AssertionError

    with pytest.raises(DownloadFailed):
        await save_image(fail_download, tmp_path / "a", decoder)
    with anyio.move_on_after(0.05):
        await save_image(never_finish, tmp_path / "a", decoder)
    assert files_below(tmp_path) == []


async def test_unfinished_files_of_a_killed_server_are_removed_and_those_of_a_running_one_stay(
    decoder: Decoder, tmp_path: Path
) -> None:
    for name, age_s in ((".evolink-old.part", 7_200), (".evolink-new.part", 60), ("my.part", 7_200)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    await save_image(download_of(drawing()), tmp_path / "a", decoder, sweeper=UnfinishedFiles())
    assert files_below(tmp_path) == [".evolink-new.part", "a.png", "my.part"]


async def test_a_picture_is_on_disk_before_it_gets_its_name(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, int]] = []

    def record_calls(name: str, act: Any, inode: Any) -> None:
        def record_call(*args: Any, **options: Any) -> Any:
            steps.append((name, inode(args[0])))
            return act(*args, **options)

        monkeypatch.setattr(os, name, record_call)

    record_calls("fsync", os.fsync, lambda handle: os.fstat(handle).st_ino)
    record_calls("link", os.link, lambda path: os.stat(path).st_ino)
    saved_image = await save_image(download_of(drawing()), tmp_path / "fox", decoder)
    inode = Path(saved_image.path).stat().st_ino
    assert steps[:2] == [("fsync", inode), ("link", inode)]
    assert [name for name, _ in steps[2:]] == ["fsync"]  # the folder


async def test_a_folder_that_cannot_be_written_is_named(decoder: Decoder, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FolderRefused) as refusal:
        await save_image(download_of(drawing()), tmp_path / "file" / "a", decoder)
    assert str(tmp_path / "file") in refusal.value.message
    assert refusal.value.charged == "yes"


async def test_the_facts_of_a_saved_picture_are_true(decoder: Decoder, tmp_path: Path) -> None:
    picture = drawing((70, 30), "WEBP")
    saved_image = await save_image(download_of(picture), tmp_path / "link" / ".." / "a", decoder)
    assert picture == Path(saved_image.path).read_bytes()
    assert (saved_image.mime_type, saved_image.width, saved_image.height, saved_image.bytes) == (
        "image/webp",
        70,
        30,
        len(picture),
    )
    assert hashlib.sha256(picture).hexdigest() == saved_image.sha256


# --- types ---


@pytest.mark.parametrize(
    ("picture", "alpha"),
    [
        pytest.param(drawing(mode="RGB"), False, id="RGB"),
        pytest.param(drawing(mode="RGBA"), True, id="RGBA"),
        pytest.param(drawing(mode="LA"), True, id="grey with alpha"),
        pytest.param(drawing(mode="RGB", transparency=(90, 40, 200)), True, id="one colour is clear"),
        pytest.param(drawing(mode="L"), False, id="grey"),
        pytest.param(drawing(mode="RGBA", kind="WEBP"), True, id="WebP"),
        pytest.param(drawing(kind="JPEG"), False, id="JPEG"),
    ],
)
def test_transparency_is_detected(picture: bytes, alpha: bool) -> None:
    assert examine(picture).has_alpha is alpha


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_picture_is_refused_or_read_and_nothing_else_happens(kind: str) -> None:
    """Pillow raises many exceptions. The package converts each of them."""
    content, dice = noise((48, 40), kind), random.Random(20260728)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(400):
        damaged_content = bytearray(content)
        for _ in range(dice.randint(1, 12)):
            damaged_content[dice.randrange(min(len(damaged_content), 12 if dice.random() < 0.1 else 10**6))] = (
                dice.randrange(256)
            )
        if dice.random() < 0.3:
            del damaged_content[dice.randrange(len(damaged_content)) :]
        try:
            examine(bytes(damaged_content))
        except UnusableImage:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
    assert outcomes["refused"] > 50


def test_a_decompression_bomb_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check reads the size in the header and does not load the pixels."""

    def refuse_load(_: Image.Image) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse_load)
    with pytest.raises(UnusableImage, match="60000×60000"):
        examine(png_without_pixels(60_000, 60_000))


# --- files that cause much work ------------------------------------------------------------------------------


def scans(count: int) -> bytes:
    """Return a progressive JPEG of the largest size. Its last scan, of about twenty bytes, is repeated."""
    picture = drawing((2880, 2880), kind="JPEG", progressive=True, quality=50)
    start = picture.rindex(b"\xff\xda")
    return picture[:-2] + picture[start:-2] * count + b"\xff\xd9"


def segments(count: int) -> bytes:
    picture = drawing(kind="JPEG")
    return picture[:2] + b"\xff\xe1\x00\x02" * count + picture[2:]


def empty_chunks(count: int) -> bytes:
    picture = drawing()
    return picture[:33] + b"\x00\x00\x00\x00teXt\x00\x00\x00\x00" * count + picture[33:]


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def before_the_first_segment(data: bytes) -> bytes:
    picture = drawing(kind="JPEG")
    return picture[:2] + data + picture[2:]


def after_the_header(kind: bytes, data: bytes, count: int) -> bytes:
    picture = drawing()
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return picture[:33] + chunk * count + picture[33:]


def webp_of(chunks: bytes) -> bytes:
    picture = drawing(kind="WEBP")
    return b"RIFF" + struct.pack("<I", len(picture) - 8 + len(chunks)) + picture[8:] + chunks


EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x10E, 2, 60_000, 26) + bytes(60_010)
TABLES = segment(0xDB, (b"\0" + bytes(64)) * 1_000)
PHOTOSHOP = segment(0xED, b"Photoshop 3.0\0" + (b"8BIM" + bytes(8)) * 5_000)
PROFILE = b"x\0\0" + zlib.compress(bytes(1 << 20), 9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(lambda: scans(3_600), "scans", id="a scan repeated"),
        pytest.param(lambda: segments(300_000), "segments", id="empty segments"),
        pytest.param(lambda: empty_chunks(800_000), "chunks", id="empty chunks"),
        pytest.param(lambda: before_the_first_segment(b"\xff" * 24_000_000), "fill bytes", id="fill bytes"),
        pytest.param(lambda: before_the_first_segment(b"\xff\xd0" * 12_000_000), "segments", id="restart markers"),
        pytest.param(lambda: before_the_first_segment(b"\xff\x01" * 12_000_000), "segments", id="TEM markers"),
        pytest.param(lambda: before_the_first_segment(TABLES * 1_000), "segments", id="quantization tables"),
        pytest.param(lambda: before_the_first_segment(PHOTOSHOP * 2_100), "segments", id="Photoshop blocks"),
        pytest.param(lambda: after_the_header(b"iCCP", PROFILE, 20_000), "chunks", id="colour profiles"),
        pytest.param(lambda: after_the_header(b"IDAT", b"", 30_000), "chunks", id="empty pixel chunks"),
        pytest.param(lambda: webp_of(b"EXIF\0\0\0\0" * 1_500), "chunks", id="empty WebP chunks"),
        pytest.param(lambda: drawing()[:-12], "end is missing", id="a PNG without its end"),
        pytest.param(lambda: drawing(kind="JPEG")[:-2], "end is missing", id="a JPEG without its end"),
        pytest.param(lambda: drawing(kind="WEBP")[:-40], "end is missing", id="a WebP without its end"),
        pytest.param(lambda: b"\xff\xd8\xff" + b"\xff" * 100, "end is missing", id="nothing but filling"),
    ],
)
async def test_a_file_that_causes_much_work_is_refused_before_the_decoder_reads_it(
    content: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: Any, **__: Any) -> Any:
        raise AssertionError("a decoder was called")

    data = content()
    monkeypatch.setattr(Image, "open", decode)
    with pytest.raises(UnusableImage, match=message):
        examine(data)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: before_the_first_segment(segment(0xE1, EXIF) * 1_500), id="EXIF blocks"),
        pytest.param(lambda: before_the_first_segment(PHOTOSHOP * 1_500), id="Photoshop blocks"),
        pytest.param(lambda: after_the_header(b"iCCP", PROFILE, 250), id="colour profiles"),
        pytest.param(lambda: after_the_header(b"eXIf", EXIF * 200, 1), id="EXIF of 12 MB"),
        pytest.param(lambda: after_the_header(b"zTXt", b"a\0\0" + PROFILE[3:], 250), id="compressed texts"),
        pytest.param(lambda: webp_of((b"EXIF" + struct.pack("<I", len(EXIF)) + EXIF) * 200), id="WebP EXIF blocks"),
    ],
)
def test_metadata_below_the_limits_never_reach_the_decoder(content: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would read each block in Python, some of them in quadratic time."""
    data = content()
    sizes: list[int] = []
    open_with_pillow = Image.open

    def open_measured(file: io.BytesIO, **options: Any) -> Image.Image:
        sizes.append(len(file.getvalue()))
        return open_with_pillow(file, **options)

    monkeypatch.setattr(Image, "open", open_measured)
    assert (examine(data).width, examine(data).height) == (64, 48)
    assert max(sizes) < 10_000


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
async def test_normal_images_are_accepted(kind: str) -> None:
    for options in ({}, {"progressive": True} if kind == "JPEG" else {}):
        assert examine(drawing((640, 480), kind=kind, **options)).width == 640
    if kind == "JPEG":
        assert examine(scans(20)).width == 2880


def downloads_of(world: World) -> int:
    return sum(request.path.startswith("/pictures/") for request in world.simulator.requests)


async def test_a_hostile_file_is_never_downloaded_again(open_world: Open) -> None:
    async with open_world() as world:
        answer = await buy(world, "sim:fast sim:hostile-picture a fox")
        simulator = world.simulator
        clock = world.clock
        assert downloads_of(world) == 1
    facts = answer.structured_content
    assert facts["error"]["code"] == "picture_rejected"
    assert facts["charged"] == "yes"
    assert facts["next_action"] is None
    assert facts["images"][0]["url"].startswith("http")
    async with open_world(simulator=simulator, clock=clock) as world, world.client() as client:
        repeat = await client.call_tool("get_task", {"task_id": facts["task_id"]})
        assert downloads_of(world) == 1
    assert repeat.structured_content["error"]["code"] == "picture_rejected"


async def test_a_deleted_image_is_downloaded_again_but_not_the_hostile_one_beside_it(world: World) -> None:
    answer = await buy(world, "sim:fast sim:hostile-picture a fox", n=2)
    hostile, good = answer.structured_content["images"]
    assert (hostile["path"], downloads_of(world)) == (None, 2)
    Path(good["path"]).unlink()
    async with world.client() as client:
        repeat = await client.call_tool("get_task", {"task_id": answer.structured_content["task_id"]})
    assert downloads_of(world) == 3
    assert Path(good["path"]).is_file()
    assert repeat.structured_content["images"][0]["error"] == hostile["error"]
    assert "fill bytes" in hostile["error"]


async def test_a_refused_picture_is_downloaded_again_only_on_request(open_world: Open) -> None:
    """The next server does not try again. get_task with the ID tries once more."""
    async with open_world() as world:
        answer = await buy(world, "sim:fast sim:not-a-picture a fox")
        simulator, clock = world.simulator, world.clock
    download_count = sum(request.path.startswith("/pictures/") for request in simulator.requests)
    assert answer.structured_content["error"]["code"] == "picture_unusable"
    async with open_world(simulator=simulator, clock=clock) as world, world.client() as client:
        await client.call_tool("list_tasks", {})
        assert world.studio.jobs == []
        await client.call_tool("get_task", {"task_id": answer.structured_content["task_id"]})
    assert sum(request.path.startswith("/pictures/") for request in simulator.requests) > download_count == 2
