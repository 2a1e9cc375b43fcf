"""JSON Schemas that every MCP host accepts, and the error field of every answer.

The schemas are flat: no `$ref`, no `anyOf` with null, no titles. This module does not import the SDK, because the
settings and the command line use it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from pydantic import BaseModel, ConfigDict

from evolink_mcp.errors import Problem
from evolink_mcp.journal.entry import iso

Schema = dict[str, Any]


def undescribed(schema: Schema) -> None:
    """Remove a model's docstring from its published schema. Use it as `json_schema_extra`."""
    # The docstring is for programmers, and the list of tools must stay small.
    schema.pop("description", None)


class ErrorOut(BaseModel):
    """An error in an answer: a code for programs, a sentence, whether a later repeat can help, and the next step.

    `retry_at` (ISO 8601, UTC): until this time EvoLink refuses purchases.
    """

    model_config = ConfigDict(json_schema_extra=undescribed)

    code: str
    message: str
    retryable: bool
    advice: str
    retry_at: str | None = None


def error_out(problem: Problem) -> ErrorOut:
    """Return a problem as structured content."""
    return ErrorOut(
        code=problem.code,
        message=problem.message,
        retryable=problem.retryable,
        advice=problem.advice,
        retry_at=None if problem.retry_at is None else iso(problem.retry_at),
    )


# A team's server has one MCP server for each tenant, all with the same schemas.
@cache
def input_schema(model: type[BaseModel]) -> Schema:
    """Return the schema of a tool's arguments: flat, without `$ref`, titles and null.

    Gemini refuses all tools if one schema uses a keyword that it does not know, such as const, exclusiveMaximum or
    examples. google-genai fails on `additionalProperties`: the server refuses unknown arguments without it.
    """
    schema = _flatten(model.model_json_schema(), {})
    schema.pop("description", None)  # the tool has a description already
    schema.pop("additionalProperties", None)
    for field in schema["properties"].values():
        if field.get("default", ...) is None:
            del field["default"]
        if "const" in field:
            field["enum"] = [field.pop("const")]
        # Only integers have an exclusive maximum here, so one less is the same limit.
        if "exclusiveMaximum" in field:
            field["maximum"] = field.pop("exclusiveMaximum") - 1
        field.pop("examples", None)
    return schema


@cache
def output_schema(model: type[BaseModel], *, has_nested_fields: bool = False) -> Schema:
    """Return the schema of a tool's structured content: flat, an optional field has the type `[type, "null"]`.

    Every answer has every field, so the schema has no defaults and no required fields. The list of tools must stay
    small, so a nested object has no fields in the schema, unless `has_nested_fields`.
    """
    schema = model.model_json_schema(mode="serialization")
    schema.pop("description", None)  # the tool has a description already
    definitions: dict[str, Schema] = schema.pop("$defs", {})
    if not has_nested_fields:
        definitions = {name: {"type": "object"} for name in definitions}
    return _brief(_flatten(schema, definitions))


def _brief(schema: Schema) -> Schema:
    """Return an output schema without defaults, required fields and the types of a map's values."""
    brief = {key: value for key, value in schema.items() if key not in ("default", "required", "additionalProperties")}
    if "properties" in brief:
        brief["properties"] = {name: _brief(field) for name, field in schema["properties"].items()}
    if "items" in brief:
        brief["items"] = _brief(schema["items"])
    return brief


def _flatten(node: Any, definitions: Schema) -> Any:
    """Return `node` without titles and references, with nullable types as `[type, "null"]`."""
    if isinstance(node, list):
        return [_flatten(item, definitions) for item in cast("list[Any]", node)]
    if not isinstance(node, dict):
        return node
    schema = cast(Schema, node)
    # Gemini refuses the whole list of tools because of one reference.
    if "$ref" in schema:
        return _flatten(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    # MCP hosts with a Gemini model fail on anyOf with null.
    if "anyOf" in schema:
        arms = [_flatten(arm, definitions) for arm in schema["anyOf"]]
        types = [arm for arm in arms if arm != {"type": "null"}]
        if len(types) == 1 and "type" in types[0]:
            nullable = [types[0]["type"], "null"] if len(arms) > 1 else types[0]["type"]
            rest = {
                key: _flatten(value, definitions)
                for key, value in schema.items()
                if key not in ("anyOf", "title", "default")
            }
            return {**types[0], **rest, "type": nullable}
    flat: Schema = {}
    for key, value in schema.items():
        # An argument may have the name of a keyword: derive_image has `format`.
        if key == "properties":
            fields: Schema = value
            flat[key] = {name: _flatten(field, definitions) for name, field in fields.items()}
        elif key == "description":
            # The rest of a docstring would enlarge the list of tools.
            flat[key] = str(value).partition("\n\n")[0]
        elif key not in ("title", "$defs") or not isinstance(value, str | dict):
            flat[key] = _flatten(value, definitions)
    return flat
