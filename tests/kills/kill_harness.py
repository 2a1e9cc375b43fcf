"""A simulated EvoLink behind a gateway, and servers with separate keys and folders."""

from __future__ import annotations

import signal
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from child_processes import minimal_environment
from faulty_gateway import Gateway, QuickSimulator
from killer import LOG, MODE, POSITION, Launcher, Server

REQUEST = {"prompt": "a fox", "size": "1024x640", "quality": "low"}


@dataclass
class Harness:
    """One simulated EvoLink behind a gateway. Each name has its own key and folders."""

    gateway: Gateway
    launcher: Launcher
    folder: Path

    def env(self, name: str, **settings: str) -> dict[str, str]:
        home = self.folder / name
        home.mkdir(exist_ok=True)
        return minimal_environment(
            home, EVOLINK_API_KEY=self.key(name),
            EVOLINK_BASE_URL=self.gateway.url, EVOLINK_MCP_DATA_DIR=str(home / "data"),
            EVOLINK_MCP_OUTPUT_DIR=str(home / "pictures"), EVOLINK_MCP_PREVIEW="off", **settings,
        )  # fmt: skip

    @staticmethod
    def key(name: str) -> str:
        return f"sk-canary-{name}-0123456789"

    def billed_ids(self, name: str) -> list[str]:
        return [task.id for task in self.gateway.simulator.tasks.values() if task.key == self.key(name)]

    def reads(self, name: str, task_id: str) -> int:
        """Return how often the key of `name` read this task."""
        reads = [r for r in self.gateway.simulator.requests if r.path == f"/v1/tasks/{task_id}"]
        return sum(r.headers["authorization"] == f"Bearer {self.key(name)}" for r in reads)

    def pictures(self, name: str) -> list[Path]:
        """Return the images in the output folder and in the fallback folder."""
        home = self.folder / name
        return sorted([*(home / "pictures").glob("*.png"), *(home / "data" / "pictures").glob("*.png")])


@pytest.fixture(name="harness")
async def open_harness(tmp_path: Path, launcher: Launcher) -> AsyncIterator[Harness]:
    async with Gateway(QuickSimulator(duration_s=0)).open() as gateway:
        yield Harness(gateway, launcher, tmp_path)


async def tasks(server: Server) -> list[dict[str, Any]]:
    answer = await server.call("list_tasks", detail=True)
    assert answer is not None
    return answer["structuredContent"]["tasks"]


async def wait_for_images(server: Server, task_ids: list[str]) -> list[dict[str, Any]]:
    """Wait until the images of these tasks are on disk. Return all tasks of the journal."""
    while True:
        task_list = await tasks(server)
        saved = {t["task_id"] for t in task_list if t["images"] and all(i["path"] for i in t["images"])}
        if set(task_ids) <= saved:
            return task_list
        await anyio.sleep(0.02)


async def good_run(harness: Harness, env: dict[str, str]) -> list[str]:
    """Run a server without a failure. Return its operations from start to end."""
    log = harness.folder / "operations"
    with anyio.fail_after(300):
        async with harness.launcher.server({**env, POSITION: "0", MODE: "count", LOG: str(log)}) as server:
            answer = await server.call("generate_image", **REQUEST)
            assert answer is not None
            assert answer["structuredContent"]["status"] == "completed"
            operations = log.read_text().splitlines()
            server.close_stdin()
            assert await server.wait_for_exit() == 0
    return operations


async def run_failing_server(
    harness: Harness, env: dict[str, str], name: str, mode: str, codes: tuple[int, ...]
) -> tuple[list[str], dict[str, Any] | None]:
    """Run a server that fails as `env` defines. Return the IDs of the billed tasks, and the answer, if there is one."""
    async with harness.launcher.server(env, initialize=False) as server:
        await server.initialize()
        answer = await server.call("generate_image", **REQUEST)
        server.close_stdin()
        assert await server.wait_for_exit() in ((-signal.SIGKILL, 0) if mode == "kill" else codes)
    await harness.gateway.wait_until_idle()
    billed_ids = harness.billed_ids(name)
    assert len(billed_ids) <= 1
    if answer is not None:
        facts = answer["structuredContent"]
        assert facts["charged"] in (("yes", "unknown") if billed_ids else ("no", "unknown")), facts
    assert "Traceback" not in server.stderr_file.read_text()
    return billed_ids, answer


async def check_recovery(harness: Harness, server: Server, name: str, billed_ids: list[str]) -> None:
    """Check that this server has the tasks and images of the failed one. A task without a recorded ID is a guess."""
    task_list = await wait_for_images(server, billed_ids)
    assert [task["task_id"] for task in task_list if task["task_id"]] == billed_ids
    assert all(task["charged"] == ("unknown" if task["guess"] else "yes") for task in task_list if task["task_id"])
    paths = [Path(image["path"]) for task in task_list for image in task["images"]]
    assert sorted(paths) == harness.pictures(name)
    assert len(paths) == len(billed_ids)


async def run_each(
    operations: list[str], positions: Iterable[int], run: Callable[[int], Awaitable[None]], parallel: int
) -> None:
    """Call `run` with each position. Report all failures together."""
    limiter = anyio.CapacityLimiter(parallel)
    failures: dict[str, BaseException] = {}

    async def run_one(position: int) -> None:
        operation = operations[position - 1] if position <= len(operations) else "later"
        async with limiter:
            try:
                with anyio.fail_after(300):
                    await run(position)
            except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001
                failures[f"{position} ({operation})"] = error

    async with anyio.create_task_group() as group:
        for position in positions:
            group.start_soon(run_one, position)
    if failures:
        pytest.fail(
            "\n".join(f"{name}: {''.join(traceback.format_exception(error))}" for name, error in failures.items())
        )


async def check_suspended_server(harness: Harness, env: dict[str, str]) -> None:
    """Check that another server only watches the task of a server after SIGSTOP, because that server is not dead."""
    harness.gateway.simulator.duration_s = 3600
    with anyio.fail_after(300):
        async with harness.launcher.server(env) as stopped_server, harness.launcher.server(env) as watcher:
            first = await stopped_server.call("generate_image", **REQUEST, wait_seconds=0)
            assert first is not None
            task_id = first["structuredContent"]["task_id"]
            stopped_server.kill(signal.SIGSTOP)
            for task in harness.gateway.simulator.tasks.values():
                task.duration = 0
            answer = await watcher.call("get_task", task_id=task_id, wait_seconds=1)
            assert answer is not None
            assert answer["structuredContent"]["status"] == "completed"
            assert harness.pictures("pair") == []
            stopped_server.kill(signal.SIGCONT)
            await wait_for_images(watcher, harness.billed_ids("pair"))
    assert (harness.gateway.posts, len(harness.pictures("pair"))) == (1, 1)
