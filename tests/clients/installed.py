"""`evolink-mcp install` for real hosts: each host's own list shows the server, and undo restores the files."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hosts import environment, run, version_of
from stage import Stage


@dataclass(frozen=True)
class Host:
    """A host of `evolink-mcp install`: its npm package, its file and the words of its list after the installation."""

    name: str
    package: str
    file: str
    content: str
    command: tuple[str, ...]
    words: tuple[str, ...]


HOSTS = (
    Host(
        "claude-code", "@anthropic-ai/claude-code", ".claude.json", '{\n  "numStartups": 3\n}',
        ("claude", "mcp", "list"), ("evolink:", "Connected"),
    ),
    Host(
        "codex", "@openai/codex", ".codex/config.toml", '# mine\nmodel = "o"\n',
        ("codex", "mcp", "list"), ("evolink ", "EVOLINK_API_KEY=*****", "enabled"),
    ),
    Host(
        "gemini-cli", "@google/gemini-cli", ".gemini/settings.json", '{\n  // mine\n  "ui": { "theme": "GitHub" }\n}\n',
        ("gemini", "mcp", "list"), ("evolink:", "Connected"),
    ),
    Host(
        "opencode", "opencode-ai", ".config/opencode/opencode.json", '{\n  "mcp": {}, // mine\n}\n',
        ("opencode", "mcp", "list"), ("evolink", "connected"),
    ),
    Host(
        "copilot", "@github/copilot", ".copilot/mcp-config.json", '{"mcpServers":{}}',
        ("copilot", "mcp", "list"), ("evolink (local)",),
    ),
)  # fmt: skip
LISTS_MAX = 5


def install_faults(stage: Stage, modules: Path) -> Iterator[tuple[str, str, str]]:
    """Install, list and undo. Yield name, version and fault of each host; an empty fault is a success."""
    env = environment(stage, modules, stage.work / "installed-home")
    home = Path(env["HOME"])
    for host in HOSTS:
        file = home / host.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(host.content)
    key = {"EVOLINK_API_KEY": stage.server_env["EVOLINK_API_KEY"]}
    install = [*stage.command, "install", *(host.name for host in HOSTS), "--yes"]
    process = subprocess.run(
        [*install, "--key-in-file"], env=env | key, cwd=home, capture_output=True, text=True, timeout=300
    )
    if process.returncode:
        raise RuntimeError(process.stdout + process.stderr)
    faults: dict[str, str] = {}
    unchanged: set[str] = set()
    for host in HOSTS:
        content = (home / host.file).read_bytes()
        # A host waits a few seconds for its server, which can be too short on a busy machine.
        output = ""
        missing = list(host.words)
        for _ in range(LISTS_MAX):
            output = run([str(modules / ".bin" / host.command[0]), *host.command[1:]], env)
            missing = [word for word in host.words if word not in output]
            if not missing:
                break
        faults[host.name] = f"no {missing} in {output[-300:]!r}" if missing else ""
        if (home / host.file).read_bytes() == content:
            unchanged.add(host.name)
    undo = subprocess.run([*install, "--undo"], env=env, cwd=home, capture_output=True, text=True, timeout=300)
    for host in HOSTS:
        content = (home / host.file).read_text()
        fault = faults[host.name]
        if undo.returncode:
            fault = undo.stderr
        elif host.name in unchanged and content != host.content:
            fault = f"undo left {content[:300]!r}"
        elif "evolink" in json.dumps(content):
            fault = "undo left the server"
        yield host.name, version_of(modules, host.package), fault
