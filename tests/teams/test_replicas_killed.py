"""Two servers of a team on one PostgreSQL: one ends, or loses its database, at its k-th operation; the other goes on."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
from killer import AT, HOW, nursery_of_servers  # noqa: F401
from town import (  # noqa: F401
    Town,
    each,
    good_run,
    put_right,
    stopped_and_continued,
    struck_life,
    tasks,
    town_with_a_nursery,
)  # fmt: skip

pytestmark = pytest.mark.anyio
AT_ONCE = 4
SPARE = 4
SLOW = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("EVOLINK_TEST_SLOW"), reason="EVOLINK_TEST_SLOW=1 runs it"),
]


def team(town: Town, name: str, url: str, **more: str) -> dict[str, str]:
    return {**town.env(name, **more), "EVOLINK_MCP_DATABASE_URL": url, "EVOLINK_MCP_SECRET": "s" * 32}


async def one_life(town: Town, name: str, url: str, how: str, at: int) -> None:
    """One replica is struck at its k-th operation, while another one lives; that one puts everything right."""
    async with town.nursery.server(team(town, name, url)) as heir:
        await tasks(heir)
        env = team(town, name, url, **{AT: str(at), HOW: how})
        # A database that fails at the start ends the start.
        billed, _ = await struck_life(town, env, name, how, codes=(0, 1))
        await put_right(heir, billed)
    assert town.billed(name) == billed
    assert len(town.pictures(name)) == len(billed)


@pytest.mark.parametrize("how", ["kill", "fail", pytest.param("late", marks=SLOW)])
async def test_whatever_operation_is_the_last_the_other_replica_ends_with_one_task(
    town: Town, cluster: Any, how: str
) -> None:
    """kill: SIGKILL before the k-th; fail: the k-th is not done and fails; late: it is done, and fails."""
    url = cluster.database()
    operations = await good_run(town, team(town, "good", url))
    kinds = Counter(operation.partition(":")[0] for operation in operations)
    assert kinds["journal"] >= 15
    # What fails in the files and on the way to EvoLink is tried without a database; here, what the database does.
    struck = ("journal", "socket") if how == "kill" else ("journal",)
    ats = [
        at for at in range(1, len(operations) + SPARE)
        if at > len(operations) or operations[at - 1].startswith(struck)
    ]  # fmt: skip
    await each(operations, ats, lambda at: one_life(town, f"{how}-{at}", url, how, at), AT_ONCE)


async def test_a_replica_that_was_only_stopped_keeps_its_work(town: Town, cluster: Any) -> None:
    """Its session with the database stands."""
    await stopped_and_continued(town, team(town, "pair", cluster.database()))
