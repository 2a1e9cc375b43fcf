"""Metrics of HTTP answers, EvoLink's answers, callbacks, take-overs, the database, the object store and refused callers."""

from __future__ import annotations

import json
import logging
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from anyio.lowlevel import checkpoint
from child_processes import patient_times
from conftest import KEY, Open, PlainSimulator
from pydantic import SecretStr
from shared import shared_decoder
from team_server import ANNA, REQUEST, open_team_server

pytest.importorskip("prometheus_client")
pytest.importorskip("psycopg")
pytest.importorskip("obstore")

from test_called_back import PUBLIC, SLOW, addresses, body_of, call_back
from test_replicas import Team, open_team
from test_running_it import TOKEN, values

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.errors import JournalUnwritable, Unreachable
from evolink_mcp.studio.jobs import ImageRequest
from evolink_mcp.teams.callbacks import Callbacks
from evolink_mcp.teams.database import open_database
from evolink_mcp.teams.metrics import Metrics
from evolink_mcp.teams.object_store import MARKER
from evolink_mcp.teams.studios import Studios, open_team_database
from evolink_mcp.teams.tokens import Tenant

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]


@pytest.fixture
def url(cluster: Any) -> str:
    return cluster.database()


async def metrics_of(team: Team, replica: int = 0) -> dict[str, float]:
    transport = httpx.ASGITransport(team.proxy.apps[replica])
    headers = {"authorization": "Bearer a"}
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as http:
        return values((await http.get("/metrics")).text)


async def test_http_answers_are_counted_by_route_and_status_and_no_path_of_a_caller_becomes_a_route(
    tmp_path: Path,
) -> None:
    async with open_team_server(
        tmp_path, ANNA, EVOLINK_MCP_METRICS_TOKEN=TOKEN, **PUBLIC, EVOLINK_MCP_SECRET="s" * 32
    ) as server:
        await server.call("a", "compute_size", size="16:9")
        async with server.http("a") as http:
            for path in ("/healthz", "/nowhere/1", "/nowhere/2", "/callbacks/forged", "/uploads", "/metrics"):
                await http.get(path)
            await http.post("/callbacks/forged", json={"id": "x"})
            await http.put("/uploads", content=b"no image")
        async with server.http(TOKEN) as http:
            text = (await http.get("/metrics")).text
    samples = values(text)
    answers = {name.removeprefix("evolink_http_requests_total ") for name in samples if "http_requests_total" in name}
    assert {"/mcp 200", "/healthz 200", "other 404", "/callbacks/ 404", "/metrics 401", "/uploads 400"} <= answers
    assert samples["evolink_http_requests_total other 404"] == 2
    assert "nowhere" not in text
    assert "forged" not in text


async def test_refused_callers_are_counted_by_reason(tmp_path: Path) -> None:
    limited = ANNA.replace("name", "requests_per_minute = 1\nname", 1)
    async with open_team_server(tmp_path, limited, EVOLINK_MCP_METRICS_TOKEN=TOKEN) as server:
        for token, headers in [(None, {}), ("wrong", {}), ("wrong", {}), ("a", {"x_evolink_key": KEY}), ("a", {})]:
            async with server.http(token, **headers) as http:
                await http.get("/mcp")
        async with server.http(TOKEN) as http:
            samples = values((await http.get("/metrics")).text)
    reasons = {name.split()[1]: count for name, count in samples.items() if name.startswith("evolink_refused_tokens")}
    assert reasons == {"missing": 1, "invalid": 2, "forbidden": 1, "rate_limit": 1, "bad_key": 0, "unavailable": 0}


async def test_answers_of_evolink_are_counted_by_request_and_outcome(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, ANNA, EVOLINK_MCP_METRICS_TOKEN=TOKEN) as server:
        await server.call("a", "generate_image", **REQUEST)
        await server.call("a", "generate_image", prompt="sim:402 a fox")
        await server.call("a", "generate_image", prompt="sim:429 a fox")
        async with server.http(TOKEN) as http:
            samples = values((await http.get("/metrics")).text)
    posts = [samples[f"evolink_upstream_requests_total {status} POST /v1/images/generations"] for status in (200, 402)]
    assert posts == [2, 1]  # after the 429 the POST is repeated
    assert samples["evolink_upstream_requests_total 429 POST /v1/images/generations"] >= 1
    assert samples["evolink_upstream_requests_total 200 GET /picture"] == 2
    assert not any("task-unified" in name for name in samples)


async def test_an_unreachable_evolink_is_counted_as_no_answer() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused")

    metrics = Metrics()
    client = EvolinkClient(SecretStr(KEY), transport=httpx.MockTransport(refuse), observe=metrics.count_upstream)
    with pytest.raises(Unreachable):
        await client.submit({}, idempotency_key="k" * 20, on_sending=checkpoint)
    assert metrics.upstream == {("POST /v1/images/generations", "no answer"): 1}


