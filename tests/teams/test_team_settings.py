"""Settings of a team's servers: what cannot be used ends the start with one line that names it."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from child_processes import SERVER_COMMAND, minimal_environment

pytest.importorskip("obstore")
pytest.importorskip("prometheus_client")

from evolink_mcp.app.settings import Settings
from evolink_mcp.app.values import BadSetting
from evolink_mcp.cli.team_checks import team
from evolink_mcp.teams.settings import OAuth

PUBLIC = {"EVOLINK_MCP_PUBLIC_URL": "https://pictures.example.org", "EVOLINK_MCP_SECRET": "s" * 32}
ISSUER = "https://login.example.org/realms/team"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        pytest.param({"OAUTH_ISSUER": "login.example.org", **PUBLIC}, "OAUTH_ISSUER must be an https", id="no address"),
        pytest.param({"OAUTH_ISSUER": "http://login.example.org", **PUBLIC}, "must be an https", id="in clear"),
        pytest.param({"OAUTH_ISSUER": ISSUER}, "needs EVOLINK_MCP_PUBLIC_URL", id="no public address"),
        pytest.param({"OAUTH_AUDIENCE": "x"}, "needs EVOLINK_MCP_OAUTH_ISSUER", id="an audience alone"),
        pytest.param({"OAUTH_SCOPES": "x"}, "needs EVOLINK_MCP_OAUTH_ISSUER", id="scopes alone"),
        pytest.param({"STORE": "ftp://x/y"}, "must begin with s3://", id="no such store"),
        pytest.param({"STORE": "s3://"}, "must be like s3://bucket", id="no bucket"),
        pytest.param({"STORE": "s3://key:word@bucket"}, "credentials go into", id="credentials in it"),
        pytest.param({"STORE": "pictures"}, "absolute path", id="a relative folder"),
        pytest.param({"STORE": "/nowhere/at/all"}, "there is no folder", id="what is not mounted"),
        pytest.param({"STORE": "{tmp_path}"}, "need EVOLINK_MCP_PUBLIC_URL", id="a folder without an address"),
        pytest.param({"STORE_LINK_HOURS": "1000"}, "number from 0 to 168", id="longer than S3 signs"),
        pytest.param({"METRICS_PORT": "0.5"}, "must be a port", id="half a port"),
        pytest.param({"METRICS_PORT": "70000"}, "number from 0 to", id="no such port"),
        pytest.param({"METRICS_TOKEN": "short"}, "32 characters or more", id="a short token"),
        pytest.param({"AUDIT": "perhaps"}, "must be 0 or 1", id="neither yes nor no"),
        pytest.param({"CALLER_KEYS": "sk-1"}, "must be 0 or 1", id="a key in place of a yes"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, said: dict[str, str], words: str) -> None:
    named = {name if name.startswith("EVOLINK") else f"EVOLINK_MCP_{name}": value for name, value in said.items()}
    given = {name: value.replace("{tmp_path}", str(tmp_path)) for name, value in named.items()}
    with pytest.raises(BadSetting, match=words) as refused:
        Settings.from_environment(given)
    assert "key:word" not in str(refused.value)


def test_what_an_owner_may_say_is_read(tmp_path: Path) -> None:
    said = {**PUBLIC, "EVOLINK_MCP_OAUTH_ISSUER": ISSUER, "EVOLINK_MCP_OAUTH_SCOPES": "buy, look",
            "EVOLINK_MCP_STORE": str(tmp_path), "EVOLINK_MCP_STORE_LINK_HOURS": "2", "EVOLINK_MCP_METRICS_PORT": "9100",
            "EVOLINK_MCP_METRICS_TOKEN": "m" * 32, "EVOLINK_MCP_AUDIT": "1", "EVOLINK_MCP_CALLER_KEYS": "yes"}  # fmt: skip
    team = Settings.from_environment(said).team
    assert team.oauth == OAuth(ISSUER, "https://pictures.example.org/mcp", ("buy", "look"))
    assert (team.store, team.store_link_hours, team.metrics_port) == (str(tmp_path), 2, 9100)
    assert (team.audit, team.caller_keys) == (True, True)
    assert "m" * 32 not in repr(team)
    assert Settings.from_environment({"EVOLINK_MCP_STORE": "s3://bucket/a/b"}).team.store == "s3://bucket/a/b"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("command", "said", "words"),
    [
        pytest.param(["http"], {"EVOLINK_MCP_CALLER_KEYS": "1"}, "needs EVOLINK_MCP_TOKENS_FILE", id="keys of anybody"),
        pytest.param(["http", "--host", "0.0.0.0"], {}, "reachable from other machines", id="nobody guards it"),
        pytest.param(["sse"], {"EVOLINK_MCP_TOKENS_FILE": "/nowhere.toml"}, "cannot be read", id="no tokens"),
    ],
)
async def test_settings_that_do_not_fit_end_the_start_with_one_line(
    tmp_path: Path, command: list[str], said: dict[str, str], words: str
) -> None:
    with anyio.fail_after(300):
        run = await anyio.run_process(
            [*SERVER_COMMAND, *command], env=minimal_environment(tmp_path, **said), check=False
        )
    lines = run.stderr.decode().splitlines()
    assert (run.returncode, len(lines), words in lines[0], run.stdout) == (2, 1, True, b"")


# --- what doctor finds about them ---


async def findings(**said: str) -> list[tuple[str, str]]:
    return [(found.subject, found.verdict) for found in await team(Settings.from_environment(said))]


@pytest.mark.anyio
async def test_doctor_tries_the_store_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    (folder := tmp_path / "store").mkdir()
    said = {**PUBLIC, "EVOLINK_MCP_STORE": str(folder)}
    assert await findings(**said) == [("store", "ok")]
    assert list(folder.iterdir()) == []
    settings = Settings.from_environment(said)
    folder.rmdir()
    folder.write_text("no folder any more")
    (found,) = await team(settings)
    assert (found.verdict, str(folder) in found.words) == ("broken", False)


@pytest.mark.anyio
async def test_doctor_reads_tokens_and_issuer(tmp_path: Path) -> None:
    (file := tmp_path / "tokens.toml").write_text("[[token]]\nname = 'anna'\n")
    assert await findings(EVOLINK_MCP_TOKENS_FILE=str(file)) == [("tokens", "broken")]
    file.write_text(f"[[token]]\nname = 'anna'\nsha256 = '{'0' * 64}'\n")
    assert await findings(EVOLINK_MCP_TOKENS_FILE=str(file)) == [("tokens", "ok")]
    nobody = {**PUBLIC, "EVOLINK_MCP_OAUTH_ISSUER": "http://127.0.0.1:9"}
    assert await findings(**nobody) == [("issuer", "broken")]
    assert await findings() == []
