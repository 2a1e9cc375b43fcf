"""Bundle, registry entry, wheel, image, README and documentation agree with each other."""

from __future__ import annotations

import base64
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import World

from evolink_mcp import __version__
from evolink_mcp.app.settings import EXAMPLE_KEY, Settings
from evolink_mcp.cli.arguments import parse_arguments
from evolink_mcp.cli.host_config import host_blocks
from evolink_mcp.teams.settings import TeamSettings

ROOT = Path(__file__).parents[2]
OWNER = "evolink-mcp/evolink-mcp"
NAME = f"io.github.{OWNER}"
SOURCE, PUBLISHED = ("/path/to/evolink-mcp/.venv/bin/evolink-mcp", []), ("uvx", ["evolink-mcp"])
ENV = {"EVOLINK_API_KEY": EXAMPLE_KEY}


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


MANIFEST = json.loads(text("manifest.json"))
SERVER = json.loads(text("server.json"))
PYPROJECT = tomllib.loads(text("pyproject.toml"))
CONFIG = MANIFEST["server"]["mcp_config"]
README, CONFIGURATION = text("README.md"), text("docs/configuration.md")


# --- the bundle ---


def test_all_files_have_the_same_version() -> None:
    (package,) = SERVER["packages"]
    assert {MANIFEST["version"], SERVER["version"], package["version"]} == {__version__}
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", __version__)


@pytest.mark.anyio
async def test_the_manifest_lists_the_tools_with_their_descriptions(world: World) -> None:
    async with world.client() as client:
        tools = (await client.list_tools()).tools
    assert [tool["name"] for tool in MANIFEST["tools"]] == [tool.name for tool in tools]
    for entry, tool in zip(MANIFEST["tools"], tools, strict=True):
        published = " ".join((tool.description or "").split())
        assert published.startswith(entry["description"])
        assert entry["description"].endswith(".")
    assert not MANIFEST["tools_generated"]


def test_every_reference_is_defined_and_every_field_is_used() -> None:
    """The validator accepts an unknown `${user_config.x}`, and the server would get it unchanged."""
    used = set(re.findall(r"\$\{user_config\.(\w+)\}", json.dumps(CONFIG)))
    assert used == set(MANIFEST["user_config"])
    assert set(CONFIG["env"]) <= set(TeamSettings.variables())
    assert set(re.findall(r"\$\{(?!user_config\.)([^}]*)\}", json.dumps(CONFIG))) == {"__dirname"}


def test_the_key_is_secret_and_the_only_required_field() -> None:
    fields = MANIFEST["user_config"]
    assert (fields["api_key"]["sensitive"], fields["api_key"]["required"]) == (True, True)
    assert [name for name, field in fields.items() if field["required"] and name != "api_key"] == []
    assert all(field["description"] and field["title"] for field in fields.values())


def environment_of_bundle(filled_fields: dict[str, Any]) -> dict[str, str]:
    """Return the environment that the bundle's library creates.

    An empty field stays a placeholder, defaults are inserted last, booleans become `true` or `false`.
    """
    values = {
        name: field["default"] for name, field in MANIFEST["user_config"].items() if "default" in field
    } | filled_fields
    env = dict(CONFIG["env"])
    for name, value in values.items():
        word = str(value).lower() if isinstance(value, bool) else str(value)
        env = {variable: template.replace(f"${{user_config.{name}}}", word) for variable, template in env.items()}
    return env


def test_empty_fields_are_unset_and_home_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    empty = Settings.from_environment(environment_of_bundle({}))
    assert (empty, empty.key, empty.key_problem) == (Settings.from_environment({}), None, None)
    filled_fields = {"api_key": "sk-0123456789", "output_dir": "${HOME}/Pictures/EvoLink", "max_credits_per_day": 12.5}
    values = Settings.from_environment(environment_of_bundle(filled_fields))
    assert (values.folders.output, values.spending_limits.per_day) == (tmp_path / "Pictures" / "EvoLink", 12.5)


def test_the_bundle_starts_from_any_folder_in_both_ways_of_hosts(tmp_path: Path) -> None:
    """Some hosts run the arguments with their own uv, others the entry point. `-P` excludes the working folder's modules."""
    assert (MANIFEST["server"]["type"], CONFIG["command"], CONFIG["args"][0]) == ("uv", "uv", "run")
    assert {"--project", "${__dirname}", "--no-dev"} <= set(CONFIG["args"])
    (tmp_path / "mcp.py").write_text("raise SystemExit('a module of the working folder was imported')")
    arguments = CONFIG["args"][CONFIG["args"].index("python") + 1 :]
    for line in (arguments, [str(ROOT / MANIFEST["server"]["entry_point"])]):
        command = [sys.executable, *line, "--version"]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert (run.stdout, run.stderr) == (f"evolink-mcp {__version__}\n", "")


