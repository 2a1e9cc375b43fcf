"""The Tasks extension: a client that declares it gets a task handle and polls. Other clients notice no change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import anyio
import pytest
from conftest import TEST_CLIENT, Open, World
from mcp.client import Client
from mcp.client.extension import ClaimContext, ClientExtension, ResultClaim
from mcp.shared.exceptions import MCPError
from mcp_types import CallToolResult, ElicitResult, Request, RequestParams, Result
from pydantic import ConfigDict

from evolink_mcp.server.server import build_server

pytestmark = pytest.mark.anyio
TASKS = "io.modelcontextprotocol/tasks"
SLOW = {"prompt": "sim:slow=1000000 a fox"}


class TaskHandle(Result):
    """A task in the protocol, with any fields."""

    model_config = ConfigDict(extra="allow")
    result_type: Literal["task"]


class TaskAnswer(Result):
    """An answer to a tasks method, with any fields."""

    model_config = ConfigDict(extra="allow")


class TaskParams(RequestParams):
    task_id: str


class TaskRequest(Request[TaskParams, str]):
    name_param = "taskId"


class TaskClient(ClientExtension):
    """A client that records task handles and polls without a delay."""

    identifier = TASKS

    def __init__(self) -> None:
        self.handles: list[dict[str, Any]] = []

    def claims(self) -> Sequence[ResultClaim[Any]]:
        return [ResultClaim(result_type="task", model=TaskHandle, resolve=self._resolve)]

    async def _resolve(self, handle: TaskHandle, ctx: ClaimContext) -> CallToolResult:
        self.handles.append(handle.model_dump(by_alias=True))
        while True:
            answer = await ask(ctx, "tasks/get", self.handles[0]["taskId"])
            self.handles.append(answer)
            if answer["status"] != "working":
                return CallToolResult.model_validate(answer["result"])
            await anyio.sleep(0)


async def ask(client: Any, method: str, task_id: str) -> dict[str, Any]:
    request = TaskRequest(method=method, params=TaskParams(task_id=task_id))
    return (await client.session.send_request(request, TaskAnswer)).model_dump(by_alias=True)


def client_of(world: World, mode: Any = "auto") -> tuple[Client, TaskClient]:
    extension = TaskClient()
    return Client(build_server(world.studio), client_info=TEST_CLIENT, mode=mode, extensions=[extension]), extension


async def handle_of(client: Client, arguments: dict[str, Any]) -> dict[str, Any]:
    answer = await client.session.call_tool("generate_image", arguments, allow_claimed=True)
    return answer.model_dump(by_alias=True)


async def test_a_task_is_created_and_polled_and_ends_with_the_answer_of_get_task(world: World) -> None:
    with anyio.fail_after(300):
        client, extension = client_of(world)
        async with client:
            answer = await client.call_tool("generate_image", {"prompt": "a lighthouse"})
            task_id = extension.handles[0]["taskId"]
            task_answer = await client.call_tool("get_task", {"task_id": task_id})
    created_handle, *running_handles, last_handle = extension.handles
    assert created_handle["resultType"] == "task"
    assert created_handle["status"] == "working"
    assert isinstance(created_handle["pollIntervalMs"], int)
    assert "ttlMs" in created_handle
    assert {answer["status"] for answer in running_handles} == {"working"}
    assert last_handle["resultType"] == "complete"
    assert last_handle["status"] == "completed"
    assert last_handle["taskId"] == task_id
    assert answer.structured_content == task_answer.structured_content
    assert [block.type for block in answer.content] == ["text", "image"]
    assert [image["path"] for image in answer.structured_content["images"]] == [str(path) for path in world.files]
    assert world.posts == 1


async def test_a_failed_picture_is_a_completed_task_whose_answer_is_an_error(world: World) -> None:
    with anyio.fail_after(300):
        client, extension = client_of(world)
        async with client:
            answer = await client.call_tool("generate_image", {"prompt": "sim:fail sim:slow=1000 a fox"})
    assert extension.handles[-1]["status"] == "completed"
    assert answer.is_error is True
    assert answer.structured_content["error"]["code"] == "content_policy_violation"


async def test_refused_arguments_create_no_task(world: World) -> None:
    with anyio.fail_after(300):
        client, extension = client_of(world)
        async with client:
            answer = await client.call_tool("generate_image", {"prompt": "a fox", "promt": "a fox"})
    assert answer.is_error is True
    assert "did you mean prompt" in answer.content[0].text
    assert extension.handles == []
    assert world.posts == 0


async def test_other_tools_are_never_tasks(world: World) -> None:
    with anyio.fail_after(300):
        client, extension = client_of(world)
        async with client:
            answer = await client.call_tool("compute_size", {"size": "16:9"})
    assert answer.is_error is False
    assert extension.handles == []


async def test_two_identical_calls_with_handles_are_two_purchases(world: World) -> None:
    """The first client has its handle, so the second call is not a repeat of a lost one."""
    with anyio.fail_after(300):
        client, _ = client_of(world)
        async with client:
            first, second = await handle_of(client, SLOW), await handle_of(client, SLOW)
    assert first["taskId"] != second["taskId"]
    assert world.posts == 2


async def test_the_next_identical_call_gets_a_cancelled_task(world: World) -> None:
    """EvoLink cannot cancel a paid task. Only the wait ends."""
    with anyio.fail_after(300):
        client, _ = client_of(world)
        async with client:
            first = await handle_of(client, SLOW)
            cancel_answer = await ask(client, "tasks/cancel", first["taskId"])
            task = await ask(client, "tasks/get", first["taskId"])
            second = await handle_of(client, SLOW)
    assert {"taskId", "status"} & cancel_answer.keys() == set()
    assert cancel_answer["resultType"] == "complete"
    assert task["status"] == "working"
    assert second["taskId"] == first["taskId"]
    assert world.posts == 1


@pytest.mark.parametrize(("action", "posts"), [("accept", 1), ("decline", 0)])
async def test_the_user_approves_before_the_task_is_created(open_world: Open, action: Any, posts: int) -> None:
    async def reply(context: Any, question: Any) -> ElicitResult:
        return ElicitResult(action=action, content={"go_ahead": True} if action == "accept" else None)

    with anyio.fail_after(300):
        async with open_world({"EVOLINK_MCP_CONFIRM_ABOVE": "0.1"}) as world:
            extension = TaskClient()
            connection = Client(build_server(world.studio), extensions=[extension], elicitation_callback=reply)
            async with connection as client:
                answer = await client.call_tool("generate_image", {"prompt": "a fox"})
    assert answer.is_error is (action == "decline")
    assert bool(extension.handles) is (action == "accept")
    assert world.posts == posts


async def test_a_handle_outlives_the_server(open_world: Open) -> None:
    with anyio.fail_after(300):
        async with open_world() as world:
            client, _ = client_of(world)
            async with client:
                handle = await handle_of(client, {"prompt": "sim:slow a fox"})
        async with open_world(simulator=world.simulator, clock=world.clock) as world:
            client, _ = client_of(world)
            async with client:
                while (answer := await ask(client, "tasks/get", handle["taskId"]))["status"] == "working":
                    await anyio.sleep(0)
    assert answer["result"]["structuredContent"]["images"][0]["path"] == str(world.files[0])
    assert world.posts == 1


@pytest.mark.parametrize("method", ["tasks/get", "tasks/cancel", "tasks/update"])
@pytest.mark.parametrize(
    "task_id",
    [
        pytest.param("task-unified-1790000000-nobodys1", id="unknown id"),
        pytest.param("../../v1/credits", id="invalid id"),
    ],
)
async def test_an_unknown_task_is_a_protocol_error(world: World, method: str, task_id: str) -> None:
    with anyio.fail_after(300):
        client, _ = client_of(world)
        async with client:
            with pytest.raises(MCPError) as error:
                await ask(client, method, task_id)
    assert error.value.code == -32602
    assert world.simulator.requests == []


@pytest.mark.parametrize("method", ["tasks/list", "tasks/result"])
async def test_methods_of_the_older_design_are_unknown(world: World, method: str) -> None:
    with anyio.fail_after(300):
        client, _ = client_of(world)
        async with client:
            with pytest.raises(MCPError) as error:
                await ask(client, method, "task-unified-1790000000-nobodys1")
    assert error.value.code == -32601


async def test_a_client_without_the_extension_waits_and_cannot_poll(world: World) -> None:
    with anyio.fail_after(300):
        async with world.client() as client:
            assert TASKS in (client.server_capabilities.extensions or {})
            answer = await client.call_tool("generate_image", {"prompt": "a fox"})
            with pytest.raises(MCPError) as error:
                await ask(client, "tasks/get", answer.structured_content["task_id"])
    assert answer.structured_content["status"] == "completed"
    assert error.value.code == -32021


async def test_older_protocol_versions_have_no_tasks_extension(world: World) -> None:
    with anyio.fail_after(300):
        client, extension = client_of(world, "legacy")
        async with client:
            assert not client.server_capabilities.extensions
            answer = await client.call_tool("generate_image", {"prompt": "a fox"})
            with pytest.raises(MCPError) as error:
                await ask(client, "tasks/get", answer.structured_content["task_id"])
    assert answer.structured_content["status"] == "completed"
    assert extension.handles == []
    assert error.value.code == -32601
