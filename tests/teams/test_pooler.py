"""Behind a pooler that shares sessions no server starts. With a session for each connection the journal works."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

pytest.importorskip("psycopg")
from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.teams.database import open_database

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(shutil.which("pgbouncer") is None, reason="pgbouncer is not installed; .ci/run installs it"),
]


@contextmanager
def pooler(cluster: Any, database_url: str, mode: str) -> Iterator[str]:
    """Run PgBouncer before a database. Yield the URL of the database behind it."""
    name = database_url.partition("@/")[2].partition("?")[0]
    with tempfile.TemporaryDirectory(prefix="bouncer-", dir="/tmp") as directory:
        folder = Path(directory)
        (folder / "users").write_text('"postgres" ""\n')
        (folder / "pgbouncer.ini").write_text(
            f"[databases]\n{name} = host={cluster.folder} dbname={name} user=postgres\n"
            f"[pgbouncer]\npool_mode = {mode}\nunix_socket_dir = {folder}\nlisten_addr =\nauth_type = any\n"
            f"auth_file = {folder}/users\nignore_startup_parameters = options,extra_float_digits\n"
        )
        as_user: dict[str, Any] = {}
        if os.geteuid() == 0:  # PgBouncer refuses root
            entry = pwd.getpwnam("postgres")
            as_user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
            os.chown(folder, entry.pw_uid, entry.pw_gid)
        command = ["pgbouncer", str(folder / "pgbouncer.ini")]
        with (
            (folder / "log").open("wb") as log,
            subprocess.Popen(command, stdout=log, stderr=log, **as_user) as process,
        ):
            try:
                wait_for_socket(folder / ".s.PGSQL.6432", process, folder / "log")
                yield f"postgresql://postgres@/{name}?host={folder}&port=6432"
            finally:
                process.kill()


def wait_for_socket(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                return
        assert process.poll() is None, log.read_text()


@pytest.mark.parametrize("mode", ["transaction", "statement"])
async def test_no_server_starts_behind_a_pooler_that_shares_sessions(cluster: Any, mode: str) -> None:
    with (
        anyio.fail_after(300),
        pooler(cluster, cluster.database(), mode) as url,
        pytest.raises(JournalUnwritable) as refusal,
    ):
        async with open_database(url):
            pass
    assert "\n" not in refusal.value.message


async def test_the_reason_names_the_setting_of_the_pooler(cluster: Any) -> None:
    with (
        anyio.fail_after(300),
        pooler(cluster, cluster.database(), "transaction") as url,
        pytest.raises(JournalUnwritable, match="pool_mode = session"),
    ):
        async with open_database(url):
            pass


async def test_a_pooler_in_session_mode_works(cluster: Any) -> None:
    with anyio.fail_after(300), pooler(cluster, cluster.database(), "session") as url:
        async with open_database(url) as first, open_database(url) as second:
            assert first.owner != second.owner
            assert first.is_alive
            assert second.is_alive
