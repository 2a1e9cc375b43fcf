"""Saved pictures are found again: opened by a word of the prompt, or laid out on one page that works from disk."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
from conftest import Open, World

from evolink_mcp.cli.image_commands import lay_out, open_picture
from evolink_mcp.images.store import file_name

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
TASK = "task-unified-1790000000-owhmvtsa"


async def bought(world: World, prompt: str, **more: Any) -> dict[str, Any]:
    async with world.client() as client:
        answer = await client.call_tool("generate_image", {"prompt": f"sim:fast {prompt}", **more})
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
async def test_a_file_is_named_by_the_first_words_of_its_prompt(prompt: str, name: str) -> None:
    assert file_name(prompt, TASK) == name


async def test_several_pictures_are_numbered_and_one_is_not(world: World) -> None:
    one, two = await bought(world, "a fox"), await bought(world, "a hare", n=2)
    end = two["task_id"][-8:]
    assert Path(one["images"][0]["path"]).name == f"sim-fast-a-fox-{one['task_id'][-8:]}.png"
    assert [Path(image["path"]).name for image in two["images"]] == [f"sim-fast-a-hare-{end}-{n}.png" for n in (0, 1)]


async def run(call: Any, *arguments: Any, **more: Any) -> tuple[int, list[str], list[str]]:
    said: list[str] = []
    complained: list[str] = []
    code = await anyio.to_thread.run_sync(lambda: call(*arguments, said.append, complained.append, **more))
    return code, said, complained


async def test_a_picture_is_opened_by_words_of_its_prompt(open_world: Open) -> None:
    async with open_world() as world:
        fox = await bought(world, "a red fox")
        await bought(world, "a hare")
    found = await run(open_picture, world.settings, ["FOX", "red"], only_print=True)
    assert found == (0, [fox["images"][0]["path"]], [])
    assert (await run(open_picture, world.settings, [], only_print=True))[1] == [str(world.folder / "pictures")]
    code, said, complained = await run(open_picture, world.settings, ["badger"], only_print=True)
    assert (code, said, len(complained)) == (1, [], 1)


async def test_a_sheet_shows_every_picture_and_loads_nothing_from_elsewhere(open_world: Open) -> None:
    async with open_world() as world:
        fox = await bought(world, "a <b>red</b> fox & co")
        hare = await bought(world, "a hare by day", image_urls=[fox["images"][0]["path"]])
        Path(hare["images"][0]["path"]).with_name("note.txt").write_text("not a picture")
    out = world.folder / "sheet.html"
    code, said, complained = await run(lay_out, world.settings, [], "all", str(out))
    assert (code, said, complained) == (0, [f"2 pictures: {out}"], [])
    page = out.read_text("utf-8")
    assert page.count("<figure>") == 2
    assert "a &lt;b&gt;red&lt;/b&gt; fox &amp; co" in page
    assert "edited from " in page
    assert set(re.findall(r'(?:src|href)="(\w+):', page)) == {"data", "file"}
    other = world.folder / "hares.html"
    only = await run(lay_out, world.settings, ["hare"], "all", str(other))
    assert only[1] == [f"1 picture: {other}"]
    assert (await run(lay_out, world.settings, ["badger"], "all", str(out)))[0] == 1


def link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def link_to_nothing(path: Path, target: Path) -> None:
    path.symlink_to(target.with_name("nothing"))


def copy(path: Path, target: Path) -> None:
    path.write_bytes(target.read_bytes())


def make_folder(path: Path, target: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("occupy", [copy, link, link_to_nothing, make_folder])
async def test_a_sheet_takes_no_name_that_exists_and_writes_through_no_link(open_world: Open, occupy: Any) -> None:
    async with open_world() as world:
        await bought(world, "a fox")
    notes, out = world.folder / "notes.html", world.folder / "sheet.html"
    notes.write_text("notes of the user")
    occupy(out, notes)
    before = sorted(world.folder.iterdir())
    code, said, complained = await run(lay_out, world.settings, [], "all", str(out))
    assert (code, said) == (1, [])
    assert complained == [f"{out} exists already and is never overwritten. Give another name with --out"]
    assert sorted(world.folder.iterdir()) == before
    assert notes.read_text() == "notes of the user"
    assert out.is_dir() or out.is_symlink() or out.read_text() == "notes of the user"


async def test_a_sheet_is_readable_for_its_owner_only_and_nothing_else_is_left(open_world: Open) -> None:
    async with open_world() as world:
        await bought(world, "a fox")
    folder = world.folder / "sheets"
    folder.mkdir()
    umask = os.umask(0)
    try:
        code, _, _ = await run(lay_out, world.settings, [], "all", str(folder / "sheet.html"))
    finally:
        os.umask(umask)
    assert code == 0
    assert [path.name for path in folder.iterdir()] == ["sheet.html"]
    assert stat.S_IMODE((folder / "sheet.html").stat().st_mode) == 0o600


async def test_a_sheet_in_a_folder_that_does_not_exist_is_refused_in_one_line(open_world: Open) -> None:
    async with open_world() as world:
        await bought(world, "a fox")
    out = world.folder / "nowhere" / "sheet.html"
    code, said, complained = await run(lay_out, world.settings, [], "all", str(out))
    assert (code, said, len(complained)) == (1, [], 1)
    assert complained[0].startswith(f"{out} cannot be written (")


async def test_a_damaged_picture_is_left_out_of_the_sheet(open_world: Open) -> None:
    async with open_world() as world:
        fox, _ = await bought(world, "a fox"), await bought(world, "a hare")
        Path(fox["images"][0]["path"]).write_bytes(b"nothing")
    code, said, complained = await run(lay_out, world.settings, [], "all", str(world.folder / "sheet.html"))
    assert (code, said[0].split(":")[0]) == (0, "1 picture")
    assert "is left out" in complained[0]