def test_no_module_shadows_the_standard_library() -> None:
    """`uv run evolink_mcp/__main__.py` puts the package folder first on the import path."""
    modules = {path.stem for path in (ROOT / "evolink_mcp").iterdir() if path.suffix == ".py" or path.is_dir()}
    foreign = {re.split(r"[><=]", need)[0].replace("-", "_") for need in PYPROJECT["project"]["dependencies"]}
    assert modules & ((sys.stdlib_module_names | foreign | {"PIL"}) - {"__main__"}) == set()


def test_the_icon_is_a_png_of_512_pixels() -> None:
    from PIL import Image

    with Image.open(ROOT / MANIFEST["icon"]) as icon:
        assert (icon.format, icon.size) == ("PNG", (512, 512))
    assert (ROOT / MANIFEST["icon"]).stat().st_size < 100_000


def test_the_bundle_contains_only_the_needed_files() -> None:
    lines = [line for line in text(".mcpbignore").splitlines() if line and not line.startswith("#")]
    included = {line.removeprefix("!/") for line in lines if line.startswith("!")}
    assert lines[0] == "/*"
    build = {"pyproject.toml", PYPROJECT["project"]["readme"], *PYPROJECT["project"]["license-files"]}
    assert included == {
        "evolink_mcp",
        "manifest.json",
        MANIFEST["icon"],
        "uv.lock",
        *build,
    }  # a lock: in a release only


def test_the_manifest_has_fields_that_its_validator_does_not_check() -> None:
    assert (MANIFEST["manifest_version"], MANIFEST["name"]) == ("0.4", PYPROJECT["project"]["name"])
    assert MANIFEST["compatibility"]["runtimes"]["python"] == PYPROJECT["project"]["requires-python"]
    assert MANIFEST["license"] == PYPROJECT["project"]["license"]
    (policy,) = MANIFEST["privacy_policies"]
    assert (ROOT / policy.removeprefix(f"https://github.com/{OWNER}/blob/main/")).is_file()


# --- registry, wheel, image ---


def test_the_readme_names_the_registry_entry() -> None:
    assert f"<!-- mcp-name: {NAME} -->" in README
    assert SERVER["name"] == NAME
    assert f'io.modelcontextprotocol.server.name="{NAME}"' in text("Dockerfile")


def test_the_registry_entry_fits_its_schema() -> None:
    assert SERVER["$schema"].endswith("/2025-12-11/server.schema.json")
    assert re.fullmatch(r"[a-zA-Z0-9.-]+/[a-zA-Z0-9._-]+", SERVER["name"])
    assert (1 <= len(SERVER["description"]) <= 100, 1 <= len(SERVER["title"]) <= 100) == (True, True)
    (package,) = SERVER["packages"]
    assert set(package) == {
        "registryType", "identifier", "version", "runtimeHint", "transport", "environmentVariables",
    }  # fmt: skip
    assert (package["registryType"], package["identifier"]) == ("pypi", PYPROJECT["project"]["name"])
    assert (package["runtimeHint"], package["transport"]) == ("uvx", {"type": "stdio"})
    for variable in package["environmentVariables"]:
        assert set(variable) <= {"name", "description", "isRequired", "isSecret", "format", "default", "choices"}
        assert variable["name"] in TeamSettings.variables()
        assert variable.get("format", "string") in ("string", "number", "boolean", "filepath")
    assert [v["name"] for v in package["environmentVariables"] if v.get("isRequired")] == ["EVOLINK_API_KEY"]
    assert [v["name"] for v in package["environmentVariables"] if v.get("isSecret")] == ["EVOLINK_API_KEY"]


def test_the_wheel_has_types_a_licence_and_a_command() -> None:
    project = PYPROJECT["project"]
    assert (ROOT / "evolink_mcp" / "py.typed").is_file()
    assert (project["license"], project["license-files"]) == ("MIT", ["LICENSE"])
    assert [line for line in project["classifiers"] if line.startswith("License")] == []
    assert project["scripts"] == {"evolink-mcp": "evolink_mcp.cli.main:main"}
    assert {"test", "teams"} <= set(project["optional-dependencies"])
    assert PYPROJECT["tool"]["uv"]["default-groups"] == []


def test_the_source_distribution_contains_the_files_of_its_tests() -> None:
    included = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    paths = {"/tests", "/docs", "/manifest.json", "/server.json", "/icon.png", "/.mcpbignore", "/.github"}
    assert paths <= set(included)
    assert [name for name in included if not (ROOT / name[1:]).exists()] == []


def test_ci_runs_every_supported_python() -> None:
    versions = [line.rsplit(" ", 1)[1] for line in PYPROJECT["project"]["classifiers"] if ":: 3." in line]
    matrix = json.loads(re.search(r"python: (\[.*\])", text(".github/workflows/ci.yml"))[1])
    assert matrix == versions


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert '.venv/bin/pip install -q ".[test]" && .venv/bin/python -m pytest -q' in README
    workflow = text(".github/workflows/ci.yml")
    assert 'pip install -q ".[test]"' in workflow
    assert "python -m pytest -q\n" in workflow


