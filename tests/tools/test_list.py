"""list_tasks: short rows, search, pages, spent credits, and the images that an edit was made from."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from conftest import Clock, Open, World

from evolink_mcp.errors import Refused
from evolink_mcp.studio.times import DAY_S, instant

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]


async def list_tasks(world: World, **arguments: Any) -> Any:
    async with world.client() as client:
        return await client.call_tool("list_tasks", arguments)


async def buy(world: World, *prompts: str, **arguments: Any) -> list[dict[str, Any]]:
    async with world.client() as client:
        calls = [
            await client.call_tool("generate_image", {"prompt": f"sim:fast {prompt}", **arguments})
            for prompt in prompts
        ]
    return [answer.structured_content for answer in calls]


def prompts(answer: Any) -> list[str]:
    return [task["prompt"].removeprefix("sim:fast ") for task in answer.structured_content["tasks"]]


async def test_ten_tasks_fit_into_2600_bytes_of_text(world: World) -> None:
    await buy(world, *(f"A calm sunset over the ocean with islands on the horizon, number {n}" for n in range(10)))
    answer = await list_tasks(world)
    text = answer.content[0].text
    folder = str(world.folder)
    assert len(text.replace(folder, "/home/you").encode()) <= 2_600
    assert set(answer.structured_content["tasks"][0]) == {
        "task_id", "status", "created_at", "prompt", "paths", "charged", "credits", "usd",
    }  # fmt: skip
    assert text.startswith("10 tasks, newest first. Spent: today ")


async def test_the_first_line_counts_no_task_and_one_task_correctly(world: World) -> None:
    assert (await list_tasks(world)).content[0].text.startswith("No task. Spent: ")
    await buy(world, "a fox")
    assert (await list_tasks(world)).content[0].text.startswith("1 task. Spent: ")
    empty = (await list_tasks(world, query="badger", status="failed")).content[0].text
    assert empty.startswith("No task with status “failed”, query “badger”.")


@pytest.mark.parametrize(
    ("query", "matches"),
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
async def test_a_query_searches_prompts_and_file_names(world: World, query: str, matches: list[str]) -> None:
    await buy(world, "a red FOX", "Eine ÜBERRASCHUNG in 50% Grün", "日本の山")
    await buy(world, "saved under a name", save_as="hero.png")
    assert prompts(await list_tasks(world, query=query)) == matches


async def test_a_query_searches_task_ids(world: World) -> None:
    (task,) = await buy(world, "a fox")
    assert prompts(await list_tasks(world, query=task["task_id"][-8:])) == ["a fox"]


async def test_pages_contain_each_task_of_one_second(world: World) -> None:
    names = [f"fox {number}" for number in range(7)]
    await buy(world, *names)
    listed_prompts: list[str] = []
    cursor: dict[str, Any] = {}
    for _ in range(10):
        answer = await list_tasks(world, limit=2, **cursor)
        listed_prompts += prompts(answer)
        if answer.structured_content["next_cursor"] is None:
            break
        assert f'cursor="{answer.structured_content["next_cursor"]}"' in answer.content[0].text
        cursor = {"cursor": answer.structured_content["next_cursor"]}
    assert sorted(listed_prompts) == names


@pytest.mark.parametrize("cursor", ["x", "bm8", "W10", "WzFd", "W251bGwsIG51bGxd"])
async def test_an_invalid_cursor_is_refused(world: World, cursor: str) -> None:
    answer = await list_tasks(world, cursor=cursor)
    assert answer.is_error
    assert "cursor is not from list_tasks" in answer.content[0].text


async def test_the_spent_credits_are_listed_for_a_day_a_week_and_a_month(open_world: Open) -> None:
    clock = Clock()
    async with open_world(clock=clock) as world:
        for days in (20, 5, 0):
            clock.now = 1_790_000_000.0 - days * DAY_S
            (task,) = await buy(world, f"a fox {days} days ago")
        clock.now = 1_790_000_000.0
        spent = (await list_tasks(world)).structured_content["spent"]
    assert [round(spent[span]["credits"] / task["credits"]) for span in ("today", "7d", "30d")] == [1, 2, 3]
    assert spent["today"]["usd"] == task["usd"]


async def test_since_and_until_accept_days(open_world: Open) -> None:
    clock = Clock()
    noon = datetime(2026, 9, 21, 12).timestamp()
    async with open_world(clock=clock) as world:
        for hours in (200, 30, 1):
            clock.now = noon - hours * 3600
            await buy(world, f"{hours} h")
        clock.now = noon
        assert prompts(await list_tasks(world, since="today")) == ["1 h"]
        assert prompts(await list_tasks(world, since="yesterday", until="yesterday")) == ["30 h"]
        assert prompts(await list_tasks(world, since="7d")) == ["1 h", "30 h"]
        assert prompts(await list_tasks(world, until="7d")) == ["200 h"]
        assert prompts(await list_tasks(world, since="2026-09-20", until="2026-09-20")) == ["30 h"]


async def test_until_a_second_includes_the_whole_second() -> None:
    now = 1_790_000_000.0
    assert instant("2026-09-21T10:00:00Z", now, end=True) - instant("2026-09-21T10:00:00Z", now) == pytest.approx(
        1, abs=1e-3
    )
    assert instant("2026-09-21T10:00:00.5Z", now, end=True) == instant("2026-09-21T10:00:00.5Z", now)


@pytest.mark.parametrize("text", ["soon", "", "d", "99999d", "0000-00-00", "2026-13-01", "10000-01-01"])
async def test_an_invalid_time_is_refused(text: str) -> None:
    with pytest.raises(Refused):
        instant(text, 1_790_000_000.0)


# --- references ---


async def test_an_edit_names_its_original_after_all_links_have_expired(open_world: Open) -> None:
    clock = Clock()
    async with open_world(clock=clock) as world:
        (first,) = await buy(world, "a fox")
        path = first["images"][0]["path"]
        (by_path,) = await buy(world, "a fox at night", image_urls=[path])
        (by_uri,) = await buy(world, "a fox by day", image_urls=[first["images"][0]["resource_uri"]])
        clock.now += 40 * DAY_S
        rows = (await list_tasks(world)).structured_content["tasks"]
        text = (await list_tasks(world)).content[0].text
    sha256 = first["images"][0]["sha256"]
    for edit, argument in ((by_path, path), (by_uri, first["images"][0]["resource_uri"])):
        (reference,) = edit["references"]
        assert (reference["given"], reference["sha256"]) == (argument, sha256)
        assert (reference["task_id"], reference["index"]) == (first["task_id"], 0)
        assert reference["url"] == edit["request"]["image_urls"][0]
    assert [row.get("edited_from") for row in rows] == [[f"{first['task_id']}/0"], [f"{first['task_id']}/0"], None]
    assert f"Edited from {first['task_id']}/0" in text


async def test_urls_of_references_are_listed_unchanged(world: World) -> None:
    urls = ["https://cdn.pixabay.com/cat.png", "https://cdn.pixabay.com/dog.png"]
    (edit,) = await buy(world, "cat and dog", image_urls=urls)
    assert [reference["given"] for reference in edit["references"]] == urls
    assert [reference["url"] for reference in edit["references"]] == urls


async def test_the_text_of_an_edit_has_the_facts_of_its_reference(world: World) -> None:
    (first,) = await buy(world, "a fox")
    async with world.client() as client:
        arguments = {"prompt": "a fox at night", "image_urls": [first["images"][0]["path"]]}
        answer = await client.call_tool("generate_image", arguments)
    (reference,) = answer.structured_content["references"]
    assert reference["url"] != reference["given"]
    assert all(reference[name] in answer.content[0].text for name in ("given", "url", "sha256", "task_id"))


async def test_the_text_of_a_synced_list_reports_the_comparison(world: World) -> None:
    await buy(world, "a fox")
    synced = await list_tasks(world, sync=True)
    report = "EvoLink's list of the account's tasks was read."
    assert (synced.structured_content["synced"], report in synced.content[0].text) == (True, True)
    plain = await list_tasks(world)
    assert (plain.structured_content["synced"], report in plain.content[0].text) == (None, False)
