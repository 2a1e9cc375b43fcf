"""view_image: a small copy of a saved image, for the model."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any, Self

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp_types import CallToolResult, ImageContent
from pydantic import Field, Strict, model_validator

from evolink_mcp.api.request import IMAGES_MAX, URL_MAX_CHARS, WHOLE, Arguments, KnownTask, OrNull
from evolink_mcp.errors import Charged, EvolinkError, Refused
from evolink_mcp.images.folders import PATH_MAX_CHARS
from evolink_mcp.images.previews import PREVIEW_EDGE_MAX, PREVIEW_EDGE_MIN
from evolink_mcp.sanitize import harmless
from evolink_mcp.tools.adapter import READS, flat_tool, result
from evolink_mcp.tools.hosts import Host
from evolink_mcp.tools.previews import picture_block
from evolink_mcp.tools.task_answer import task_out
from evolink_mcp.tools.task_text import sentence
from evolink_mcp.tools.waiting import Waiting, follow

VIEW_EDGE_PIXELS = 1024


class ViewImageArguments(Arguments):
    """The arguments of view_image."""

    task_id: KnownTask | OrNull = None
    index: Annotated[int, Strict(), Field(ge=0, lt=IMAGES_MAX, description="Index of the picture, from 0."), WHOLE] = 0
    max_edge: Annotated[
        int, Strict(), Field(ge=PREVIEW_EDGE_MIN, le=PREVIEW_EDGE_MAX, description="Longest edge in pixels."), WHOLE
    ] = VIEW_EDGE_PIXELS
    path: Annotated[
        str | OrNull, Field(max_length=URL_MAX_CHARS, description="File in an allowed folder, instead of task_id.")
    ] = None

    @model_validator(mode="after")
    def _one_picture(self) -> Self:
        if self.task_id is None and self.path is None:
            raise ValueError("give task_id or path")
        return self


def view_image_tool(waiting: Waiting) -> Tool:
    """Return the tool."""
    studio = waiting.studio

    async def view_image(req: ViewImageArguments, ctx: Context[Any, Any]) -> CallToolResult:
        """Look at a saved picture: returns a small copy. Free of charge."""
        host = waiting.host_of(ctx)
        with waiting.call(ctx) as ends_at:
            match = await studio.known_images.find(req.task_id or req.path or "")
            if match is None and req.task_id is None and req.path is not None:
                return await view_file(req.path, req.max_edge, host)
            match = match or await studio.known_images.find_task(req.task_id or "")
            task_id = match.task_id
            job = await studio.resume(task_id)
        index = req.index if match.index is None else match.index
        await follow(job, ends_at, ctx.report_progress)
        picture = next((p for p in job.entry.images if p.index == index), None)
        entry = await studio.image_store.entry_for_caller(job.entry)
        if picture is None or not picture.is_saved:
            out = task_out(entry, problem=job.problem)
            raise Refused(
                f"task {task_id} has no saved picture {index} (status {out.status}, {len(out.images)} pictures)",
                code="no_such_picture",
                charged=out.charged,
                advice="Call get_task with this id. Indexes start at 0.",
            )
        block = None
        # A missing file becomes the error below, which names the next step.
        with suppress(OSError):
            file = await studio.image_store.local_file(task_id, picture)
            block = await picture_block(file, req.max_edge, host.answer_max, studio.image_store.decoder)
        place = next(p.path or "get_task returns its link" for p in entry.images if p.index == index)
        if block is None:
            raise _no_preview(place, job.entry.charged)
        line = f"Picture {index} of {task_id}: {picture.width}×{picture.height} pixels, {place}"
        return _image_first(block, line)

    async def view_file(path: str, max_edge: int, host: Host) -> CallToolResult:
        """Return an image of an allowed folder that is no known result, for example a derived one."""
        file = studio.references.readable_file(path)
        block = await picture_block(file, max_edge, host.answer_max, studio.image_store.decoder)
        if block is None:
            raise _no_preview(str(file), "no")
        return _image_first(block, f"Picture {harmless(file, PATH_MAX_CHARS)}")

    # Codex and opencode drop images beside structured content, so this tool has no output schema.
    return flat_tool(view_image, ViewImageArguments, None, _format_error, title="View image", annotations=READS)


def _image_first(block: ImageContent, line: str) -> CallToolResult:
    answer = result(line, None)
    return answer.model_copy(update={"content": [block, *answer.content]})  # some clients show only the first block


def _no_preview(place: str, charged: Charged) -> Refused:
    return Refused(
        f"the preview could not be made ({place})",
        code="no_preview",
        charged=charged,
        advice="The file may be moved or deleted. Call get_task.",
    )


def _format_error(error: EvolinkError, _: tuple[str, ...]) -> CallToolResult:
    return result(f"{sentence(error.message)} This call was free of charge. {error.advice}", None, is_error=True)
