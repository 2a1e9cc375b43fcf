"""Each HTTP request has one ID: in its answer, its log lines, its spans and the audit line of its purchase."""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from child_processes import minimal_environment, open_http_server
from conftest import TEST_CLIENT, Clock, Open, PlainSimulator
from faulty_gateway import Gateway, QuickSimulator
from mcp.client import Client
from team_server import ANNA, BERT, HEADERS, INITIALIZE, REQUEST, TeamServer, open_team_server

from evolink_mcp.call_context import REQUEST_ID, outside_request
from evolink_mcp.studio.events import Event, Finished
from evolink_mcp.teams.tenants import Tenants
from evolink_mcp.teams.tokens import Tenant

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])
META = "evolink-mcp/request_id"


async def ids_of(server: TeamServer, path: str, method: str = "GET", **headers: str) -> str:
    async with server.http(None, **headers) as http:
        (request_id,) = (await http.request(method, path)).headers.get_list("x-request-id")
    return request_id


@pytest.mark.parametrize(
    ("path", "method"),
    [("/healthz", "GET"), ("/readyz", "GET"), ("/mcp", "POST"), ("/mcp", "GET"), ("/nowhere", "GET")],
)
async def test_every_http_answer_has_a_separate_id(tmp_path: Path, path: str, method: str) -> None:
    async with open_team_server(tmp_path, ANNA) as server:
        ids = {await ids_of(server, path, method) for _ in range(3)}
        ids.add(await ids_of(server, path, method, host="evil.example.org"))
    assert len(ids) == 4
    assert all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in ids)


async def test_the_id_of_a_proxy_is_kept_only_if_it_is_well_formed(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, ANNA) as server:
        for proposal in ("8f14e45f-ceea", "A", "a" * 64):
            assert await ids_of(server, "/healthz", x_request_id=proposal) == proposal
        for proposal in ("", "a" * 65, "a b", "a_b", "{}", 'x","y":"', "a\tb"):
            assert re.fullmatch("[0-9a-f]{32}", await ids_of(server, "/healthz", x_request_id=proposal))
        async with server.http() as http:
            twice = [("x-request-id", "a"), ("x-request-id", "b")]
            assert (await http.get("/healthz", headers=twice)).headers["x-request-id"] not in ("a", "b")


