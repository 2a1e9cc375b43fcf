"""Empty optional arguments, wrapped arguments and placeholders, as models under strict function calling send them."""

from __future__ import annotations

import json
from typing import Any

import anyio
import jsonschema
import pytest
from conftest import World

pytestmark = pytest.mark.anyio
PROMPT = "A calm sunset"
EMPTY = {
    "image_urls": [], "size": "", "resolution": "", "quality": "", "callback_url": "", "model": "", "mask_url": "",
    "background": "", "output_format": "", "fit": "", "save_as": "",
}  # fmt: skip
# The values of a model that must fill in every argument of the published schema, with the defaults of the enums.
STRICT = {
    "prompt": PROMPT, "image_urls": [], "size": "", "resolution": "1K", "quality": "medium", "n": 1, "callback_url": "",
    "model": "gpt-image-2", "mask_url": "", "background": "opaque", "output_format": "png", "save_as": "",
    "wait_seconds": 30, "max_credits": 100, "force_new": False, "fit": "",
}  # fmt: skip

SIZE = {"resolution": "2K", "quality": "low", "n": 1, "references": 0}


async def call(world: World, tool: str, arguments: dict[str, Any]) -> Any:
    with anyio.fail_after(300):
        async with world.client() as client:
            return await client.call_tool(tool, arguments)


def sent_by(world: World) -> dict[str, Any]:
    return json.loads(next(r.body for r in world.simulator.requests if r.path == "/v1/images/generations"))


async def schemas(world: World) -> dict[str, dict[str, Any]]:
    async with world.client() as client:
        return {tool.name: tool.input_schema for tool in (await client.list_tools()).tools}


@pytest.mark.parametrize("empty", ["", [], {}, None], ids=["text", "list", "object", "null"])
@pytest.mark.parametrize("name", [*EMPTY, "n", "wait_seconds", "max_credits", "force_new"])
async def test_an_empty_optional_argument_counts_as_absent(world: World, name: str, empty: object) -> None:
    answer = await call(world, "generate_image", {"prompt": PROMPT, name: empty})
    assert answer.is_error is False
    assert sent_by(world) == {"model": "gpt-image-2", "prompt": PROMPT}
    assert answer.structured_content["notes"] == [f"Empty arguments count as absent: {name}."]
    assert f"Note: Empty arguments count as absent: {name}." in answer.content[0].text


async def test_one_note_names_all_empty_arguments(world: World) -> None:
    answer = await call(world, "generate_image", {"prompt": PROMPT, **EMPTY})
    assert answer.structured_content["notes"] == [f"Empty arguments count as absent: {', '.join(EMPTY)}."]


async def test_a_call_without_empty_arguments_has_no_note(world: World) -> None:
    answer = await call(world, "generate_image", {"prompt": PROMPT, "force_new": False, "wait_seconds": 30})
    assert answer.structured_content["notes"] == []


@pytest.mark.parametrize("prompt", ["", None, [], {}])
async def test_an_empty_required_argument_is_refused(world: World, prompt: object) -> None:
    answer = await call(world, "generate_image", {"prompt": prompt})
    assert answer.is_error is True
    assert world.simulator.requests == []


async def test_a_maximum_of_zero_credits_is_not_absent(world: World) -> None:
    answer = await call(world, "generate_image", {"prompt": PROMPT, "max_credits": 0})
    assert answer.structured_content["error"]["code"] == "over_budget"
    assert world.simulator.requests == []


async def test_a_refusal_also_names_the_empty_arguments(world: World) -> None:
    answer = await call(world, "generate_image", {"prompt": PROMPT, "n": 99, "size": ""})
    assert answer.is_error is True
    assert answer.structured_content["notes"] == ["Empty arguments count as absent: size."]


async def test_a_plain_order_with_every_argument_is_bought(world: World) -> None:
    schema = (await schemas(world))["generate_image"]
    assert set(STRICT) == set(schema["properties"])
    jsonschema.validate(STRICT, schema)
    answer = await call(world, "generate_image", STRICT)
    assert answer.is_error is False
    assert world.posts == 1


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("compute_size", {**SIZE, "size": "16:9", "width": 1, "height": 1}),
        ("compute_size", {**SIZE, "size": "", "width": 1200, "height": 628}),
        ("list_tasks", {"limit": 10, "status": "any", "query": "", "since": "", "until": "", "cursor": "", "detail": False,
                        "sync": False}),
    ],
    ids=["a size", "a target", "the list"],
)  # fmt: skip
async def test_a_free_tool_answers_a_call_with_every_argument(
    world: World, tool: str, arguments: dict[str, Any]
) -> None:
    schema = (await schemas(world))[tool]
    assert set(arguments) == set(schema["properties"])
    jsonschema.validate(arguments, schema)
    answer = await call(world, tool, arguments)
    assert answer.is_error is False


async def test_a_size_has_priority_over_width_and_height(world: World) -> None:
    answer = await call(world, "compute_size", {"size": "16:9", "resolution": "2K", "width": 1200, "height": 628})
    assert (answer.structured_content["width"], answer.structured_content["crop"]) == (2048, None)
    assert "width and height have no effect with size." in answer.structured_content["notes"]


