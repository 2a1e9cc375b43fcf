"""MCP hosts with their own client, run without a login or a model."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stage import PATH, TRANSPORTS, Stage

ANSWER_WITHIN_S = 300.0
NAMES = {transport: f"evolink-{transport}" for transport in TRANSPORTS}

# Codex connects to its model when a thread starts. This address refuses the connection.
NO_MODEL = """
model_provider = "nowhere"
[model_providers.nowhere]
name = "nowhere"
base_url = "http://127.0.0.1:9/v1"
wire_api = "responses"
"""


def environment(stage: Stage, modules: Path, home: Path) -> dict[str, str]:
    """Return the environment of a host: a separate home folder, its own Node, and no calls to its vendor."""
    home.mkdir(parents=True, exist_ok=True)
    return stage.client_env(
        HOME=str(home),
        PATH=f"{modules / '.bin'}:{PATH}",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        DISABLE_AUTOUPDATER="1",
        GEMINI_CLI_TRUST_WORKSPACE="true",
    )


def version_of(modules: Path, package: str) -> str:
    return f"{package} {json.loads((modules / package / 'package.json').read_text())['version']}"


def run(command: list[str], env: dict[str, str]) -> str:
    process = subprocess.run(
        command, env=env, cwd=env["HOME"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    return process.stdout + process.stderr


def connection_faults(output: str, mark: str) -> Iterator[tuple[str, str]]:
    """Yield each transport and its fault, empty if the host's list shows the server as connected."""
    for transport, name in NAMES.items():
        line = next((line for line in output.splitlines() if name in line), f"{name} is not listed: {output[-400:]!r}")
        is_connected = line.rstrip().endswith("Connected") and mark in line
        yield transport, "" if is_connected else line.strip()


def claude_code(stage: Stage, modules: Path) -> Iterator[tuple[str, str]]:
    """Run `claude mcp add` three times, then `claude mcp list`. Yield each transport and its fault."""
    env = environment(stage, modules, stage.work / "claude-home")
    claude = str(modules / ".bin" / "claude")
    stdio = {"type": "stdio", "command": stage.command[0], "args": stage.command[1:], "env": stage.server_env}
    run([claude, "mcp", "add-json", "-s", "user", NAMES["stdio"], json.dumps(stdio)], env)
    for transport in ("http", "sse"):
        run([claude, "mcp", "add", "-s", "user", "--transport", transport, NAMES[transport], stage.url(transport)], env)
    yield from connection_faults(run([claude, "mcp", "list"], env), "✔")


def gemini_cli(stage: Stage, modules: Path) -> Iterator[tuple[str, str]]:
    """Run `gemini mcp list` with a settings.json as in the README. Yield each transport and its fault."""
    env = environment(stage, modules, stage.work / "gemini-home")
    stdio = {"command": stage.command[0], "args": stage.command[1:], "env": stage.server_env}
    servers = {
        NAMES["stdio"]: stdio,
        NAMES["http"]: {"httpUrl": stage.url("http")},
        NAMES["sse"]: {"url": stage.url("sse"), "type": "sse"},
    }
    folder = Path(env["HOME"], ".gemini")
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps({"mcpServers": servers}))
    yield from connection_faults(run([str(modules / ".bin" / "gemini"), "mcp", "list"], env), "✓")


@contextmanager
def codex(stage: Stage, modules: Path) -> Iterator[Callable[[str, str, dict], dict]]:
    """Start Codex's app server with a thread. Yield `call(transport, tool, arguments)`, which Codex's client executes."""
    env = environment(stage, modules, stage.work / "codex-home")
    folder = Path(env["HOME"], ".codex")
    folder.mkdir(exist_ok=True)
    table = ", ".join(f"{name} = {json.dumps(value)}" for name, value in stage.server_env.items())
    (folder / "config.toml").write_text(
        f"{NO_MODEL}\n[mcp_servers.{NAMES['stdio']}]\ncommand = {json.dumps(stage.command[0])}\n"
        f"args = {json.dumps(stage.command[1:])}\nenv = {{ {table} }}\n\n"
        f"[mcp_servers.{NAMES['http']}]\nurl = {json.dumps(stage.url('http'))}\n"
    )
    with (stage.work / "codex.log").open("w") as log:
        process = subprocess.Popen(
            [str(modules / ".bin" / "codex"), "app-server"], env=env, cwd=env["HOME"], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
        try:
            peer = _JsonRpc(process)
            peer.request("initialize", {"clientInfo": {"name": "evolink-mcp-check", "version": "1.0.0"}})
            peer.send("initialized")
            thread = peer.request("thread/start", {"cwd": env["HOME"], "ephemeral": True})["thread"]["id"]
            server_list = peer.request("mcpServerStatus/list", {"threadId": thread})["data"]
            servers = {server["name"]: server for server in server_list}

            def call(transport: str, tool: str, arguments: dict) -> dict:
                if tool == "tools/list":
                    return servers[NAMES[transport]]
                target = {"threadId": thread, "server": NAMES[transport], "tool": tool}
                return peer.request("mcpServer/tool/call", {**target, "arguments": arguments})

            yield call
        finally:
            process.terminate()
            process.wait(10)


class _JsonRpc:
    """JSON-RPC over a process's stdin and stdout, one message per line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._last_id = 0
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

    def send(self, method: str, **fields: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"jsonrpc": "2.0", "method": method, **fields}) + "\n")
        self._process.stdin.flush()

    def request(self, method: str, params: dict) -> dict:
        self._last_id += 1
        self.send(method, id=self._last_id, params=params)
        deadline = time.monotonic() + ANSWER_WITHIN_S
        while True:
            answer = json.loads(self._lines.get(timeout=max(0.0, deadline - time.monotonic())))
            if answer.get("id") == self._last_id and "method" not in answer:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
