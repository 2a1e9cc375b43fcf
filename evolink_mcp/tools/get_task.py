"""get_task: wait for a task and return its images."""

from __future__ import annotations

from typing import Any

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp_types import CallToolResult

from evolink_mcp.api.request import Arguments, KnownTask, OrNull
from evolink_mcp.sanitize import quoted
from evolink_mcp.tools.adapter import READS, flat_tool
from evolink_mcp.tools.previews import GALLERY_META
from evolink_mcp.tools.task_answer import TaskOut
from evolink_mcp.tools.waiting import Waiting, WaitSeconds, format_task_error


class GetTaskArguments(Arguments):
    """The arguments of get_task."""

    task_id: KnownTask
    wait_seconds: WaitSeconds | OrNull = None


def get_task_tool(waiting: Waiting) -> Tool:
    """Return the tool."""

    async def get_task(req: GetTaskArguments, ctx: Context[Any, Any]) -> CallToolResult:
        """Wait for a task and get its pictures. Free of charge. Works after a restart, and for tasks of other clients
        with the same key. If the wait ends first, call it again."""
        with waiting.call(ctx, req.wait_seconds) as ends_at:
            task_id = await waiting.studio.known_images.find_task_id(req.task_id)
            # Before `resume`, which records the task in the profile of this server.
            profile = await waiting.studio.other_profile_of(task_id)
            job = await waiting.studio.resume(task_id)
        notes = [] if profile is None else [f"The profile {quoted(profile, 100)} of this journal bought this task."]
        return await waiting.answer(job, ends_at, ctx, notes)

    return flat_tool(
        get_task, GetTaskArguments, TaskOut, format_task_error, title="Get task", annotations=READS, meta=GALLERY_META
    )
