"""A caller's mistake is answered as invalid params in both protocol eras, without a traceback in the log."""

from __future__ import annotations

import anyio
import pytest
from conftest import World
from mcp.shared.exceptions import MCPError

pytestmark = pytest.mark.anyio
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])


@ERAS
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        pytest.param("newest_picture", {}, "There is no prompt newest_picture, only new_picture", id="unknown prompt"),
        pytest.param("new_picture", {}, "The prompt new_picture needs subject.", id="no arguments"),
        pytest.param(
            "new_picture", {"subjct": "a fox"}, "The prompt new_picture needs subject.", id="misspelt argument"
        ),
        pytest.param(
            "edit_picture", {}, "The prompt edit_picture needs picture and change.", id="two missing arguments"
        ),
    ],
)
async def test_a_wrong_prompt_request_is_answered_with_the_reason(
    world: World, caplog: pytest.LogCaptureFixture, mode: str, name: str, arguments: dict[str, str], message: str
) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            with pytest.raises(MCPError) as error:
                await client.get_prompt(name, arguments)
    assert error.value.code == -32602
    assert message in str(error.value)
    assert caplog.records == []


@ERAS
async def test_an_unknown_tool_is_answered_with_a_text_for_the_model(world: World, mode: str) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            answer = await client.call_tool("paint_picture", {"prompt": "a fox"})
    assert answer.is_error is True
    assert "paint_picture" in answer.content[0].text
