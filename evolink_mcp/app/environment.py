"""Read the environment of this process. No other module does.

The start of a stdio session imports this module before everything else, so it imports little.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

TYPE_CHECKING = False  # `typing` takes long to import
if TYPE_CHECKING:
    from evolink_mcp.pasted import PathSystem

PREFIX = "EVOLINK_"  # of all variables of this project
TOOLS_VARIABLE = "EVOLINK_MCP_TOOLS"


def environment() -> Mapping[str, str]:
    """Return all environment variables."""
    return os.environ


def tools_text() -> str:
    """Return the unparsed setting of the published tools."""
    return os.environ.get(TOOLS_VARIABLE, "")


def cache_folder() -> str:
    """Return the folder for files that the server can create again, as platformdirs does."""
    if sys.platform == "win32":
        import platformdirs

        # Only the system knows the folder: an MCP host may pass no LOCALAPPDATA.
        return platformdirs.user_cache_dir("evolink-mcp", appauthor=False)
    # The import of platformdirs would take a third of the time before the first answer.
    if sys.platform == "darwin":
        return os.path.expanduser("~/Library/Caches/evolink-mcp")
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    return os.path.join(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "evolink-mcp")


def folder_variables() -> dict[str, str]:
    """Return the variables that move the configuration of MCP hosts, and PATH."""
    names = ("APPDATA", "LOCALAPPDATA", "XDG_CONFIG_HOME", "CLAUDE_CONFIG_DIR", "CODEX_HOME", "COPILOT_HOME", "PATH")
    return {name: value for name in names if (value := os.environ.get(name))}


def path_system() -> PathSystem:
    """Return the system of the paths that callers write."""
    from evolink_mcp.pasted import PathSystem

    return PathSystem(is_windows=os.name == "nt", distribution=os.environ.get("WSL_DISTRO_NAME") or None)


def has_display() -> bool:
    """Whether a graphical desktop runs (Linux)."""
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def has_links() -> bool:
    """Whether the terminal may show links (OSC 8). Terminals that do not know them ignore them, old consoles do not."""
    return os.environ.get("TERM") != "dumb" and (os.name != "nt" or "WT_SESSION" in os.environ)


def environment_without_settings() -> dict[str, str]:
    """Return this process's environment for a child process with its own settings."""
    # The demo must not spend with the key of the user.
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}


def decoder_environment() -> dict[str, str]:
    """Return the complete environment of the image decoder: only the variables that Python needs to start."""
    # Windows' sockets and random numbers need SYSTEMROOT. Some builds of Python find their libraries by the others.
    names = ("SYSTEMROOT", "WINDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    return {name: value for name in names if (value := os.environ.get(name))}
