"""Rules for imports: the order of the modules, the package of each library, and the place of some calls."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
from child_processes import without_coverage

PACKAGE = Path(__file__).parent.parent / "evolink_mcp"
TESTS = Path(__file__).parent

# The order of the packages. A package imports only from packages before it.
PACKAGES = ["api", "journal", "images", "studio", "tools", "server", "transports", "simulator", "app", "teams", "cli"]

# The order of the modules. A module imports only from modules before it.
ORDER = [
    "causes",
    "errors",
    "sanitize",
    "pasted",
    "isolated",
    "call_context",
    "tracing",
    "api.models",
    "api.sizes",
    "api.size_grammar",
    "api.targets",
    "api.costs",
    "api.urls",
    "api.request",
    "api.task",
    "api.deadline",
    "api.proxies",
    "api.http",
    "api.certificates",
    "api.failures",
    "api.purchase_answer",
    "api.client",
    "journal.profile",
    "journal.entry",
    "journal.backend",
    "journal.rows",
    "journal.paid_record",
    "journal.actions",
    "journal.journal",
    "journal.all_profiles",
    "journal.migrations",
    "journal.search",
    "journal.sqlite",
    "images.folders",
    "images.unusable",
    "images.structure",
    "images.metadata",
    "images.inspect",
    "images.integrity",
    "images.previews",
    "images.prepare",
    "images.heic",
    "images.file_types",
    "images.sandbox",
    "images.derive",
    "images.decode_protocol",
    "images.decode_worker",
    "images.decode_process",
    "images.download",
    "images.sidecar",
    "images.moved_files",
    "images.store",
    "images.known_images",
    "images.references",
    "studio.times",
    "studio.schedule",
    "studio.jobs",
    "studio.accounts",
    "studio.events",
    "studio.journal_writer",
    "studio.size_rule",
    "studio.prices",
    "studio.limits",
    "studio.callback_history",
    "studio.poller",
    "studio.reconcile",
    "studio.purchase",
    "studio.derive",
    "studio.save",
    "studio.runner",
    "studio.studio",
    "tools.hosts",
    "tools.names",
    "tools.schemas",
    "tools.sums",
    "tools.task_answer",
    "tools.task_text",
    "tools.argument_names",
    "tools.adapter",
    "tools.previews",
    "tools.client_names",
    "tools.delivery",
    "tools.waiting",
    "tools.paid_calls",
    "tools.generate_image",
    "tools.series_answer",
    "tools.generate_images",
    "tools.get_task",
    "tools.compute_size",
    "tools.view_image",
    "tools.derive_image",
    "tools.list_tasks",
    "tools.get_balance",
    "server.startup_answers",
    "server.catalogue",
    "server.resources",
    "server.prompts",
    "server.gallery",
    "server.skills_extension",
    "server.tasks_extension",
    "server.server",
    "transports.signals",
    "transports.json_rpc",
    "transports.stdio_lines",
    "transports.messages",
    "transports.stdio",
    "transports.authentication",
    "transports.turns",
    "transports.http_calls",
    "transports.sse_streams",
    "transports.authority",
    "transports.http_guard",
    "transports.connections",
    "transports.http",
    "transports.server_card",
    "simulator.rules",
    "simulator.simulation",
    "simulator.paintings",
    "simulator.app",
    "app.environment",
    "app.key_store",
    "app.settings",
    "app.wiring",
    "teams.signing",
    "teams.object_store",
    "teams.settings",
    "teams.callbacks",
    "teams.metrics",
    "teams.database_url",
    "teams.schema",
    "teams.lease",
    "teams.failover",
    "teams.request_rates",
    "teams.database",
    "teams.postgres",
    "teams.remote_images",
    "teams.reloaded_file",
    "teams.tokens",
    "teams.roles",
    "teams.oauth",
    "teams.authenticator",
    "teams.tenants",
    "teams.callback_routes",
    "teams.uploads",
    "teams.metrics_endpoint",
    "teams.studios",
    "teams.adopter",
    "teams.app",
    "cli.process",
    "cli.terminal",
    "cli.arguments",
    "cli.serve_http",
    "cli.config_text",
    "cli.host_config",
    "cli.host_files",
    "cli.install",
    "cli.team_checks",
    "cli.doctor",
    "cli.sheet_page",
    "cli.image_commands",
    "cli.audit",
    "cli.demo",
    "cli.early_session",
    "cli.commands",
    "cli.main",
    "__main__",
]

TEAM_MODULES = {f"evolink_mcp.{name}" for name in ORDER if name.startswith("teams.")}
# Which outside library may be imported where: a package, or a single module of one.
ONLY_IN = {
    "mcp": ("tools", "server", "transports", "app.wiring", "teams", "cli"),
    "mcp_types": ("tools", "server", "transports", "cli"),
    "httpx2": ("api", "images.download", "app.wiring", "teams"),
    "opentelemetry": ("tracing",),
    "jwt": ("teams.oauth",),
    "keyring": ("app.key_store",),
    "prometheus_client": ("teams.metrics_endpoint",),
    "sqlite3": ("journal",),
    "psycopg": ("teams",),
    "psycopg_pool": ("teams.database",),
    "PIL": ("images", "simulator"),
    "obstore": ("teams.object_store",),
    "starlette": ("transports", "teams", "server", "simulator"),
    "uvicorn": ("transports", "teams.tenants", "cli.demo"),
    "argparse": ("cli.arguments",),
}


def modules() -> dict[str, Path]:
    """Return every module by its dotted name below `evolink_mcp`; the packages' own `__init__` files hold only a docstring."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports, also inside functions; `from package import module` names the module."""
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


