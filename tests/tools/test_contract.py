"""The published tools equal a reviewed file. UPDATE_CONTRACT=1 writes the file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import anyio
import jsonschema
import pytest
from conftest import World

pytestmark = pytest.mark.anyio
CONTRACT = Path(__file__).parent / "contract"
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])
TOOLS_LIST_MAX_BYTES = 16_000
DESCRIPTION_MAX = 2_000


async def published_tools(world: World, mode: str = "auto") -> dict[str, object]:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            tools = (await client.list_tools()).tools
    return {tool.name: tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in tools}


@ERAS
async def test_the_published_tools_equal_the_reviewed_file(world: World, mode: str) -> None:
    actual = json.dumps(await published_tools(world, mode), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    file = CONTRACT / "tools.json"
    if os.environ.get("UPDATE_CONTRACT"):
        file.write_text(actual, encoding="utf-8")
    assert actual == file.read_text(encoding="utf-8")


async def test_the_list_of_tools_is_small(world: World) -> None:
    tools = await published_tools(world)
    assert len(json.dumps({"tools": list(tools.values())}, ensure_ascii=False).encode()) < TOOLS_LIST_MAX_BYTES


async def test_every_tool_has_a_title_a_short_description_and_hints(world: World) -> None:
    for name, tool in (await published_tools(world)).items():
        assert tool["title"], name
        assert 0 < len(tool["description"]) <= DESCRIPTION_MAX, name
        assert set(tool["annotations"]) == {"readOnlyHint", "destructiveHint", "idempotentHint", "openWorldHint"}, name
        assert ("outputSchema" in tool) == (name != "view_image"), name


async def test_only_two_tools_may_spend_and_only_derive_image_writes_files_offline(world: World) -> None:
    hints = {name: tool["annotations"] for name, tool in (await published_tools(world)).items()}
    writing_tools = [name for name, hint in hints.items() if not hint["readOnlyHint"]]
    assert writing_tools == ["generate_image", "generate_images", "derive_image"]
    assert [name for name in writing_tools if hints[name]["openWorldHint"]] == ["generate_image", "generate_images"]


async def test_schemas_are_flat_and_every_parameter_is_described(world: World) -> None:
    for name, tool in (await published_tools(world)).items():
        schema = tool["inputSchema"]
        # An argument may have the name of a keyword: derive_image has `format`.
        text = json.dumps({**schema, "properties": list(schema["properties"].values())})
        assert not {"anyOf", "oneOf", "allOf", "$ref", "$defs"} & set(schema), name
        assert not any(word in text for word in ('"$ref"', '"anyOf"', '"null"', '"format"', '"title"')), name
        assert '"additionalProperties"' not in text, name
        assert all(field.get("description") for field in schema["properties"].values()), name
        jsonschema.Draft202012Validator.check_schema(schema)
        if "outputSchema" in tool:
            jsonschema.Draft202012Validator.check_schema(tool["outputSchema"])


async def test_every_limit_of_the_api_is_in_the_schema(world: World) -> None:
    fields = (await published_tools(world))["generate_image"]["inputSchema"]["properties"]
    limits = {name: {k: v for k, v in field.items() if k not in ("description", "examples", "pattern")}
             for name, field in fields.items()}  # fmt: skip
    assert limits["prompt"] == {"type": "string", "minLength": 1, "maxLength": 32_000}
    assert limits["n"] == {"type": "integer", "minimum": 1, "maximum": 10, "default": 1}
    assert limits["quality"] == {"type": "string", "enum": ["low", "medium", "high"], "default": "medium"}
    assert limits["resolution"] == {"type": "string", "enum": ["1K", "2K", "4K"], "default": "1K"}
    assert limits["image_urls"] == {"type": "array", "items": {"type": "string"}, "maxItems": 16}
    assert limits["callback_url"] == {"type": "string", "maxLength": 2048}
    assert limits["wait_seconds"] == {"type": "number", "minimum": 0, "maximum": 900}
    assert all(limit in fields["size"]["description"] for limit in ("16", "3840", "655360", "8294400", "3:1"))


CALLS = [
    pytest.param("generate_image", {"prompt": "sim:fast a fox"}, id="success"),
    pytest.param("generate_image", {"prompt": "sim:fail a fox"}, id="failed task"),
    pytest.param("generate_image", {"prompt": "sim:402 a fox"}, id="rejected"),
    pytest.param("generate_image", {"prompt": "sim:500 a fox"}, id="unknown outcome"),
    pytest.param("generate_image", {"prompt": "x", "size": "1x1"}, id="bad argument"),
    pytest.param("generate_image", {"prompt": "x", "max_credits": 0.001}, id="over budget"),
    pytest.param("generate_image", {"prompt": "sim:slow a fox", "wait_seconds": 0}, id="handle"),
    pytest.param("generate_images", {"prompts": ["a fox", "sim:fail a hen", "sim:402 an owl"]}, id="series"),
    pytest.param("generate_images", {"prompts": ["sim:402 an owl"]}, id="rejected series"),
    pytest.param("generate_images", {"prompts": ["sim:slow a fox"], "wait_seconds": 0}, id="series of handles"),
    pytest.param("generate_images", {"prompts": ["a fox"], "max_credits": 0.001}, id="series over budget"),
    pytest.param("get_task", {"task_id": "task-unified-1-zzzzzzzz"}, id="unknown task"),
    pytest.param("get_task", {"task_id": "../credits"}, id="bad id"),
    pytest.param("compute_size", {"size": "16:9"}, id="size"),
    pytest.param("compute_size", {"size": "auto"}, id="auto"),
    pytest.param("compute_size", {"width": 1200, "height": 628}, id="cover"),
    pytest.param("compute_size", {"size": "1000x1000"}, id="illegal size"),
    pytest.param("compute_size", {}, id="no size"),
    pytest.param("list_tasks", {}, id="list"),
    pytest.param("list_tasks", {"detail": True}, id="list with details"),
    pytest.param("list_tasks", {"sync": True}, id="synced list"),
    pytest.param("list_tasks", {"since": "some day"}, id="bad time"),
    pytest.param("get_balance", {}, id="balance"),
    pytest.param("get_balance", {"x": 1}, id="unknown argument"),
]


def is_in_text(fact: object, text: str) -> bool:
    """Return whether the text contains the fact. Numbers may have thousands separators."""
    return str(fact) in text or (isinstance(fact, int) and f"{fact:,}" in text)


@ERAS
@pytest.mark.parametrize(("tool", "arguments"), CALLS)
async def test_every_answer_fits_its_schema_and_repeats_its_facts_as_text(
    world: World, mode: str, tool: str, arguments: dict[str, object]
) -> None:
    schema = (await published_tools(world, mode))[tool]["outputSchema"]
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            answer = await client.call_tool(tool, arguments)
    facts, text = answer.structured_content, answer.content[0].text
    jsonschema.validate(facts, schema)
    assert set(facts) == set(schema["properties"])
    for name in ("task_id", "status", "width", "height", "explicit_size", "estimated_tokens"):
        if facts.get(name) is not None and not (name == "status" and facts.get("task_id") is None):
            assert is_in_text(facts[name], text), name
    if facts.get("credits") is not None:
        assert f"{facts['credits']:g} credits (${facts['usd']:g})" in text
    for image in facts.get("images", []):
        facts_of_image = [
            image[name] for name in ("path", "url", "url_expires_at", "sha256", "resource_uri", "markdown", "bytes")
        ]
        assert all(is_in_text(fact, text) for fact in facts_of_image if fact is not None)
    if facts.get("error"):
        assert answer.is_error is True
        assert facts["error"]["advice"] in text
        assert facts["error"]["message"][1:].rstrip(".") in text
