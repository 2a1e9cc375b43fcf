"""What docs/building.md shows to people who build on the server works as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from child_processes import minimal_environment
from conftest import World

from evolink_mcp.simulator.app import FAULTS
from evolink_mcp.tools.task_answer import ImageOut, TaskOut

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "building.md").read_text("utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found[1]


SIMULATED = """
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


def test_the_python_program_makes_a_picture(tmp_path: Path) -> None:
    page = tmp_path / "page.py"
    page.write_text(block("python"), encoding="utf-8")
    env = minimal_environment(tmp_path)
    done = subprocess.run(
        [sys.executable, "-P", "-c", SIMULATED, str(page), str(tmp_path)],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = done.stdout.split(".png")[0] + ".png"
    assert Path(path).is_file()
    assert os.path.dirname(path) == str(tmp_path / "pictures")


def test_every_field_of_an_answer_is_in_the_table() -> None:
    names = set(re.findall(r"`(\w+)(?:\[\])?`", "".join(line for line in PAGE.splitlines() if line.startswith("|"))))
    assert set(TaskOut.model_fields) <= names
    assert set(ImageOut.model_fields) <= names


@pytest.mark.anyio
async def test_every_field_of_a_reference_is_in_the_table(world: World) -> None:
    async with world.client() as client:
        wish = {"prompt": "sim:fast a fox", "image_urls": ["https://example.com/a.png"]}
        facts = (await client.call_tool("generate_image", wish)).structured_content
    row = next(line for line in PAGE.splitlines() if line.startswith("| `references[]`"))
    assert [name for name in facts["references"][0] if f"`{name}`" not in row] == []


def test_the_faults_it_names_exist() -> None:
    named = set(re.findall(r"`(sim:\w+)", PAGE))
    known = {fault.partition("=")[0] for fault in FAULTS}
    assert named <= known
    assert named
