"""The folders for saved images and for reference files: after all links, and for every spelling of a name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import Open, World
from drawings import drawing

from evolink_mcp.errors import FolderRefused, ReferenceRefused
from evolink_mcp.images.folders import Folders, move_patiently, open_plain, write_new_file

REQUEST = {"prompt": "sim:fast a fox"}


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """Return an output folder and a project folder. The folders beside them are not allowed."""
    for name in ("pictures", "project", "project-evil", "elsewhere"):
        (tmp_path / name).mkdir()
    return Folders(tmp_path / "pictures", (tmp_path / "pictures", tmp_path / "project"))


# --- save_as ---


@pytest.mark.parametrize(
    ("save_as", "place"),
    [
        pytest.param("hero", "pictures/hero", id="name"),
        pytest.param("hero.png", "pictures/hero.png", id="name with suffix"),
        pytest.param(".hero", "pictures/.hero", id="hidden"),
        pytest.param("a b (1).png", "pictures/a b (1).png", id="blanks"),
        pytest.param("Größe 图.png", "pictures/Größe 图.png", id="not ASCII"),
        pytest.param("blog/2026/hero.png", "pictures/blog/2026/hero.png", id="folders that are not there yet"),
        pytest.param("blog/../hero.png", "pictures/hero.png", id="dots that stay inside"),
        pytest.param("{root}/project/assets/hero.png", "project/assets/hero.png", id="into the project"),
        pytest.param("~/hero.png", "project/hero.png", id="home, when it is allowed"),
        pytest.param("n" * 139 + ".png", "pictures/" + "n" * 139 + ".png", id="as long as may be"),
    ],
)
def test_save_as_points_into_an_allowed_folder(
    folders: Folders, tmp_path: Path, save_as: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "project"))
    assert tmp_path / place == folders.target(save_as.format(root=tmp_path))


def _link(path: Path, to: Path) -> None:
    path.symlink_to(to)


BAD_TARGETS: list[Any] = [
    pytest.param("../hero.png", "outside", id="dots"),
    pytest.param("a/../../hero.png", "outside", id="dots after a folder"),
    pytest.param("{root}/elsewhere/hero.png", "outside", id="absolute, elsewhere"),
    pytest.param("{root}/project-evil/hero.png", "outside", id="CVE-2025-53110 same prefix"),
    pytest.param("{root}/project/../project-evil/hero.png", "outside", id="same prefix by dots"),
    pytest.param("out/hero.png", "outside", id="CVE-2025-53109 linked folder"),
    pytest.param("gone/hero.png", "outside", id="link to nothing"),
    pytest.param("link.png", "outside", id="linked file"),
    pytest.param("/etc/cron.d/hero", "outside", id="etc"),
    pytest.param("/dev/null", "outside", id="device"),
    pytest.param("~nobody-lives-here/hero.png", "not a usable", id="home of nobody"),
    pytest.param("loop/hero.png", "not a usable", id="endless link"),
    pytest.param("", "not a usable", id="empty"),
    pytest.param(".", "not a usable", id="dot"),
    pytest.param("..", "not a usable", id="two dots"),
    pytest.param("/", "not a usable", id="slash"),
    pytest.param("hero\0.png", "not a usable", id="NUL"),
    pytest.param("hero\n.png", "not a usable", id="line break"),
    pytest.param("a\tb/hero.png", "not a usable", id="tab in a folder"),
    pytest.param("n" * 197 + ".png", "not a usable", id="a byte too long"),
    pytest.param("图" * 67 + ".png", "not a usable", id="too long in bytes"),
    pytest.param("x/" * 3000 + "hero.png", "at most 4,096", id="too deep"),
    pytest.param("sub", "is a folder", id="a folder"),
    pytest.param("new/", "is a folder", id="a folder to be"),
    pytest.param("C:\\hero.png", "is a Windows path", id="Windows path elsewhere"),
    pytest.param("{root}/project", "is a folder", id="the allowed folder"),
    pytest.param("file.txt/hero.png", "cannot be written", id="below a file"),
]


@pytest.mark.parametrize(("save_as", "words"), BAD_TARGETS)
def test_save_as_outside_the_allowed_folders_is_refused(
    folders: Folders, tmp_path: Path, save_as: str, words: str
) -> None:
    _link(tmp_path / "pictures" / "out", tmp_path / "elsewhere")
    _link(tmp_path / "pictures" / "gone", tmp_path / "elsewhere" / "nothing")
    _link(tmp_path / "pictures" / "link.png", tmp_path / "elsewhere" / "secret.png")
    _link(tmp_path / "pictures" / "loop", tmp_path / "pictures" / "loop")
    (tmp_path / "pictures" / "sub").mkdir()
    (tmp_path / "pictures" / "file.txt").touch()
    with pytest.raises(FolderRefused, match=words):
        folders.target(save_as.format(root=tmp_path))


def test_a_link_that_stays_inside_is_followed(folders: Folders, tmp_path: Path) -> None:
    _link(tmp_path / "pictures" / "in", tmp_path / "project")
    assert tmp_path / "project" / "hero.png" == folders.target("in/hero.png")


def test_an_allowed_folder_may_itself_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    _link(tmp_path / "pictures", tmp_path / "disk")
    folders_of_link = Folders(tmp_path / "pictures", (tmp_path / "pictures",))
    assert tmp_path / "disk" / "hero.png" == folders_of_link.target("hero.png")


def test_a_refusal_quotes_no_more_than_a_line_of_the_name(folders: Folders) -> None:
    with pytest.raises(FolderRefused) as refusal:
        folders.target("../" + "x\u202ey" * 5_000)
    assert "\u202e" not in refusal.value.message
    assert len(refusal.value.message) < 200


@pytest.mark.anyio
@pytest.mark.parametrize("save_as", ["../hero.png", "/etc/hero.png", "new/", "~nobody-lives-here/hero.png"])
async def test_an_invalid_save_as_is_refused_before_anything_is_sent(world: World, save_as: str) -> None:
    with anyio.fail_after(300):
        async with world.client() as client:
            answer = await client.call_tool("generate_image", {**REQUEST, "save_as": save_as})
    assert answer.is_error is True
    assert answer.structured_content["error"]["code"] == "folder_refused"
    assert answer.structured_content["charged"] == "no"
    assert world.simulator.requests == []


@pytest.mark.anyio
async def test_the_project_that_an_agent_works_in_is_allowed(
    open_world: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts for programmers start the server in the project's folder."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    place = project / "src" / "assets" / "hero.png"
    async with open_world() as world, world.client() as client:
        answer = await client.call_tool("generate_image", {**REQUEST, "save_as": str(place)})
        assert [str(place)] == [image["path"] for image in answer.structured_content["images"]]
        (project / "logo.png").write_bytes(drawing())
        edit = await client.call_tool("generate_image", {**REQUEST, "image_urls": [str(project / "logo.png")]})
        assert edit.is_error is False


@pytest.mark.anyio
@pytest.mark.parametrize(
    "folder_of", [pytest.param(lambda tmp: tmp, id="home"), pytest.param(lambda tmp: "/", id="root")]
)
async def test_a_server_started_at_home_or_at_the_root_allows_neither(
    open_world: Open, tmp_path: Path, folder_of: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(folder_of(tmp_path))
    async with open_world() as world:
        assert world.settings.folders.allowed == (tmp_path / "pictures",)


# --- reading ---


@pytest.fixture
def cat(folders: Folders, tmp_path: Path) -> Path:
    """Return an image in a folder of the project."""
    path = tmp_path / "project" / "in" / "cat.png"
    path.parent.mkdir()
    path.write_bytes(b"a cat")
    return path


def test_an_allowed_file_is_read(folders: Folders, cat: Path) -> None:
    with folders.opened(folders.readable("in/cat.png")) as file:
        assert file.read() == b"a cat"


def _link_in_place(cat: Path, secret: Path) -> None:
    cat.unlink()
    _link(cat, secret)


def _folder_in_place(cat: Path, secret: Path) -> None:
    cat.parent.rename(cat.parent.with_name("was"))
    _link(cat.parent, secret.parent)


def _pipe_in_place(cat: Path, secret: Path) -> None:
    cat.unlink()
    os.mkfifo(cat)


@pytest.mark.parametrize(
    "swap",
    [
        pytest.param(_link_in_place, id="a link"),
        pytest.param(_folder_in_place, id="a link for its folder"),
        pytest.param(_pipe_in_place, id="a pipe"),
        pytest.param(lambda cat, secret: cat.unlink(), id="nothing"),
        pytest.param(lambda cat, secret: (cat.unlink(), cat.mkdir()), id="a folder"),
    ],
)
@pytest.mark.parametrize(
    "way", [pytest.param(True, id="step by step"), pytest.param(False, id="where there are no steps")]
)
def test_a_replacement_of_a_checked_file_is_not_opened(
    folders: Folders,
    cat: Path,
    tmp_path: Path,
    swap: Callable[[Path, Path], None],
    way: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server reads no secret, and does not wait for a pipe without a writer."""
    secret = tmp_path / "elsewhere" / "cat.png"
    secret.write_bytes(b"secret")
    if not way:
        monkeypatch.setattr(os, "supports_dir_fd", set())
    path = folders.readable(str(cat))
    swap(cat, secret)
    with pytest.raises(OSError):
        folders.opened(path)


