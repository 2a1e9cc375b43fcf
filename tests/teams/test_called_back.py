"""Callbacks of EvoLink: signed addresses, a poll before the server trusts one, and delivery to any replica."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import Open, PlainSimulator

pytest.importorskip("psycopg")

from team_server import open_team_server
from test_replicas import ANNA, BERT, REQUEST, Team, open_team

from evolink_mcp.studio.callback_history import MISSED_FACT, MISSING
from evolink_mcp.teams.callbacks import Callbacks

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
PUBLIC = {"EVOLINK_MCP_PUBLIC_URL": "https://pictures.example.org"}
SLOW = {**REQUEST, "prompt": "a fox", "wait_seconds": 0}


@pytest.fixture
def url(cluster: Any) -> str:
    return cluster.database()


def addresses(team: Team) -> list[str]:
    """Return the callback addresses in the order of the purchases."""
    posts = [r for r in team.simulator.requests if r.path == "/v1/images/generations"]
    return [json.loads(request.body)["callback_url"] for request in posts]


def polls(team: Team) -> int:
    return sum(r.path.startswith("/v1/tasks/task-") for r in team.simulator.requests)


async def call_back(team: Team, address: str, body: Any) -> int:
    async with team.http("no token") as http:
        del http.headers["authorization"]
        http.headers["host"] = "pictures.example.org"
        return (await http.post(address.removeprefix("https://pictures.example.org"), content=body)).status_code


def body_of(task_id: str) -> str:
    return json.dumps({"id": task_id, "status": "completed", "results": ["https://evil.dev/x.png"]})


async def test_each_purchase_has_a_separate_callback_address_that_callers_never_see(url: str, tmp_path: Path) -> None:
    async with open_team(url, tmp_path, ANNA, **PUBLIC) as team, team.client("a") as client:
        team.simulator.duration_s = 3600
        first = await client.call_tool("generate_image", SLOW)
        second = await client.call_tool("generate_image", {**SLOW, "prompt": "a hen"})
        with_caller_url = await client.call_tool(
            "generate_image", {**SLOW, "prompt": "x", "callback_url": "https://hooks.evolink-team.dev/x"}
        )
        task_list = await client.call_tool("list_tasks", {"detail": True})
        first_address, second_address, caller_address = addresses(team)
    assert (first_address.startswith("https://pictures.example.org/callbacks/"), first_address == second_address) == (
        True,
        False,
    )
    assert caller_address == "https://hooks.evolink-team.dev/x"
    assert not with_caller_url.is_error
    text = "".join(answer.model_dump_json() for answer in (first, second, task_list))
    assert "/callbacks/" not in text


@pytest.mark.parametrize("turns", [0, 1])
async def test_a_callback_at_any_replica_saves_the_image_with_one_poll(url: str, tmp_path: Path, turns: int) -> None:
    async with open_team(url, tmp_path, ANNA, **PUBLIC) as team, team.client("a") as client:
        team.simulator.duration_s = 3600
        purchase = (await client.call_tool("generate_image", SLOW)).structured_content
        before = polls(team)
        for task in team.simulator.tasks.values():
            task.duration = 0
        for _ in range(turns):
            team.proxy.skip_turn()
        assert await call_back(team, addresses(team)[0], body_of(purchase["task_id"])) == 200
        while not list(tmp_path.rglob("copies/*.png")):
            await anyio.sleep(0.01)
        assert polls(team) == before + 1
        task = (await client.call_tool("get_task", {"task_id": purchase["task_id"]})).structured_content
    assert (task["status"], task["charged"]) == ("completed", "yes")
    assert "evil.dev" not in json.dumps(task)


async def test_a_callback_without_a_valid_signature_has_no_effect(url: str, tmp_path: Path) -> None:
    async with open_team(url, tmp_path, ANNA, **PUBLIC) as team, team.client("a") as client:
        team.simulator.duration_s = 3600
        purchase = (await client.call_tool("generate_image", SLOW)).structured_content
        (address,) = addresses(team)
        forged = address[:-1] + ("0" if address[-1] != "0" else "1")
        before = polls(team)
        assert await call_back(team, forged, body_of(purchase["task_id"])) == 404
        assert await call_back(team, "/callbacks/", body_of(purchase["task_id"])) == 404
        for body in ("", "[]", "{", '{"id": 7}', "[" * 100_000):
            assert await call_back(team, address, body) == 400
        assert await call_back(team, "/mcp", body_of(purchase["task_id"])) == 401
        assert polls(team) == before
    async with open_team(url, tmp_path, ANNA) as team, team.http("no") as http:
        answer = await http.post(address.removeprefix("https://pictures.example.org"), content=body_of("x"))
        assert answer.status_code == 401


async def test_a_callback_identifies_the_task_of_a_lost_answer(url: str, tmp_path: Path) -> None:
    """Two tenants share the account, so its task list proves nothing. The address belongs to one purchase."""
    async with open_team(url, tmp_path, ANNA, BERT, **PUBLIC) as team, team.client("a") as client:
        arguments = {**REQUEST, "prompt": "sim:fast sim:lost-reply a fox"}
        lost = (await client.call_tool("generate_image", arguments)).structured_content
        assert (lost["status"], lost["task_id"]) == ("unknown", None)
        (task_id,) = team.simulator.tasks
        assert await call_back(team, addresses(team)[0], body_of(task_id)) == 200
        while not list(tmp_path.rglob("copies/*.png")):
            await anyio.sleep(0.01)
        repeat = (await client.call_tool("generate_image", arguments)).structured_content
        assert (repeat["task_id"], repeat["status"], repeat["charged"], repeat["guess"]) == (
            task_id,
            "completed",
            "yes",
            False,
        )
        assert team.posts == 1


async def test_a_callback_with_an_impossible_task_is_ignored(url: str, tmp_path: Path) -> None:
    async with (
        open_team(url, tmp_path, ANNA, BERT, **PUBLIC) as team,
        team.client("a") as anna,
        team.client("b") as bert,
    ):
        other_task = (
            await bert.call_tool("generate_image", {**SLOW, "size": "2880x2880", "quality": "high"})
        ).structured_content
        arguments = {**REQUEST, "prompt": "sim:fast sim:lost-reply a fox"}
        await anna.call_tool("generate_image", arguments)
        address = addresses(team)[1]
        for task_id in (other_task["task_id"], "task-unified-1757156493-imcg5zqt", "../../v1/credits"):
            assert await call_back(team, address, body_of(task_id)) == 200
            await anyio.sleep(0.2)
        task_list = (await anna.call_tool("list_tasks", {"detail": True})).structured_content["tasks"]
        assert [(task["status"], task["task_id"]) for task in task_list] == [("unknown", None)]
        assert not [r for r in team.simulator.requests if r.path.endswith("/credits")]


async def test_polls_continue_normally_if_callbacks_do_not_arrive(
    open_world: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong public URL delays three tasks by a minute, and no further ones."""
    waits: list[float] = []
    callbacks = Callbacks("https://nowhere.example.org", ["s" * 32])
    async with open_world(callbacks=callbacks) as world, world.client() as client:
        world.simulator.duration_s = 20
        for number in range(5):
            started_at = world.clock.now
            await client.call_tool("generate_image", {**REQUEST, "prompt": f"picture {number}", "wait_seconds": 900})
            waits.append(world.clock.now - started_at)
    assert [wait >= 60 for wait in waits] == [True, True, True, False, False]
    assert caplog.text.count("EvoLink must reach EVOLINK_MCP_PUBLIC_URL") == 1


