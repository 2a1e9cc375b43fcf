"""Build SDK tools from one flat argument model each, and answer errors as readable results.

Only this module of the tools uses parts of `mcp` that are not public (mcp 2.3). Tests compare the published schemas.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.resolve import build_resolver_plans, find_resolved_parameters
from mcp.server.mcpserver.tools import Tool
from mcp.server.mcpserver.utilities.func_metadata import FuncMetadata
from mcp_types import CallToolResult, ContentBlock, TextContent, ToolAnnotations
from pydantic import BaseModel, ValidationError, WithJsonSchema

from evolink_mcp.api.http import lower_first
from evolink_mcp.api.request import Arguments, empty_names, unwrapped
from evolink_mcp.api.sizes import IllegalSize
from evolink_mcp.call_context import REQUEST_ID
from evolink_mcp.errors import EvolinkError, Refused
from evolink_mcp.sanitize import harmless, scrub
from evolink_mcp.tools.argument_names import correction
from evolink_mcp.tools.schemas import error_out, input_schema, output_schema
from evolink_mcp.tools.task_text import sentence

REQUEST_ID_META = "evolink-mcp/request_id"
VALUE_MAX_CHARS = 40
# A call can have thousands of wrong arguments, and the answer must stay small.
FAULTS_MAX = 12

# MCP calls a tool destructive if it overwrites or deletes. A purchase only adds files.
PAID = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=False, open_world_hint=True)
# VS Code asks the user before each tool without read_only_hint, and a model calls get_task several times.
READS = ToolAnnotations(read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=True)
WRITES_FILES = ToolAnnotations(
    read_only_hint=False, destructive_hint=False, idempotent_hint=True, open_world_hint=False
)
# VS Code lets the user approve each result of a tool with open_world_hint.
OFFLINE = ToolAnnotations(read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False)

# Builds a tool's answer to an error. The second argument lists the nearest legal sizes if a size was illegal.
ErrorFormatter = Callable[[EvolinkError, tuple[str, ...]], CallToolResult]


class BadArguments(Refused):
    """The arguments do not fit the tool's schema."""

    code = "invalid_arguments"
    advice = "Correct them and call again."


class _OneModel(FuncMetadata):
    """Validate all arguments with one model and pass it as `req`. The SDK would parse strings that look like JSON."""

    # mcp 2.3 allows only its own base class here. The method below replaces the SDK's use of it.
    arg_model: Annotated[type[Arguments], WithJsonSchema(None)]  # pyright: ignore[reportIncompatibleVariableOverride]

    def validate_arguments(self, arguments_to_validate: dict[str, Any]) -> dict[str, Any]:
        return {"req": self.arg_model.model_validate(arguments_to_validate)}


class FlatTool(Tool):
    """A tool that answers errors in its own output schema, built by `format_error`."""

    format_error: ErrorFormatter

    async def run(self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False) -> Any:
        """Run the tool. An empty optional argument counts as absent, and the answer says so."""
        model = self.fn_metadata.arg_model
        assert issubclass(model, Arguments)
        unwrapped_arguments = unwrapped(model, arguments)
        empty = empty_names(model, unwrapped_arguments)
        present = {name: value for name, value in unwrapped_arguments.items() if name not in empty}
        answer = _with_request_id(await self._answer(present, context, convert_result))
        if empty and isinstance(answer, CallToolResult):
            return _with_note(answer, f"Empty arguments count as absent: {', '.join(empty)}.")
        return answer

    async def _answer(self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool) -> Any:
        """Call the tool. The only place that turns our errors and invalid arguments into answers."""
        try:
            return await super().run(arguments, context, convert_result)
        except ToolError as error:
            # The SDK wraps each error of a tool in a ToolError. Its own text has a prefix without advice.
            cause = error.__cause__
            if isinstance(cause, EvolinkError):
                return self.format_error(cause, ())
            # The SDK raises a plain ToolError for invalid arguments, and a subclass if the tool itself raised.
            if type(error) is ToolError and isinstance(cause, ValidationError):
                return self.format_error(*explain(cause, self.fn_metadata.arg_model))
            raise


def flat_tool(
    fn: Callable[..., Awaitable[CallToolResult]],
    arguments: type[Arguments],
    output: type[BaseModel] | None,
    format_error: ErrorFormatter,
    *,
    title: str,
    annotations: ToolAnnotations,
    meta: dict[str, Any] | None = None,
    has_nested_fields: bool = False,
) -> Tool:
    """Return `fn(req, ctx, ...)` as a tool. Its docstring is the description, the two models are its schemas.

    `has_nested_fields`: the output schema contains the fields of nested objects.
    """
    # `Tool.from_function` does this too, but it derives a lax schema from the signature.
    resolved = find_resolved_parameters(fn)
    return FlatTool(
        fn=fn,
        name=fn.__name__,
        title=title,
        description=" ".join((fn.__doc__ or "").split()),
        parameters=input_schema(arguments),
        fn_metadata=_OneModel(
            arg_model=arguments,
            output_schema=output_schema(output, has_nested_fields=has_nested_fields) if output else None,
        ),
        is_async=True,
        context_kwarg="ctx",
        resolved_params=dict(resolved),
        resolver_plans=build_resolver_plans(resolved, {"req"}),
        annotations=annotations,
        meta=meta,
        format_error=format_error,
    )


