"""Operation of a server: metrics, spans, audit and draining."""

from __future__ import annotations

import json
import logging
import signal
import sys
import urllib.request
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from child_processes import minimal_environment, open_http_server
from conftest import Open, PlainSimulator
from faulty_gateway import Gateway, QuickSimulator
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client
from team_server import ANNA, BERT, INITIALIZE, REQUEST, open_team_server
from test_database import silent_port

pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families

from evolink_mcp import tracing
from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.errors import Refused
from evolink_mcp.studio.jobs import ImageRequest
from evolink_mcp.teams.app import Readiness
from evolink_mcp.teams.metrics import Metrics
from evolink_mcp.teams.metrics_endpoint import MetricsCollector
from evolink_mcp.teams.settings import TeamSettings

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
TOKEN = "m" * 32
LATE = {"prompt": "sim:slow=3600 a fox", "wait_seconds": 50}


def values(text: str) -> dict[str, float]:
    """Return each sample by its name and labels."""
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# --- metrics ---


async def test_metrics_count_purchases_polls_and_downloads(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, ANNA, BERT, EVOLINK_MCP_METRICS_TOKEN=TOKEN) as server:
        purchase = (await server.call("a", "generate_image", **REQUEST)).structured_content
        refusal = await server.call("b", "generate_image", prompt="sim:402 a fox")
        await server.call("b", "generate_image", **{**LATE, "wait_seconds": 0})
        async with server.http(TOKEN) as http:
            answer = await http.get("/metrics")
        samples = values(answer.text)
    assert answer.headers["content-type"].startswith("text/plain")
    assert refusal.is_error
    assert samples["evolink_purchases_total submitted"] == 2
    assert samples["evolink_purchases_total refused"] == 1
    assert samples["evolink_credits_total"] == purchase["credits"]
    assert samples["evolink_looks_total single"] >= 1
    assert samples["evolink_downloads_total saved"] == 1
    assert samples["evolink_lag_seconds_count"] == 1
    assert samples["evolink_tasks pending"] + samples.get("evolink_tasks processing", 0) == 1
    assert (samples["evolink_ready"], samples["evolink_open_streams"]) == (1, 1)
    assert not any(word in answer.text for word in ("anna", "bert", "sk-", "fox"))


@pytest.mark.parametrize("token", [None, "a", TOKEN + "x", ""])
async def test_metrics_with_a_token_refuse_every_other_token(tmp_path: Path, token: str | None) -> None:
    async with open_team_server(tmp_path, ANNA, EVOLINK_MCP_METRICS_TOKEN=TOKEN) as server, server.http(token) as http:
        assert (await http.get("/metrics")).status_code == 401
        assert (await http.get("/metrics/x")).status_code in (401, 404)
    async with open_team_server(tmp_path, ANNA) as server, server.http(token) as http:
        assert (await http.get("/metrics")).status_code == (200 if token == "a" else 401)


async def test_metrics_are_served_on_a_separate_port() -> None:
    metrics = Metrics()
    metrics.count_settled(2.5, 0.4)
    metrics.count_settled(None, 90.0)
    collector = MetricsCollector(metrics, lambda: ["processing"], lambda: 0, lambda: False)
    port = silent_port()
    close = collector.serve("127.0.0.1", port)
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def read() -> str:
            with opener.open(f"http://127.0.0.1:{port}/metrics") as answer:
                return answer.read().decode()

        samples = values(await anyio.to_thread.run_sync(read))
    finally:
        await anyio.to_thread.run_sync(close)
    assert (samples["evolink_ready"], samples["evolink_credits_total"]) == (0, 2.5)
    assert (samples["evolink_lag_seconds_bucket 0.5"], samples["evolink_lag_seconds_bucket +Inf"]) == (1, 2)


