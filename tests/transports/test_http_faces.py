"""HTTP servers on real ports: progress, disconnects, refused requests, and two servers with one journal."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from child_processes import SERVER_COMMAND
from faulty_gateway import Exchange, Gateway, QuickSimulator, behave
from mcp.client import Client

pytestmark = pytest.mark.anyio
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])
WITHIN_S = 300
BODY_MAX = 512 << 10
KEY = "sk-simulated"


class Harness:
    """Processes: a simulated EvoLink, two streamable HTTP servers with one journal, and an SSE server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes = ExitStack()

    def open(self) -> None:
        evolink = self.start("simulate", "--seconds", "1")
        self.evolink = f"http://127.0.0.1:{evolink}"
        self.http, self.second, self.sse = (self.start(transport) for transport in ("http", "http", "sse"))
        anyio.run(self._wait_until_up)

    def close(self) -> None:
        self._processes.close()

    def url(self, port: int) -> str:
        return f"http://127.0.0.1:{port}/mcp"

    async def tasks_with_prompt(self, prompt: str) -> list[dict[str, Any]]:
        """Return EvoLink's tasks with this prompt."""
        async with Client(self.url(self.second)) as client:
            task_list = await client.call_tool("list_tasks", {"limit": 50, "sync": True, "detail": True})
        tasks = task_list.structured_content["tasks"]
        assert task_list.structured_content["synced"] is True
        return [task for task in tasks if (task["request"] or {}).get("prompt") == prompt or not task["request"]]

    async def start_for_gateway(self, evolink: str) -> str:
        """Start another streamable HTTP server for a separate EvoLink and profile. Return its URL.

        In the same profile it would first test whether its key can read the tasks of the other EvoLink.
        """
        port = self.start("http", EVOLINK_BASE_URL=evolink, EVOLINK_MCP_PROFILE=f"gateway-{evolink.rpartition(':')[2]}")
        with anyio.fail_after(WITHIN_S):
            async with httpx.AsyncClient() as client:
                await wait_until_answered(client, f"http://127.0.0.1:{port}/healthz")
        return self.url(port)

    def start(self, transport: str, *options: str, **settings: str) -> int:
        port = _free_port()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("EVOLINK_")}
        variables = {
            "HOME": str(self.folder),
            "EVOLINK_API_KEY": KEY,
            "EVOLINK_BASE_URL": getattr(self, "evolink", "http://127.0.0.1:9"),
            "EVOLINK_MCP_DATA_DIR": str(self.folder / "data"),
            "EVOLINK_MCP_OUTPUT_DIR": str(self.folder / "pictures"),
            **settings,
        }
        command = [*SERVER_COMMAND, transport, "--port", str(port), *options]
        process = subprocess.Popen(
            command,
            env={**inherited, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._processes.callback(process.wait, 10)
        self._processes.callback(process.terminate)
        return port

    async def _wait_until_up(self) -> None:
        with anyio.fail_after(WITHIN_S):
            async with httpx.AsyncClient() as client:
                for port in (self.http, self.second, self.sse):
                    await wait_until_answered(client, f"http://127.0.0.1:{port}/healthz")
                await wait_until_answered(client, f"{self.evolink}/v1/credits")


async def wait_until_answered(client: httpx.AsyncClient, url: str) -> None:
    while True:
        try:
            await client.get(url)
        except httpx.TransportError:
            await anyio.sleep(0)
        else:
            return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    harness = Harness(tmp_path_factory.mktemp("harness"))
    try:
        harness.open()
        yield harness
    finally:
        harness.close()


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a tools/call of a 2025 client without a session."""
    return {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": name, "arguments": arguments}}


HEADERS = {
    "accept": "application/json, text/event-stream",
    "content-type": "application/json",
    "mcp-protocol-version": "2025-11-25",
}


@ERAS
async def test_progress_rises_until_the_task_is_completed(harness: Harness, mode: Any) -> None:
    """EvoLink finishes the task only after the caller has received progress."""
    progress_values: list[float] = []
    is_reported = anyio.Event()

    async def show(progress: float, total: float | None, message: str | None) -> None:
        progress_values.append(progress)
        is_reported.set()

    async def hold(exchange: Exchange) -> None:
        await is_reported.wait()
        await behave(exchange)

    gateway = Gateway(
        QuickSimulator(duration_s=0), reads=lambda exchange: hold if "/v1/tasks" in exchange.path else None
    )
    with anyio.fail_after(2 * WITHIN_S):
        async with gateway.open(), Client(await harness.start_for_gateway(gateway.url), mode=mode) as client:
            arguments = {"prompt": f"a lighthouse, {mode}"}
            answer = await client.call_tool("generate_image", arguments, progress_callback=show)
    assert answer.is_error is False
    assert progress_values == sorted(set(progress_values))
    assert len(progress_values) > 1
    assert progress_values[-1] == 100


@ERAS
async def test_a_task_continues_after_its_client_disconnects(harness: Harness, mode: Any) -> None:
    """A later client gets the saved image. There is one purchase."""
    prompt = f"sim:slow=1.5 a fox that nobody waited for, {mode}"
    is_started = anyio.Event()

    async def show(progress: float, total: float | None, message: str | None) -> None:
        is_started.set()

    with anyio.fail_after(WITHIN_S):
        async with anyio.create_task_group() as group:

            async def ask() -> None:
                async with Client(harness.url(harness.http), mode=mode) as client:
                    await client.call_tool("generate_image", {"prompt": prompt}, progress_callback=show)

            group.start_soon(ask)
            await is_started.wait()
            group.cancel_scope.cancel()
        async with Client(harness.url(harness.http), mode=mode) as client:
            task_list = await client.call_tool("list_tasks", {"limit": 50, "detail": True})
            tasks = [task for task in task_list.structured_content["tasks"] if task["request"]["prompt"] == prompt]
            answer = await client.call_tool("get_task", {"task_id": tasks[0]["task_id"]})
        assert [task["task_id"] for task in await harness.tasks_with_prompt(prompt)] == [tasks[0]["task_id"]]
    assert answer.structured_content["status"] == "completed"
    assert Path(answer.structured_content["images"][0]["path"]).is_file()


async def test_a_task_continues_after_its_socket_closes_during_the_call(harness: Harness) -> None:
    """The client closes its socket without a cancellation."""
    prompt = "sim:slow=1.5 a fox behind a broken wire"
    with anyio.fail_after(WITHIN_S):
        async with httpx.AsyncClient(headers=HEADERS) as http:
            with pytest.raises(httpx.ReadTimeout):
                await http.post(harness.url(harness.http), json=_call("generate_image", {"prompt": prompt}), timeout=1)
        async with Client(harness.url(harness.http)) as client:
            repeat = await client.call_tool("generate_image", {"prompt": prompt})
        assert len(await harness.tasks_with_prompt(prompt)) == 1
    assert repeat.structured_content["status"] == "completed"
    assert "earlier identical call" in repeat.content[0].text


class OldClient:
    """A client of 2025-11-25. It sends `notifications/cancelled` in another POST and keeps its stream open."""

    def __init__(self, http: httpx.AsyncClient, url: str, *, session: bool = True) -> None:
        self._http, self._url, self._session = http, url, session
        self.headers = dict(HEADERS)

    async def initialize(self) -> None:
        params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "old", "version": "1"}}
        message = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": params}
        reply = await self._http.post(self._url, json=message, headers=self.headers)
        if self._session:
            self.headers["mcp-session-id"] = reply.headers["mcp-session-id"]
        await self._notify("notifications/initialized", {})

    async def ask(self, arguments: dict[str, Any]) -> str:
        """Read the answer's stream to its end."""
        reply = await self._http.post(self._url, json=_call("generate_image", arguments), headers=self.headers)
        return reply.text

    async def cancel(self) -> None:
        await self._notify("notifications/cancelled", {"requestId": 1, "reason": "timed out"})

    async def _notify(self, method: str, params: dict[str, Any]) -> None:
        message = {"jsonrpc": "2.0", "method": method, "params": params}
        assert (await self._http.post(self._url, json=message, headers=self.headers)).status_code == 202


async def wait_until_running(harness: Harness, prompt: str) -> None:
    async with Client(harness.url(harness.http)) as client:
        while True:
            task_list = (await client.call_tool("list_tasks", {"limit": 50, "detail": True})).structured_content[
                "tasks"
            ]
            if any(task["request"]["prompt"] == prompt and task["task_id"] for task in task_list):
                return


@pytest.mark.parametrize("session", [True, False])
async def test_a_cancellation_in_another_post_reaches_its_call(harness: Harness, session: bool) -> None:
    """The same call then gets the purchased task. A client without a session is identified by address and name."""
    prompt = f"sim:slow=2 a fox given up, session {session}"
    with anyio.fail_after(WITHIN_S):
        async with httpx.AsyncClient(timeout=WITHIN_S) as http, anyio.create_task_group() as group:
            old = OldClient(http, harness.url(harness.http), session=session)
            await old.initialize()
            group.start_soon(old.ask, {"prompt": prompt})
            await wait_until_running(harness, prompt)
            await old.cancel()
            repeat = await old.ask({"prompt": prompt})
        assert "earlier identical call" in repeat
        assert len(await harness.tasks_with_prompt(prompt)) == 1


async def test_a_cancellation_never_reaches_the_call_of_another_client_with_the_same_id(harness: Harness) -> None:
    prompt = "sim:slow=2 a fox that is waited for"
    with anyio.fail_after(WITHIN_S):
        async with httpx.AsyncClient(timeout=WITHIN_S) as http, anyio.create_task_group() as group:
            waiting_client, cancelling_client = (OldClient(http, harness.url(harness.http)) for _ in range(2))
            await waiting_client.initialize()
            await cancelling_client.initialize()
            answers: list[str] = []

            async def wait() -> None:
                answers.append(await waiting_client.ask({"prompt": prompt}))

            group.start_soon(wait)
            await wait_until_running(harness, prompt)
            await cancelling_client.cancel()
    assert '"status":"completed"' in answers[0]


async def test_an_answer_to_a_closed_socket_does_not_count_as_delivered(harness: Harness) -> None:
    """The socket closes before the server writes the answer of the completed task."""
    prompt = "sim:slow=1 a fox whose caller died"
    with anyio.fail_after(WITHIN_S):
        async with httpx.AsyncClient(headers=HEADERS) as http:
            message = _call("generate_image", {"prompt": prompt})
            async with http.stream("POST", harness.url(harness.http), json=message) as reply:
                assert reply.status_code == 200
                await wait_until_running(harness, prompt)
        async with Client(harness.url(harness.http)) as client:
            repeat = await client.call_tool("generate_image", {"prompt": prompt})
            new_purchase = await client.call_tool("generate_image", {"prompt": prompt})
        assert len(await harness.tasks_with_prompt(prompt)) == 2
    assert "earlier identical call" in repeat.content[0].text
    assert new_purchase.structured_content["task_id"] != repeat.structured_content["task_id"]


async def test_a_get_request_opens_no_stream(harness: Harness) -> None:
    async with httpx.AsyncClient() as http:
        reply = await http.get(harness.url(harness.http), headers={"accept": "text/event-stream"})
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("transport", ["http", "sse"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param({"host": "evil.example"}, 421, id="a name that was rebound to this machine"),
        pytest.param({"host": "evil.example:80"}, 421, id="the same with a port"),
        pytest.param({"origin": "https://evil.example"}, 403, id="a web page of another site"),
        pytest.param({"origin": "null"}, 403, id="a page without an origin"),
        pytest.param({"host": "localhost:80@evil.example"}, 421, id="this machine as a user name"),
        pytest.param({"host": "localhost:port"}, 421, id="a port that is no number"),
        pytest.param({"origin": "http://127.0.0.1:8000@evil.net"}, 403, id="this machine as the user name of a page"),
        pytest.param({"origin": "http://[::1].evil.example"}, 403, id="an address with a domain behind it"),
    ],
)
async def test_requests_with_a_foreign_host_or_origin_are_refused(
    harness: Harness, transport: str, headers: dict[str, str], status: int
) -> None:
    with anyio.fail_after(WITHIN_S):
        async with httpx.AsyncClient(headers={**HEADERS, **headers}) as http:
            if transport == "http":
                answer = await http.post(harness.url(harness.http), json=_call("compute_size", {"size": "1:1"}))
            else:
                answer = await http.get(f"http://127.0.0.1:{harness.sse}/sse")
    assert answer.status_code == status


@pytest.mark.parametrize("transport", ["http", "sse"])
async def test_the_health_check_also_checks_the_host(harness: Harness, transport: str) -> None:
    async with httpx.AsyncClient(headers={"host": "evil.example"}) as http:
        answer = await http.get(f"http://127.0.0.1:{getattr(harness, transport)}/healthz")
    assert answer.status_code == 421


async def test_an_insecure_server_accepts_only_allowed_hostnames(harness: Harness) -> None:
    """A web page under a rebound hostname must not buy, also with --insecure."""
    port = harness.start("http", "--host", "0.0.0.0", "--insecure", "--allowed-host", "Pictures.Example")
    with anyio.fail_after(WITHIN_S):
        async with httpx.AsyncClient(headers=HEADERS) as http:
            await wait_until_answered(http, f"http://127.0.0.1:{port}/healthz")
            message = _call("compute_size", {"size": "1:1"})
            statuses = {}
            for host, origin in (
                ("pictures.example", None), ("pictures.example:8000", "https://pictures.example"), ("localhost", None),
                ("evil.example", None), ("evil.example", "http://evil.example"), ("pictures.example", "https://evil.example"),
                ("pictures.example.evil.example", None), ("127.0.0.1.evil.example", None), ("", None),
                ("PICTURES.Example:8000", "HTTPS://Pictures.EXAMPLE"), ("LOCALHOST", "http://LocalHost:80"),
                ("[0::1]:8000", None),
            ):  # fmt: skip
                headers = {"host": host} | ({"origin": origin} if origin else {})
                reply = await http.post(f"http://127.0.0.1:{port}/mcp", json=message, headers=headers)
                statuses[host, origin] = reply.status_code
    assert list(statuses.values()) == [200, 200, 200, 421, 421, 403, 421, 421, 421, 200, 200, 200]


@pytest.mark.parametrize("name", [7, "seven", None])
@pytest.mark.parametrize("last", [True, False], ids=["id at the end", "id first"])
async def test_a_body_that_is_too_large_gets_a_json_rpc_error_with_its_id(
    harness: Harness, name: Any, last: bool
) -> None:
    import json

    params = {
        "name": "generate_image",
        "arguments": {"prompt": "x", "image_urls": ["data:image/png;base64," + "A" * 1_500_000]},
    }
    message: dict[str, Any] = {"jsonrpc": "2.0", "id": name, "method": "tools/call", "params": params}
    if last:
        message = {"jsonrpc": "2.0", "method": "tools/call", "params": params, "id": name}
    with anyio.fail_after(WITHIN_S):
        async with httpx.AsyncClient(headers=HEADERS) as http:
            answer = await http.post(harness.url(harness.http), content=json.dumps(message))
    assert answer.status_code == 413
    assert answer.json()["id"] == name
    assert "data: URI" in answer.json()["error"]["message"]
    assert "358 kB" in answer.json()["error"]["message"]


async def test_a_web_page_of_this_machine_may_call(harness: Harness) -> None:
    with anyio.fail_after(WITHIN_S):
        async with httpx.AsyncClient(headers={**HEADERS, "origin": "http://localhost:6274"}) as http:
            answer = await http.post(harness.url(harness.http), json=_call("compute_size", {"size": "1:1"}))
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("length", "status"),
    [pytest.param(BODY_MAX, 200, id="the longest"), pytest.param(BODY_MAX + 1, 413, id="one byte too long")],
)
@pytest.mark.parametrize("has_length", [True, False], ids=["with its length", "in chunks"])
async def test_the_body_limit_is_exact(harness: Harness, length: int, status: int, has_length: bool) -> None:
    import json

    body = json.dumps(_call("compute_size", {"size": "1:1"})).encode().ljust(length)

    async def chunks() -> Any:
        for start in range(0, length, 65_536):
            yield body[start : start + 65_536]

    with anyio.fail_after(WITHIN_S):
        async with httpx.AsyncClient(headers=HEADERS) as http:
            answer = await http.post(harness.url(harness.http), content=body if has_length else chunks())
    assert answer.status_code == status


@pytest.mark.parametrize("transport", ["http", "sse"])
async def test_the_health_check_reports_status_and_version(harness: Harness, transport: str) -> None:
    from evolink_mcp import __version__

    with anyio.fail_after(WITHIN_S):
        async with httpx.AsyncClient() as http:
            answer = await http.get(f"http://127.0.0.1:{getattr(harness, transport)}/healthz")
    assert answer.json() == {"status": "ok", "name": "evolink-mcp", "version": __version__}


@ERAS
async def test_a_task_of_one_server_is_available_at_another(harness: Harness, mode: Any) -> None:
    """The servers share the journal, and the image is saved once."""
    with anyio.fail_after(WITHIN_S):
        async with Client(harness.url(harness.http), mode=mode) as client:
            arguments = {"prompt": f"a bridge, {mode}", "wait_seconds": 0}
            handle = (await client.call_tool("generate_image", arguments)).structured_content
        answers = {}
        async with anyio.create_task_group() as group:

            async def fetch(port: int) -> None:
                async with Client(harness.url(port), mode=mode) as client:
                    result = await client.call_tool("get_task", {"task_id": handle["task_id"]})
                    answers[port] = result.structured_content

            group.start_soon(fetch, harness.http)
            group.start_soon(fetch, harness.second)
        assert len(await harness.tasks_with_prompt(arguments["prompt"])) == 1
    assert handle["status"] != "completed"
    assert answers[harness.http]["status"] == answers[harness.second]["status"] == "completed"
    assert answers[harness.http]["images"] == answers[harness.second]["images"]
    saved = [path.name for path in (harness.folder / "pictures").iterdir() if handle["task_id"][-8:] in path.name]
    assert len([name for name in saved if name.endswith(".png")]) == 1


async def test_simultaneous_purchases_at_two_servers_are_all_recorded(harness: Harness) -> None:
    """Simultaneous identical calls are separate purchases, also in separate processes."""
    prompt, paths = "twins", []
    with anyio.fail_after(WITHIN_S):
        async with anyio.create_task_group() as group:

            async def buy(port: int) -> None:
                async with Client(harness.url(port)) as client:
                    answer = await client.call_tool("generate_image", {"prompt": prompt})
                    paths.append(answer.structured_content["images"][0]["path"])

            for port in (harness.http, harness.second) * 3:
                group.start_soon(buy, port)
        tasks = await harness.tasks_with_prompt(prompt)
    assert len(set(paths)) == len(paths) == len(tasks) == 6


def test_an_occupied_port_is_reported_without_a_traceback(harness: Harness) -> None:
    command = [*SERVER_COMMAND, "http", "--port", str(harness.http)]
    env = {**os.environ, "EVOLINK_MCP_DATA_DIR": str(harness.folder / "third")}
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=WITHIN_S)
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert str(harness.http) in process.stderr
