"""The commands print no terminal escapes, not even from the path of an image."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from child_processes import SERVER_COMMAND, minimal_environment
from conftest import Open

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time"), pytest.mark.journal_file]
FOLDER = "pictures \x1b[31m\u202e\x9b2J"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such file names")
@pytest.mark.parametrize("command", [["tasks"], ["open", "--print", "fox"], ["sheet", "--since", "all"]])
async def test_a_command_replaces_control_characters_of_a_path(
    open_world: Open, tmp_path: Path, command: list[str]
) -> None:
    environ = {"EVOLINK_MCP_OUTPUT_DIR": str(tmp_path / FOLDER)}
    async with open_world(environ) as world, world.client() as client:
        purchase = await client.call_tool("generate_image", {"prompt": "sim:fast a \x1b[2Jfox"})
        assert FOLDER in purchase.structured_content["images"][0]["path"]
        settings = {
            "EVOLINK_BASE_URL": world.settings.base_url,
            "EVOLINK_MCP_DATA_DIR": str(world.settings.data_dir),
            **environ,
        }
    process = subprocess.run(
        [*SERVER_COMMAND, *command],
        env=minimal_environment(tmp_path, PYTHONUTF8="1", **settings),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "pictures \ufffd[31m\ufffd\ufffd2J" in process.stdout
    assert all(char.isprintable() or char == "\n" for char in process.stdout + process.stderr)
