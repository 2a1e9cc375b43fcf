"""The real process: protocol eras, bytes on stdout, minimal environments and invalid lines."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from child_processes import SERVER_COMMAND, cache_folders, minimal_environment
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters

from evolink_mcp.tools.names import TOOL_NAMES

pytestmark = pytest.mark.anyio
HERE = Path(__file__).parent


class ServerProcess:
    """A server process with a minimal client: it writes and reads one line at a time."""

    def __init__(self, home: Path, stdout: int = subprocess.PIPE, **environ: str) -> None:
        env = minimal_environment(home, **environ)
        self.process = subprocess.Popen(
            SERVER_COMMAND, env=env, cwd=home,
            stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE,
        )  # fmt: skip

    def send(self, line: bytes | dict[str, Any]) -> None:
        data = line if isinstance(line, bytes) else json.dumps(line).encode()
        assert self.process.stdin
        self.process.stdin.write(data + b"\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def send_initialize(self, version: str = "2025-06-18") -> None:
        client = {"protocolVersion": version, "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
        self.send({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": client})

    def initialize(self, version: str = "2025-06-18") -> dict[str, Any]:
        self.send_initialize(version)
        answer = self.receive()
        self.send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        return answer

    def end(self) -> tuple[int, bytes, bytes]:
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    processes: list[ServerProcess] = []

    def start_server(stdout: int = subprocess.PIPE, **environ: str) -> ServerProcess:
        processes.append(ServerProcess(tmp_path, stdout, **environ))
        return processes[-1]

    yield start_server
    for server in processes:
        server.process.kill()
        server.process.communicate()


@pytest.fixture
def server(start: Callable[..., ServerProcess]) -> ServerProcess:
    return start()


@pytest.mark.parametrize("version", ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"])
def test_older_protocol_versions_work(server: ServerProcess, version: str) -> None:
    assert server.initialize(version)["result"]["protocolVersion"] == version


@pytest.mark.parametrize("mode", ["auto", "legacy", "2026-07-28"])
async def test_the_official_client_works_in_every_mode(tmp_path: Path, mode: Any) -> None:
    server = StdioServerParameters(
        command=SERVER_COMMAND[0], args=SERVER_COMMAND[1:], env=minimal_environment(tmp_path), cwd=tmp_path
    )
    with anyio.fail_after(300):
        async with Client(server, mode=mode) as client:
            answer = await client.call_tool("compute_size", {"size": "3:2"})
    assert answer.structured_content["explicit_size"] == "1536x1024"
    assert list(tmp_path.iterdir()) == []


def test_stdout_has_only_messages_and_an_end_of_input_ends_the_server(server: ServerProcess) -> None:
    server.initialize()
    server.send({"jsonrpc": "2.0", "id": 2, "method": "tools/list", "params": {}})
    assert {tool["name"] for tool in server.receive()["result"]["tools"]} >= {
        "generate_image",
        "get_task",
        "compute_size",
    }
    assert server.end() == (0, b"", b"")


def test_lines_that_are_not_json_are_answered_and_the_server_continues(server: ServerProcess) -> None:
    server.initialize()
    server.send(b"not json at all")
    assert server.receive()["error"]["code"] == -32700
    server.send(b"[" * 100_000)
    assert server.receive()["error"]["code"] == -32700
    server.send(b'{"jsonrpc":"2.0","id":7,"metho":"x"}')
    assert (server.receive()["error"]["code"], "id") == (-32600, "id")
    server.send({"jsonrpc": "2.0", "id": 8, "method": "ping"})
    assert server.receive()["id"] == 8


@pytest.mark.parametrize("value", ['"\\ud800"', "NaN", "1e400", "-0.0", "1" * 5000])
def test_json_that_breaks_parsers_gets_an_answer_with_its_id(server: ServerProcess, value: str) -> None:
    server.initialize()
    name, second = ("prompt", "n") if value.startswith('"') else ("n", "prompt")
    call = f'{{"name":"generate_image","arguments":{{"{name}":{value},"{second}":{"1" if second == "n" else chr(34) * 2}}}}}'
    server.send(f'{{"jsonrpc":"2.0","id":5,"method":"tools/call","params":{call}}}'.encode())
    answer = server.receive()
    assert answer.get("error", {}).get("code") == -32700 or answer["result"]["isError"] is True
    server.send({"jsonrpc": "2.0", "id": 6, "method": "ping"})
    assert server.receive()["id"] == 6


@pytest.mark.parametrize("name", ["1.5", "true", "false", "-0.5"])
def test_an_invalid_id_gets_an_answer(server: ServerProcess, name: str) -> None:
    """The message looks like a notification, and notifications get no answer."""
    server.initialize()
    server.send(f'{{"jsonrpc":"2.0","id":{name},"method":"tools/list","params":{{}}}}'.encode())
    answer = server.receive()
    assert (answer["id"], "result" in answer or answer["error"]["code"] == -32600) == (json.loads(name), True)
    server.send({"jsonrpc": "2.0", "id": 6, "method": "ping"})
    assert server.receive()["id"] == 6


@pytest.fixture(scope="module", params=[None, "get_task,compute_size"], ids=["all tools", "two tools"])
def recorded_environment(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, str]:
    """Return the environment of a second start. The first server recorded its answers."""
    home = tmp_path_factory.mktemp("recorded")
    tools = {} if request.param is None else {"EVOLINK_MCP_TOOLS": request.param}
    server = ServerProcess(home, **tools)
    server.initialize()
    while not [file for folder in cache_folders(home) for file in folder.glob("startup-*.tsv")]:
        time.sleep(0.05)
    assert server.end() == (0, b"", b"")
    return {**tools, "HOME": str(home), "PYTHONPATH": str(HERE / "without_sdk"), "WITHOUT_SDK": "1"}


def test_the_second_start_answers_before_it_imports_the_sdk(
    start: Callable[..., ServerProcess], recorded_environment: dict[str, str]
) -> None:
    server = start(**recorded_environment)
    answer = server.initialize("2025-11-25")
    assert answer["result"]["serverInfo"]["name"] == "evolink-mcp"
    answers: dict[str, Any] = {}
    for number, method in enumerate(("tools/list", "prompts/list", "resources/templates/list", "ping"), 2):
        server.send({"jsonrpc": "2.0", "id": number, "method": method})
        answers[method] = server.receive()
        assert answers[method]["id"] == number
    assert server.process.poll() is None
    names = [tool["name"] for tool in answers["tools/list"]["result"]["tools"]]
    assert names == (["get_task", "compute_size"] if "EVOLINK_MCP_TOOLS" in recorded_environment else list(TOOL_NAMES))


def test_calls_in_one_write_with_initialize_are_all_answered(server: ServerProcess) -> None:
    client = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    call = {"name": "compute_size", "arguments": {"size": "3:2"}}
    lines = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": client},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": call},
        {"jsonrpc": "2.0", "id": 3, "method": "tools/list"},
        {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 3}},
        {"jsonrpc": "2.0", "id": 4, "method": "ping"},
    ]
    server.send(b"\n".join(json.dumps(message).encode() for message in lines))
    messages = [server.receive() for _ in range(4)]
    assert [message["id"] for message in messages[:1]] == [1]
    assert sorted(message["id"] for message in messages) == [1, 2, 3, 4]
    assert all("result" in message for message in messages)
    server.send({"jsonrpc": "2.0", "id": 5, "method": "tools/list"})
    assert server.receive()["id"] == 5
    assert server.end() == (0, b"", b"")


def test_an_end_of_input_during_the_start_ends_the_server(
    start: Callable[..., ServerProcess], recorded_environment: dict[str, str]
) -> None:
    server = start(**recorded_environment)
    server.initialize()
    assert server.end() == (0, b"", b"")
    silent = start(**recorded_environment)
    assert silent.end() == (0, b"", b"")


def test_a_question_before_the_end_of_input_is_answered(start: Callable[..., ServerProcess]) -> None:
    server = start()
    server.send(b"garbage")
    out = server.end()[1]
    assert json.loads(out)["error"]["code"] == -32700


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("end", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_during_the_start_ends_the_server(
    start: Callable[..., ServerProcess], recorded_environment: dict[str, str], end: str, code: int
) -> None:
    server = start(**recorded_environment)
    server.initialize()
    server.process.send_signal(getattr(signal, end))
    assert server.process.wait(20) == code


def test_a_bad_setting_ends_the_start(start: Callable[..., ServerProcess]) -> None:
    server = start(EVOLINK_MCP_WAIT_SECONDS="long")
    code, out, err = server.end()
    assert (code, out, b"EVOLINK_MCP_WAIT_SECONDS" in err) == (2, b"", True)


def test_the_end_of_stdin_does_not_hide_a_bad_setting_of_the_second_start(
    start: Callable[..., ServerProcess], recorded_environment: dict[str, str]
) -> None:
    """The server reads stdin before the settings. It may end before it answers a request, so this test sends none."""
    server = start(**recorded_environment, EVOLINK_MCP_WAIT_SECONDS="long")
    code, out, err = server.end()
    assert (code, out, b"EVOLINK_MCP_WAIT_SECONDS" in err) == (2, b"", True)


def test_the_sdk_lists_only_the_published_tools(start: Callable[..., ServerProcess]) -> None:
    server = start(EVOLINK_MCP_TOOLS="get_task")
    server.initialize()
    server.send({"jsonrpc": "2.0", "id": 2, "method": "tools/list"})
    assert [tool["name"] for tool in server.receive()["result"]["tools"]] == ["get_task"]


@pytest.mark.skipif(sys.platform == "win32", reason="closes a descriptor by a POSIX shell")
@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_a_missing_stdin_or_stdout_is_reported(tmp_path: Path, closed: str) -> None:
    process = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -P -m evolink_mcp {closed}"],
        env=minimal_environment(tmp_path), capture_output=True, timeout=300,
    )  # fmt: skip
    assert (process.returncode, b"no standard input and output" in process.stderr) == (1, True)
    assert b"Traceback" not in process.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="reads the server's own pipe as POSIX does")
def test_a_server_whose_host_was_killed_ends(tmp_path: Path) -> None:
    """The system closes the pipe of the server when the host dies."""
    import os

    host = (
        "import subprocess, sys\n"
        "server = subprocess.Popen([sys.executable, '-P', '-m', 'evolink_mcp'], stdin=subprocess.PIPE, stdout=sys.stdout)\n"
        "server.stdin.write(sys.stdin.buffer.readline()); server.stdin.flush(); server.wait()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", host],
        env=minimal_environment(tmp_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.write(b'{"jsonrpc":"2.0","id":1,"method":"ping"}\n')
        parent.stdin.flush()
        assert json.loads(parent.stdout.readline())["id"] == 1
        parent.kill()
        # The server holds the other end of this pipe: it ends with the server.
        assert os.read(parent.stdout.fileno(), 1) == b""


@pytest.mark.skipif(sys.platform == "win32", reason="closes a pipe as POSIX does")
def test_a_client_that_disconnects_before_the_first_answer_causes_no_traceback(
    start: Callable[..., ServerProcess], recorded_environment: dict[str, str]
) -> None:
    """The write of the answer fails while the server still imports its modules."""
    import os

    messages, out = os.pipe()
    os.close(messages)
    server = start(out, **recorded_environment)
    os.close(out)
    server.send_initialize()
    assert (server.process.wait(20), server.end()[2]) == (0, b"")


def test_a_minimal_environment_starts_and_a_missing_key_is_reported(start: Callable[..., ServerProcess]) -> None:
    server = start(EVOLINK_API_KEY="${user_config.api_key}", EVOLINK_MCP_OUTPUT_DIR="${HOME}/Pictures/EvoLink")
    server.initialize()
    arguments = {"name": "generate_image", "arguments": {"prompt": "a fox"}}
    server.send({"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": arguments})
    result = server.receive()["result"]
    assert result["isError"] is True
    assert "EVOLINK_API_KEY" in result["content"][0]["text"]
    assert server.end()[0] == 0


def test_a_setting_that_cannot_be_used_is_named_on_stderr(start: Callable[..., ServerProcess]) -> None:
    code, out, err = start(EVOLINK_BASE_URL="http://api.evolink.ai").end()
    assert (code, out) == (2, b"")
    assert b"EVOLINK_BASE_URL must be an https URL" in err
    assert b"Traceback" not in err
