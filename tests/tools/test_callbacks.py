"""Prompt injection cannot send results to a host that is not allowed, or a local file without the user's approval."""

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
HOOK = "https://hooks.evolink-hooks.dev/here"
ARGUMENTS = {"prompt": "sim:fast a fox", "callback_url": HOOK}


class User:
    """A user who answers each question with yes or no."""

    def __init__(self, *, answer: bool) -> None:
        self.questions: list[str] = []
        self._answer = answer

    async def __call__(self, _: Any, params: Any) -> ElicitResult:
        self.questions.append(params.message)
        return ElicitResult(action="accept", content={"go_ahead": self._answer})


@pytest.fixture
def passport_file(tmp_path: Path) -> str:
    (tmp_path / "pictures").mkdir()
    path = tmp_path / "pictures" / "passport-scan.png"
    path.write_bytes(drawing())
    return str(path)


def client_of(world: World, mode: str, user: User | None) -> Client:
    return Client(server_for(world.studio, world.settings), mode=mode, elicitation_callback=user)


def requests_to_evolink(world: World) -> list[str]:
    return [f"{request.method} {request.path}" for request in world.simulator.requests]


# --- hosts ---


@pytest.mark.parametrize(
    ("allowed", "url"),
    [
        pytest.param("other.evolink-hooks.dev", HOOK, id="another host"),
        pytest.param("evolink-hooks.dev", HOOK, id="the parent domain"),
        pytest.param("none", HOOK, id="no host allowed"),
        pytest.param("hooks.evolink-hooks.dev", "https://hooks.evolink-hooks.dev.evil.dev/x", id="a longer name"),
        pytest.param("hooks.evolink-hooks.dev", "https://evil.dev/hooks.evolink-hooks.dev", id="the host in the path"),
    ],
)
async def test_a_callback_to_another_host_is_refused_without_a_request(
    open_world: Open, passport_file: str, allowed: str, url: str
) -> None:
    async with (
        open_world({"EVOLINK_MCP_CALLBACK_HOSTS": allowed}) as world,
        client_of(world, "auto", None) as client,
    ):
        answer = await client.call_tool(
            "generate_image", {**ARGUMENTS, "callback_url": url, "image_urls": [passport_file]}
        )
    assert answer.structured_content["error"]["code"] == "callback_refused"
    assert answer.structured_content["charged"] == "no"
    assert requests_to_evolink(world) == []


@pytest.mark.parametrize("url", [HOOK, "https://HOOKS.evolink-hooks.dev:8443/x", "https://hooks.evolink-hooks.dev./x"])
async def test_a_callback_to_an_allowed_host_is_sent_unchanged(open_world: Open, url: str) -> None:
    allowed = {"EVOLINK_MCP_CALLBACK_HOSTS": "one.evolink.dev, Hooks.Evolink-hooks.dev."}
    async with open_world(allowed) as world, client_of(world, "auto", None) as client:
        answer = await client.call_tool("generate_image", {**ARGUMENTS, "callback_url": url})
        (task,) = world.simulator.tasks.values()
    assert not answer.is_error
    assert task.body["callback_url"] == url


# --- files ---


@ERAS
async def test_a_local_file_with_a_callback_needs_approval(open_world: Open, passport_file: str, mode: str) -> None:
    user = User(answer=False)
    async with open_world() as world, client_of(world, mode, user) as client:
        answer = await client.call_tool("generate_image", {**ARGUMENTS, "image_urls": [passport_file]})
    assert answer.structured_content["error"]["code"] == "not_confirmed"
    (question,) = user.questions
    assert passport_file in question
    assert "hooks.evolink-hooks.dev" in question
    assert requests_to_evolink(world) == []


@ERAS
async def test_the_approval_holds_for_the_session_and_one_host(open_world: Open, passport_file: str, mode: str) -> None:
    user = User(answer=True)
    async with open_world() as world, client_of(world, mode, user) as client:
        for prompt in ("sim:fast a fox", "sim:fast a hare"):
            arguments = {**ARGUMENTS, "prompt": prompt, "image_urls": [passport_file]}
            assert not (await client.call_tool("generate_image", arguments)).is_error
        assert len(user.questions) == 1
        other_host = {**ARGUMENTS, "callback_url": "https://other.evolink-hooks.dev/", "image_urls": [passport_file]}
        await client.call_tool("generate_image", other_host)
    assert len(user.questions) == 2


@ERAS
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"callback_url": HOOK}, id="no picture"),
        pytest.param({"callback_url": HOOK, "image_urls": ["https://cdn.pixabay.com/a.png"]}, id="a public picture"),
        pytest.param({"image_urls": ["passport-scan.png"]}, id="no callback"),
    ],
)
async def test_other_calls_need_no_approval(
    open_world: Open, passport_file: str, mode: str, arguments: dict[str, Any]
) -> None:
    user = User(answer=False)
    async with open_world() as world, client_of(world, mode, user) as client:
        answer = await client.call_tool("generate_image", {"prompt": "sim:fast a fox", **arguments})
    assert (answer.is_error, user.questions) == (False, [])


async def test_price_and_file_are_in_one_question(open_world: Open, passport_file: str) -> None:
    user = User(answer=True)
    async with open_world({"EVOLINK_MCP_CONFIRM_ABOVE": "1"}) as world, client_of(world, "auto", user) as client:
        await client.call_tool("generate_image", {**ARGUMENTS, "image_urls": [passport_file]})
    (question,) = user.questions
    assert "credits" in question
    assert passport_file in question


async def test_a_refused_call_asks_again(open_world: Open, passport_file: str) -> None:
    user = User(answer=False)
    async with open_world() as world, client_of(world, "auto", user) as client:
        for _ in range(2):
            await client.call_tool("generate_image", {**ARGUMENTS, "image_urls": [passport_file]})
    assert len(user.questions) == 2
