"""The border to the SDK: a tool with one strict, flat model of arguments, and our errors as readable results.

The only module of the tools that uses parts of `mcp` that are not public (mcp 2.3); tests check what is published.
"""

from __future__ import annotations

import difflib
import functools
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
from evolink_mcp.api.request import Arguments
from evolink_mcp.api.sizes import IllegalSize
from evolink_mcp.errors import EvolinkError, Refused
from evolink_mcp.sanitize import harmless, scrub
from evolink_mcp.tools.schemas import error_out, input_schema, output_schema

VALUE_SHOWN = 40
FIELDS_SHOWN = 12

# What other APIs call an argument of ours.
SAME = {
    other: ours
    for ours, others in {
        "prompt": "text description query instruction",
        "size": "aspect_ratio aspectratio aspect ratio width height dimensions image_size imagesize",
        "n": "num_images num_outputs number_of_images num count batch_size samples",
        "image_urls": "image_url image images input_image input_images reference_image reference_images references init_image",
        "mask_url": "mask mask_image",
        "save_as": "filename file_name output_path output_file file_path path output",
        "output_format": "format file_format image_format",
        "callback_url": "callback webhook webhook_url",
        "wait_seconds": "wait timeout timeout_seconds",
        "max_credits": "max_cost budget",
        "task_id": "id task taskid job_id",
        "index": "image_index number",
    }.items()
    for other in others.split()
}
INTO_THE_PROMPT = frozenset(["negative_prompt", "style", "style_preset", "system_prompt"])
NOT_THERE = frozenset(
    [
        "seed",
        "steps",
        "num_inference_steps",
        "guidance",
        "guidance_scale",
        "cfg_scale",
        "sampler",
        "scheduler",
        "strength",
        "temperature",
        "user",
        "response_format",
        "output_compression",
        "compression",
        "moderation",
        "input_fidelity",
        "reasoning",
        "lora",
        "loras",
    ]
)

PAID = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=False, open_world_hint=True)
READS = ToolAnnotations(read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=True)
OFFLINE = ToolAnnotations(read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False)

# Makes a tool's answer to an error of ours; the second argument holds the nearest legal sizes, if a size was wrong.
ErrorFormatter = Callable[[EvolinkError, tuple[str, ...]], CallToolResult]


class BadArguments(Refused):
    """The arguments do not fit the tool's schema."""

    code = "invalid_arguments"
    advice = "Correct them and call again."


class _OneModel(FuncMetadata):
    """Arguments arrive as one validated model named `req`; unlike the SDK's own, it never parses a string as JSON."""

    # mcp 2.3 allows only its own base class here; what it uses of it is replaced below.
    arg_model: Annotated[type[Arguments], WithJsonSchema(None)]  # pyright: ignore[reportIncompatibleVariableOverride]

    def validate_arguments(self, arguments_to_validate: dict[str, Any]) -> dict[str, Any]:
        return {"req": self.arg_model.model_validate(arguments_to_validate)}


class FlatTool(Tool):
    """A tool whose errors are answers in its own output schema, made by `format_error`."""

    format_error: ErrorFormatter

    async def run(self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False) -> Any:
        """Run the tool; arguments that do not fit are answered by `format_error`, a line for each fault."""
        try:
            return await super().run(arguments, context, convert_result)
        except ToolError as error:
            # Only invalid arguments come as a plain ToolError with this cause: what a tool raises is UnexpectedToolError.
            if type(error) is ToolError and isinstance(error.__cause__, ValidationError):
                return self.format_error(*explain(error.__cause__, self.fn_metadata.arg_model))
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
) -> Tool:
    """`fn(req, ctx, ...)` as a tool: its docstring describes it, `arguments` and `output` are its schemas."""
    resolved = find_resolved_parameters(fn)

    @functools.wraps(fn)
    async def answered(**given: Any) -> CallToolResult:
        try:
            return await fn(**given)
        except EvolinkError as error:
            return format_error(error, ())

    return FlatTool(
        fn=answered,
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
        format_error=format_error,
    )


