"""Tasks, pictures and size tables as MCP resources: `evolink://tasks/…`, `evolink://images/…`, `evolink://sizes`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError

from evolink_mcp import answers, sizes
from evolink_mcp.images import sniff
from evolink_mcp.quoting import harmless, scrub
from evolink_mcp.studio import Studio
from evolink_mcp.tasks import is_task_id

# TypeScript stdio clients close on messages above 10 MiB; base64 adds a third.
IMAGE_MAX_BYTES = 7_000_000


def add_resources(server: MCPServer[Any], studio: Studio) -> None:
    """Publish the three kinds of resources of one studio."""

    @server.resource("evolink://sizes", title="Size tables", mime_type="text/markdown",
                     description="All ratio and tier combinations in pixels, by both rules.")  # fmt: skip
    def size_tables() -> str:
        parts = [
            f"## {rule}{' (in use)' if rule == studio.rule else ''}\n\n{sizes.table(rule)}" for rule in sizes.RULES
        ]
        return "# Sizes of gpt-image-2\n\n" + "\n\n".join(parts) + "\n"

    @server.resource("evolink://tasks/{task_id}", title="Task", mime_type="application/json",
                     description="What is known of a task, as get_task answers it, without waiting.")  # fmt: skip
    def task(task_id: str) -> str:
        entry = studio.journal.by_task(task_id) if is_task_id(task_id) else None
        if entry is None:
            raise ResourceNotFoundError(
                f"there is no task {harmless(task_id, 60)} here; get_task may find it at EvoLink"
            )
        return json.dumps(scrub(answers.task_out(entry, rule=studio.rule).model_dump(mode="json")), ensure_ascii=False)

    @server.resource("evolink://images/{task_id}/{index}", title="Picture", mime_type="image/png",
                     description="A saved picture in full.")  # fmt: skip
    def image(task_id: str, index: int) -> bytes:
        entry = studio.journal.by_task(task_id) if is_task_id(task_id) else None
        picture = next((p for p in entry.pictures if p.index == index), None) if entry else None
        if picture is None or picture.path is None:
            raise ResourceNotFoundError(f"there is no saved picture {index} of {harmless(task_id, 60)}; call get_task")
        path = Path(picture.path)
        try:
            size = path.stat().st_size
            if size > IMAGE_MAX_BYTES:
                raise ResourceError(
                    f"the picture has {size:,} bytes, too many for one message; it is at {path} and {picture.url}"
                )
            return path.read_bytes()
        except OSError as error:
            raise ResourceNotFoundError(f"the file {path} is gone ({error.strerror}); {picture.url}") from error


class ResourceServer(MCPServer[Any]):
    """An MCPServer that tells every picture's own type: a template has room for one only."""

    async def read_resource(self, uri: Any, context: Context[Any, Any] | None = None) -> Any:
        contents = await super().read_resource(uri, context)
        if not isinstance(contents, list):
            return contents
        return [
            replace(item, mime_type=known[0])
            if isinstance(item.content, bytes) and (known := sniff(item.content[:16]))
            else item
            for item in contents
        ]
