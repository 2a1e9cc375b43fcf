"""The settings of teams. One line names an invalid one and ends the start."""

from __future__ import annotations

import shutil
from pathlib import Path

import anyio
import pytest
from child_processes import SERVER_COMMAND, minimal_environment

pytest.importorskip("obstore")
pytest.importorskip("prometheus_client")

from evolink_mcp.app.settings import BadSetting
from evolink_mcp.cli.team_checks import check_team
from evolink_mcp.teams.object_store import MARKER
from evolink_mcp.teams.reloaded_file import is_mount_of_one_file
from evolink_mcp.teams.settings import OAuth, TeamSettings

SECRET = "s" * 32
PUBLIC = {"EVOLINK_MCP_PUBLIC_URL": "https://pictures.example.org", "EVOLINK_MCP_SECRET": SECRET}
ISSUER = "https://login.example.org/realms/team"


@pytest.mark.parametrize("name", TeamSettings.variables())
@pytest.mark.parametrize("value", ["", " ", "${user_config.something}"])
def test_blank_values_and_placeholders_count_as_unset(name: str, value: str) -> None:
    assert TeamSettings.from_environment({name: value}) == TeamSettings.from_environment({})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        pytest.param({"OAUTH_ISSUER": "login.example.org", **PUBLIC}, "OAUTH_ISSUER must be an https", id="no scheme"),
        pytest.param({"OAUTH_ISSUER": "http://login.example.org", **PUBLIC}, "must be an https", id="issuer over http"),
        pytest.param({"OAUTH_ISSUER": ISSUER}, "OAUTH_ISSUER needs EVOLINK_MCP_PUBLIC_URL", id="no public URL"),
        pytest.param({"OAUTH_AUDIENCE": "x"}, "needs EVOLINK_MCP_OAUTH_ISSUER", id="audience without issuer"),
        pytest.param({"OAUTH_SCOPES": "x"}, "needs EVOLINK_MCP_OAUTH_ISSUER", id="scopes without issuer"),
        pytest.param(
            {"PUBLIC_URL": "https://x.example.org"}, "needs EVOLINK_MCP_SECRET", id="public URL without secret"
        ),
        pytest.param({"SECRET": "short-word"}, "EVOLINK_MCP_SECRET must have 32 characters", id="short secret"),
        pytest.param({"STORE": "ftp://x/y"}, "must begin with s3://", id="unknown object store"),
        pytest.param({"STORE": "s3://"}, "must be like s3://bucket", id="no bucket"),
        pytest.param({"STORE": "s3://key:word@bucket"}, "set credentials in", id="credentials in the URL"),
        pytest.param({"STORE": "pictures"}, "absolute path", id="relative folder"),
        pytest.param({"STORE": "/nowhere/at/all"}, "names a missing folder", id="missing folder"),
        pytest.param({"STORE": "{tmp_path}"}, "need EVOLINK_MCP_PUBLIC_URL", id="folder without public URL"),
        pytest.param({"STORE_LINK_HOURS": "1000"}, "number from 0 to 168", id="longer than S3 allows"),
        pytest.param({"METRICS_PORT": "0.5"}, "must be a port", id="fraction of a port"),
        pytest.param({"METRICS_PORT": "0"}, "must be a port", id="port 0"),
        pytest.param({"METRICS_PORT": "70000"}, "number from 0 to", id="port too large"),
        pytest.param({"METRICS_TOKEN": "short-word"}, "32 characters or more", id="short token"),
        pytest.param({"AUDIT": "perhaps"}, "must be 0 or 1", id="no switch"),
        pytest.param({"CALLER_KEYS": "sk-1"}, "must be 0 or 1", id="key instead of a switch"),
    ],
)
def test_the_message_about_an_invalid_value_names_the_variable(
    tmp_path: Path, environ: dict[str, str], message: str
) -> None:
    full_names = {
        name if name.startswith("EVOLINK") else f"EVOLINK_MCP_{name}": value for name, value in environ.items()
    }
    with pytest.raises(BadSetting, match=message) as refusal:
        TeamSettings.from_environment({k: v.replace("{tmp_path}", str(tmp_path)) for k, v in full_names.items()})
    assert "key:word" not in str(refusal.value)
    assert "short-word" not in str(refusal.value)


