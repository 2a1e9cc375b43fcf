"""Briefs from the menu, and what a host offers while they are filled in."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from conftest import Open, World
from mcp_types import PromptReference, ResourceTemplateReference

pytestmark = pytest.mark.anyio
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])
FILLED: dict[str, dict[str, str]] = {
    "new_picture": {"subject": "A fox in the snow", "size": "16:9"},
    "edit_picture": {"picture": "evolink://images/task-unified-1-a/0", "change": "a red scarf"},
    "variations": {"of": "A fox in the snow", "count": "4"},
    "size_set": {"motif": "A fox in the snow", "sizes": "1:1, 1200x628"},
}
TASKS = ResourceTemplateReference(type="ref/resource", uri="evolink://tasks/{task_id}")
IMAGES = ResourceTemplateReference(type="ref/resource", uri="evolink://images/{task_id}/{index}")


def prompt(name: str) -> PromptReference:
    return PromptReference(type="ref/prompt", name=name)


async def offered(client: Any, ref: Any, name: str, value: str = "", **known: str) -> list[str]:
    answer = await client.complete(ref, {"name": name, "value": value}, known or None)
    return answer.completion.values


@ERAS
async def test_every_brief_has_a_title_and_every_argument_says_what_it_is(world: World, mode: str) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            prompts = (await client.list_prompts()).prompts
    assert {one.name for one in prompts} == FILLED.keys()
    for one in prompts:
        assert one.title
        assert one.description
        assert all(argument.description for argument in one.arguments or [])
        assert {a.name for a in one.arguments or [] if a.required} <= FILLED[one.name].keys()


@ERAS
@pytest.mark.parametrize("name", FILLED)
async def test_a_brief_carries_its_arguments_and_says_that_each_call_is_paid_once(
    world: World, mode: str, name: str
) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            (message,) = (await client.get_prompt(name, FILLED[name])).messages
    assert message.role == "user"
    for value in FILLED[name].values():
        assert value in message.content.text
    assert "generate_image exactly once" in message.content.text
    assert "get_task" in message.content.text
    assert "\n\n\n" not in message.content.text


@pytest.mark.parametrize("name", ["new_picture", "variations", "size_set"])
async def test_what_may_cost_more_than_expected_is_computed_before(world: World, name: str) -> None:
    with anyio.fail_after(300):
        async with world.client() as client:
            (message,) = (await client.get_prompt(name, FILLED[name])).messages
    text = message.content.text
    assert text.index("compute_size") < text.index("generate_image exactly once")


async def test_left_out_arguments_leave_no_holes(world: World) -> None:
    with anyio.fail_after(300):
        async with world.client() as client:
            (message,) = (await client.get_prompt("new_picture", {"subject": "A fox"})).messages
    assert "Size:" not in message.content.text
    assert "Quality:" not in message.content.text
    assert ": ." not in message.content.text


@ERAS
async def test_task_ids_and_pictures_of_earlier_purchases_are_offered(world: World, mode: str) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            made = await client.call_tool("generate_image", {"prompt": "sim:fast a pond", "n": 2})
            failed = await client.call_tool("generate_image", {"prompt": "sim:fast sim:fail"})
            made_id, failed_id = made.structured_content["task_id"], failed.structured_content["task_id"]
            assert set(await offered(client, TASKS, "task_id")) == {made_id, failed_id}
            assert await offered(client, TASKS, "task_id", made_id[:-1]) == [made_id]
            assert await offered(client, IMAGES, "task_id") == [made_id]
            assert await offered(client, IMAGES, "index", task_id=made_id) == ["0", "1"]
            assert await offered(client, IMAGES, "index", task_id=failed_id) == []
            pictures = [f"evolink://images/{made_id}/{index}" for index in (0, 1)]
            assert await offered(client, prompt("edit_picture"), "picture") == pictures
            assert await offered(client, prompt("variations"), "of", "images") == pictures


@pytest.mark.parametrize(
    ("name", "argument", "typed", "values"),
    [
        pytest.param("new_picture", "size", "16", ["16:9", "9:16"], id="what begins so comes first"),
        pytest.param("new_picture", "quality", "", ["low", "medium", "high"], id="all when nothing is typed"),
        pytest.param("variations", "count", "1", ["1", "10"], id="numbers"),
        pytest.param("new_picture", "subject", "", [], id="nobody knows the subject"),
    ],
)
async def test_values_are_offered_as_they_are_typed(
    world: World, name: str, argument: str, typed: str, values: list[str]
) -> None:
    with anyio.fail_after(300):
        async with world.client() as client:
            assert await offered(client, prompt(name), argument, typed) == values


async def test_without_a_readable_journal_nothing_is_offered_and_nothing_fails(open_world: Open, tmp_path: Any) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    with anyio.fail_after(300):
        async with open_world() as world, world.client() as client:
            assert await offered(client, TASKS, "task_id") == []
            assert await offered(client, prompt("edit_picture"), "picture") == []
