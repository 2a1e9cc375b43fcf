"""The plugin, checked and installed by the hosts themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hosts import environment, run, version_of
from stage import ROOT, Stage

PLUGIN = str(ROOT / "plugins" / "evolink-mcp")
# Package, commands, and the words that the output of the last command must contain.
CHECKS = (
    ("@anthropic-ai/claude-code", (("claude", "plugin", "validate", PLUGIN),), ("Validation passed",)),
    ("@anthropic-ai/claude-code", (("claude", "plugin", "validate", str(ROOT)),), ("Validation passed",)),
    (
        "@anthropic-ai/claude-code",
        (
            ("claude", "plugin", "marketplace", "add", str(ROOT)),
            ("claude", "plugin", "install", "evolink-mcp@evolink-mcp"),
            ("claude", "plugin", "list"),
        ),
        ("evolink-mcp@evolink-mcp", "enabled"),
    ),
    ("@google/gemini-cli", (("gemini", "extensions", "validate", PLUGIN),), ("successfully validated",)),
    (
        "@openai/codex",
        (
            ("codex", "plugin", "marketplace", "add", str(ROOT)),
            ("codex", "plugin", "add", "evolink-mcp@evolink-mcp"),
            ("codex", "mcp", "list"),
        ),
        ("evolink", "EVOLINK_API_KEY=*****", "enabled"),
    ),
    (
        "@github/copilot",
        (
            ("copilot", "plugin", "marketplace", "add", str(ROOT)),
            ("copilot", "plugin", "install", "evolink-mcp@evolink-mcp"),
            ("copilot", "mcp", "list"),
        ),
        ("evolink (local)",),
    ),
)


def plugin_faults(stage: Stage, modules: Path) -> Iterator[tuple[str, str, str]]:
    """Run each check. Yield its name, the version of the host and its fault; an empty fault is a success."""
    env = environment(stage, modules, stage.work / "plugins-home")
    for package, commands, words in CHECKS:
        output = ""
        for command in commands:
            output = run([str(modules / ".bin" / command[0]), *command[1:]], env)
        missing = [word for word in words if word not in output]
        name = " ".join(commands[-1][:3])
        yield name, version_of(modules, package), f"no {missing} in {output[-400:]!r}" if missing else ""
