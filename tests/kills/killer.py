"""Server processes over stdio that end or fail at operation k.

As a script this file is a launcher: it imports the product once and forks a server for each request. With KILLER_POSITION and
KILLER_MODE the server counts its operations on journal, sockets, files and stdout. At operation k, "kill" sends SIGKILL,
"freeze" sends SIGSTOP, "fail" raises an error instead of the operation, and "late" raises an error after the operation.
"""

from __future__ import annotations

import array
import faulthandler
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from child_processes import minimal_environment, patient_times, without_coverage

FROZEN = "frozen"  # the line in the log before SIGSTOP
FOLDER = Path(__file__).resolve().parent
POSITION, MODE, LOG = "KILLER_POSITION", "KILLER_MODE", "KILLER_LOG"
STOP_AFTER_S = "KILLER_STOP_AFTER_S"  # the time from the last heartbeat until a server with a database stops its work


# --- in the server's process ---------------------------------------------------------------------------------


class Countdown:
    """Counts operations. Kills the process or raises an error at operation `position`."""

    def __init__(self, position: int, mode: str, log: str) -> None:
        self._position = position
        self._mode = mode
        self._log = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY) if log else None
        self._count = 0
        self._lock = threading.Lock()
        self._write = os.write

    def around(
        self, name: str, function: Callable[..., Any], error: Callable[[], Exception] | None
    ) -> Callable[..., Any]:
        """Return `function` with a count. Without `error` the operation can be the last of the process, but never fails."""

        def count_and_run(*args: Any, **options: Any) -> Any:
            with self._lock:
                self._count += 1
                is_target = self._count == self._position
                if self._log is not None:
                    self._write(self._log, f"{name}\n".encode())
            if is_target and self._mode == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if is_target and self._mode == "freeze":
                assert self._log is not None
                self._write(self._log, f"{FROZEN}\n".encode())
                os.kill(os.getpid(), signal.SIGSTOP)
            if is_target and error is not None and self._mode == "fail":
                raise error()
            result = function(*args, **options)
            if is_target and error is not None and self._mode == "late":
                raise error()
            return result

        return count_and_run


def arm(countdown: Countdown) -> None:
    """Count every operation that leaves the process."""
    import errno
    import fcntl
    import sqlite3
    import tempfile

    def io_error() -> Exception:
        return OSError(errno.EIO, "Input/output error")

    def connection_reset() -> Exception:
        return ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> Any:
            name = f"journal: {' '.join(sql.split())[:40]}"
            run = countdown.around(name, super().execute, lambda: sqlite3.OperationalError("disk I/O error"))
            return run(sql, *values)

    if os.environ.get("EVOLINK_MCP_DATABASE_URL"):
        _arm_postgres(countdown)
    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **options: connect(*args, factory=Connection, **options)  # pyright: ignore
    for name in ("connect", "send", "recv"):
        original = getattr(socket.socket, name)
        counted_call = countdown.around(f"socket: {name}", original, connection_reset)

        def choose(sock: Any, *args: Any, original: Any = original, counted_call: Any = counted_call) -> Any:
            return (counted_call if sock.family == socket.AF_INET else original)(sock, *args)

        setattr(socket.socket, name, choose)
    for module, names in ((os, ("link", "fsync", "replace", "unlink", "mkdir", "fdopen")), (fcntl, ("flock",)),
                          (tempfile, ("mkstemp",))):  # fmt: skip
        for name in names:
            setattr(module, name, countdown.around(f"file: {name}", getattr(module, name), io_error))
    # A client does not get an answer that cannot be written. test_shutdown covers failures of stdout.
    to_client = countdown.around("stdout: write", os.write, None)
    to_file = countdown.around("file: write", os.write, io_error)
    os.write = lambda fd, data: (to_client if stat.S_ISFIFO(os.fstat(fd).st_mode) else to_file)(fd, data)


