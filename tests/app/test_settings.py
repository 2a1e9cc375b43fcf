"""The environment, as people, shells and bundles write it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evolink_mcp.app.settings import VARIABLES, Settings, unknown_variables
from evolink_mcp.app.values import BadSetting

KEY = "sk-canary-0123456789abcdef"


def settings(**said: str) -> Settings:
    return Settings.from_environment(said)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of one's own, with the working folder elsewhere."""
    folder, work = tmp_path / "home", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(folder))
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_PICTURES_DIR", "XDG_DESKTOP_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(work)
    return folder


@pytest.mark.parametrize("name", sorted(VARIABLES))
@pytest.mark.parametrize(
    "value",
    [
        pytest.param("", id="empty"),
        pytest.param(" \t\n", id="blank"),
        pytest.param("${user_config.something}", id="what a bundle passes for an empty field"),
        pytest.param("${EVOLINK_SETTING}", id="what a host passes for an unset variable"),
        pytest.param("${env:EVOLINK_SETTING}", id="what another passes"),
        pytest.param(" ${input:evolink} ", id="with blanks around it"),
    ],
)
def test_blank_values_and_placeholders_count_as_unset(home: Path, name: str, value: str) -> None:
    """A bundle's optional fields arrive as the placeholder itself."""
    assert settings(**{name: value}) == settings()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        pytest.param("${HOME}/Pictures/EvoLink", "Pictures/EvoLink", id="a bundle's default"),
        pytest.param("~/Pictures/EvoLink", "Pictures/EvoLink", id="tilde"),
        pytest.param("  ~/a b  ", "a b", id="blanks around and inside"),
        pytest.param("${DESKTOP}/x", "Desktop/x", id="desktop"),
        pytest.param("${DOCUMENTS}/x", "Documents/x", id="documents"),
        pytest.param("${PICTURES}/x", "Pictures/x", id="pictures"),
    ],
)
def test_folders_are_understood_as_people_and_bundles_write_them(home: Path, written: str, meant: str) -> None:
    """Bundles replace ${HOME} before they insert defaults: a default arrives with it."""
    assert settings(EVOLINK_MCP_OUTPUT_DIR=written).folders.output == home / meant


@pytest.mark.parametrize("name", ["EVOLINK_MCP_DATA_DIR", "EVOLINK_MCP_OUTPUT_DIR", "EVOLINK_MCP_ALLOWED_DIRS"])
@pytest.mark.parametrize("value", ["journal", "./journal", "../journal", '"journal"'])
def test_a_relative_folder_is_refused(home: Path, name: str, value: str) -> None:
    """What it means would depend on where the host starts the server."""
    with pytest.raises(BadSetting, match=f"{name} must be an absolute path"):
        settings(**{name: value})


@pytest.mark.parametrize("quote", ['"', "'"])
def test_quotes_around_a_value_are_taken_off(home: Path, quote: str) -> None:
    folder = f"{quote}{home}/pictures{quote}"
    read = settings(EVOLINK_MCP_OUTPUT_DIR=folder, EVOLINK_MCP_WAIT_SECONDS=f"{quote}7{quote}",
                    EVOLINK_MCP_ALLOWED_DIRS=f"{quote}{home}/a b{quote}{os.pathsep}{home}/c")  # fmt: skip
    assert read.folders.output == home / "pictures"
    assert set(read.folders.allowed) >= {home / "a b", home / "c"}
    assert read.wait_s == 7


def test_folders_separated_by_commas_are_refused_unless_there_is_such_a_folder(home: Path) -> None:
    with pytest.raises(BadSetting, match="separates its folders by"):
        settings(EVOLINK_MCP_ALLOWED_DIRS=f"{home}/a,{home}/b")
    (home / "a,b").mkdir()
    assert home / "a,b" in settings(EVOLINK_MCP_ALLOWED_DIRS=f"{home}/a,b").folders.allowed


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        pytest.param("EVOLINK_MCP_OUTPUT_DIR", "${workspaceFolder}/out", "${work", id="half replaced"),
        pytest.param("EVOLINK_MCP_OUTPUT_DIR", "~nobody-of-that-name/x", "home folder", id="nobody's home"),
        pytest.param("EVOLINK_BASE_URL", "http://api.evolink.ai", "https", id="plain http"),
        pytest.param("EVOLINK_BASE_URL", "https://user:secret@api.evolink.ai", "user name", id="user in the address"),
        pytest.param("EVOLINK_BASE_URL", "https://", "https", id="no host"),
        pytest.param("EVOLINK_BASE_URL", "http://[::1", "https", id="a broken bracket"),
        pytest.param("EVOLINK_BASE_URL", "https://api.evolink.ai:99999", "https", id="a port that is none"),
        pytest.param("EVOLINK_FILES_BASE_URL", "ftp://files-api.evolink.ai", "https", id="another scheme"),
        pytest.param("EVOLINK_SIZE_RULE", "golden", "anchor-edge", id="unknown rule"),
        pytest.param("EVOLINK_MCP_WAIT_SECONDS", "-1", "0 to 900", id="negative wait"),
        pytest.param("EVOLINK_MCP_WAIT_SECONDS", "901", "0 to 900", id="endless wait"),
        pytest.param("EVOLINK_MCP_WAIT_SECONDS", "nan", "0 to 900", id="not a number"),
        pytest.param("EVOLINK_MCP_MAX_CREDITS_PER_DAY", "ten", "number", id="a word"),
        pytest.param("EVOLINK_MCP_MAX_CREDITS_PER_CALL", "inf", "number", id="infinite"),
        pytest.param("EVOLINK_MCP_PREVIEW", "big", "auto, off", id="preview word"),
        pytest.param("EVOLINK_MCP_PREVIEW", "63", "64 to 2048", id="preview too small"),
        pytest.param("EVOLINK_MCP_PREVIEW", "9" * 5000, "64 to 2048", id="preview absurd"),
        pytest.param("EVOLINK_MCP_RESOURCE_LINKS", "maybe", "0 or 1", id="neither yes nor no"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_name(home: Path, name: str, value: str, told: str) -> None:
    with pytest.raises(BadSetting) as refused:
        settings(**{name: value})
    assert name in str(refused.value)
    assert told in str(refused.value)
    assert "secret" not in str(refused.value)


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
    home: Path, scheme: str, address: str
) -> None:
    with pytest.raises(BadSetting) as refused:
        settings(EVOLINK_MCP_DATABASE_URL=f"{scheme}://{address}", EVOLINK_MCP_SECRET="s" * 32)
    text = str(refused.value)
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
def test_an_unambiguous_address_of_a_database_is_taken_as_it_is(home: Path, address: str) -> None:
    pytest.importorskip("psycopg")
    url = f"postgresql://{address}"
    assert settings(EVOLINK_MCP_DATABASE_URL=url, EVOLINK_MCP_SECRET="s" * 32).database_url == url


