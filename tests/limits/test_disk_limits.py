"""Limits for the files of the server: journal, copies and previews."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import Clock, Open, World
from team_server import ANNA, BERT, REQUEST, open_team_server

from evolink_mcp.images.previews import PreviewCache
from evolink_mcp.journal.entry import Entry
from evolink_mcp.journal.sqlite import read_entries

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
DAY_S = 86_400.0
# A file name has the first 48 characters of a prompt. The words after this text are only in the request.
SEA = "a calm picture of the sea and of the islands on the horizon with"


async def tasks_with(world: World, query: str) -> list[str]:
    async with world.client() as client:
        answer = await client.call_tool("list_tasks", {"query": query})
    return [task["task_id"] for task in answer.structured_content["tasks"]]


async def buy(world: World, **arguments: Any) -> dict[str, Any]:
    async with world.client() as client:
        answer = await client.call_tool("generate_image", {"size": "1024x640", **arguments})
    return answer.structured_content


async def test_the_journal_forgets_old_requests_and_keeps_tasks_charges_and_images(open_world: Open) -> None:
    clock = Clock()
    async with open_world(clock=clock) as world:
        old_task = await buy(world, prompt=f"sim:fast {SEA} a secret fox", save_as="hero.png")
        await world.studio.journal.remember_upload("ab", "https://x.example/1", world.studio.now() + 10)
        clock.now += 3 * DAY_S
        new_task = await buy(world, prompt=f"sim:fast {SEA} a secret hen")
        running_task = await buy(world, prompt=f"sim:slow=60 {SEA} a secret cow", wait_seconds=0)
        now = world.studio.now()
        assert await world.studio.journal.forget(now + 1, now) == 2
        clock.now += 1
        assert await world.studio.journal.forget(now - 2 * DAY_S, now) == 0
        assert await world.studio.journal.find_upload("ab", 0) is None
        assert await tasks_with(world, "secret") == [running_task["task_id"]]
        assert await tasks_with(world, "hero") == [old_task["task_id"]]
        entry = await world.studio.journal.by_task(new_task["task_id"])
        assert entry is not None
        assert (entry.request, entry.references) == ({}, ())
        async with world.client() as client:
            answer = (await client.call_tool("get_task", {"task_id": old_task["task_id"]})).structured_content
    assert (answer["status"], answer["credits"]) == ("completed", old_task["credits"])
    assert Path(answer["images"][0]["path"]).is_file()


async def test_a_server_forgets_after_the_days_of_the_setting(open_world: Open) -> None:
    clock = Clock()
    async with open_world(clock=clock) as world:
        await buy(world, prompt=f"sim:fast {SEA} an old fox")
        clock.now += 2 * DAY_S
        await buy(world, prompt=f"sim:fast {SEA} a young hen")
        clock.now += DAY_S / 2
    async with open_world({"EVOLINK_MCP_RETENTION_DAYS": "1"}, clock=clock) as world:
        while await tasks_with(world, "fox"):
            await anyio.sleep(0.01)
        assert len(await tasks_with(world, "hen")) == 1
    async with open_world(clock=clock) as world:
        assert len(await tasks_with(world, "hen")) == 1


async def test_a_server_forgets_the_requests_of_tenants_that_never_call_again(tmp_path: Path) -> None:
    day_is_over = anyio.Event()

    async def pause(seconds: float) -> None:
        if seconds == DAY_S:
            day_is_over.set()
        await anyio.sleep_forever()

    async with open_team_server(tmp_path, ANNA, BERT) as server:
        for token in ("a", "b"):
            await server.call(token, "generate_image", **{**REQUEST, "prompt": f"sim:fast {SEA} a secret fox"})
    days = {"EVOLINK_MCP_RETENTION_DAYS": "1"}
    async with (
        open_team_server(tmp_path, ANNA, BERT, pause=pause, **days) as server,
        anyio.create_task_group() as group,
    ):
        server.clock.shift_s = 2 * DAY_S
        group.start_soon(server.studios.forget_loop)
        await day_is_over.wait()
        group.cancel_scope.cancel()
    assert [entry.request for entry in read_entries(tmp_path / "data", 10)] == [{}, {}]


async def test_the_oldest_copies_beyond_2_gib_and_an_hour_are_removed(tmp_path: Path) -> None:
    copies = tmp_path / "data" / "copies"
    copies.mkdir(parents=True)
    async with open_team_server(tmp_path, ANNA) as server:
        for name, age_s in (("expired", 3_700), ("older", 120), ("newer", 60)):
            with (copies / name).open("wb") as file:
                file.truncate(100 if name == "expired" else 3 << 29)  # sparse
            os.utime(copies / name, (server.clock() - age_s, server.clock() - age_s))
        await server.call("a", "generate_image", **REQUEST)
    names = {path.name for path in copies.iterdir()}
    assert {"expired", "older", "newer"} & names == {"newer"}


async def test_the_previews_in_memory_are_limited(tmp_path: Path) -> None:
    cache = PreviewCache(max_bytes=100)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        path.write_bytes(b"x")
        cache.add(path, 64, bytes(40))
    assert [cache.find(path, 64) is not None for path in paths] == [False, True, True]


async def test_a_server_remembers_a_limited_number_of_its_writes_for_a_failover() -> None:
    pytest.importorskip("psycopg")
    from evolink_mcp.teams.failover import WrittenEntries

    now = 0.0
    entries = WrittenEntries(lambda: now)
    fields = {"phase": "intent", "created_at": 1.0, "fingerprint": "f", "owner": "server-1"}
    for number in range(5_001):
        entries.add("anna", Entry(key=f"evomcp-{number}", **fields))
    assert len(entries) == 5_000
    now = 601.0
    entries.add("anna", Entry(key="evomcp-later", **fields))
    assert len(entries) == 1


TRIALS = {
    "Purchases for a promoted standby": test_a_server_remembers_a_limited_number_of_its_writes_for_a_failover,
    "Requests in the journal": test_the_journal_forgets_old_requests_and_keeps_tasks_charges_and_images,
    "Copies of images for previews": test_the_oldest_copies_beyond_2_gib_and_an_hour_are_removed,
    "Previews in memory": test_the_previews_in_memory_are_limited,
}
