"""The gallery page: its listing, type and tools, and that it loads nothing from other origins."""

from __future__ import annotations

import json
import re
from pathlib import Path

import anyio
import pytest
from conftest import World

import evolink_mcp
from evolink_mcp.api.models import DEFAULT_MODEL, TYPICAL_S
from evolink_mcp.server.gallery import gallery, page_text

pytestmark = pytest.mark.anyio
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])
URI = "ui://evolink/gallery.html"
MIME = "text/html;profile=mcp-app"
GALLERY_TOOLS = {"generate_image", "get_task"}
SIZE_MAX = 28_000
PAGE = Path(evolink_mcp.__file__).parent / "server" / "gallery.html"


@ERAS
async def test_the_gallery_is_listed_and_read_with_the_type_that_hosts_render(world: World, mode: str) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            resources = {str(resource.uri): resource for resource in (await client.list_resources()).resources}
            (page,) = (await client.read_resource(URI)).contents
    assert resources[URI].mime_type == page.mime_type == MIME
    assert resources[URI].meta == page.meta == {"ui": {"prefersBorder": True}}
    assert page.text == page_text()


async def test_the_server_declares_the_ui_extension(world: World) -> None:
    """Older protocol versions have no such declaration. There the metadata of the tools names the page."""
    with anyio.fail_after(300):
        async with world.client() as client:
            extensions = client.server_capabilities.extensions
    assert "io.modelcontextprotocol/ui" in (extensions or {})


@ERAS
async def test_only_the_tools_with_pictures_name_the_gallery(world: World, mode: str) -> None:
    """Some hosts still read the flat key."""
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            tools = (await client.list_tools()).tools
    metas = {tool.name: tool.meta for tool in tools if tool.meta and "ui" in tool.meta}
    assert metas.keys() == GALLERY_TOOLS
    for meta in metas.values():
        assert meta["ui"]["resourceUri"] == meta["ui/resourceUri"] == URI


async def test_the_page_can_read_each_saved_image(world: World) -> None:
    """The page sends this request through its host. The test sends it to the server."""
    with anyio.fail_after(300):
        async with world.client() as client:
            answer = await client.call_tool("generate_image", {"prompt": "sim:fast a pond", "n": 2})
            for image, file in zip(answer.structured_content["images"], world.files, strict=True):
                (content,) = (await client.read_resource(image["resource_uri"])).contents
                assert content.mime_type == image["mime_type"]
                assert len(file.read_bytes()) == image["bytes"]


def test_the_page_is_small() -> None:
    assert PAGE.stat().st_size <= SIZE_MAX


def test_the_page_loads_nothing_from_other_origins() -> None:
    """Hosts block other origins, and a request would reveal that the user opened an image."""
    page = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"'`)]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert all(value.startswith("#") for value in re.findall(r"""\b(?:src|href)=["']?([^"'\s>]*)""", page))
    for word in ("@import", "url(", "fetch(", "XMLHttpRequest", "WebSocket", "eval(", "innerHTML", "import("):
        assert word not in page


def test_the_page_calls_only_get_task() -> None:
    """Only a message of the user makes the model buy."""
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r'ask\("tools/call", \{ name: ([^,]+),', page) == ['"get_task"']
    assert page.count('ask("tools/call"') == 1


def test_the_page_is_read_only_when_a_host_requests_it() -> None:
    """A read at the start would slow the start down."""
    (binding,) = gallery().resources()
    assert PAGE.read_text(encoding="utf-8")[:200] not in repr(binding)


def test_the_page_and_the_server_expect_the_same_durations() -> None:
    ((durations, quality),) = re.findall(r'const TYPICAL_S = (\{.+?\}), DEFAULT_QUALITY = "(\w+)";', page_text())
    assert json.loads(durations) == TYPICAL_S
    assert quality == DEFAULT_MODEL.default_quality
