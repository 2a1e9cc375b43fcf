"""The SDK's tools, bent to this house's contract: one flat, strict arguments model; our errors as readable results.

The only room that touches semi-private parts of `mcp`; tests hold it against the wire.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.resolve import build_resolver_plans, find_resolved_parameters
from mcp.server.mcpserver.tools import Tool
from mcp.server.mcpserver.utilities.func_metadata import FuncMetadata
from mcp_types import CallToolResult, ContentBlock, TextContent, ToolAnnotations
from pydantic import BaseModel, ValidationError, WithJsonSchema

from evolink_mcp.api.request import Arguments
from evolink_mcp.api.sizes import IllegalSize
from evolink_mcp.errors import EvolinkError, Refused
from evolink_mcp.sanitize import harmless, scrub
from evolink_mcp.tools.schemas import input_schema, output_schema

VALUE_SHOWN = 40
FIELDS_SHOWN = 12

Answer = Callable[[EvolinkError, tuple[str, ...]], CallToolResult]


class BadArguments(Refused):
    """The arguments do not fit the tool's schema."""

    code = "invalid_arguments"
    advice = "Correct them and call again."


class _OneModel(FuncMetadata):
    """Arguments arrive as one validated model named `req`, and no string is parsed behind the caller's back."""

    arg_model: Annotated[type[Arguments], WithJsonSchema(None)]  # pyright: ignore[reportIncompatibleVariableOverride]

    def validate_arguments(self, arguments_to_validate: dict[str, Any]) -> dict[str, Any]:
        return {"req": self.arg_model.model_validate(arguments_to_validate)}


class FlatTool(Tool):
    """A tool whose refusals are answers of its own shape. `refuse` makes the result for an error of ours."""

    refuse: Answer

    async def run(self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False) -> Any:
        try:
            self.fn_metadata.validate_arguments(arguments)
        except ValidationError as error:
            return self.refuse(*explain(error, self.fn_metadata.arg_model))
        return await super().run(arguments, context, convert_result)


def flat_tool(
    fn: Callable[..., Awaitable[CallToolResult]],
    arguments: type[Arguments],
    output: type[BaseModel] | None,
    refuse: Answer,
    *,
    title: str,
    annotations: ToolAnnotations,
    meta: dict[str, Any] | None = None,
) -> Tool:
    """`fn(req, ctx, ...)` as a tool: its docstring describes it, `arguments` and `output` are its schemas."""
    resolved = find_resolved_parameters(fn)

    @functools.wraps(fn)
    async def bordered(**given: Any) -> CallToolResult:
        try:
            return await fn(**given)
        except EvolinkError as error:
            return refuse(error, ())

    return FlatTool(
        fn=bordered,
        name=fn.__name__,
        title=title,
        description=" ".join((fn.__doc__ or "").split()),
        parameters=input_schema(arguments),
        fn_metadata=_OneModel(arg_model=arguments, output_schema=output_schema(output) if output else None),
        is_async=True,
        context_kwarg="ctx",
        resolved_params=dict(resolved),
        resolver_plans=build_resolver_plans(resolved, {"req"}),
        annotations=annotations,
        meta=meta,
        refuse=refuse,
    )


def result(text: str, data: BaseModel | None, *more: ContentBlock, is_error: bool = False) -> CallToolResult:
    """A tool's answer: the text first, the same facts as structured content, lone surrogates gone from both."""
    return CallToolResult(
        content=[TextContent(type="text", text=scrub(text)), *more],
        structured_content=scrub(data.model_dump(mode="json")) if data is not None else None,
        is_error=is_error,
    )


def explain(error: ValidationError, model: type[BaseModel]) -> tuple[BadArguments, tuple[str, ...]]:
    """What was wrong, a line an argument, and the nearest legal sizes where a size was."""
    lines: dict[str, None] = {}
    nearest: tuple[str, ...] = ()
    faults = [fault for fault in error.errors(include_url=False) if fault["type"] != "none_required"]
    for fault in faults[:FIELDS_SHOWN]:
        cause = fault.get("ctx", {}).get("error")
        if isinstance(cause, IllegalSize):
            nearest = tuple(str(size) for size in cause.nearest)
        lines[_line(fault, cause, list(model.model_fields))] = None
    return BadArguments("invalid arguments:\n" + "\n".join(f"- {line}" for line in lines)), nearest


def _line(fault: Any, cause: object, known: list[str]) -> str:
    # pydantic names the arm of a union too: only the argument and the place in its list are of interest.
    path = ".".join(str(part) for number, part in enumerate(fault["loc"]) if number == 0 or isinstance(part, int))
    if fault["type"] == "extra_forbidden":
        name = str(fault["loc"][0])
        return f"{harmless(name, VALUE_SHOWN)}: unknown argument{_meant(name, known)}"
    if fault["type"] == "missing":
        return f"{path}: required"
    if fault["type"] == "string_unicode":
        return f"{path}: contains half of a surrogate pair, which is not text"
    said = str(cause) if cause is not None else str(fault["msg"])
    said = said[:1].lower() + said[1:] if not said[:2].isupper() else said
    value = fault.get("input")
    shown = f" (got {harmless(repr(value), VALUE_SHOWN)})" if isinstance(value, int | float | bool) else ""
    return f"{path}: {said}{shown}" if path else said


def _meant(name: str, known: list[str]) -> str:
    low = name.lower()[:64]
    close = [word for word in known if word == low or word in low or (len(low) > 1 and low in word)]
    close = close or difflib.get_close_matches(low, known, n=1, cutoff=0.5)
    return f"; did you mean {min(close, key=lambda word: abs(len(word) - len(low)))}?" if close else ""
