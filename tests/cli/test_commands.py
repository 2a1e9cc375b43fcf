"""The command line: output, help and one-line errors."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path

import pytest
from child_processes import SERVER_COMMAND, minimal_environment

from evolink_mcp import __version__
from evolink_mcp.teams.settings import TeamSettings

COMMANDS = ("http", "sse", "token", "demo", "simulate", "tasks", "open", "sheet", "doctor", "install")


def run(home: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    env = minimal_environment(home, PYTHONUTF8="1", **settings)
    command = [*SERVER_COMMAND, *arguments]
    return subprocess.run(command, env=env, cwd=home, capture_output=True, encoding="utf-8", timeout=300)


def test_the_version_is_the_package_version(tmp_path: Path) -> None:
    assert run(tmp_path, "--version").stdout == f"evolink-mcp {__version__}\n"


def test_help_names_every_command_and_every_setting(tmp_path: Path) -> None:
    text = run(tmp_path, "--help").stdout
    assert [name for name in COMMANDS if not re.search(rf"^    {name} ", text, re.MULTILINE)] == []
    settings = dict(re.findall(r"^  (EVOLINK_\w+) +(.+)$", text, re.MULTILINE))
    table = TeamSettings.table().values()
    assert settings == {entry.variable: f"{entry.description} Default: {entry.default_text}." for entry in table}
    assert run(tmp_path, "help").stdout == text


def test_tasks_before_the_first_purchase_creates_no_file(tmp_path: Path) -> None:
    result = run(tmp_path, "tasks")
    assert (result.returncode, result.stdout.startswith("No purchases yet")) == (0, True)
    assert list(tmp_path.iterdir()) == []


def test_a_server_for_other_machines_without_authentication_needs_insecure(tmp_path: Path) -> None:
    result = run(tmp_path, "http", "--host", "0.0.0.0", "--port", "0")
    assert result.returncode == 2
    assert "--insecure" in result.stderr


def test_the_demo_saves_an_image_and_prints_its_path(tmp_path: Path) -> None:
    result = run(tmp_path, "demo", "A fox in the mist")
    assert (result.returncode, result.stderr) == (0, "")
    (image,) = tmp_path.rglob("*.png")
    assert image.parent.name.endswith("simulated")
    assert str(image) in result.stdout
    assert "2048 × 1152 pixels" in result.stdout
    assert "credits" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctr"], "unknown command doctr; did you mean doctor?"),
        (["zzz\x1b[31m"], "unknown command zzz[31m; the commands are http, "),
        (["http", "--port", "99999"], "a port is a number from 0 to 65535"),
        (["simulate", "--port", "-1"], "a port is a number from 0 to 65535"),
        (["http", "--prot", "1"], "unrecognized arguments: --prot"),
        (["token"], "the following arguments are required: name"),
        (["sheet", "--since", "soon"], "the time “soon” is not understood"),
        (["open", "a", "fox"], "no saved image has “a fox”"),
        (["open"], "no image is saved yet"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run(tmp_path, *arguments)
    assert (result.returncode in (1, 2), result.stdout) == (True, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["http"], ["demo"], ["tasks"], ["open"], ["sheet"]])
def test_an_invalid_setting_ends_every_command_in_one_line(tmp_path: Path, arguments: list[str]) -> None:
    result = run(tmp_path, *arguments, EVOLINK_MCP_WAIT_SECONDS="soon")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "evolink-mcp: EVOLINK_MCP_WAIT_SECONDS must be a number from 0 to 900\n"


def test_warnings_about_settings_are_on_stderr(tmp_path: Path) -> None:
    result = run(tmp_path, "tasks", EVOLINK_MCP_OUTPUTDIR="x", EVOLINK_BASE_URL="https://api.example.com")
    assert result.returncode == 0
    unknown, *foreign = result.stderr.splitlines()
    assert unknown == (
        "evolink-mcp: EVOLINK_MCP_OUTPUTDIR is not a setting and has no effect; did you mean EVOLINK_MCP_OUTPUT_DIR?"
    )
    assert [line.split()[1] for line in foreign] == ["EVOLINK_BASE_URL", "EVOLINK_FILES_BASE_URL"]


@pytest.mark.parametrize("command", ["http", "sse", "simulate"])
def test_a_used_port_is_reported_in_one_line(tmp_path: Path, command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        result = run(tmp_path, command, "--port", port)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert f"127.0.0.1 port {port} cannot be opened" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_description(tmp_path: Path, command: str) -> None:
    text = run(tmp_path, command, "--help").stdout
    options = re.split(r"\n  (?=\S)", text)[1:]
    assert options
    assert [option for option in options if not re.search(r"\s{2,}\S", option.replace("\n", "  "))] == []
