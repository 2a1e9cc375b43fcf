"""A key change as an MCP host sees it: server processes on stdio, one after the other, with one simulated EvoLink."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import uvicorn
from child_processes import SERVER_COMMAND, minimal_environment
from conftest import PlainSimulator
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time"), pytest.mark.journal_file]

OLD = "sk-old-key-0123456789abcdef"
NEW = "sk-new-key-0123456789abcdef"
FOREIGN = "sk-foreign-key-0123456789ab"
REQUEST = {"size": "1024x640", "quality": "low"}
SLOW = {**REQUEST, "prompt": "sim:slow=3600 a hare", "wait_seconds": 0}


@asynccontextmanager
async def serve_simulator(simulator: PlainSimulator) -> AsyncIterator[str]:
    """Serve the simulator. Yield its base URL."""
    web = uvicorn.Server(uvicorn.Config(simulator.app, port=0, log_level="error", lifespan="off"))
    async with anyio.create_task_group() as group:
        group.start_soon(web.serve)
        while not web.started:
            await anyio.sleep(0.01)
        yield f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}"
        web.should_exit = True


async def test_the_history_of_a_process_is_complete_with_a_new_key(tmp_path: Path) -> None:
    simulator = PlainSimulator(accounts={NEW: OLD}, duration_s=0.1)

    @asynccontextmanager
    async def client(key: str, base_url: str, **settings: str) -> AsyncIterator[Client]:
        env = environment(tmp_path, key, base_url, **settings)
        server = StdioServerParameters(command=SERVER_COMMAND[0], args=SERVER_COMMAND[1:], env=env, cwd=tmp_path)
        async with Client(server) as session:
            yield session

    async with serve_simulator(simulator) as base_url:
        async with client(OLD, base_url) as old:
            fox = await facts(old, "generate_image", **REQUEST, prompt="a fox")
            hare = await facts(old, "generate_image", **SLOW)
        for task in simulator.tasks.values():
            task.duration = 0
        async with client(FOREIGN, base_url) as foreign:
            task_list = await facts(foreign, "list_tasks")
            running = await facts(foreign, "get_task", task_id=hare["task_id"])
        assert [task["other_key"] for task in task_list["tasks"]] == [True, True]
        assert (running["status"], running["error"]["code"]) == ("pending", "other_key")

        async with client(NEW, base_url, EVOLINK_MCP_MAX_CREDITS_PER_DAY="0.5") as new:
            repeat = await facts(new, "generate_image", **{**SLOW, "wait_seconds": 60})
            assert (repeat["task_id"], repeat["status"]) == (hare["task_id"], "completed")
            task_list = await facts(new, "list_tasks")
            assert [task["task_id"] for task in task_list["tasks"]] == [hare["task_id"], fox["task_id"]]
            assert not any("other_key" in task for task in task_list["tasks"])
            view = await new.call_tool("view_image", {"task_id": fox["task_id"]})
            assert view.content[0].type == "image"
            resource = await new.read_resource(f"evolink://images/{fox['task_id']}/0")
            assert base64.b64decode(resource.contents[0].blob) == Path(fox["images"][0]["path"]).read_bytes()
            refusal = await facts(new, "generate_image", **REQUEST, prompt="a hen")
            assert refusal["error"]["code"] == "over_budget"
        async with client(NEW, base_url) as new:
            edit = await facts(
                new,
                "generate_image",
                **REQUEST,
                prompt="it sleeps",
                image_urls=[f"evolink://images/{fox['task_id']}/0"],
            )
            assert edit["status"] == "completed"
        page = await command(
            tmp_path, FOREIGN, base_url, "sheet", "--since", "all", "--out", str(tmp_path / "all.html")
        )
        assert page.returncode == 0
        assert (tmp_path / "all.html").read_text("utf-8").count("bought with another key") == 3
        table = await command(tmp_path, FOREIGN, base_url, "tasks")
        assert table.stdout.count("bought with another key") == 3
        table = await command(tmp_path, NEW, base_url, "tasks")
        assert table.stdout.count("charged yes") == 3
        assert "another key" not in table.stdout
        table = await command(tmp_path, NEW, base_url, "tasks", EVOLINK_MCP_PROFILE="work")
        assert table.stdout.startswith("No purchases yet")
    assert len(simulator.tasks) == 3


async def facts(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    answer = await client.call_tool(tool, arguments)
    assert answer.structured_content is not None
    return answer.structured_content


def environment(home: Path, key: str, base_url: str, **settings: str) -> dict[str, str]:
    return minimal_environment(
        home,
        EVOLINK_API_KEY=key,
        EVOLINK_BASE_URL=base_url,
        EVOLINK_MCP_DATA_DIR=str(home / "data"),
        EVOLINK_MCP_OUTPUT_DIR=str(home / "pictures"),
        **settings,
    )


async def command(
    home: Path, key: str, base_url: str, *arguments: str, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of the program to its end."""
    env = environment(home, key, base_url, **settings)
    return await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [*SERVER_COMMAND, *arguments], env=env, cwd=home, capture_output=True, text=True, timeout=300, check=False
        )
    )
