"""What each MCP host bears: how long a call may last and how big an answer may be. docs/hosts.md has the sources."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Host:
    """One host, by the name its client gives; times in seconds, sizes in characters of the JSON answer."""

    name: str
    wait_s: float = 45.0
    answer_max: int = 700_000


UNKNOWN = Host("unknown")
# (start of the client's own name in lower case, host). `wait_s` ends well before the host's limit in the comment.
KNOWN: tuple[tuple[str, Host], ...] = (
    ("claude-code", Host("Claude Code", wait_s=110)),  # calls over 120 s move to the background
    ("claude-ai", Host("Claude Desktop", wait_s=45)),  # about 60 s on some surfaces, 240 s on others
    ("codex", Host("Codex", wait_s=280)),  # 300 s exactly
    ("gemini-cli", Host("Gemini CLI", wait_s=300)),  # 600 s
    ("visual studio code", Host("VS Code", wait_s=240)),  # no limit of its own; 300 s in 1.103 to 1.105
    ("cursor", Host("Cursor", wait_s=45)),  # about 60 s reported
    ("zed", Host("Zed", wait_s=45)),  # 60 s
    ("windsurf", Host("Windsurf", wait_s=45)),  # not known
    ("cline", Host("Cline", wait_s=45)),  # 60 s
    ("kilo", Host("Kilo Code", wait_s=45)),  # 60 s
    ("opencode", Host("opencode", wait_s=45)),  # 60 s
    ("copilot-intellij", Host("Copilot for JetBrains", wait_s=25)),  # about 30 s
    ("github-copilot-intellij", Host("Copilot for JetBrains", wait_s=25)),
    ("github-copilot", Host("GitHub Copilot", wait_s=45)),  # 60 s
    ("copilot", Host("GitHub Copilot", wait_s=45)),  # 60 s
)


def host_named(client_name: str | None) -> Host:
    """The host whose client calls itself so; unknown ones get what the most impatient known default bears."""
    name = (client_name or "").strip().lower()
    return next((host for start, host in KNOWN if name.startswith(start)), UNKNOWN)
