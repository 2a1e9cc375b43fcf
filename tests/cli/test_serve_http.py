"""How `evolink-mcp http` and `sse` start and end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evolink_mcp.app.settings import BadSetting
from evolink_mcp.cli.arguments import Namespace
from evolink_mcp.cli.serve_http import serve_http
from evolink_mcp.teams.settings import TeamSettings
from evolink_mcp.teams.studios import Studios
from evolink_mcp.teams.tokens import new_token


class BusyStudios(Studios):
    """Studios with a call that still waits for its result."""

    def drain(self, *, has_other_servers: bool = False) -> bool:
        return False


@pytest.mark.parametrize("is_team", [False, True], ids=["personal server", "team"])
def test_only_the_server_of_a_team_waits_for_running_calls(tmp_path: Path, is_team: bool) -> None:
    """A personal server ends within two seconds of a signal, even during a POST."""
    results: list[bool] = []

    async def receive_signal(
        app: Any, host: str, port: int, leaving: Any, ready: Any, drained: Callable[[], bool] = lambda: True
    ) -> int:
        results.append(drained())
        return 143

    tokens_file = tmp_path / "tokens.toml"
    tokens_file.write_text(new_token("anna")[1])
    settings = TeamSettings.from_environment(
        {
            "EVOLINK_MCP_DATA_DIR": str(tmp_path / "data"),
            "EVOLINK_MCP_OUTPUT_DIR": str(tmp_path / "pictures"),
            **({"EVOLINK_MCP_TOKENS_FILE": str(tokens_file)} if is_team else {}),
        }
    )
    options = Namespace(command="http", host="127.0.0.1", port=0, allowed_host=[], insecure=False)
    exit_code = serve_http(options, settings, lambda line: None, serve=receive_signal, make_studios=BusyStudios)
    assert exit_code == 143
    assert results == [not is_team]


def test_sse_refuses_the_database_of_a_team() -> None:
    """An SSE session lives in one process, and the replicas of a team share the sessions of their callers."""
    pytest.importorskip("psycopg")
    settings = TeamSettings.from_environment(
        {"EVOLINK_MCP_DATABASE_URL": "postgresql://127.0.0.1:9/x", "EVOLINK_MCP_SECRET": "s" * 32}
    )
    options = Namespace(command="sse", host="127.0.0.1", port=0, allowed_host=[], insecure=False)
    with pytest.raises(BadSetting, match=r"sse serves one process.*teams use evolink-mcp http"):
        serve_http(options, settings, lambda line: None)
