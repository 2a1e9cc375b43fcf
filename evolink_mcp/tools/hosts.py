"""Limits of the MCP hosts: the duration of a call and the size of an answer. docs/hosts.md names the sources."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

WAIT_MAX_S = 900
# The server needs this time to build and send an answer before the host gives up.
ANSWER_WITHIN_S = 15.0


@dataclass(frozen=True, slots=True)
class Host:
    """The limits of one host. Times are in seconds, sizes in characters of the JSON answer.

    `wait_s` is the default wait of a call. `limit_s` is the host's timeout, None if it is unknown. The wait and the
    extra time for a late task id end before it. `limit_is_final` is False if the host continues the call in another
    way after its timeout. `has_previews` is False if answers have no preview unless a setting requires it.
    """

    name: str
    # The TypeScript SDK ends a call after 60 s by default, and few hosts let progress extend it.
    wait_s: float = 45.0
    # Claude Desktop refuses a result above 1 MiB, with images in base64.
    answer_max: int = 700_000
    limit_s: float | None = None
    limit_is_final: bool = True
    has_previews: bool = True

    @property
    def longest_wait_s(self) -> float:
        """The longest wait that leaves time to answer; infinite if the host has no final timeout."""
        if self.limit_s is None or not self.limit_is_final:
            return math.inf
        return max(self.limit_s - ANSWER_WITHIN_S, 0.0)


UNKNOWN = Host("any other host")
# Default client names of SDKs. Several frameworks keep these names and pass a preview to the model as base64 text. The
# last two are the names of the Vercel AI SDK and of Google ADK, which do the same.
SDK_NAMES = frozenset({"", "mcp", "mcp-client", "example-client", "ai-sdk-mcp-client", "google-adk"})
UNNAMED = replace(UNKNOWN, has_previews=False)
# (prefix of the client's name in lower case, host). The first match counts.
Hosts = tuple[tuple[str, Host], ...]

# Hosts append a version, an edition or a server name, for example local-agent-mode-evolink.
HOSTS: Hosts = (
    # At its timeout Claude Code moves the call to the background.
    ("claude-code", Host("Claude Code", wait_s=105, limit_s=120, limit_is_final=False)),
    ("claude-ai", Host("Claude Desktop", limit_s=60)),  # some surfaces of the app allow 240 s
    ("local-agent-mode", Host("Cowork and Code in Claude Desktop", limit_s=60)),
    # Measured with Codex 0.169.0: 300 s, and progress does not extend it.
    ("codex", Host("Codex", wait_s=280, limit_s=300)),
    ("gemini-cli", Host("Gemini CLI", wait_s=300, limit_s=600)),
    (
        "visual studio code",
        Host("VS Code", wait_s=240, limit_s=300),
    ),  # in versions 1.103 to 1.105, later ones have none
    ("cursor", Host("Cursor", limit_s=60)),
    ("windsurf", Host("Windsurf")),
    ("zed", Host("Zed", limit_s=60)),
    ("cline", Host("Cline", limit_s=60)),
    ("roo code", Host("Roo Code", limit_s=60)),
    ("kilo", Host("Kilo Code", limit_s=60)),
    ("opencode", Host("opencode", limit_s=60)),
    ("jetbrains", Host("JetBrains IDEs", wait_s=15, limit_s=30)),
    ("github-copilot", Host("GitHub Copilot CLI")),
)


def host_named(client_name: str | None, hosts: Hosts = HOSTS) -> Host:
    """Return the host with this client name. An unknown host gets limits below the shortest common timeout."""
    name = (client_name or "").strip().lower()
    if name in SDK_NAMES:
        return UNNAMED
    return next((host for start, host in hosts if name.startswith(start)), UNKNOWN)
