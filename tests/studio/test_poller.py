"""Polls that are due together are one request, and each watcher gets its own answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import anyio
import httpx2 as httpx
import pytest
from conftest import Open

from evolink_mcp.api.task import Task, TaskError
from evolink_mcp.errors import EvolinkError, RateLimited, Rejected, Unreadable
from evolink_mcp.studio.poller import UNREADABLE_BATCHES_MAX, Poller

pytestmark = pytest.mark.anyio

RUNNING = [Task(f"task-unified-{number}", "processing", progress=10.0 * number) for number in range(4)]
IDS = [task.id for task in RUNNING]
DONE = Task(IDS[0], "completed", results=("https://x.example/1.png",), credits_used=1.5)


def connection_error() -> Unreadable:
    """Return the error of the client for a broken connection."""
    error = Unreadable("EvoLink could not be read (ReadError)")
    error.__cause__ = httpx.ReadError("reset")
    return error


@dataclass
class FakeAccount:
    """A simulated account. `batch` answers a batch poll, `single` a single one."""

    batch: Callable[[], list[Task]] = lambda: RUNNING
    single: Callable[[str], Task] = lambda task_id: next(task for task in RUNNING if task.id == task_id)
    batch_polls: list[list[str]] = field(default_factory=list)
    single_polls: list[str] = field(default_factory=list)

    async def tasks(self, task_ids: list[str]) -> dict[str, Task]:
        self.batch_polls.append(list(task_ids))
        return {task.id: task for task in self.batch()}

    async def task(self, task_id: str) -> Task:
        self.single_polls.append(task_id)
        return self.single(task_id)


def raises(error: EvolinkError) -> Callable[..., list[Task]]:
    def answer(*_: object) -> list[Task]:
        raise error

    return answer


async def read_together(account: FakeAccount, times: int = 1) -> list[dict[str, Task | EvolinkError]]:
    """Poll all of IDS at the same moment, `times` times. Return the results of each time."""
    rounds: list[dict[str, Task | EvolinkError]] = []

    async def no_wait(_: float) -> None:
        await anyio.sleep(0)

    with anyio.fail_after(300):
        async with anyio.create_task_group() as group:
            poller = Poller(account, group, sleep=no_wait)  # pyright: ignore[reportArgumentType]
            poller.job_count = len(IDS)
            for _ in range(times):
                results: dict[str, Task | EvolinkError] = {}

                async def read(task_id: str, results: dict[str, Task | EvolinkError] = results) -> None:
                    try:
                        results[task_id] = await poller.read(task_id)
                    except EvolinkError as error:
                        results[task_id] = error

                async with anyio.create_task_group() as watchers:
                    for task_id in IDS:
                        watchers.start_soon(read, task_id)
                rounds.append(results)
    return rounds


EACH = dict(zip(IDS, RUNNING, strict=True))


async def test_reads_that_are_due_together_are_one_request() -> None:
    account = FakeAccount()
    assert await read_together(account) == [EACH]
    assert (account.batch_polls, account.single_polls) == ([IDS], [])


@pytest.mark.parametrize("status", [400, 404, 405, 501])
async def test_without_batch_polls_each_task_is_polled_alone_from_then_on(status: int) -> None:
    refusal = Unreadable("no", http_status=status) if status == 501 else Rejected("no", http_status=status)
    account = FakeAccount(batch=raises(refusal))
    assert await read_together(account, times=2) == [EACH, EACH]
    assert account.batch_polls == [IDS]
    assert sorted(account.single_polls) == sorted(IDS * 2)


async def test_an_invalid_batch_is_repeated_only_a_few_times() -> None:
    account = FakeAccount(batch=raises(Unreadable("not JSON")))
    assert await read_together(account, times=UNREADABLE_BATCHES_MAX + 2) == [EACH] * (UNREADABLE_BATCHES_MAX + 2)
    assert account.batch_polls == [IDS] * UNREADABLE_BATCHES_MAX


async def test_a_valid_batch_resets_the_count_of_invalid_ones() -> None:
    answers = iter([raises(Unreadable("not JSON"))] * 2 + [lambda: RUNNING] + [raises(Unreadable("not JSON"))] * 2)

    def batch() -> list[Task]:
        return next(answers)()

    account = FakeAccount(batch=batch)
    assert await read_together(account, times=5) == [EACH] * 5
    assert len(account.batch_polls) == 5


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(RateLimited("slow down", http_status=429, retry_after_s=3.0), id="429"),
        pytest.param(Rejected("key", code="unauthorized", http_status=401), id="401"),
        pytest.param(Unreadable("fault", http_status=500), id="500"),
        pytest.param(connection_error(), id="a broken connection"),
    ],
)
async def test_an_error_of_a_batch_reaches_every_watcher_and_ends_no_batch_reads(error: EvolinkError) -> None:
    account = FakeAccount(batch=raises(error))
    assert await read_together(account, times=2) == [dict.fromkeys(IDS, error)] * 2
    assert (account.batch_polls, account.single_polls) == ([IDS, IDS], [])


@pytest.mark.parametrize(
    ("batch_tasks", "single_task"),
    [
        pytest.param([], RUNNING[0], id="absent"),
        pytest.param([Task(IDS[0], "completed", results=DONE.results)], DONE, id="completed without its price"),
        pytest.param([Task(IDS[0], "completed", credits_used=1.5)], DONE, id="completed without its links"),
        pytest.param(
            [Task(IDS[0], "failed")], Task(IDS[0], "failed", error=TaskError("x", "y")), id="failed without a reason"
        ),
    ],
)
async def test_a_task_that_is_incomplete_in_a_batch_is_polled_alone(batch_tasks: list[Task], single_task: Task) -> None:
    account = FakeAccount(batch=lambda: [*batch_tasks, *RUNNING[1:]], single=lambda _: single_task)
    assert await read_together(account) == [EACH | {IDS[0]: single_task}]
    assert (account.batch_polls, account.single_polls) == ([IDS], [IDS[0]])


async def test_an_error_of_a_single_read_reaches_its_own_watcher_only() -> None:
    unknown = Rejected("not here", http_status=404)
    account = FakeAccount(batch=lambda: RUNNING[1:], single=raises(unknown))  # pyright: ignore[reportArgumentType]
    assert await read_together(account) == [EACH | {IDS[0]: unknown}]


async def test_an_interrupted_poll_is_an_error_for_each_watcher() -> None:
    """An error of this package in one poll ends neither the server nor the wait of another watcher without an answer."""

    def fault(_: str) -> Task:
        raise ZeroDivisionError

    errors: list[Exception] = []

    async def both_watch() -> None:
        async with anyio.create_task_group() as group:
            poller = Poller(FakeAccount(batch=list, single=fault), group)  # pyright: ignore[reportArgumentType]
            poller.job_count = 2

            async def watch(task_id: str) -> None:
                with anyio.CancelScope(shield=True):
                    try:
                        await poller.read(task_id)
                    except EvolinkError as error:
                        errors.append(error)

            group.start_soon(watch, IDS[0])
            group.start_soon(watch, IDS[1])

    with anyio.fail_after(300):
        await both_watch()
    assert [type(error) for error in errors] == [Unreadable, Unreadable]


# --- several tenants of one account ---


async def test_each_tenant_has_a_turn_when_many_polls_are_due() -> None:
    account = FakeAccount(
        batch=raises(Rejected("no batch reads", http_status=404)), single=lambda task_id: Task(task_id, "processing")
    )
    turns: list[str] = []

    async def no_wait(_: float) -> None:
        await anyio.sleep(0)

    with anyio.fail_after(300):
        async with anyio.create_task_group() as group:
            poller = Poller(account, group, sleep=no_wait)  # pyright: ignore[reportArgumentType]
            poller.job_count = 202

            async def read(task_id: str, tenant: str) -> None:
                await poller.read(task_id, tenant)
                turns.append(tenant)

            for number in range(200):
                group.start_soon(read, f"task-unified-a{number}", "anna")
            for number in range(2):
                group.start_soon(read, f"task-unified-b{number}", "bert")
    assert len(turns) == 202
    assert {place < 10 for place, tenant in enumerate(turns) if tenant == "bert"} == {True}


async def test_a_429_delays_the_polls_of_its_account_and_of_no_other() -> None:
    limits = [RateLimited("slow down", retry_after_s=17.0)]

    def single(task_id: str) -> Task:
        if limits and task_id == IDS[0]:
            raise limits.pop()
        return Task(task_id, "processing")

    waits: list[float] = []

    async def note(seconds: float) -> None:
        waits.append(seconds)

    with anyio.fail_after(300):
        async with anyio.create_task_group() as group:
            first, second = (Poller(FakeAccount(single=single), group, sleep=note) for _ in range(2))  # pyright: ignore[reportArgumentType]
            with pytest.raises(RateLimited):
                await first.read(IDS[0], "anna")
            await second.read(IDS[1], "carl")
            assert waits == []
            await first.read(IDS[1], "bert")
    assert [16 < wait <= 17 for wait in waits] == [True]


async def test_an_order_waits_while_evolink_asks_its_account_to_wait(open_world: Open) -> None:
    async with open_world() as world, world.client() as client:
        started_at = world.clock.now
        world.studio.rate_limit.extend(12.0)
        await client.call_tool("generate_image", {"prompt": "sim:done a fox", "size": "1024x640"})
        (post,) = (r for r in world.simulator.requests if r.path == "/v1/images/generations")
    assert 11 < post.at - started_at < 14
