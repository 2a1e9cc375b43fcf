"""Prompts, and the completions that a host offers for their arguments."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from conftest import Open, World
from mcp_types import PromptReference, ResourceTemplateReference

pytestmark = pytest.mark.anyio
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])
ARGUMENTS: dict[str, dict[str, str]] = {
    "new_picture": {"subject": "A fox in the snow", "size": "16:9"},
    "edit_picture": {"picture": "evolink://images/task-unified-1-a/0", "change": "a red scarf"},
    "variations": {"of": "A fox in the snow", "count": "4"},
    "size_set": {"motif": "A fox in the snow", "sizes": "1:1, 1200x628"},
}
TASKS = ResourceTemplateReference(type="ref/resource", uri="evolink://tasks/{task_id}")
IMAGES = ResourceTemplateReference(type="ref/resource", uri="evolink://images/{task_id}/{index}")


def prompt(name: str) -> PromptReference:
    return PromptReference(type="ref/prompt", name=name)


async def completions(client: Any, ref: Any, name: str, value: str = "", **context: str) -> list[str]:
    answer = await client.complete(ref, {"name": name, "value": value}, context or None)
    return answer.completion.values


@ERAS
async def test_every_prompt_and_argument_has_a_description(world: World, mode: str) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            prompts = (await client.list_prompts()).prompts
    assert {each.name for each in prompts} == ARGUMENTS.keys()
    for each in prompts:
        assert each.title
        assert each.description
        assert all(argument.description for argument in each.arguments or [])
        assert {a.name for a in each.arguments or [] if a.required} <= ARGUMENTS[each.name].keys()


@ERAS
@pytest.mark.parametrize("name", ARGUMENTS)
async def test_a_prompt_has_its_arguments_and_orders_exactly_one_purchase(world: World, mode: str, name: str) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            (message,) = (await client.get_prompt(name, ARGUMENTS[name])).messages
    assert message.role == "user"
    for value in ARGUMENTS[name].values():
        assert value in message.content.text
    assert "generate_image exactly once" in message.content.text
    assert "get_task" in message.content.text
    assert "\n\n\n" not in message.content.text


@pytest.mark.parametrize("name", ["new_picture", "variations", "size_set"])
async def test_the_price_is_computed_before_an_expensive_purchase(world: World, name: str) -> None:
    with anyio.fail_after(300):
        async with world.client() as client:
            (message,) = (await client.get_prompt(name, ARGUMENTS[name])).messages
    text = message.content.text
    assert text.index("compute_size") < text.index("generate_image exactly once")


async def test_omitted_arguments_leave_no_empty_lines(world: World) -> None:
    with anyio.fail_after(300):
        async with world.client() as client:
            (message,) = (await client.get_prompt("new_picture", {"subject": "A fox"})).messages
    assert "Size:" not in message.content.text
    assert "Quality:" not in message.content.text
    assert ": ." not in message.content.text


@ERAS
async def test_task_ids_and_images_of_earlier_purchases_are_completed(world: World, mode: str) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            completed_task = await client.call_tool("generate_image", {"prompt": "sim:fast a pond", "n": 2})
            failed_task = await client.call_tool("generate_image", {"prompt": "sim:fast sim:fail"})
            completed_id = completed_task.structured_content["task_id"]
            failed_id = failed_task.structured_content["task_id"]
            assert set(await completions(client, TASKS, "task_id")) == {completed_id, failed_id}
            assert await completions(client, TASKS, "task_id", completed_id[:-1]) == [completed_id]
            assert await completions(client, IMAGES, "task_id") == [completed_id]
            assert await completions(client, IMAGES, "index", task_id=completed_id) == ["0", "1"]
            assert await completions(client, IMAGES, "index", task_id=failed_id) == []
            pictures = [f"evolink://images/{completed_id}/{index}" for index in (0, 1)]
            assert await completions(client, prompt("edit_picture"), "picture") == pictures
            assert await completions(client, prompt("variations"), "of", "images") == pictures


@pytest.mark.parametrize(
    ("name", "argument", "text", "values"),
    [
        pytest.param("new_picture", "size", "16", ["16:9", "9:16"], id="values with this beginning first"),
        pytest.param("new_picture", "quality", "", ["low", "medium", "high"], id="all values for an empty text"),
        pytest.param("variations", "count", "1", ["1", "10"], id="numbers"),
        pytest.param("new_picture", "subject", "", [], id="no values for the subject"),
    ],
)
async def test_values_are_completed_from_the_typed_text(
    world: World, name: str, argument: str, text: str, values: list[str]
) -> None:
    with anyio.fail_after(300):
        async with world.client() as client:
            assert await completions(client, prompt(name), argument, text) == values


async def test_without_a_readable_journal_completions_are_empty(open_world: Open, tmp_path: Any) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    with anyio.fail_after(300):
        async with open_world() as world, world.client() as client:
            assert await completions(client, TASKS, "task_id") == []
            assert await completions(client, prompt("edit_picture"), "picture") == []
