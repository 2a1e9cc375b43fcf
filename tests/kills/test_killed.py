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
    wait_for_images,
)  # fmt: skip
from killer import LOG, MODE, POSITION, Launcher, Server, shared_launcher  # noqa: F401
from slow import SLOW

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


async def fail_and_recover(harness: Harness, name: str, mode: str, position: int) -> None:
    """Let a server fail at operation `position`. The next server must finish all work."""
    env = harness.env(name, **{POSITION: str(position), MODE: mode})
    billed_ids, answer = await run_failing_server(harness, env, name, mode, codes=(0,))
    assert answer is not None or mode == "kill"
    if answer is not None:
        facts = answer["structuredContent"]
        assert f"Charged: {facts['charged']}" in answer["content"][0]["text"]
        assert facts["error"] is not None or not answer["isError"]
    posts = harness.gateway.posts
    async with harness.launcher.server(harness.env(name)) as server:
        await check_recovery(harness, server, name, billed_ids)
        server.close_stdin()
        assert await server.wait_for_exit() == 0
    assert harness.gateway.posts >= posts
    assert harness.billed_ids(name) == billed_ids
    assert len(harness.pictures(name)) == len(billed_ids)


@pytest.mark.parametrize("mode", ["kill", "fail", pytest.param("late", marks=SLOW)])
async def test_a_failure_at_any_operation_leaves_at_most_one_task_and_its_image_on_disk(
    harness: Harness, mode: str
) -> None:
    """kill: SIGKILL before operation k. fail: operation k fails without effect. late: operation k fails after its effect."""
    operations = await good_run(harness, harness.env("good"))
    kinds = Counter(operation.partition(":")[0] for operation in operations)
    assert all(kinds[kind] >= minimum for kind, minimum in (("journal", 15), ("socket", 8), ("file", 15)))
    positions = range(1, len(operations) + SPARE)
    await run_each(
        operations,
        positions,
        lambda position: fail_and_recover(harness, f"{mode}-{position}", mode, position),
        PARALLEL,
    )


async def fail_beside_neighbour(harness: Harness, name: str, position: int) -> None:
    """Kill a server at operation `position`. A server with another key uses the same journal."""
    env = harness.env(name)
    neighbour_key = f"{name}-neighbour"
    other_env = {**env, "EVOLINK_API_KEY": harness.key(neighbour_key)}
    async with harness.launcher.server(other_env) as neighbour:
        assert await tasks(neighbour) == []
        async with harness.launcher.server({**env, POSITION: str(position), MODE: "kill"}, initialize=False) as server:
            await server.initialize()
            await server.call("generate_image", **REQUEST)
            server.close_stdin()
            assert await server.wait_for_exit() in (-signal.SIGKILL, 0)
        await harness.gateway.wait_until_idle()
        billed_ids = harness.billed_ids(name)
        assert len(billed_ids) <= 1
        entries_before = entries_of(env)
        task_list = await tasks(neighbour)
        assert len(task_list) == len(entries_before) <= 1
        assert all(is_of_another_key(task) for task in task_list)
        answer = await neighbour.call("generate_image", **REQUEST)
        assert answer is not None
        assert answer["structuredContent"]["charged"] == "yes", answer
        (own_id,) = harness.billed_ids(neighbour_key)
        assert answer["structuredContent"]["task_id"] == own_id
        entries_after = {entry.key: entry for entry in entries_of(env)}
        assert len(entries_after) == len(entries_before) + 1
        for entry in entries_before:
            after = entries_after[entry.key]
            expected = entry if after.task == entry.task else with_paid_task(entry, after, billed_ids)
            # A restored entry has no owner and no caller: both were the dead server.
            assert after in (expected, replace(expected, owner="", caller=""))
        async with harness.launcher.server(env) as successor:
            task_list = await wait_for_images(successor, billed_ids)
            assert [
                task["task_id"] for task in task_list if task["task_id"] and not is_of_another_key(task)
            ] == billed_ids
            assert [task["task_id"] for task in task_list if is_of_another_key(task)] == [own_id]
        task_list = await tasks(neighbour)
        assert [task["task_id"] for task in task_list if not is_of_another_key(task)] == [own_id]
        assert [task["task_id"] for task in task_list if task["task_id"] and is_of_another_key(task)] == billed_ids
    assert harness.billed_ids(name) == billed_ids
    assert harness.billed_ids(neighbour_key) == [own_id]
    assert not any(harness.reads(neighbour_key, task_id) for task_id in billed_ids)
    assert harness.reads(name, own_id) <= 1  # the test of the account


def with_paid_task(entry: Entry, restored: Entry, billed_ids: list[str]) -> Entry:
    """Return the entry with the task that its dead owner wrote only to the record of paid tasks.

    Every server that opens the journal restores it.
    """
    assert entry.task is None
    assert [restored.task_id] == billed_ids
    return replace(entry, phase=Phase.SUBMITTED, task=restored.task)


def is_of_another_key(task: dict[str, Any]) -> bool:
    return any("bought with another key" in note for note in task["notes"])


