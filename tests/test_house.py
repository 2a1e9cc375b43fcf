"""The laws of the house: who may import whom, and what may stand where."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "evolink_mcp"
TESTS = Path(__file__).parent

# Reading order is import order is data order: a room imports only rooms before it.
ROOMS = (
    "quoting errors sizes costs addresses models tasks wire client downloads journal journal.sqlite folders images "
    "references pace lookout till jobs watch sidecar collect studio hosts schemas shapes answers adapter arguments "
    "sizing listing following showing tools resources prompts gallery tasks_extension server settings wiring stdio web "
    "rulebook simulation paintings simulator demo blocks doctor cli __main__"
).split()
ONLY_IN = {
    "mcp": {"adapter", "tools", "resources", "prompts", "gallery", "tasks_extension", "server", "wiring", "stdio", "web",
            "demo"},
    "mcp_types": {"adapter", "tools", "showing", "resources", "prompts", "gallery", "tasks_extension", "stdio", "demo"},
    "httpx2": {"wire", "client", "downloads", "wiring"},
    "sqlite3": {"journal.sqlite"},
    "PIL": {"images", "paintings"},
    "starlette": {"simulator", "server", "web"},
    "uvicorn": {"web", "demo"},
    "argparse": {"cli"},
}  # fmt: skip
LINES_MAX = 320


def rooms() -> dict[str, Path]:
    paths = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    return {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/__init__", "").replace("/", "."): path
            for path in paths}  # fmt: skip


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {
                f"{node.module}.{alias.name}" if node.module == "evolink_mcp" else node.module for alias in node.names
            }
    return names


EACH_ROOM = pytest.mark.parametrize("room", [pytest.param(name, id=name) for name in sorted(rooms())])


def test_every_room_has_its_place_in_the_order() -> None:
    assert set(rooms()) <= set(ROOMS)


@EACH_ROOM
def test_a_room_imports_only_rooms_before_it(room: str) -> None:
    ours = {name.removeprefix("evolink_mcp.") for name in imports(rooms()[room]) if name.startswith("evolink_mcp.")}
    before = set(ROOMS[: ROOMS.index(room)])
    assert {name for name in ours if name in ROOMS} <= before


@EACH_ROOM
def test_foreign_packages_stay_in_their_rooms(room: str) -> None:
    foreign = {name.split(".")[0] for name in imports(rooms()[room])}
    assert {name for name in foreign if name in ONLY_IN and room not in ONLY_IN[name]} == set()


@EACH_ROOM
def test_a_room_fits_one_reading(room: str) -> None:
    assert len(rooms()[room].read_text(encoding="utf-8").splitlines()) <= LINES_MAX


@EACH_ROOM
def test_a_room_says_what_is_kept_in_it(room: str) -> None:
    assert ast.get_docstring(ast.parse(rooms()[room].read_text(encoding="utf-8")))


def test_only_settings_reads_the_environment() -> None:
    readers = {name for name, path in rooms().items() if re.search(r"\benviron\b|\bgetenv\b", path.read_text("utf-8"))}
    assert readers == {"settings"}


def test_only_the_command_line_prints() -> None:
    def prints(path: Path) -> bool:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        return any(isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print" for n in nodes)

    assert {name for name, path in rooms().items() if prints(path)} == {"cli"}


def test_one_guard_only_catches_everything() -> None:
    found = [name for name, path in rooms().items() if re.search(r"except (Base)?Exception\b", path.read_text("utf-8"))]
    assert sorted(set(found) - {"journal.sqlite"}) == ["studio"]


def test_no_room_is_a_drawer_for_everything() -> None:
    assert not {"utils", "helpers", "common", "base", "misc"} & set(rooms())


def test_no_test_mocks() -> None:
    users = [path.name for path in TESTS.rglob("*.py") if any("mock" in name.split(".") for name in imports(path))]
    assert users == []


def test_importing_the_package_does_nothing() -> None:
    script = "import sys, evolink_mcp; print(sorted(m for m in sys.modules if m.startswith(('mcp', 'PIL', 'sqlite3'))))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_what_the_first_answer_does_not_need_is_not_imported() -> None:
    script = (
        "import sys, evolink_mcp.cli, evolink_mcp.wiring, evolink_mcp.stdio\n"
        "late = ('PIL', 'evolink_mcp.simulator', 'evolink_mcp.paintings', 'psycopg', 'platformdirs')\n"
        "print([m for m in late if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