def _arm_postgres(countdown: Countdown) -> None:
    """Count every statement and every end of a transaction, except heartbeats."""
    import psycopg

    def connection_lost() -> Exception:
        return psycopg.OperationalError("the connection is lost")

    def count_calls(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        async def run(*args: Any, **options: Any) -> Any:
            operation = name
            if not operation:
                text = args[1].decode() if isinstance(args[1], bytes) else str(args[1])
                statement = " ".join(text.split())
                if not statement or statement.startswith("UPDATE evolink_servers SET seen_at"):
                    return await original(*args, **options)
                operation = f"journal: {statement[:40]}"
            count = countdown.around(operation, lambda: None, connection_lost)
            if os.environ[MODE] == "late":
                result = await original(*args, **options)
                count()
                return result
            count()
            return await original(*args, **options)

        return run

    connection, transaction = psycopg.AsyncConnection, psycopg.AsyncTransaction
    connection.execute = count_calls("", connection.execute)  # pyright: ignore
    transaction.__aexit__ = count_calls("journal: COMMIT", transaction.__aexit__)  # pyright: ignore


def _serve(request: dict[str, Any], fds: list[int]) -> None:
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    os.environ.clear()
    os.environ.update(without_coverage(request["env"]))
    os.chdir(request["cwd"])
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    faulthandler.enable(2)  # print the stack to stderr if the interpreter crashes
    if MODE in os.environ:
        arm(Countdown(int(os.environ[POSITION]), os.environ[MODE], os.environ.get(LOG, "")))
    # Short times, so that a test does not wait for seconds until another server adopts entries.
    times = None
    if "EVOLINK_MCP_DATABASE_URL" in os.environ:
        stop_after = {"stop_after_s": float(os.environ[STOP_AFTER_S])} if STOP_AFTER_S in os.environ else {}
        times = patient_times(grace_s=0.3, adopt_every_s=0.1, **stop_after)
    from evolink_mcp.cli.main import main

    main(request["argv"], times)


def _prepare_servers() -> None:
    """Do the imports and preparations of a server once, before the forks."""
    import faulty_gateway  # noqa: F401 - it builds an MCP server, and the schemas of the tools stay in memory
    import filelock  # noqa: F401
    import httpcore2  # noqa: F401
    import platformdirs  # noqa: F401
    import truststore  # noqa: F401

    import evolink_mcp.teams.settings  # noqa: F401

    anyio.run(anyio.sleep, 0)


def fork_servers(path: str) -> None:
    """Fork a server for each connection. Send its process ID, and at its end its exit code."""
    import evolink_mcp.app.wiring
    import evolink_mcp.cli.commands
    import evolink_mcp.cli.main
    import evolink_mcp.journal.sqlite
    import evolink_mcp.transports.stdio

    with suppress(ImportError):
        import evolink_mcp.teams.postgres  # noqa: F401

    _prepare_servers()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(100)
        os.write(1, b"ready\n")
        while True:
            connection, _ = listener.accept()
            if os.fork():
                connection.close()
                continue
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            message, fds, _, _ = socket.recv_fds(connection, 1 << 16, 3)
            if (child := os.fork()) == 0:
                connection.close()
                _serve(json.loads(message), fds)
            for fd in fds:
                os.close(fd)
            connection.sendall(array.array("i", [child]).tobytes())
            _, status = os.waitpid(child, 0)
            with suppress(OSError):
                connection.sendall(array.array("i", [os.waitstatus_to_exitcode(status)]).tobytes())
            os._exit(0)


# --- in the test's process -----------------------------------------------------------------------------------


class Server:
    """A forked server and the client of its stdio. One request at a time; notifications are ignored."""

    def __init__(self, connection: socket.socket, stdin: int, stdout: int, stderr_file: Path) -> None:
        self._connection = connection
        self._stdin = stdin
        self._stdout = stdout
        self.stderr_file = stderr_file
        self._rest = b""
        self._number = 0
        self.pid = array.array("i", connection.recv(4))[0]

    async def initialize(self) -> None:
        info = {"name": "killer", "version": "1"}
        await self.ask("initialize", protocolVersion="2025-06-18", capabilities={}, clientInfo=info)
        with suppress(BrokenPipeError):
            self.send({"method": "notifications/initialized"})

    async def call(self, tool: str, **arguments: Any) -> dict[str, Any] | None:
        """Return the tool's result. None: the server ended or is about to end."""
        return await self.ask("tools/call", name=tool, arguments=arguments)

    async def ask(self, method: str, **params: Any) -> dict[str, Any] | None:
        self._number += 1
        number = self._number
        try:
            self.send({"id": number, "method": method, "params": params})
            while (message := await self._read()).get("id") != number:
                pass
        except (EOFError, BrokenPipeError):
            return None
        return message.get("result")

    def send(self, message: dict[str, Any]) -> None:
        os.write(self._stdin, json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")

    async def _read(self) -> dict[str, Any]:
        while b"\n" not in self._rest:
            await anyio.wait_readable(self._stdout)
            chunk = os.read(self._stdout, 1 << 16)
            if not chunk:
                raise EOFError
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def stop_reading(self) -> None:
        """Close the pipe of its stdout."""
        os.close(self._stdout)
        self._stdout = os.open(os.devnull, os.O_RDONLY)

    def close_stdin(self) -> None:
        """Close its stdin."""
        if self._stdin >= 0:
            os.close(self._stdin)
            self._stdin = -1

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    async def wait_for_exit(self) -> int:
        """Wait for the end of the process. Return the exit code, negative after a signal."""
        await anyio.wait_readable(self._connection)
        return array.array("i", self._connection.recv(4))[0]

    async def close(self) -> None:
        self.close_stdin()
        os.close(self._stdout)
        self._connection.close()


class Launcher:
    """Starts servers. Their stderr goes to files in `folder`."""

    def __init__(self, path: str, folder: Path) -> None:
        self._path = path
        self._folder = folder
        self._count = 0

    @asynccontextmanager
    async def server(self, env: dict[str, str], *argv: str, initialize: bool = True) -> AsyncIterator[Server]:
        """Start a server. The end of the block closes its stdin, so that it ends."""
        self._count += 1
        stderr_file = self._folder / f"{self._count}.err"
        (server_stdin, stdin), (stdout, server_stdout) = os.pipe(), os.pipe()
        with stderr_file.open("wb") as stderr, socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self._path)
            # All servers use the same recorded first answers, because to record them takes a second of CPU.
            env = {**env, "XDG_CACHE_HOME": str(self._folder / "cache")}
            request = {"env": env, "cwd": str(self._folder), "argv": list(argv)}
            socket.send_fds(connection, [json.dumps(request).encode()], [server_stdin, server_stdout, stderr.fileno()])
            os.close(server_stdin)
            os.close(server_stdout)
            server = Server(connection, stdin, stdout, stderr_file)
            try:
                if initialize:
                    await server.initialize()
                yield server
            finally:
                with suppress(ProcessLookupError):
                    if sys.exc_info()[0] is not None:
                        server.kill()
                await server.close()


@contextmanager
def open_launcher(folder: Path) -> Iterator[Launcher]:
    path = str(folder / "launcher")
    # coverage crashed at the end of forked servers.
    env = {
        **without_coverage(os.environ),
        "PYTHONPATH": os.pathsep.join(
            [str(FOLDER.parent), str(FOLDER.parent / "faults"), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    with subprocess.Popen([sys.executable, __file__, path], stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            launcher = Launcher(path, folder)
            anyio.run(_record_first_answers, launcher, folder)
            yield launcher
        finally:
            process.kill()


async def _record_first_answers(launcher: Launcher, folder: Path) -> None:
    home = folder / "recorder"
    home.mkdir()
    async with launcher.server(minimal_environment(home)):
        while not list((folder / "cache").rglob("startup-*.tsv")):
            await anyio.sleep(0.02)


@pytest.fixture(scope="session", name="launcher")
def shared_launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Return one launcher for all tests, because importing the product takes longer than a test."""
    with open_launcher(tmp_path_factory.mktemp("launcher")) as launcher:
        yield launcher


if __name__ == "__main__":
    fork_servers(sys.argv[1])