def test_the_modules_are_in_the_order_of_their_packages() -> None:
    packages = [name.rpartition(".")[0] for name in ORDER[:-1]]
    assert [name for name, _ in groupby(packages)] == ["", *PACKAGES]


@EACH_MODULE
def test_a_module_imports_only_modules_before_it(module: str) -> None:
    own_names = {
        name.removeprefix("evolink_mcp.") for name in imports(modules()[module]) if name.startswith("evolink_mcp.")
    }
    before = set(ORDER[: ORDER.index(module)])
    assert {name for name in own_names if name in ORDER} <= before


def test_only_the_command_line_imports_the_team_package() -> None:
    core_modules = {name: path for name, path in modules().items() if name.split(".")[0] not in ("teams", "cli")}
    team_imports = {
        name: team_names
        for name, path in core_modules.items()
        if (team_names := {item.removeprefix("evolink_mcp.") for item in imports(path) if item in TEAM_MODULES})
    }
    assert team_imports == {}


@EACH_MODULE
def test_outside_libraries_are_imported_only_by_their_packages(module: str) -> None:
    foreign = {name.split(".")[0] for name in imports(modules()[module])}
    misplaced_imports = {
        name
        for name in foreign
        if name in ONLY_IN and module.split(".")[0] not in ONLY_IN[name] and module not in ONLY_IN[name]
    }
    assert misplaced_imports == set()


def test_every_module_and_package_has_a_docstring() -> None:
    without_docstring = [str(path) for path in PACKAGE.rglob("*.py") if not ast.get_docstring(tree(path))]
    assert without_docstring == []


def test_a_package_exports_nothing_by_itself() -> None:
    """An `__init__` file has only a docstring, so each name is in one module."""
    packages_with_code = {path.parent.name for path in PACKAGE.glob("*/__init__.py") if len(tree(path).body) != 1}
    assert packages_with_code == set()


def test_only_one_module_reads_the_environment() -> None:
    readers = {
        name
        for name, path in modules().items()
        if re.search(r"\bos\.environ|\bgetenv|from os import", path.read_text("utf-8"))
    }
    assert readers == {"app.environment"}


