"""The gallery as a host finds it: listed, typed, bound to its tools, and in need of nothing from outside."""

from __future__ import annotations

import re

import anyio
import pytest
from conftest import World

from evolink_mcp.server.gallery import PAGE, gallery
from evolink_mcp.studio.schedule import USUAL_S

pytestmark = pytest.mark.anyio
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])
URI = "ui://evolink/gallery.html"
MIME = "text/html;profile=mcp-app"
BOUND = {"generate_image", "get_task"}
SIZE_MAX = 25_000


@ERAS
async def test_the_gallery_is_listed_and_read_under_the_type_that_hosts_render(world: World, mode: str) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            listed = {str(resource.uri): resource for resource in (await client.list_resources()).resources}
            (page,) = (await client.read_resource(URI)).contents
    assert listed[URI].mime_type == page.mime_type == MIME
    assert listed[URI].meta == page.meta == {"ui": {"prefersBorder": True}}
    assert page.text == PAGE.read_text(encoding="utf-8")


async def test_the_server_says_that_it_has_an_app(world: World) -> None:
    """Older protocol versions have no word for it: there the tools' own meta says it."""
    with anyio.fail_after(300):
        async with world.client() as client:
            extensions = client.server_capabilities.extensions
    assert "io.modelcontextprotocol/ui" in (extensions or {})


@ERAS
async def test_the_tools_that_make_pictures_are_bound_to_it_and_no_others(world: World, mode: str) -> None:
    """The flat key is what some hosts still read."""
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            tools = (await client.list_tools()).tools
    bound = {tool.name: tool.meta for tool in tools if tool.meta and "ui" in tool.meta}
    assert bound.keys() == BOUND
    for meta in bound.values():
        assert meta["ui"]["resourceUri"] == meta["ui/resourceUri"] == URI


async def test_the_picture_that_the_page_reads_is_the_saved_file(world: World) -> None:
    """What the page asks of its host, asked here of the server itself."""
    with anyio.fail_after(300):
        async with world.client() as client:
            answer = await client.call_tool("generate_image", {"prompt": "sim:fast a pond", "n": 2})
            for image, file in zip(answer.structured_content["images"], world.files, strict=True):
                (content,) = (await client.read_resource(image["resource_uri"])).contents
                assert content.mime_type == image["mime_type"]
                assert len(file.read_bytes()) == image["bytes"]


def test_the_page_is_small() -> None:
    assert PAGE.stat().st_size <= SIZE_MAX


def test_the_page_loads_nothing_from_outside() -> None:
    """Hosts block it, and it would tell a stranger when somebody looks at a picture."""
    page = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"'`)]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert all(value.startswith("#") for value in re.findall(r"""\b(?:src|href)=["']?([^"'\s>]*)""", page))
    for word in ("@import", "url(", "fetch(", "XMLHttpRequest", "WebSocket", "eval(", "innerHTML", "import("):
        assert word not in page


def test_the_page_calls_no_tool_that_costs() -> None:
    """It looks; only a person's message makes the model buy."""
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r'ask\("tools/call", \{ name: ([^,]+),', page) == ['"get_task"']
    assert page.count('ask("tools/call"') == 1


def test_the_page_is_not_read_before_a_host_asks_for_it() -> None:
    """A server starts as fast without it."""
    (binding,) = gallery().resources()
    assert PAGE.read_text(encoding="utf-8")[:200] not in repr(binding)


def test_the_page_expects_what_the_server_expects() -> None:
    (said,) = re.findall(r"const USUAL_S = (\{.*?\});", PAGE.read_text(encoding="utf-8"))
    assert {name: float(seconds) for name, seconds in re.findall(r"(\w+): (\d+)", said)} == USUAL_S
