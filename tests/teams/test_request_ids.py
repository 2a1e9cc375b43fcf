"""Each HTTP request has one ID: in its answer, its log lines, its spans and the audit line of its purchase."""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from child_processes import SERVER_COMMAND, minimal_environment
from conftest import TEST_CLIENT, Open
from faulty_gateway import Gateway, QuickSimulator
from office import ANNA, BERT, HEADERS, INITIALIZE, WISH, Office, office
from test_database import silent_port

from evolink_mcp.tracing import REQUEST_ID, outside_request

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])
META = "evolink-mcp/request_id"


async def ids_of(town: Office, path: str, method: str = "GET", **headers: str) -> str:
    async with town.http(None, **headers) as http:
        (request_id,) = (await http.request(method, path)).headers.get_list("x-request-id")
    return request_id


@pytest.mark.parametrize(
    ("path", "method"),
    [("/healthz", "GET"), ("/readyz", "GET"), ("/mcp", "POST"), ("/mcp", "GET"), ("/nowhere", "GET")],
)
async def test_every_http_answer_has_a_separate_id(tmp_path: Path, path: str, method: str) -> None:
    async with office(tmp_path, ANNA) as town:
        ids = {await ids_of(town, path, method) for _ in range(3)}
        ids.add(await ids_of(town, path, method, host="evil.example.org"))
    assert len(ids) == 4
    assert all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in ids)


async def test_the_id_of_a_proxy_is_kept_only_if_it_is_well_formed(tmp_path: Path) -> None:
    async with office(tmp_path, ANNA) as town:
        for proposal in ("8f14e45f-ceea", "A", "a" * 64):
            assert await ids_of(town, "/healthz", x_request_id=proposal) == proposal
        for proposal in ("", "a" * 65, "a b", "a_b", "{}", 'x","y":"', "a\tb"):
            assert re.fullmatch("[0-9a-f]{32}", await ids_of(town, "/healthz", x_request_id=proposal))
        async with town.http() as http:
            twice = [("x-request-id", "a"), ("x-request-id", "b")]
            assert (await http.get("/healthz", headers=twice)).headers["x-request-id"] not in ("a", "b")


@ERAS
async def test_a_tool_answer_and_its_audit_line_have_the_id_and_the_client(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    """A client of an older protocol names itself only in its first request, so the User-Agent replaces its name."""
    with caplog.at_level(logging.INFO, logger="evolink_mcp.audit"):
        async with office(tmp_path, ANNA, EVOLINK_MCP_AUDIT="1") as town:
            async with town.client("a", mode, user_agent="drawing-bot/2.0", x_request_id="order-1") as client:
                bought = await client.call_tool("generate_image", WISH)
            async with town.client("a", mode, user_agent="other/1.0", x_request_id="order-2") as client:
                second = await client.call_tool("generate_image", {**WISH, "prompt": "sim:fast a hen"})
                refused = await client.call_tool("generate_image", {**WISH, "quality": "best"})
    lines = [json.loads(record.message) for record in caplog.records if record.name == "evolink_mcp.audit"]
    assert [(answer.meta or {})[META] for answer in (bought, second, refused)] == ["order-1", "order-2", "order-2"]
    assert [line["request"] for line in lines] == ["order-1", "order-2"]
    assert lines[0]["client"] == ("drawing-bot/2.0" if mode == "legacy" else TEST_CLIENT.name)


async def test_the_client_in_the_audit_is_short_and_on_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="evolink_mcp.audit"):
        async with (
            office(tmp_path, ANNA, EVOLINK_MCP_AUDIT="1") as town,
            town.client("a", "legacy", user_agent="x\t" * 4000) as client,
        ):
            await client.call_tool("generate_image", WISH)
    (line,) = (json.loads(record.message) for record in caplog.records if record.name == "evolink_mcp.audit")
    assert 0 < len(line["client"]) <= 120
    assert line["client"].isprintable()


async def test_spans_of_a_purchase_have_its_id_until_the_image_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans: list[tuple[str, Any]] = []

    class Span:
        def set_attribute(self, name: str, value: Any) -> None: ...

        def set_status(self, status: Any) -> None: ...

        def end(self) -> None: ...

    class Tracer:
        def start_span(self, name: str, *, kind: Any, attributes: dict[str, Any]) -> Span:
            spans.append((name, attributes.get("evolink_mcp.request_id")))
            return Span()

    monkeypatch.setattr("opentelemetry.trace.get_tracer", lambda *_: Tracer())
    async with office(tmp_path, ANNA, BERT) as town:
        for token in ("a", "b"):
            async with town.client(token, x_request_id=f"order-{token}") as client:
                await client.call_tool("generate_image", {**WISH, "prompt": f"sim:fast {token}"})
    posts = [request_id for name, request_id in spans if name == "POST /v1/images/generations"]
    downloads = [request_id for name, request_id in spans if name == "GET /picture"]
    assert (posts, downloads) == (["order-a", "order-b"], ["order-a", "order-b"])


async def test_stdio_answers_have_no_request_id(open_world: Open) -> None:
    async with open_world() as world, world.client() as client:
        answer = await client.call_tool("compute_size", {"size": "16:9"})
    assert META not in (answer.meta or {})


async def test_work_of_another_request_has_no_id_of_this_one() -> None:
    seen: list[str | None] = []

    async def work() -> None:
        seen.append(REQUEST_ID.get())

    token = REQUEST_ID.set("order-1")
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(work)
            with outside_request():
                group.start_soon(work)
            group.start_soon(work)
    finally:
        REQUEST_ID.reset(token)
    assert seen == ["order-1", None, "order-1"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
async def test_log_lines_of_a_request_begin_with_its_id(tmp_path: Path) -> None:
    async with Gateway(QuickSimulator(keys={"sk-other-key": 1.0})).open() as gateway:
        port, file = silent_port(), tmp_path / "tokens.toml"
        file.write_text(ANNA)
        env = minimal_environment(
            tmp_path, EVOLINK_API_KEY="sk-canary-0123456789", EVOLINK_BASE_URL=gateway.url,
            EVOLINK_MCP_TOKENS_FILE=str(file), EVOLINK_MCP_DATA_DIR=str(tmp_path / "data"),
            EVOLINK_MCP_OUTPUT_DIR=str(tmp_path / "pictures"),
        )  # fmt: skip
        async with await anyio.open_process(
            [*SERVER_COMMAND, "http", "--port", str(port)], env=env, stdin=-3
        ) as server:
            assert server.stderr is not None
            output = b""
            while b"serves" not in output:
                output += await server.stderr.receive()
            headers = {**HEADERS, "authorization": "Bearer a", "x-request-id": "order-7"}
            async with httpx.AsyncClient(headers=headers, timeout=60) as http:
                call = {"name": "get_balance", "arguments": {}}
                message = {**INITIALIZE, "method": "tools/call", "params": call}
                answer = await http.post(f"http://127.0.0.1:{port}/mcp", json=message)
            server.send_signal(signal.SIGTERM)
            output += b"".join([part async for part in server.stderr])
    assert answer.headers["x-request-id"] == "order-7"
    assert re.search(r"^evolink-mcp: WARNING: \[order-7\] .*key", output.decode(), re.MULTILINE), output
