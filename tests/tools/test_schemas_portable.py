"""Schemas that every MCP host accepts. Each rule exists because a host refused a tool or a whole session without it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import anyio
import jsonschema
import pytest
from conftest import World

pytestmark = pytest.mark.anyio
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])

LIST_MAX_BYTES = 16_000
# Anthropic's API allows 128 characters and its directory 64. Gemini CLI shortens "mcp_<server>_<tool>" above 63.
NAME = re.compile(r"[a-zA-Z0-9_-]{1,40}")
PARAMETER = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# Keywords that every host's schema reader knows.
INPUT_KEYWORDS = {
    "type", "properties", "required", "description", "default", "enum", "items",
    "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "pattern",
}  # fmt: skip
OUTPUT_KEYWORDS = INPUT_KEYWORDS | {"additionalProperties", "const"}
TYPES = {"object", "array", "string", "integer", "number", "boolean"}
# Lookaround, named groups, inline flags and \Z differ between JavaScript, RE2 and Rust.
UNPORTABLE_PATTERN = re.compile(r"\(\?(?!:)|\\[AZzpPGk]|[*+?}]\+")


async def list_tools(world: World, mode: str = "auto") -> list[dict[str, Any]]:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            answer = await client.list_tools()
    return [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in answer.tools]


def nodes(schema: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each schema inside a schema with its path. Values of `default` and `enum` are not schemas."""
    yield path, schema
    for name, field in schema.get("properties", {}).items():
        yield from nodes(field, f"{path}.{name}")
    for keyword in ("items", "additionalProperties"):
        if isinstance(schema.get(keyword), dict):
            yield from nodes(schema[keyword], f"{path}.{keyword}")


def inputs(tools: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for tool in tools:
        yield from nodes(tool["inputSchema"], tool["name"])


def outputs(tools: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for tool in tools:
        if "outputSchema" in tool:
            yield from nodes(tool["outputSchema"], tool["name"])


@ERAS
async def test_the_list_of_tools_is_below_16_kb(world: World, mode: str) -> None:
    tools = await list_tools(world, mode)
    assert len(json.dumps({"tools": tools}).encode()) < LIST_MAX_BYTES


async def test_names_are_valid_in_every_host(world: World) -> None:
    tools = await list_tools(world)
    assert [tool["name"] for tool in tools if not NAME.fullmatch(tool["name"])] == []
    names = [name for tool in tools for name in tool["inputSchema"]["properties"]]
    assert [name for name in names if not PARAMETER.fullmatch(name)] == []


async def test_input_schemas_use_only_portable_keywords(world: World) -> None:
    """Without `$ref`, `anyOf` with null, `format`, `const`, `exclusiveMaximum`, `examples` and `title`.

    Gemini refuses the whole request for any of them. copilot-cli and mcporter fail on some. google-genai fails on
    `additionalProperties`.
    """
    unknown = {path: sorted(schema.keys() - INPUT_KEYWORDS) for path, schema in inputs(await list_tools(world))}
    assert {path: keywords for path, keywords in unknown.items() if keywords} == {}


async def test_output_schemas_use_only_portable_keywords(world: World) -> None:
    unknown = {path: sorted(schema.keys() - OUTPUT_KEYWORDS) for path, schema in outputs(await list_tools(world))}
    assert {path: keywords for path, keywords in unknown.items() if keywords} == {}


async def test_every_input_has_one_type_other_than_null(world: World) -> None:
    wrong = {
        path: schema.get("type") for path, schema in inputs(await list_tools(world)) if schema.get("type") not in TYPES
    }
    assert wrong == {}


async def test_schemas_are_objects_at_the_root(world: World) -> None:
    """The TypeScript SDK refuses the whole list if the root of one output schema is not an object."""
    for tool in await list_tools(world):
        assert tool["inputSchema"]["type"] == "object"
        assert tool.get("outputSchema", {"type": "object"})["type"] == "object"


async def test_every_array_declares_its_items(world: World) -> None:
    """OpenAI and Gemini refuse an array without items."""
    tools = await list_tools(world)
    assert [path for path, schema in [*inputs(tools), *outputs(tools)]
            if "array" in schema.get("type", "") and not schema.get("items")] == []  # fmt: skip


async def test_every_parameter_has_a_short_description(world: World) -> None:
    for tool in await list_tools(world):
        for name, field in tool["inputSchema"]["properties"].items():
            assert 0 < len(field.get("description", "")) <= 600, f"{tool['name']}.{name}"


async def test_defaults_are_valid_values(world: World) -> None:
    for path, schema in inputs(await list_tools(world)):
        if "default" in schema:
            assert jsonschema.Draft202012Validator(schema).is_valid(schema["default"]), path


async def test_optional_parameters_are_not_required(world: World) -> None:
    for tool in await list_tools(world):
        schema = tool["inputSchema"]
        required = schema.get("required", [])
        assert set(required) <= schema["properties"].keys()
        assert [name for name in required if "default" in schema["properties"][name]] == []


async def test_patterns_are_portable_between_regex_engines(world: World) -> None:
    tools = await list_tools(world)
    patterns = {path: schema["pattern"] for path, schema in [*inputs(tools), *outputs(tools)] if "pattern" in schema}
    assert {path: pattern for path, pattern in patterns.items() if UNPORTABLE_PATTERN.search(pattern)} == {}
    assert {path for path, pattern in patterns.items() if not pattern.startswith("^")} == set()


@ERAS
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param("generate_image", {"prompt": "a fox"}, id="a picture"),
        pytest.param("generate_image", {"prompt": "sim:slow a fox", "wait_seconds": 0}, id="a running task"),
        pytest.param("generate_image", {"prompt": "sim:fail a fox"}, id="a failed picture"),
        pytest.param("generate_image", {"prompt": "sim:402 a fox"}, id="a refused purchase"),
        pytest.param("generate_image", {"promt": 7}, id="a purchase with bad arguments"),
        pytest.param("get_task", {"task_id": "task-unified-1790000000-nobodys1"}, id="an unknown task"),
        pytest.param("get_task", {"task_id": "../v1/credits"}, id="an invalid task id"),
        pytest.param("compute_size", {"size": "16:9"}, id="a size"),
        pytest.param("compute_size", {"size": "auto"}, id="the size auto"),
        pytest.param("compute_size", {"size": "17x17"}, id="an illegal size"),
        pytest.param("compute_size", {"width": 1200, "height": 628}, id="a target width and height"),
        pytest.param("compute_size", {"siez": "16:9"}, id="a size with bad arguments"),
        pytest.param("list_tasks", {}, id="the list"),
        pytest.param("list_tasks", {"limit": 0}, id="the list with bad arguments"),
        pytest.param("get_balance", {}, id="the balance"),
        pytest.param("get_balance", {"now": True}, id="the balance with bad arguments"),
    ],
)
async def test_every_answer_fits_the_published_schema(
    world: World, mode: str, name: str, arguments: dict[str, Any]
) -> None:
    """Errors too, because the TypeScript SDK validates their structured content."""
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            tools = {tool.name: tool for tool in (await client.list_tools()).tools}
            answer = await client.call_tool(name, arguments)
    assert answer.structured_content is not None
    jsonschema.Draft202012Validator(tools[name].output_schema).validate(answer.structured_content)
    assert answer.content[0].text.strip()