def result(text: str, data: BaseModel | None, *blocks: ContentBlock, is_error: bool = False) -> CallToolResult:
    """Return an answer: the text, other blocks and structured content. Lone surrogates are replaced in both."""
    return CallToolResult(
        content=[TextContent(type="text", text=scrub(text)), *blocks],
        structured_content=_json_object(data) if data is not None else None,
        is_error=is_error,
    )


def _with_request_id(answer: Any) -> Any:
    """Return the answer with the ID of its HTTP request in `_meta`. An answer over stdio stays unchanged."""
    request_id = REQUEST_ID.get()
    if request_id is None or not isinstance(answer, CallToolResult):
        return answer
    return answer.model_copy(update={"meta": {**(answer.meta or {}), REQUEST_ID_META: request_id}})


def _with_note(answer: CallToolResult, note: str) -> CallToolResult:
    """Return the answer with one more note, at the end of its first text and in its `notes` if it has them."""
    content = list(answer.content)
    # The first block of view_image is the image.
    number, text = next((number, block) for number, block in enumerate(content) if isinstance(block, TextContent))
    content[number] = text.model_copy(update={"text": f"{text.text}\nNote: {note}"})
    facts = answer.structured_content
    if facts is not None and "notes" in facts:
        facts = {**facts, "notes": [*facts["notes"], note]}
    return answer.model_copy(update={"content": content, "structured_content": facts})


def _json_object(data: BaseModel) -> dict[str, Any]:
    facts = data.model_dump(mode="json")
    try:
        data.model_dump_json()  # faster than a search of every string for surrogates
    except ValueError:
        return scrub(facts)
    return facts


def format_error_as(output: Callable[..., BaseModel]) -> ErrorFormatter:
    """Return the formatter of a tool that never buys. `output` is the tool's model and has an `error` field."""

    def format_error(error: EvolinkError, _: tuple[str, ...]) -> CallToolResult:
        text = f"{sentence(error.message)} Charged: no. {error.advice}"
        return result(text, output(error=error_out(error.problem)), is_error=True)

    return format_error


def explain(error: ValidationError, model: type[BaseModel]) -> tuple[BadArguments, tuple[str, ...]]:
    """Return the error with one line per wrong argument, and the nearest legal sizes if a size is illegal."""
    # A dict drops equal lines: two members of a union can give the same fault.
    lines: dict[str, None] = {}
    nearest: tuple[str, ...] = ()
    # null is a second type of each optional argument, which the published schema does not have.
    faults = [fault for fault in error.errors(include_url=False) if fault["type"] != "none_required"]
    for fault in faults[:FAULTS_MAX]:
        cause = fault.get("ctx", {}).get("error")
        if isinstance(cause, IllegalSize):
            nearest = tuple(str(size) for size in cause.nearest)
        lines[_line(fault, cause, model) + _advice_on_zero(fault, model)] = None
    return BadArguments("invalid arguments:\n" + "\n".join(f"- {line}" for line in lines)), nearest


def _advice_on_zero(fault: Any, model: type[BaseModel]) -> str:
    """Return the advice to leave an optional argument out if its value is a 0 that the schema does not allow."""
    field = model.model_fields.get(str(fault["loc"][0])) if fault["loc"] else None
    value = fault.get("input")
    is_zero = isinstance(value, int | float) and not isinstance(value, bool) and value == 0
    return "; leave it out for the default" if is_zero and field is not None and not field.is_required() else ""


def _line(fault: Any, cause: object, model: type[BaseModel]) -> str:
    # pydantic's path also names the member of a union. The caller needs only the argument and the index in its list.
    path = ".".join(str(part) for number, part in enumerate(fault["loc"]) if number == 0 or isinstance(part, int))
    if fault["type"] == "extra_forbidden":
        name = str(fault["loc"][0])
        return f"{harmless(name, VALUE_MAX_CHARS)}: unknown argument; {correction(name, list(model.model_fields))}"
    if fault["type"] == "missing":
        return f"{path}: required"
    if fault["type"] == "string_unicode":
        return f"{path}: contains half of a surrogate pair, which is not text"
    message = str(cause) if cause is not None else str(fault["msg"])
    # An acronym at the start, such as URL, keeps its capital letters.
    message = message if message[:2].isupper() else lower_first(message)
    value = fault.get("input")
    got = f" (got {harmless(repr(value), VALUE_MAX_CHARS)})" if isinstance(value, int | float | bool) else ""
    return f"{path}: {message}{got}" if path else message
