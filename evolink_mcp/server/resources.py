"""Tasks, images and size tables as MCP resources: `evolink://tasks/…`, `evolink://images/…`, `evolink://sizes`.

A client can subscribe to a task and gets a notification for each new state. Protocol 2026-07-28 has
`subscriptions/listen` for this, older versions have `resources/subscribe`.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio.to_thread
from mcp.server.connection import Connection
from mcp.server.context import ServerRequestContext
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError
from mcp.server.subscriptions import ResourceUpdated
from mcp.shared.exceptions import MCPError
from mcp_types import INVALID_PARAMS, EmptyResult, SubscribeRequestParams, UnsubscribeRequestParams

from evolink_mcp.api import sizes
from evolink_mcp.api.task import is_task_id
from evolink_mcp.errors import EvolinkError, JournalUnwritable
from evolink_mcp.images.folders import open_plain
from evolink_mcp.images.inspect import sniff
from evolink_mcp.journal.entry import Entry
from evolink_mcp.sanitize import harmless, scrub
from evolink_mcp.studio.studio import Studio
from evolink_mcp.tools.task_answer import task_out

# TypeScript stdio clients close the connection on a message above 10 MiB; base64 adds a third.
IMAGE_MAX_BYTES = 7_000_000
TASK_URI = "evolink://tasks/"
SUBSCRIPTIONS_MAX = 1_000


def add_resources(server: MCPServer[Any], studio: Studio) -> None:
    """Publish the resources of one studio, and notify subscribers when a task changes."""

    @server.resource(
        "evolink://sizes",
        title="Size tables",
        mime_type="text/markdown",
        description="The pixels of each ratio and tier, by both size rules.",
    )
    def size_tables() -> str:
        parts = [
            f"## {rule}{' (in use)' if rule == studio.prices.current.rule else ''}\n\n{sizes.table(rule)}"
            for rule in sizes.RULES
        ]
        return "# Sizes of gpt-image-2\n\n" + "\n\n".join(parts) + "\n"

    @server.resource(
        "evolink://tasks/{task_id}",
        title="Task",
        mime_type="application/json",
        description="A task, as get_task returns it, without waiting.",
    )
    async def task(task_id: str) -> str:
        entry = await _entry(studio, task_id)
        if entry is None:
            raise ResourceNotFoundError(
                f"there is no task {harmless(task_id, 60)} here. get_task may find it at EvoLink."
            )
        visible = await studio.image_store.entry_for_caller(entry)
        answer = task_out(visible, has_other_key=studio.has_other_key(entry))
        return json.dumps(scrub(answer.model_dump(mode="json")), ensure_ascii=False)

    @server.resource(
        "evolink://images/{task_id}/{index}",
        title="Picture",
        mime_type="image/png",
        description="A saved picture in full size.",
    )
    async def image(task_id: str, index: str) -> bytes:
        entry = await _entry(studio, task_id)
        picture = next((p for p in entry.images if str(p.index) == index), None) if entry else None
        if entry is None or picture is None or not picture.is_saved:
            raise ResourceNotFoundError(
                f"task {harmless(task_id, 60)} has no saved picture {harmless(index, 20)}. Call get_task."
            )

        async def locations() -> str:
            answer = next(
                p for p in (await studio.image_store.entry_for_caller(entry)).images if p.index == picture.index
            )
            return " and ".join(filter(None, [answer.path, answer.url]))

        try:
            file = await studio.image_store.local_file(task_id, picture)
            size, data = await anyio.to_thread.run_sync(_read, file)
        # A client gets only the text of the SDK's own ResourceError.
        except EvolinkError as error:
            raise ResourceError(f"{error.message}. Locations: {await locations()}") from error
        except OSError as error:
            raise ResourceNotFoundError(
                f"the file cannot be read ({error.strerror or error}). Locations: {await locations()}"
            ) from error
        if size > IMAGE_MAX_BYTES:
            raise ResourceError(
                f"the picture has {size:,} bytes, too many for one message. Locations: {await locations()}"
            )
        # Another program can have replaced the file since it was saved.
        if sniff(data[:16]) is None:
            raise ResourceError(f"the file is not a picture any more. Locations: {await locations()}")
        return data

    _publish_changes(server, studio)


async def _entry(studio: Studio, task_id: str) -> Entry | None:
    try:
        return await studio.entry(task_id) if is_task_id(task_id) else None
    except JournalUnwritable as error:
        raise ResourceError(f"{error.message}. {error.advice}") from error


def _read(path: Path) -> tuple[int, bytes]:
    """Return size in bytes and content. The content is empty if it is larger than IMAGE_MAX_BYTES."""
    with open_plain(path) as file:
        # One byte more than the limit shows that the file is too large.
        data = file.read(IMAGE_MAX_BYTES + 1)
        return (len(data), data) if len(data) <= IMAGE_MAX_BYTES else (path.stat().st_size, b"")


# --- changes, in both protocol eras ------------------------------------------------------------------------


def _publish_changes(server: MCPServer[Any], studio: Studio) -> None:
    # mcp 2.3: the bus of MCPServer has no public name.
    bus = server._subscriptions  # pyright: ignore[reportPrivateUsage] - see above
    # mcp 2.3: only the low-level server can add a request handler.
    lowlevel = server._lowlevel_server  # pyright: ignore[reportPrivateUsage] - see above
    subscribers = _Subscribers()

    async def publish(task_id: str) -> None:
        uri = TASK_URI + task_id
        await bus.publish(ResourceUpdated(uri=uri))
        await subscribers.notify(uri)

    studio.subscribe(publish)
    lowlevel.add_request_handler("resources/subscribe", SubscribeRequestParams, subscribers.subscribe)
    lowlevel.add_request_handler("resources/unsubscribe", UnsubscribeRequestParams, subscribers.unsubscribe)


class _Subscribers:
    """The subscriptions of each open connection in the older protocol versions."""

    def __init__(self) -> None:
        self._uris: dict[Connection, set[str]] = {}

    async def subscribe(self, context: ServerRequestContext[Any, Any], params: SubscribeRequestParams) -> EmptyResult:
        uri = str(params.uri)
        if not re.match(r"evolink://(tasks/|images/|sizes$)", uri):
            raise MCPError(INVALID_PARAMS, f"there is no resource {harmless(uri, 80)}", {"uri": harmless(uri)})
        connection = _connection(context)
        # The SDK calls no handler when a connection ends. Only its exit stack runs then.
        if connection not in self._uris:
            connection.exit_stack.callback(self._uris.pop, connection, None)
        uris = self._uris.setdefault(connection, set())
        if len(uris) >= SUBSCRIPTIONS_MAX and uri not in uris:
            raise MCPError(
                INVALID_PARAMS, f"the limit of {SUBSCRIPTIONS_MAX} subscriptions is reached. Unsubscribe from some."
            )
        uris.add(uri)
        return EmptyResult()

    async def unsubscribe(
        self, context: ServerRequestContext[Any, Any], params: UnsubscribeRequestParams
    ) -> EmptyResult:
        self._uris.get(_connection(context), set()).discard(str(params.uri))
        return EmptyResult()

    async def notify(self, uri: str) -> None:
        # A connection may end while this loop waits.
        for connection, uris in list(self._uris.items()):
            if uri in uris:
                await connection.send_resource_updated(uri)


def _connection(context: ServerRequestContext[Any, Any]) -> Connection:
    # mcp 2.3: a session lasts for one request, and its connection has no public name.
    return context.session._connection  # pyright: ignore[reportPrivateUsage] - see above


class ResourceServer(MCPServer[Any]):
    """An MCPServer that answers each image with its own type. A resource template has one type for all."""

    async def read_resource(self, uri: Any, context: Context[Any, Any] | None = None) -> Any:
        """Return the SDK's answer, with each image's type taken from its bytes."""
        contents = await super().read_resource(uri, context)
        if not isinstance(contents, list):
            return contents
        return [
            replace(item, mime_type=kind[0])
            if isinstance(item.content, bytes) and (kind := sniff(item.content[:16]))
            else item
            for item in contents
        ]

    def streamable_http_app(self, **options: Any) -> Any:
        """Return the SDK's app. Without sessions it offers no `resources/subscribe`: it could not notify a client."""
        if options.get("stateless_http"):
            for method in ("resources/subscribe", "resources/unsubscribe"):
                # mcp 2.3: a handler can be added but not removed.
                self._lowlevel_server._request_handlers.pop(method, None)  # pyright: ignore[reportPrivateUsage] - see above
        return super().streamable_http_app(**options)
