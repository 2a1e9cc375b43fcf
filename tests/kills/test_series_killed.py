"""Kill the server at every operation of a series of ten pictures. The same series again buys no picture twice."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import pytest
from kill_harness import Harness, open_harness, run_each  # noqa: F401
from killer import LOG, MODE, POSITION, Server, shared_launcher  # noqa: F401
from slow import RUNS_SLOW_TESTS

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL, fork and passed file descriptors are POSIX"),
]

ANIMALS = ["fox", "hen", "owl", "cat", "dog", "cow", "pig", "bee", "ant", "bat"]
SERIES: dict[str, Any] = {"prompts": [f"a {animal}" for animal in ANIMALS], "size": "1024x640", "quality": "low"}
PARALLEL = 4
# Without EVOLINK_TEST_SLOW the test kills at this many operations, evenly distributed.
POSITIONS_MAX = 24


def count_tasks(harness: Harness, name: str) -> Counter[str]:
    """Return the number of tasks for each prompt."""
    simulated = harness.gateway.simulator.tasks.values()
    return Counter(task.body["prompt"] for task in simulated if task.key == harness.key(name))


async def wait_for_known_images(server: Server) -> list[dict[str, Any]]:
    """Wait until the images of all tasks of the journal are on disk. Return these tasks."""
    while True:
        answer = await server.call("list_tasks", detail=True, limit=50)
        assert answer is not None
        task_list = answer["structuredContent"]["tasks"]
        if all(
            task["images"] and all(image["path"] for image in task["images"]) for task in task_list if task["task_id"]
        ):
            return task_list
        await anyio.sleep(0.02)


async def good_series(harness: Harness) -> list[str]:
    """Buy a series without a failure. Return the operations of the server."""
    log = harness.folder / "operations"
    with anyio.fail_after(300):
        async with harness.launcher.server(
            {**harness.env("good"), POSITION: "0", MODE: "count", LOG: str(log)}
        ) as server:
            answer = await server.call("generate_images", **SERIES)
            assert answer is not None
            assert answer["structuredContent"]["status"] == "completed"
            operations = log.read_text().splitlines()
            server.close_stdin()
            assert await server.wait_for_exit() == 0
    assert count_tasks(harness, "good") == Counter(SERIES["prompts"])
    return operations


async def kill_and_repeat(harness: Harness, name: str, position: int) -> None:
    """Kill a server at operation `position`. The next server gets the same call, unless the client has the answer."""
    async with harness.launcher.server(
        harness.env(name, **{POSITION: str(position), MODE: "kill"}), initialize=False
    ) as server:
        await server.initialize()
        answer = await server.call("generate_images", **SERIES)
        server.close_stdin()
        assert await server.wait_for_exit() in (-signal.SIGKILL, 0)
    await harness.gateway.wait_until_idle()
    before = count_tasks(harness, name)
    assert not before or max(before.values()) == 1
    async with harness.launcher.server(harness.env(name)) as server:
        if answer is None:
            second_answer = await server.call("generate_images", **SERIES)
            assert second_answer is not None
            records = second_answer["structuredContent"]["tasks"]
            after = count_tasks(harness, name)
            assert max(after.values()) == 1, (before, after)
            unknown = {record["prompt"] for record in records if record["charged"] == "unknown"}
            # A picture whose answer was lost is not bought again. Every other picture is saved.
            assert set(SERIES["prompts"]) == set(after) | unknown
            saved = {record["prompt"] for record in records if record.get("images")}
            assert saved | unknown == set(SERIES["prompts"]), records
        task_list = await wait_for_known_images(server)
        assert {task["task_id"] for task in task_list if task["task_id"]} <= set(harness.billed_ids(name))
        paths = [Path(image["path"]) for task in task_list for image in task["images"]]
        assert sorted(paths) == harness.pictures(name)
        server.close_stdin()
        assert await server.wait_for_exit() == 0


async def test_a_series_killed_at_any_operation_is_bought_at_most_once(harness: Harness) -> None:
    operations = await good_series(harness)
    kinds = Counter(operation.partition(":")[0] for operation in operations)
    assert all(kinds[kind] >= minimum for kind, minimum in (("journal", 60), ("socket", 60), ("file", 60)))
    every = 1 if RUNS_SLOW_TESTS else max(1, len(operations) // POSITIONS_MAX)
    positions = range(1, len(operations) + 1, every)
    await run_each(
        operations, positions, lambda position: kill_and_repeat(harness, f"kill-{position}", position), PARALLEL
    )
