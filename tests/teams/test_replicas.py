"""Two replicas behind a round-robin proxy: each of them answers any request."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from conftest import PlainSimulator
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import ElicitResult
from shared import shared_decoder

pytest.importorskip("psycopg")

from child_processes import patient_times
from drawings import drawing
from team_server import HEADERS, block, guard_of, tenants_of

from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.studio.jobs import ImageRequest
from evolink_mcp.teams.adopter import Adopter
from evolink_mcp.teams.authenticator import TeamAuthenticator
from evolink_mcp.teams.schema import read_charges
from evolink_mcp.teams.settings import TeamSettings
from evolink_mcp.teams.studios import Studios, open_team_database
from evolink_mcp.teams.tokens import Tenant, Tokens
from evolink_mcp.transports.http_guard import HttpGuard

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
TOOLS = {tool["name"] for tool in json.loads((Path(__file__).parents[2] / "manifest.json").read_text("utf-8"))["tools"]}
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])
REQUEST = {"prompt": "sim:fast a fox", "size": "1024x640", "quality": "low"}


class RoundRobin(httpx.AsyncBaseTransport):
    """Send each request to the next replica. `turns` lists the replicas in the order of the requests."""

    def __init__(self, apps: list[Any]) -> None:
        self.apps = apps
        self._transports = [httpx.ASGITransport(app) for app in apps]
        self._turns = itertools.cycle(range(len(apps)))
        self.turns: list[int] = []

    def skip_turn(self) -> None:
        next(self._turns)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        turn = next(self._turns)
        self.turns.append(turn)
        return await self._transports[turn].handle_async_request(request)


class Team:
    def __init__(self, apps: list[Any], simulator: PlainSimulator, settings: TeamSettings) -> None:
        self.proxy = RoundRobin(apps)
        self.simulator = simulator
        self.settings = settings

    def http(self, token: str) -> httpx.AsyncClient:
        headers = {**HEADERS, "authorization": f"Bearer {token}"}
        return httpx.AsyncClient(transport=self.proxy, base_url="http://localhost", headers=headers, timeout=300)

    @asynccontextmanager
    async def client(self, token: str, mode: Any = "auto", **options: Any) -> AsyncIterator[Client]:
        async with (
            self.http(token) as http,
            Client(streamable_http_client("http://localhost/mcp", http_client=http), mode=mode, **options) as client,
        ):
            yield client

    @property
    def posts(self) -> int:
        return sum(request.path == "/v1/images/generations" for request in self.simulator.requests)


def _replica(studios: Studios, tokens: Tokens, group: Any) -> HttpGuard:
    authenticator = TeamAuthenticator(tokens)
    tenants = tenants_of(studios, authenticator, group)
    adopter = Adopter(studios, tenants, authenticator)
    group.start_soon(adopter.run)
    return guard_of(studios, authenticator, group, tenants, adopter)


async def test_the_task_of_a_tenant_that_never_calls_again_is_adopted(url: str, tmp_path: Path) -> None:
    """A caller with a JWT has no studio at a replica before the first call there."""
    person = Tenant("anna at https://login.example.org")
    async with open_team(url, tmp_path, ANNA, adopt_every_s=0.1, grace_s=0.0) as team, AsyncExitStack() as stack:
        group = await stack.enter_async_context(anyio.create_task_group())
        stack.callback(group.cancel_scope.cancel)
        settings = team.settings
        transport = httpx.ASGITransport(team.simulator.app)
        async with open_team_database(settings.database_url, patient_times()) as victim:
            assert victim is not None
            team.simulator.duration_s = 3600
            studios = Studios(settings, victim, shared_decoder(), group, transport=transport)
            studio, _ = await stack.enter_async_context(studios.open(person))
            arguments = GenerationRequest(prompt="a fox", size="1024x640")
            await studio.order(ImageRequest(arguments, 9.0))
            while not team.simulator.tasks:
                await anyio.sleep(0.01)
            while (await studio.journal.recent(1))[0].task is None:
                await anyio.sleep(0.01)
        for task in team.simulator.tasks.values():
            task.duration = 0
        while not list(tmp_path.rglob("copies/*.png")):
            await anyio.sleep(0.05)
    assert team.posts == 1


@asynccontextmanager
async def open_team(
    url: str, folder: Path, *blocks: str, adopt_every_s: float = 3.0, grace_s: float = 4.0, **environ: str
) -> AsyncIterator[Team]:
    """Open two replicas with one tokens file, one database and one simulated EvoLink."""
    (folder / "tokens.toml").write_text("".join(blocks))
    simulator = PlainSimulator()
    apps: list[Any] = []
    async with AsyncExitStack() as stack:
        for number in (1, 2):
            settings = TeamSettings.from_environment({
                "EVOLINK_API_KEY": "sk-test-key", "EVOLINK_BASE_URL": "http://127.0.0.1:9",
                "EVOLINK_MCP_DATA_DIR": str(folder / f"data{number}"), "EVOLINK_MCP_OUTPUT_DIR": str(folder / "pictures"),
                "EVOLINK_MCP_TOKENS_FILE": str(folder / "tokens.toml"), "EVOLINK_MCP_DATABASE_URL": url,
                "EVOLINK_MCP_SECRET": "s" * 32, **environ,
            })  # fmt: skip
            assert settings.tokens_file is not None
            times = patient_times(grace_s=grace_s, adopt_every_s=adopt_every_s)
            database = await stack.enter_async_context(open_team_database(settings.database_url, times))
            group = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(group.cancel_scope.cancel)
            studios = Studios(settings, database, shared_decoder(), group, transport=httpx.ASGITransport(simulator.app))
            apps.append(_replica(studios, Tokens(settings.tokens_file), group))
        yield Team(apps, simulator, settings)


@pytest.fixture
def url(cluster: Any) -> str:
    return cluster.database()


ANNA, BERT = block("anna", "a"), block("bert", "b")


@ERAS
async def test_every_tool_works_at_each_replica(url: str, tmp_path: Path, mode: str) -> None:
    async with open_team(url, tmp_path, ANNA) as team, team.client("a", mode) as client:
        purchase = (await client.call_tool("generate_image", {**REQUEST, "wait_seconds": 0})).structured_content
        for _ in range(2):
            repeat = (await client.call_tool("get_task", {"task_id": purchase["task_id"]})).structured_content
            assert (repeat["status"], repeat["charged"]) == ("completed", "yes")
            view = await client.call_tool("view_image", {"task_id": purchase["task_id"]})
            assert not view.is_error
            read = await client.read_resource(repeat["images"][0]["resource_uri"])
            assert read.contents
            task_list = (await client.call_tool("list_tasks", {})).structured_content["tasks"]
            assert [task["task_id"] for task in task_list] == [purchase["task_id"]]
            assert not (await client.call_tool("get_balance", {})).is_error
            assert {tool.name for tool in (await client.list_tools()).tools} == TOOLS
        assert team.posts == 1
        assert set(team.proxy.turns) == {0, 1}
        (charge,) = await anyio.to_thread.run_sync(read_charges, url, 0.0)
        (task,) = team.simulator.tasks.values()
        assert (charge.profile, charge.task_id) == ("anna", purchase["task_id"])
        assert (charge.spent, charge.reserved) == (team.simulator.credits(task.key)[1], 0)


@pytest.mark.parametrize("secret", ["s" * 32, f"{'n' * 32} {'s' * 32}"], ids=["one secret", "a new and an old secret"])
async def test_the_answer_to_a_question_may_reach_another_replica(url: str, tmp_path: Path, secret: str) -> None:
    """The team's secret seals the request state that the client carries."""
    questions: list[str] = []

    async def user(_: Any, params: Any) -> ElicitResult:
        questions.append(params.message)
        return ElicitResult(action="accept", content=dict.fromkeys(params.requested_schema["properties"], True))

    async with open_team(url, tmp_path, ANNA, EVOLINK_MCP_CONFIRM_ABOVE="0.01", EVOLINK_MCP_SECRET=secret) as team:
        async with team.client("a", elicitation_callback=user) as client:
            before = len(team.proxy.turns)
            purchase = await client.call_tool("generate_image", REQUEST)
        assert not purchase.is_error, purchase.content
        assert len(questions) == 1
        assert len(set(team.proxy.turns[before:])) == 2
        assert team.posts == 1


