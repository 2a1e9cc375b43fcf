"""The size of a tool result: it never exceeds what the MCP host accepts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import World

from evolink_mcp.tools.hosts import UNKNOWN
from evolink_mcp.tools.list_tasks import ListTasksArguments, task_list
from evolink_mcp.tools.task_answer import TaskOut, limit_answer

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
# JSON needs six characters for each of these characters.
LONG_PROMPT = "sim:fast a fox ".ljust(32_000, "\x01")


def size_of(answer: Any) -> int:
    return len(answer.model_dump_json(by_alias=True))


async def test_a_result_about_prompts_of_32000_characters_fits_into_every_host(world: World) -> None:
    async with world.client() as client:
        arguments = {"prompt": LONG_PROMPT, "size": "1024x640", "force_new": True}
        answers = [await client.call_tool("generate_image", arguments) for _ in range(10)]
        answers += [await client.call_tool("list_tasks", {"detail": detail}) for detail in (False, True)]
    assert [size_of(answer) <= UNKNOWN.answer_max for answer in answers] == [True] * 12
    assert [len(answer.structured_content["tasks"]) for answer in answers[-2:]] == [10, 10]


async def test_a_list_ends_before_the_limit_of_the_host_and_names_the_next_page(world: World) -> None:
    answer_max = 150_000
    references = [f"https://pictures.shop.dev/{number}{'x' * 1900}.png" for number in range(16)]
    async with world.client() as client:
        arguments = {"prompt": "sim:fast a fox", "size": "1024x640", "image_urls": references, "force_new": True}
        for _ in range(6):
            await client.call_tool("generate_image", arguments)
    task_ids: list[str] = []
    page_sizes: list[int] = []
    cursor: str | None = ""
    while cursor is not None:
        page = ListTasksArguments(detail=True, limit=50, cursor=cursor)
        out, text = await task_list(world.studio, page, [], None, answer_max)
        assert len(out.model_dump_json()) + len(json.dumps(text)) <= answer_max
        task_ids += [task["task_id"] for task in out.tasks]
        page_sizes.append(len(out.tasks))
        cursor = out.next_cursor
    assert max(page_sizes) < 6
    assert len(set(task_ids)) == len(task_ids) == 6


async def test_a_task_that_is_too_large_for_a_list_with_details_is_a_short_row_and_hides_no_other(world: World) -> None:
    async with world.client() as client:
        for prompt in ("sim:fast a fox", "sim:fast a hen"):
            await client.call_tool("generate_image", {"prompt": prompt, "size": "1024x640"})
        references = [f"https://pictures.shop.dev/{number}{'x' * 190}.png" for number in range(16)]
        await client.call_tool("generate_image", {"prompt": "sim:fast an owl", "image_urls": references})
    page = ListTasksArguments(detail=True)
    out, text = await task_list(world.studio, page, [], None, 27_000)
    large, *small = out.tasks
    assert (large["prompt"], large["charged"]) == ("sim:fast an owl", "yes")
    assert "request" not in large
    assert [task["request"]["prompt"] for task in small] == ["sim:fast a hen", "sim:fast a fox"]
    assert len(out.model_dump_json()) + len(json.dumps(text)) <= 27_000


async def test_a_task_beyond_the_limit_is_answered_with_a_shortened_prompt() -> None:
    out = TaskOut(task_id="task-unified-1-a", request={"prompt": "x" * 32_000, "n": 1})
    assert limit_answer(out, 100_000) is out
    short = limit_answer(out, 60_000)
    assert short.request is not None
    assert len(short.request["prompt"]) == 200
    assert short.request["n"] == 1
    assert len(json.dumps(short.model_dump(mode="json"))) < 3_000
    assert "shortened" in short.notes[-1]


TRIALS = {
    "Characters of a tool result": test_a_result_about_prompts_of_32000_characters_fits_into_every_host,
    "Tasks in a list": test_a_list_ends_before_the_limit_of_the_host_and_names_the_next_page,
}
