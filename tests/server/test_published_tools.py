"""EVOLINK_MCP_TOOLS limits the published tools. A call of another tool fails, and no text mentions a purchase."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Open
from mcp.client import Client

from evolink_mcp.app.wiring import server_for
from evolink_mcp.server.server import build_server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])


def client_of(world: Any, mode: str) -> Client:
    return Client(server_for(world.studio, world.settings), mode=mode)


async def test_all_tools_are_published_by_default(open_world: Open) -> None:
    async with open_world() as world, Client(build_server(world.studio)) as client:
        assert [tool.name for tool in (await client.list_tools()).tools] == [
            "generate_image",
            "generate_images",
            "get_task",
            "compute_size",
            "view_image",
            "derive_image",
            "list_tasks",
            "get_balance",
        ]


@ERAS
async def test_without_generate_image_a_client_cannot_buy(open_world: Open, mode: str) -> None:
    async with open_world({"EVOLINK_MCP_TOOLS": " get_task, compute_size "}) as world, client_of(world, mode) as client:
        tools = (await client.list_tools()).tools
        assert [tool.name for tool in tools] == ["get_task", "compute_size"]
        assert all(tool.annotations and tool.annotations.read_only_hint for tool in tools)
        assert (await client.list_prompts()).prompts == []
        assert "owner switched off generate_image" in (client.instructions or "")
        answer = await client.call_tool("generate_image", {"prompt": "a fox"})
        assert answer.is_error
        assert world.simulator.requests == []


@ERAS
async def test_a_published_tool_works(open_world: Open, mode: str) -> None:
    async with open_world({"EVOLINK_MCP_TOOLS": "generate_image"}) as world, client_of(world, mode) as client:
        assert [tool.name for tool in (await client.list_tools()).tools] == ["generate_image"]
        answer = await client.call_tool("generate_image", {"prompt": "sim:fast a fox"})
        assert answer.structured_content["status"] == "completed"
        assert [prompt.name for prompt in (await client.list_prompts()).prompts] != []
