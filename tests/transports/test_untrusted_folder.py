"""MCP hosts start the server in the user's project. No file of that folder may run in a process of the product."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from child_processes import SERVER_COMMAND, minimal_environment
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters

pytestmark = pytest.mark.anyio
KEY = "sk-canary-0123456789abcdef"
LIMIT_S = 300
SCRIPT = Path(sys.executable).with_name("evolink-mcp.exe" if sys.platform == "win32" else "evolink-mcp")
PROGRAMS = pytest.mark.parametrize(
    "program",
    [
        pytest.param(SERVER_COMMAND, id="module"),
        pytest.param(
            [str(SCRIPT)],
            id="command",
            marks=pytest.mark.skipif(not SCRIPT.exists(), reason="not installed as a command"),
        ),
    ],
)


class Project:
    """A folder with a trap for each module of the standard library and of each installed package."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        self.folder.mkdir()
        self._marker = folder / "executed"
        body = f"import builtins\nbuiltins.open({str(self._marker)!r}, 'a').write(__name__ + '\\n')\n"
        for name in {*sys.stdlib_module_names, *packages_distributions(), "evolink_mcp"}:
            if name.isidentifier():
                (self.folder / f"{name}.py").write_text(body)

    @property
    def executed(self) -> list[str]:
        """Return the names of the traps that ran."""
        return self._marker.read_text().split() if self._marker.exists() else []


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def environment(folder: Path, evolink: int) -> dict[str, str]:
    return minimal_environment(
        folder,
        EVOLINK_API_KEY=KEY,
        EVOLINK_BASE_URL=f"http://127.0.0.1:{evolink}",
        EVOLINK_MCP_DATA_DIR=str(folder / "data"),
        EVOLINK_MCP_OUTPUT_DIR=str(folder / "images"),
        NO_PROXY="127.0.0.1",
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def start_process(command: list[str], folder: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def evolink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Yield the port of a simulated EvoLink in another process and folder."""
    folder = tmp_path_factory.mktemp("simulator")
    port = free_port()
    command = [*SERVER_COMMAND, "simulate", "--port", str(port), "--seconds", "0"]
    with ExitStack() as stack:
        stack.enter_context(start_process(command, folder, minimal_environment(folder)))
        yield port


async def answers(url: str) -> None:
    """Wait until a server answers at this URL."""
    with anyio.fail_after(LIMIT_S):
        async with httpx.AsyncClient() as client:
            while True:
                try:
                    await client.get(url)
                except httpx.TransportError:
                    await anyio.sleep(0.01)
                else:
                    return


async def buy(server: Any) -> Any:
    with anyio.fail_after(LIMIT_S):
        async with Client(server) as client:
            return await client.call_tool("generate_image", {"prompt": "a fox", "size": "1024x640"})


def decoders_of(server: int) -> list[Path]:
    """Return the folders in /proc of the child processes of `server`."""
    lists = Path(f"/proc/{server}/task").glob("*/children")
    return [Path("/proc", child) for item in lists for child in item.read_text().split()]


@PROGRAMS
async def test_over_stdio_no_file_of_the_project_runs(
    program: list[str], project: Project, evolink: int, tmp_path: Path
) -> None:
    await answers(f"http://127.0.0.1:{evolink}/v1/credits")
    command, *arguments = program
    answer = await buy(
        StdioServerParameters(command=command, args=arguments, env=environment(tmp_path, evolink), cwd=project.folder)
    )
    assert answer.structured_content["status"] == "completed"
    assert Path(answer.structured_content["images"][0]["path"]).is_file()
    assert project.executed == []


@PROGRAMS
async def test_over_http_no_file_of_the_project_runs_and_the_decoder_has_no_key(
    program: list[str], project: Project, evolink: int, tmp_path: Path
) -> None:
    await answers(f"http://127.0.0.1:{evolink}/v1/credits")
    port = free_port()
    command = [*program, "http", "--port", str(port)]
    with start_process(command, project.folder, environment(tmp_path, evolink)) as server:
        await answers(f"http://127.0.0.1:{port}/healthz")
        answer = await buy(f"http://127.0.0.1:{port}/mcp")
        assert answer.structured_content["status"] == "completed"
        if sys.platform == "linux":
            assert KEY.encode() in Path(f"/proc/{server.pid}/environ").read_bytes()
            decoders = decoders_of(server.pid)
            assert len(decoders) == 1
            assert KEY.encode() not in (decoders[0] / "environ").read_bytes()
            assert os.readlink(decoders[0] / "cwd") == "/"
    assert project.executed == []


@PROGRAMS
def test_demo_and_sheet_run_no_file_of_the_project(program: list[str], project: Project, tmp_path: Path) -> None:
    env = minimal_environment(tmp_path, EVOLINK_MCP_OUTPUT_DIR=str(tmp_path / "images simulated"))
    demo = subprocess.run([*program, "demo"], cwd=project.folder, env=env, capture_output=True, timeout=LIMIT_S)
    assert demo.returncode == 0, demo.stderr.decode()
    assert list((tmp_path / "images simulated").glob("*.png"))
    sheet = subprocess.run([*program, "sheet"], cwd=project.folder, env=env, capture_output=True, timeout=LIMIT_S)
    assert b"Traceback" not in sheet.stderr
    assert project.executed == []
