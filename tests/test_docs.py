"""Compare README and the other documents with the code."""

from __future__ import annotations

import base64
import json
import os
import re
import runpy
import tomllib
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qsl, urlsplit

import pytest
from conftest import World
from test_architecture import ORDER, PACKAGES

from evolink_mcp import __version__
from evolink_mcp.api.costs import output_tokens
from evolink_mcp.api.models import TYPICAL_S
from evolink_mcp.api.sizes import Size
from evolink_mcp.app.settings import Setting, Settings
from evolink_mcp.journal.entry import Phase
from evolink_mcp.studio.events import Event
from evolink_mcp.studio.jobs import JobState
from evolink_mcp.teams.settings import TeamSettings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEAMS = (ROOT / "docs" / "teams.md").read_text(encoding="utf-8")


def between(mark: str, text: str = README) -> str:
    return text.split(f"<!-- {mark}:begin -->\n")[1].split(f"<!-- {mark}:end -->")[0]


PERSONAL_SETTINGS = Settings.table()
TEAM_SETTINGS = {name: entry for name, entry in TeamSettings.table().items() if name not in PERSONAL_SETTINGS}


@pytest.mark.parametrize(
    ("document", "settings"),
    [
        pytest.param("README.md", PERSONAL_SETTINGS, id="README"),
        pytest.param("docs/teams.md", TEAM_SETTINGS, id="teams"),
    ],
)
def test_a_settings_table_matches_the_settings(document: str, settings: dict[str, Setting]) -> None:
    rows = [f"| `{entry.variable}` | {entry.default_text} | {entry.description} |" for entry in settings.values()]
    table = "\n".join(["| Variable | Default | Description |", "|---|---|---|", *rows]) + "\n"
    text = README if document == "README.md" else TEAMS
    if os.environ.get("UPDATE_DOCS"):
        begin, end = "<!-- settings:begin -->\n", "<!-- settings:end -->"
        updated_text = text.replace(f"{begin}{between('settings', text)}{end}", f"{begin}{table}{end}")
        (ROOT / document).write_text(updated_text, encoding="utf-8")
    assert between("settings", text) == table


DOCUMENTS = [path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")) if path.name != "CHANGELOG.md"]


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in DOCUMENTS])
def test_every_setting_that_a_document_names_exists(path: Path) -> None:
    names = set(re.findall(r"\bEVOLINK_[A-Z_]*[A-Z]\b(?!_?\*)", path.read_text(encoding="utf-8")))
    known = {*TeamSettings.variables(), *TeamSettings.file_variables()}
    assert {name for name in names if not name.startswith("EVOLINK_TEST_")} <= known


@pytest.mark.anyio
async def test_the_tools_table_names_every_tool(world: World) -> None:
    async with world.client() as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (\w+) \|$", between("tools"), re.MULTILINE))
    assert list(rows) == list(tools)
    assert {name for name, cost in rows.items() if cost == "credits"} == {
        name for name, tool in tools.items() if not tool.annotations.read_only_hint and tool.annotations.open_world_hint
    }


def test_the_architecture_table_lists_every_package_in_order() -> None:
    table_names = re.findall(
        r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*) \|", README.split("## Architecture")[1], re.MULTILINE))
    )
    assert table_names == [*(name for name in ORDER[:-1] if "." not in name), *PACKAGES]


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def first_cells(heading: str) -> list[str]:
    """Return the first column of the table under a heading of docs/architecture.md."""
    section = ARCHITECTURE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


def test_every_module_of_the_architecture_page_exists() -> None:
    names = set(re.findall(rf"`((?:{'|'.join(PACKAGES)})/\w+)`", ARCHITECTURE))
    assert len(names) > 20
    assert [name for name in names if not (ROOT / "evolink_mcp" / f"{name}.py").is_file()] == []


def test_the_architecture_page_lists_all_phases_states_and_events() -> None:
    assert first_cells("States of an entry") == [phase.value for phase in Phase]
    assert first_cells("States of a job") == [state.value for state in JobState]
    assert first_cells("Events") == [event.__name__ for event in get_args(Event)]


def test_every_link_to_a_file_of_the_repository_works() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]:
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8"))
        assert [link for link in links if not (document.parent / link).exists()] == [], document.name


def test_the_one_click_links_install_the_configuration_of_their_section() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")

    def config_with_uv(section: str) -> Any:
        with_uv = text.split(f"\n## {section}\n")[1].split("With uv:")[1]
        return json.loads(with_uv.split("```json\n")[1].split("```")[0])

    def query_of(link_text: str) -> dict[str, str]:
        (url,) = re.findall(rf"\[{link_text}\]\(([^)]+)\)", text)
        return dict(parse_qsl(urlsplit(url).query, strict_parsing=True))

    cursor = query_of("Add to Cursor")
    assert {cursor["name"]: json.loads(base64.b64decode(cursor["config"]))} == config_with_uv("Cursor")["mcpServers"]
    vs_code = query_of("Add to VS Code")
    written = config_with_uv("VS Code")
    assert json.loads(vs_code["inputs"]) == written["inputs"]
    assert {vs_code["name"]: {"type": "stdio", **json.loads(vs_code["config"])}} == written["servers"]


def test_readme_is_short_and_the_changelog_has_the_version() -> None:
    assert len(README.splitlines()) <= 200
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_tree_in_the_docstring_of_errors_has_every_class() -> None:
    from evolink_mcp import errors

    tree_names = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    classes = [
        name
        for name, member in vars(errors).items()
        if isinstance(member, type) and issubclass(member, errors.EvolinkError)
    ]
    assert sorted(tree_names) == sorted(set(classes) - {"EvolinkError"})


def test_every_promise_of_security_names_existing_tests() -> None:
    security = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    table = security.partition("## Which test shows it")[2].partition("\n## ")[0]
    test_files = re.findall(r"`((?:tests|benchmarks)/[^`]+)`", table)
    assert len(test_files) > 15
    assert [name for name in test_files if not (ROOT / name).is_file()] == []


def test_the_image_of_sizes_matches_the_computed_sizes() -> None:
    """`python docs/make_sizes.py` updates the image."""
    docs = ROOT / "docs"
    image = runpy.run_path(str(docs / "make_sizes.py"))["draw"]()
    assert (docs / "sizes.svg").read_text("utf-8") == image


def test_the_prices_and_times_for_designers_are_correct() -> None:
    page = (ROOT / "docs" / "designers.md").read_text("utf-8")
    square = Size(1024, 1024)
    low, medium, high = (output_tokens(square, quality) for quality in ("low", "medium", "high"))
    assert "low costs about a ninth of medium, high four times as much" in page
    assert (round(medium / low), round(high / medium)) == (9, 4)
    assert "in about a fifth of the time" in page
    assert round(TYPICAL_S["medium"] / TYPICAL_S["low"]) == 5


def test_every_test_that_windows_skips_exists() -> None:
    """A renamed test would run under Windows again."""
    reasons = tomllib.loads((ROOT / "tests" / "windows" / "lacking.toml").read_text("utf-8"))
    missing: list[str] = []
    for test in (test for tests in reasons.values() for test in tests):
        file, _, name = test.partition("::")
        function = name.partition("[")[0]
        if not re.search(rf"^(async )?def {function}", (ROOT / file).read_text("utf-8"), re.MULTILINE):
            missing.append(test)
    assert missing == []
