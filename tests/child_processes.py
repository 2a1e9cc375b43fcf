"""How tests start this package in another process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import Process

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


class HttpServer:
    """A server process on a free port, and the start of its log."""

    def __init__(self, process: Process, log: str) -> None:
        self.process = process
        self.log = log
        (port,) = re.findall(r"serves http://[^ ]*?:([0-9]+)/", log)
        self.url = f"http://127.0.0.1:{port}"

    async def read_log(self) -> str:
        """Return the complete log after the end of the process."""
        assert self.process.stderr is not None
        return self.log + b"".join([part async for part in self.process.stderr]).decode()


@asynccontextmanager
async def open_http_server(*options: str, env: Mapping[str, str]) -> AsyncIterator[HttpServer]:
    """Start `evolink-mcp http` and wait until it serves. Kill it at the end, also if a check of the test fails."""
    command = [*SERVER_COMMAND, "http", "--port", "0", *options]
    async with await anyio.open_process(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:
        try:
            assert process.stderr is not None
            log = b""
            while not re.search(rb"serves .*\n", log):
                log += await process.stderr.receive()
            yield HttpServer(process, log.decode())
        finally:
            with suppress(ProcessLookupError):
                process.kill()


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