async def test_a_server_with_another_key_never_touches_the_work_of_a_killed_one(harness: Harness) -> None:
    operations = await good_run(harness, harness.env("good"))
    # Only operations on the journal and on EvoLink can affect the other server.
    prefixes = ("journal: INSERT", "journal: UPDATE", "socket: send", "socket: recv")
    positions = [number for number, operation in enumerate(operations, start=1) if operation.startswith(prefixes)]
    await run_each(
        operations, positions, lambda position: fail_beside_neighbour(harness, f"beside-{position}", position), PARALLEL
    )


async def test_four_servers_killed_at_different_moments_leave_four_tasks_and_send_no_other_post(
    harness: Harness,
) -> None:
    """Killed during the POST, while the task runs, during the download, and after the download."""
    env = harness.env("four")
    simulator = harness.gateway.simulator
    is_reached = anyio.Event()
    never = anyio.Event()

    async def accept_and_wait(exchange: Exchange) -> None:
        await exchange.accept()
        is_reached.set()
        await never.wait()

    async def until(condition: Any) -> None:
        while not condition():
            await anyio.sleep(0.01)

    def hold_pictures(exchange: Exchange) -> Any:
        async def hold(_: Exchange) -> None:
            is_reached.set()
            await never.wait()

        return hold if exchange.path.startswith("/pictures/") else None

    async def kill_at(prompt: str, moment: Any) -> None:
        async with harness.launcher.server(env) as server, anyio.create_task_group() as group:
            group.start_soon(lambda: server.call("generate_image", **{**REQUEST, "prompt": prompt}))
            await moment()
            server.kill()
            assert await server.wait_for_exit() == -signal.SIGKILL

    with anyio.fail_after(300):
        simulator.duration_s = 0.5
        # Two lost answers of one moment would be indistinguishable, so wait for the ID of the first task.
        await kill_at("being made", lambda: until(lambda: ids_written(env) == 1))
        simulator.duration_s = 0
        harness.gateway.reads = hold_pictures
        # This server may also fetch the first image, so wait for the ID of the second task too.
        await kill_at("being fetched", lambda: until(lambda: is_reached.is_set() and ids_written(env) == 2))
        harness.gateway.reads = lambda exchange: None
        async with harness.launcher.server(env) as server:
            await server.call("generate_image", **{**REQUEST, "prompt": "here"})
            server.kill()
            assert await server.wait_for_exit() == -signal.SIGKILL
        is_reached = anyio.Event()
        harness.gateway.purchases = [accept_and_wait]
        await kill_at("being bought", is_reached.wait)
        posts = harness.gateway.posts
        assert (posts, len(harness.billed_ids("four"))) == (4, 4)

        async with harness.launcher.server(env) as server:
            task_list = await wait_for_images(server, harness.billed_ids("four"))
            assert [task["status"] for task in task_list] == ["completed"] * 4
            charges = {task["request"]["prompt"]: task["charged"] for task in task_list}
            assert charges == {"being made": "yes", "being fetched": "yes", "here": "yes", "being bought": "unknown"}
            assert len(harness.pictures("four")) == 4
            assert harness.gateway.posts == posts
            repeat = await server.call("generate_image", **{**REQUEST, "prompt": "being bought"})
            assert repeat is not None
            assert "earlier identical call" in repeat["content"][0]["text"]
            assert harness.gateway.posts == posts
            harness.gateway.purchases = [behave]
            second = await server.call("generate_image", **{**REQUEST, "prompt": "being bought"})
            assert second is not None
            assert second["structuredContent"]["task_id"] not in {task["task_id"] for task in task_list}
            assert harness.gateway.posts == posts + 1


@asynccontextmanager
async def two_servers(harness: Harness) -> AsyncIterator[tuple[Server, Server]]:
    async with (
        harness.launcher.server(harness.env("pair")) as first,
        harness.launcher.server(harness.env("pair")) as second,
    ):
        yield first, second


async def test_two_live_servers_do_not_touch_each_others_tasks_and_the_survivor_adopts_them(harness: Harness) -> None:
    harness.gateway.simulator.duration_s = 3600
    with anyio.fail_after(300):
        async with two_servers(harness) as (victim, survivor):
            first = await victim.call("generate_image", **REQUEST, wait_seconds=0)
            second = await survivor.call("generate_image", **{**REQUEST, "prompt": "a hen"}, wait_seconds=0)
            assert first is not None
            assert second is not None
            assert len(await tasks(victim)) == len(await tasks(survivor)) == 2
            harness.gateway.simulator.duration_s = 0
            for task in harness.gateway.simulator.tasks.values():
                task.duration = 0
            victim.kill()
            assert await victim.wait_for_exit() == -signal.SIGKILL
            task_list = await wait_for_images(survivor, harness.billed_ids("pair"))
    assert [task["status"] for task in task_list] == ["completed"] * 2
    assert (harness.gateway.posts, len(harness.pictures("pair"))) == (2, 2)


async def test_a_suspended_server_keeps_its_work(harness: Harness) -> None:
    await check_suspended_server(harness, harness.env("pair"))


async def test_a_server_without_a_tool_call_leaves_no_trace(harness: Harness) -> None:
    """Some clients start a server only to test its start."""
    with anyio.fail_after(300):
        async with harness.launcher.server(harness.env("probe")) as server:
            await server.ask("tools/list")
            server.close_stdin()
            assert await server.wait_for_exit() == 0
    assert list((harness.folder / "probe").iterdir()) == []
    assert harness.gateway.requests == []