def test_the_settings_of_teams_are_read(tmp_path: Path) -> None:
    settings = TeamSettings.from_environment(
        {
            **PUBLIC,
            "EVOLINK_MCP_OAUTH_ISSUER": ISSUER,
            "EVOLINK_MCP_OAUTH_SCOPES": "buy, look",
            "EVOLINK_MCP_STORE": str(tmp_path),
            "EVOLINK_MCP_STORE_LINK_HOURS": "2",
            "EVOLINK_MCP_METRICS_PORT": "9100",
            "EVOLINK_MCP_METRICS_TOKEN": "m" * 32,
            "EVOLINK_MCP_AUDIT": "1",
            "EVOLINK_MCP_CALLER_KEYS": "yes",
        }
    )
    assert settings.oauth == OAuth(ISSUER, "https://pictures.example.org/mcp", ("buy", "look"))
    assert (settings.store, settings.store_link_hours, settings.metrics_port) == (str(tmp_path), 2, 9100)
    assert (settings.has_audit_log, settings.has_caller_keys) == (True, True)
    assert TeamSettings.from_environment({"EVOLINK_MCP_STORE": "s3://bucket/a/b"}).store == "s3://bucket/a/b"


SECRETS = {
    "EVOLINK_API_KEY": "sk-canary-0123456789abcdef",
    "EVOLINK_MCP_SECRET": SECRET,
    "EVOLINK_MCP_DATABASE_URL": "postgresql://team:canary-word@db.example.org/evolink",
    "EVOLINK_MCP_METRICS_TOKEN": "m" * 32,
}


def test_no_secret_is_in_the_printed_settings() -> None:
    assert {entry.variable for entry in TeamSettings.table().values() if entry.is_secret} == set(SECRETS)
    text = repr(TeamSettings.from_environment(SECRETS))
    assert [value for value in SECRETS.values() if value in text] == []


def test_each_secret_can_be_in_a_file(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    for variable, value in SECRETS.items():
        file = tmp_path / variable
        file.write_text(f"{value}\n")
        environ[f"{variable}_FILE"] = str(file)
    assert TeamSettings.from_environment(environ) == TeamSettings.from_environment(SECRETS)
    assert TeamSettings.unknown_variables(environ) == {}
    assert "EVOLINK_MCP_PROFILE_FILE" in TeamSettings.unknown_variables({"EVOLINK_MCP_PROFILE_FILE": "x"})


@pytest.mark.parametrize("variable", SECRETS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "cannot be read", id="missing"),
        pytest.param(b" \n", "an empty file", id="empty"),
        pytest.param(b"canary\xff", "not text", id="not UTF-8"),
    ],
)
def test_an_unusable_file_with_a_secret_ends_the_start(
    tmp_path: Path, variable: str, content: bytes | None, message: str
) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadSetting, match=f"{variable}_FILE names .*{message}") as refusal:
        TeamSettings.from_environment({**SECRETS, variable: "", f"{variable}_FILE": str(file)})
    assert "canary" not in str(refusal.value)


@pytest.mark.parametrize("variable", SECRETS)
def test_a_secret_and_its_file_must_not_be_set_together(tmp_path: Path, variable: str) -> None:
    (tmp_path / "secret").write_text("x" * 40)
    with pytest.raises(BadSetting, match="are both set"):
        TeamSettings.from_environment({**SECRETS, f"{variable}_FILE": str(tmp_path / "secret")})


def test_the_team_has_one_secret_or_a_new_and_an_old_one() -> None:
    new, old = "n" * 32, "o" * 32
    assert TeamSettings.from_environment({"EVOLINK_MCP_SECRET": f"{new} {old}"}).secrets == (new, old)
    for text in (f"{new} short", f"{new} {old} {new}"):
        with pytest.raises(BadSetting, match="EVOLINK_MCP_SECRET must have"):
            TeamSettings.from_environment({"EVOLINK_MCP_SECRET": text})


def test_a_file_that_is_mounted_alone_is_recognised(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw - ext4 /dev/a rw\n"
        "30 22 8:1 /a /etc/the\\040team/tokens.toml ro - ext4 /dev/a rw\n31 22 8:1 /b /team ro - ext4 /dev/a rw\n"
    )
    assert is_mount_of_one_file(Path("/etc/the team/tokens.toml"), mounts)
    assert not is_mount_of_one_file(Path("/team/tokens.toml"), mounts)
    assert not is_mount_of_one_file(Path("/team/tokens.toml"), tmp_path / "missing")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("command", "environ", "message"),
    [
        pytest.param(
            ["http"], {"EVOLINK_MCP_CALLER_KEYS": "1"}, "needs EVOLINK_MCP_TOKENS_FILE", id="keys of unknown callers"
        ),
        pytest.param(["http", "--host", "0.0.0.0"], {}, "reachable from other machines", id="no authentication"),
        pytest.param(["sse"], {"EVOLINK_MCP_TOKENS_FILE": "/nowhere.toml"}, "cannot be read", id="no tokens file"),
    ],
)
async def test_settings_that_contradict_each_other_end_the_start_with_one_line(
    tmp_path: Path, command: list[str], environ: dict[str, str], message: str
) -> None:
    with anyio.fail_after(300):
        result = await anyio.run_process(
            [*SERVER_COMMAND, *command], env=minimal_environment(tmp_path, **environ), check=False
        )
    lines = result.stderr.decode().splitlines()
    assert (result.returncode, len(lines), message in lines[0], result.stdout) == (2, 1, True, b"")