def test_only_the_command_line_prints() -> None:
    def prints(path: Path) -> bool:
        nodes = ast.walk(tree(path))
        return any(isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print" for n in nodes)

    assert {name for name, path in modules().items() if prints(path)} == {"cli.commands"}


def private_names(module: ast.Module) -> set[str]:
    """Return the private attributes that this module's own classes define."""
    inside = [node for item in ast.walk(module) if isinstance(item, ast.ClassDef) for node in ast.walk(item)]
    names = {node.name for node in inside if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    names |= {node.attr for node in inside if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return names | {node.id for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def foreign_private_names(module: ast.Module, own_names: set[str]) -> list[tuple[int, str]]:
    """Return line and name of every private attribute that no class of the package defines."""
    attributes = [node for node in ast.walk(module) if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr)]
    attributes = [node for node in attributes if ast.unparse(node) != "os._exit"]  # public, and documented
    return [(node.lineno, node.attr) for node in attributes if node.attr not in own_names]


def test_only_the_adapter_and_the_server_use_private_parts_of_the_sdk_and_name_its_version() -> None:
    """If the SDK lacks a public name, the line above gives the reason and the version."""
    elsewhere: list[str] = []
    unexplained: list[str] = []
    own_names = set().union(*(private_names(tree(path)) for path in modules().values()))
    for name, path in modules().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, attribute in foreign_private_names(tree(path), own_names):
            if name != "tools.adapter" and not name.startswith("server."):
                elsewhere.append(f"{name}:{number} {attribute}")
            if not any("mcp 2." in line for line in lines[number - 2 : number]):
                unexplained.append(f"{name}:{number} {attribute}")
    assert (elsewhere, unexplained) == ([], [])


def test_only_listed_modules_catch_every_exception() -> None:
    modules_with_broad_except = [
        name for name, path in modules().items() if re.search(r"except (Base)?Exception\b", path.read_text("utf-8"))
    ]
    edges = ["journal.actions", "studio.jobs", "transports.stdio_lines"]
    assert sorted(set(modules_with_broad_except) - {"journal.sqlite", "journal.migrations"}) == edges


def test_no_module_has_a_generic_name() -> None:
    assert not {"utils", "helpers", "common", "base", "misc"} & {name.split(".")[-1] for name in modules()}


def test_no_test_uses_a_mock() -> None:
    users = [path.name for path in TESTS.rglob("*.py") if any("mock" in name.split(".") for name in imports(path))]
    assert users == []


def package_names(module: ast.Module) -> set[str]:
    """Return the names that this module imports from the package: modules, classes and functions."""
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "evolink_mcp":
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names if alias.name.startswith("evolink_mcp")}
    return names


def root_name(node: ast.AST) -> str:
    """Return `a` for the expression `a.b().c`."""
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def private_uses(module: ast.Module) -> list[tuple[int, str]]:
    """Return line and text of each use of a private part, and of each change of a part of the package."""
    names = package_names(module)
    outside = names_of_other_packages(module)
    uses: list[tuple[int, str]] = []
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute):
            is_private = re.match("_[^_]", node.attr) and root_name(node.value) not in ("self", "cls")
            is_default = node.attr in ("__defaults__", "__kwdefaults__")
            is_set = isinstance(node.ctx, ast.Store) and root_name(node.value) in names
            if (is_private or is_default or is_set) and ast.unparse(node) != "os._exit":
                uses.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("setattr", "delattr"):
            target = node.args[0]
            place = str(target.value) if isinstance(target, ast.Constant) else root_name(target)
            if place.startswith("evolink_mcp") or (not isinstance(target, ast.Constant) and place not in outside):
                uses.append((node.lineno, ast.unparse(node)))
    return uses


def names_of_other_packages(module: ast.Module) -> set[str]:
    """Return the names that this module imports from other packages."""
    nodes = [node for node in ast.walk(module) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {(alias.asname or alias.name).split(".")[0] for node in nodes for alias in node.names}
    return names - package_names(module)


# Countdown replaces functions of the standard library by name, in a server process that ends at one of them.
REPLACES_THE_STANDARD_LIBRARY = {"killer.py"}


def test_no_test_uses_a_private_part_or_replaces_a_part_of_the_package() -> None:
    """A test that needs one shows that the design lacks a parameter. A fake or a parameter takes its place."""
    paths = [path for path in TESTS.rglob("*.py") if path.name not in REPLACES_THE_STANDARD_LIBRARY]
    uses = [f"{path.relative_to(TESTS)}:{line} {text}" for path in paths for line, text in private_uses(tree(path))]
    assert uses == []


@pytest.mark.parametrize(
    "use",
    [
        "world.studio._runner",
        "Database.__init__.__kwdefaults__['x'] = 1",
        "from evolink_mcp.api import client\nclient.LIMIT = 1",
        "import evolink_mcp.api.client\nevolink_mcp.api.client.LIMIT = 1",
        "from evolink_mcp.api import client\nmonkeypatch.setattr(client, 'LIMIT', 1)",
        "monkeypatch.setattr('evolink_mcp.api.client.LIMIT', 1)",
        "monkeypatch.setattr(world.studio, 'order', fail)",
        "setattr(journal, 'update', fail)",
    ],
)
def test_the_check_for_private_parts_finds_each_way_to_use_one(use: str) -> None:
    assert len(private_uses(ast.parse(use))) == 1


def test_child_processes_do_not_import_from_the_working_directory() -> None:
    """`python -m` and `python -c` put the working directory first on the import path, unless -P or -I comes before."""
    files = [path for folder in (TESTS, TESTS.parent / "benchmarks") for path in folder.rglob("*.py")]
    unsafe = re.compile(r"""(?<!"-P", )(?<!'-P', )["']-m["'], ["']evolink_mcp|sys\.executable, ["']-c""")
    assert [str(path) for path in files if unsafe.search(path.read_text("utf-8"))] == []


def run_script(script: str, *options: str) -> tuple[str, str]:
    """Run a script in a new interpreter. Return its stdout and stderr."""
    process = subprocess.run(
        [sys.executable, *options, "-P", "-c", script],
        env=without_coverage(os.environ),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return process.stdout.strip(), process.stderr


def test_importing_the_package_does_nothing() -> None:
    script = "import sys, evolink_mcp; print(sorted(m for m in sys.modules if m.startswith(('mcp', 'PIL', 'sqlite3'))))"
    assert run_script(script) == ("[]", "")


def test_the_first_answers_over_stdio_need_few_modules() -> None:
    """Python's own start and the JSON parser load the rest. Each of these takes a twentieth of the start or more."""
    slow = ["logging", "typing", "pathlib", "dataclasses", "inspect", "argparse", "urllib", "platformdirs", "hashlib"]
    slow += ["tempfile", "shutil", "asyncio", "anyio", "pydantic", "mcp", "mcp_types"]
    script = (
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
        "import evolink_mcp.cli.main, evolink_mcp.cli.early_session\n"
        f"print({{name.partition('.')[0] for name in sys.modules}} & set({slow}))"
    )
    # Without the site module: the files of an editable installation would import some of them.
    assert run_script(script, "-I", "-S") == ("set()", "")


def test_modules_that_the_first_answer_does_not_need_are_not_imported() -> None:
    script = (
        "import sys, evolink_mcp.cli.commands, evolink_mcp.app.wiring, evolink_mcp.transports.stdio\n"
        "late = ('PIL', 'evolink_mcp.simulator', 'psycopg', 'platformdirs')\n"
        "print([m for m in late if m in sys.modules])"
    )
    assert run_script(script)[0] == "[]"
