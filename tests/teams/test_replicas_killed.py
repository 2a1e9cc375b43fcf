"""Two replicas with one PostgreSQL: one ends or loses its database at its k-th operation, the other continues."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from killer import AT, HOW, nursery_of_servers  # noqa: F401
from slow import SLOW
from town import (  # noqa: F401
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
SPARE = 4


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


async def test_a_replica_that_was_only_suspended_keeps_its_work(town: Town, cluster: Any) -> None:
    """Its database session stays open."""
    await stopped_and_continued(town, team(town, "pair", cluster.database()))