@pytest.mark.parametrize(("key", "why"), [("sk-good-key", None), ("sk-bad-key", "EvoLink does not accept the key")])
async def test_a_server_is_ready_only_with_a_key_that_evolink_accepts(
    tmp_path: Path, key: str, why: str | None
) -> None:
    simulator = PlainSimulator(keys={"sk-good-key": 1000.0})
    settings = TeamSettings.from_environment({"EVOLINK_API_KEY": key, "EVOLINK_BASE_URL": "http://127.0.0.1:9"})
    readiness = Readiness(settings, transport=httpx.ASGITransport(simulator.app))
    for _ in range(3):
        assert await readiness.check() == why
    assert [request.path for request in simulator.requests] == ["/v1/credits"]


# --- spans ---


async def test_spans_show_the_requests_to_evolink_and_no_secret(
    open_world: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans: list[tuple[str, dict[str, Any]]] = []

    class Span:
        def __init__(self, name: str, attributes: dict[str, Any]) -> None:
            self.attributes = attributes
            spans.append((name, attributes))

        def set_attribute(self, name: str, value: Any) -> None:
            self.attributes[name] = value

        def set_status(self, status: Any) -> None:
            self.attributes["failed"] = True

        def end(self) -> None:
            self.attributes["ended"] = True

    class Tracer:
        def start_span(self, name: str, *, kind: Any, attributes: dict[str, Any]) -> Span:
            return Span(name, attributes)

    monkeypatch.setattr("opentelemetry.trace.get_tracer", lambda *_: Tracer())
    async with open_world() as world, world.client() as client:
        await client.call_tool("generate_image", REQUEST)
    names = [name for name, _ in spans]
    assert names[0] == "POST /v1/images/generations"
    assert {"GET /v1/tasks/{id}", "GET /picture"} <= set(names)
    assert all(attributes["ended"] and "failed" not in attributes for _, attributes in spans)
    assert {attributes["http.response.status_code"] for _, attributes in spans} == {200}
    assert not any(word in json.dumps(spans) for word in ("sk-", "fox", "task-unified"))


async def test_the_span_of_a_failed_call_records_the_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Span:
        def set_status(self, status: Any) -> None:
            calls.append("failed")

        def end(self) -> None:
            calls.append("ended")

    class Tracer:
        def start_span(self, name: str, **_: Any) -> Span:
            return Span()

    monkeypatch.setattr("opentelemetry.trace.get_tracer", lambda *_: Tracer())

    def fail() -> None:
        with tracing.span("x"):
            raise ConnectionError

    with pytest.raises(ConnectionError):
        fail()
    assert calls == ["failed", "ended"]


# --- the audit ---


async def test_the_audit_has_one_line_per_purchase_without_prompt_or_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="evolink_mcp.audit"):
        async with open_team_server(tmp_path, ANNA, EVOLINK_MCP_AUDIT="1") as server:
            purchase = (await server.call("a", "generate_image", **REQUEST)).structured_content
            await server.call("a", "generate_image", prompt="sim:402 a fox")
            await server.call("a", "get_task", task_id=purchase["task_id"])
            await server.call("a", "generate_image", **{**LATE, "wait_seconds": 0})
    lines = [json.loads(record.message) for record in caplog.records if record.name == "evolink_mcp.audit"]
    assert [(line["tenant"], line["outcome"], line["charged"]) for line in lines] == [
        ("anna", "completed", "yes"), ("anna", "refused", "no"), ("anna", "pending", "unknown"),
    ]  # fmt: skip
    assert (lines[0]["task"], lines[0]["credits"], lines[1]["credits"]) == (purchase["task_id"], purchase["credits"], 0)
    assert all(line["client"] for line in lines)
    assert not any(word in json.dumps(lines) for word in ("fox", "sk-test"))


async def test_without_the_setting_there_is_no_audit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="evolink_mcp.audit"):
        async with open_team_server(tmp_path, ANNA) as server:
            await server.call("a", "generate_image", **REQUEST)
    assert [record for record in caplog.records if record.name == "evolink_mcp.audit"] == []


# --- draining ---


