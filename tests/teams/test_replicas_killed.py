"""Two replicas with one PostgreSQL: one ends or loses its database at its k-th operation, the other continues."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import pytest
from killer import AT, FROZEN, HOW, LOG, STOP_AFTER_S, Server, nursery_of_servers  # noqa: F401
from slow import SLOW
from town import (  # noqa: F401
    REQUEST,
    Town,
    check_recovery,
    good_run,
    run_each,
    run_failing_server,
    stopped_and_continued,
    tasks,
    town_with_a_nursery,
)  # fmt: skip

pytestmark = pytest.mark.anyio
PARALLEL = 4
# Count the open entries that another server than the first one of the database owns.
ENTRIES_OF_OTHERS = """SELECT count(*) FROM evolink_entries WHERE NOT closed AND owner <> ''
    AND owner <> (SELECT 'server-' || number FROM evolink_servers ORDER BY since LIMIT 1)"""
SPARE = 4
PURCHASE = 12  # operations from the intent to the recorded task ID, with searches for entries of dead servers


def team(town: Town, name: str, url: str, **environ: str) -> dict[str, str]:
    """Return the environment of a replica. Each name has its own profile, because a profile shows the tasks of all keys."""
    database = {"EVOLINK_MCP_DATABASE_URL": url, "EVOLINK_MCP_SECRET": "s" * 32}
    return {**town.env(name, **environ), **database, "EVOLINK_MCP_PROFILE": name}


async def fail_and_recover(town: Town, name: str, url: str, how: str, at: int) -> None:
    """One replica fails at its k-th operation. A second replica must then finish all work."""
    async with town.nursery.server(team(town, name, url)) as heir:
        await tasks(heir)
        env = team(town, name, url, **{AT: str(at), HOW: how})
        # A database that fails at the start ends the start.
        billed, _ = await run_failing_server(town, env, name, how, codes=(0, 1))
        await check_recovery(town, heir, name, billed)
    assert town.billed(name) == billed
    assert len(town.pictures(name)) == len(billed)


@pytest.mark.parametrize("how", ["kill", "fail", pytest.param("late", marks=SLOW)])
async def test_a_replica_stopped_at_any_operation_leaves_one_task_to_the_other(
    town: Town, cluster: Any, how: str
) -> None:
    """kill: SIGKILL before operation k. fail: operation k fails without effect. late: operation k fails after its effect."""
    url = cluster.database()
    operations = await good_run(town, team(town, "good", url))
    kinds = Counter(operation.partition(":")[0] for operation in operations)
    assert kinds["journal"] >= 15
    # Other tests cover failures of files and of EvoLink; this one covers the database.
    prefixes = ("journal", "socket") if how == "kill" else ("journal",)
    positions = [
        at for at in range(1, len(operations) + SPARE)
        if at > len(operations) or operations[at - 1].startswith(prefixes)
    ]  # fmt: skip
    await run_each(operations, positions, lambda at: fail_and_recover(town, f"{how}-{at}", url, how, at), PARALLEL)


async def freeze_and_recover(town: Town, name: str, cluster: Any, at: int) -> None:
    """One replica freezes at its k-th operation and keeps its session. A second one takes over, then the first wakes up."""
    url = cluster.database()
    log = town.folder / f"{name}.log"
    async with town.nursery.server(team(town, name, url)) as heir:
        await tasks(heir)
        env = team(town, name, url, **{AT: str(at), HOW: "freeze", LOG: str(log), STOP_AFTER_S: "2"})
        async with town.nursery.server(env, greet=False) as frozen, anyio.create_task_group() as group:
            answered = anyio.Event()

            async def order() -> None:
                await frozen.hello()
                await frozen.call("generate_image", **REQUEST)
                answered.set()

            async def wake() -> None:
                while not has_frozen(log):
                    await anyio.sleep(0.02)
                await take_over(heir, cluster, url)
                frozen.kill(signal.SIGCONT)

            group.start_soon(order)
            group.start_soon(wake)
            await answered.wait()
            frozen.hang_up()
            assert await frozen.wait_for_exit() == 0  # it may freeze only now
            group.cancel_scope.cancel()
        await town.gateway.wait_until_idle()
        billed = town.billed(name)
        assert len(billed) <= 1
        await check_recovery(town, heir, name, billed)


def has_frozen(log: Path) -> bool:
    return log.exists() and FROZEN in log.read_text().split()


async def take_over(heir: Server, cluster: Any, url: str) -> None:
    """Wait until the heir owns all open entries. PostgreSQL still has the session of the frozen replica."""
    while True:
        await tasks(heir)  # each call adopts the entries of dead servers
        with cluster.admin(url.partition("@/")[2].partition("?")[0]) as db:
            if not db.execute(ENTRIES_OF_OTHERS).fetchone()[0]:
                return
        await anyio.sleep(0.05)


@pytest.mark.parametrize("positions", ["purchase", pytest.param("all", marks=SLOW)])
async def test_a_replica_frozen_at_any_operation_loses_its_work_and_buys_nothing_twice(
    town: Town, cluster: Any, positions: str
) -> None:
    url = cluster.database()
    async with town.nursery.server(team(town, "tables", url)) as server:
        await tasks(server)
    operations = await good_run(town, team(town, "good", url))
    started = [at for at, name in enumerate(operations, 1) if name.startswith("journal: INSERT INTO evolink_entries")]
    ats = range(started[0], started[0] + PURCHASE) if positions == "purchase" else range(1, len(operations) + SPARE)
    await run_each(operations, ats, lambda at: freeze_and_recover(town, f"freeze-{at}", cluster, at), PARALLEL)


async def test_a_replica_that_was_only_suspended_keeps_its_work(town: Town, cluster: Any) -> None:
    """Its database session stays open."""
    await stopped_and_continued(town, team(town, "pair", cluster.database()))
