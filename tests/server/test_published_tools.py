"""An owner publishes fewer tools: what is not published cannot be called, and nothing speaks of buying then."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Open
from mcp.client import Client

from evolink_mcp.app.wiring import server_for
from evolink_mcp.server.server import build_server
from evolink_mcp.tools.schemas import TOOL_NAMES

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])


def served(world: Any, mode: str) -> Client:
    return Client(server_for(world.studio, world.settings), mode=mode)


async def test_all_tools_are_named(open_world: Open) -> None:
    async with open_world() as world, Client(build_server(world.studio)) as client:
        assert [tool.name for tool in (await client.list_tools()).tools] == list(TOOL_NAMES)


@ERAS
async def test_without_generate_image_nothing_can_be_bought(open_world: Open, mode: str) -> None:
    async with open_world({"EVOLINK_MCP_TOOLS": " get_task, compute_size "}) as world, served(world, mode) as client:
        tools = (await client.list_tools()).tools
        assert [tool.name for tool in tools] == ["get_task", "compute_size"]
        assert all(tool.annotations and tool.annotations.read_only_hint for tool in tools)
        assert (await client.list_prompts()).prompts == []
        assert "generate_image is switched off" in (client.instructions or "")
        answer = await client.call_tool("generate_image", {"prompt": "a fox"})
        assert answer.is_error
        assert world.simulator.requests == []


@ERAS
async def test_the_rest_works_as_before(open_world: Open, mode: str) -> None:
    async with open_world({"EVOLINK_MCP_TOOLS": "generate_image"}) as world, served(world, mode) as client:
        assert [tool.name for tool in (await client.list_tools()).tools] == ["generate_image"]
        answer = await client.call_tool("generate_image", {"prompt": "sim:fast a fox"})
        assert answer.structured_content["status"] == "completed"
        assert [prompt.name for prompt in (await client.list_prompts()).prompts] != []
