"""Two servers of a team on one PostgreSQL: one ends, or loses its database, at its k-th operation; the other goes on."""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import Any

import anyio
import pytest
from killer import AT, HOW, LOG, nursery_of_servers  # noqa: F401
from town import WISH, Town, settled, tasks, town_with_a_nursery  # noqa: F401

pytestmark = pytest.mark.anyio
AT_ONCE = 4
SPARE = 4
SLOW = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("EVOLINK_TEST_SLOW"), reason="EVOLINK_TEST_SLOW=1 runs it"),
]


def team(town: Town, name: str, url: str, **more: str) -> dict[str, str]:
    return {**town.env(name, **more), "EVOLINK_MCP_DATABASE_URL": url, "EVOLINK_MCP_SECRET": "s" * 32}


async def good_run(town: Town, url: str) -> list[str]:
    log = town.folder / "operations"
    with anyio.fail_after(60):
        async with town.nursery.server(team(town, "good", url, **{AT: "0", HOW: "count", LOG: str(log)})) as server:
            answer = await server.call("generate_image", **WISH)
            assert answer is not None
            assert answer["structuredContent"]["status"] == "completed"
            operations = log.read_text().splitlines()
            server.hang_up()
            assert await server.gone() == 0
    return operations


async def one_life(town: Town, name: str, url: str, how: str, at: int) -> None:
    """One replica is struck at its k-th operation, while another one lives; that one puts everything right."""
    async with town.nursery.server(team(town, name, url)) as heir:
        await tasks(heir)
        async with town.nursery.server(team(town, name, url, **{AT: str(at), HOW: how}), greet=False) as server:
            await server.hello()
            answer = await server.call("generate_image", **WISH)
            billed = town.billed(name)
            assert len(billed) <= 1
            if answer is not None:
                facts = answer["structuredContent"]
                assert facts["charged"] in (("yes", "unknown") if billed else ("no", "unknown")), facts
            server.hang_up()
            assert await server.gone() in ((-signal.SIGKILL, 0) if how == "kill" else (0, 1))
        assert "Traceback" not in server.err.read_text()
        listed = await settled(heir, billed)
        assert [task["task_id"] for task in listed if task["task_id"]] == billed
        assert all(task["charged"] == ("unknown" if task["guess"] else "yes") for task in listed if task["task_id"])
    assert town.billed(name) == billed
    assert len(town.pictures(name)) == len(billed)


@pytest.mark.parametrize("how", ["kill", "fail", pytest.param("late", marks=SLOW)])
async def test_whatever_operation_is_the_last_the_other_replica_ends_with_one_task(
    town: Town, cluster: Any, how: str
) -> None:
    """kill: SIGKILL before the k-th; fail: the k-th is not done and fails; late: it is done, and fails."""
    url = cluster.database()
    operations = await good_run(town, url)
    kinds = Counter(operation.partition(":")[0] for operation in operations)
    assert kinds["journal"] >= 15
    limiter = anyio.CapacityLimiter(AT_ONCE)
    failed: dict[str, BaseException] = {}

    async def strike(at: int) -> None:
        name = f"{how}-{at}"
        where = operations[at - 1] if at <= len(operations) else "later"
        async with limiter:
            try:
                with anyio.fail_after(60):
                    await one_life(town, name, url, how, at)
            except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001
                failed[f"{at} ({where})"] = error

    async with anyio.create_task_group() as group:
        # What fails in the files and on the way to EvoLink is tried without a database; here, what the database does.
        for at in range(1, len(operations) + SPARE):
            where = operations[at - 1] if at <= len(operations) else "journal"
            if where.startswith(("journal", "socket") if how == "kill" else "journal"):
                group.start_soon(strike, at)
    assert "\n".join(f"{where}: {error!r}" for where, error in failed.items()) == ""


async def test_a_replica_that_was_only_stopped_keeps_its_work(town: Town, cluster: Any) -> None:
    """SIGSTOP for however long: its session stands, so the other one watches its task and goes on with nothing."""
    town.gateway.simulator.duration_s = 3600
    env = team(town, "pair", cluster.database())
    with anyio.fail_after(60):
        async with town.nursery.server(env) as one, town.nursery.server(env) as other:
            first = await one.call("generate_image", **WISH, wait_seconds=0)
            assert first is not None
            task_id = first["structuredContent"]["task_id"]
            one.kill(signal.SIGSTOP)
            for task in town.gateway.simulator.tasks.values():
                task.duration = 0
            watched = await other.call("get_task", task_id=task_id, wait_seconds=1)
            assert watched is not None
            assert watched["structuredContent"]["status"] == "completed"
            assert town.pictures("pair") == []
            one.kill(signal.SIGCONT)
            await settled(other, town.billed("pair"))
    assert (town.gateway.posts, len(town.pictures("pair"))) == (1, 1)
