"""The gallery as an MCP App: one page that hosts show beside generate_image and get_task.

It is an addition: every answer is whole without it.
"""

from __future__ import annotations

from pathlib import Path

from mcp.server.apps import APP_MIME_TYPE, Apps
from mcp.server.mcpserver.resources import FileResource

from evolink_mcp.tools.previews import GALLERY_URI

PAGE = Path(__file__).with_name("gallery.html")


def gallery() -> Apps:
    """The extension with its one page, read from disk when a host asks for it.

    It asks for no outside origin and no permission: pictures come through the host as `resources/read`, which every
    host's default policy lets it show.
    """
    apps = Apps()
    apps.add_resource(
        FileResource(
            uri=GALLERY_URI,
            name="gallery",
            title="Picture gallery",
            description="Shows a task's progress and its pictures in the chat.",
            mime_type=APP_MIME_TYPE,
            meta={"ui": {"prefersBorder": True}},
            path=PAGE,
        )
    )
    return apps
