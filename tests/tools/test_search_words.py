"""A search of list_tasks ignores case, accents and width, finds an edit by the words of its source, and suggests words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Open, World

from evolink_mcp.journal.rows import fold

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]


async def buy(world: World, prompt: str, **arguments: Any) -> dict[str, Any]:
    async with world.client() as client:
        answer = await client.call_tool("generate_image", {"prompt": f"sim:fast {prompt}", **arguments})
    assert answer.is_error is False
    return answer.structured_content


async def search(world: World, query: str) -> Any:
    async with world.client() as client:
        return await client.call_tool("list_tasks", {"query": query})


def ids(answer: Any) -> list[str]:
    return [task["task_id"] for task in answer.structured_content["tasks"]]


@pytest.mark.parametrize(
    ("prompt", "query"),
    [
        ("a Café at night", "cafe"),
        ("a cafe at night", "CAFÉ"),
        ("Cafe\u0301", "café"),
        ("Füchse im Schnee", "fuchse"),
        ("die Straße", "STRASSE"),
        ("Ａｂｃ１２３", "abc123"),
        ("ｶﾌｪ", "カフェ"),
        ("Ἀθήνα", "αθηνα"),
        ("Ёлка", "елка"),
        ("Tiếng Việt", "tieng viet"),
    ],
)
async def test_a_search_ignores_case_accents_and_width(world: World, prompt: str, query: str) -> None:
    purchase = await buy(world, prompt)
    await buy(world, "a badger")
    assert ids(await search(world, query)) == [purchase["task_id"]]


@pytest.mark.parametrize(("one", "other"), [("か", "が"), ("कि", "की"), ("ก่า", "ก้า")])
async def test_marks_that_make_another_letter_are_kept(one: str, other: str) -> None:
    assert fold(one) != fold(other)


@pytest.mark.parametrize("source", ["resource_uri", "path", "url"])
async def test_an_edit_is_found_by_the_words_of_its_source(open_world: Open, source: str) -> None:
    async with open_world({"EVOLINK_BASE_URL": "https://api.evolink.ai"}) as world:
        harbour = await buy(world, "the Hárbour of Kiel")
        edit = await buy(world, "make it night", image_urls=[harbour["images"][0][source]])
        second_edit = await buy(world, "add a moon", image_urls=[edit["images"][0][source]])
        await buy(world, "a badger")
        assert ids(await search(world, "harbour")) == [second_edit["task_id"], edit["task_id"], harbour["task_id"]]
        assert ids(await search(world, "harbour moon")) == [second_edit["task_id"]]
        assert "source_prompt" not in edit["references"][0]


async def test_an_edit_of_a_moved_file_without_a_sidecar_names_its_source(open_world: Open) -> None:
    async with open_world({"EVOLINK_MCP_SIDECAR": "0"}) as world:
        harbour = await buy(world, "the harbour of Kiel")
        file = Path(harbour["images"][0]["path"])
        new_path = file.rename(file.with_name("renamed.png"))
        edit = await buy(world, "make it night", image_urls=[str(new_path)])
        assert edit["references"][0]["task_id"] == harbour["task_id"]
        assert edit["task_id"] in ids(await search(world, "kiel"))


async def test_a_search_without_a_match_suggests_the_nearest_words(world: World) -> None:
    await buy(world, "the harbour of Kiel")
    await buy(world, "a red fox")
    answer = await search(world, "habour")
    assert ids(answer) == []
    assert "No task has the word “habour”. Did you mean “harbour”?" in answer.content[0].text
    assert "No task has the word “zzzzzz”." in (await search(world, "fox zzzzzz")).structured_content["notes"]
    two_prompts = await search(world, "fox harbour")
    assert (
        "Each word occurs in a task, but no task has all of them. Search for fewer words."
        in two_prompts.content[0].text
    )
    assert (await search(world, "fox")).structured_content["notes"] == []


async def test_words_of_another_profile_are_never_suggested(open_world: Open, world: World) -> None:
    await buy(world, "the harbour of Kiel")
    async with open_world({"EVOLINK_MCP_PROFILE": "second"}, simulator=world.simulator, clock=world.clock) as other:
        answer = await search(other, "habour")
    assert "harbour" not in answer.content[0].text
