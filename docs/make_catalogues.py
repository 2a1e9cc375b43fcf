"""Write the manifests of all catalogues: the bundle, the registry entry, and the plugins with their skill.

python docs/make_catalogues.py    needs evolink_mcp on the import path

The facts come from the package. A test fails if a written file differs from this module.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from evolink_mcp import __version__
from evolink_mcp.cli.host_config import KEY_VARIABLE, SERVER_NAME
from evolink_mcp.server.catalogue import NAME, REPOSITORY, SKILL_NAME, TITLE, registry_facts, skill_text
from evolink_mcp.tools.names import TOOL_NAMES

ROOT = Path(__file__).parent.parent
PLUGIN = f"plugins/{NAME}"
KEYWORDS = ["image", "image-generation", "image-editing", "gpt-image-2", "evolink"]
AUTHOR = {"name": "The evolink-mcp authors", "url": REPOSITORY}
LICENSE = "MIT"
PLUGIN_DESCRIPTION = (
    "Create and edit images with EvoLink's gpt-image-2, and a skill that explains briefs, sizes and costs."
)
KEY_TITLE = "EvoLink API key"
KEY_DESCRIPTION = "Create it at https://evolink.ai/dashboard/keys. It begins with sk-."
COMMAND = {"command": "uvx", "args": [NAME]}
LONG_DESCRIPTION = """\
Ask for an image and get a file. One call submits the request to EvoLink, waits, and downloads, checks and saves every \
image in your folder. The chat shows a small preview.

- **Paid once, never lost.** The server records each purchase before it sends it. After a restart it continues unfinished \
tasks.
- **No surprises.** The server computes pixels and price before it spends anything. You can limit the credits per call and \
per day.
- **Edits** of images from the web, from your disk or from earlier results.

