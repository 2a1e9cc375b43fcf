"""JSON Schemas as hosts can bear them: flat, no `$ref`, no `anyOf` with null, no titles."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

Schema = dict[str, Any]


def input_schema(model: type[BaseModel]) -> Schema:
    """The arguments of a tool: optional ones are simply absent, null is never mentioned.

    Gemini refuses every tool for one word that it does not know: const, exclusiveMaximum and examples are such.
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


def output_schema(model: type[BaseModel]) -> Schema:
    """The structured answer of a tool: what may be missing is `[type, "null"]`."""
    schema = model.model_json_schema(mode="serialization")
    return _plain(schema, schema.pop("$defs", {}))


def _plain(node: Any, definitions: Schema) -> Any:
    if isinstance(node, list):
        return [_plain(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _plain(definitions[node["$ref"].rsplit("/", 1)[1]], definitions)
    if "anyOf" in node:
        arms = [_plain(arm, definitions) for arm in node["anyOf"]]
        real = [arm for arm in arms if arm != {"type": "null"}]
        if len(real) == 1 and "type" in real[0]:
            nullable = [real[0]["type"], "null"] if len(arms) > 1 else real[0]["type"]
            rest = {
                key: _plain(value, definitions)
                for key, value in node.items()
                if key not in ("anyOf", "title", "default")
            }
            return {**real[0], **rest, "type": nullable}
    plain = {}
    for key, value in node.items():
        if key == "properties":
            plain[key] = {name: _plain(field, definitions) for name, field in value.items()}
        elif key not in ("title", "$defs") or not isinstance(value, str | dict):
            plain[key] = _plain(value, definitions)
    return plain
