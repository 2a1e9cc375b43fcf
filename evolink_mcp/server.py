"""The faces of one studio on one MCP server."""

from __future__ import annotations

from typing import Any

from mcp.server.caching import CacheHint
from mcp.server.mcpserver import MCPServer
from mcp.server.subscriptions import InMemorySubscriptionBus
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from evolink_mcp import __version__
from evolink_mcp.gallery import gallery
from evolink_mcp.prompts import add_prompts
from evolink_mcp.resources import ResourceServer, add_resources
from evolink_mcp.studio import Studio
from evolink_mcp.tasks_extension import Tasks
from evolink_mcp.tools import Tools

NAME = "evolink-mcp"
INSTRUCTIONS = (
    "Makes and edits pictures with EvoLink's gpt-image-2. generate_image is paid and does everything in one call; if it "
    "answers before the picture is ready, call get_task with the task_id it names, and never generate_image again for "
    "the same picture. compute_size tells pixels and price beforehand, free of charge. After an unknown outcome or a "
    "lost id, call list_tasks before buying again. Show the user the path of every saved picture."
)
DAY_MS = 86_400_000


def build_server(
    studio: Studio,
    *,
    wait_s: float | None = None,
    preview_edge: int | None = None,
    resource_links: bool = False,
) -> MCPServer[Any]:
    """Tools, resources and prompts over `studio`, which is opened and closed by the caller."""
    tools = Tools(studio, wait_s=wait_s, preview_edge=preview_edge, resource_links=resource_links).all()
    get_task = next(tool for tool in tools if tool.name == "get_task")
    server = ResourceServer(
        NAME,
        title="EvoLink Images",
        version=__version__,
        instructions=INSTRUCTIONS,
        tools=tools,
        extensions=[gallery(), Tasks(studio, get_task)],
        log_level="WARNING",
        subscriptions=InMemorySubscriptionBus(),
        cache_hints={
            "tools/list": CacheHint(ttl_ms=DAY_MS, scope="public"),
            "prompts/list": CacheHint(ttl_ms=DAY_MS, scope="public"),
            "resources/templates/list": CacheHint(ttl_ms=DAY_MS, scope="public"),
        },
    )
    add_resources(server, studio)
    add_prompts(server, studio)

    @server.custom_route("/healthz", methods=["GET"])
    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok", "name": NAME, "version": __version__})

    return server