def test_a_link_that_replaces_a_checked_file_is_not_opened_even_between_allowed_folders(
    folders: Folders, cat: Path, tmp_path: Path
) -> None:
    (tmp_path / "pictures" / "cat.png").write_bytes(b"another cat")
    path = folders.readable(str(cat))
    _link_in_place(cat, tmp_path / "pictures" / "cat.png")
    with pytest.raises(OSError):
        folders.opened(path)


def test_a_plain_file_is_opened_and_a_link_to_it_is_not(cat: Path) -> None:
    with open_plain(cat) as file:
        assert file.read() == b"a cat"
    _link(cat.with_name("link.png"), cat)
    with pytest.raises(OSError):
        open_plain(cat.with_name("link.png"))


def test_a_folder_with_many_files_is_not_searched_to_its_end(folders: Folders, tmp_path: Path) -> None:
    for number in range(2_100):
        (tmp_path / "project" / f"{number:04}.png").touch()
    with pytest.raises(ReferenceRefused) as refusal:
        folders.readable(str(tmp_path / "project" / "x0001.png"))
    assert len(refusal.value.advice) < 700


def test_names_in_the_folder_above_an_allowed_one_are_not_shown(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "projects.png").touch()
    missing = Folders(tmp_path / "gone", (tmp_path / "project.png",))
    with pytest.raises(ReferenceRefused) as refusal:
        missing.readable(str(tmp_path / "project.png"))
    assert "projects.png" not in refusal.value.advice