async def test_the_request_state_of_one_tenant_is_invalid_for_another(url: str, tmp_path: Path) -> None:
    ask = {
        "jsonrpc": "2.0", "id": 1, "method": "tools/call",
        "params": {"name": "generate_image", "arguments": REQUEST, "_meta": {
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientInfo": {"name": "x", "version": "1"},
            "io.modelcontextprotocol/clientCapabilities": {"elicitation": {"form": {}}},
        }},
    }  # fmt: skip
    headers = {"mcp-protocol-version": "2026-07-28", "mcp-method": "tools/call", "mcp-name": "generate_image"}
    async with open_team(url, tmp_path, ANNA, BERT, EVOLINK_MCP_CONFIRM_ABOVE="0.01") as team:  # noqa: SIM117
        async with team.http("a") as anna, team.http("b") as bert:
            reply = _result(await anna.post("/mcp", json=ask, headers=headers))
            assert reply["result"]["resultType"] == "input_required", reply
            (name,) = reply["result"]["inputRequests"]
            answer = {"action": "accept", "content": {}}
            schema = reply["result"]["inputRequests"][name]["params"]["requestedSchema"]
            answer["content"] = dict.fromkeys(schema["properties"], True)
            ask["params"] |= {"requestState": reply["result"]["requestState"], "inputResponses": {name: answer}}
            refusal = _result(await bert.post("/mcp", json=ask, headers=headers))
            assert "error" in refusal, refusal
            assert team.posts == 0
            purchase = _result(await anna.post("/mcp", json=ask, headers=headers))
            assert purchase["result"]["structuredContent"]["charged"] == "yes", purchase
            assert team.posts == 1


