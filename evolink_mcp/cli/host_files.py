"""The configuration files of MCP hosts on each system."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from evolink_mcp.cli.config_text import ConfigFormat, Json, Toml

# The package of Claude Desktop from the Microsoft Store has its own folder for APPDATA.
CLAUDE_STORE_PACKAGE = "Claude_pzs8sxrjxfjjc"
CLINE_FILE = ("settings", "cline_mcp_settings.json")


@dataclass(frozen=True, slots=True)
class Machine:
    """The folders of a user. `system` is a value of `sys.platform`, `variables` are environment variables."""

    home: Path
    system: str
    variables: Mapping[str, str]

    @property
    def application_folder(self) -> Path:
        """The folder in which desktop applications keep their configuration."""
        if self.system == "win32":
            return self.folder("APPDATA", self.home / "AppData" / "Roaming")
        if self.system == "darwin":
            return self.home / "Library" / "Application Support"
        return self.config_folder

    @property
    def config_folder(self) -> Path:
        """The folder of the XDG specification, on every system."""
        return self.folder("XDG_CONFIG_HOME", self.home / ".config")

    def folder(self, variable: str, default: Path) -> Path:
        """Return the absolute folder of a variable, else `default`."""
        folder = Path(self.variables.get(variable, ""))
        # The XDG specification lets programs ignore relative paths.
        return folder if folder.is_absolute() else default

    def has_program(self, name: str) -> bool:
        """Whether PATH contains a program."""
        return shutil.which(name, path=self.variables.get("PATH", "")) is not None


@dataclass(frozen=True, slots=True)
class HostFile:
    """The place of a host's configuration.

    `files` returns the possible files; the first existing one is used, else the first. The host is present if one of
    these files, a folder of `traces` or the program exists. `table` is the path of the table of servers in the file;
    `inner_table` replaces it where it exists.
    """

    host: str
    title: str
    files: Callable[[Machine], tuple[Path, ...]]
    traces: Callable[[Machine], tuple[Path, ...]]
    syntax: ConfigFormat
    table: tuple[str, ...]
    inner_table: tuple[str, ...] | None = None
    program: str | None = None

    def file(self, machine: Machine) -> Path:
        """Return the configuration file. It may not exist."""
        files = self.files(machine)
        # A link to a missing file is a choice of the user too.
        return next((file for file in files if file.exists() or file.is_symlink()), files[0])

    def is_present(self, machine: Machine) -> bool:
        """Whether this machine has the host."""
        if any(path.exists() for path in (*self.files(machine), *self.traces(machine))):
            return True
        return self.program is not None and machine.has_program(self.program)


def _claude_desktop(machine: Machine) -> tuple[Path, ...]:
    name = "claude_desktop_config.json"
    folders = [machine.application_folder / "Claude"]
    if machine.system == "win32":
        local = machine.folder("LOCALAPPDATA", machine.home / "AppData" / "Local")
        folders.append(local / "Packages" / CLAUDE_STORE_PACKAGE / "LocalCache" / "Roaming" / "Claude")
    return tuple(folder / name for folder in folders)


def _claude_code(machine: Machine) -> tuple[Path, ...]:
    return (machine.folder("CLAUDE_CONFIG_DIR", machine.home) / ".claude.json",)


def _vscode_user(machine: Machine) -> tuple[Path, ...]:
    return tuple(machine.application_folder / name / "User" for name in ("Code", "Code - Insiders"))


def _vscode(machine: Machine) -> tuple[Path, ...]:
    folders = [folder for folder in _vscode_user(machine) if folder.exists()] or [_vscode_user(machine)[0]]
    return tuple(folder / "mcp.json" for folder in folders)


def _cline_folders(machine: Machine) -> tuple[Path, ...]:
    extensions = (user / "globalStorage" / "saoudrizwan.claude-dev" for user in _vscode_user(machine))
    return (*extensions, machine.home / ".cline" / "data")


def _cline(machine: Machine) -> tuple[Path, ...]:
    folders = [folder for folder in _cline_folders(machine) if folder.exists()] or [_cline_folders(machine)[0]]
    return tuple(folder.joinpath(*CLINE_FILE) for folder in folders)


def _zed(machine: Machine) -> tuple[Path, ...]:
    if machine.system == "win32":
        return (machine.application_folder / "Zed" / "settings.json",)
    # Zed ignores XDG_CONFIG_HOME on macOS.
    folder = machine.home / ".config" if machine.system == "darwin" else machine.config_folder
    return (folder / "zed" / "settings.json",)


def _opencode(machine: Machine) -> tuple[Path, ...]:
    folder = machine.config_folder / "opencode"
    return tuple(folder / name for name in ("opencode.json", "opencode.jsonc", "config.json"))


def _lm_studio(machine: Machine) -> tuple[Path, ...]:
    folders = (machine.home / ".lmstudio", machine.home / ".cache" / "lm-studio")
    present = [folder for folder in folders if folder.exists()] or [folders[0]]
    return tuple(folder / "mcp.json" for folder in present)


def _below_home(*parts: str) -> Callable[[Machine], tuple[Path, ...]]:
    return lambda machine: (machine.home.joinpath(*parts),)


def _parents(files: Callable[[Machine], tuple[Path, ...]]) -> Callable[[Machine], tuple[Path, ...]]:
    return lambda machine: tuple(file.parent for file in files(machine))


def _codex(machine: Machine) -> tuple[Path, ...]:
    return (machine.folder("CODEX_HOME", machine.home / ".codex") / "config.toml",)


def _copilot(machine: Machine) -> tuple[Path, ...]:
    return (machine.folder("COPILOT_HOME", machine.home / ".copilot") / "mcp-config.json",)


_CURSOR = _below_home(".cursor", "mcp.json")
_GEMINI = _below_home(".gemini", "settings.json")
_WINDSURF = _below_home(".codeium", "windsurf", "mcp_config.json")
_JUNIE = _below_home(".junie", "mcp", "mcp.json")
_SERVERS = ("mcpServers",)

HOST_FILES = (
    HostFile("claude-desktop", "Claude Desktop", _claude_desktop, _parents(_claude_desktop), Json(), _SERVERS),
    HostFile("claude-code", "Claude Code", _claude_code, _below_home(".claude"), Json(), _SERVERS, program="claude"),
    HostFile("cursor", "Cursor", _CURSOR, _parents(_CURSOR), Json(), _SERVERS, program="cursor"),
    HostFile("vscode", "VS Code", _vscode, _vscode_user, Json(), ("servers",), program="code"),
    HostFile("codex", "Codex", _codex, _parents(_codex), Toml(), ("mcp_servers",), program="codex"),
    HostFile("gemini-cli", "Gemini CLI", _GEMINI, _parents(_GEMINI), Json(), _SERVERS, program="gemini"),
    HostFile("windsurf", "Windsurf", _WINDSURF, _parents(_WINDSURF), Json(), _SERVERS),
    HostFile("zed", "Zed", _zed, _parents(_zed), Json(), ("context_servers",)),
    HostFile(
        "opencode",
        "opencode",
        _opencode,
        _parents(_opencode),
        Json(),
        ("mcp",),
        # opencode 2 has its servers one level deeper.
        inner_table=("mcp", "servers"),
        program="opencode",
    ),
    HostFile("copilot", "Copilot CLI", _copilot, _parents(_copilot), Json(), _SERVERS),
    HostFile("cline", "Cline", _cline, _cline_folders, Json(), _SERVERS),
    HostFile("junie", "JetBrains Junie", _JUNIE, _below_home(".junie"), Json(), _SERVERS),
    HostFile("lm-studio", "LM Studio", _lm_studio, _parents(_lm_studio), Json(), _SERVERS),
)
