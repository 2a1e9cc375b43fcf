"""The environment for other MCP clients: a simulated EvoLink, this server on two ports, and a separate home folder.

It uses only the standard library, because some clients run in environments without the package.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UP_WITHIN_S = 120.0
PICTURE_S = "1"
TRANSPORTS = ("stdio", "http", "sse")
PATH = "/usr/local/bin:/usr/bin:/bin"
TOOLS = {tool["name"] for tool in json.loads((Path(__file__).parents[2] / "manifest.json").read_text("utf-8"))["tools"]}


class Stage:
    """Addresses and environments for a client. Use it as a context manager. All files are below `work`."""

    def __init__(self, python: str, work: Path) -> None:
        # Not resolved: Python finds its virtual environment by the path of the link.
        python = python if os.sep not in python else os.path.abspath(python)
        # A checkout that is not installed is started without PYTHONPATH: Gemini CLI withholds it from servers.
        start = ["-P", "-m", "evolink_mcp"]
        if subprocess.run(
            [python, "-P", "-c", "import evolink_mcp"], cwd="/", capture_output=True, timeout=300
        ).returncode:
            start = [
                "-P",
                "-c",
                f"import sys; sys.path.insert(0, {str(ROOT)!r}); from evolink_mcp.cli.main import main; main()",
            ]
        self.command = [python, *start]
        self.work = work
        self.home = work / "home"
        self.home.mkdir(parents=True, exist_ok=True)
        self.pictures = work / "pictures"
        self._stack = ExitStack()

    def __enter__(self) -> Stage:
        simulator, self.http_port, self.sse_port = free_port(), free_port(), free_port()
        self.server_env = {
            "HOME": str(self.home),
            "PATH": PATH,
            "EVOLINK_API_KEY": "sk-simulated",
            "EVOLINK_BASE_URL": f"http://127.0.0.1:{simulator}",
            "EVOLINK_MCP_DATA_DIR": str(self.work / "data"),
            "EVOLINK_MCP_OUTPUT_DIR": str(self.pictures),
        }
        try:
            self._serve("simulate", simulator, "--seconds", PICTURE_S)
            self._serve("http", self.http_port)
            self._serve("sse", self.sse_port)
            wait_until_up(f"http://127.0.0.1:{simulator}/v1/credits")
            for port in (self.http_port, self.sse_port):
                wait_until_up(f"http://127.0.0.1:{port}/healthz")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def url(self, transport: str) -> str:
        port, path = (self.http_port, "mcp") if transport == "http" else (self.sse_port, "sse")
        return f"http://127.0.0.1:{port}/{path}"

    def target(self, transport: str) -> dict:
        """Return the server's address over `transport` for the client scripts."""
        if transport == "stdio":
            command, *args = self.command
            return {"transport": transport, "command": command, "args": args, "env": self.server_env}
        return {"transport": transport, "url": self.url(transport)}

    def client_env(self, **options: str) -> dict[str, str]:
        """Return a minimal environment without variables of the caller."""
        return {"HOME": str(self.home), "PATH": PATH, "LANG": "C.UTF-8", **options}

    def journal_entries(self) -> list[dict]:
        """Return the journal's entries, newest first."""
        process = subprocess.run(
            [*self.command, "tasks", "--json", "--limit", "500"], env=self.server_env, cwd=self.home,
            capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        return json.loads(process.stdout)

    def _serve(self, command: str, port: int, *options: str) -> None:
        log = self.work / f"{command}.log"
        arguments = [*self.command, command, "--port", str(port), *options]
        self._stack.enter_context(background(arguments, self.server_env, log, self.home))


@contextmanager
def background(command: list[str], env: dict[str, str], log: Path, cwd: Path):
    """Run a process until the block ends."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_up(url: str) -> None:
    """Return when a server answers at `url` with any status."""
    deadline = time.monotonic() + UP_WITHIN_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


class Score:
    """Print one line per check and count the results."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    def record(self, name: str, problem: str = "", remark: str = "") -> None:
        """Count and print a check. It failed if `problem` is not empty."""
        self.passed += not problem
        self.failed += bool(problem)
        note = f"  {problem or remark}" if problem or remark else ""
        print(f"{'FAIL' if problem else 'ok  '} {name}{note}", flush=True)

    def close(self) -> int:
        print(f"{self.passed} passed, {self.failed} failed", flush=True)
        return 1 if self.failed else 0


def npm_install(npm: str, source: Path, folder: Path, env: dict[str, str] | None = None) -> None:
    """Install the packages of `source/package.json` into `folder`, without a lock file."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".mjs"):
            shutil.copy(file, folder)
    process = subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", "--no-package-lock", "--no-update-notifier", "--loglevel=error"],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if process.returncode:
        sys.stderr.write(process.stdout + process.stderr)
        raise RuntimeError(f"npm install failed in {folder.name}")
