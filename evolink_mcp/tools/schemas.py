"""JSON Schemas as hosts accept them: flat, no `$ref`, no `anyOf` with null, no titles; and the error in every answer."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, cast

from pydantic import BaseModel, ConfigDict

from evolink_mcp.errors import Problem
from evolink_mcp.sanitize import harmless

Schema = dict[str, Any]
TOOL_NAMES = ("generate_image", "get_task", "compute_size", "view_image", "list_tasks", "get_balance")


def tools_named(words: Iterable[str]) -> frozenset[str]:
    """The tools with these names.

    Raises:
        ValueError: there is no such tool, or none is named.
    """
    names = frozenset(words)
    if not names:
        raise ValueError("it names no tool")
    if strange := sorted(names - set(TOOL_NAMES)):
        raise ValueError(f"there is no tool {harmless(strange[0], 60)}, only {', '.join(TOOL_NAMES)}")
    return names


def undescribed(schema: Schema) -> None:
    """For `json_schema_extra`: keep a model's docstring out of the published schema."""
    schema.pop("description", None)


class ErrorOut(BaseModel):
    """What went wrong: a code for programs, a sentence, whether the same call may help later, what to do now."""

    model_config = ConfigDict(json_schema_extra=undescribed)

    code: str
    message: str
    retryable: bool
    advice: str


def error_out(problem: Problem) -> ErrorOut:
    """A problem as it stands in structured content."""
    return ErrorOut(code=problem.code, message=problem.message, retryable=problem.retryable, advice=problem.advice)


@cache
def input_schema(model: type[BaseModel]) -> Schema:
    """The schema of a tool's arguments: flat, no `$ref`, no titles, and null is never mentioned.

    Gemini refuses all tools if one schema uses a keyword that it does not know, such as const, exclusiveMaximum or
    examples.
    """
    schema = _plain(model.model_json_schema(), {})
    schema.pop("description", None)  # the tool has its own
    for field in schema["properties"].values():
        if field.get("default", ...) is None:
            del field["default"]
        if "const" in field:
            field["enum"] = [field.pop("const")]
        if "exclusiveMaximum" in field:
            field["maximum"] = field.pop("exclusiveMaximum") - 1
        field.pop("examples", None)
    return schema


@cache
def output_schema(model: type[BaseModel]) -> Schema:
    """The schema of a tool's structured content: flat; what may be missing has the type `[type, "null"]`.

    Of a model's docstring the first paragraph is published.
    """
    schema = model.model_json_schema(mode="serialization")
    return _plain(schema, schema.pop("$defs", {}))


def _plain(node: Any, definitions: Schema) -> Any:
    """`node` without titles and references, a type that may be null written as `[type, "null"]`."""
    if isinstance(node, list):
        return [_plain(item, definitions) for item in cast("list[Any]", node)]
    if not isinstance(node, dict):
        return node
    schema = cast(Schema, node)
    if "$ref" in schema:
        return _plain(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    if "anyOf" in schema:
        arms = [_plain(arm, definitions) for arm in schema["anyOf"]]
        real = [arm for arm in arms if arm != {"type": "null"}]
        if len(real) == 1 and "type" in real[0]:
            nullable = [real[0]["type"], "null"] if len(arms) > 1 else real[0]["type"]
            rest = {
                key: _plain(value, definitions)
                for key, value in schema.items()
                if key not in ("anyOf", "title", "default")
            }
            return {**real[0], **rest, "type": nullable}
    plain: Schema = {}
    for key, value in schema.items():
        if key == "properties":
            fields: Schema = value
            plain[key] = {name: _plain(field, definitions) for name, field in fields.items()}
        elif key == "description":
            plain[key] = str(value).partition("\n\n")[0]
        elif key not in ("title", "$defs") or not isinstance(value, str | dict):
            plain[key] = _plain(value, definitions)
    return plain
