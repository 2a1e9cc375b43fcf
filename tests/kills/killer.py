"""Real server processes over real stdio that end, or fail, at their k-th operation.

As a script it is a nursery: it imports the product once, and forks a server whenever it is asked to. A server that
was told so counts its operations on journal, sockets, files and stdout, and at the k-th of them is killed by
SIGKILL ("kill"), has it fail undone ("fail"), or has it done and then fail ("late").
"""

from __future__ import annotations

import array
import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from child_processes import raise_database_timeouts, without_coverage

HERE = Path(__file__).resolve().parent
AT, HOW, LOG = "KILLER_AT", "KILLER_HOW", "KILLER_LOG"


# --- in the server's process ---------------------------------------------------------------------------------


class Countdown:
    """Counts operations and strikes at the k-th."""

    def __init__(self, at: int, how: str, log: str) -> None:
        self._at, self._how, self._log = at, how, os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY) if log else None
        self._count = 0
        self._lock = threading.Lock()
        self._write = os.write

    def around(self, name: str, act: Callable[..., Any], error: Callable[[], Exception]) -> Callable[..., Any]:
        def counted(*args: Any, **more: Any) -> Any:
            with self._lock:
                self._count += 1
                struck = self._count == self._at
                if self._log is not None:
                    self._write(self._log, f"{name}\n".encode())
            if struck and self._how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if struck and self._how == "fail":
                raise error()
            result = act(*args, **more)
            if struck:
                raise error()
            return result

        return counted


def arm(countdown: Countdown) -> None:
    """Every way out of the process goes through the countdown."""
    import errno
    import fcntl
    import sqlite3
    import tempfile

    def broken() -> Exception:
        return OSError(errno.EIO, "Input/output error")

    def reset() -> Exception:
        return ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *more: Any) -> Any:
            name = f"journal: {' '.join(sql.split())[:40]}"
            run = countdown.around(name, super().execute, lambda: sqlite3.OperationalError("disk I/O error"))
            return run(sql, *more)

    if os.environ.get("EVOLINK_MCP_DATABASE_URL"):
        _arm_postgres(countdown)
    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **more: connect(*args, factory=Connection, **more)  # pyright: ignore
    for name in ("connect", "send", "recv"):
        plain = getattr(socket.socket, name)
        counted = countdown.around(f"socket: {name}", plain, reset)

        def choose(sock: Any, *args: Any, plain: Any = plain, counted: Any = counted) -> Any:
            return (counted if sock.family == socket.AF_INET else plain)(sock, *args)

        setattr(socket.socket, name, choose)
    for module, names in ((os, ("link", "fsync", "replace", "unlink", "mkdir", "fdopen", "write")), (fcntl, ("flock",)),
                          (tempfile, ("mkstemp",))):  # fmt: skip
        for name in names:
            setattr(module, name, countdown.around(f"file: {name}", getattr(module, name), broken))


def _arm_postgres(countdown: Countdown) -> None:
    """Every statement and every end of a transaction goes through the countdown, but for what only asks for a sign of life."""
    import psycopg

    def lost() -> Exception:
        return psycopg.OperationalError("the connection is lost")

    def counted(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        async def run(*args: Any, **more: Any) -> Any:
            told = name
            if not told:
                said = args[1].decode() if isinstance(args[1], bytes) else str(args[1])
                if not said or said.startswith("UPDATE evolink_servers SET seen_at"):
                    return await plain(*args, **more)
                told = f"journal: {' '.join(said.split())[:40]}"
            strike = countdown.around(told, lambda: None, lost)
            if os.environ[HOW] == "late":  # it is done, and then fails
                result = await plain(*args, **more)
                strike()
                return result
            strike()
            return await plain(*args, **more)

        return run

    connection, transaction = psycopg.AsyncConnection, psycopg.AsyncTransaction
    connection.execute = counted("", connection.execute)  # pyright: ignore
    transaction.__aexit__ = counted("journal: COMMIT", transaction.__aexit__)  # pyright: ignore


def _serve(order: dict[str, Any], fds: list[int]) -> None:
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    os.environ.clear()
    os.environ.update(without_coverage(order["env"]))
    os.chdir(order["cwd"])
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    faulthandler.enable(2)  # a crash of the interpreter says on stderr where it was
    if HOW in os.environ:
        arm(Countdown(int(os.environ[AT]), os.environ[HOW], os.environ.get(LOG, "")))
    if os.environ.get("EVOLINK_MCP_DATABASE_URL"):
        from evolink_mcp.teams import database, postgres

        raise_database_timeouts()
        database.Database.__init__.__kwdefaults__["grace_s"] = 0.3  # no test waits for seconds
        postgres.PostgresBackend.adopt_every_s = 0.1
    from evolink_mcp.cli.main import main

    main(order["argv"])


def _nursery(path: str) -> None:
    """Fork a server for every connection; tell its process id at once and its wait status at its end."""
    import evolink_mcp.app.wiring
    import evolink_mcp.cli.main
    import evolink_mcp.journal.sqlite
    import evolink_mcp.transports.stdio

    with suppress(ImportError):
        import evolink_mcp.teams.postgres  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path)
        door.listen(100)
        os.write(1, b"ready\n")
        while True:
            line, _ = door.accept()
            if os.fork():
                line.close()
                continue
            door.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            told, fds, _, _ = socket.recv_fds(line, 1 << 16, 3)
            if (child := os.fork()) == 0:
                line.close()
                _serve(json.loads(told), fds)
            for fd in fds:
                os.close(fd)
            line.sendall(array.array("i", [child]).tobytes())
            _, status = os.waitpid(child, 0)
            with suppress(OSError):
                line.sendall(array.array("i", [os.waitstatus_to_exitcode(status)]).tobytes())
            os._exit(0)