@pytest.mark.parametrize(
    ("value", "told"),
    [
        pytest.param("sk-...", "example", id="the example's"),
        pytest.param("sk-ab cdefgh", "visible ASCII", id="a blank inside"),
        pytest.param("sk-short", None, id="short enough"),
        pytest.param("sk-shor", "8 to 512", id="too short"),
        pytest.param("k" * 513, "8 to 512", id="too long"),
        pytest.param("sk-ключ-ключ", "visible ASCII", id="not ASCII"),
        pytest.param(f'"{KEY}"', "quotes", id="in quotes"),
        pytest.param(f"Bearer {KEY}", "Bearer", id="with Bearer"),
        pytest.param("a${user_config.api_key}b", "${...}", id="a key that a bundle broke"),
        pytest.param(f" {KEY}\n", None, id="blanks around it"),
    ],
)
def test_a_key_that_is_none_is_explained_and_never_shown(home: Path, value: str, told: str | None) -> None:
    """The server starts all the same: paid tools tell it."""
    found = settings(EVOLINK_API_KEY=value)
    assert (found.key is None) == (told is not None)
    assert (told or "") in (found.key_problem or "")
    assert value.strip() not in repr(found) or value == "sk-..."


def test_the_key_does_not_print_itself(home: Path) -> None:
    found = settings(EVOLINK_API_KEY=KEY)
    assert found.key is not None
    assert found.key.get_secret_value() == KEY
    assert KEY not in f"{found!r} {found}"


def test_the_working_folder_is_allowed_unless_it_is_the_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts with a window start servers in / or the home folder."""
    work = home.parent / "work"
    assert settings().folders.allowed[1:] == (work,)
    for everything in (home, home.parent, Path(home.anchor)):
        monkeypatch.chdir(everything)
        assert settings().folders.allowed == (settings().folders.output,)


def test_allowed_folders_replace_the_working_folder(home: Path) -> None:
    said = os.pathsep.join([str(home / "a"), " ", "${user_config.reference_dir}", "${HOME}/b", "~/a"])
    found = settings(EVOLINK_MCP_ALLOWED_DIRS=said, EVOLINK_MCP_OUTPUT_DIR="~/out")
    assert found.folders.allowed == (home / "out", home / "a", home / "b")
    assert found.allowed_dirs_given


def test_a_stand_in_for_the_api_serves_files_too(home: Path) -> None:
    """A key must not go to the real file API because only the other address was changed."""
    found = settings(EVOLINK_BASE_URL="http://127.0.0.1:8765/")
    assert (found.base_url, found.files_base_url) == ("http://127.0.0.1:8765",) * 2


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_switches_take_the_usual_words(home: Path, value: str) -> None:
    assert settings(EVOLINK_MCP_RESOURCE_LINKS=value).resource_links
    assert not settings(EVOLINK_MCP_RESOURCE_LINKS="off").resource_links


def test_a_wait_of_nothing_is_a_wait(home: Path) -> None:
    assert settings(EVOLINK_MCP_WAIT_SECONDS="0").wait_s == 0
    assert settings().wait_s is None


def test_variables_that_nobody_reads_are_found_with_what_was_meant() -> None:
    said = {"EVOLINK_API_KEY": KEY, "EVOLINK_MCP_OUTPUTDIR": "x", "EVOLINK_ZZZZZZZZ": "y", "PATH": "z"}
    assert unknown_variables(said) == {"EVOLINK_MCP_OUTPUTDIR": "EVOLINK_MCP_OUTPUT_DIR", "EVOLINK_ZZZZZZZZ": None}
