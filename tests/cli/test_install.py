"""`evolink-mcp install`: the real files of every host, undo, the key, links and modes."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evolink_mcp.app.key_store import KeyStore
from evolink_mcp.app.settings import Settings
from evolink_mcp.cli.config_text import value_at
from evolink_mcp.cli.host_files import HOST_FILES, Machine
from evolink_mcp.cli.install import Console, Installer, run_install

KEY = "sk-canary-0123456789abcdef"
OTHER_KEY = "sk-canary-fedcba9876543210"
COMMAND = "/opt/evolink mcp/evolink-mcp"
HOSTS = {host.host: host for host in HOST_FILES}
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes")

SERVERS = (
    '{\n  "mcpServers": {\n    "files": {\n      "command": "npx",\n      "args": ["-y", "files"]\n    }\n  }\n}\n'
)
# The file of each host on Linux, as the host or its user writes it.
FILES = {
    "claude-desktop": (".config/Claude/claude_desktop_config.json", '{\n    "globalShortcut": ""\n}'),
    "claude-code": (
        ".claude.json",
        '{\n  "numStartups": 4,\n  "mcpServers": {\n    "gh": {\n      "type": "http",\n      "url": "https://gh.test/mcp"\n'
        '    }\n  },\n  "projects": {\n    "/src": {\n      "mcpServers": {}\n    }\n  }\n}',
    ),
    "cursor": (".cursor/mcp.json", SERVERS),
    "vscode": (
        ".config/Code/User/mcp.json",
        '{\n\t"servers": {\n\t\t"files": { "type": "stdio", "command": "npx" }, // local\n\t},\n\t"inputs": []\n}\n',
    ),
    "codex": (
        ".codex/config.toml",
        '# Codex\nmodel = "o"\n\n[mcp_servers.files]\ncommand = "npx"\n\n[projects."/src"]\ntrust_level = "trusted"\n',
    ),
    "gemini-cli": (
        ".gemini/settings.json",
        '{\n  // colours\n  "ui": { "theme": "GitHub" },\n  "security": { "auth": { "selectedType": "oauth-personal" } }\n}\n',
    ),
    "windsurf": (".codeium/windsurf/mcp_config.json", '{\n  "mcpServers": {\n    "a": {"serverUrl": "https://a.test"}\n  }\n}'),
    "zed": (
        ".config/zed/settings.json",
        '// Zed settings\n//\n{\n  "ui_font_size": 16,\n  "context_servers": {\n    "a": { "command": "a" },\n'
        '  },\n  "theme": { "mode": "system", },\n}\n',
    ),
    "opencode": (
        ".config/opencode/opencode.json",
        '{\n  "$schema": "https://opencode.ai/config.json",\n  "mcp": {\n    "a": { "type": "remote", "url": "https://a.test" }\n'
        "  }\n}\n",
    ),
    "copilot": (".copilot/mcp-config.json", '{\n  "mcpServers": {}\n}'),
    "cline": (
        ".config/Code/User/globalStorage/saoudrizwan.claude-dev/settings/cline_mcp_settings.json",
        '{\n  "mcpServers": {\n    "a": { "autoApprove": [], "disabled": false, "timeout": 60, "command": "a" }\n  }\n}',
    ),
    "junie": (".junie/mcp/mcp.json", SERVERS),
    "lm-studio": (".lmstudio/mcp.json", '{\n  "mcpServers": {}\n}\n'),
}  # fmt: skip
EACH_HOST = pytest.mark.parametrize("name", list(FILES))


class User:
    """A home folder, and the answers of a person at the terminal."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.system = "linux"
        self.variables: dict[str, str] = {}
        self.command = COMMAND
        self.output: list[str] = []
        self.errors: list[str] = []
        self.answer: str | None = None
        self.typed_key: str | None = None

    def run(self, *hosts: str, key: str | None = KEY, undo: bool = False, yes: bool = True) -> int:
        self.output = []
        self.errors = []
        settings = Settings.from_environment({"EVOLINK_API_KEY": key} if key else {})
        machine = Machine(self.home, self.system, self.variables)
        answer, typed_key = self.answer, self.typed_key
        console = Console(
            self.output.append,
            self.errors.append,
            ask=None if answer is None else lambda _: answer,
            ask_secret=None if typed_key is None else lambda _: typed_key,
        )
        options = Namespace(hosts=list(hosts), undo=undo, yes=yes, key_in_file=True, store_key=False)
        installer = Installer(machine, self.home / "data", self.command, ["-x"])
        return run_install(options, settings, installer, KeyStore(), console)

    def write(self, name: str, content: str | None = None) -> Path:
        place, text = FILES[name]
        file = self.home / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((text if content is None else content).encode())
        return file

    def server(self, name: str) -> Any:
        host = HOSTS[name]
        values = host.syntax.parse((self.home / FILES[name][0]).read_bytes().decode())
        return value_at(values, (*host.table, "evolink"))


