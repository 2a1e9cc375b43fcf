"""The gallery, an MCP App: a page that hosts show beside the answers of generate_image and get_task.

It is optional: every answer is complete without it.
"""

from __future__ import annotations

import json
from pathlib import Path

from mcp.server.apps import APP_MIME_TYPE, Apps
from mcp.server.mcpserver.resources import FunctionResource

from evolink_mcp.api.models import DEFAULT_MODEL, TYPICAL_S
from evolink_mcp.tools.previews import GALLERY_URI

PAGE = Path(__file__).with_name("gallery.html")
# The page contains exactly this text.
CONSTANTS = 'TYPICAL_S = {}, DEFAULT_QUALITY = ""'


def page_text() -> str:
    """Return the page with the typical durations of the default model in seconds."""
    values = {"TYPICAL_S": TYPICAL_S, "DEFAULT_QUALITY": DEFAULT_MODEL.default_quality}
    constants = ", ".join(f"{name} = {json.dumps(value)}" for name, value in values.items())
    return PAGE.read_text(encoding="utf-8").replace(CONSTANTS, constants)


def gallery() -> Apps:
    """Return the extension with its page. The page is read from disk at each request.

    The page needs no external origin and no permission. It reads images through the host with `resources/read`, and
    every host's default policy allows it to show them.
    """
    apps = Apps()
    apps.add_resource(
        FunctionResource(
            uri=GALLERY_URI,
            name="gallery",
            title="Picture gallery",
            description="Shows a task's progress and its pictures in the chat.",
            mime_type=APP_MIME_TYPE,
            meta={"ui": {"prefersBorder": True}},
            fn=page_text,
        )
    )
    return apps
