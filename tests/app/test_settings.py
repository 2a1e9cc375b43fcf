"""Settings are read from the environment in the forms that people, shells and MCP bundles write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evolink_mcp.app.settings import BadSetting, Settings

KEY = "sk-canary-0123456789abcdef"


def settings(**environ: str) -> Settings:
    return Settings.from_environment(environ)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty home folder. The working directory is beside it."""
    folder = tmp_path / "home"
    folder.mkdir()
    working_directory = tmp_path / "work"
    working_directory.mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(folder))
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_PICTURES_DIR", "XDG_DESKTOP_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(working_directory)
    return folder


@pytest.mark.parametrize("name", Settings.variables())
@pytest.mark.parametrize(
    "value",
    [
        pytest.param("", id="empty"),
        pytest.param(" \t\n", id="blank"),
        pytest.param("${user_config.something}", id="empty field of a bundle"),
        pytest.param("${EVOLINK_SETTING}", id="unset variable of an MCP host"),
        pytest.param("${env:EVOLINK_SETTING}", id="unset variable of another MCP host"),
        pytest.param(" ${input:evolink} ", id="blanks around it"),
    ],
)
def test_blank_values_and_placeholders_count_as_unset(home: Path, name: str, value: str) -> None:
    assert settings(**{name: value}) == settings()


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        pytest.param("${HOME}/Pictures/EvoLink", "Pictures/EvoLink", id="default of a bundle"),
        pytest.param("~/Pictures/EvoLink", "Pictures/EvoLink", id="tilde"),
        pytest.param("  ~/a b  ", "a b", id="blanks around and inside"),
        pytest.param("${DESKTOP}/x", "Desktop/x", id="desktop"),
        pytest.param("${DOCUMENTS}/x", "Documents/x", id="documents"),
        pytest.param("${PICTURES}/x", "Pictures/x", id="pictures"),
    ],
)
def test_tilde_and_bundle_placeholders_in_folders_are_replaced(home: Path, text: str, folder: str) -> None:
    """Bundles insert default values after they replaced placeholders, so a default still contains ${HOME}."""
    assert settings(EVOLINK_MCP_OUTPUT_DIR=text).folders.output == home / folder


@pytest.mark.parametrize("name", ["EVOLINK_MCP_DATA_DIR", "EVOLINK_MCP_OUTPUT_DIR", "EVOLINK_MCP_ALLOWED_DIRS"])
@pytest.mark.parametrize("value", ["journal", "./journal", "../journal", '"journal"'])
def test_a_relative_folder_is_refused(home: Path, name: str, value: str) -> None:
    """A relative folder would depend on the working directory that the MCP host chose."""
    with pytest.raises(BadSetting, match=f"{name} must be an absolute path"):
        settings(**{name: value})


@pytest.mark.parametrize("quote", ['"', "'"])
def test_quotes_around_a_value_are_removed(home: Path, quote: str) -> None:
    values = settings(
        EVOLINK_MCP_OUTPUT_DIR=f"{quote}{home}/pictures{quote}",
        EVOLINK_MCP_WAIT_SECONDS=f"{quote}7{quote}",
        EVOLINK_MCP_ALLOWED_DIRS=f"{quote}{home}/a b{quote}{os.pathsep}{home}/c",
        EVOLINK_API_KEY=f"{quote}{KEY}{quote}",
    )
    assert values.key is not None
    assert values.key.get_secret_value() == KEY
    assert values.folders.output == home / "pictures"
    assert set(values.folders.allowed) >= {home / "a b", home / "c"}
    assert values.wait_s == 7


@pytest.mark.parametrize("quote", ['"', "'"])
def test_quotes_around_the_path_of_a_key_file_are_removed(home: Path, quote: str) -> None:
    (home / "key").write_text(f"{quote}{KEY}{quote}\n")
    values = settings(
        EVOLINK_API_KEY=f"{quote}${{EVOLINK_KEY}}{quote}", EVOLINK_API_KEY_FILE=f"{quote}{home}/key{quote}"
    )
    assert values.key is not None
    assert values.key.get_secret_value() == KEY