async def test_readiness_reports_missing_callbacks(tmp_path: Path) -> None:
    simulator = PlainSimulator(duration_s=3600)
    public = {**PUBLIC, "EVOLINK_MCP_SECRET": "s" * 32}
    async with open_team_server(tmp_path, ANNA, simulator=simulator, **public) as server, server.http() as http:

        async def notes() -> list[str]:
            answer = await http.get("/readyz")
            assert (answer.status_code, answer.json()["status"]) == (200, "ok")
            return answer.json().get("notes", [])

        await server.call("a", "list_tasks")
        assert await notes() == []
        (studio,) = server.studios
        await studio.journal.save_fact(MISSED_FACT, "3")  # another server missed them
        await server.call("a", "generate_image", **SLOW)
        while not await notes():
            await anyio.sleep(0.01)
        assert await notes() == [MISSING]
        assert "notes" not in (await http.get("/healthz")).json()


async def test_a_callback_address_belongs_to_one_team_and_one_purchase() -> None:
    callbacks, other_callbacks = (
        Callbacks("https://x.example.org", ["s" * 32]),
        Callbacks("https://x.example.org", ["t" * 32]),
    )
    address = callbacks.add_address({"prompt": "x"}, "a1", "evomcp-1")["callback_url"]
    path = address.removeprefix("https://x.example.org")
    assert callbacks.read(path) == ("a1", "evomcp-1")
    assert other_callbacks.read(path) is None
    assert callbacks.read(path.replace("evomcp-1", "evomcp-2")) is None
    assert callbacks.read(path.replace("a1.", "b2.")) is None
    assert callbacks.read(path + "0") is None
    assert callbacks.add_address({"callback_url": "https://y.example.org"}, "a1", "k") == {
        "callback_url": "https://y.example.org"
    }