# --- the checks of doctor ---


async def verdicts(**environ: str) -> list[tuple[str, str]]:
    return [(finding.subject, finding.verdict) for finding in await check_team(TeamSettings.from_environment(environ))]


@pytest.mark.anyio
async def test_doctor_tests_the_object_store_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    environ = {**PUBLIC, "EVOLINK_MCP_STORE": str(folder)}
    # Without its marker it may be the empty mount point of a share.
    assert await verdicts(**environ) == [("store", "warning")]
    assert list(folder.iterdir()) == []
    (folder / MARKER).write_text("0" * 32)
    assert await verdicts(**environ) == [("store", "ok")]
    assert list(folder.iterdir()) == [folder / MARKER]
    settings = TeamSettings.from_environment(environ)
    shutil.rmtree(folder)
    folder.write_text("a file instead of the folder")
    (finding,) = await check_team(settings)
    assert (finding.verdict, str(folder) in finding.words) == ("broken", False)


@pytest.mark.anyio
async def test_doctor_reads_the_tokens_file_and_the_issuer(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text("[[token]]\nname = 'anna'\n")
    assert await verdicts(EVOLINK_MCP_TOKENS_FILE=str(file)) == [("tokens", "broken")]
    file.write_text(f"[[token]]\nname = 'anna'\nsha256 = '{'0' * 64}'\n")
    assert await verdicts(EVOLINK_MCP_TOKENS_FILE=str(file)) == [("tokens", "ok")]
    unreachable = {**PUBLIC, "EVOLINK_MCP_OAUTH_ISSUER": "http://127.0.0.1:9"}
    assert await verdicts(**unreachable) == [("issuer", "broken")]
    assert await verdicts(**unreachable, EVOLINK_MCP_OAUTH_AUDIENCE="an audience that is no URL") == [
        ("issuer", "broken")
    ]
    assert await verdicts() == []


@pytest.mark.parametrize(
    "address",
    [
        pytest.param("team:canary@canary@db.example.com/evolink", id="an @ in the password"),
        pytest.param("team:canary/canary@db.example.com/evolink", id="a slash in the password"),
        pytest.param("team:canary?canary@db.example.com/evolink", id="a question mark in the password"),
        pytest.param("team:canary#canary@db.example.com/evolink", id="a hash in the password"),
        pytest.param("team:canary%word@db.example.com/evolink", id="a percent sign in the password"),
        pytest.param("team:canary/@canary@db.example.com/evolink", id="a slash and an @"),
        pytest.param("team@canary:canary@db.example.com/evolink", id="an @ in the user name"),
        pytest.param("team:canary@[canary@db.example.com/evolink", id="a bracket"),
        pytest.param("team:canary/evolink", id="no host, so that the password is the port"),
        pytest.param("team:canary:5432/evolink", id="no @"),
        pytest.param("team:1@db.example.com:canary/evolink", id="a word for the port"),
        pytest.param("db.example.com/evolink?password=canary@canary", id="an @ in a query"),
        pytest.param("db.example.com?user=canary@team", id="an @ in a query without a path"),
    ],
)
@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_a_database_whose_password_could_be_taken_for_a_host_is_refused_and_not_shown(
    scheme: str, address: str
) -> None:
    with pytest.raises(BadSetting) as refusal:
        TeamSettings.from_environment(
            {"EVOLINK_MCP_DATABASE_URL": f"{scheme}://{address}", "EVOLINK_MCP_SECRET": SECRET}
        )
    text = str(refusal.value)
    assert text.startswith("EVOLINK_MCP_DATABASE_URL is ambiguous: percent-encode the user name and the password")
    assert len(text.splitlines()) == 1
    assert [part for part in ("canary", "team", "example", "5432") if part in text] == []


@pytest.mark.parametrize(
    "address",
    [
        "team:p%40ss%2Fw%3Aord%25@db.example.com:5432/evolink?sslmode=require",
        "team:pa:ss[w]ord!$&'()*+,;=@one.example.com:5432,two.example.com/evolink?target_session_attrs=read-write",
        "team@[2001:db8::1]:5432/evolink",
        "team@%2Fvar%2Frun%2Fpostgresql/evolink",
        "team@/evolink?host=/var/run/postgresql&port=5433",
        "/evolink",
        "",
    ],
)
def test_an_unambiguous_address_of_a_database_is_accepted_unchanged(address: str) -> None:
    pytest.importorskip("psycopg")
    url = f"postgresql://{address}"
    settings = TeamSettings.from_environment({"EVOLINK_MCP_DATABASE_URL": url, "EVOLINK_MCP_SECRET": SECRET})
    assert settings.database_url == url