def test_folders_separated_by_commas_are_refused_unless_the_folder_exists(home: Path) -> None:
    with pytest.raises(BadSetting, match="separates its folders by"):
        settings(EVOLINK_MCP_ALLOWED_DIRS=f"{home}/a,{home}/b")
    (home / "a,b").mkdir()
    assert home / "a,b" in settings(EVOLINK_MCP_ALLOWED_DIRS=f"{home}/a,b").folders.allowed


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        pytest.param("EVOLINK_MCP_OUTPUT_DIR", "${workspaceFolder}/out", "${work", id="unknown placeholder"),
        pytest.param("EVOLINK_MCP_OUTPUT_DIR", "~nobody-of-that-name/x", "home folder", id="unknown user"),
        pytest.param("EVOLINK_BASE_URL", "http://api.evolink.ai", "https", id="plain http"),
        pytest.param("EVOLINK_BASE_URL", "https://user:secret@api.evolink.ai", "user name", id="user in the URL"),
        pytest.param("EVOLINK_BASE_URL", "https://", "https", id="no hostname"),
        pytest.param("EVOLINK_BASE_URL", "http://[::1", "https", id="open bracket"),
        pytest.param("EVOLINK_BASE_URL", "https://api.evolink.ai:99999", "https", id="invalid port"),
        pytest.param("EVOLINK_FILES_BASE_URL", "ftp://files-api.evolink.ai", "https", id="other scheme"),
        pytest.param("EVOLINK_SIZE_RULE", "golden", "anchor-edge", id="unknown rule"),
        pytest.param("EVOLINK_MCP_WAIT_SECONDS", "-1", "0 to 900", id="negative wait"),
        pytest.param("EVOLINK_MCP_WAIT_SECONDS", "901", "0 to 900", id="wait too long"),
        pytest.param("EVOLINK_MCP_WAIT_SECONDS", "nan", "0 to 900", id="not a number"),
        pytest.param("EVOLINK_MCP_MAX_CREDITS_PER_DAY", "ten", "number", id="word"),
        pytest.param("EVOLINK_MCP_MAX_CREDITS_PER_CALL", "inf", "number", id="infinite"),
        pytest.param("EVOLINK_MCP_PREVIEW", "big", "auto, on, off", id="unknown preview"),
        pytest.param("EVOLINK_MCP_PREVIEW", "63", "64 to 2048", id="preview too small"),
        pytest.param("EVOLINK_MCP_PREVIEW", "9" * 5000, "64 to 2048", id="preview too large"),
        pytest.param("EVOLINK_MCP_RESOURCE_LINKS", "maybe", "0 or 1", id="no switch"),
        pytest.param("EVOLINK_MCP_TOOLS", "make_coffee", "make_coffee", id="unknown tool"),
        pytest.param("EVOLINK_MCP_CALLBACK_HOSTS", "https://hooks.example.com", "hooks.example.com", id="URL as host"),
    ],
)
def test_the_message_about_an_invalid_value_names_the_variable(home: Path, name: str, value: str, message: str) -> None:
    with pytest.raises(BadSetting) as refusal:
        settings(**{name: value})
    assert str(refusal.value).startswith(name)
    assert message in str(refusal.value)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        pytest.param("sk-...", "example", id="example"),
        pytest.param("sk-ab cdefgh", "visible ASCII", id="blank inside"),
        pytest.param("sk-short", None, id="shortest"),
        pytest.param("sk-shor", "8 to 512", id="too short"),
        pytest.param("k" * 513, "8 to 512", id="too long"),
        pytest.param("sk-ключ-ключ", "visible ASCII", id="not ASCII"),
        pytest.param(f'"{KEY}', "quotes", id="one quote"),
        pytest.param(f'"Bearer {KEY}"', "Bearer", id="with Bearer in quotes"),
        pytest.param(f"Bearer {KEY}", "Bearer", id="with Bearer"),
        pytest.param("a${user_config.api_key}b", "${...}", id="with a placeholder"),
        pytest.param(f" {KEY}\n", None, id="blanks around it"),
    ],
)
def test_an_unusable_key_is_explained_and_never_shown(home: Path, value: str, problem: str | None) -> None:
    """The server starts nevertheless. Paid tools report the problem."""
    values = settings(EVOLINK_API_KEY=value)
    assert (values.key is None) == (problem is not None)
    assert (problem or "") in (values.key_problem or "")
    assert value.strip() not in repr(values) or value == "sk-..."


