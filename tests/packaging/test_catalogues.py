"""The generated manifests of plugins and catalogues.

The hosts' own validators run in tests/clients. For agent-plugins and Cursor this module checks the fields of the
published schemas (agent-plugins 1.0.0 and cursor/plugins, read in November 2026); no copy of them is in the repository.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from evolink_mcp import __version__
from evolink_mcp.server.catalogue import skill_text

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "plugins" / "evolink-mcp"
AGENT_PLUGIN_FIELDS = {
    "$schema", "name", "version", "description", "author", "homepage", "repository", "license", "keywords", "extensions",
}  # fmt: skip
CURSOR_FIELDS = {
    "name", "displayName", "description", "version", "author", "publisher", "homepage", "repository", "license", "logo",
    "keywords", "skills", "mcpServers", "rules", "agents", "commands", "hooks",
}  # fmt: skip


def generated_files() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("make_catalogues", ROOT / "docs" / "make_catalogues.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.files()


def load(path: str) -> dict[str, Any]:
    return json.loads((PLUGIN / path).read_text("utf-8"))


@pytest.mark.parametrize("path", list(generated_files()))
def test_a_generated_file_is_current(path: str) -> None:
    """`python docs/make_catalogues.py` writes the files."""
    assert (ROOT / path).read_text("utf-8") == generated_files()[path]


def test_the_folders_of_plugins_contain_only_generated_files() -> None:
    folders = (ROOT / "plugins", ROOT / ".claude-plugin", ROOT / ".agents")
    files = {path.relative_to(ROOT).as_posix() for folder in folders for path in folder.rglob("*") if path.is_file()}
    assert files == set(generated_files()) - {"manifest.json", "server.json"}


def test_the_portable_plugin_has_only_fields_of_agent_plugins() -> None:
    manifest = load("plugin.json")
    assert {"$schema", "name"} <= set(manifest) <= AGENT_PLUGIN_FIELDS
    assert set(manifest["author"]) <= {"name", "email", "url"}
    assert re.fullmatch(r"[a-z0-9](?:[a-z0-9.-]{0,62}[a-z0-9])?", manifest["name"])
    servers = load("mcp.json")
    assert set(servers) == {"$schema", "mcpServers"}
    assert manifest["$schema"].rsplit("/", 1)[0] == servers["$schema"].rsplit("/", 1)[0]
    for server in servers["mcpServers"].values():
        assert {"type", "command"} <= set(server) <= {"type", "command", "args", "env", "cwd"}
        assert "/" not in server["command"]


def test_the_cursor_plugin_has_only_fields_of_its_schema() -> None:
    manifest = load(".cursor-plugin/plugin.json")
    assert set(manifest) <= CURSOR_FIELDS
    assert set(manifest["author"]) <= {"name", "email"}
    for path in (manifest["skills"], manifest["mcpServers"]):
        assert (PLUGIN / path).exists()


@pytest.mark.parametrize(
    "path",
    [
        "plugin.json",
        *(f".{host}-plugin/plugin.json" for host in ("claude", "codex", "cursor")),
        "gemini-extension.json",
    ],
)
def test_every_plugin_has_the_version_of_the_package(path: str) -> None:
    assert load(path)["version"] == __version__


def test_no_manifest_contains_a_key_and_every_secret_is_marked() -> None:
    claude = load(".claude-plugin/plugin.json")
    assert claude["userConfig"]["api_key"]["sensitive"] is True
    assert claude["mcpServers"]["evolink"]["env"] == {"EVOLINK_API_KEY": "${user_config.api_key}"}
    (setting,) = load("gemini-extension.json")["settings"]
    assert (setting["envVar"], setting["sensitive"]) == ("EVOLINK_API_KEY", True)
    assert load("mcp.json")["mcpServers"]["evolink"]["env"] == {"EVOLINK_API_KEY": "keyring"}
    assert not any(re.search(r"sk-\w", text) for text in generated_files().values())


def test_the_skill_of_the_plugins_is_the_skill_of_the_server() -> None:
    (file,) = (PLUGIN / "skills").rglob("SKILL.md")
    assert file.read_text("utf-8") == skill_text()
    assert file.parent.name == "evolink-images"


def test_the_marketplaces_lead_to_the_plugin() -> None:
    (claude,) = json.loads((ROOT / ".claude-plugin" / "marketplace.json").read_text())["plugins"]
    (codex,) = json.loads((ROOT / ".agents" / "plugins" / "marketplace.json").read_text())["plugins"]
    assert [(ROOT / path).resolve() for path in (claude["source"], codex["source"]["path"])] == [PLUGIN, PLUGIN]