def result(text: str, data: BaseModel | None, *more: ContentBlock, is_error: bool = False) -> CallToolResult:
    """A tool's answer: the text first, the same facts as structured content; lone surrogates are replaced in both."""
    return CallToolResult(
        content=[TextContent(type="text", text=scrub(text)), *more],
        structured_content=_plain(data) if data is not None else None,
        is_error=is_error,
    )


def _plain(data: BaseModel) -> dict[str, Any]:
    plain = data.model_dump(mode="json")
    try:
        data.model_dump_json()  # quicker than to look into every string
    except ValueError:
        return scrub(plain)
    return plain


def format_error_as(output: Callable[..., BaseModel]) -> ErrorFormatter:
    """The error formatter of a tool that buys nothing: `output` is its model, which has an `error` field."""

    def format_error(error: EvolinkError, _: tuple[str, ...]) -> CallToolResult:
        told = error_out(error.problem)
        return result(f"{told.message}. Charged: no. {told.advice}", output(error=told), is_error=True)

    return format_error


def explain(error: ValidationError, model: type[BaseModel]) -> tuple[BadArguments, tuple[str, ...]]:
    """What was wrong, one line for each argument, and the nearest legal sizes if a size was wrong."""
    lines: dict[str, None] = {}
    empty: list[str] = []
    nearest: tuple[str, ...] = ()
    faults = [fault for fault in error.errors(include_url=False) if fault["type"] != "none_required"]
    for fault in faults[:FIELDS_SHOWN]:
        if _is_left_empty(fault, model):
            empty.append(str(fault["loc"][0]))
            continue
        cause = fault.get("ctx", {}).get("error")
        if isinstance(cause, IllegalSize):
            nearest = tuple(str(size) for size in cause.nearest)
        lines[_line(fault, cause, list(model.model_fields))] = None
    if empty:
        lines[f"{', '.join(dict.fromkeys(empty))}: empty; leave out what you do not set"] = None
    return BadArguments("invalid arguments:\n" + "\n".join(f"- {line}" for line in lines)), nearest


def _is_left_empty(fault: Any, model: type[BaseModel]) -> bool:
    """Whether a host has filled in an optional argument with nothing."""
    field = model.model_fields.get(str(fault["loc"][0])) if fault["loc"] else None
    nothing = fault.get("input") in ("", []) or (fault.get("input") == 0 and not isinstance(fault.get("input"), bool))
    return field is not None and not field.is_required() and nothing and not isinstance(fault["loc"][-1], int)


def _line(fault: Any, cause: object, known: list[str]) -> str:
    # pydantic's path also names the member of a union: only the argument and the index in its list are of interest.
    path = ".".join(str(part) for number, part in enumerate(fault["loc"]) if number == 0 or isinstance(part, int))
    if fault["type"] == "extra_forbidden":
        name = str(fault["loc"][0])
        return f"{harmless(name, VALUE_SHOWN)}: unknown argument{_meant(name, known)}"
    if fault["type"] == "missing":
        return f"{path}: required"
    if fault["type"] == "string_unicode":
        return f"{path}: contains half of a surrogate pair, which is not text"
    said = str(cause) if cause is not None else str(fault["msg"])
    said = said if said[:2].isupper() else lower_first(said)
    value = fault.get("input")
    shown = f" (got {harmless(repr(value), VALUE_SHOWN)})" if isinstance(value, int | float | bool) else ""
    return f"{path}: {said}{shown}" if path else said


def _meant(name: str, known: list[str]) -> str:
    """What to do with an unknown argument: the one that means the same, if there is one; else leave it out."""
    low = name.lower()[:64]
    same = low if low in known else SAME.get(low)
    if same in known:
        return f"; did you mean {same}?"
    if "prompt" in known and low in INTO_THE_PROMPT:
        return "; write it into the prompt"
    if "prompt" in known and low in NOT_THERE:
        return f"; gpt-image-2 has no {low}, leave it out"
    close = difflib.get_close_matches(low, known, n=1, cutoff=0.7) if len(low) > 3 else []
    return f"; did you mean {close[0]}?" if close else "; leave it out"
