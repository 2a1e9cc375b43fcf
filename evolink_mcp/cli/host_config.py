"""The configuration that makes an MCP host start this server: values, text to paste, and links that install it."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from evolink_mcp.cli.config_text import toml_tables

SERVER_NAME = "evolink"
KEY_VARIABLE = "EVOLINK_API_KEY"
KEY_INPUT = "evolink-api-key"
TERMINAL = "terminal"
# At the first start uv may unpack packages. Older versions of Codex allow 10 s for the start and 60 s for a call.
CODEX_STARTUP_S = 60
CODEX_CALL_S = 300
CALL_S = 300  # for hosts with a limit in their configuration; their default is 60 s


@dataclass(frozen=True, slots=True)
class Block:
    """The configuration `text` of an MCP host. `where` is its file; "terminal" marks a command to type."""

    host: str
    where: str
    language: str
    text: str


def host_blocks(command: str, args: Sequence[str], env: Mapping[str, str]) -> tuple[Block, ...]:
    """Return the configuration of each MCP host for a command and an environment. Put only an example key into `env`."""
    entry = _entry(command, args, env)
    servers = _json({"mcpServers": {SERVER_NAME: entry}})
    server = partial(server_value, command=command, args=args, env=env)
    opencode = _json({"$schema": "https://opencode.ai/config.json", "mcp": {SERVER_NAME: server("opencode")}})
    line = [command, *args]
    pairs = [f"{name}={value}" for name, value in env.items()]
    # The option -e takes several values, so the name of the server stands before it.
    claude = ["claude", "mcp", "add", SERVER_NAME, "-s", "user", *_each("-e", pairs), "--", *line]
    codex = ["codex", "mcp", "add", SERVER_NAME, *_each("--env", pairs), "--", *line]
    gemini = ["gemini", "mcp", "add", "-s", "user", *_each("-e", pairs), SERVER_NAME, *line]
    return (
        Block("Claude Desktop", "claude_desktop_config.json", "json", servers),
        Block("Claude Code", TERMINAL, "sh", command_line(claude)),
        Block("Cursor", "~/.cursor/mcp.json", "json", servers),
        Block("VS Code", ".vscode/mcp.json", "json", _vscode(entry)),
        Block("Codex", TERMINAL, "sh", command_line(codex)),
        Block("Codex", "~/.codex/config.toml", "toml", toml_tables(["mcp_servers", SERVER_NAME], server("codex"))),
        Block("Gemini CLI", TERMINAL, "sh", command_line(gemini)),
        Block("Gemini CLI", "~/.gemini/settings.json", "json", servers),
        Block("Windsurf", "~/.codeium/windsurf/mcp_config.json", "json", servers),
        Block("Zed", "settings.json", "json", _json({"context_servers": {SERVER_NAME: server("zed")}})),
        Block("opencode", "~/.config/opencode/opencode.json", "json", opencode),
        Block(
            "Copilot CLI", "~/.copilot/mcp-config.json", "json", _json({"mcpServers": {SERVER_NAME: server("copilot")}})
        ),
        Block("Cline", "cline_mcp_settings.json", "json", _json({"mcpServers": {SERVER_NAME: server("cline")}})),
        Block("JetBrains", "Settings, AI Assistant, MCP, as JSON", "json", servers),
    )


def server_value(host: str, command: str, args: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    """Return the value that describes this server in the configuration of a host, for example "codex"."""
    entry = _entry(command, args, env)
    match host:
        case "claude-code" | "vscode":
            return {"type": "stdio", **entry}
        case "codex":
            environment = entry.pop("env")
            limits = {"startup_timeout_sec": CODEX_STARTUP_S, "tool_timeout_sec": CODEX_CALL_S}
            return {**entry, **limits, "env": environment}
        case "zed":
            return {"args": [], **entry}
        case "opencode":
            # opencode counts its timeout in milliseconds.
            line = [command, *args]
            return {"type": "local", "command": line, "environment": dict(env), "timeout": CALL_S * 1000}
        case "copilot":
            return {"type": "local", "args": [], **entry, "tools": ["*"]}
        case "cline":
            return {**entry, "timeout": CALL_S}
        case _:
            return entry


def installed_command(python: Path = Path(sys.executable)) -> tuple[str, list[str]]:
    """Return the program and arguments that start this installation.

    The path is absolute, because desktop applications have a short PATH.
    """
    if "archive-v0" in python.parts:  # uvx deletes its cache, so this path does not stay
        return shutil.which("uvx") or "uvx", ["evolink-mcp"]
    script = python.with_name("evolink-mcp.exe" if sys.platform == "win32" else "evolink-mcp")
    # Without -P, a file of the MCP host's working directory could replace a module.
    return (str(script), []) if script.exists() else (str(python), ["-P", "-m", "evolink_mcp"])


def _entry(command: str, args: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    return {"command": command, **({"args": list(args)} if args else {}), "env": dict(env)}


def _vscode(entry: dict[str, Any]) -> str:
    return _json({"inputs": [_key_input()], "servers": {SERVER_NAME: {"type": "stdio", **_with_key_input(entry)}}})


def _key_input() -> dict[str, Any]:
    return {"type": "promptString", "id": KEY_INPUT, "description": "EvoLink API key", "password": True}


def _with_key_input(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the entry with a reference to the input field instead of the key."""
    return {**entry, "env": {**entry["env"], KEY_VARIABLE: f"${{input:{KEY_INPUT}}}"}}


def _each(flag: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (flag, value)]


def command_line(words: Sequence[str]) -> str:
    """Return a command with its arguments for a shell."""
    # cmd.exe does not know the single quotes of shlex.
    if sys.platform == "win32":
        return " ".join(f'"{word}"' if " " in word else word for word in words)
    return shlex.join(words)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
