"""How tests start this package in another process."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evolink_mcp.teams.database_url import DatabaseTimes

DATABASE_TIMEOUT_S = 120
# A test fails if a server needs longer for an answer. A busy machine can stop for seconds.
ANSWER_TIMEOUT_S = 120
# -P keeps the working directory off the import path. There, a file of a project could replace a module.
SERVER_COMMAND = [sys.executable, "-P", "-m", "evolink_mcp"]


def minimal_environment(home: Path, **settings: str) -> dict[str, str]:
    """Return the environment that an MCP host gives to a server: home, path, `settings`. Keep variables of coverage."""
    inherited = {name: value for name, value in os.environ.items() if name == "PATH" or name.startswith("COVERAGE_")}
    return {"HOME": str(home), **inherited, **settings}


def cache_folders(home: Path) -> list[Path]:
    """Return the cache folders of a server process whose home is `home`.

    Windows does not derive the folder from the home. The server must not use the cache of this user.
    """
    from evolink_mcp.app.environment import cache_folder

    if sys.platform == "win32":
        return [Path(cache_folder())]
    return [home / ".cache" / "evolink-mcp", home / "Library" / "Caches" / "evolink-mcp"]


def without_coverage(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables that measure the coverage of child processes."""
    return {name: value for name, value in environ.items() if not name.startswith("COVERAGE_")}


def patient_times(**times: float) -> DatabaseTimes:
    """Return the times of a server that waits DATABASE_TIMEOUT_S for the database. A busy machine can stop for seconds."""
    from evolink_mcp.teams.database_url import DatabaseTimes

    long_times: dict[str, Any] = {"connect_timeout_s": DATABASE_TIMEOUT_S, "stop_after_s": float(DATABASE_TIMEOUT_S)}
    return DatabaseTimes(**{**long_times, **times})
