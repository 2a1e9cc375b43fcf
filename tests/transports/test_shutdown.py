"""A server ends soon after a signal or the end of its input, and loses no paid task."""

from __future__ import annotations

import signal
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from child_processes import minimal_environment
from faulty_gateway import Exchange, Gateway, QuickSimulator, behave
from killer import Launcher, Server, shared_launcher  # noqa: F401
from mcp.client import Client
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client

from evolink_mcp.journal.entry import Entry
from evolink_mcp.journal.sqlite import FILE_NAME, read_entries

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX"),
]

KEY = "sk-canary-0123456789abcdef"
REQUEST = {"prompt": "a fox", "size": "1024x640", "quality": "low"}
# The promise is two seconds, and the benchmarks measure it. A busy machine can stop a test for longer.
END_TIMEOUT_S = 60.0
ENDS = [
    pytest.param(None, 0, id="end of input"),
    pytest.param(signal.SIGTERM, 143, id="SIGTERM"),
    pytest.param(signal.SIGINT, 130, id="SIGINT"),
]
SIGNALS = ENDS[1:]


class Harness:
    """A gateway, a launcher for servers, and the folders of one server."""

    def __init__(self, gateway: Gateway, launcher: Launcher, folder: Path) -> None:
        self.gateway = gateway
        self.launcher = launcher
        self.folder = folder
        self.has_arrived = anyio.Event()
        self.may_answer = anyio.Event()

    @property
    def env(self) -> dict[str, str]:
        return minimal_environment(
            self.folder, EVOLINK_API_KEY=KEY,
            EVOLINK_BASE_URL=self.gateway.url, EVOLINK_MCP_DATA_DIR=str(self.folder / "data"),
            EVOLINK_MCP_OUTPUT_DIR=str(self.folder / "pictures"), EVOLINK_MCP_PREVIEW="off",
        )  # fmt: skip

    async def hold(self, exchange: Exchange) -> None:
        """Accept a purchase, and answer it when the test sets `may_answer`."""
        reply = await exchange.accept()
        self.has_arrived.set()
        await self.may_answer.wait()
        exchange.relay(reply)

    def journal(self) -> list[Entry]:
        return read_entries(self.folder / "data", 10)


@pytest.fixture
async def harness(tmp_path: Path, launcher: Launcher) -> AsyncIterator[Harness]:
    async with Gateway(QuickSimulator(duration_s=3600)).open() as gateway:
        yield Harness(gateway, launcher, tmp_path)


async def exit_code_of(server: Server, end: signal.Signals | None) -> int:
    server.close_stdin() if end is None else server.kill(end)
    with anyio.fail_after(END_TIMEOUT_S):
        return await server.wait_for_exit()


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await anyio.sleep(0.01)


@pytest.mark.parametrize(("end", "code"), ENDS)
async def test_an_idle_server_ends_at_once_without_output(
    harness: Harness, end: signal.Signals | None, code: int
) -> None:
    async with harness.launcher.server(harness.env, "-v") as server:
        assert await exit_code_of(server, end) == code, server.stderr_file.read_text()
    assert server.stderr_file.read_text() == ""


@pytest.mark.parametrize(("end", "code"), ENDS)
async def test_a_server_ends_during_a_waiting_call_and_its_task_is_in_the_journal(
    harness: Harness, end: signal.Signals | None, code: int
) -> None:
    with anyio.fail_after(300):
        async with harness.launcher.server(harness.env) as server, anyio.create_task_group() as calls:
            calls.start_soon(lambda: server.call("generate_image", **REQUEST))
            await until(lambda: any(path.startswith("/v1/tasks/") for _, path in harness.gateway.requests))
            assert await exit_code_of(server, end) == code, server.stderr_file.read_text()
    assert [entry.task_id for entry in harness.journal()] == list(harness.gateway.simulator.tasks)
    assert "Traceback" not in server.stderr_file.read_text()


@pytest.mark.parametrize(("end", "code"), ENDS)
@pytest.mark.parametrize("has_answer", [True, False], ids=["answered in time", "never answered"])
async def test_a_post_in_flight_is_completed_or_stays_in_the_journal_as_sending(
    harness: Harness, end: signal.Signals | None, code: int, has_answer: bool
) -> None:
    harness.gateway.purchases = [harness.hold]
    with anyio.fail_after(300):
        async with harness.launcher.server(harness.env) as server, anyio.create_task_group() as calls:
            calls.start_soon(lambda: server.call("generate_image", **REQUEST))
            await harness.has_arrived.wait()
            if has_answer:
                harness.may_answer.set()
            assert await exit_code_of(server, end) == code, server.stderr_file.read_text()
    (entry,) = harness.journal()
    assert (entry.phase, entry.charged) == ("submitted" if has_answer else "sending", "unknown")
    assert entry.task_id == (next(iter(harness.gateway.simulator.tasks)) if has_answer else None)
    assert "Traceback" not in server.stderr_file.read_text()
    assert harness.gateway.posts == 1


