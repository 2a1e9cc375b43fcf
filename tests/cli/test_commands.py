"""The command line, as a person meets it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from conftest import poor_environment

from evolink_mcp import __version__

COMMANDS = ("http", "sse", "demo", "simulate", "tasks", "doctor")


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = poor_environment(home, PYTHONUTF8="1")
    command = [sys.executable, "-m", "evolink_mcp", *arguments]
    return subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=60)


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
    assert str(pictures[0]) in done.stdout
    assert "2048 × 1152 pixels" in done.stdout
    assert "credits" in done.stdout
