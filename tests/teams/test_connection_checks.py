"""The pool checks a connection only if it was idle, or if the session of the server was lost since its last use."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from child_processes import patient_times

from evolink_mcp.errors import JournalUnwritable

pytest.importorskip("psycopg")
pytestmark = pytest.mark.anyio

from evolink_mcp.teams.database import Database, DatabaseConnection, open_database  # noqa: E402

HOUR_S = 3600.0
# The pool opens at most this number of connections, and uses the one that was idle for the longest time.
POOL_SIZE_MAX = 20
SESSIONS = "SELECT pid FROM pg_locks WHERE locktype = 'advisory'"


@pytest.fixture
def url(cluster: Any) -> str:
    return cluster.database()


async def process_of(db: DatabaseConnection) -> int:
    row = await (await db.execute("SELECT pg_backend_pid() AS pid")).fetchone()
    assert row is not None
    return row["pid"]


async def use_all(database: Database) -> set[int]:
    """Use every connection of the pool. Return their processes in PostgreSQL."""
    return {await database.run(process_of) for _ in range(POOL_SIZE_MAX)}


def end_processes(cluster: Any, processes: set[int]) -> None:
    with cluster.admin() as db:
        for process in processes:
            assert db.execute("SELECT pg_terminate_backend(%s, 60000)", (process,)).fetchone() == (True,)


def session_of(cluster: Any) -> set[int]:
    with cluster.admin() as db:
        return {process for (process,) in db.execute(SESSIONS)}


async def test_a_connection_in_recent_use_is_not_checked(url: str, cluster: Any) -> None:
    async with open_database(url, patient_times(check_after_s=HOUR_S)) as database:
        end_processes(cluster, await use_all(database))
        with pytest.raises(JournalUnwritable):
            await database.run(process_of)


async def test_an_idle_connection_is_checked_and_replaced(url: str, cluster: Any) -> None:
    async with open_database(url, patient_times(check_after_s=0.0)) as database:
        processes = await use_all(database)
        end_processes(cluster, processes)
        assert processes & await use_all(database) == set()


async def test_a_connection_from_before_a_restart_of_the_database_is_checked(url: str, cluster: Any) -> None:
    async with open_database(url, patient_times(check_after_s=HOUR_S)) as database:
        processes = await use_all(database)
        session = session_of(cluster)
        end_processes(cluster, processes | session)
        with anyio.fail_after(300):
            while not database.has_session or not session_of(cluster) - session:
                await anyio.sleep(0.01)
        assert processes & await use_all(database) == set()