async def test_a_draining_server_answers_waiting_calls_with_task_ids_and_refuses_new_requests(tmp_path: Path) -> None:
    answers: list[Any] = []
    async with open_team_server(tmp_path, ANNA) as server:

        async def order() -> None:
            answers.append(await server.call("a", "generate_image", **LATE))

        async with anyio.create_task_group() as calls:
            calls.start_soon(order)
            while not any(job.is_acknowledged for studio in server.studios for job in studio.jobs):
                await anyio.sleep(0.01)
            assert not server.studios.drain()
            while not server.studios.drain():
                await anyio.sleep(0.01)
        new_task = (await server.call("a", "generate_image", prompt="another")).structured_content
        server.guard.close(has_other_servers=False)
        async with server.http("a") as http:
            assert (await http.post("/mcp", json=INITIALIZE)).status_code == 200
            server.guard.close(has_other_servers=True)
            refusal = await http.post("/mcp", json=INITIALIZE)
            assert (refusal.status_code, refusal.headers["retry-after"]) == (503, "1")
            assert "Nothing was bought" in refusal.text
            assert (await http.get("/readyz")).json()["why"] == "the server is about to end"
            assert (await http.get("/healthz")).status_code == 200
        assert server.posts == 1
    (facts,) = (answer.structured_content for answer in answers)
    assert facts["next_action"] == {"tool": "get_task", "arguments": {"task_id": facts["task_id"]}}
    assert (new_task["error"]["code"], new_task["charged"]) == ("draining", "no")


async def test_a_call_that_has_begun_still_buys_if_other_servers_take_the_new_ones(tmp_path: Path) -> None:
    """A refusal would reach its client as an error: a proxy cannot repeat a call after the first byte of the answer."""
    async with open_team_server(tmp_path, ANNA) as server:
        await server.call("a", "generate_image", **REQUEST)
        (studio,) = server.studios
        request = ImageRequest(GenerationRequest(prompt="another", size="1024x640"), 9.0)
        server.studios.drain(has_other_servers=True)
        async with studio.ordered(request) as job:
            assert not server.studios.drain(has_other_servers=True)
            assert job.is_draining
        server.studios.drain()
        with pytest.raises(Refused, match="about to end"):
            await studio.order(request)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
async def test_a_team_server_answers_waiting_calls_after_sigterm_and_then_ends(tmp_path: Path) -> None:
    async with Gateway(QuickSimulator(duration_s=3600)).open() as gateway:
        file = tmp_path / "tokens.toml"
        file.write_text(ANNA)
        env = minimal_environment(
            tmp_path, EVOLINK_API_KEY="sk-canary-0123456789", EVOLINK_BASE_URL=gateway.url, EVOLINK_MCP_AUDIT="1",
            EVOLINK_MCP_TOKENS_FILE=str(file), EVOLINK_MCP_DATA_DIR=str(tmp_path / "data"),
            EVOLINK_MCP_OUTPUT_DIR=str(tmp_path / "pictures"),
        )  # fmt: skip
        async with open_http_server(env=env) as server:
            answers: list[Any] = []
            async with (
                httpx.AsyncClient(headers={"authorization": "Bearer a"}) as http,
                Client(streamable_http_client(f"{server.url}/mcp", http_client=http), mode="auto") as client,
            ):

                async def order() -> None:
                    answers.append(await client.call_tool("generate_image", {**LATE, "prompt": "a fox"}))

                async with anyio.create_task_group() as calls:
                    calls.start_soon(order)
                    while not gateway.simulator.tasks:
                        await anyio.sleep(0.01)
                    server.process.send_signal(signal.SIGTERM)
            assert await server.process.wait() == 143
            log = await server.read_log()
    (facts,) = (answer.structured_content for answer in answers)
    assert facts["task_id"] in gateway.simulator.tasks
    assert facts["next_action"]["tool"] == "get_task"
    (line,) = (json.loads(line) for line in log.splitlines() if line.startswith("{"))
    assert (line["task"], line["outcome"]) == (facts["task_id"], facts["status"])