def _result(reply: httpx.Response) -> Any:
    lines = [line[5:] for line in reply.text.splitlines() if line.startswith("data:")]
    return json.loads(lines[-1] if lines else reply.text)


async def test_a_cancellation_reaches_the_call_at_the_other_replica(url: str, tmp_path: Path) -> None:
    async with open_team(url, tmp_path, ANNA) as team, team.http("a") as http:
        team.simulator.duration_s = 3600
        params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "old", "version": "1"}}
        reply = await http.post("/mcp", json={"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params})
        session = {"mcp-session-id": reply.headers["mcp-session-id"], "mcp-protocol-version": "2025-11-25"}
        answers: list[str] = []

        async def ask() -> None:
            params = {"name": "generate_image", "arguments": {**REQUEST, "prompt": "a fox", "wait_seconds": 600}}
            call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
            answers.append((await http.post("/mcp", json=call, headers=session)).text)

        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            while not team.posts:
                await anyio.sleep(0.01)
            cancel = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}}
            replica = team.proxy.turns[-1]
            assert (await http.post("/mcp", json=cancel, headers=session)).status_code == 202
            assert team.proxy.turns[-1] != replica
        assert "structuredContent" not in answers[0]
        async with team.client("a", "legacy") as client:
            repeat = await client.call_tool("generate_image", {**REQUEST, "prompt": "a fox", "wait_seconds": 0})
            assert "earlier identical call" in repeat.content[0].text
        assert team.posts == 1


@ERAS
async def test_tenants_are_isolated_at_every_replica(url: str, tmp_path: Path, mode: str) -> None:
    async with open_team(url, tmp_path, ANNA, BERT) as team:
        async with team.client("a", mode) as anna, team.client("b", mode) as bert:
            purchase = (await anna.call_tool("generate_image", REQUEST)).structured_content
            for _ in range(2):
                refusal = await bert.call_tool("get_task", {"task_id": purchase["task_id"]})
                assert refusal.is_error
                assert (await bert.call_tool("list_tasks", {})).structured_content["tasks"] == []
                with pytest.raises(Exception, match=r"no |not "):
                    await bert.read_resource(purchase["images"][0]["resource_uri"])
            duplicate = (await bert.call_tool("generate_image", REQUEST)).structured_content
        assert duplicate["task_id"] != purchase["task_id"]
        assert team.posts == 2


async def test_the_daily_limit_of_a_tenant_counts_across_replicas(url: str, tmp_path: Path) -> None:
    async with open_team(url, tmp_path, block("anna", "a", max_credits_per_day=1.0)) as team:
        answers: list[Any] = []

        async def order(number: int) -> None:
            async with team.client("a") as client:
                answers.append(await client.call_tool("generate_image", {**REQUEST, "prompt": f"sim:fast {number}"}))

        async with anyio.create_task_group() as group:
            for number in range(8):
                group.start_soon(order, number)
        charges = [answer.structured_content["credits"] for answer in answers if not answer.is_error]
        assert {answer.structured_content["error"]["code"] for answer in answers if answer.is_error} == {"over_budget"}
        assert sum(charges) <= 1.0
        assert team.posts == len(charges) > 1


async def test_uploads_and_links_of_one_replica_are_valid_at_the_other(url: str, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    (tmp_path / "store").mkdir()
    environ = {"EVOLINK_MCP_PUBLIC_URL": "https://pictures.example.org", "EVOLINK_MCP_STORE": str(tmp_path / "store")}
    async with open_team(url, tmp_path, ANNA, **environ) as team, team.http("a") as http:
        uri = (await http.put("/uploads", content=drawing())).json()["uri"]
        replica = team.proxy.turns[-1]
        arguments = {**REQUEST, "image_urls": [uri], "callback_url": "https://hooks.evolink-team.dev/x"}
        async with team.client("a") as client:
            for prompt in ("sim:fast a fox", "sim:fast a hen"):
                task = (await client.call_tool("generate_image", {**arguments, "prompt": prompt})).structured_content
                assert task["status"] == "completed"
                (image,) = task["images"]
                for _ in range(2):
                    picture = await http.get(image["url"].removeprefix("https://pictures.example.org"))
                    assert (picture.status_code, len(picture.content)) == (200, image["bytes"])
        orders = [number for number in team.proxy.turns if number != replica]
    assert orders  # the other replica has served some of them
    assert team.posts == 2