def test_no_lock_file_and_no_package_index_is_committed() -> None:
    locks = ("uv.lock", "poetry.lock", "package-lock.json", "yarn.lock", "pnpm-lock.yaml")
    assert [str(path) for name in locks for path in ROOT.glob(name)] == []
    texts = "".join(text(name) for name in ("pyproject.toml", "manifest.json", "server.json", "Dockerfile"))
    assert re.findall(r"registryBaseUrl|index-url|find-links|registry=", texts) == []


# --- configuration ---


def fences(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", document, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{block.host}, {block.where}, {way}")
        for way, line in (("source", SOURCE), ("uvx", PUBLISHED))
        for block in host_blocks(*line, ENV)
    ],
)
def test_the_documentation_has_the_block_that_doctor_prints(block: Any) -> None:
    section = CONFIGURATION.split(f"\n## {block.host}\n")[1].split("\n## ")[0]
    assert block.text in fences(section, block.language)


def test_the_blocks_of_the_readme_are_the_blocks_of_the_documentation() -> None:
    blocks = {(block.host, block.language): block.text for block in host_blocks(*SOURCE, ENV)}
    (desktop,) = [fence for fence in fences(README, "json") if "mcpServers" in fence]
    assert json.loads(desktop) == json.loads(blocks["Claude Desktop", "json"])
    (code,) = [fence for fence in fences(README, "sh") if fence.startswith("claude mcp add")]
    whole = shlex.split(blocks["Claude Code", "sh"])
    assert [word for word in shlex.split(code) if word not in ("-s", "user")] == [
        word for word in whole if word not in ("-s", "user")
    ]


def links(prefix: str) -> list[str]:
    return re.findall(rf"\(({re.escape(prefix)}[^)]*)\)", README + CONFIGURATION)


def test_the_link_for_cursor_installs_the_published_server() -> None:
    matches = links("https://cursor.com/")
    assert matches
    for link in matches:
        query = parse_qs(urlsplit(link).query, strict_parsing=True)
        config = json.loads(base64.b64decode(query["config"][0], validate=True))
        assert (query["name"], config) == (["evolink"], {"command": "uvx", "args": ["evolink-mcp"], "env": ENV})


def test_the_link_for_vs_code_asks_for_the_key() -> None:
    matches = links("https://insiders.vscode.dev/")
    assert matches
    for link in matches:
        query = parse_qs(urlsplit(link).query, strict_parsing=True)
        (key_input,), config = json.loads(query["inputs"][0]), json.loads(query["config"][0])
        assert (key_input["type"], key_input["password"]) == ("promptString", True)
        assert config == {
            "command": "uvx", "args": ["evolink-mcp"], "env": {"EVOLINK_API_KEY": f"${{input:{key_input['id']}}}"},
        }  # fmt: skip


def test_the_tables_of_contents_link_to_all_sections() -> None:
    for document in (CONFIGURATION, text("docs/hosts.md")):
        titles = re.findall(r"^## (.*)$", document, re.MULTILINE)
        sections = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
        assert set(re.findall(r"^- \[[^\]]*\]\(#([^)]*)\)$", document, re.MULTILINE)) == sections


# --- a team's servers ---


def test_compose_starts_two_servers_with_settings_that_exist() -> None:
    yaml = pytest.importorskip("yaml")
    compose = yaml.safe_load(text("compose.yaml"))
    servers = [compose["services"][name] for name in ("one", "two")]
    for server in servers:
        assert set(server["environment"]) <= set(TeamSettings.variables())
        assert parse_arguments([str(word) for word in server["command"]]).port == 8000
    variables = set(re.findall(r"\$\{(\w+)", text("compose.yaml")))
    assert variables == set(re.findall(r"^(\w+)=", text(".env.example"), re.MULTILINE))
    assert {".env", "tokens.toml"} <= set(text(".gitignore").split())
    proxy = compose["configs"]["proxy"]["content"]
    assert [f"server {name}:8000" in proxy for name in ("one", "two")] == [True, True]
    volumes = {volume.partition(":")[0] for volume in servers[0]["volumes"]}
    assert volumes == {"./team", *compose["volumes"]} - {"database"}
    assert servers[0]["environment"]["EVOLINK_MCP_TOKENS_FILE"] == "/team/tokens.toml"


def test_the_image_can_be_built_with_the_extra_of_teams() -> None:
    yaml = pytest.importorskip("yaml")
    extras = yaml.safe_load(text("compose.yaml"))["services"]["one"]["build"]["args"]["EXTRAS"]
    assert extras.strip("[]") in PYPROJECT["project"]["optional-dependencies"]
    assert 'ARG EXTRAS=""' in text("Dockerfile")
    assert '".${EXTRAS}"' in text("Dockerfile")
