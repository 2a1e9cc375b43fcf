"""The server card over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from evolink_mcp import __version__
from evolink_mcp.cli.arguments import Namespace
from evolink_mcp.cli.serve_http import serve_http
from evolink_mcp.teams.settings import TeamSettings
from evolink_mcp.teams.tokens import new_token

# The fields of a card and of its remotes in the published schema, with the required ones.
CARD_FIELDS = {
    "$schema",
    "_meta",
    "description",
    "icons",
    "name",
    "remotes",
    "repository",
    "title",
    "version",
    "websiteUrl",
}
CARD_REQUIRED = {"$schema", "description", "name", "version"}
REMOTE_FIELDS = {"headers", "supportedProtocolVersions", "type", "url", "variables"}


def cards(tmp_path: Path, command: str, host: str, *paths: str, **variables: str) -> list[httpx.Response]:
    """Start the app of a command without a port, and return the answer for each path."""
    answers: list[httpx.Response] = []

    async def serve(
        app: Any, address: str, port: int, leaving: Any, ready: Any, drained: Callable[[], bool] = lambda: True
    ) -> int:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            answers.extend([await client.get(path) for path in paths])
        return 0

    environment = {"EVOLINK_MCP_DATA_DIR": str(tmp_path / "data"), "EVOLINK_MCP_OUTPUT_DIR": str(tmp_path / "out")}
    settings = TeamSettings.from_environment({**environment, **variables})
    options = Namespace(command=command, host="127.0.0.1", port=0, allowed_host=[], insecure=False)
    assert serve_http(options, settings, lambda line: None, serve=serve) == 0
    return answers


@pytest.mark.parametrize(
    ("command", "paths", "remote"),
    [
        (
            "http",
            ("/mcp/server-card", "/.well-known/mcp/server-card.json"),
            {"type": "streamable-http", "url": "http://127.0.0.1:8000/mcp"},
        ),
        (
            "sse",
            ("/sse/server-card", "/.well-known/mcp/server-card.json"),
            {"type": "sse", "url": "http://127.0.0.1:8000/sse"},
        ),
    ],
)
def test_the_card_describes_the_endpoint(
    tmp_path: Path, command: str, paths: tuple[str, ...], remote: dict[str, Any]
) -> None:
    for answer in cards(tmp_path, command, "127.0.0.1:8000", *paths):
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/mcp-server-card+json")
        assert answer.headers["access-control-allow-origin"] == "*"
        card = answer.json()
        assert CARD_REQUIRED <= set(card) <= CARD_FIELDS
        assert (card["name"], card["version"]) == ("io.github.evolink-mcp/evolink-mcp", __version__)
        assert len(card["description"]) <= 100
        (published,) = card["remotes"]
        assert set(published) <= REMOTE_FIELDS
        assert remote.items() <= published.items()
        assert ("2026-07-28" in published.get("supportedProtocolVersions", [])) == (command == "http")


def test_the_card_needs_no_token_and_names_the_public_address_and_the_header(tmp_path: Path) -> None:
    tokens_file = tmp_path / "tokens.toml"
    tokens_file.write_text(new_token("anna")[1])
    card, mcp = cards(
        tmp_path, "http", "127.0.0.1:8000", "/mcp/server-card", "/mcp",
        EVOLINK_MCP_TOKENS_FILE=str(tokens_file), EVOLINK_MCP_PUBLIC_URL="https://pictures.example.com",
        EVOLINK_MCP_SECRET="s" * 32,
    )  # fmt: skip
    assert (card.status_code, mcp.status_code) == (200, 401)
    (remote,) = card.json()["remotes"]
    assert remote["url"] == "https://pictures.example.com/mcp"
    assert [(header["name"], header["isSecret"]) for header in remote["headers"]] == [("Authorization", True)]


def test_a_foreign_hostname_gets_no_card(tmp_path: Path) -> None:
    (answer,) = cards(tmp_path, "http", "evil.example", "/mcp/server-card")
    assert (answer.status_code, "remotes" in answer.text) == (421, False)