async def test_the_list_with_any_status_is_the_complete_list(world: World) -> None:
    await call(world, "generate_image", {"prompt": "sim:fail a fox"})
    await call(world, "generate_image", {"prompt": "sim:fast a fox"})
    answer = await call(world, "list_tasks", {"status": "any"})
    assert {task["status"] for task in answer.structured_content["tasks"]} == {"completed", "failed"}
    assert "status" not in answer.content[0].text.splitlines()[0]


async def test_the_schemas_admit_an_empty_value_and_no_enum_contains_it(world: World) -> None:
    for tool, schema in (await schemas(world)).items():
        for name, field in schema["properties"].items():
            assert "" not in field.get("enum", []), f"{tool}.{name}"
            if name in schema.get("required", []) or "enum" in field:
                continue
            empty = {"string": "", "array": []}.get(field["type"])
            if empty is not None:
                jsonschema.validate(empty, field)


# --- wrapped arguments ---


@pytest.mark.parametrize("wrapper", ["arguments", "input"])
async def test_wrapped_arguments_are_unwrapped(world: World, wrapper: str) -> None:
    answer = await call(world, "generate_image", {wrapper: {"prompt": PROMPT, "size": "1024x640", "mask_url": ""}})
    assert answer.is_error is False
    assert sent_by(world) == {"model": "gpt-image-2", "prompt": PROMPT, "size": "1024x640"}
    assert answer.structured_content["notes"] == ["Empty arguments count as absent: mask_url."]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"arguments": {"prompt": PROMPT}, "n": 2}, id="with an argument beside it"),
        pytest.param({"arguments": {"arguments": {"prompt": PROMPT}}}, id="twice"),
        pytest.param({"arguments": json.dumps({"prompt": PROMPT})}, id="as text"),
        pytest.param({"payload": {"prompt": PROMPT}}, id="under another name"),
        pytest.param({"arguments": {}}, id="empty"),
    ],
)
async def test_other_wrappers_are_refused(world: World, arguments: dict[str, Any]) -> None:
    answer = await call(world, "generate_image", arguments)
    assert answer.is_error is True
    assert world.simulator.requests == []


async def test_wrapped_arguments_are_checked_like_others(world: World) -> None:
    answer = await call(world, "generate_image", {"arguments": {"prompt": PROMPT, "seed": 1}})
    assert "seed: unknown argument; gpt-image-2 has no seed" in answer.content[0].text
    assert world.simulator.requests == []


# --- prompts and placeholders ---


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        pytest.param("A calm\0 sunset", "prompt: contains a NUL character", id="NUL"),
        pytest.param("\u200b\u2060\ufeff", "only white space or invisible characters", id="zero width"),
        pytest.param(" \u3164\u2800\ufe0f", "only white space or invisible characters", id="fillers"),
    ],
)
async def test_a_prompt_without_usable_text_is_refused(world: World, prompt: str, message: str) -> None:
    answer = await call(world, "generate_image", {"prompt": prompt})
    assert message in answer.content[0].text
    assert world.simulator.requests == []


PLACEHOLDERS = [
    "https://example.com/a.png", "https://cdn.example.org/a.png", "https://EXAMPLE.NET./a.png", "https://www.example/a.png",
    "https://hooks.test/a.png", "https://hooks.invalid/a.png", "https://your-domain.com/a.png",
    "https://api.your-company.io/a.png", "https://yourdomain.com/a.png", "https://hooks.evolink.dev/your-webhook",
    "https://<host>/a.png", "https://{host}.dev/a.png", "https://evolink.dev/{{path}}/a.png",
]  # fmt: skip
NETWORK_NAMES = [
    "https://hooks.team.svc/x", "https://hooks.team.svc.cluster.local/x", "https://hooks.internal/x", "https://nas.lan/x",
    "https://nas.home.arpa/x", "https://nas.localdomain/x", "https://hooks.corp/x",
]  # fmt: skip


@pytest.mark.parametrize("url", PLACEHOLDERS)
@pytest.mark.parametrize("name", ["image_urls", "mask_url", "callback_url"])
async def test_a_placeholder_is_refused_with_the_advice_to_leave_it_out(world: World, name: str, url: str) -> None:
    references = {"image_urls": ["https://cdn.pixabay.com/a.png"]}
    arguments = {"prompt": PROMPT, **references, name: [url] if name == "image_urls" else url}
    answer = await call(world, "generate_image", arguments)
    assert answer.is_error is True
    assert f"- {name}" in answer.content[0].text
    assert "Leave the argument out" in answer.content[0].text
    assert world.simulator.requests == []


@pytest.mark.parametrize("url", NETWORK_NAMES)
async def test_a_callback_to_a_name_inside_a_network_is_refused(world: World, url: str) -> None:
    answer = await call(world, "generate_image", {"prompt": PROMPT, "callback_url": url})
    assert "Leave the argument out" in answer.content[0].text
    assert world.simulator.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "https://example.company/h", "https://myexample.com/h", "https://example.com.evolink.dev/h", "https://yours.dev/h",
        "https://hooks.evolink.dev/your-summer", "https://contest.evolink.dev/h", "https://testing.dev/h",
    ],
)  # fmt: skip
async def test_a_url_that_resembles_a_placeholder_is_sent(world: World, url: str) -> None:
    answer = await call(world, "generate_image", {"prompt": PROMPT, "callback_url": url})
    assert answer.is_error is False
    assert sent_by(world)["callback_url"] == url
