"""Two servers with one journal, with one key or two: no double purchase, and no server works on entries of the other."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from conftest import Clock, HeldClock, Open, PlainSimulator, World
from faulty_journal import FaultyJournal

from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.images.folders import PART_PREFIX, PART_SUFFIX
from evolink_mcp.journal.entry import Entry, account_id_of
from evolink_mcp.studio.jobs import ImageRequest

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

OTHER_KEY = {"EVOLINK_API_KEY": "sk-another-0123456789abcdef"}
REQUEST = {"prompt": "a fox", "size": "1024x640", "quality": "low"}
LONG = {**REQUEST, "prompt": "sim:slow=1000000 a fox"}
HANDLE = {**LONG, "wait_seconds": 0}


async def no_pause(_: float) -> None:
    await anyio.sleep(0.001)


async def call(world: World, tool: str, **arguments: Any) -> dict[str, Any]:
    async with world.client() as client:
        return (await client.call_tool(tool, arguments)).structured_content


async def list_tasks(world: World) -> list[dict[str, Any]]:
    return (await call(world, "list_tasks", detail=True))["tasks"]


async def disk_full(write: Any, entry: Entry, *facts: Any) -> bool:
    """Fail as a full disk does, except for the phase `sending`."""
    if entry.phase != "sending":
        raise JournalUnwritable("the disk is full")
    return await write(entry, *facts)


def count_posts(simulator: PlainSimulator) -> int:
    return sum(r.method == "POST" and r.path == "/v1/images/generations" for r in simulator.requests)


# --- accounts ------------------------------------------------------------------------------------------------


async def test_an_account_id_contains_neither_key_nor_address() -> None:
    account_id = account_id_of("sk-0123456789", "https://api.example")
    assert account_id == account_id_of("sk-0123456789", "https://API.example")
    assert account_id != account_id_of("sk-0123456789", "https://other.example")
    assert account_id != account_id_of("sk-0123456780", "https://api.example")
    assert account_id.isalnum()


# --- owners --------------------------------------------------------------------------------------------------


async def test_an_order_whose_caller_cancels_before_it_is_sent_is_not_bought_twice(open_world: Open) -> None:
    """Server A waits after a 429 and its caller cancels. The same call at server B buys the only task."""
    clock, other_clock = HeldClock(), Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0)
    async with (
        open_world(simulator=simulator, clock=clock) as server_a,
        open_world(simulator=simulator, clock=other_clock) as server_b,
    ):
        clock.is_held = True
        arguments = {**REQUEST, "prompt": "sim:429 a fox"}
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: call(server_a, "generate_image", **arguments))
            await clock.has_sleeper.wait()
            group.cancel_scope.cancel()
        clock.is_held = False
        other_purchase = await call(server_b, "generate_image", **arguments)
        clock.release.set()
        tasks = await list_tasks(server_a)
    assert other_purchase["status"] == "completed"
    assert len(simulator.tasks) == 1
    assert sorted((task["status"], task["charged"]) for task in tasks) == [("completed", "yes"), ("failed", "no")]


async def deduplicate_while_held(
    server_a: World, server_b: World, clock: HeldClock, is_ready: Callable[[], bool]
) -> list[dict[str, Any]]:
    """Call server B with an order that server A has not sent yet. Hold the clock of A until `is_ready`. Return the answers."""
    arguments = {**REQUEST, "prompt": "sim:429 a fox"}
    answers: list[dict[str, Any]] = []
    clock.is_held = True
    async with server_a.client() as client, anyio.create_task_group() as group:
        group.start_soon(lambda: client.call_tool("generate_image", arguments))
        await clock.has_sleeper.wait()
        (entry,) = await server_a.studio.journal.recent(1)
        await server_a.studio.remove_caller(entry)

        async def join() -> None:
            answers.append(await call(server_b, "generate_image", **arguments))

        group.start_soon(join)
        while not is_ready():
            await anyio.sleep(0.001)
        clock.is_held = False
        clock.release.set()
    return answers


async def test_an_unsent_order_of_a_living_server_is_watched_and_only_its_owner_sends_it(open_world: Open) -> None:
    """The wait of its caller has ended. The same call at another server gets the image."""
    clock, other_clock = HeldClock(), Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0)
    async with (
        open_world(simulator=simulator, clock=clock) as server_a,
        open_world(simulator=simulator, clock=other_clock, pause=no_pause) as server_b,
    ):
        answers = await deduplicate_while_held(server_a, server_b, clock, lambda: bool(server_b.studio.jobs))
    assert [(answer["status"], answer["charged"]) for answer in answers] == [("completed", "yes")]
    assert (len(simulator.tasks), len(server_a.files)) == (1, 1)


async def test_a_watcher_that_cannot_read_the_journal_does_not_report_an_unsent_order(open_world: Open) -> None:
    """The owner may be about to buy, so a new call would lead to a second purchase."""
    clock = HeldClock()
    simulator = PlainSimulator(clock=clock, duration_s=0)
    async with (
        open_world(simulator=simulator, clock=clock) as server_a,
        open_world(simulator=simulator, clock=Clock(), pause=no_pause, wrap_journal=FaultyJournal) as server_b,
    ):
        journal: Any = server_b.studio.journal
        refusal_count = 0

        async def acquire(real_acquire: Any, key: str) -> bool:
            nonlocal refusal_count
            if refusal_count == 5:
                return await real_acquire(key)
            refusal_count += 1
            raise JournalUnwritable("another program holds the journal")

        journal.replacements["acquire"] = acquire
        answers = await deduplicate_while_held(server_a, server_b, clock, lambda: refusal_count == 5)
    assert [(answer["status"], answer["charged"]) for answer in answers] == [("completed", "yes")]
    assert len(simulator.tasks) == 1


async def test_get_task_at_another_server_watches_and_saves_nothing_twice(open_world: Open) -> None:
    clock = HeldClock()
    simulator = PlainSimulator(clock=clock, duration_s=30)
    async with (
        open_world(simulator=simulator, clock=clock) as server_a,
        open_world(simulator=simulator, clock=Clock(), pause=no_pause, wrap_journal=FaultyJournal) as server_b,
        server_a.client() as client,
    ):
        handle = (await client.call_tool("generate_image", {**REQUEST, "wait_seconds": 0})).structured_content
        writes: list[str] = []
        journal: Any = server_b.studio.journal

        async def write(real_write: Any, entry: Entry, *facts: Any) -> bool:
            writes.append(entry.key)
            return await real_write(entry, *facts)

        journal.replacements = {"update": write, "update_images": write}
        finished = await call(server_b, "get_task", task_id=handle["task_id"])
    assert finished["status"] == "completed"
    assert finished["images"][0]["path"] == str(server_a.files[0])
    assert (writes, len(server_a.files)) == ([], 1)


@pytest.mark.journal_file
async def test_an_owner_whose_lock_file_was_deleted_is_not_dead(open_world: Open, tmp_path: Path) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock)
    async with (
        open_world(simulator=simulator, clock=clock) as server_a,
        open_world(simulator=simulator, clock=clock) as server_b,
    ):
        await call(server_a, "generate_image", **HANDLE)
        for lock in (tmp_path / "data" / "owners").iterdir():
            lock.unlink()
        await list_tasks(server_b)
        assert server_b.studio.jobs == []
        (entry,) = await server_b.studio.journal.recent(1)
        assert entry.owner == server_a.studio.journal.owner
        await list_tasks(server_a)
        locks = {path.stem for path in (tmp_path / "data" / "owners").iterdir()}
        assert server_a.studio.journal.owner in locks


async def test_the_first_call_of_an_idle_server_adopts_the_work_of_a_dead_server(open_world: Open) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=500)
    async with open_world(simulator=simulator, clock=clock) as idle, idle.client() as client:
        await idle.studio.wake()  # as it does a second after its start
        async with open_world(simulator=simulator, clock=clock) as dead:
            await call(dead, "generate_image", **{**REQUEST, "wait_seconds": 0})
        clock.now += 1000
        await client.call_tool("list_tasks", {})
        assert len(idle.studio.jobs) == 1


async def test_two_servers_save_an_external_task_once(open_world: Open) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0)
    async with (
        open_world(simulator=simulator, clock=clock, pause=no_pause) as server_a,
        open_world(simulator=simulator, clock=clock, pause=no_pause) as server_b,
    ):
        assert server_a.settings.key is not None
        simulator.create({"model": "gpt-image-2", **REQUEST}, key=server_a.settings.key.get_secret_value())
        (task_id,) = simulator.tasks
        answers: list[dict[str, Any]] = []

        async def get(world: World) -> None:
            answers.append(await call(world, "get_task", task_id=task_id))

        async with anyio.create_task_group() as group:
            group.start_soon(get, server_a)
            group.start_soon(get, server_b)
        assert len(await list_tasks(server_a)) == 1
    assert [answer["images"][0]["path"] for answer in answers] == [str(server_a.files[0])] * 2
    assert len(server_a.files) == 1


# --- final entries -------------------------------------------------------------------------------------------


async def test_an_order_that_cannot_be_written_before_its_post_is_final(open_world: Open) -> None:
    async with open_world(pause=no_pause, wrap_journal=FaultyJournal) as world:
        journal: Any = world.studio.journal
        journal.unwritable = {"update"}
        refusal = await call(world, "generate_image", **REQUEST)
        assert (refusal["error"]["code"], refusal["charged"], world.posts) == ("journal_unwritable", "no", 0)
        repeat = await call(world, "generate_image", **{**REQUEST, "max_credits": 0.01})
        assert (repeat["error"]["code"], world.posts) == ("over_budget", 0)
        journal.unwritable = set()
        while (await world.studio.journal.recent(1))[0].phase != "unsent":
            await anyio.sleep(0.001)
        assert (await journal.sums_since(0)).total == 0
        last_purchase = await call(world, "generate_image", **REQUEST)
    assert (last_purchase["status"], world.posts) == ("completed", 1)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ALL_PROXY", "socks9://127.0.0.1:1"),
        ("HTTPS_PROXY", "http://127.0.0.1:no-port"),
        ("SSL_CERT_FILE", "/nowhere/certificates.pem"),
    ],
)
async def test_a_client_that_cannot_be_built_buys_nothing_and_blocks_nothing(
    open_world: Open, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, tmp_path: Path
) -> None:
    from evolink_mcp.app.wiring import open_studio
    from evolink_mcp.teams.settings import TeamSettings

    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv(variable, value)
    settings = TeamSettings.from_environment({
        "EVOLINK_API_KEY": "sk-canary-0123456789abcdef", "EVOLINK_MCP_MAX_CREDITS_PER_DAY": "0.3",
        "EVOLINK_MCP_DATA_DIR": str(tmp_path / "data"), "EVOLINK_MCP_OUTPUT_DIR": str(tmp_path / "pictures"),
    })  # fmt: skip
    async with open_studio(settings) as studio:
        world = World(studio, PlainSimulator(), Clock(), tmp_path, settings)
        for _ in range(3):  # it neither uses up the day's cap nor is it joined
            refusal = await call(world, "generate_image", **REQUEST)
            assert (refusal["error"]["code"], refusal["charged"]) == ("unusable_environment", "no")
            assert variable in refusal["error"]["message"]
            assert value not in refusal["error"]["message"]
        balance = await call(world, "get_balance")
        assert variable in balance["error"]["message"]


async def test_an_order_that_waits_after_a_429_is_provably_unsent(open_world: Open) -> None:
    """If its server dies now, the next server knows that nothing was bought."""
    clock = HeldClock()
    simulator = PlainSimulator(clock=clock, duration_s=0)
    async with open_world(simulator=simulator, clock=clock) as world:
        clock.is_held = True
        async with world.client() as client, anyio.create_task_group() as group:
            group.start_soon(lambda: client.call_tool("generate_image", {**REQUEST, "prompt": "sim:429 a fox"}))
            await clock.has_sleeper.wait()
            (entry,) = await world.studio.journal.recent(1)
            assert (entry.phase, entry.charged) == ("intent", "no")
            clock.is_held = False
            clock.release.set()


# --- repeated task IDs and full disks -------------------------------------------------------------------------


class SameTaskAgain(httpx.ASGITransport):
    """Answer every purchase with the answer of the first one."""

    first: bytes | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path != "/v1/images/generations":
            return await super().handle_async_request(request)
        if self.first is None:
            reply = await super().handle_async_request(request)
            self.first = await reply.aread()
        return httpx.Response(200, stream=httpx.ByteStream(self.first))


async def test_a_second_purchase_with_the_id_of_the_first_is_reported_and_settled(open_world: Open) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0)
    async with open_world(simulator=simulator, clock=clock, transport=SameTaskAgain(simulator.app)) as world:
        first = await call(world, "generate_image", **REQUEST)
        second = await call(world, "generate_image", **{**REQUEST, "prompt": "a hen"})
        assert (first["status"], second["error"]["code"]) == ("completed", "task_known")
        assert (second["charged"], second["task_id"]) == ("unknown", None)
        assert world.studio.jobs == []
        assert [task["status"] for task in await list_tasks(world)] == ["unknown", "completed"]


async def test_a_task_id_is_written_later_if_the_disk_was_full(open_world: Open) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock)
    options: Any = {"simulator": simulator, "clock": clock, "pause": no_pause, "wrap_journal": FaultyJournal}
    async with open_world(**options) as world:
        journal: Any = world.studio.journal
        journal.replacements = {"update": disk_full, "update_images": disk_full}
        answer = await call(world, "generate_image", **HANDLE)
        assert answer["task_id"] in simulator.tasks
        assert (await journal.recent(1))[0].task_id is None
        journal.replacements = {}
        while (await journal.recent(1))[0].task_id is None:
            await anyio.sleep(0.001)
        repeat = await call(world, "generate_image", **HANDLE)
    assert repeat["task_id"] == answer["task_id"]
    assert count_posts(simulator) == 1


async def test_a_task_id_that_another_server_recorded_first_stops_no_server(open_world: Open) -> None:
    """The disk of one server is full. A caller gives the ID to another server, which records an external task."""
    clock = Clock()
    simulator = PlainSimulator(clock=clock)
    async with (
        open_world(simulator=simulator, clock=clock, pause=no_pause, wrap_journal=FaultyJournal) as server_a,
        open_world(simulator=simulator, clock=clock, pause=no_pause) as server_b,
    ):
        journal: Any = server_a.studio.journal
        journal.replacements = {"update": disk_full, "update_images": disk_full}
        answer = await call(server_a, "generate_image", **HANDLE)
        answer_of_other = await call(server_b, "get_task", task_id=answer["task_id"], wait_seconds=0)
        assert answer_of_other["task_id"] == answer["task_id"]
        journal.replacements = {}
        while server_a.studio.has_unwritten:
            await anyio.sleep(0.001)
        assert len(await list_tasks(server_a)) == 2
    assert count_posts(simulator) == 1


async def test_an_older_state_that_could_not_be_written_does_not_overwrite_a_newer_one() -> None:
    """While the server writes one deferred entry, the job of another entry writes a newer state."""
    from evolink_mcp.api.task import Task
    from evolink_mcp.studio.events import Events
    from evolink_mcp.studio.jobs import Job
    from evolink_mcp.studio.journal_writer import JournalWriter

    written_states: list[tuple[str, str]] = []

    class FakeJournal:
        owner, account, full, held = "o", "a", True, anyio.Event()

        async def update(self, entry: Entry, *_: Any) -> bool:
            if self.full:
                raise JournalUnwritable("the disk is full")
            written_states.append((entry.key, entry.status))
            return True

        async def update_images(self, entry: Entry, *_: Any) -> bool:
            if entry.key == "first":
                await self.held.wait()
            return await self.update(entry)

        async def release(self, key: str) -> None:
            written_states.append((key, "released"))

        def publish_progress(self, key: str, task: Task) -> None:
            pass

    journal = FakeJournal()
    writer = JournalWriter(journal, Events())  # pyright: ignore[reportArgumentType]
    jobs = [Job(Entry(key, "o", "submitted", 1.0, account="a")) for key in ("first", "second")]
    for number, job in enumerate(jobs):
        await writer.record_poll(job, Task(f"task-unified-{number}", "processing"))
    jobs[0].finish()
    journal.full = False
    async with anyio.create_task_group() as group:
        group.start_soon(writer.flush)
        await anyio.lowlevel.checkpoint()
        await writer.record_poll(jobs[1], Task("task-unified-1", "completed"))
        journal.held.set()
    assert written_states == [("second", "completed"), ("first", "processing"), ("first", "released")]


# --- deduplication -------------------------------------------------------------------------------------------


async def test_the_same_request_with_explicit_defaults_is_deduplicated(open_world: Open) -> None:
    async with open_world() as world:
        first = await call(world, "generate_image", prompt="sim:slow=1000000 a fox", size="16:9", wait_seconds=0)
        defaults = {"size": "16:9", "resolution": "1k", "quality": "medium", "n": 1, "model": "gpt-image-2"}
        same = await call(world, "generate_image", prompt="sim:slow=1000000 a fox", wait_seconds=0, **defaults)
        other = await call(world, "generate_image", prompt="sim:slow=1000000 a fox", size="16:9", wait_seconds=0,
                            resolution="2K")  # fmt: skip
    assert same["task_id"] == first["task_id"]
    assert other["task_id"] != first["task_id"]


async def test_a_purchase_older_than_a_day_is_not_deduplicated(open_world: Open) -> None:
    async with open_world() as world:
        first = await call(world, "generate_image", **HANDLE)
        world.clock.now += 24 * 3600 + 1
        second = await call(world, "generate_image", **HANDLE)
    assert second["task_id"] != first["task_id"]


async def test_another_save_as_gets_a_copy(open_world: Open) -> None:
    clock = HeldClock()
    simulator = PlainSimulator(clock=clock, duration_s=30)
    async with open_world(simulator=simulator, clock=clock) as world:
        handle = await call(world, "generate_image", **{**REQUEST, "wait_seconds": 0})
        repeat = await call(world, "generate_image", **{**REQUEST, "save_as": "hero.png"})
        assert repeat["task_id"] == handle["task_id"]
        assert repeat["images"][0]["path"] == str(world.folder / "pictures" / "hero.png")
        assert len({path.read_bytes() for path in world.files}) == 1
    assert (len(world.files), count_posts(simulator)) == (2, 1)


async def test_an_undelivered_image_is_copied_to_the_new_name(open_world: Open) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0)
    async with open_world(simulator=simulator, clock=clock) as world:
        job = await world.studio.order(ImageRequest(GenerationRequest.model_validate(REQUEST), 9.0))
        while not job.is_finished:
            await anyio.sleep(0)
        await world.studio.depart(job)
        (entry,) = await world.studio.journal.recent(1)
        repeat = await call(world, "generate_image", **{**REQUEST, "save_as": "hero.png"})
    assert (repeat["task_id"], repeat["images"][0]["path"]) == (
        entry.task_id,
        str(world.folder / "pictures/hero.png"),
    )
    assert replace(entry.images[0], path=None).sha256 == repeat["images"][0]["sha256"]
    assert (len(world.files), count_posts(simulator)) == (2, 1)


# --- the clock -----------------------------------------------------------------------------------------------


async def test_unsettled_work_is_adopted_with_a_wrong_clock(open_world: Open) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=500)
    async with open_world(simulator=simulator, clock=clock) as world:
        handle = await call(world, "generate_image", **{**REQUEST, "wait_seconds": 0})
    clock.now += 600
    wrong_clock = Clock()
    wrong_clock.now = clock.now + 3 * 86_400
    async with open_world(simulator=simulator, clock=wrong_clock) as world:
        while not (tasks := await list_tasks(world))[0]["images"] or tasks[0]["images"][0]["path"] is None:
            await anyio.sleep(0.001)
    assert tasks[0]["task_id"] == handle["task_id"]


async def test_a_wrong_clock_does_not_remove_an_image_that_another_server_is_writing(world: World) -> None:
    folder = world.folder / "pictures"
    folder.mkdir()
    abandoned_part = folder / f"{PART_PREFIX}left{PART_SUFFIX}"
    open_part = folder / f"{PART_PREFIX}running{PART_SUFFIX}"
    for part in (abandoned_part, open_part):
        part.write_bytes(b"x")
        os.utime(part, (time.time() - 3 * 86_400,) * 2)
    with open_part.open("r+b") as file:
        if sys.platform != "win32":  # Windows does not remove an open file
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        await call(world, "generate_image", **REQUEST)
    assert (abandoned_part.exists(), open_part.exists()) == (False, True)
