"""Content beside the text of an answer: previews within the host's limit, resource links, the gallery page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mcp_types import ImageContent, ResourceLink

from evolink_mcp.errors import DecoderUnavailable
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.images.folders import open_plain
from evolink_mcp.images.previews import edge_of
from evolink_mcp.images.unusable import UnusableImage
from evolink_mcp.tools.task_answer import ImageOut, TaskOut

GALLERY_URI = "ui://evolink/gallery.html"
# This metadata of a tool makes a host show the gallery with its answers. Some hosts still read the flat key.
GALLERY_META: dict[str, Any] = {"ui": {"resourceUri": GALLERY_URI}, "ui/resourceUri": GALLERY_URI}

PREVIEW_MIN_CHARS = 20_000


async def previews(saved: Sequence[Path], longest_edge: int | None, room: int, decoder: Decoder) -> list[ImageContent]:
    """Return the previews that fit into `room` characters. A failed preview is not an error.

    `saved` are the local files of the images. `longest_edge` is in pixels: None chooses it by the number of images, 0
    returns no preview.
    """
    if longest_edge == 0 or not saved:
        return []
    edge = edge_of(len(saved), longest_edge)
    blocks: list[ImageContent] = []
    for path in saved:
        if room < PREVIEW_MIN_CHARS:
            break
        if (block := await picture_block(path, edge, room, decoder)) is not None:
            room -= len(block.data)
            blocks.append(block)
    return blocks


async def picture_block(path: Path, edge: int, chars_max: int, decoder: Decoder) -> ImageContent | None:
    """Return a small copy of the image at `path` with at most `chars_max` characters of base64; None if that fails."""
    # base64 makes 4 characters of 3 bytes.
    budget = chars_max * 3 // 4
    with suppress(OSError, UnusableImage, DecoderUnavailable):
        data = decoder.previews.find(path, edge)
        # The decoder keeps recent previews, so a second answer about an image needs no decoder process.
        if data is None or len(data) > budget:
            with open_plain(path) as file:
                data = await decoder.preview(file, edge=edge, budget=budget, order=path.name)
        if data is not None:
            return ImageContent(type="image", data=base64.b64encode(data).decode(), mime_type="image/webp")
    return None


def links(out: TaskOut) -> list[ResourceLink]:
    """Return a resource_link for each saved picture. Off by default: several hosts fail the whole call on a link."""
    return [
        ResourceLink(type="resource_link", uri=image.resource_uri, name=_file_name(image), mime_type=image.mime_type)
        for image in out.images
        if image.resource_uri
    ]


def _file_name(image: ImageOut) -> str:
    return Path(image.path or urlsplit(image.url or "").path).name or f"picture {image.index}"
