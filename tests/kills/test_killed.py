"""One good run is counted, operation by operation; then it ends, or fails, at the k-th, for every k."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from faulty_gateway import Ask, behave
from killer import AT, HOW, LOG, Nursery, Server, nursery_of_servers  # noqa: F401
from town import (  # noqa: F401
    WISH,
    Town,
    each,
    good_run,
    put_right,
    settled,
    stopped_and_continued,
    struck_life,
    tasks,
    town_with_a_nursery,
)  # fmt: skip

from evolink_mcp.journal.sqlite import FILE_NAME, read_entries

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL, fork and passed file descriptors are POSIX"),
]

AT_ONCE = 6
# A run's threads interleave: the good run's count plus these covers every operation of any run.
SPARE = 4
SLOW = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("EVOLINK_TEST_SLOW"), reason="EVOLINK_TEST_SLOW=1 runs it"),
]


def ids_written(env: dict[str, str]) -> int:
    """How many purchases have their id on disk."""
    folder = Path(env["EVOLINK_MCP_DATA_DIR"])
    if not (folder / FILE_NAME).exists():
        return 0
    return sum(entry.task is not None for entry in read_entries(folder, 50))


async def one_life(town: Town, name: str, how: str, at: int) -> None:
    """A server is struck at its k-th operation, and the next one puts everything right."""
    env = town.env(name, **{AT: str(at), HOW: how})
    billed, answer = await struck_life(town, env, name, how, codes=(0,))
    assert answer is not None or how == "kill"
    if answer is not None:
        facts = answer["structuredContent"]
        assert f"Charged: {facts['charged']}" in answer["content"][0]["text"]
        assert facts["error"] is not None or not answer["isError"]
    posts = town.gateway.posts
    async with town.nursery.server(town.env(name)) as server:
        await put_right(server, billed)
        server.hang_up()
        assert await server.gone() == 0
    assert town.gateway.posts >= posts
    assert town.billed(name) == billed
    assert len(town.pictures(name)) == len(billed)


@pytest.mark.parametrize("how", ["kill", "fail", pytest.param("late", marks=SLOW)])
async def test_whatever_operation_is_the_last_one_task_at_most_and_its_picture_on_disk(town: Town, how: str) -> None:
    """kill: SIGKILL before the k-th; fail: the k-th is not done and fails; late: it is done, and fails."""
    operations = await good_run(town, town.env("good"))
    kinds = Counter(operation.partition(":")[0] for operation in operations)
    assert all(kinds[kind] >= least for kind, least in (("journal", 15), ("socket", 8), ("file", 15)))
    # A stdout that fails is a client that has gone: test_shutdown has those.
    ats = [
        at for at in range(1, len(operations) + SPARE)
        if how == "kill" or at > len(operations) or operations[at - 1] != "file: write"
    ]  # fmt: skip
    await each(operations, ats, lambda at: one_life(town, f"{how}-{at}", how, at), AT_ONCE)


async def neighbours(town: Town, name: str, at: int) -> None:
    """A server dies at its k-th operation; beside it lives one with another key, on the same journal."""
    env = town.env(name)
    other = {**env, "EVOLINK_API_KEY": town.key(f"{name}-neighbour")}
    async with town.nursery.server(other) as neighbour:
        assert await tasks(neighbour) == []
        async with town.nursery.server({**env, AT: str(at), HOW: "kill"}, greet=False) as server:
            await server.hello()
            await server.call("generate_image", **WISH)
            server.hang_up()
            assert await server.gone() in (-signal.SIGKILL, 0)
        await town.gateway.dealt_with()
        billed = town.billed(name)
        assert len(billed) <= 1
        assert await tasks(neighbour) == []
        own = await neighbour.call("generate_image", **WISH)
        assert own is not None
        assert own["structuredContent"]["charged"] == "yes"
        assert own["structuredContent"]["task_id"] not in billed
        async with town.nursery.server(env) as heir:
            listed = await settled(heir, billed)
            assert [task["task_id"] for task in listed if task["task_id"]] == billed
        assert [task["task_id"] for task in await tasks(neighbour)] == town.billed(f"{name}-neighbour")
    assert town.billed(name) == billed
    assert len(town.billed(f"{name}-neighbour")) == 1


async def test_whatever_operation_is_the_last_a_neighbour_with_another_key_touches_nothing(town: Town) -> None:
    operations = await good_run(town, town.env("good"))
    # Only what changes the journal or reaches EvoLink makes a difference to a neighbour.
    matters = ("journal: INSERT", "journal: UPDATE", "socket: send", "socket: recv")
    ats = [at for at, operation in enumerate(operations, start=1) if operation.startswith(matters)]
    await each(operations, ats, lambda at: neighbours(town, f"beside-{at}", at), AT_ONCE)


async def test_four_servers_killed_at_different_moments_leave_four_tasks_and_no_further_post(town: Town) -> None:
    """While its POST waits for the answer, while the task is made, while the picture comes, after it came."""
    env = town.env("four")
    simulator = town.gateway.simulator
    reached, never = anyio.Event(), anyio.Event()

    async def take_and_wait(ask: Ask) -> None:
        await ask.accepted()
        reached.set()
        await never.wait()

    async def until(condition: Any) -> None:
        while not condition():
            await anyio.sleep(0.01)

    def hold_pictures(ask: Ask) -> Any:
        async def hold(_: Ask) -> None:
            reached.set()
            await never.wait()

        return hold if ask.path.startswith("/pictures/") else None

    async def die(prompt: str, moment: Any) -> None:
        async with town.nursery.server(env) as server, anyio.create_task_group() as group:
            group.start_soon(lambda: server.call("generate_image", **{**WISH, "prompt": prompt}))
            await moment()
            server.kill()
            assert await server.gone() == -signal.SIGKILL

    with anyio.fail_after(300):
        simulator.duration_s = 0.5
        # Two deaths without an id would be two lost answers of one moment, which nobody can tell apart.
        await die("being made", lambda: until(lambda: ids_written(env) == 1))
        simulator.duration_s = 0
        town.gateway.reads = hold_pictures
        # The first one's picture may be fetched by this server too: its own purchase must have been made.
        await die("being fetched", lambda: until(lambda: reached.is_set() and ids_written(env) == 2))
        town.gateway.reads = lambda ask: None
        async with town.nursery.server(env) as server:
            await server.call("generate_image", **{**WISH, "prompt": "here"})
            server.kill()
            assert await server.gone() == -signal.SIGKILL
        reached = anyio.Event()
        town.gateway.purchases = [take_and_wait]
        await die("being bought", reached.wait)
        posts = town.gateway.posts
        assert (posts, len(town.billed("four"))) == (4, 4)

        async with town.nursery.server(env) as server:
            listed = await settled(server, town.billed("four"))
            assert [task["status"] for task in listed] == ["completed"] * 4
            charged = {task["request"]["prompt"]: task["charged"] for task in listed}
            assert charged == {"being made": "yes", "being fetched": "yes", "here": "yes", "being bought": "unknown"}
            assert len(town.pictures("four")) == 4
            assert town.gateway.posts == posts
            again = await server.call("generate_image", **{**WISH, "prompt": "being bought"})
            assert again is not None
            assert "earlier identical call" in again["content"][0]["text"]
            assert town.gateway.posts == posts
            town.gateway.purchases = [behave]
            anew = await server.call("generate_image", **{**WISH, "prompt": "being bought"})
            assert anew is not None
            assert anew["structuredContent"]["task_id"] not in {task["task_id"] for task in listed}
            assert town.gateway.posts == posts + 1


@asynccontextmanager
async def two_servers(town: Town) -> AsyncIterator[tuple[Server, Server]]:
    async with town.nursery.server(town.env("pair")) as one, town.nursery.server(town.env("pair")) as other:
        yield one, other


async def test_two_living_servers_leave_each_other_alone_and_one_takes_up_the_others_work(town: Town) -> None:
    town.gateway.simulator.duration_s = 3600
    with anyio.fail_after(300):
        async with two_servers(town) as (one, other):
            first = await one.call("generate_image", **WISH, wait_seconds=0)
            second = await other.call("generate_image", **{**WISH, "prompt": "a hen"}, wait_seconds=0)
            assert first is not None
            assert second is not None
            assert len(await tasks(one)) == len(await tasks(other)) == 2
            town.gateway.simulator.duration_s = 0
            for task in town.gateway.simulator.tasks.values():
                task.duration = 0
            one.kill()
            assert await one.gone() == -signal.SIGKILL
            listed = await settled(other, town.billed("pair"))
    assert [task["status"] for task in listed] == ["completed"] * 2
    assert (town.gateway.posts, len(town.pictures("pair"))) == (2, 2)


async def test_a_server_that_was_only_stopped_keeps_its_work(town: Town) -> None:
    await stopped_and_continued(town, town.env("pair"))


async def test_a_throw_away_second_process_does_nothing(town: Town) -> None:
    """Some clients start a server only to see whether it starts: it must leave no trace."""
    with anyio.fail_after(300):
        async with town.nursery.server(town.env("probe")) as server:
            await server.ask("tools/list")
            server.hang_up()
            assert await server.gone() == 0
    assert list((town.folder / "probe").iterdir()) == []
    assert town.gateway.seen == []
