"""The command line, as a person meets it."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path

import pytest
from child_processes import SERVER_COMMAND, minimal_environment

from evolink_mcp import __version__

COMMANDS = ("http", "sse", "token", "demo", "simulate", "tasks", "open", "sheet", "doctor")


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = minimal_environment(home, PYTHONUTF8="1")
    command = [*SERVER_COMMAND, *arguments]
    return subprocess.run(command, env=env, cwd=home, capture_output=True, encoding="utf-8", timeout=300)


def test_the_version_is_the_package_version(tmp_path: Path) -> None:
    assert run(tmp_path, "--version").stdout == f"evolink-mcp {__version__}\n"


def test_help_names_every_command(tmp_path: Path) -> None:
    said = run(tmp_path, "--help").stdout
    assert [name for name in COMMANDS if not re.search(rf"^    {name} ", said, re.MULTILINE)] == []


def test_tasks_before_the_first_purchase(tmp_path: Path) -> None:
    done = run(tmp_path, "tasks")
    assert (done.returncode, done.stdout.startswith("Nothing was bought yet")) == (0, True)
    assert list(tmp_path.iterdir()) == []


def test_a_server_open_to_other_machines_needs_a_word(tmp_path: Path) -> None:
    done = run(tmp_path, "http", "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 2
    assert "--insecure" in done.stderr


def test_the_demo_makes_a_picture_and_tells_where_it_is(tmp_path: Path) -> None:
    done = run(tmp_path, "demo", "A fox in the mist")
    assert (done.returncode, done.stderr) == (0, "")
    pictures = list(tmp_path.rglob("*.png"))
    assert len(pictures) == 1
    assert pictures[0].parent.name.endswith("simulated")
    assert str(pictures[0]) in done.stdout
    assert "2048 × 1152 pixels" in done.stdout
    assert "credits" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["doctr"], "there is no command doctr; did you mean doctor?"),
        (["zzz\x1b[31m"], "there is no command zzz[31m; there are http, "),
        (["http", "--port", "99999"], "a port is a number from 0 to 65535"),
        (["simulate", "--port", "-1"], "a port is a number from 0 to 65535"),
        (["http", "--prot", "1"], "unrecognized arguments: --prot"),
        (["token"], "the following arguments are required: name"),
        (["sheet", "--since", "soon"], "“soon” is no time"),
        (["open", "a", "fox"], "no saved picture has “a fox”"),
        (["open"], "nothing was saved yet"),
    ],
)
def test_a_wrong_command_is_told_in_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = run(tmp_path, *arguments)
    assert (done.returncode in (1, 2), done.stdout) == (True, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["http", "sse", "simulate"])
def test_a_busy_port_is_told_in_one_line(tmp_path: Path, command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run(tmp_path, command, "--port", port)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"127.0.0.1 port {port} cannot be opened" in line


def test_help_is_a_command_too(tmp_path: Path) -> None:
    assert run(tmp_path, "help").stdout == run(tmp_path, "--help").stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_words(tmp_path: Path, command: str) -> None:
    said = run(tmp_path, command, "--help").stdout
    options = re.split(r"\n  (?=\S)", said)[1:]
    assert options
    assert [option for option in options if not re.search(r"\s{2,}\S", option.replace("\n", "  "))] == []
