"""Run everything that docs/building.md shows."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from child_processes import SERVER_COMMAND, minimal_environment
from conftest import World
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters

from evolink_mcp.app.settings import Settings
from evolink_mcp.simulator.app import FAULTS
from evolink_mcp.tools.task_answer import ImageOut, TaskOut

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "building.md").read_text("utf-8")
FAULT_ROWS = re.findall(r"^\| `(sim:[^`]+)` \|.*\| (.*) \|$", PAGE, re.MULTILINE)
LIMIT_S = 120


def block(language: str) -> str:
    match = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert match
    return match[1]


# Runs the page's Python program with a simulated EvoLink and this package instead of the installed command.
RUN_PROGRAM = """
import sys, threading, anyio, uvicorn
from evolink_mcp.simulator.app import Simulator
web = uvicorn.Server(uvicorn.Config(Simulator(duration_s=0.1).app, port=0, log_level="error", lifespan="off"))
threading.Thread(target=web.run, daemon=True).start()
while not web.started:
    pass
port = web.servers[0].sockets[0].getsockname()[1]
page = open(sys.argv[1]).read().replace('"evolink-mcp"', repr(sys.executable) + ', args=["-P", "-m", "evolink_mcp"]')
page = page.replace('{"EVOLINK_API_KEY": "sk-..."}', repr({
    "EVOLINK_API_KEY": "sk-simulated", "EVOLINK_BASE_URL": f"http://127.0.0.1:{port}", "HOME": sys.argv[2],
    "EVOLINK_MCP_DATA_DIR": sys.argv[2] + "/data", "EVOLINK_MCP_OUTPUT_DIR": sys.argv[2] + "/pictures",
}))
exec(page)
"""


def test_the_python_program_creates_an_image(tmp_path: Path) -> None:
    page = tmp_path / "page.py"
    page.write_text(block("python"), encoding="utf-8")
    command = [sys.executable, "-P", "-c", RUN_PROGRAM, str(page), str(tmp_path)]
    env = minimal_environment(tmp_path)
    program = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert program.returncode == 0, program.stderr
    path = program.stdout.split(".png")[0] + ".png"
    assert Path(path).is_file()
    assert os.path.dirname(path) == str(tmp_path / "pictures")


def test_every_field_of_an_answer_is_in_the_table() -> None:
    names = set(re.findall(r"`(\w+)(?:\[\])?`", "".join(line for line in PAGE.splitlines() if line.startswith("|"))))
    assert set(TaskOut.model_fields) <= names
    assert set(ImageOut.model_fields) <= names


@pytest.mark.anyio
async def test_every_field_of_a_reference_is_in_the_table(world: World) -> None:
    async with world.client() as client:
        arguments = {"prompt": "sim:fast a fox", "image_urls": ["https://cdn.pixabay.com/a.png"]}
        answer = (await client.call_tool("generate_image", arguments)).structured_content
    row = next(line for line in PAGE.splitlines() if line.startswith("| `references[]`"))
    assert [name for name in answer["references"][0] if f"`{name}`" not in row] == []


@pytest.mark.anyio
async def test_the_two_shell_commands_create_a_simulated_image(tmp_path: Path) -> None:
    simulate, serve = block("sh").splitlines()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    program, *arguments = shlex.split(simulate.removesuffix("&").replace("8765", port))
    *variables, server = shlex.split(serve.replace("8765", port))
    assert program == server == "evolink-mcp"
    settings = dict(variable.split("=", 1) for variable in variables)
    assert Settings.from_environment(settings).folders.output.parts[-2:] == ("Pictures", "EvoLink simulated")

    folders = {
        "EVOLINK_MCP_DATA_DIR": str(tmp_path / "data"),
        "EVOLINK_MCP_OUTPUT_DIR": str(tmp_path / "pictures"),
    }
    env = minimal_environment(tmp_path, **settings, **folders)
    simulator = subprocess.Popen(
        [*SERVER_COMMAND, *arguments],
        cwd=tmp_path,
        env=minimal_environment(tmp_path, PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        with anyio.fail_after(LIMIT_S):
            await is_listening(int(port))
            parameters = StdioServerParameters(
                command=SERVER_COMMAND[0], args=SERVER_COMMAND[1:], env=env, cwd=tmp_path
            )
            async with Client(parameters) as client:
                answer = (await client.call_tool("generate_image", {"prompt": "A fox"})).structured_content
    finally:
        simulator.kill()
        output = simulator.communicate()[0]
    assert Path(answer["images"][0]["path"]).is_file()
    assert [word for word in FAULTS if word not in output] == []


async def is_listening(port: int) -> None:
    """Return when a server accepts connections on the port."""
    while True:
        try:
            stream = await anyio.connect_tcp("127.0.0.1", port)
        except OSError:
            await anyio.sleep(0.05)
        else:
            await stream.aclose()
            return


@pytest.mark.anyio
@pytest.mark.parametrize(("word", "expected"), [pytest.param(*row, id=row[0]) for row in FAULT_ROWS])
async def test_a_fault_word_has_the_effect_of_the_table(world: World, word: str, expected: str) -> None:
    started_at = world.clock.now
    async with world.client() as client:
        arguments = {"prompt": f"{word} a fox"}
        answer: dict[str, Any] = (await client.call_tool("generate_image", arguments)).structured_content
    facts = re.findall(r"`(\w+)`(?: (\w+))?", expected)
    assert facts
    for field, value in facts:
        if value:
            assert answer[field] == {"true": True}.get(value, value)
        else:
            assert answer[field] is not None
    duration = re.search(r"after (\d+) s", expected)
    if duration:
        assert int(duration[1]) <= world.clock.now - started_at < 1.5 * int(duration[1])


def test_the_table_of_fault_words_is_read() -> None:
    assert len(FAULT_ROWS) == PAGE.count("| `sim:") >= 4