You need an EvoLink account with credits and an API key from https://evolink.ai/dashboard/keys. An image takes 10 to 130 \
seconds. EvoLink bills every call of generate_image."""
# Fields that the bundle asks for: variable, type, title and description. Only the key is required.
FIELDS = {
    "api_key": (
        KEY_VARIABLE,
        "string",
        KEY_TITLE,
        f"{KEY_DESCRIPTION} Your system's key store holds it, and only EvoLink receives it.",
    ),
    "output_dir": (
        "EVOLINK_MCP_OUTPUT_DIR",
        "directory",
        "Output folder",
        "Default: the folder EvoLink in your Pictures folder.",
    ),
    "reference_dir": (
        "EVOLINK_MCP_ALLOWED_DIRS",
        "directory",
        "Folder of reference images",
        "The server reads local images only from this folder and the output folder. Default: only the output folder.",
    ),
    "max_credits_per_call": (
        "EVOLINK_MCP_MAX_CREDITS_PER_CALL",
        "number",
        "Credit limit per call",
        "The server refuses a call with a higher computed price, before it sends anything. Default: no limit. "
        "68 credits are about 1 USD.",
    ),
    "max_credits_per_day": (
        "EVOLINK_MCP_MAX_CREDITS_PER_DAY",
        "number",
        "Credit limit per day",
        "The server refuses a call that would exceed this total, before it sends anything. Default: no limit.",
    ),
    "confirm_above": (
        "EVOLINK_MCP_CONFIRM_ABOVE",
        "number",
        "Confirm above this price in credits",
        "If the MCP host cannot ask you, the server refuses the call until you agree in the chat. Default: no "
        "confirmation.",
    ),
}
REGISTRY_VARIABLES = [
    {
        "name": KEY_VARIABLE,
        "description": "EvoLink API key, from https://evolink.ai/dashboard/keys",
        "isRequired": True,
        "isSecret": True,
    },
    {
        "name": "EVOLINK_MCP_OUTPUT_DIR",
        "description": "Output folder. Default: EvoLink in the user's Pictures folder",
        "format": "filepath",
    },
    {
        "name": "EVOLINK_MCP_ALLOWED_DIRS",
        "description": "Folders for local reference images, separated as in PATH",
    },
    {
        "name": "EVOLINK_MCP_MAX_CREDITS_PER_CALL",
        "description": "Spending limit per call, in credits",
        "format": "number",
    },
    {
        "name": "EVOLINK_MCP_MAX_CREDITS_PER_DAY",
        "description": "Spending limit per day, in credits",
        "format": "number",
    },
]


def files() -> dict[str, str]:
    """Return the content of each file by its path in the repository."""
    documents = {
        "manifest.json": bundle(),
        "server.json": registry_entry(),
        f"{PLUGIN}/plugin.json": agent_plugin(),
        f"{PLUGIN}/mcp.json": agent_plugin_servers(),
        f"{PLUGIN}/.claude-plugin/plugin.json": claude_plugin(),
        f"{PLUGIN}/.codex-plugin/plugin.json": codex_plugin(),
        f"{PLUGIN}/.cursor-plugin/plugin.json": cursor_plugin(),
        f"{PLUGIN}/gemini-extension.json": gemini_extension(),
        ".claude-plugin/marketplace.json": claude_marketplace(),
        ".agents/plugins/marketplace.json": codex_marketplace(),
    }
    texts = {path: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for path, value in documents.items()}
    return {**texts, f"{PLUGIN}/skills/{SKILL_NAME}/SKILL.md": skill_text()}


def bundle() -> dict[str, Any]:
    """Return the manifest of the MCPB bundle."""
    raw = "https://raw.githubusercontent.com/modelcontextprotocol/mcpb/main/schemas/mcpb-manifest-v0.4.schema.json"
    return {
        "$schema": raw,
        "manifest_version": "0.4",
        "name": NAME,
        "display_name": TITLE,
        "version": __version__,
        "description": "Create and edit images with EvoLink's gpt-image-2: one call, the image in your folder, paid once.",
        "long_description": LONG_DESCRIPTION,
        "author": AUTHOR,
        "repository": {"type": "git", "url": f"{REPOSITORY}.git"},
        "homepage": REPOSITORY,
        "documentation": f"{REPOSITORY}/blob/main/docs/configuration.md",
        "support": f"{REPOSITORY}/issues",
        "license": LICENSE,
        "icon": "icon.png",
        "keywords": KEYWORDS,
        "server": {
            "type": "uv",
            "entry_point": "evolink_mcp/__main__.py",
            "mcp_config": {
                "command": "uv",
                "args": ["run", "--project", "${__dirname}", "--no-dev", "python", "-I", "-m", "evolink_mcp"],
                "env": {field[0]: f"${{user_config.{name}}}" for name, field in FIELDS.items()},
            },
        },
        "tools": bundle_tools(),
        "tools_generated": False,
        "prompts_generated": True,
        "privacy_policies": [f"{REPOSITORY}/blob/main/docs/privacy.md"],
        "compatibility": {"platforms": ["darwin", "win32", "linux"], "runtimes": {"python": ">=3.11"}},
        "user_config": {name: bundle_field(*field[1:]) for name, field in FIELDS.items()},
    }


def bundle_field(kind: str, title: str, description: str) -> dict[str, Any]:
    """Return a field of the bundle's settings page."""
    is_key = title == KEY_TITLE
    field: dict[str, Any] = {"type": kind, "title": title, "description": description}
    if is_key:
        field["sensitive"] = True
    field["required"] = is_key
    if kind == "number":
        field["min"] = 0
    return field


def bundle_tools() -> list[dict[str, str]]:
    """Return name and first sentence of each tool, from the published contract."""
    contract = json.loads((ROOT / "tests/tools/contract/tools.json").read_text("utf-8"))
    tools: list[dict[str, str]] = []
    for name in TOOL_NAMES:
        sentences = re.split(r"(?<=\.) ", " ".join(contract[name]["description"].split()))
        # The first sentence of the paid tools does not name the charge.
        number = 2 if name in ("generate_image", "generate_images") else 1
        tools.append({"name": name, "description": " ".join(sentences[:number])})
    return tools


def registry_entry() -> dict[str, Any]:
    """Return the entry of the MCP Registry."""
    package = {
        "registryType": "pypi",
        "identifier": NAME,
        "version": __version__,
        "runtimeHint": "uvx",
        "transport": {"type": "stdio"},
        "environmentVariables": REGISTRY_VARIABLES,
    }
    return {
        "$schema": "https://static.modelcontextprotocol.io/schemas/2025-12-11/server.schema.json",
        **registry_facts(),
        "packages": [package],
    }


def plugin_facts() -> dict[str, Any]:
    """Return the fields that all plugin formats share."""
    return {
        "name": NAME,
        "version": __version__,
        "description": PLUGIN_DESCRIPTION,
        "author": AUTHOR,
        "homepage": REPOSITORY,
        "repository": REPOSITORY,
        "license": LICENSE,
        "keywords": KEYWORDS,
    }


