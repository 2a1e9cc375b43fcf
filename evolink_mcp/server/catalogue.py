"""The facts that catalogues publish about this server, its server card and its skill."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from evolink_mcp import __version__

NAME = "evolink-mcp"
TITLE = "EvoLink Images"
# The MCP Registry allows 100 characters.
DESCRIPTION = "Create and edit images with EvoLink's gpt-image-2: one call, saved as files, paid once."
REPOSITORY = "https://github.com/evolink-mcp/evolink-mcp"
REGISTRY_NAME = "io.github.evolink-mcp/evolink-mcp"
CARD_SCHEMA = "https://static.modelcontextprotocol.io/schemas/v1/server-card.schema.json"
# Streamable HTTP exists since 2025-03-26, so the card names no earlier version.
PROTOCOL_VERSIONS = ("2026-07-28", "2025-11-25", "2025-06-18", "2025-03-26")
SKILL_NAME = "evolink-images"
SKILL_URI = f"skill://{SKILL_NAME}/SKILL.md"
SKILL_FILE = Path(__file__).parent / "skills" / SKILL_NAME / "SKILL.md"


def registry_facts() -> dict[str, Any]:
    """Return the fields that the server card and the registry's server.json share."""
    return {
        "name": REGISTRY_NAME,
        "title": TITLE,
        "description": DESCRIPTION,
        "version": __version__,
        "websiteUrl": REPOSITORY,
        "repository": {"url": REPOSITORY, "source": "github"},
    }


def server_card(url: str, transport: str, *, needs_token: bool) -> dict[str, Any]:
    """Return the server card (SEP-2127) of a server at `url`. `transport` is "streamable-http" or "sse"."""
    remote: dict[str, Any] = {"type": transport, "url": url}
    if transport == "streamable-http":
        remote["supportedProtocolVersions"] = list(PROTOCOL_VERSIONS)
    if needs_token:
        header = {"name": "Authorization", "description": "Bearer token", "isRequired": True, "isSecret": True}
        remote["headers"] = [header]
    return {"$schema": CARD_SCHEMA, **registry_facts(), "remotes": [remote]}


@cache
def skill_text() -> str:
    """Return the skill as Markdown with front matter."""
    return SKILL_FILE.read_text("utf-8")


def skill_entry() -> dict[str, Any]:
    """Return the skill's entry of the Skills extension: address, front matter and the digest of its file."""
    content = skill_text().encode()
    digest = f"sha256:{sha256(content).hexdigest()}"
    resources = [{"uri": SKILL_URI, "digest": digest, "size": len(content)}]
    return {"uri": SKILL_URI, "frontmatter": front_matter(skill_text()), "resources": resources}


def front_matter(text: str) -> dict[str, str]:
    """Return the front matter of a skill. Each value is one line of plain text."""
    _, block, _ = text.split("---\n", 2)
    pairs = (line.partition(": ") for line in block.splitlines())
    return {name: value for name, _, value in pairs}