# --- in the test's process -----------------------------------------------------------------------------------


class Server:
    """A forked server and its client's end of the wire: one request at a time, notifications are read over."""

    def __init__(self, line: socket.socket, into: int, out: int, err: Path) -> None:
        self._line, self._into, self._out, self.err = line, into, out, err
        self._rest = b""
        self._number = 0
        self.pid = array.array("i", line.recv(4))[0]

    async def hello(self) -> None:
        info = {"name": "killer", "version": "1"}
        await self.ask("initialize", protocolVersion="2025-06-18", capabilities={}, clientInfo=info)
        with suppress(BrokenPipeError):
            self.send({"method": "notifications/initialized"})

    async def call(self, tool: str, **arguments: Any) -> dict[str, Any] | None:
        """The tool's result, or None when the server has gone or is going."""
        return await self.ask("tools/call", name=tool, arguments=arguments)

    async def ask(self, method: str, **params: Any) -> dict[str, Any] | None:
        self._number += 1
        number = self._number
        try:
            self.send({"id": number, "method": method, "params": params})
            while (told := await self._read()).get("id") != number:
                pass
        except (EOFError, BrokenPipeError):
            return None
        return told.get("result")

    def send(self, message: dict[str, Any]) -> None:
        os.write(self._into, json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")

    async def _read(self) -> dict[str, Any]:
        while b"\n" not in self._rest:
            await anyio.wait_readable(self._out)
            chunk = os.read(self._out, 1 << 16)
            if not chunk:
                raise EOFError
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def hang_up(self) -> None:
        """Close its stdin."""
        if self._into >= 0:
            os.close(self._into)
            self._into = -1

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    async def gone(self) -> int:
        """The exit code; negative for a signal that killed it."""
        await anyio.wait_readable(self._line)
        return array.array("i", self._line.recv(4))[0]

    async def close(self) -> None:
        self.hang_up()
        os.close(self._out)
        self._line.close()


class Nursery:
    """Makes servers. `folder` takes their stderr."""

    def __init__(self, path: str, folder: Path) -> None:
        self._path, self._folder = path, folder
        self._count = 0

    @asynccontextmanager
    async def server(self, env: dict[str, str], *argv: str, greet: bool = True) -> AsyncIterator[Server]:
        """A server; it is gone when the block ends, by a closed stdin unless it was killed before."""
        self._count += 1
        err = self._folder / f"{self._count}.err"
        (theirs_in, ours_in), (ours_out, theirs_out) = os.pipe(), os.pipe()
        with err.open("wb") as errors, socket.socket(socket.AF_UNIX) as line:
            line.connect(self._path)
            order = {"env": env, "cwd": str(self._folder), "argv": list(argv)}
            socket.send_fds(line, [json.dumps(order).encode()], [theirs_in, theirs_out, errors.fileno()])
            os.close(theirs_in)
            os.close(theirs_out)
            server = Server(line, ours_in, ours_out, err)
            try:
                if greet:
                    await server.hello()
                yield server
            finally:
                with suppress(ProcessLookupError):
                    if sys.exc_info()[0] is not None:
                        server.kill()
                await server.close()


@contextmanager
def nursery(folder: Path) -> Iterator[Nursery]:
    path = str(folder / "nursery")
    # What measures coverage has crashed at the end of such servers.
    env = {
        **without_coverage(os.environ),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with subprocess.Popen([sys.executable, __file__, path], stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield Nursery(path, folder)
        finally:
            process.kill()


@pytest.fixture(scope="session", name="servers")
def nursery_of_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """One nursery for all tests of a module: to import the product takes longer than any of them."""
    with nursery(tmp_path_factory.mktemp("nursery")) as made:
        yield made


if __name__ == "__main__":
    _nursery(sys.argv[1])
