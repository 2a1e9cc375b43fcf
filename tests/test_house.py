"""The laws of the house: which package may import which, and what may stand where."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from surroundings import unmeasured

PACKAGE = Path(__file__).parent.parent / "evolink_mcp"
TESTS = Path(__file__).parent

# Reading order: a package imports only from packages above it, a module only from modules before it in its package.
PACKAGES = {
    "": "errors sanitize isolated signing tracing",
    "api": "sizes size_words costs urls request task http client",
    "journal": "entry rows contract migrations file sqlite address schema database left postgres",
    "pictures": (
        "folders unusable structure metadata inspect previews upright sandbox decode_protocol decode_worker "
        "decode_process downloads sidecar store object_store keeping found references"
    ),
    "studio": (
        "times schedule experience callbacks tally jobs recorder size_rule limits lost poller purchase watch collect workshop "
        "joining studio"
    ),
    "tools": (
        "hosts schemas task_answer task_words adapter previews delivery waiting "
        "generate_image get_task compute_size view_image list_tasks get_balance"
    ),
    "server": "opening resources prompts gallery tasks_extension server",
    "transports": "signals wires stdio auth oauth callers tenants calls sessions callbacks pictures metrics door web",
    "simulator": "rules simulation paintings app",
    "cli": "process arguments values team_settings settings wiring team web host_config findings doctor demo shelf main",
}
ORDER = [f"{package}.{name}".strip(".") for package, names in PACKAGES.items() for name in names.split()] + ["__main__"]

# Which outside library may be imported where: a package, or a single module of one.
ONLY_IN = {
    "mcp": ("tools", "server", "transports", "cli"),
    "mcp_types": ("tools", "server", "transports", "cli"),
    "httpx2": ("api", "pictures.downloads", "cli.wiring", "cli.team", "transports.oauth"),
    "opentelemetry": ("tracing",),
    "jwt": ("transports.oauth",),
    "prometheus_client": ("transports.metrics",),
    "sqlite3": ("journal",),
    "psycopg": ("journal",),
    "psycopg_pool": ("journal.database",),
    "PIL": ("pictures", "simulator"),
    "obstore": ("pictures.object_store",),
    "starlette": ("transports", "server", "simulator"),
    "uvicorn": ("transports", "cli.demo"),
    "argparse": ("cli.arguments",),
}


def modules() -> dict[str, Path]:
    """Every module by its dotted name below `evolink_mcp`; the packages' own `__init__` files hold only a docstring."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """The dotted names that a file imports, those inside functions too; `from package import module` names the module."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


EACH_MODULE = pytest.mark.parametrize("module", [pytest.param(name, id=name) for name in sorted(modules())])


def test_every_module_has_its_place_in_the_reading_order() -> None:
    assert sorted(modules()) == sorted(ORDER)


@EACH_MODULE
def test_a_module_imports_only_what_stands_before_it(module: str) -> None:
    ours = {name.removeprefix("evolink_mcp.") for name in imports(modules()[module]) if name.startswith("evolink_mcp.")}
    before = set(ORDER[: ORDER.index(module)])
    assert {name for name in ours if name in ORDER} <= before


@EACH_MODULE
def test_outside_libraries_stay_where_they_belong(module: str) -> None:
    foreign = {name.split(".")[0] for name in imports(modules()[module])}
    misplaced = {
        name
        for name in foreign
        if name in ONLY_IN and module.split(".")[0] not in ONLY_IN[name] and module not in ONLY_IN[name]
    }
    assert misplaced == set()


def test_every_module_and_package_says_what_is_kept_in_it() -> None:
    silent = [str(path) for path in PACKAGE.rglob("*.py") if not ast.get_docstring(tree(path))]
    assert silent == []


def test_a_package_exports_nothing_by_itself() -> None:
    """No re-export and no work at import: every name has one home."""
    full = {path.parent.name for path in PACKAGE.glob("*/__init__.py") if len(tree(path).body) != 1}
    assert full == set()


def test_only_settings_reads_the_environment() -> None:
    readers = {
        name for name, path in modules().items() if re.search(r"\benviron\b|\bgetenv\b", path.read_text("utf-8"))
    }
    assert readers == {"cli.settings"}


def test_only_the_command_line_prints() -> None:
    def prints(path: Path) -> bool:
        nodes = ast.walk(tree(path))
        return any(isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print" for n in nodes)

    assert {name for name, path in modules().items() if prints(path)} == {"cli.main"}


def private_names(module: ast.Module) -> set[str]:
    """The private attributes that this module's own classes define."""
    inside = [node for one in ast.walk(module) if isinstance(one, ast.ClassDef) for node in ast.walk(one)]
    names = {node.name for node in inside if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    names |= {node.attr for node in inside if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return names | {node.id for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def strangers(module: ast.Module, ours: set[str]) -> list[tuple[int, str]]:
    """Line and name of every private attribute that is used here and defined by no class of ours."""
    used = [node for node in ast.walk(module) if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr)]
    used = [node for node in used if ast.unparse(node) != "os._exit"]  # public, and documented
    return [(node.lineno, node.attr) for node in used if node.attr not in ours]


def test_private_parts_of_the_sdk_are_used_at_its_border_only_and_with_the_version() -> None:
    """Wherever the SDK lacks a public name, the line above says why and for which version."""
    elsewhere: list[str] = []
    unexplained: list[str] = []
    ours = set().union(*(private_names(tree(path)) for path in modules().values()))
    for name, path in modules().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, attribute in strangers(tree(path), ours):
            if name != "tools.adapter" and not name.startswith("server."):
                elsewhere.append(f"{name}:{number} {attribute}")
            if not any("mcp 2." in line for line in lines[number - 2 : number]):
                unexplained.append(f"{name}:{number} {attribute}")
    assert (elsewhere, unexplained) == ([], [])


def test_one_guard_only_catches_everything() -> None:
    found = [
        name for name, path in modules().items() if re.search(r"except (Base)?Exception\b", path.read_text("utf-8"))
    ]
    assert sorted(set(found) - {"journal.file", "journal.migrations"}) == ["studio.jobs"]


def test_no_module_is_a_drawer_for_everything() -> None:
    assert not {"utils", "helpers", "common", "base", "misc"} & {name.split(".")[-1] for name in modules()}


def test_no_test_mocks() -> None:
    users = [path.name for path in TESTS.rglob("*.py") if any("mock" in name.split(".") for name in imports(path))]
    assert users == []


def test_importing_the_package_does_nothing() -> None:
    script = "import sys, evolink_mcp; print(sorted(m for m in sys.modules if m.startswith(('mcp', 'PIL', 'sqlite3'))))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=unmeasured(os.environ),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_what_the_first_answer_does_not_need_is_not_imported() -> None:
    script = (
        "import sys, evolink_mcp.cli.main, evolink_mcp.cli.wiring, evolink_mcp.transports.stdio\n"
        "late = ('PIL', 'evolink_mcp.simulator', 'psycopg', 'platformdirs')\n"
        "print([m for m in late if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=unmeasured(os.environ),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stdout.strip() == "[]"
