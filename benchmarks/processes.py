"""Start and measure child processes: MCP servers over a raw pipe, and the stand-in for EvoLink."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-benchmark-0123456789"
TIMEOUT_S = 120.0
SERVERS = {
    "ours": ["-P", "-m", "evolink_mcp"],
    "bare": ["-m", "benchmarks.servers", "sdk"],
    "empty": ["-m", "benchmarks.servers", "ours"],
}


def environment(folder: Path, port: int = 9) -> dict[str, str]:
    """Return a minimal environment, without the settings of this user."""
    inherited = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LANG") if name in os.environ}
    return inherited | {
        "HOME": str(folder),
        "EVOLINK_API_KEY": KEY,
        "EVOLINK_BASE_URL": f"http://127.0.0.1:{port}",
        "EVOLINK_MCP_DATA_DIR": str(folder / "data"),
        "EVOLINK_MCP_OUTPUT_DIR": str(folder / "pictures"),
    }


class Pipe:
    """A server process with a minimal client: it writes a line and reads a line."""

    def __init__(
        self, arguments: list[str], env: dict[str, str], fds: tuple[int, ...] = (), program: str | None = None
    ) -> None:
        self.process = subprocess.Popen(
            [program or sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            cwd=ROOT, env=env, pass_fds=fds,
        )  # fmt: skip
        self._last_id = 0
        self._timeout = threading.Timer(TIMEOUT_S, self.process.kill)
        self._timeout.daemon = True
        self._timeout.start()

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        self._timeout.cancel()
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def initialize(self) -> Any:
        """Initialize the session as an MCP host does, and return the list of tools."""
        client = {"name": "benchmark", "version": "1"}
        self.request("initialize", {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": client})
        self._send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        return self.request("tools/list", {})

    def wait_until_ready(self) -> None:
        """Wait until the server has imported everything: only then it answers an unknown method."""
        with suppress(RuntimeError):
            self.request("nothing/known", {})

    def call(self, tool: str, arguments: dict[str, Any]) -> Any:
        return self.request("tools/call", {"name": tool, "arguments": arguments})

    def request(self, method: str, params: dict[str, Any]) -> Any:
        self._last_id += 1
        self._send({"jsonrpc": "2.0", "id": self._last_id, "method": method, "params": params})
        return self._answer()

    def flood(self, tool: str, arguments: dict[str, Any], at_once: int) -> None:
        """Write `at_once` calls together and read all answers."""
        params = {"name": tool, "arguments": arguments}
        lines = []
        for _ in range(at_once):
            self._last_id += 1
            lines.append(json.dumps({"jsonrpc": "2.0", "id": self._last_id, "method": "tools/call", "params": params}))
        assert self.process.stdin
        self.process.stdin.write("".join(f"{line}\n" for line in lines).encode())
        self.process.stdin.flush()
        for _ in range(at_once):
            self._answer()

    def _send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def _answer(self) -> Any:
        assert self.process.stdout
        while line := self.process.stdout.readline():
            message = json.loads(line)
            if "id" in message and "method" not in message:
                if "error" in message:
                    raise RuntimeError(f"the server answered: {message['error']}")
                return message["result"]
        raise RuntimeError("the server ended or gave no answer in time")


def record_first_answers(env: dict[str, str], home: Path) -> None:
    """Run the server until its recording is in the cache folder."""
    end = time.monotonic() + TIMEOUT_S
    with Pipe(SERVERS["ours"], env) as pipe:
        pipe.initialize()
        while not list(home.rglob("startup-*.tsv")):
            if time.monotonic() > end:
                raise RuntimeError("the server did not record its first answers")
            time.sleep(0.05)


class Standin:
    """The stand-in for EvoLink in a separate process (`benchmarks.standin`)."""

    def __init__(self, port: int) -> None:
        self.port = port

    def record(self) -> dict[str, Any]:
        """Return the counts of requests and the times of polls, purchases and downloads."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/benchmark", timeout=30) as answer:
            return json.load(answer)

    def end_all(self, within_s: float) -> None:
        """Complete every task within this time from now."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/benchmark/end?{within_s}", timeout=30):
            pass


@contextmanager
def standin(pictures: str = "dot", *, batch: bool = True, callback_port: int | None = None) -> Iterator[Standin]:
    options = [
        *([] if batch else ["--no-batch"]),
        *([] if callback_port is None else ["--callbacks", str(callback_port)]),
    ]
    arguments = [sys.executable, "-m", "benchmarks.standin", pictures, *options]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout
    try:
        yield Standin(int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def memory_mb(pid: int | None = None) -> float:
    """Return the resident memory of a process."""
    status = Path(f"/proc/{pid or 'self'}/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024
    ps = subprocess.run(["ps", "-o", "rss=", "-p", str(pid or os.getpid())], capture_output=True, check=True)
    return int(ps.stdout) / 1024


def cpu_s(pid: int) -> float | None:
    """Return the CPU time of a child process so far; None if the system does not report it."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return None
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def timed(action: Any) -> float:
    started_at = time.perf_counter()
    action()
    return time.perf_counter() - started_at
