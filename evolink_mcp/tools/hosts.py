"""What each MCP host accepts: how long a call may last, how big an answer may be. docs/hosts.md has the sources."""

from __future__ import annotations

import math
from dataclasses import dataclass

# The longest wait that a caller may ask for, in seconds.
WAIT_MAX_S = 900
# The time between the end of a wait and the moment when the host gives up.
ANSWER_WITHIN_S = 15.0


@dataclass(frozen=True, slots=True)
class Host:
    """One host; times in seconds, sizes in characters of the JSON answer.

    `wait_s` is how long a call waits unless told otherwise. `limit_s` is when the host gives up, where that is known;
    the wait, and the extra time for a late task id, end before it. `limit_is_final` is False if the host does not give
    the call up at its limit but goes on with it in another way.
    """

    name: str
    wait_s: float = 45.0
    answer_max: int = 700_000
    limit_s: float | None = None
    limit_is_final: bool = True

    @property
    def longest_wait_s(self) -> float:
        """The longest wait, in seconds, that still leaves time to answer; infinite if the host does not give up."""
        if self.limit_s is None or not self.limit_is_final:
            return math.inf
        return max(self.limit_s - ANSWER_WITHIN_S, 0.0)


UNKNOWN = Host("any other host")
# (start of the client's own name in lower case, host): the first that fits counts.
KNOWN: tuple[tuple[str, Host], ...] = (
    # At its limit Claude Code moves the call to the background.
    ("claude-code", Host("Claude Code", wait_s=105, limit_s=120, limit_is_final=False)),
    ("claude-ai", Host("Claude Desktop", limit_s=60)),  # on some surfaces; 240 s on others
    ("local-agent-mode", Host("Cowork and Code in Claude Desktop", limit_s=60)),
    ("codex", Host("Codex", wait_s=280, limit_s=300)),
    ("gemini-cli", Host("Gemini CLI", wait_s=300, limit_s=600)),
    ("visual studio code", Host("VS Code", wait_s=240, limit_s=300)),  # in 1.103 to 1.105, none since
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


def host_named(client_name: str | None) -> Host:
    """The host whose client has this name; an unknown one gets what the most impatient common default allows."""
    name = (client_name or "").strip().lower()
    return next((host for start, host in KNOWN if name.startswith(start)), UNKNOWN)