def test_the_key_is_not_in_the_printed_settings(home: Path) -> None:
    values = settings(EVOLINK_API_KEY=KEY)
    assert values.key is not None
    assert values.key.get_secret_value() == KEY
    assert KEY not in f"{values!r} {values}"


def test_the_working_directory_is_allowed_unless_it_contains_the_home_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Desktop applications start servers in / or in the home folder."""
    assert settings().folders.allowed[1:] == (home.parent / "work",)
    for folder in (home, home.parent, Path(home.anchor)):
        monkeypatch.chdir(folder)
        assert settings().folders.allowed == (settings().folders.output,)


def test_allowed_folders_replace_the_working_directory(home: Path) -> None:
    text = os.pathsep.join([str(home / "a"), " ", "${user_config.reference_dir}", "${HOME}/b", "~/a"])
    values = settings(EVOLINK_MCP_ALLOWED_DIRS=text, EVOLINK_MCP_OUTPUT_DIR="~/out")
    assert values.folders.allowed == (home / "out", home / "a", home / "b")


def test_another_api_also_serves_files(home: Path) -> None:
    """The key must not go to EvoLink's file API if only the other base URL was changed."""
    values = settings(EVOLINK_BASE_URL="http://127.0.0.1:8765/")
    assert (values.base_url, values.files_base_url) == ("http://127.0.0.1:8765",) * 2


def test_a_host_that_is_not_evolinks_is_reported(home: Path) -> None:
    assert settings().foreign_hosts == settings(EVOLINK_BASE_URL="http://localhost:1").foreign_hosts == []
    (warning,) = settings(EVOLINK_FILES_BASE_URL="https://evolink.ai.example.com").foreign_hosts
    assert warning.startswith("EVOLINK_FILES_BASE_URL sends your API key to evolink.ai.example.com")


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_a_switch_accepts_the_usual_words(home: Path, value: str) -> None:
    assert settings(EVOLINK_MCP_RESOURCE_LINKS=value).has_resource_links
    assert not settings(EVOLINK_MCP_RESOURCE_LINKS="off").has_resource_links


def test_a_wait_of_0_s_differs_from_an_unset_wait(home: Path) -> None:
    assert settings(EVOLINK_MCP_WAIT_SECONDS="0").wait_s == 0
    assert settings().wait_s is None


def test_the_spending_limits_become_the_budget(home: Path) -> None:
    budget = settings(
        EVOLINK_MCP_MAX_CREDITS_PER_CALL="1", EVOLINK_MCP_MAX_CREDITS_PER_DAY="2.5", EVOLINK_MCP_CONFIRM_ABOVE="0"
    ).spending_limits
    assert (budget.per_call, budget.per_day, budget.confirm_above, budget.running) == (1, 2.5, 0, None)


def test_unknown_variables_are_listed_with_the_most_similar_setting() -> None:
    environ = {"EVOLINK_API_KEY": KEY, "EVOLINK_MCP_OUTPUTDIR": "x", "EVOLINK_ZZZZZZZZ": "y", "PATH": "z"}
    assert Settings.unknown_variables(environ) == {
        "EVOLINK_MCP_OUTPUTDIR": "EVOLINK_MCP_OUTPUT_DIR",
        "EVOLINK_ZZZZZZZZ": None,
    }
