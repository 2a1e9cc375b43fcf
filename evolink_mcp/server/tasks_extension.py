"""The Tasks extension (SEP-2663): generate_image returns a task handle to a client that declares the extension.

The handle is EvoLink's task ID, so it stays valid after a restart. Other clients get the normal answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.extension import Extension, MethodBinding
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.server import require_client_extension
from mcp.server.mcpserver.tools import Tool
from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS, CallToolRequestParams, CallToolResult, RequestParams

from evolink_mcp.api.task import is_task_id
from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.entry import Entry, Stage, iso
from evolink_mcp.sanitize import harmless
from evolink_mcp.studio.studio import Studio

# Capabilities of an older protocol version have no field for extensions.
MODERN = frozenset({"2026-07-28"})
POLL_INTERVAL_MS = 3000

Request = ServerRequestContext[Any, Any]


class TaskParams(RequestParams):
    """The parameters of all three methods. `inputResponses` is ignored: a task never asks for input."""

    task_id: str


class Tasks(Extension):
    """The tasks of one studio. A finished task has the answer of the tool `get_task`."""

    identifier = "io.modelcontextprotocol/tasks"

    def __init__(self, studio: Studio, get_task: Tool) -> None:
        self._studio = studio
        self._get_task = get_task

    def methods(self) -> Sequence[MethodBinding]:
        """Return the three methods of the extension, for clients of its protocol version."""
        return [
            MethodBinding("tasks/get", TaskParams, self.get, MODERN),
            MethodBinding("tasks/cancel", TaskParams, self.cancel, MODERN),
            MethodBinding("tasks/update", TaskParams, self.update, MODERN),
        ]

    async def intercept_tool_call(
        self, params: CallToolRequestParams, ctx: Request, call_next: CallNext
    ) -> HandlerResult:
        """Let generate_image return at once if the client declares the extension."""
        if params.name != "generate_image" or ctx.protocol_version not in MODERN or not self._declared(ctx):
            return await call_next(ctx)
        # The normal call also validates the arguments and asks for the approval of the price.
        params.arguments = {**(params.arguments or {}), "wait_seconds": 0}
        result = await call_next(ctx)
        answer = result.structured_content if isinstance(result, CallToolResult) and not result.is_error else None
        entry = await self._entry(answer["task_id"]) if answer else None
        # An identical undelivered purchase can be finished already, so it needs no handle.
        if entry is None or entry.stage is not Stage.OPEN:
            return result
        # The client has the handle, so the next identical call must buy, as it does beside a waiting call.
        await self._studio.claim(entry)
        return {"resultType": "task", **self._task_out(entry)}

    async def get(self, ctx: Request, params: TaskParams) -> dict[str, Any]:
        """Return the task's state, with the answer of get_task when it is finished."""
        await self._require_entry(ctx, params)
        job = await self._studio.resume(params.task_id)
        if not job.is_finished:
            return self._task_out(job.entry)
        arguments = {"task_id": params.task_id, "wait_seconds": 0}
        result = await self._get_task.run(arguments, Context(request_context=ctx))
        answer = result.model_dump(mode="json", by_alias=True, exclude_none=True)
        # The extension keeps "failed" for JSON-RPC errors. A failed task is completed with an error as its result.
        return {**self._task_out(job.entry), "status": "completed", "result": answer}

    async def cancel(self, ctx: Request, params: TaskParams) -> dict[str, Any]:
        """EvoLink cannot cancel. The client stops waiting, and the next identical call gets the image."""
        await self._studio.remove_caller(await self._require_entry(ctx, params))
        return {}

    async def update(self, ctx: Request, params: TaskParams) -> dict[str, Any]:
        """Acknowledge, as the extension requires."""
        await self._require_entry(ctx, params)
        return {}

    def _declared(self, ctx: Request) -> bool:
        capabilities = ctx.session.client_capabilities
        return bool(capabilities and self.identifier in (capabilities.extensions or {}))

    async def _require_entry(self, ctx: Request, params: TaskParams) -> Entry:
        require_client_extension(ctx, self.identifier)
        entry = await self._entry(params.task_id)
        if entry is None:
            raise MCPError(INVALID_PARAMS, f"There is no task {harmless(params.task_id, 60)} here.")
        return entry

    async def _entry(self, task_id: Any) -> Entry | None:
        with suppress(JournalUnwritable):
            return await self._studio.entry(task_id) if is_task_id(task_id) else None
        return None

    def _task_out(self, entry: Entry) -> dict[str, Any]:
        progress = entry.task.progress if entry.task else None
        return {
            "taskId": entry.task_id,
            "status": "working",
            "statusMessage": f"{entry.status}{'' if progress is None else f' {progress:.0f} %'}",
            "createdAt": iso(entry.created_at),
            "lastUpdatedAt": iso(self._studio.now()),
            "ttlMs": None,
            "pollIntervalMs": POLL_INTERVAL_MS,
        }
