"""Paths as people paste them: with quotes, escapes, percent codes, of another system, or of a chat's sandbox."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import anyio
import pytest
from conftest import Open, World

from evolink_mcp.errors import FolderRefused, ReferenceRefused
from evolink_mcp.images.folders import Folders, is_in_cloud
from evolink_mcp.pasted import PathSystem, clean_file_name, path_readings, undecorate

LINUX = PathSystem(is_windows=False)
WSL = PathSystem(is_windows=False, distribution="Ubuntu")
WINDOWS = PathSystem(is_windows=True)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    """Return an output folder in the home folder, with one picture in a folder with a blank in its name."""
    home = tmp_path.resolve()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    (home / "out" / "My Fotos").mkdir(parents=True)
    (home / "out" / "My Fotos" / "one.png").write_bytes(b"one")
    return Folders(home / "out", (home / "out",), WSL)


def escape(path: str) -> str:
    """Return a path as bash and zsh complete it."""
    return re.sub(r"([^\w/.\-])", r"\\\1", path)


# --- reading ---

PASTED: list[Any] = [
    pytest.param(lambda p: f"'{p}'", id="quotes"),
    pytest.param(lambda p: f'"{p}"', id="double quotes"),
    pytest.param(lambda p: f"“{p}”", id="typographic quotes"),
    pytest.param(lambda p: f"„{p}“", id="German quotes"),
    pytest.param(lambda p: f"«{p}»", id="French quotes"),
    pytest.param(lambda p: f"`{p}`", id="backticks"),
    pytest.param(lambda p: f"<{p}>", id="angle brackets"),
    pytest.param(lambda p: f"@{p}", id="at sign"),
    pytest.param(lambda p: f'@"{p}"', id="at sign and quotes"),
    pytest.param(lambda p: f"![x](<{p}>)", id="Markdown"),
    pytest.param(lambda p: f"![x]({p})", id="Markdown without angle brackets"),
    pytest.param(lambda p: f"{p}  \r\n", id="blanks and a line end"),
    pytest.param(lambda p: f"\u202a{p}", id="invisible character of the file properties"),
    pytest.param(escape, id="shell escapes"),
    pytest.param(quote, id="percent codes"),
    pytest.param(lambda p: f"file://{p}", id="file URI, not encoded"),
    pytest.param(lambda p: f"file://{quote(p)}", id="file URI, encoded"),
    pytest.param(lambda p: f"FILE:{p}", id="file URI with one slash"),
    pytest.param(lambda p: f"file://localhost{quote(p)}", id="file URI with localhost"),
    pytest.param(lambda p: p.replace(str(Path.home()), "~"), id="tilde"),
    pytest.param(lambda p: p.replace(str(Path.home()), "$HOME"), id="HOME"),
    pytest.param(lambda p: p.replace(str(Path.home()), "${HOME}"), id="HOME in braces"),
    pytest.param(lambda _: r"My Fotos\one.png", id="backslashes of a relative path"),
    pytest.param(lambda _: "My Fotos/one.png", id="relative path"),
    pytest.param(lambda p: r"\\wsl$\Ubuntu" + p.replace("/", "\\"), id="share of WSL"),
    pytest.param(lambda p: r"\\wsl.localhost\ubuntu" + p.replace("/", "\\"), id="new share of WSL"),
    pytest.param(lambda p: "//wsl.localhost/Ubuntu" + p, id="share of WSL with slashes"),
]


@pytest.mark.parametrize("decorate", PASTED)
def test_a_pasted_path_names_its_file(folders: Folders, decorate: Callable[[str], str]) -> None:
    file = folders.output / "My Fotos" / "one.png"
    assert folders.readable(decorate(str(file))) == file


@pytest.mark.parametrize(
    "name", ["'one.png'", "my%20one.png", "@one.png", "one\\ 2.png", "<one>.png", "`one.png`", "~"]
)
def test_a_file_with_the_literal_name_comes_before_an_interpretation(folders: Folders, name: str) -> None:
    others = {undecorate(name), "my one.png", "one.png", "one 2.png"} - {name}
    for other in others:
        (folders.output / other).write_bytes(b"another")
    file = folders.output / name
    file.write_bytes(b"literal")
    assert folders.readable(str(file)) == file
    if name != "~":
        assert folders.readable(name) == file


NAMES = (
    "one.png",
    "Tom's Foto (1) #2.png",
    "50%20off.png",
    "100% Größe 图.png",
    "a & b; c.png",
    "[x]{y}.png",
    "@2x.png",
)
QUOTES = [("'", "'"), ('"', '"'), ("“", "”"), ("‘", "’"), ("«", "»"), ("`", "`"), ("<", ">")]


def decorate_randomly(path: str, dice: random.Random) -> str:
    """Return a path after one to four decorations."""
    text = path
    for _ in range(dice.randint(1, 4)):
        opening, closing = dice.choice(QUOTES)
        blanks = "".join(dice.choices(" \t\r\n\u202a\u200e", k=dice.randint(1, 3)))
        is_plain = text == path
        text = dice.choice(
            [
                f"{opening}{text}{closing}",
                text + blanks,
                blanks + text,
                f"@{text}" if not text.startswith("@") else text,
                escape(text),
                quote(text) if "%" not in text else text,
                f"![alt](<{text}>)" if not set("<>\n\r[]") & set(text) else text,
                f"file://{text}" if is_plain else text,
                f"file://{quote(text)}" if is_plain else text,
                text.replace(str(Path.home()), "~", 1) if is_plain else text,
                text.replace(str(Path.home()), "$HOME", 1) if is_plain else text,
            ]
        )
    return text


@pytest.mark.parametrize("seed", range(5))
def test_a_path_in_random_decorations_names_its_file(folders: Folders, seed: int) -> None:
    dice = random.Random(seed)
    files = [folders.output / "My Fotos" / name for name in NAMES]
    for file in files:
        file.write_bytes(b"x")
    for _ in range(200):
        file = dice.choice(files)
        text = decorate_randomly(str(file), dice)
        assert folders.readable(text) == file, repr(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("/mnt/data/cat.png", "sandbox of the chat", id="ChatGPT"),
        pytest.param("sandbox:/mnt/data/cat.png", "sandbox of the chat", id="ChatGPT link"),
        pytest.param("[cat](sandbox:/mnt/data/cat.png)", "sandbox of the chat", id="ChatGPT Markdown"),
        pytest.param("/mnt/user-data/uploads/cat.png", "sandbox of the chat", id="Claude upload"),
        pytest.param("`/mnt/user-data/outputs/cat.png`", "sandbox of the chat", id="Claude output"),
        pytest.param(r"\\nas\photos\a.png", "is a Windows path", id="network share"),
        pytest.param(r"\\wsl$\Debian\home\me\a.png", "is a Windows path", id="another distribution"),
        pytest.param(
            r"C:\Users\anna\Pictures\logo.png", "outside the allowed folders", id="drive, mapped but not allowed"
        ),
        pytest.param("/etc/passwd", "outside the allowed folders", id="absolute path"),
        pytest.param("'/etc/passwd'", "outside the allowed folders", id="quoted absolute path"),
        pytest.param("file:///etc/passwd", "outside the allowed folders", id="file URI"),
        pytest.param("~/../../etc/passwd", "outside the allowed folders", id="dots after the home folder"),
        pytest.param("%2e%2e/%2e%2e/etc/passwd", "outside the allowed folders", id="encoded dots"),
        pytest.param("My Fotos/two.png", "there is no file", id="no such file"),
    ],
)
def test_an_unreadable_path_is_refused_with_its_reason(folders: Folders, text: str, words: str) -> None:
    with pytest.raises(ReferenceRefused) as refusal:
        folders.readable(text)
    assert words in refusal.value.message
    assert refusal.value.advice


@pytest.mark.parametrize("text", [r"C:\Users\a.png", "C:/Users/a.png", "file:///C:/Users/a.png", r"'\\nas\a.png'"])
def test_a_windows_path_is_named_as_such_on_other_systems(tmp_path: Path, text: str) -> None:
    with pytest.raises(ReferenceRefused, match="is a Windows path"):
        Folders(tmp_path, (tmp_path,), LINUX).readable(text)


def test_a_drive_of_windows_is_read_below_mnt_in_wsl() -> None:
    expected = "/mnt/c/Users/anna/My Fotos/x.png"
    for text in (
        r"C:\Users\anna\My Fotos\x.png",
        "c:/Users/anna/My Fotos/x.png",
        "file:///C:/Users/anna/My%20Fotos/x.png",
    ):
        assert expected in path_readings(text, WSL)
        assert expected not in path_readings(text, LINUX)


def test_a_path_of_wsl_or_git_bash_is_read_on_its_drive_in_windows() -> None:
    for text in ("/mnt/c/Users/anna/x.png", "/c/Users/anna/x.png", "'/mnt/c/Users/anna/x.png'"):
        assert r"C:\Users\anna\x.png" in path_readings(text, WINDOWS)
        assert r"C:\Users\anna\x.png" not in path_readings(text, LINUX)


def test_a_file_that_is_only_in_icloud_is_named_without_another_suggestion(folders: Folders) -> None:
    (folders.output / ".logo.png.icloud").write_bytes(b"bplist")
    (folders.output / "logo2.png").write_bytes(b"x")
    with pytest.raises(ReferenceRefused) as refusal:
        folders.readable(f"'{folders.output / 'logo.png'}'")
    assert "has not downloaded it" in refusal.value.message
    assert "logo2.png" not in refusal.value.advice


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        pytest.param({"st_file_attributes": 0x400000}, True, id="OneDrive, recall on data access"),
        pytest.param({"st_file_attributes": 0x1020}, True, id="OneDrive, offline"),
        pytest.param({"st_file_attributes": 0x20}, False, id="a file of Windows"),
        pytest.param({"st_flags": 0x40000000}, True, id="iCloud, dataless"),
        pytest.param({"st_flags": 0x20}, False, id="a file of macOS"),
        pytest.param({}, False, id="a file of Linux"),
    ],
)
def test_a_file_that_is_only_in_the_cloud_is_recognized_by_its_attributes(
    facts: dict[str, int], expected: bool
) -> None:
    assert is_in_cloud(SimpleNamespace(**facts)) is expected


def test_a_hostile_text_has_a_limited_number_of_readings() -> None:
    text = "@<'\"`" * 300 + "%41\\ ~" * 300
    assert len(path_readings(text, WSL)) <= 200


@pytest.mark.parametrize("text", ["null", "undefined", "None", "N/A", "'null'"])
@pytest.mark.anyio
async def test_a_word_for_no_value_is_refused_with_the_advice_to_leave_it_out(world: World, text: str) -> None:
    with anyio.fail_after(300):
        async with world.client() as client:
            answer = await client.call_tool("generate_image", {"prompt": "x", "image_urls": [text]})
    assert answer.is_error is True
    assert "leave the argument out" in answer.content[0].text


# --- save_as ---


@pytest.mark.parametrize(
    ("save_as", "place"),
    [
        pytest.param('"q.png"', "q.png", id="double quotes"),
        pytest.param("'q.png'", "q.png", id="quotes"),
        pytest.param("“q.png”", "q.png", id="typographic quotes"),
        pytest.param("`q.png`\n", "q.png", id="backticks and a line end"),
        pytest.param("my\\ logo.png", "my logo.png", id="shell escape"),
        pytest.param("~/out/q.png", "q.png", id="tilde"),
        pytest.param("$HOME/out/q.png", "q.png", id="HOME"),
        pytest.param("%USERPROFILE%/out/q.png", "q.png", id="USERPROFILE"),
        pytest.param("file://{out}/a%20b.png", "a b.png", id="file URI"),
        pytest.param(r"\\wsl$\Ubuntu{out}\q.png", "q.png", id="share of WSL"),
        pytest.param("100%20.png", "100%20.png", id="percent code as a name"),
        pytest.param("price $5.png", "price $5.png", id="dollar sign as a name"),
        pytest.param("@2x.png", "@2x.png", id="at sign as a name"),
    ],
)
def test_a_pasted_save_as_becomes_a_plain_name(folders: Folders, save_as: str, place: str) -> None:
    target = folders.target(save_as.replace("{out}", str(folders.output)))
    assert target == folders.output / place


@pytest.mark.parametrize(
    ("save_as", "words"),
    [
        pytest.param("$PICTURES/x.png", "variable “$PICTURES”", id="unknown variable"),
        pytest.param("${DIR}/x.png", "variable “${DIR}”", id="variable in braces"),
        pytest.param("%APPDATA%/x.png", "variable “%APPDATA%”", id="variable of Windows"),
        pytest.param("C:\\Users\\anna\\x.png", "outside the allowed folders", id="drive in WSL"),
        pytest.param("\\\\nas\\x.png", "is a Windows path", id="network share"),
        pytest.param("x:y.png", "character :", id="colon"),
        pytest.param("what?.png", "character ?", id="question mark"),
        pytest.param("a|b.png", "character |", id="bar"),
        pytest.param("a*.png", "character *", id="star"),
        pytest.param("a<b>.png", "character <", id="angle bracket"),
        pytest.param("a\\b.png", "character \\", id="backslash"),
        pytest.param("-rf.png", "begins with “-”", id="leading dash"),
        pytest.param("--out/x.png", "begins with “-”", id="leading dash of a folder"),
        pytest.param("a\u202egnp.png", "U+202E", id="direction override"),
        pytest.param("a\u200b.png", "U+200B", id="zero width"),
        pytest.param("\x1b[31mred.png", "U+001B", id="terminal escape"),
        pytest.param("a\x9b31m.png", "U+009B", id="terminal escape of one byte"),
        pytest.param("a\x07.png", "U+0007", id="bell"),
        pytest.param("a\U000e0041.png", "U+E0041", id="tag character"),
        pytest.param("a\u2028b.png", "U+2028", id="line separator"),
    ],
)
def test_an_unusable_save_as_is_refused_with_its_reason(folders: Folders, save_as: str, words: str) -> None:
    with pytest.raises(FolderRefused) as refusal:
        folders.target(save_as)
    assert words in refusal.value.message
    assert refusal.value.message.isprintable()
    assert [path.name for path in folders.output.iterdir()] == ["My Fotos"]


@pytest.mark.anyio
async def test_quotes_around_a_file_name_are_removed_in_file_and_answer(open_world: Open) -> None:
    async with open_world() as world, world.client() as client:
        with anyio.fail_after(300):
            answer = await client.call_tool("generate_image", {"prompt": "sim:fast x", "save_as": '"q.png"', "n": 2})
            refusal = await client.call_tool("generate_image", {"prompt": "sim:fast y", "save_as": "$HOME/x.png"})
        assert sorted(path.name for path in world.files) == ["q-1.png", "q.png"]
        assert answer.structured_content["request"]["save_as"] == "q.png"
        assert refusal.structured_content["error"]["code"] == "folder_refused"
        assert world.posts == 1


def test_cleaning_a_name_twice_changes_nothing() -> None:
    dice = random.Random(1)
    for _ in range(2_000):
        text = "".join(dice.choices("\"'`“” ab.png\\/~$%20\n@<>:C-", k=dice.randint(1, 12)))
        for system in (LINUX, WSL, WINDOWS):
            clean_name = clean_file_name(text, system)
            assert clean_file_name(clean_name, system) == clean_name, repr(text)
