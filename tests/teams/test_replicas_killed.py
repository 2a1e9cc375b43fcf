"""Two replicas with one PostgreSQL: one ends or loses its database at its k-th operation, the other continues."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import pytest
from kill_harness import (  # noqa: F401
    REQUEST,
    Harness,
    check_recovery,
    check_suspended_server,
    good_run,
    open_harness,
    run_each,
    run_failing_server,
    tasks,
)  # fmt: skip
from killer import FROZEN, LOG, MODE, POSITION, STOP_AFTER_S, Server, shared_launcher  # noqa: F401
from slow import SLOW

pytestmark = pytest.mark.anyio
PARALLEL = 4
# Count the open entries that another server than the first one of the database owns.
ENTRIES_OF_OTHERS = """SELECT count(*) FROM evolink_entries WHERE NOT closed AND owner <> ''
    AND owner <> (SELECT 'server-' || number FROM evolink_servers ORDER BY since LIMIT 1)"""
SPARE = 4
PURCHASE = 12  # operations from the intent to the recorded task ID, with searches for entries of dead servers


def replica_environment(harness: Harness, name: str, url: str, **environ: str) -> dict[str, str]:
    """Return the environment of a replica. Each name has its own profile, because a profile shows the tasks of all keys."""
    database = {"EVOLINK_MCP_DATABASE_URL": url, "EVOLINK_MCP_SECRET": "s" * 32}
    return {**harness.env(name, **environ), **database, "EVOLINK_MCP_PROFILE": name}


async def fail_and_recover(harness: Harness, name: str, url: str, mode: str, position: int) -> None:
    """Let a replica fail at operation `position`. A second replica must then finish all work."""
    async with harness.launcher.server(replica_environment(harness, name, url)) as successor:
        await tasks(successor)
        env = replica_environment(harness, name, url, **{POSITION: str(position), MODE: mode})
        # A database that fails at the start ends the start.
        billed_ids, _ = await run_failing_server(harness, env, name, mode, codes=(0, 1))
        await check_recovery(harness, successor, name, billed_ids)
    assert harness.billed_ids(name) == billed_ids
    assert len(harness.pictures(name)) == len(billed_ids)


@pytest.mark.parametrize("mode", ["kill", "fail", pytest.param("late", marks=SLOW)])
async def test_a_replica_stopped_at_any_operation_leaves_one_task_to_the_other(
    harness: Harness, cluster: Any, mode: str
) -> None:
    """kill: SIGKILL before operation k. fail: operation k fails without effect. late: operation k fails after its effect."""
    url = cluster.database()
    operations = await good_run(harness, replica_environment(harness, "good", url))
    kinds = Counter(operation.partition(":")[0] for operation in operations)
    assert kinds["journal"] >= 15
    # Other tests cover failures of files and of EvoLink; this one covers the database.
    prefixes = ("journal", "socket") if mode == "kill" else ("journal",)
    positions = [
        position for position in range(1, len(operations) + SPARE)
        if position > len(operations) or operations[position - 1].startswith(prefixes)
    ]  # fmt: skip
    await run_each(
        operations,
        positions,
        lambda position: fail_and_recover(harness, f"{mode}-{position}", url, mode, position),
        PARALLEL,
    )


async def freeze_and_recover(harness: Harness, name: str, cluster: Any, position: int) -> None:
    """Suspend a replica at operation `position`. It keeps its session. A second one adopts its work, then the first continues."""
    url = cluster.database()
    log = harness.folder / f"{name}.log"
    async with harness.launcher.server(replica_environment(harness, name, url)) as successor:
        await tasks(successor)
        env = replica_environment(
            harness, name, url, **{POSITION: str(position), MODE: "freeze", LOG: str(log), STOP_AFTER_S: "2"}
        )
        async with harness.launcher.server(env, initialize=False) as frozen, anyio.create_task_group() as group:
            is_answered = anyio.Event()

            async def order() -> None:
                await frozen.initialize()
                await frozen.call("generate_image", **REQUEST)
                is_answered.set()

            async def wake() -> None:
                while not has_frozen(log):
                    await anyio.sleep(0.02)
                await take_over(successor, cluster, url)
                frozen.kill(signal.SIGCONT)

            group.start_soon(order)
            group.start_soon(wake)
            await is_answered.wait()
            frozen.close_stdin()
            assert await frozen.wait_for_exit() == 0  # it may freeze only now
            group.cancel_scope.cancel()
        await harness.gateway.wait_until_idle()
        billed_ids = harness.billed_ids(name)
        assert len(billed_ids) <= 1
        await check_recovery(harness, successor, name, billed_ids)


def has_frozen(log: Path) -> bool:
    return log.exists() and FROZEN in log.read_text().split()


async def take_over(successor: Server, cluster: Any, url: str) -> None:
    """Wait until the successor owns all open entries. PostgreSQL still has the session of the frozen replica."""
    while True:
        await tasks(successor)  # each call adopts the entries of dead servers
        with cluster.admin(url.partition("@/")[2].partition("?")[0]) as db:
            if not db.execute(ENTRIES_OF_OTHERS).fetchone()[0]:
                return
        await anyio.sleep(0.05)


@pytest.mark.parametrize("scope", ["purchase", pytest.param("all", marks=SLOW)])
async def test_a_replica_frozen_at_any_operation_loses_its_work_and_buys_nothing_twice(
    harness: Harness, cluster: Any, scope: str
) -> None:
    url = cluster.database()
    async with harness.launcher.server(replica_environment(harness, "tables", url)) as server:
        await tasks(server)
    operations = await good_run(harness, replica_environment(harness, "good", url))
    purchase_starts = [
        number for number, name in enumerate(operations, 1) if name.startswith("journal: INSERT INTO evolink_entries")
    ]
    positions = range(purchase_starts[0], purchase_starts[0] + PURCHASE)
    if scope == "all":
        positions = range(1, len(operations) + SPARE)
    await run_each(
        operations,
        positions,
        lambda position: freeze_and_recover(harness, f"freeze-{position}", cluster, position),
        PARALLEL,
    )


async def test_a_replica_that_was_only_suspended_keeps_its_work(harness: Harness, cluster: Any) -> None:
    """Its database session stays open."""
    await check_suspended_server(harness, replica_environment(harness, "pair", cluster.database()))
