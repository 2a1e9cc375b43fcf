"""What tasks took is learned from those that were watched from start to end, and known to the account's next server."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import Open, World

from evolink_mcp.api.models import TYPICAL_S
from evolink_mcp.api.task import Task
from evolink_mcp.journal.entry import Entry
from evolink_mcp.studio import durations as rooms
from evolink_mcp.studio.durations import FACT, WRITTEN_EVERY, DurationHistory
from evolink_mcp.studio.schedule import ENOUGH

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

ENTRY = Entry(
    key="k",
    owner="o",
    phase="submitted",
    created_at=1.0,
    request={"quality": "high"},
    task=Task("t", estimated_time_s=100.0),
)


async def learned(world: World, took_s: float, times: int) -> DurationHistory:
    ours = DurationHistory(world.studio.journal)
    for _ in range(times):
        await ours.add(ENTRY, took_s)
    return ours


async def test_what_was_learned_is_known_to_the_next_server(world: World) -> None:
    assert WRITTEN_EVERY >= ENOUGH
    ours = await learned(world, 60.0, WRITTEN_EVERY)
    theirs = DurationHistory(world.studio.journal)
    assert (await ours.expected(ENTRY)).median_s == (await theirs.expected(ENTRY)).median_s == 60.0
    low = replace(ENTRY, request={"quality": "low"})
    assert (await theirs.expected(low)).median_s == TYPICAL_S["low"]


async def test_less_is_written_when_the_server_ends(world: World) -> None:
    ours = await learned(world, 60.0, WRITTEN_EVERY - 1)
    assert await world.studio.journal.fact(FACT) is None
    await ours.write()
    assert json.loads(await world.studio.journal.fact(FACT) or "") == [["high", 100.0, 60.0]] * (WRITTEN_EVERY - 1)


async def test_what_ended_at_once_teaches_nothing(world: World) -> None:
    ours = await learned(world, 0.2, 3 * WRITTEN_EVERY)
    assert (await ours.expected(ENTRY)).median_s == TYPICAL_S["high"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "7", "{}", '[["high"]]', '[["high", null, "x"]]', '[["high", 1e999, 5]]', '[["high", 1, 1e999]]', "[[]]"],
)
async def test_an_odd_note_is_left_out(world: World, text: str) -> None:
    await world.studio.journal.save_fact(FACT, text)
    assert (await DurationHistory(world.studio.journal).expected(ENTRY)).median_s == TYPICAL_S["high"]


async def test_a_bought_task_teaches_and_one_taken_up_later_does_not(
    open_world: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "TAKES_AT_LEAST_S", 0.0)
    async with open_world() as world, world.client() as client:
        answer = await client.call_tool("generate_image", {"prompt": "sim:fast a fox", "quality": "high"})
        assert [one[0] for one in world.studio._durations._taken] == ["high"]
        again = await client.call_tool("get_task", {"task_id": answer.structured_content["task_id"]})
        assert again.structured_content["status"] == "completed"
        assert len(world.studio._durations._taken) == 1
