"""Previews by the name of the client: several frameworks with an SDK's default name pass them to the model as text."""

from __future__ import annotations

import anyio
import pytest
from conftest import Open, World
from mcp.client import Client
from mcp_types import CallToolResult, Implementation

from evolink_mcp.app.wiring import server_for

pytestmark = pytest.mark.anyio
SDK_NAMES = ["", "mcp", "mcp-client", "example-client", "ai-sdk-mcp-client", "google-adk", " MCP "]
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])


async def call(world: World, name: str, *, mode: str = "auto", view: bool = False) -> CallToolResult:
    """Buy an image as the client `name`. Return the answer, or with `view` that of view_image."""
    server = server_for(world.studio, world.settings)
    info = Implementation(name=name, version="1")
    with anyio.fail_after(300):
        async with Client(server, client_info=info, mode=mode) as client:
            answer = await client.call_tool("generate_image", {"prompt": "sim:fast a fox"})
            if view:
                return await client.call_tool("view_image", {"task_id": answer.structured_content["task_id"]})
            return answer


def kinds(answer: CallToolResult) -> list[str]:
    return [block.type for block in answer.content]


@ERAS
@pytest.mark.parametrize("name", SDK_NAMES)
async def test_a_client_with_the_default_name_of_an_sdk_gets_no_preview(world: World, name: str, mode: str) -> None:
    answer = await call(world, name, mode=mode)
    assert kinds(answer) == ["text"]
    assert len(answer.model_dump_json()) < 10_000


@pytest.mark.parametrize("name", ["mcp-remote", "my-mcp", "mcp-client-pro", "Claude", "claude-code"])
async def test_a_client_with_another_name_gets_a_preview(world: World, name: str) -> None:
    assert kinds(await call(world, name)) == ["text", "image"]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("on", ["text", "image"]),
        ("ON", ["text", "image"]),
        ("256", ["text", "image"]),
        ("auto", ["text"]),
        ("off", ["text"]),
    ],
)
async def test_the_setting_on_sends_previews_to_every_client(
    open_world: Open, setting: str, expected: list[str]
) -> None:
    async with open_world({"EVOLINK_MCP_PREVIEW": setting}) as world:
        assert kinds(await call(world, "mcp")) == expected


@pytest.mark.parametrize("setting", ["auto", "off"])
async def test_view_image_returns_the_image_to_every_client(open_world: Open, setting: str) -> None:
    async with open_world({"EVOLINK_MCP_PREVIEW": setting}) as world:
        assert kinds(await call(world, "mcp", view=True)) == ["image", "text"]


async def test_get_task_sends_no_preview_to_a_client_with_the_default_name(world: World) -> None:
    purchase = await call(world, "mcp")
    with anyio.fail_after(300):
        async with Client(server_for(world.studio, world.settings)) as client:
            answer = await client.call_tool("get_task", {"task_id": purchase.structured_content["task_id"]})
    assert kinds(answer) == ["text"]
