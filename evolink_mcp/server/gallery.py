"""The gallery, an MCP App: a page that hosts show beside the answers of generate_image and get_task.

It is optional: every answer is complete without it.
"""

from __future__ import annotations

from pathlib import Path

from mcp.server.apps import APP_MIME_TYPE, Apps
from mcp.server.mcpserver.resources import FileResource

from evolink_mcp.tools.previews import GALLERY_URI

PAGE = Path(__file__).with_name("gallery.html")


def gallery() -> Apps:
    """Return the extension with its page. The page is read from disk at each request.

    The page needs no external origin and no permission. It reads images through the host with `resources/read`, and
    every host's default policy allows it to show them.
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
