"""Count the operations of one run. Then kill the server, or let it fail, at each of them."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from faulty_gateway import Exchange, behave
from killer import AT, HOW, LOG, Nursery, Server, nursery_of_servers  # noqa: F401
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
    wait_for_images,
)  # fmt: skip

from evolink_mcp.journal.entry import Entry, Phase
from evolink_mcp.journal.sqlite import FILE_NAME, read_entries

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL, fork and passed file descriptors are POSIX"),
]

PARALLEL = 6
# The threads of a run interleave, so another run may have a few more operations.
SPARE = 4


def ids_written(env: dict[str, str]) -> int:
    """Return the number of journal entries that have a task ID."""
    return sum(entry.task is not None for entry in entries_of(env))


def entries_of(env: dict[str, str]) -> list[Entry]:
    """Return the entries of the journal."""
    folder = Path(env["EVOLINK_MCP_DATA_DIR"])
    return read_entries(folder, 50) if (folder / FILE_NAME).exists() else []


async def fail_and_recover(town: Town, name: str, how: str, at: int) -> None:
    """Let a server fail at operation `at`. The next server must finish all work."""
    env = town.env(name, **{AT: str(at), HOW: how})
    billed, answer = await run_failing_server(town, env, name, how, codes=(0,))
    assert answer is not None or how == "kill"
    if answer is not None:
        facts = answer["structuredContent"]
        assert f"Charged: {facts['charged']}" in answer["content"][0]["text"]
        assert facts["error"] is not None or not answer["isError"]
    posts = town.gateway.posts
    async with town.nursery.server(town.env(name)) as server:
        await check_recovery(town, server, name, billed)
        server.hang_up()
        assert await server.wait_for_exit() == 0
    assert town.gateway.posts >= posts
    assert town.billed(name) == billed
    assert len(town.pictures(name)) == len(billed)


@pytest.mark.parametrize("how", ["kill", "fail", pytest.param("late", marks=SLOW)])
async def test_a_failure_at_any_operation_leaves_at_most_one_task_and_its_image_on_disk(town: Town, how: str) -> None:
    """kill: SIGKILL before operation k. fail: operation k fails without effect. late: operation k fails after its effect."""
    operations = await good_run(town, town.env("good"))
    kinds = Counter(operation.partition(":")[0] for operation in operations)
    assert all(kinds[kind] >= least for kind, least in (("journal", 15), ("socket", 8), ("file", 15)))
    positions = range(1, len(operations) + SPARE)
    await run_each(operations, positions, lambda at: fail_and_recover(town, f"{how}-{at}", how, at), PARALLEL)


async def fail_beside_neighbour(town: Town, name: str, at: int) -> None:
    """Kill a server at operation `at`. A server with another key uses the same journal."""
    env = town.env(name)
    neighbour_key = f"{name}-neighbour"
    other_env = {**env, "EVOLINK_API_KEY": town.key(neighbour_key)}
    async with town.nursery.server(other_env) as neighbour:
        assert await tasks(neighbour) == []
        async with town.nursery.server({**env, AT: str(at), HOW: "kill"}, greet=False) as server:
            await server.hello()
            await server.call("generate_image", **REQUEST)
            server.hang_up()
            assert await server.wait_for_exit() in (-signal.SIGKILL, 0)
        await town.gateway.wait_until_idle()
        billed = town.billed(name)
        assert len(billed) <= 1
        entries_before = entries_of(env)
        listed = await tasks(neighbour)
        assert len(listed) == len(entries_before) <= 1
        assert all(is_of_another_key(task) for task in listed)
        answer = await neighbour.call("generate_image", **REQUEST)
        assert answer is not None
        assert answer["structuredContent"]["charged"] == "yes", answer
        (own_entry,) = town.billed(neighbour_key)
        assert answer["structuredContent"]["task_id"] == own_entry
        entries_after = {entry.key: entry for entry in entries_of(env)}
        assert len(entries_after) == len(entries_before) + 1
        for entry in entries_before:
            after = entries_after[entry.key]
            expected = entry if after.task == entry.task else with_paid_task(entry, after, billed)
            # A restored entry has no owner and no caller: both were the dead server.
            assert after in (expected, replace(expected, owner="", caller=""))
        async with town.nursery.server(env) as heir:
            listed = await wait_for_images(heir, billed)
            assert [task["task_id"] for task in listed if task["task_id"] and not is_of_another_key(task)] == billed
            assert [task["task_id"] for task in listed if is_of_another_key(task)] == [own_entry]
        listed = await tasks(neighbour)
        assert [task["task_id"] for task in listed if not is_of_another_key(task)] == [own_entry]
        assert [task["task_id"] for task in listed if task["task_id"] and is_of_another_key(task)] == billed
    assert town.billed(name) == billed
    assert town.billed(neighbour_key) == [own_entry]
    assert not any(town.reads(neighbour_key, task_id) for task_id in billed)
    assert town.reads(name, own_entry) <= 1  # the test of the account


def with_paid_task(entry: Entry, restored: Entry, billed: list[str]) -> Entry:
    """Return the entry with the task that its dead owner wrote only to the record of paid tasks.

    Every server that opens the journal restores it.
    """
    assert entry.task is None
    assert [restored.task_id] == billed
    return replace(entry, phase=Phase.SUBMITTED, task=restored.task)


def is_of_another_key(task: dict[str, Any]) -> bool:
    return any("bought with another key" in note for note in task["notes"])


async def test_a_server_with_another_key_never_touches_the_work_of_a_killed_one(town: Town) -> None:
    operations = await good_run(town, town.env("good"))
    # Only operations on the journal and on EvoLink can affect the other server.
    prefixes = ("journal: INSERT", "journal: UPDATE", "socket: send", "socket: recv")
    positions = [at for at, operation in enumerate(operations, start=1) if operation.startswith(prefixes)]
    await run_each(operations, positions, lambda at: fail_beside_neighbour(town, f"beside-{at}", at), PARALLEL)


async def test_four_servers_killed_at_different_moments_leave_four_tasks_and_send_no_other_post(town: Town) -> None:
    """Killed during the POST, while the task runs, during the download, and after the download."""
    env = town.env("four")
    simulator = town.gateway.simulator
    reached = anyio.Event()
    never = anyio.Event()

    async def accept_and_wait(exchange: Exchange) -> None:
        await exchange.accepted()
        reached.set()
        await never.wait()

    async def until(condition: Any) -> None:
        while not condition():
            await anyio.sleep(0.01)

    def hold_pictures(exchange: Exchange) -> Any:
        async def hold(_: Exchange) -> None:
            reached.set()
            await never.wait()

        return hold if exchange.path.startswith("/pictures/") else None

    async def kill_at(prompt: str, moment: Any) -> None:
        async with town.nursery.server(env) as server, anyio.create_task_group() as group:
            group.start_soon(lambda: server.call("generate_image", **{**REQUEST, "prompt": prompt}))
            await moment()
            server.kill()
            assert await server.wait_for_exit() == -signal.SIGKILL

    with anyio.fail_after(300):
        simulator.duration_s = 0.5
        # Two lost answers of one moment would be indistinguishable, so wait for the ID of the first task.
        await kill_at("being made", lambda: until(lambda: ids_written(env) == 1))
        simulator.duration_s = 0
        town.gateway.reads = hold_pictures
        # This server may also fetch the first image, so wait for the ID of the second task too.
        await kill_at("being fetched", lambda: until(lambda: reached.is_set() and ids_written(env) == 2))
        town.gateway.reads = lambda exchange: None
        async with town.nursery.server(env) as server:
            await server.call("generate_image", **{**REQUEST, "prompt": "here"})
            server.kill()
            assert await server.wait_for_exit() == -signal.SIGKILL
        reached = anyio.Event()
        town.gateway.purchases = [accept_and_wait]
        await kill_at("being bought", reached.wait)
        posts = town.gateway.posts
        assert (posts, len(town.billed("four"))) == (4, 4)

        async with town.nursery.server(env) as server:
            listed = await wait_for_images(server, town.billed("four"))
            assert [task["status"] for task in listed] == ["completed"] * 4
            charged = {task["request"]["prompt"]: task["charged"] for task in listed}
            assert charged == {"being made": "yes", "being fetched": "yes", "here": "yes", "being bought": "unknown"}
            assert len(town.pictures("four")) == 4
            assert town.gateway.posts == posts
            again = await server.call("generate_image", **{**REQUEST, "prompt": "being bought"})
            assert again is not None
            assert "earlier identical call" in again["content"][0]["text"]
            assert town.gateway.posts == posts
            town.gateway.purchases = [behave]
            second = await server.call("generate_image", **{**REQUEST, "prompt": "being bought"})
            assert second is not None
            assert second["structuredContent"]["task_id"] not in {task["task_id"] for task in listed}
            assert town.gateway.posts == posts + 1


@asynccontextmanager
async def two_servers(town: Town) -> AsyncIterator[tuple[Server, Server]]:
    async with town.nursery.server(town.env("pair")) as first, town.nursery.server(town.env("pair")) as second:
        yield first, second


async def test_two_live_servers_do_not_touch_each_others_tasks_and_the_survivor_adopts_them(town: Town) -> None:
    town.gateway.simulator.duration_s = 3600
    with anyio.fail_after(300):
        async with two_servers(town) as (victim, survivor):
            first = await victim.call("generate_image", **REQUEST, wait_seconds=0)
            second = await survivor.call("generate_image", **{**REQUEST, "prompt": "a hen"}, wait_seconds=0)
            assert first is not None
            assert second is not None
            assert len(await tasks(victim)) == len(await tasks(survivor)) == 2
            town.gateway.simulator.duration_s = 0
            for task in town.gateway.simulator.tasks.values():
                task.duration = 0
            victim.kill()
            assert await victim.wait_for_exit() == -signal.SIGKILL
            listed = await wait_for_images(survivor, town.billed("pair"))
    assert [task["status"] for task in listed] == ["completed"] * 2
    assert (town.gateway.posts, len(town.pictures("pair"))) == (2, 2)


async def test_a_suspended_server_keeps_its_work(town: Town) -> None:
    await stopped_and_continued(town, town.env("pair"))


async def test_a_server_without_a_tool_call_leaves_no_trace(town: Town) -> None:
    """Some clients start a server only to test its start."""
    with anyio.fail_after(300):
        async with town.nursery.server(town.env("probe")) as server:
            await server.ask("tools/list")
            server.hang_up()
            assert await server.wait_for_exit() == 0
    assert list((town.folder / "probe").iterdir()) == []
    assert town.gateway.requests == []
