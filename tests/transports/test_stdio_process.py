"""The real process: protocol eras, bytes on stdout, what a poor environment and bad lines do."""

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


class Talk:
    """A server process and its wire, line by line."""

    def __init__(self, home: Path, stdout: int = subprocess.PIPE, **environ: str) -> None:
        env = minimal_environment(home, **environ)
        self.process = subprocess.Popen(
            SERVER_COMMAND, env=env, cwd=home,
            stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE,
        )  # fmt: skip

    def say(self, line: bytes | dict[str, Any]) -> None:
        data = line if isinstance(line, bytes) else json.dumps(line).encode()
        assert self.process.stdin
        self.process.stdin.write(data + b"\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def ask_to_begin(self, version: str = "2025-06-18") -> None:
        client = {"protocolVersion": version, "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
        self.say({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": client})

    def greet(self, version: str = "2025-06-18") -> dict[str, Any]:
        self.ask_to_begin(version)
        answer = self.hear()
        self.say({"jsonrpc": "2.0", "method": "notifications/initialized"})
        return answer

    def end(self) -> tuple[int, bytes, bytes]:
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Talk]]:
    opened: list[Talk] = []

    def starting(stdout: int = subprocess.PIPE, **environ: str) -> Talk:
        opened.append(Talk(tmp_path, stdout, **environ))
        return opened[-1]

    yield starting
    for item in opened:
        item.process.kill()
        item.process.communicate()


@pytest.fixture
def talk(start: Callable[..., Talk]) -> Talk:
    return start()


@pytest.mark.parametrize("version", ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"])
def test_older_protocol_versions_are_spoken(talk: Talk, version: str) -> None:
    assert talk.greet(version)["result"]["protocolVersion"] == version


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


def test_stdout_is_protocol_only_and_an_end_of_input_ends_it_cleanly(talk: Talk) -> None:
    talk.greet()
    talk.say({"jsonrpc": "2.0", "id": 2, "method": "tools/list", "params": {}})
    assert {tool["name"] for tool in talk.hear()["result"]["tools"]} >= {"generate_image", "get_task", "compute_size"}
    assert talk.end() == (0, b"", b"")


def test_lines_that_are_not_json_are_answered_and_the_server_goes_on(talk: Talk) -> None:
    talk.greet()
    talk.say(b"not json at all")
    assert talk.hear()["error"]["code"] == -32700
    talk.say(b"[" * 100_000)
    assert talk.hear()["error"]["code"] == -32700
    talk.say(b'{"jsonrpc":"2.0","id":7,"metho":"x"}')
    assert (talk.hear()["error"]["code"], "id") == (-32600, "id")
    talk.say({"jsonrpc": "2.0", "id": 8, "method": "ping"})
    assert talk.hear()["id"] == 8


@pytest.mark.parametrize("value", ['"\\ud800"', "NaN", "1e400", "-0.0", "1" * 5000])
def test_json_that_breaks_parsers_gets_an_answer_with_its_id(talk: Talk, value: str) -> None:
    talk.greet()
    name, second = ("prompt", "n") if value.startswith('"') else ("n", "prompt")
    call = f'{{"name":"generate_image","arguments":{{"{name}":{value},"{second}":{"1" if second == "n" else chr(34) * 2}}}}}'
    talk.say(f'{{"jsonrpc":"2.0","id":5,"method":"tools/call","params":{call}}}'.encode())
    answer = talk.hear()
    assert answer.get("error", {}).get("code") == -32700 or answer["result"]["isError"] is True
    talk.say({"jsonrpc": "2.0", "id": 6, "method": "ping"})
    assert talk.hear()["id"] == 6


@pytest.mark.parametrize("name", ["1.5", "true", "false", "-0.5"])
def test_an_id_that_is_no_id_gets_an_answer(talk: Talk, name: str) -> None:
    """It looks like a notification then, which nobody would answer."""
    talk.greet()
    talk.say(f'{{"jsonrpc":"2.0","id":{name},"method":"tools/list","params":{{}}}}'.encode())
    answer = talk.hear()
    assert (answer["id"], "result" in answer or answer["error"]["code"] == -32600) == (json.loads(name), True)
    talk.say({"jsonrpc": "2.0", "id": 6, "method": "ping"})
    assert talk.hear()["id"] == 6


@pytest.fixture(scope="module", params=[None, "get_task,compute_size"], ids=["all tools", "two tools"])
def recorded(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, str]:
    """The environment of a second start: the first one has recorded its answers."""
    home = tmp_path_factory.mktemp("recorded")
    tools = {} if request.param is None else {"EVOLINK_MCP_TOOLS": request.param}
    talk = Talk(home, **tools)
    talk.greet()
    while not [file for folder in cache_folders(home) for file in folder.glob("startup-*.tsv")]:
        time.sleep(0.05)
    assert talk.end() == (0, b"", b"")
    return {**tools, "HOME": str(home), "PYTHONPATH": str(HERE / "without_sdk"), "WITHOUT_SDK": "1"}


def test_the_second_start_answers_before_it_imports_the_sdk(
    start: Callable[..., Talk], recorded: dict[str, str]
) -> None:
    talk = start(**recorded)
    greeting = talk.greet("2025-11-25")
    assert greeting["result"]["serverInfo"]["name"] == "evolink-mcp"
    answers: dict[str, Any] = {}
    for number, method in enumerate(("tools/list", "prompts/list", "resources/templates/list", "ping"), 2):
        talk.say({"jsonrpc": "2.0", "id": number, "method": method})
        answers[method] = talk.hear()
        assert answers[method]["id"] == number
    assert talk.process.poll() is None
    names = [tool["name"] for tool in answers["tools/list"]["result"]["tools"]]
    assert names == (["get_task", "compute_size"] if "EVOLINK_MCP_TOOLS" in recorded else list(TOOL_NAMES))


def test_a_call_in_the_same_write_is_answered_once_everything_is_there(talk: Talk) -> None:
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
    talk.say(b"\n".join(json.dumps(item).encode() for item in lines))
    messages = [talk.hear() for _ in range(4)]
    assert [item["id"] for item in messages[:1]] == [1]
    assert sorted(item["id"] for item in messages) == [1, 2, 3, 4]
    assert all("result" in item for item in messages)
    talk.say({"jsonrpc": "2.0", "id": 5, "method": "tools/list"})
    assert talk.hear()["id"] == 5
    assert talk.end() == (0, b"", b"")


def test_an_end_of_input_in_the_middle_of_the_start_ends_it(
    start: Callable[..., Talk], recorded: dict[str, str]
) -> None:
    talk = start(**recorded)
    talk.greet()
    assert talk.end() == (0, b"", b"")
    silent = start(**recorded)
    assert silent.end() == (0, b"", b"")


def test_a_question_before_the_end_of_input_is_answered(start: Callable[..., Talk]) -> None:
    talk = start()
    talk.say(b"garbage")
    out = talk.end()[1]
    assert json.loads(out)["error"]["code"] == -32700


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("end", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_in_the_middle_of_the_start_ends_it(
    start: Callable[..., Talk], recorded: dict[str, str], end: str, code: int
) -> None:
    talk = start(**recorded)
    talk.greet()
    talk.process.send_signal(getattr(signal, end))
    assert talk.process.wait(20) == code


def test_a_bad_setting_ends_the_start_as_ever(start: Callable[..., Talk]) -> None:
    talk = start(EVOLINK_MCP_WAIT_SECONDS="long")
    code, out, err = talk.end()
    assert (code, out, b"EVOLINK_MCP_WAIT_SECONDS" in err) == (2, b"", True)


def test_the_end_of_stdin_does_not_hide_a_bad_setting_of_the_second_start(
    start: Callable[..., Talk], recorded: dict[str, str]
) -> None:
    """Stdin is read before the settings are. An answer to a request would not be certain: the server ends meanwhile."""
    talk = start(**recorded, EVOLINK_MCP_WAIT_SECONDS="long")
    code, out, err = talk.end()
    assert (code, out, b"EVOLINK_MCP_WAIT_SECONDS" in err) == (2, b"", True)


def test_fewer_tools_are_asked_of_the_sdk(start: Callable[..., Talk]) -> None:
    talk = start(EVOLINK_MCP_TOOLS="get_task")
    talk.greet()
    talk.say({"jsonrpc": "2.0", "id": 2, "method": "tools/list"})
    assert [tool["name"] for tool in talk.hear()["result"]["tools"]] == ["get_task"]


@pytest.mark.skipif(sys.platform == "win32", reason="closes a descriptor by a POSIX shell")
@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_a_missing_stdin_or_stdout_is_told(tmp_path: Path, closed: str) -> None:
    process = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -P -m evolink_mcp {closed}"],
        env=minimal_environment(tmp_path), capture_output=True, timeout=300,
    )  # fmt: skip
    assert (process.returncode, b"no standard input and output" in process.stderr) == (1, True)
    assert b"Traceback" not in process.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="reads the server's own pipe as POSIX does")
def test_a_server_whose_host_was_killed_leaves(tmp_path: Path) -> None:
    """Its pipe ends with the host, however that one died."""
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
        # The server holds the other end of this pipe: it ends when the server has left.
        assert os.read(parent.stdout.fileno(), 1) == b""


@pytest.mark.skipif(sys.platform == "win32", reason="closes a pipe as POSIX does")
def test_a_client_that_went_before_the_first_answer_leaves_no_traceback(
    start: Callable[..., Talk], recorded: dict[str, str]
) -> None:
    """The answer finds nobody while the server is still being imported."""
    import os

    messages, out = os.pipe()
    os.close(messages)
    talk = start(out, **recorded)
    os.close(out)
    talk.ask_to_begin()
    assert (talk.process.wait(20), talk.end()[2]) == (0, b"")


def test_a_minimal_environment_starts_and_a_missing_key_is_reported(start: Callable[..., Talk]) -> None:
    talk = start(EVOLINK_API_KEY="${user_config.api_key}", EVOLINK_MCP_OUTPUT_DIR="${HOME}/Pictures/EvoLink")
    talk.greet()
    arguments = {"name": "generate_image", "arguments": {"prompt": "a fox"}}
    talk.say({"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": arguments})
    result = talk.hear()["result"]
    assert result["isError"] is True
    assert "EVOLINK_API_KEY" in result["content"][0]["text"]
    assert talk.end()[0] == 0


def test_a_setting_that_cannot_be_used_is_named_on_stderr(start: Callable[..., Talk]) -> None:
    code, out, err = start(EVOLINK_BASE_URL="http://api.evolink.ai").end()
    assert (code, out) == (2, b"")
    assert b"EVOLINK_BASE_URL must be an https URL" in err
    assert b"Traceback" not in err
