"""How each host is told to start this server: text to paste into its configuration, and links that do it at a click."""

from __future__ import annotations

import base64
import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

SERVER_NAME = "evolink"
KEY_VARIABLE = "EVOLINK_API_KEY"
KEY_INPUT = "evolink-api-key"
TERMINAL = "terminal"
# uv and pip may have to unpack at the first start; Codex gives older versions 10 s for it, and calls 60 s.
CODEX_STARTUP_S = 60
CODEX_CALL_S = 300
PATIENCE_S = 300  # where a host lets a server say how long a call may take; theirs is 60


@dataclass(frozen=True, slots=True)
class Block:
    """`text` goes into the file `where` of `host`, or is typed there when `where` is "terminal"."""

    host: str
    where: str
    language: str
    text: str


def host_blocks(command: str, args: Sequence[str], env: Mapping[str, str]) -> tuple[Block, ...]:
    """The block of every host for this command line and environment; the key in `env` should be an example."""
    entry = _entry(command, args, env)
    servers = _json({"mcpServers": {SERVER_NAME: entry}})
    line = [command, *args]
    pairs = [f"{name}={value}" for name, value in env.items()]
    claude = ["claude", "mcp", "add", SERVER_NAME, "-s", "user", *_each("-e", pairs), "--", *line]
    codex = ["codex", "mcp", "add", SERVER_NAME, *_each("--env", pairs), "--", *line]
    gemini = ["gemini", "mcp", "add", "-s", "user", *_each("-e", pairs), SERVER_NAME, *line]
    return (
        Block("Claude Desktop", "claude_desktop_config.json", "json", servers),
        Block("Claude Code", TERMINAL, "sh", _typed(claude)),
        Block("Cursor", "~/.cursor/mcp.json", "json", servers),
        Block("VS Code", ".vscode/mcp.json", "json", _vscode(entry)),
        Block("Codex", TERMINAL, "sh", _typed(codex)),
        Block("Codex", "~/.codex/config.toml", "toml", _codex(command, args, env)),
        Block("Gemini CLI", TERMINAL, "sh", _typed(gemini)),
        Block("Gemini CLI", "~/.gemini/settings.json", "json", servers),
        Block("Windsurf", "~/.codeium/windsurf/mcp_config.json", "json", servers),
        Block("Zed", "settings.json", "json", _json({"context_servers": {SERVER_NAME: {"args": [], **entry}}})),
        Block("opencode", "~/.config/opencode/opencode.json", "json", _opencode(line, env)),
        Block("Copilot CLI", "~/.copilot/mcp-config.json", "json", _copilot(entry)),
        Block("Cline", "cline_mcp_settings.json", "json", _cline(entry)),
        Block("JetBrains", "Settings, AI Assistant, MCP, as JSON", "json", servers),
    )


def installed_command(python: Path = Path(sys.executable)) -> tuple[str, list[str]]:
    """Return the program and arguments that start this installation.

    The path is absolute, because desktop applications have a short PATH.
    """
    if "archive-v0" in python.parts:  # uvx runs from a cache that it empties
        return shutil.which("uvx") or "uvx", ["evolink-mcp"]
    script = python.with_name("evolink-mcp.exe" if sys.platform == "win32" else "evolink-mcp")
    # Without -P, a file of the MCP host's working directory could replace a module.
    return (str(script), []) if script.exists() else (str(python), ["-P", "-m", "evolink_mcp"])


def cursor_link(command: str, args: Sequence[str], env: Mapping[str, str]) -> str:
    """A link that opens Cursor and offers to install the server."""
    config = base64.b64encode(_compact(_entry(command, args, env)).encode()).decode()
    return f"https://cursor.com/en/install-mcp?name={SERVER_NAME}&config={quote(config, safe='')}"


def vscode_link(command: str, args: Sequence[str], env: Mapping[str, str]) -> str:
    """A link that opens VS Code, which asks for the key and keeps it among its secrets."""
    inputs, config = quote(_compact([_key_input()]), safe=""), _compact(_asking(_entry(command, args, env)))
    address = "https://insiders.vscode.dev/redirect/mcp/install"
    return f"{address}?name={SERVER_NAME}&inputs={inputs}&config={quote(config, safe='')}"


def _entry(command: str, args: Sequence[str], env: Mapping[str, str]) -> dict[str, Any]:
    return {"command": command, **({"args": list(args)} if args else {}), "env": dict(env)}


def _vscode(entry: dict[str, Any]) -> str:
    return _json({"inputs": [_key_input()], "servers": {SERVER_NAME: {"type": "stdio", **_asking(entry)}}})


def _key_input() -> dict[str, Any]:
    return {"type": "promptString", "id": KEY_INPUT, "description": "EvoLink API key", "password": True}


def _asking(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with the key asked for instead of written down."""
    return {**entry, "env": {**entry["env"], KEY_VARIABLE: f"${{input:{KEY_INPUT}}}"}}


def _codex(command: str, args: Sequence[str], env: Mapping[str, str]) -> str:
    # A string or a list of strings is written the same in JSON and TOML.
    return "\n".join([
        f"[mcp_servers.{SERVER_NAME}]",
        f"command = {_compact(command)}",
        *([f"args = {_compact(list(args))}"] if args else []),
        f"startup_timeout_sec = {CODEX_STARTUP_S}",
        f"tool_timeout_sec = {CODEX_CALL_S}",
        "",
        f"[mcp_servers.{SERVER_NAME}.env]",
        *(f"{name} = {_compact(value)}" for name, value in env.items()),
    ])  # fmt: skip


def _opencode(line: Sequence[str], env: Mapping[str, str]) -> str:
    server = {"type": "local", "command": list(line), "environment": dict(env), "timeout": PATIENCE_S * 1000}
    return _json({"$schema": "https://opencode.ai/config.json", "mcp": {SERVER_NAME: server}})


def _copilot(entry: dict[str, Any]) -> str:
    return _json({"mcpServers": {SERVER_NAME: {"type": "local", "args": [], **entry, "tools": ["*"]}}})


def _cline(entry: dict[str, Any]) -> str:
    return _json({"mcpServers": {SERVER_NAME: {**entry, "timeout": PATIENCE_S}}})


def _each(flag: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (flag, value)]


def _typed(words: Sequence[str]) -> str:
    if sys.platform == "win32":
        return " ".join(f'"{word}"' if " " in word else word for word in words)
    return shlex.join(words)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