@ERAS
async def test_a_tool_answer_and_its_audit_line_have_the_id_and_the_client(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    """The User-Agent replaces the name of an older client in the audit. The session ID has the name for the answer."""
    with caplog.at_level(logging.INFO, logger="evolink_mcp.audit"):
        async with open_team_server(tmp_path, ANNA, EVOLINK_MCP_AUDIT="1") as server:
            async with server.client("a", mode, user_agent="drawing-bot/2.0", x_request_id="order-1") as client:
                purchase = await client.call_tool("generate_image", REQUEST)
            async with server.client("a", mode, user_agent="other/1.0", x_request_id="order-2") as client:
                second = await client.call_tool("generate_image", {**REQUEST, "prompt": "sim:fast a hen"})
                refusal = await client.call_tool("generate_image", {**REQUEST, "quality": "best"})
    lines = [json.loads(record.message) for record in caplog.records if record.name == "evolink_mcp.audit"]
    assert [block.type for block in purchase.content] == ["text", "image"]  # clients without a name get no preview
    assert [(answer.meta or {})[META] for answer in (purchase, second, refusal)] == ["order-1", "order-2", "order-2"]
    assert [line["request"] for line in lines] == ["order-1", "order-2"]
    assert lines[0]["client"] == ("drawing-bot/2.0" if mode == "legacy" else TEST_CLIENT.name)


async def test_the_client_in_the_audit_is_short_and_on_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="evolink_mcp.audit"):
        async with (
            open_team_server(tmp_path, ANNA, EVOLINK_MCP_AUDIT="1") as server,
            server.client("a", "legacy", user_agent="x\t" * 4000) as client,
        ):
            await client.call_tool("generate_image", REQUEST)
    (line,) = (json.loads(record.message) for record in caplog.records if record.name == "evolink_mcp.audit")
    assert 0 < len(line["client"]) <= 120
    assert line["client"].isprintable()


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Return the list of all spans from now on, each with its name and its request ID."""
    span_list: list[tuple[str, Any]] = []

    class Span:
        def set_attribute(self, name: str, value: Any) -> None: ...

        def set_status(self, status: Any) -> None: ...

        def end(self) -> None: ...

    class Tracer:
        def start_span(self, name: str, *, kind: Any, attributes: dict[str, Any]) -> Span:
            span_list.append((name, attributes.get("evolink_mcp.request_id")))
            return Span()

    monkeypatch.setattr("opentelemetry.trace.get_tracer", lambda *_: Tracer())
    return span_list


async def test_spans_of_a_purchase_have_its_id_until_the_image_is_saved(
    tmp_path: Path, spans: list[tuple[str, Any]]
) -> None:
    async with open_team_server(tmp_path, ANNA, BERT) as server:
        for token in ("a", "b"):
            async with server.client(token, x_request_id=f"order-{token}") as client:
                await client.call_tool("generate_image", {**REQUEST, "prompt": f"sim:fast {token}"})
    for name in ("POST /v1/images/generations", "GET /picture"):
        assert [request_id for span, request_id in spans if span == name] == ["order-a", "order-b"]


async def test_the_span_of_a_batch_has_no_id_because_it_polls_the_tasks_of_several_requests(
    tmp_path: Path, spans: list[tuple[str, Any]]
) -> None:
    async def order(client: Client, number: int) -> None:
        await client.call_tool("generate_image", {**REQUEST, "prompt": f"sim:slow=5 fox {number}"})

    async with (
        open_team_server(tmp_path, ANNA) as server,
        server.client("a", x_request_id="order-a") as client,
        anyio.create_task_group() as group,
    ):
        for number in range(12):
            group.start_soon(order, client, number)
    ids = {request_id for span, request_id in spans if span == "POST /v1/tasks/batch"}
    assert ids == {None}


async def test_stdio_answers_have_no_request_id(open_world: Open) -> None:
    async with open_world() as world, world.client() as client:
        answer = await client.call_tool("compute_size", {"size": "16:9"})
    assert META not in (answer.meta or {})


async def test_an_adopted_purchase_has_no_id_of_the_call_that_adopted_it(open_world: Open) -> None:
    """The audit would name a request that did not buy."""
    ids: list[str | None] = []
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=500)

    def receive(event: Event) -> None:
        if isinstance(event, Finished):
            ids.append(REQUEST_ID.get())

    async with open_world(simulator=simulator, clock=clock) as world, world.client() as client:
        purchase = await client.call_tool("generate_image", {**REQUEST, "prompt": "a fox", "wait_seconds": 0})
    clock.now += 1000
    async with open_world(simulator=simulator, clock=clock, subscribers=(receive,)) as world:
        token = REQUEST_ID.set("order-2")
        await world.studio.wake()
        REQUEST_ID.reset(token)
        while not ids:
            await anyio.sleep(0.01)
    assert purchase.structured_content["status"] in ("pending", "processing")  # the polls move the clock
    assert ids == [None]


async def test_the_app_of_a_tenant_does_not_keep_the_id_of_the_request_that_opened_it() -> None:
    ids: list[str | None] = []

    @asynccontextmanager
    async def open_app(tenant: Tenant) -> AsyncIterator[Any]:
        ids.append(REQUEST_ID.get())
        yield SimpleNamespace(is_idle=True)

    async with anyio.create_task_group() as group:
        tenants = Tenants(group, open_app)
        token = REQUEST_ID.set("order-1")
        async with tenants.use(Tenant("anna")):
            REQUEST_ID.reset(token)
        group.cancel_scope.cancel()
    assert ids == [None]


async def test_work_of_another_request_has_no_id_of_this_one() -> None:
    ids: list[str | None] = []

    async def work() -> None:
        ids.append(REQUEST_ID.get())

    token = REQUEST_ID.set("order-1")
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(work)
            with outside_request():
                group.start_soon(work)
            group.start_soon(work)
    finally:
        REQUEST_ID.reset(token)
    assert ids == ["order-1", None, "order-1"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
async def test_log_lines_of_a_request_begin_with_its_id(tmp_path: Path) -> None:
    async with Gateway(QuickSimulator(keys={"sk-other-key": 1.0})).open() as gateway:
        file = tmp_path / "tokens.toml"
        file.write_text(ANNA)
        env = minimal_environment(
            tmp_path, EVOLINK_API_KEY="sk-canary-0123456789", EVOLINK_BASE_URL=gateway.url,
            EVOLINK_MCP_TOKENS_FILE=str(file), EVOLINK_MCP_DATA_DIR=str(tmp_path / "data"),
            EVOLINK_MCP_OUTPUT_DIR=str(tmp_path / "pictures"),
        )  # fmt: skip
        async with open_http_server(env=env) as server:
            headers = {**HEADERS, "authorization": "Bearer a", "x-request-id": "order-7"}
            async with httpx.AsyncClient(headers=headers, timeout=60) as http:
                call = {"name": "get_balance", "arguments": {}}
                message = {**INITIALIZE, "method": "tools/call", "params": call}
                answer = await http.post(f"{server.url}/mcp", json=message)
            server.process.send_signal(signal.SIGTERM)
            log = await server.read_log()
    assert answer.headers["x-request-id"] == "order-7"
    assert re.search(r"^evolink-mcp: WARNING: \[order-7\] .*key", log, re.MULTILINE), log
