"""Hosts that ship with their own MCP client, driven without a login or a model."""

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

# Codex opens a line to its model as soon as there is a thread: this one leads nowhere.
NO_MODEL = """
model_provider = "nowhere"
[model_providers.nowhere]
name = "nowhere"
base_url = "http://127.0.0.1:9/v1"
wire_api = "responses"
"""


def environment(stage: Stage, modules: Path, home: Path) -> dict[str, str]:
    """Each host has a home of its own, the Node that came with it, and no wish to call its own."""
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
    told = subprocess.run(
        command, env=env, cwd=env["HOME"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    return told.stdout + told.stderr


def listed(told: str, mark: str) -> Iterator[tuple[str, str]]:
    """Each transport, and what speaks against its server being connected, from a host's own list of servers."""
    for transport, name in NAMES.items():
        line = next((line for line in told.splitlines() if name in line), f"{name} is not listed: {told[-400:]!r}")
        good = line.rstrip().endswith("Connected") and mark in line
        yield transport, "" if good else line.strip()


def claude_code(stage: Stage, modules: Path) -> Iterator[tuple[str, str]]:
    """`claude mcp add` three times, then `claude mcp list`."""
    env = environment(stage, modules, stage.work / "claude-home")
    claude = str(modules / ".bin" / "claude")
    stdio = {"type": "stdio", "command": stage.command[0], "args": stage.command[1:], "env": stage.server_env}
    run([claude, "mcp", "add-json", "-s", "user", NAMES["stdio"], json.dumps(stdio)], env)
    for transport in ("http", "sse"):
        run([claude, "mcp", "add", "-s", "user", "--transport", transport, NAMES[transport], stage.url(transport)], env)
    yield from listed(run([claude, "mcp", "list"], env), "✔")


def gemini_cli(stage: Stage, modules: Path) -> Iterator[tuple[str, str]]:
    """`gemini mcp list` over a settings.json as the README's block makes it."""
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
    yield from listed(run([str(modules / ".bin" / "gemini"), "mcp", "list"], env), "✓")


@contextmanager
def codex(stage: Stage, modules: Path) -> Iterator[Callable[[str, str, dict], dict]]:
    """Codex's app server with a thread open: yields `call(transport, tool, arguments)`, which its own client carries out."""
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
            wire = _Wire(process)
            wire.ask("initialize", {"clientInfo": {"name": "evolink-mcp-check", "version": "1.0.0"}})
            wire.say("initialized")
            thread = wire.ask("thread/start", {"cwd": env["HOME"], "ephemeral": True})["thread"]["id"]
            listed_servers = wire.ask("mcpServerStatus/list", {"threadId": thread})["data"]
            servers = {server["name"]: server for server in listed_servers}

            def call(transport: str, tool: str, arguments: dict) -> dict:
                if tool == "tools/list":
                    return servers[NAMES[transport]]
                where = {"threadId": thread, "server": NAMES[transport], "tool": tool}
                return wire.ask("mcpServer/tool/call", {**where, "arguments": arguments})

            yield call
        finally:
            process.terminate()
            process.wait(10)


class _Wire:
    """JSON-RPC, a line a message, over a process's stdin and stdout."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._last = 0
        self._heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._heard.put(line)

    def say(self, method: str, **more: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"jsonrpc": "2.0", "method": method, **more}) + "\n")
        self._process.stdin.flush()

    def ask(self, method: str, params: dict) -> dict:
        self._last += 1
        self.say(method, id=self._last, params=params)
        deadline = time.monotonic() + ANSWER_WITHIN_S
        while True:
            answer = json.loads(self._heard.get(timeout=max(0.0, deadline - time.monotonic())))
            if answer.get("id") == self._last and "method" not in answer:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
