"""`open` finds a saved image by words of its prompt. `sheet` shows images on a page that loads no other file."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
from conftest import Open, World

from evolink_mcp.cli.image_commands import open_image, write_sheet
from evolink_mcp.images.store import file_name

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
TASK = "task-unified-1790000000-owhmvtsa"


async def buy(world: World, prompt: str, **arguments: Any) -> dict[str, Any]:
    async with world.client() as client:
        answer = await client.call_tool("generate_image", {"prompt": f"sim:fast {prompt}", **arguments})
    return answer.structured_content


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A calm sunset over the ocean", "calm-sunset-over-the-ocean-owhmvtsa"),
        ("../../etc/passwd", "etc-passwd-owhmvtsa"),
        ("日本の山と富士山", "日本の山と富士山-owhmvtsa"),
        ("नमस्ते दुनिया", "नमस्ते-दुनिया-owhmvtsa"),
        ("Caf\u0065\u0301 CON: <b>|?*\\", "cafe\u0301-con-b-owhmvtsa".replace("e\u0301", "\u00e9")),
        ("x" * 100, "x" * 48 + "-owhmvtsa"),
        ("one two " * 40, "one-two-one-two-one-two-one-two-one-two-one-two-owhmvtsa"),
        ("\u202e\u200b 🦊", "owhmvtsa"),
        ("", "owhmvtsa"),
    ],
)
async def test_the_file_name_consists_of_the_first_words_of_the_prompt(prompt: str, name: str) -> None:
    assert file_name(prompt, TASK) == name


async def test_file_names_have_numbers_if_a_task_has_several_images(world: World) -> None:
    fox = await buy(world, "a fox")
    hares = await buy(world, "a hare", n=2)
    suffix = hares["task_id"][-8:]
    assert Path(fox["images"][0]["path"]).name == f"sim-fast-a-fox-{fox['task_id'][-8:]}.png"
    names = [Path(image["path"]).name for image in hares["images"]]
    assert names == [f"sim-fast-a-hare-{suffix}-{number}.png" for number in (0, 1)]


async def run(command: Any, *arguments: Any, **options: Any) -> tuple[int, list[str], list[str]]:
    """Return the exit code, the printed lines and the error lines of a command."""
    lines: list[str] = []
    errors: list[str] = []
    code = await anyio.to_thread.run_sync(lambda: command(*arguments, lines.append, errors.append, **options))
    return code, lines, errors


async def test_open_finds_an_image_by_words_of_its_prompt(open_world: Open) -> None:
    async with open_world() as world:
        fox = await buy(world, "a red fox")
        await buy(world, "a hare")
    result = await run(open_image, world.settings, ["FOX", "red"], only_print=True)
    assert result == (0, [fox["images"][0]["path"]], [])
    assert (await run(open_image, world.settings, [], only_print=True))[1] == [str(world.folder / "pictures")]
    code, lines, errors = await run(open_image, world.settings, ["badger"], only_print=True)
    assert (code, lines, len(errors)) == (1, [], 1)


async def test_a_sheet_shows_every_image_and_loads_no_other_file(open_world: Open) -> None:
    async with open_world() as world:
        fox = await buy(world, "a <b>red</b> fox & co")
        hare = await buy(world, "a hare by day", image_urls=[fox["images"][0]["path"]])
        Path(hare["images"][0]["path"]).with_name("note.txt").write_text("no image")
    out = world.folder / "sheet.html"
    code, lines, errors = await run(write_sheet, world.settings, [], "all", str(out))
    assert (code, lines, errors) == (0, [f"2 images: {out}"], [])
    page = out.read_text("utf-8")
    assert page.count("<figure>") == 2
    assert "a &lt;b&gt;red&lt;/b&gt; fox &amp; co" in page
    assert "edited from " in page
    assert set(re.findall(r'(?:src|href)="(\w+):', page)) == {"data", "file"}
    second = world.folder / "hares.html"
    _, lines, _ = await run(write_sheet, world.settings, ["hare"], "all", str(second))
    assert lines == [f"1 image: {second}"]
    assert (await run(write_sheet, world.settings, ["badger"], "all", str(out)))[0] == 1


def link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def link_to_missing_file(path: Path, target: Path) -> None:
    path.symlink_to(target.with_name("missing"))


def copy(path: Path, target: Path) -> None:
    path.write_bytes(target.read_bytes())


def make_folder(path: Path, target: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("occupy", [copy, link, link_to_missing_file, make_folder])
async def test_a_sheet_overwrites_no_file_and_follows_no_link(open_world: Open, occupy: Any) -> None:
    async with open_world() as world:
        await buy(world, "a fox")
    notes = world.folder / "notes.html"
    out = world.folder / "sheet.html"
    notes.write_text("notes of the user")
    occupy(out, notes)
    before = sorted(world.folder.iterdir())
    code, lines, errors = await run(write_sheet, world.settings, [], "all", str(out))
    assert (code, lines) == (1, [])
    assert errors == [f"{out} exists already and is never overwritten. Give another name with --out"]
    assert sorted(world.folder.iterdir()) == before
    assert notes.read_text() == "notes of the user"
    assert out.is_dir() or out.is_symlink() or out.read_text() == "notes of the user"


async def test_only_the_owner_can_read_a_sheet_and_no_temporary_file_stays(open_world: Open) -> None:
    async with open_world() as world:
        await buy(world, "a fox")
    folder = world.folder / "sheets"
    folder.mkdir()
    umask = os.umask(0)
    try:
        code, _, _ = await run(write_sheet, world.settings, [], "all", str(folder / "sheet.html"))
    finally:
        os.umask(umask)
    assert code == 0
    assert [path.name for path in folder.iterdir()] == ["sheet.html"]
    assert stat.S_IMODE((folder / "sheet.html").stat().st_mode) == 0o600


async def test_a_sheet_in_a_missing_folder_is_refused_in_one_line(open_world: Open) -> None:
    async with open_world() as world:
        await buy(world, "a fox")
    out = world.folder / "missing" / "sheet.html"
    code, lines, errors = await run(write_sheet, world.settings, [], "all", str(out))
    assert (code, lines, len(errors)) == (1, [], 1)
    assert errors[0].startswith(f"{out} is not writable (")


async def test_a_damaged_image_is_not_on_the_sheet(open_world: Open) -> None:
    async with open_world() as world:
        fox = await buy(world, "a fox")
        await buy(world, "a hare")
        Path(fox["images"][0]["path"]).write_bytes(b"no image")
    code, lines, errors = await run(write_sheet, world.settings, [], "all", str(world.folder / "sheet.html"))
    assert (code, lines[0].split(":")[0]) == (0, "1 image")
    assert "is not on the page" in errors[0]
