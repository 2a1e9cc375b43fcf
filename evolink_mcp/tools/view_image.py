"""view_image: a small copy of a saved image, for the model."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp_types import CallToolResult
from pydantic import Field, Strict

from evolink_mcp.api.request import IMAGES_MAX, WHOLE, Arguments, TaskId
from evolink_mcp.errors import EvolinkError, Refused
from evolink_mcp.images.previews import PREVIEW_EDGE_MAX, PREVIEW_EDGE_MIN
from evolink_mcp.tools.adapter import READS, flat_tool, result
from evolink_mcp.tools.previews import picture_block
from evolink_mcp.tools.task_answer import task_out
from evolink_mcp.tools.task_text import sentence
from evolink_mcp.tools.waiting import Waiting, follow

VIEW_EDGE = 1024


class ViewImageArguments(Arguments):
    """The arguments of view_image."""

    task_id: TaskId
    index: Annotated[int, Strict(), Field(ge=0, lt=IMAGES_MAX, description="Index of the picture, from 0."), WHOLE] = 0
    max_edge: Annotated[
        int, Strict(), Field(ge=PREVIEW_EDGE_MIN, le=PREVIEW_EDGE_MAX, description="Longest edge in pixels."), WHOLE
    ] = VIEW_EDGE


def view_image_tool(waiting: Waiting) -> Tool:
    """Return the tool."""

    async def view_image(req: ViewImageArguments, ctx: Context[Any, Any]) -> CallToolResult:
        """Look at a saved picture: returns a small copy. Free of charge."""
        host = waiting.host_of(ctx)
        job = await waiting.studio.resume(req.task_id)
        await follow(job, waiting.wait_for(host), ctx.report_progress)
        picture = next((p for p in job.entry.images if p.index == req.index), None)
        entry = await waiting.studio.image_store.entry_for_caller(job.entry)
        if picture is None or not picture.is_saved:
            out = task_out(entry, problem=job.problem)
            raise Refused(
                f"task {req.task_id} has no saved picture {req.index} (status {out.status}, {len(out.images)} pictures)",
                code="no_such_picture",
                charged=out.charged,
                advice="Call get_task with this id. Indexes start at 0.",
            )
        block = None
        with suppress(OSError):
            file = await waiting.studio.image_store.local_file(req.task_id, picture)
            block = await picture_block(file, req.max_edge, host.answer_max, waiting.studio.image_store.decoder)
        place = next(p.path or "get_task returns its link" for p in entry.images if p.index == req.index)
        if block is None:
            raise Refused(
                f"the preview could not be made ({place})",
                code="no_preview",
                charged=job.entry.charged,
                advice="The file may be moved or deleted. Call get_task.",
            )
        line = f"Picture {req.index} of {req.task_id}: {picture.width}×{picture.height} pixels, {place}"
        answer = result(line, None)
        return answer.model_copy(update={"content": [block, *answer.content]})  # some clients show only the first block

    return flat_tool(view_image, ViewImageArguments, None, _format_error, title="View image", annotations=READS)


def _format_error(error: EvolinkError, _: tuple[str, ...]) -> CallToolResult:
    return result(f"{sentence(error.message)} This call was free of charge. {error.advice}", None, is_error=True)