@pytest.fixture
def user(tmp_path: Path) -> User:
    return User(tmp_path)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return every file and folder of the home folder, without the records of the installer."""
    paths = [path for path in folder.rglob("*") if not path.is_relative_to(folder / "data")]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


# --- every host ---


def test_the_examples_cover_every_host() -> None:
    assert list(FILES) == list(HOSTS)


@EACH_HOST
def test_the_server_is_added_beside_the_others_and_undo_restores_every_byte(user: User, name: str) -> None:
    file = user.write(name)
    before = contents(user.home)
    text = file.read_text("utf-8")
    assert user.run(name) == 0
    host = HOSTS[name]
    values = host.syntax.parse(file.read_text("utf-8"))
    servers = value_at(values, host.table)
    server = servers.pop("evolink")
    assert servers == (value_at(host.syntax.parse(text), host.table) or {})
    environment = server.get("env", server.get("environment"))
    assert environment == {"EVOLINK_API_KEY": KEY}
    line = server["command"] if name == "opencode" else [server["command"], *server["args"]]
    assert line == [COMMAND, "-x"]
    assert user.run(undo=True) == 0
    assert contents(user.home) == before


@EACH_HOST
def test_a_missing_file_is_created_for_its_user_only_and_undo_deletes_it(user: User, name: str) -> None:
    assert user.run(name) == 0
    file = user.home / FILES[name][0]
    assert user.server(name)["type" if name in ("vscode", "claude-code") else "command"]
    if os.name == "posix":
        new_folders = [folder for folder in file.parents if user.home in folder.parents]
        assert file.stat().st_mode & 0o777 == 0o600
        assert all(folder.stat().st_mode & 0o077 == 0 for folder in new_folders)
    assert user.run(undo=True) == 0
    assert contents(user.home) == {}


@EACH_HOST
def test_a_second_installation_changes_nothing(user: User, name: str) -> None:
    user.write(name)
    user.run(name)
    first_contents = contents(user.home)
    assert user.run(name) == 0
    assert contents(user.home) == first_contents
    assert "is up to date" in user.output[0]


@EACH_HOST
def test_the_key_is_never_printed(user: User, name: str) -> None:
    user.write(name)
    for options in ({}, {}, {"undo": True}):
        user.run(name, **options)
        assert KEY not in "".join(user.output + user.errors)


@EACH_HOST
def test_undo_keeps_edits_of_the_user(user: User, name: str) -> None:
    file = user.write(name)
    text = file.read_text("utf-8")
    user.run(name)
    comment = "\n# mine\n" if name == "codex" else "\n \n"
    file.write_text(file.read_text("utf-8") + comment, "utf-8", newline="\n")
    assert user.run(undo=True) == 0
    assert file.read_text("utf-8") == text + comment
    assert user.run(undo=True) == 0
    assert user.output == ["Nothing to undo."]


@EACH_HOST
def test_an_invalid_file_stays_and_one_line_names_file_and_place(user: User, name: str) -> None:
    second = user.write("cursor" if name != "cursor" else "junie")
    content = "model = \n" if name == "codex" else '{\n  "a": 1,,\n}'
    file = user.write(name, content)
    assert user.run(name, "cursor" if name != "cursor" else "junie") == 1
    assert file.read_text("utf-8") == content
    (line,) = user.errors
    place = "line 1, column 9" if name == "codex" else "line 2, column 10"
    assert line.startswith(f"{HOSTS[name].title}: {file}: {place}: ")
    assert line.endswith("The file is unchanged")
    assert "evolink" in second.read_text("utf-8")


# --- places ---


@pytest.mark.parametrize(
    ("system", "variables", "host", "place"),
    [
        ("darwin", {}, "claude-desktop", "Library/Application Support/Claude/claude_desktop_config.json"),
        ("darwin", {}, "vscode", "Library/Application Support/Code/User/mcp.json"),
        ("darwin", {}, "zed", ".config/zed/settings.json"),
        ("win32", {"APPDATA": "roaming"}, "claude-desktop", "roaming/Claude/claude_desktop_config.json"),
        ("win32", {"APPDATA": "roaming"}, "zed", "roaming/Zed/settings.json"),
        ("win32", {}, "vscode", "AppData/Roaming/Code/User/mcp.json"),
        ("linux", {"CODEX_HOME": "codex"}, "codex", "codex/config.toml"),
        ("linux", {"CLAUDE_CONFIG_DIR": "claude"}, "claude-code", "claude/.claude.json"),
        ("linux", {"COPILOT_HOME": "copilot"}, "copilot", "copilot/mcp-config.json"),
        ("linux", {"XDG_CONFIG_HOME": "config"}, "opencode", "config/opencode/opencode.json"),
    ],
)
def test_each_system_has_its_paths(user: User, system: str, variables: dict[str, str], host: str, place: str) -> None:
    user.system = system
    user.variables = {name: str(user.home / folder) for name, folder in variables.items()}
    assert user.run(host) == 0
    assert KEY in (user.home / place).read_text("utf-8")


@pytest.mark.parametrize(
    ("host", "folder", "place"),
    [
        ("cline", ".cline/data", ".cline/data/settings/cline_mcp_settings.json"),
        ("lm-studio", ".cache/lm-studio", ".cache/lm-studio/mcp.json"),
        ("vscode", ".config/Code - Insiders/User", ".config/Code - Insiders/User/mcp.json"),
    ],
)
def test_the_folder_that_exists_is_used(user: User, host: str, folder: str, place: str) -> None:
    (user.home / folder).mkdir(parents=True)
    assert user.run() == 0
    assert {path for path, content in contents(user.home).items() if content is not None} == {str(Path(place))}


def test_the_server_goes_into_the_inner_table_of_opencode_2(user: User) -> None:
    file = user.write("opencode", '{"mcp": {"servers": {"a": {"type": "local", "command": ["a"]}}}}')
    assert user.run("opencode") == 0
    assert set(json.loads(file.read_text())["mcp"]["servers"]) == {"a", "evolink"}
    file = user.write("opencode", '{"mcp": {"servers": {"type": "local", "command": ["a"]}}}')
    assert user.run("opencode") == 0
    assert set(json.loads(file.read_text())["mcp"]) == {"servers", "evolink"}


def test_without_names_every_present_host_is_changed_and_no_other(user: User) -> None:
    user.write("cursor")
    (user.home / ".codex").mkdir()
    programs = user.home / "bin"
    programs.mkdir()
    program = programs / ("claude.exe" if sys.platform == "win32" else "claude")
    program.write_text("")
    program.chmod(0o755)
    user.variables = {"PATH": str(programs)}
    assert user.run() == 0
    files = {path for path, content in contents(user.home).items() if content is not None}
    assert files - {f"bin{os.sep}{program.name}"} == {
        str(Path(FILES[name][0])) for name in ("cursor", "codex", "claude-code")
    }


def test_a_machine_without_hosts_and_an_unknown_host_are_reported(user: User) -> None:
    assert user.run() == 1
    assert "no MCP host found" in user.errors[0]
    assert user.run("codx") == 2
    assert user.errors == ["unknown host codx; did you mean codex?"]


# --- the user's servers and edits ---


@pytest.mark.parametrize("key", [KEY, None])
def test_a_server_of_the_user_with_the_same_name_stays(user: User, key: str | None) -> None:
    file = user.write("cursor", '{"mcpServers": {"evolink": {"command": "mine"}}}')
    before = file.read_bytes()
    assert user.run("cursor", key=key) == 0
    assert user.run(undo=True) == 0
    assert file.read_bytes() == before


def test_a_new_key_and_a_new_command_replace_the_old_ones(user: User) -> None:
    file = user.write("cursor")
    before = file.read_bytes()
    user.run("cursor")
    user.command = "/new/evolink-mcp"
    assert user.run("cursor", key=OTHER_KEY) == 0
    assert user.server("cursor") == {
        "command": "/new/evolink-mcp", "args": ["-x"], "env": {"EVOLINK_API_KEY": OTHER_KEY},
    }  # fmt: skip
    assert KEY.encode() not in file.read_bytes()
    user.run(undo=True)
    assert file.read_bytes() == before


def test_a_new_key_keeps_edits_and_undo_keeps_them_too(user: User) -> None:
    file = user.write("cursor")
    user.run("cursor")
    file.write_text(file.read_text().replace('"files"', '"documents"'), newline="\n")
    user.run("cursor", key=OTHER_KEY)
    assert user.server("cursor")["env"] == {"EVOLINK_API_KEY": OTHER_KEY}
    user.run(undo=True)
    assert file.read_text() == SERVERS.replace('"files"', '"documents"')


def test_a_changed_block_stays_until_undo(user: User) -> None:
    file = user.write("cursor")
    user.run("cursor")
    file.write_text(file.read_text().replace("/opt/evolink mcp/", "/mine/"), newline="\n")
    edited_content = file.read_bytes()
    assert user.run("cursor", key=OTHER_KEY) == 0
    assert "that you changed" in user.output[0]
    assert file.read_bytes() == edited_content
    user.run(undo=True)
    assert file.read_text() == SERVERS


def test_undo_of_named_hosts_leaves_the_others(user: User) -> None:
    user.write("cursor")
    user.write("codex")
    user.run()
    assert user.run("codex", undo=True) == 0
    assert (user.server("codex"), user.server("cursor") is None) == (None, False)


@pytest.mark.parametrize("change", [Path.unlink, lambda file: file.write_text(SERVERS)], ids=["file", "server"])
def test_undo_changes_nothing_if_the_user_has_already_removed_the_server(
    user: User, change: Callable[[Path], Any]
) -> None:
    file = user.write("cursor")
    user.run("cursor")
    change(file)
    before = contents(user.home)
    assert user.run(undo=True) == 0
    assert contents(user.home) == before
    assert user.run(undo=True) == 0
    assert user.output == ["Nothing to undo."]


def test_undo_deletes_the_copy_of_the_old_file(user: User) -> None:
    user.write("cursor")
    user.run("cursor")
    assert len(list((user.home / "data" / "install").glob("cursor-*"))) == 1
    user.run(undo=True)
    assert list((user.home / "data" / "install").glob("cursor-*")) == []


# --- questions and keys ---


def test_nothing_is_written_without_a_yes(user: User) -> None:
    user.write("cursor")
    before = contents(user.home)
    assert user.run(yes=False) == 2
    assert "add --yes" in user.errors[0]
    user.answer = ""
    assert user.run(yes=False) == 2
    assert contents(user.home) == before
    assert '"EVOLINK_API_KEY": "(your key)"' in user.output[0]
    user.answer = "y"
    assert user.run(yes=False) == 0
    assert user.server("cursor")["env"] == {"EVOLINK_API_KEY": KEY}


def test_a_person_types_the_key_at_the_terminal(user: User) -> None:
    user.write("cursor")
    user.typed_key = f" {KEY}\n"
    assert user.run(key=None) == 0
    assert user.server("cursor")["env"] == {"EVOLINK_API_KEY": KEY}


def test_without_a_key_the_server_is_added_for_the_free_tools(user: User) -> None:
    user.write("cursor")
    assert user.run(key=None) == 0
    assert user.server("cursor")["env"] == {}
    assert "Without a key only the free tools work" in "".join(user.output)


@pytest.mark.parametrize("key", ["sk-...", "Bearer sk-0123456789", "short"])
def test_an_unusable_key_is_refused(user: User, key: str) -> None:
    file = user.write("cursor")
    assert user.run(key=key) == 2
    assert file.read_text() == SERVERS
    assert len(user.errors) == 1


# --- links, modes, faults ---


@POSIX
def test_a_link_stays_a_link(user: User) -> None:
    target = user.home / "dotfiles" / "mcp.json"
    target.parent.mkdir()
    target.write_text(SERVERS)
    link = user.home / ".cursor" / "mcp.json"
    link.parent.mkdir()
    link.symlink_to(target)
    assert user.run() == 0
    assert (link.is_symlink(), KEY in target.read_text()) == (True, True)
    assert user.run(undo=True) == 0
    assert (link.is_symlink(), target.read_text()) == (True, SERVERS)


@POSIX
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_the_mode_of_a_file_stays(user: User, mode: int) -> None:
    file = user.write("cursor")
    file.chmod(mode)
    umask = os.umask(0)
    try:
        for undo in (False, True):
            assert user.run("cursor", undo=undo) == 0
            assert file.stat().st_mode & 0o777 == mode
    finally:
        os.umask(umask)


@POSIX
def test_only_the_user_can_read_the_copies(user: User) -> None:
    user.write("cursor").chmod(0o644)
    umask = os.umask(0)
    try:
        user.run("cursor")
    finally:
        os.umask(umask)
    folder = user.home / "data" / "install"
    assert folder.stat().st_mode & 0o777 == 0o700
    private = [path for path in folder.iterdir() if path.name != "lock"]
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}


@POSIX
def test_a_link_that_leads_to_itself_and_a_folder_are_reported(user: User) -> None:
    file = user.home / ".cursor" / "mcp.json"
    file.parent.mkdir()
    file.symlink_to(file)
    assert user.run("cursor") == 1
    file.unlink()
    file.mkdir()
    assert user.run("cursor") == 1
    assert user.errors == [f"Cursor: {file}: Is a directory"]


def test_a_file_that_is_not_utf_8_is_reported_with_its_line(user: User) -> None:
    file = user.write("cursor")
    content = b'{\n  "mcpServers": {"\xff": {}}\n}'
    file.write_bytes(content)
    assert user.run("cursor") == 1
    assert user.errors == [f"Cursor: {file}: line 2: not UTF-8. The file is unchanged"]
    assert file.read_bytes() == content


def test_a_file_that_changed_during_the_question_stays(user: User) -> None:
    file = user.write("cursor")
    settings = Settings.from_environment({"EVOLINK_API_KEY": KEY})
    installer = Installer(Machine(user.home, "linux", {}), user.home / "data", COMMAND, [])
    errors: list[str] = []

    def answer(_: str) -> str:
        file.write_text("{}")
        return "y"

    options = Namespace(hosts=["cursor"], undo=False, yes=False, key_in_file=True, store_key=False)
    code = run_install(options, settings, installer, KeyStore(), Console(str, errors.append, ask=answer))
    assert (code, file.read_text()) == (1, "{}")
    assert "another program changed the file" in errors[0]
    assert installer.installed_hosts([]) == []


def test_a_damaged_record_changes_nothing(user: User) -> None:
    file = user.write("cursor")
    user.run("cursor")
    content = file.read_bytes()
    (user.home / "data" / "install" / "installed.json").write_text('{"a": 1}')
    for undo in (False, True):
        assert user.run("cursor", undo=undo) in (1, 2)
        assert "damaged" in user.errors[0]
        assert file.read_bytes() == content


def test_a_lost_copy_is_reported_and_the_file_stays(user: User) -> None:
    file = user.write("cursor")
    user.run("cursor")
    content = file.read_bytes()
    for copy in (user.home / "data" / "install").glob("cursor-*"):
        copy.unlink()
    assert user.run(undo=True) == 1
    assert file.read_bytes() == content


@POSIX
def test_the_file_of_another_process_is_not_half_written(user: User) -> None:
    """The content is replaced in one step: a reader with an open file sees the complete old content."""
    file = user.write("cursor")
    with file.open() as stream:
        user.run("cursor")
        assert stream.read() == SERVERS
    assert [path.name for path in file.parent.iterdir()] == ["mcp.json"]