def agent_plugin() -> dict[str, Any]:
    """Return the manifest of the format agent-plugins 1.0.0."""
    return {"$schema": "https://agent-plugins.org/schemas/1.0.0/plugin.schema.json", **plugin_facts()}


def agent_plugin_servers() -> dict[str, Any]:
    """Return the servers of agent-plugins 1.0.0, also for Codex and Cursor.

    The format has no field for a secret, so the key comes from the key store: `evolink-mcp install --store-key`.
    """
    server = {
        "type": "stdio",
        "command": "uvx",
        "args": [f"{NAME}[keyring]"],
        "env": {KEY_VARIABLE: "keyring"},
    }
    return {"$schema": "https://agent-plugins.org/schemas/1.0.0/mcp.schema.json", "mcpServers": {SERVER_NAME: server}}


def claude_plugin() -> dict[str, Any]:
    """Return the manifest of the Claude Code plugin. Claude Code asks for the key and keeps it in its key store."""
    env = {KEY_VARIABLE: "${user_config.api_key}"}
    key = {"type": "string", "title": KEY_TITLE, "description": KEY_DESCRIPTION, "sensitive": True}
    return {
        **plugin_facts(),
        "mcpServers": {SERVER_NAME: {**COMMAND, "env": env}},
        "userConfig": {"api_key": key},
    }


def claude_marketplace() -> dict[str, Any]:
    """Return the marketplace that lets Claude Code and Copilot CLI install the plugin from this repository."""
    plugin = {"name": NAME, "source": f"./{PLUGIN}", "description": PLUGIN_DESCRIPTION, "category": "design"}
    return {
        "name": NAME,
        "owner": {"name": AUTHOR["name"]},
        "metadata": {"description": "The plugin of evolink-mcp", "version": __version__},
        "plugins": [plugin],
    }


def codex_plugin() -> dict[str, Any]:
    """Return the manifest of the Codex plugin."""
    return {
        **plugin_facts(),
        "skills": "./skills/",
        "mcpServers": "./mcp.json",
        "interface": {
            "displayName": TITLE,
            "shortDescription": "Create and edit images with gpt-image-2",
            "longDescription": LONG_DESCRIPTION,
            "developerName": AUTHOR["name"],
            "category": "Design",
            "capabilities": ["Interactive", "Write"],
            "websiteURL": REPOSITORY,
            "privacyPolicyURL": f"{REPOSITORY}/blob/main/docs/privacy.md",
            "defaultPrompt": [
                "Make a picture of a red fox in the snow.",
                "Edit the last picture: make it night.",
                "What would a 16:9 picture in 4K cost?",
            ],
        },
    }


def codex_marketplace() -> dict[str, Any]:
    """Return the marketplace that lets Codex install the plugin from this repository."""
    plugin = {
        "name": NAME,
        "source": {"source": "local", "path": f"./{PLUGIN}"},
        "policy": {"installation": "AVAILABLE", "authentication": "ON_INSTALL"},
        "category": "Design",
    }
    return {"name": NAME, "interface": {"displayName": TITLE}, "plugins": [plugin]}


def cursor_plugin() -> dict[str, Any]:
    """Return the manifest of the Cursor plugin."""
    # Its schema has no URL of the author.
    author = {"name": AUTHOR["name"]}
    paths = {"skills": "./skills/", "mcpServers": "./mcp.json"}
    return {**plugin_facts(), "displayName": TITLE, "author": author, **paths}


def gemini_extension() -> dict[str, Any]:
    """Return the manifest of the Gemini CLI extension. Gemini CLI asks for the key and keeps it in its key store."""
    key = {"name": KEY_TITLE, "description": KEY_DESCRIPTION, "envVar": KEY_VARIABLE, "sensitive": True}
    return {
        "name": NAME,
        "version": __version__,
        "description": PLUGIN_DESCRIPTION,
        "mcpServers": {SERVER_NAME: {**COMMAND, "env": {KEY_VARIABLE: f"${{{KEY_VARIABLE}}}"}}},
        "settings": [key],
    }


def write() -> None:
    """Write each file."""
    for path, content in files().items():
        file = ROOT / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, "utf-8", newline="\n")


if __name__ == "__main__":
    write()
