"""Start a PostgreSQL server in a temporary folder, without root privileges and without a port."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

ACCOUNTS = ("postgres", "nobody")  # initdb refuses root


def find_programs() -> Path | None:
    """Return the folder of PostgreSQL's server programs, or None if it is not installed."""
    initdb = shutil.which("initdb")
    folders = (
        [Path(initdb).resolve().parent] if initdb else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    )
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


class Cluster:
    """A running PostgreSQL server. `database` creates an empty database."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder = folder
        self._programs = programs
        self._numbers = itertools.count(1)
        self._user_options: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = next(pwd.getpwnam(name) for name in ACCOUNTS if name in {entry.pw_name for entry in pwd.getpwall()})
            self._user_options = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(folder, user.pw_uid, user.pw_gid)

    def make(self) -> None:
        self._run(
            "initdb",
            "-D",
            "data",
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--locale=C.UTF-8",
            "--locale-provider=icu",
            "--icu-locale=en-US",
            "--no-sync",
        )
        settings = {
            "unix_socket_directories": f"'{self.folder}'", "listen_addresses": "''", "fsync": "off",
            "max_connections": "200", "shared_buffers": "16MB", "autovacuum": "off",
        }  # fmt: skip
        with (self.folder / "data" / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in settings.items())

    def copy(self, url: str) -> None:
        """Become a standby of the server at `url`."""
        self._run("pg_basebackup", "-D", "data", "--write-recovery-conf", "--checkpoint=fast", "-d", url)
        with (self.folder / "data" / "postgresql.conf").open("a") as file:
            file.write(f"unix_socket_directories = '{self.folder}'\n")

    def promote(self) -> None:
        self._run("pg_ctl", "-D", "data", "-w", "-t", "120", "promote")

    def stop_replication(self) -> None:
        """Receive no more changes of the primary."""
        with self.admin() as db:
            db.execute("ALTER SYSTEM SET primary_conninfo = ''")
            db.execute("SELECT pg_reload_conf()")
            while db.execute("SELECT count(*) FROM pg_stat_wal_receiver").fetchone() != (0,):
                pass

    def wait_for(self, primary: Cluster) -> None:
        """Wait until this standby has all changes of its primary."""
        with primary.admin() as db:
            (position,) = db.execute("SELECT pg_current_wal_insert_lsn()").fetchone() or ("",)
        with self.admin() as db:
            while db.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", (position,)).fetchone() != (True,):
                pass

    def start(self) -> None:
        self._run("pg_ctl", "-D", "data", "-l", "log", "-w", "-t", "120", "start")

    def stop(self) -> None:
        if (self.folder / "data" / "postmaster.pid").exists():
            self._run("pg_ctl", "-D", "data", "-m", "immediate", "-w", "-t", "120", "stop")

    def url(self, name: str) -> str:
        return f"postgresql://postgres@/{name}?host={self.folder}"

    def database(self) -> str:
        name = f"t{next(self._numbers)}"
        with self.admin() as db:
            db.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)

    @contextmanager
    def admin(self, name: str = "postgres") -> Iterator[psycopg.Connection]:
        with psycopg.connect(self.url(name), autocommit=True) as db:
            yield db

    @contextmanager
    def standby(self) -> Iterator[Cluster]:
        """Run a standby of this server, which replicates asynchronously."""
        with _folder() as folder:
            standby = Cluster(folder, self._programs)
            standby.copy(self.url("postgres"))
            standby.start()
            try:
                yield standby
            finally:
                standby.stop()

    def _run(self, program: str, *arguments: str) -> None:
        run = subprocess.run(
            [self._programs / program, *arguments], cwd=self.folder, env={"PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if program == "initdb" else subprocess.DEVNULL,
            stderr=subprocess.STDOUT if program == "initdb" else subprocess.DEVNULL, **self._user_options,
        )  # fmt: skip
        log = self.folder / "log"
        assert run.returncode == 0, (program, run.stdout, log.read_text()[-2000:] if log.exists() else "")


@contextmanager
def run_cluster() -> Iterator[Cluster]:
    programs = find_programs()
    assert programs is not None
    with _folder() as folder:
        cluster = Cluster(folder, programs)
        cluster.make()
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # short: a socket's path has 107 bytes at most
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