@pytest.mark.parametrize(("end", "code"), ENDS)
async def test_a_server_ends_while_another_program_locks_the_journal(
    harness: Harness, end: signal.Signals | None, code: int
) -> None:
    """The database cannot record the answer of the purchase, and the second record may have it.

    Without the second record the entry stays as sending, and the next start reconciles it.
    """
    harness.gateway.purchases = [harness.hold]
    async with harness.launcher.server(harness.env) as server, anyio.create_task_group() as group:
        group.start_soon(lambda: server.call("generate_image", **REQUEST))
        await harness.has_arrived.wait()
        with closing(sqlite3.connect(harness.folder / "data" / FILE_NAME, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            harness.may_answer.set()
            assert await exit_code_of(server, end) == code, server.stderr_file.read_text()
            group.cancel_scope.cancel()
    assert "Traceback" not in server.stderr_file.read_text()
    (entry,) = harness.journal()
    assert entry.phase in ("sending", "submitted")
    assert (entry.task is not None) == (entry.phase == "submitted")


async def test_a_client_that_stops_reading_and_disconnects_causes_no_traceback(harness: Harness) -> None:
    with anyio.fail_after(300):
        async with harness.launcher.server(harness.env) as server:
            server.stop_reading()
            server.send({"id": 7, "method": "tools/list", "params": {}})
            assert await exit_code_of(server, None) == 0, server.stderr_file.read_text()
    assert "Traceback" not in server.stderr_file.read_text()


# --- over the network ----------------------------------------------------------------------------------------


@asynccontextmanager
async def web(harness: Harness, transport: str) -> AsyncIterator[tuple[Server, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with harness.launcher.server(harness.env, transport, "--port", str(port), initialize=False) as server:
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient() as client:
            is_healthy = False
            while not is_healthy:
                with suppress(httpx.TransportError):
                    is_healthy = (await client.get(f"{url}/healthz")).status_code == 200
                await anyio.sleep(0.02)
        yield server, url


async def call_over(url: str, transport: str) -> None:
    """Make a call that never gets its answer."""
    transport_client: Any = streamable_http_client(f"{url}/mcp") if transport == "http" else sse_client(f"{url}/sse")
    with suppress(Exception):
        async with Client(transport_client, mode="legacy") as client:
            await client.call_tool("generate_image", REQUEST)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("end", "code"), SIGNALS)
@pytest.mark.parametrize("transport", ["http", "sse"])
@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "POST in flight"])
async def test_an_http_server_ends_after_a_signal(
    harness: Harness, transport: str, end: signal.Signals, code: int, is_busy: bool
) -> None:
    harness.gateway.purchases = [harness.hold]
    with anyio.fail_after(300):
        async with web(harness, transport) as (server, url), anyio.create_task_group() as calls:
            if is_busy:
                calls.start_soon(call_over, url, transport)
                await harness.has_arrived.wait()
            assert await exit_code_of(server, end) == code, server.stderr_file.read_text()
            calls.cancel_scope.cancel()
    assert "Traceback" not in server.stderr_file.read_text()
    if is_busy:
        assert [(entry.phase, entry.charged) for entry in harness.journal()] == [("sending", "unknown")]


async def test_a_disconnect_over_http_does_not_end_the_purchase(harness: Harness) -> None:
    harness.gateway.purchases = [harness.hold, behave]
    with anyio.fail_after(300):
        async with web(harness, "http") as (server, url):
            async with anyio.create_task_group() as calls:
                calls.start_soon(call_over, url, "http")
                await harness.has_arrived.wait()
                calls.cancel_scope.cancel()
            harness.may_answer.set()
            await until(lambda: any(path.startswith("/v1/tasks/") for _, path in harness.gateway.requests))
            assert [entry.phase for entry in harness.journal()] == ["submitted"]
            assert await exit_code_of(server, signal.SIGTERM) == 143
    assert harness.gateway.posts == 1
