"""A model that was talked into it: results go only where the owner allows, and no file leaves with a callback unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Open, World
from drawings import drawing
from mcp.client import Client
from mcp_types import ElicitResult

from evolink_mcp.app.wiring import server_for

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])
HOOK = "https://hooks.example.com/here"
WISH = {"prompt": "sim:fast a fox", "callback_url": HOOK}


class User:
    """Somebody who is asked, and says yes or no."""

    def __init__(self, *, says: bool) -> None:
        self.questions: list[str] = []
        self._says = says

    async def __call__(self, _: Any, params: Any) -> ElicitResult:
        self.questions.append(params.message)
        return ElicitResult(action="accept", content={"go_ahead": self._says})


@pytest.fixture
def passport(tmp_path: Path) -> str:
    (tmp_path / "pictures").mkdir()
    path = tmp_path / "pictures" / "passport-scan.png"
    path.write_bytes(drawing())
    return str(path)


def client_of(world: World, mode: str, user: User | None) -> Client:
    return Client(server_for(world.studio, world.settings), mode=mode, elicitation_callback=user)


def sent(world: World) -> list[str]:
    return [f"{request.method} {request.path}" for request in world.simulator.requests]


# --- hosts ---


@pytest.mark.parametrize(
    ("allowed", "url"),
    [
        pytest.param("other.example.com", HOOK, id="another host"),
        pytest.param("example.com", HOOK, id="the domain above it"),
        pytest.param("none", HOOK, id="none"),
        pytest.param("hooks.example.com", "https://hooks.example.com.evil.dev/x", id="a longer name"),
        pytest.param("hooks.example.com", "https://evil.dev/hooks.example.com", id="in its path"),
    ],
)
async def test_a_callback_elsewhere_is_refused_before_anything_is_sent(
    open_world: Open, passport: str, allowed: str, url: str
) -> None:
    async with (
        open_world({"EVOLINK_MCP_CALLBACK_HOSTS": allowed}) as world,
        client_of(world, "auto", None) as client,
    ):
        answer = await client.call_tool("generate_image", {**WISH, "callback_url": url, "image_urls": [passport]})
    assert answer.structured_content["error"]["code"] == "callback_refused"
    assert answer.structured_content["charged"] == "no"
    assert sent(world) == []


@pytest.mark.parametrize("url", [HOOK, "https://HOOKS.example.com:8443/x", "https://hooks.example.com./x"])
async def test_a_callback_to_an_allowed_host_goes_out_as_it_was_said(open_world: Open, url: str) -> None:
    allowed = {"EVOLINK_MCP_CALLBACK_HOSTS": "one.example, Hooks.Example.com."}
    async with open_world(allowed) as world, client_of(world, "auto", None) as client:
        answer = await client.call_tool("generate_image", {**WISH, "callback_url": url})
        (task,) = world.simulator.tasks.values()
    assert not answer.is_error
    assert task.body["callback_url"] == url


# --- files ---


@ERAS
async def test_a_file_that_leaves_with_a_callback_is_asked_about(open_world: Open, passport: str, mode: str) -> None:
    user = User(says=False)
    async with open_world() as world, client_of(world, mode, user) as client:
        answer = await client.call_tool("generate_image", {**WISH, "image_urls": [passport]})
    assert answer.structured_content["error"]["code"] == "not_confirmed"
    (question,) = user.questions
    assert passport in question
    assert "hooks.example.com" in question
    assert sent(world) == []


@ERAS
async def test_it_is_asked_once_in_a_session(open_world: Open, passport: str, mode: str) -> None:
    user = User(says=True)
    async with open_world() as world, client_of(world, mode, user) as client:
        for prompt in ("sim:fast a fox", "sim:fast a hare"):
            wish = {**WISH, "prompt": prompt, "image_urls": [passport]}
            assert not (await client.call_tool("generate_image", wish)).is_error
        assert len(user.questions) == 1
        elsewhere = {**WISH, "callback_url": "https://other.example.com/", "image_urls": [passport]}
        await client.call_tool("generate_image", elsewhere)
    assert len(user.questions) == 2


@ERAS
@pytest.mark.parametrize(
    "wish",
    [
        pytest.param({"callback_url": HOOK}, id="no picture"),
        pytest.param({"callback_url": HOOK, "image_urls": ["https://cdn.pixabay.com/a.png"]}, id="a public picture"),
        pytest.param({"image_urls": ["passport-scan.png"]}, id="no callback"),
    ],
)
async def test_nobody_is_asked_otherwise(open_world: Open, passport: str, mode: str, wish: dict[str, Any]) -> None:
    user = User(says=False)
    async with open_world() as world, client_of(world, mode, user) as client:
        answer = await client.call_tool("generate_image", {"prompt": "sim:fast a fox", **wish})
    assert (answer.is_error, user.questions) == (False, [])


async def test_price_and_file_are_one_question(open_world: Open, passport: str) -> None:
    user = User(says=True)
    async with open_world({"EVOLINK_MCP_CONFIRM_ABOVE": "1"}) as world, client_of(world, "auto", user) as client:
        await client.call_tool("generate_image", {**WISH, "image_urls": [passport]})
    (question,) = user.questions
    assert "credits" in question
    assert passport in question


async def test_the_users_answer_to_the_price_is_not_one_to_another_file(open_world: Open, passport: str) -> None:
    user = User(says=False)
    async with open_world() as world, client_of(world, "auto", user) as client:
        for _ in range(2):
            await client.call_tool("generate_image", {**WISH, "image_urls": [passport]})
    assert len(user.questions) == 2
