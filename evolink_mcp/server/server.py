"""Build the MCP server of one studio: tools, resources, prompts and extensions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, cast

from mcp.server.caching import CacheHint
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.request_state import RequestStateSecurity
from mcp.server.subscriptions import InMemorySubscriptionBus
from mcp.shared.exceptions import MCPError

from evolink_mcp import __version__
from evolink_mcp.sanitize import harmless
from evolink_mcp.server.catalogue import NAME, TITLE
from evolink_mcp.server.gallery import gallery
from evolink_mcp.server.prompts import add_completions, add_prompts
from evolink_mcp.server.resources import ResourceServer, add_resources
from evolink_mcp.server.skills_extension import Skills
from evolink_mcp.server.tasks_extension import Tasks
from evolink_mcp.studio.studio import Studio
from evolink_mcp.tools.compute_size import RULE_FRESH_FOR_S, compute_size_tool
from evolink_mcp.tools.derive_image import derive_image_tool
from evolink_mcp.tools.generate_image import generate_image_tool
from evolink_mcp.tools.generate_images import generate_images_tool
from evolink_mcp.tools.get_balance import get_balance_tool
from evolink_mcp.tools.get_task import get_task_tool
from evolink_mcp.tools.hosts import HOSTS, Hosts
from evolink_mcp.tools.list_tasks import list_tasks_tool
from evolink_mcp.tools.names import TOOL_NAMES
from evolink_mcp.tools.view_image import view_image_tool
from evolink_mcp.tools.waiting import Waiting

# Claude Code cuts instructions after 2,048 characters.
INSTRUCTIONS = (
    "Makes and edits pictures with EvoLink's gpt-image-2. generate_image is paid and does everything in one call. If it "
    "answers before the picture is ready, call get_task with the task_id of the answer. Never call generate_image again "
    "for the same picture. generate_images makes up to 10 different pictures in one call. compute_size returns pixels and "
    "price before you buy, free of charge. derive_image makes exact sizes, icons and prints of a picture, free of charge. "
    "After an unknown outcome or a lost id, call list_tasks before you buy again. Show the user the path of every saved "
    "picture."
)
WITHOUT_BUYING = (
    "Shows pictures from EvoLink's gpt-image-2, and computes sizes and prices. This server has no tool that buys: its "
    "owner switched off generate_image (EVOLINK_MCP_TOOLS)."
)
# Without a hint, clients of 2026-07-28 read the lists again for each use. A new tokens file can change the tools of a tenant.
LISTS_LIVE_MS = 300_000
# A token can restrict the tools of its tenant, so a cache that several tenants share must not keep these lists.
CACHED_LISTS = ("tools/list", "prompts/list", "resources/templates/list")
INVALID_PARAMS = -32602
TRACE_CONTEXT = ("traceparent", "tracestate", "baggage")


class Server(ResourceServer):
    """An MCPServer that answers an unknown prompt or argument as invalid params. The SDK answers an internal error."""

    async def get_prompt(
        self, name: str, arguments: dict[str, Any] | None = None, context: Context[Any, Any] | None = None
    ) -> Any:
        """Return the SDK's answer.

        Raises:
            MCPError: the prompt is unknown, or an argument is missing (-32602).
        """
        prompts = {prompt.name: prompt for prompt in await self.list_prompts()}
        if name not in prompts:
            raise MCPError(INVALID_PARAMS, f"There is no prompt {harmless(name, 60)}, only {', '.join(prompts)}.")
        required = [argument.name for argument in prompts[name].arguments or () if argument.required]
        missing = [argument for argument in required if argument not in (arguments or {})]
        if missing:
            raise MCPError(INVALID_PARAMS, f"The prompt {name} needs {' and '.join(missing)}.")
        return await super().get_prompt(name, arguments, context)


def build_server(
    studio: Studio,
    *,
    wait_s: float | None = None,
    preview_edge: int | None = None,
    has_previews_for_all: bool = False,
    has_resource_links: bool = False,
    published: Collection[str] = TOOL_NAMES,
    secrets: Sequence[str] | None = None,
    hosts: Hosts = HOSTS,
    rule_fresh_for_s: float = RULE_FRESH_FOR_S,
) -> MCPServer[Any]:
    """Return the server of `studio`. The caller opens and closes the studio.

    `wait_s`, `preview_edge`, `has_previews_for_all`, `has_resource_links` and `hosts` are those of `Waiting`. `published`
    names the published tools; without generate_image a client cannot buy. The first of the `secrets` encrypts the state that a
    client carries between requests. Servers with one of them accept it. Without secrets only this process accepts it.
    `rule_fresh_for_s`: compute_size reads the size rule from the journal at most once in this time.
    """
    waiting = Waiting(studio, wait_s, preview_edge, has_previews_for_all, has_resource_links, hosts)
    get_task = get_task_tool(waiting)
    tools = [
        generate_image_tool(waiting),
        generate_images_tool(waiting),
        get_task,
        compute_size_tool(studio, rule_fresh_for_s),
        view_image_tool(waiting),
        derive_image_tool(studio),
        list_tasks_tool(studio),
        get_balance_tool(studio),
    ]
    can_buy = "generate_image" in published
    server = Server(
        NAME,
        title=TITLE,
        version=__version__,
        instructions=INSTRUCTIONS if can_buy else WITHOUT_BUYING,
        tools=[tool for tool in tools if tool.name in published],
        extensions=[gallery(), Tasks(studio, get_task), *([Skills()] if can_buy else [])],
        # The SDK's default is INFO for the root logger.
        log_level="WARNING",
        subscriptions=InMemorySubscriptionBus(),
        # The audience identifies the profile, so that the state of one tenant is invalid for another.
        request_state_security=RequestStateSecurity(keys=list(secrets), audience=f"{NAME} {studio.journal.channel}")
        if secrets
        else None,
        cache_hints=dict.fromkeys(CACHED_LISTS, CacheHint(ttl_ms=LISTS_LIVE_MS, scope="private")),
    )
    # First, because the SDK's tracing is a middleware too.
    server.middleware.insert(0, drop_malformed_trace_context)
    add_resources(server, studio)
    add_completions(server, studio)
    if can_buy:
        add_prompts(server)
    return server


async def drop_malformed_trace_context(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
    """Remove trace headers from `_meta` that are not text: the SDK's tracing would end the request with a traceback."""
    meta = cast("dict[str, Any]", ctx.meta or {})
    malformed = [name for name in TRACE_CONTEXT if not isinstance(meta.get(name, ""), str)]
    if malformed:
        wellformed: Any = {name: value for name, value in meta.items() if name not in malformed}
        ctx = replace(ctx, meta=wellformed)
    return await call_next(ctx)


async def serve_streams(server: MCPServer[Any], read: Any, write: Any) -> None:
    """Serve one client over a pair of message streams of the SDK until `read` ends."""
    # mcp 2.3: MCPServer runs only over its own stdio streams. Its low-level server accepts other streams.
    lowlevel = server._lowlevel_server  # pyright: ignore[reportPrivateUsage] - see above
    await lowlevel.run(read, write, lowlevel.create_initialization_options())