async def test_callbacks_are_counted_by_outcome(url: str, tmp_path: Path) -> None:
    async with open_team(url, tmp_path, ANNA, **PUBLIC) as team, team.client("a") as client:
        team.simulator.duration_s = 3600
        purchase = (await client.call_tool("generate_image", SLOW)).structured_content
        (address,) = addresses(team)
        for to, body in ((address, body_of(purchase["task_id"])), (address + "0", body_of("x")), (address, "{}")):
            for _ in team.proxy.apps:
                await call_back(team, to, body)
        samples = await metrics_of(team)
    outcomes = {name.split()[1]: count for name, count in samples.items() if name.startswith("evolink_callbacks_total")}
    assert outcomes == {"received": 1, "refused": 2, "missed": 0, "postponed": 0}


async def test_a_task_that_a_poll_settles_before_its_callback_counts_as_missed(open_world: Open) -> None:
    metrics = Metrics()
    callbacks = Callbacks("https://nowhere.example.org", ["s" * 32])
    async with open_world(callbacks=callbacks, subscribers=(metrics.receive,)) as world, world.client() as client:
        await client.call_tool("generate_image", {**REQUEST, "wait_seconds": 900})
    assert metrics.callbacks["missed"] == 1


async def test_a_take_over_is_counted_and_its_audit_line_has_no_request(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A call of another request causes the adoption. Its ID does not belong to the adopted purchase."""
    async with (
        open_team(url, tmp_path, ANNA, grace_s=0.0, EVOLINK_MCP_AUDIT="1") as team,
        AsyncExitStack() as stack,
    ):
        group = await stack.enter_async_context(anyio.create_task_group())
        stack.callback(group.cancel_scope.cancel)
        transport = httpx.ASGITransport(team.simulator.app)
        async with open_team_database(team.settings.database_url, patient_times()) as victim:
            team.simulator.duration_s = 3600
            studios = Studios(team.settings, victim, shared_decoder(), group, transport=transport)
            studio, _ = await stack.enter_async_context(studios.open(Tenant("anna")))
            await studio.order(ImageRequest(GenerationRequest(prompt="a fox", size="1024x640"), 9.0))
            while (await studio.journal.recent(1))[0].task is None:
                await anyio.sleep(0.01)
        (task,) = team.simulator.tasks.values()
        task.duration = 0
        with caplog.at_level(logging.INFO, logger="evolink_mcp.audit"):
            async with team.client("a") as client:
                while not (
                    lines := [r for r in caplog.records if r.name == "evolink_mcp.audit" and task.id in r.message]
                ):
                    await client.call_tool("get_task", {"task_id": task.id, "wait_seconds": 0})
        counts = [(await metrics_of(team, replica))["evolink_takeovers_total"] for replica in range(2)]
    assert sorted(counts) == [0, 1]
    assert [json.loads(line.message)["request"] for line in lines] == [None]


async def test_errors_and_waits_of_the_database_are_counted(url: str, cluster: Any) -> None:
    async with open_database(url, patient_times()) as database:

        async def fail(db: Any) -> None:
            await db.execute("SELECT 1/0")

        async def sleep(db: Any) -> None:
            await db.execute("SELECT pg_sleep(0.05)")

        with pytest.raises(JournalUnwritable):
            await database.run(fail)
        async with anyio.create_task_group() as group:
            for _ in range(40):
                group.start_soon(database.run, sleep)
        stats = database.pool_stats()
        assert database.failures["action"] == 1
        assert stats["requests_num"] == 41
        assert 0 < stats["requests_queued"] <= 41
        assert stats["requests_wait_ms"] > 0
        with cluster.admin() as db:
            db.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        while not database.failures["session"]:
            await anyio.sleep(0.01)


async def test_the_metrics_of_a_team_have_the_counts_of_its_database(url: str, tmp_path: Path) -> None:
    async with open_team(url, tmp_path, ANNA) as team, team.client("a") as client:
        await client.call_tool("list_tasks", {})
        samples, *_ = sorted(
            [await metrics_of(team, replica) for replica in range(2)],
            key=lambda samples: -samples["evolink_database_actions_total"],
        )
    assert samples["evolink_database_actions_total"] > 0
    assert (samples["evolink_database_errors_total action"], samples["evolink_database_errors_total session"]) == (0, 0)
    assert {"evolink_database_waits_total", "evolink_database_wait_seconds_total"} <= samples.keys()


async def test_a_store_that_is_not_mounted_is_counted(tmp_path: Path) -> None:
    await store_failures(tmp_path, lambda folder: (folder / MARKER).unlink(), "mount")


async def test_a_store_with_a_file_instead_of_its_folder_is_counted(tmp_path: Path) -> None:
    def block(folder: Path) -> None:
        for child in folder.iterdir():
            if child.is_dir():
                child.rename(child.with_suffix(".old"))
                child.write_text("no folder")

    await store_failures(tmp_path, block, "put")


async def store_failures(tmp_path: Path, damage: Any, operation: str) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    environ = {**PUBLIC, "EVOLINK_MCP_SECRET": "s" * 32, "EVOLINK_MCP_STORE": str(folder)}
    arguments = {**REQUEST, "callback_url": "https://hooks.evolink-team.dev/x"}
    async with open_team_server(tmp_path, ANNA, simulator=PlainSimulator(), **environ) as server:
        await server.call("a", "generate_image", **arguments)
        assert sum(server.studios.metrics.store_failures.values()) == 0
        damage(folder)
        await server.call("a", "generate_image", **{**arguments, "prompt": "sim:fast a hen"})
        assert {name for name, count in server.studios.metrics.store_failures.items() if count} == {operation}
