"""Waits within the limits of the host. The table in docs/hosts.md equals the table in the code."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import World
from mcp.client import Client
from mcp_types import Implementation

from evolink_mcp.server.server import build_server
from evolink_mcp.tools.hosts import HOSTS, UNKNOWN, Host, host_named
from evolink_mcp.tools.waiting import ID_GRACE_S

DOCUMENT = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text(encoding="utf-8")
EVERY = [*HOSTS, ("", UNKNOWN)]
ERAS = pytest.mark.parametrize("mode", [pytest.param("auto", id="2026-07-28"), pytest.param("legacy", id="2025-11-25")])


def test_the_table_in_the_documentation_is_the_table_in_the_code() -> None:
    table = DOCUMENT.split("<!-- hosts:begin -->\n")[1].split("<!-- hosts:end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [row[:4] for row in rows] == [
        [host.name, start and f"`{start}`", f"{host.wait_s:g}", f"{host.limit_s:g}" if host.limit_s else "not known"]
        for start, host in EVERY
    ]
    assert [row[0] for row in rows if not row[-1]] == []  # every row names its source


@pytest.mark.parametrize("host", [pytest.param(host, id=host.name) for _, host in EVERY])
def test_a_call_ends_before_the_timeout_of_its_host(host: Host) -> None:
    """This includes a call that waits for its task ID. Unknown hosts have at least the timeout of the most common SDK."""
    assert host.wait_s + ID_GRACE_S <= (host.limit_s or 60)


@pytest.mark.parametrize("host", [pytest.param(host, id=host.name) for _, host in EVERY])
def test_an_answer_stays_below_the_limit_of_1_mb_of_desktop_hosts(host: Host) -> None:
    assert host.answer_max <= 750_000


@pytest.mark.parametrize(
    ("client_name", "host"),
    [
        ("claude-code", "Claude Code"),
        ("claude-ai", "Claude Desktop"),
        ("local-agent-mode-evolink", "Cowork and Code in Claude Desktop"),
        ("codex-mcp-client", "Codex"),
        ("Codex", "Codex"),
        ("gemini-cli-mcp-client", "Gemini CLI"),
        ("Visual Studio Code", "VS Code"),
        ("Visual Studio Code - Insiders", "VS Code"),
        ("cursor-vscode", "Cursor"),
        ("windsurf-client", "Windsurf"),
        ("Zed", "Zed"),
        ("Cline", "Cline"),
        ("Roo Code", "Roo Code"),
        ("Kilo-Code", "Kilo Code"),
        ("opencode", "opencode"),
        ("JetBrains-IU/copilot-intellij", "JetBrains IDEs"),
        ("jetbrains-ai-assistant-client", "JetBrains IDEs"),
        ("github-copilot-developer", "GitHub Copilot CLI"),
        ("  Codex ", "Codex"),
        ("my-codex", "any other host"),
        ("mcp", "any other host"),
        ("", "any other host"),
        (None, "any other host"),
    ],
)
def test_a_host_is_identified_by_the_name_of_its_client(client_name: str | None, host: str) -> None:
    assert host_named(client_name).name == host


def test_no_prefix_is_hidden_by_an_earlier_one() -> None:
    hidden_prefixes = [
        (start, earlier)
        for index, (start, _) in enumerate(HOSTS)
        for earlier, _ in HOSTS[:index]
        if start.startswith(earlier)
    ]
    assert hidden_prefixes == []
    assert all(re.fullmatch(r"[a-z][a-z -]*", start) for start, _ in HOSTS)


def test_an_unknown_host_gets_45_seconds() -> None:
    assert host_named("unknown-client").wait_s == 45


@asynccontextmanager
async def open_client(world: World, name: str, mode: Any, **server: Any) -> AsyncIterator[Client]:
    info = Implementation(name=name, version="1")
    with anyio.fail_after(300):
        async with Client(build_server(world.studio, **server), client_info=info, mode=mode) as client:
            yield client


async def status_for(world: World, name: str, mode: Any, **server: Any) -> str:
    """Return the status in the answer of a call. Its task takes two simulated minutes."""
    async with open_client(world, name, mode, **server) as client:
        answer = await client.call_tool("generate_image", {"prompt": "A calm sunset sim:slow=120 sim:fail"})
    return answer.structured_content["status"]


# A table with a host that allows no wait.
HOSTS_WITHOUT_WAIT = (("hasty", Host("Hasty", wait_s=0)),)


@ERAS
@pytest.mark.anyio
async def test_the_name_of_the_client_decides_the_wait(world: World, mode: Any) -> None:
    assert await status_for(world, "hasty-client", mode, hosts=HOSTS_WITHOUT_WAIT) in ("pending", "processing")
    assert await status_for(world, "other-client", mode, hosts=HOSTS_WITHOUT_WAIT) == "failed"


@ERAS
@pytest.mark.anyio
async def test_the_setting_overrides_the_host(world: World, mode: Any) -> None:
    assert await status_for(world, "hasty-client", mode, hosts=HOSTS_WITHOUT_WAIT, wait_s=45) == "failed"
    assert await status_for(world, "other-client", mode, hosts=HOSTS_WITHOUT_WAIT, wait_s=0) in (
        "pending",
        "processing",
    )