@pytest.mark.parametrize(
    ("on_disk", "text"),
    [
        pytest.param(
            "Screenshot 2026-11-26 at 9.41.03\u202fAM.png", "Screenshot 2026-11-26 at 9.41.03 AM.png", id="U+202F"
        ),
        pytest.param("a\u00a0b.png", "a b.png", id="U+00A0"),
        pytest.param("Fu\u0308chse.png", "F\u00fcchse.png", id="letters in parts"),
        pytest.param("F\u00fcchse.png", "Fu\u0308chse.png", id="whole letters"),
    ],
)
def test_a_file_is_found_by_another_spelling_of_its_name(tmp_path: Path, on_disk: str, text: str) -> None:
    folder = tmp_path.resolve()
    (folder / on_disk).write_bytes(b"x")
    assert Folders(folder, (folder,)).readable(str(folder / text)) == folder / on_disk
    (folder / text).write_bytes(b"y")
    assert Folders(folder, (folder,)).readable(str(folder / text)).read_bytes() == b"y"


@pytest.mark.parametrize(
    "name", ["NUL", "con.png", "COM1", "lpt9.webp", "aux.tar.gz", "hero.", "hero ", "nul /x.png", "COM\u00b9.png"]
)
def test_names_that_windows_reserves_are_refused_everywhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(FolderRefused, match="Windows cannot have"):
        Folders(tmp_path, (tmp_path,)).target(name)


@pytest.mark.parametrize("name", ["console.png", "nully.png", "com10.png", "a.con", "..hero.png", "com.png"])
def test_names_that_only_look_reserved_are_accepted(tmp_path: Path, name: str) -> None:
    assert Folders(tmp_path, (tmp_path,)).target(name).name == name


def test_a_file_that_another_program_has_open_is_moved_after_a_pause(tmp_path: Path) -> None:
    tries: list[int] = []
    pauses: list[float] = []

    def move(source: Path, target: Path) -> None:
        tries.append(1)
        if len(tries) < 4:
            raise PermissionError(13, "a virus scanner has it open")
        source.rename(target)

    (tmp_path / "a").write_bytes(b"x")
    move_patiently(move, tmp_path / "a", tmp_path / "b", pauses_s=(1, 2, 3, 4, 5), sleep=pauses.append)
    assert (len(tries), (tmp_path / "b").read_bytes()) == (4, b"x")
    assert pauses == [1, 2, 3]


# --- a new file ---

FULL = """
import resource, sys
from pathlib import Path
from evolink_mcp.images.folders import write_new_file
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_new_file(Path(sys.argv[1]), b"x" * 10_000)
except OSError as error:
    print(error.strerror)
"""


def test_a_new_file_is_complete_and_an_existing_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "sheet.html"
    assert write_new_file(path, b"first")
    assert not write_new_file(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_to_its_end_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "sheets"
    folder.mkdir()
    command = [sys.executable, "-P", "-c", FULL, str(folder / "sheet.html")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert process.stdout == "File too large\n"
    assert list(folder.iterdir()) == []
