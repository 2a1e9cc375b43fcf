"""The command line in terminals and pipes: width, links, paths, ports and numbers."""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from child_processes import SERVER_COMMAND, minimal_environment
from conftest import Open, World

from evolink_mcp.cli.terminal import ProgressLine, Terminal

PROMPT = "Café 雪の山 with a fox"


class FakeTerminal(io.StringIO):
    """A terminal that keeps its output."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def run(home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    env = minimal_environment(home, **variables)
    return subprocess.run([*SERVER_COMMAND, *arguments], env=env, cwd=home, capture_output=True, timeout=300)


# --- width and links ---


@pytest.mark.parametrize("width", [60, 120])
def test_lines_are_wrapped_at_the_width_of_a_terminal(width: int) -> None:
    stream = FakeTerminal()
    Terminal(stream, lambda: width).print("one two three four five " * 20, "  - ", "      ")
    first, *others = stream.getvalue().splitlines()
    assert first.startswith("  - one")
    assert others
    assert {line[:6] for line in others} == {" " * 6}
    assert width - 10 < max(map(len, (first, *others))) < width


def test_a_pipe_gets_each_line_without_wrapping() -> None:
    stream = io.StringIO()
    text = "one two three four five " * 20
    Terminal(stream, lambda: 60).print(text, "  ", "    ")
    assert stream.getvalue() == f"  {text}\n"


def test_a_path_is_a_whole_link_in_a_terminal_and_plain_text_in_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("WT_SESSION", "1")
    path = tmp_path / ("a long name " * 10 + ".png")
    terminal = FakeTerminal()
    pipe = io.StringIO()
    Terminal(terminal, lambda: 60).print_path(path, "  ")
    Terminal(pipe, lambda: 60).print_path(path, "  ")
    assert terminal.getvalue() == f"  \x1b]8;;{path.as_uri()}\x1b\\{path}\x1b]8;;\x1b\\\n"
    assert pipe.getvalue() == f"  {path}\n"


def test_a_terminal_without_links_gets_no_control_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    terminal = FakeTerminal()
    Terminal(terminal).print_path(tmp_path)
    assert terminal.getvalue() == f"{tmp_path}\n"


@pytest.mark.parametrize("width", [30, 60, 120])
def test_progress_stays_on_one_line_of_a_terminal(width: int) -> None:
    writes: list[str] = []
    line = ProgressLine(Terminal(FakeTerminal(), lambda: width), writes.append)
    for percent in (0, 50, 100):
        line.show(percent, "task-unified-1795919646-atfa8m8p: processing, 12 s")
    line.end()
    *shown, end = writes
    assert end == "\n"
    assert {text[0] for text in shown} == {"\r"}
    assert {len(text) for text in shown} == {width}
    assert "\n" not in "".join(shown)


def test_progress_in_a_pipe_is_one_line_per_message() -> None:
    writes: list[str] = []
    line = ProgressLine(Terminal(io.StringIO()), writes.append)
    for percent, message in ((0, "sent"), (10, "sent"), (50, "processing")):
        line.show(percent, message)
    line.end()
    assert [text[-12:].split()[-1] for text in writes] == ["sent", "processing"]
    assert all(text.endswith("\n") for text in writes)


# --- the demo, and its image afterwards ---


def test_after_the_demo_its_image_is_found_even_through_a_pipe_without_its_characters(tmp_path: Path) -> None:
    demo = run(tmp_path, "demo", PROMPT, PYTHONIOENCODING="cp1252")
    assert (demo.returncode, demo.stderr) == (0, b"")
    (image,) = tmp_path.rglob("*.png")
    encoding = "cp1252" if sys.platform == "win32" else "utf-8"
    printed_paths = [
        Path(os.fsdecode(line.strip())) for line in demo.stdout.splitlines() if line.rstrip().endswith(b".png")
    ]
    assert [path.samefile(image) for path in printed_paths] == [True]

    open_run = run(tmp_path, "open", "fox", "--print", PYTHONIOENCODING="cp1252")
    assert (open_run.returncode, open_run.stderr) == (0, b"")
    assert Path(open_run.stdout.decode(encoding).strip()).samefile(image)
    folder = run(tmp_path, "open", "--print", PYTHONIOENCODING="cp1252")
    assert Path(folder.stdout.decode(encoding).strip()).samefile(image.parent)
    sheet = run(tmp_path, "sheet", PYTHONIOENCODING="cp1252")
    assert (sheet.returncode, sheet.stderr) == (0, b"")
    assert PROMPT in Path(sheet.stdout.decode(encoding).strip().removeprefix("1 image: ")).read_text("utf-8")
    assert run(tmp_path, "tasks").stdout.startswith(b"No purchases yet")

    second_demo = run(tmp_path, "demo", "a hen", PYTHONIOENCODING="cp1252")
    assert (second_demo.returncode, second_demo.stderr) == (0, b"")
    assert run(tmp_path, "open", "hen", "--print", PYTHONIOENCODING="cp1252").returncode == 0

    next_step = demo.stdout.decode(encoding, "replace").partition("Next step:")[2]
    command = re.search(r"^  (.+?) install ", next_step, re.MULTILINE)
    assert command is not None
    program = command[1].split(" -P ")[0].strip("'\"")
    search_path = minimal_environment(tmp_path).get("PATH", os.defpath)
    assert shutil.which(program, path=search_path) is not None or (tmp_path / program).is_file()


# --- open ---


@pytest.mark.skipif(sys.platform == "win32", reason="a program of Windows opens files by their type")
def test_open_prints_the_path_if_the_program_of_the_system_does_not_start(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("xdg-open", "open"):
        program = programs / name
        program.write_bytes(b"\x7fELF no program")
        program.chmod(0o755)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    result = run(tmp_path, "open", PATH=str(programs), DISPLAY=":9", EVOLINK_MCP_OUTPUT_DIR=str(pictures))
    assert result.returncode == 0
    assert result.stdout.decode().strip() == str(pictures)
    assert result.stderr == b"evolink-mcp: no program of this system can open it\n"


# --- tasks ---


async def buy(world: World, prompt: str) -> dict[str, Any]:
    async with world.client() as client:
        answer = await client.call_tool("generate_image", {"prompt": f"sim:fast {prompt}"})
    return answer.structured_content


@pytest.mark.anyio
async def test_tasks_takes_words_and_a_time_as_open_does(open_world: Open, tmp_path: Path) -> None:
    async with open_world() as world:
        fox = await buy(world, "a red fox")
        hare = await buy(world, "a hare")
    year = world.clock() // (365.25 * 86_400) + 1970
    folders = {
        "EVOLINK_MCP_DATA_DIR": str(world.settings.data_dir),
        "EVOLINK_MCP_OUTPUT_DIR": str(world.settings.output_dir),
    }
    for command, is_listed in (
        (["tasks"], (True, True)),
        (["tasks", "FOX", "red"], (True, False)),
        (["tasks", "--since", f"{year - 1:.0f}-01-01"], (True, True)),
        (["tasks", "--since", "2200-01-01"], (False, False)),
        (["open", "--print", "hare", "--since", f"{year - 1:.0f}-01-01"], (False, True)),
    ):
        text = run(tmp_path, *command, **folders).stdout.decode()
        paths = [task["images"][0]["path"] for task in (fox, hare)]
        assert tuple(path in text for path in paths) == is_listed, command
    refusal = run(tmp_path, "tasks", "--since", "soon", **folders)
    assert (refusal.returncode, b"the time" in refusal.stderr) == (1, True)


# --- ports and numbers ---


@contextmanager
def start_server(home: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    env = minimal_environment(home)
    with subprocess.Popen(
        [*SERVER_COMMAND, *arguments], env=env, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("command", ["http", "sse", "simulate"])
def test_port_0_prints_the_port_of_the_server(tmp_path: Path, command: str) -> None:
    with start_server(tmp_path, command, "--port", "0") as process:
        assert process.stdout is not None
        address = re.search(rb"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        assert address is not None
        with socket.create_connection(("127.0.0.1", int(address[1])), timeout=60):
            pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tasks", "--limit", "-1"], "a limit is a number from 1 to"),
        (["tasks", "--limit", "0"], "a limit is a number from 1 to"),
        (["tasks", "--limit", "ten"], "a limit is a number from 1 to"),
        (["simulate", "--seconds", "-1"], "a duration is a number of seconds from 0 to"),
        (["simulate", "--seconds", "nan"], "a duration is a number of seconds from 0 to"),
        (["http", "--port", "-1"], "a port is a number from 0 to 65535"),
    ],
)
def test_a_number_outside_its_range_is_refused_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run(tmp_path, *arguments)
    assert (result.returncode, result.stdout) == (2, b"")
    (line,) = result.stderr.decode().splitlines()
    assert message in line
