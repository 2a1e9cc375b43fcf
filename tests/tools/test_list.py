"""list_tasks: brief, searched by words, in pages that lose nothing, with what was spent."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from conftest import Clock, Open, World

from evolink_mcp.errors import Refused
from evolink_mcp.studio.times import DAY_S, instant

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]


async def listed(world: World, **arguments: Any) -> Any:
    async with world.client() as client:
        return await client.call_tool("list_tasks", arguments)


async def bought(world: World, *prompts: str, **more: Any) -> list[dict[str, Any]]:
    async with world.client() as client:
        calls = [await client.call_tool("generate_image", {"prompt": f"sim:fast {one}", **more}) for one in prompts]
    return [answer.structured_content for answer in calls]


def prompts(answer: Any) -> list[str]:
    return [task["prompt"].removeprefix("sim:fast ") for task in answer.structured_content["tasks"]]


async def test_ten_tasks_are_told_in_few_words(world: World) -> None:
    await bought(world, *(f"A calm sunset over the ocean with islands on the horizon, number {n}" for n in range(10)))
    answer = await listed(world)
    text = answer.content[0].text
    folder = str(world.folder)
    assert len(text.replace(folder, "/home/you").encode()) <= 2_600
    assert set(answer.structured_content["tasks"][0]) == {
        "task_id", "status", "created_at", "prompt", "paths", "charged", "credits", "usd",
    }  # fmt: skip
    assert text.startswith("10 tasks, newest first. Spent: today ")


async def test_one_task_and_none_are_told_in_words_that_fit(world: World) -> None:
    assert (await listed(world)).content[0].text.startswith("No task. Spent: ")
    await bought(world, "a fox")
    assert (await listed(world)).content[0].text.startswith("1 task. Spent: ")
    nothing = (await listed(world, query="badger", status="failed")).content[0].text
    assert nothing.startswith("No task with status “failed”, query “badger”.")


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("fox", ["a red FOX"]),
        ("RED fox", ["a red FOX"]),
        ("fox blue", []),
        ("überraschung", ["Eine ÜBERRASCHUNG in 50% Grün"]),
        ("50%", ["Eine ÜBERRASCHUNG in 50% Grün"]),
        ("u\u0308berraschung", ["Eine ÜBERRASCHUNG in 50% Grün"]),
        ("_", []),
        ("山", ["日本の山"]),
        ("hero", ["saved under a name"]),
    ],
)
async def test_words_of_prompt_and_file_name_find_a_picture(world: World, query: str, found: list[str]) -> None:
    await bought(world, "a red FOX", "Eine ÜBERRASCHUNG in 50% Grün", "日本の山")
    await bought(world, "saved under a name", save_as="hero.png")
    assert prompts(await listed(world, query=query)) == found


async def test_a_part_of_the_id_finds_it(world: World) -> None:
    (one,) = await bought(world, "a fox")
    assert prompts(await listed(world, query=one["task_id"][-8:])) == ["a fox"]


async def test_pages_lose_nothing_even_within_one_second(world: World) -> None:
    names = [f"fox {number}" for number in range(7)]
    await bought(world, *names)
    seen: list[str] = []
    cursor: dict[str, Any] = {}
    for _ in range(10):
        answer = await listed(world, limit=2, **cursor)
        seen += prompts(answer)
        if answer.structured_content["next_cursor"] is None:
            break
        assert f'cursor="{answer.structured_content["next_cursor"]}"' in answer.content[0].text
        cursor = {"cursor": answer.structured_content["next_cursor"]}
    assert sorted(seen) == names


@pytest.mark.parametrize("cursor", ["x", "bm8", "W10", "WzFd", "W251bGwsIG51bGxd"])
async def test_a_cursor_that_is_none_is_told(world: World, cursor: str) -> None:
    answer = await listed(world, cursor=cursor)
    assert answer.is_error
    assert "the cursor is not from list_tasks" in answer.content[0].text


async def test_what_was_spent_is_told_for_a_day_a_week_and_a_month(open_world: Open) -> None:
    clock = Clock()
    async with open_world(clock=clock) as world:
        for ago in (20, 5, 0):
            clock.now = 1_790_000_000.0 - ago * DAY_S
            (one,) = await bought(world, f"a fox {ago} days ago")
        clock.now = 1_790_000_000.0
        spent = (await listed(world)).structured_content["spent"]
    assert [round(spent[span]["credits"] / one["credits"]) for span in ("today", "7d", "30d")] == [1, 2, 3]
    assert spent["today"]["usd"] == one["usd"]


async def test_days_in_words_choose(open_world: Open) -> None:
    clock = Clock()
    noon = datetime(2026, 9, 21, 12).timestamp()
    async with open_world(clock=clock) as world:
        for hours in (200, 30, 1):
            clock.now = noon - hours * 3600
            await bought(world, f"{hours} h")
        clock.now = noon
        assert prompts(await listed(world, since="today")) == ["1 h"]
        assert prompts(await listed(world, since="yesterday", until="yesterday")) == ["30 h"]
        assert prompts(await listed(world, since="7d")) == ["1 h", "30 h"]
        assert prompts(await listed(world, until="7d")) == ["200 h"]
        assert prompts(await listed(world, since="2026-09-20", until="2026-09-20")) == ["30 h"]


async def test_a_time_to_the_second_holds_the_whole_second() -> None:
    now = 1_790_000_000.0
    assert instant("2026-09-21T10:00:00Z", now, end=True) - instant("2026-09-21T10:00:00Z", now) == pytest.approx(
        1, abs=1e-3
    )
    assert instant("2026-09-21T10:00:00.5Z", now, end=True) == instant("2026-09-21T10:00:00.5Z", now)


@pytest.mark.parametrize("text", ["soon", "", "d", "99999d", "0000-00-00", "2026-13-01", "10000-01-01"])
async def test_a_time_that_is_none_is_told(text: str) -> None:
    with pytest.raises(Refused):
        instant(text, 1_790_000_000.0)


# --- lineage ---


async def test_an_edit_says_what_it_was_made_from_after_every_link_has_died(open_world: Open) -> None:
    clock = Clock()
    async with open_world(clock=clock) as world:
        (first,) = await bought(world, "a fox")
        path = first["images"][0]["path"]
        (by_path,) = await bought(world, "a fox at night", image_urls=[path])
        (by_uri,) = await bought(world, "a fox by day", image_urls=[first["images"][0]["resource_uri"]])
        clock.now += 40 * DAY_S
        rows = (await listed(world)).structured_content["tasks"]
        text = (await listed(world)).content[0].text
    sha256 = first["images"][0]["sha256"]
    for edited, given in ((by_path, path), (by_uri, first["images"][0]["resource_uri"])):
        (reference,) = edited["references"]
        assert (reference["given"], reference["sha256"]) == (given, sha256)
        assert (reference["task_id"], reference["index"]) == (first["task_id"], 0)
        assert reference["url"] == edited["request"]["image_urls"][0]
    assert [row.get("edited_from") for row in rows] == [[f"{first['task_id']}/0"], [f"{first['task_id']}/0"], None]
    assert f"Edited from {first['task_id']}/0" in text


async def test_an_address_and_data_are_kept_as_they_were_given(world: World) -> None:
    given = ["https://example.com/cat.png", "https://example.com/dog.png"]
    (edited,) = await bought(world, "cat and dog", image_urls=given)
    assert [one["given"] for one in edited["references"]] == given
    assert [one["url"] for one in edited["references"]] == given
