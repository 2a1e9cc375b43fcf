"""The Skills extension: the list, one skill, and its file as a resource."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import pytest
from conftest import World
from mcp.client import Client
from mcp.shared.exceptions import MCPError
from mcp_types import Request as ProtocolRequest
from mcp_types import RequestParams
from pydantic import BaseModel, ConfigDict

from evolink_mcp.server.server import build_server
from evolink_mcp.tools.names import TOOL_NAMES

URI = "skill://evolink-images/SKILL.md"
SKILLS = "io.modelcontextprotocol/skills"

pytestmark = pytest.mark.anyio


class Params(RequestParams):
    model_config = ConfigDict(extra="allow")


class SkillRequest(ProtocolRequest[Params, str]):
    method: str
    params: Params


class AnyResult(BaseModel):
    model_config = ConfigDict(extra="allow")


async def ask(client: Client, method: str, **params: Any) -> dict[str, Any]:
    request = SkillRequest(method=method, params=Params(**params))
    result = await client.session.send_request(request, AnyResult)
    return result.model_dump(by_alias=True)


async def test_the_list_describes_the_file_of_the_skill(world: World) -> None:
    async with world.client() as client:
        assert client.server_capabilities.extensions[SKILLS] == {}
        result = await ask(client, "skills/list")
        (content,) = (await client.read_resource(URI)).contents
    (skill,) = result["skills"]
    data = content.text.encode()
    assert skill["uri"] == URI
    assert skill["resources"] == [
        {"uri": URI, "digest": f"sha256:{sha256(data).hexdigest()}", "size": len(data)},
    ]
    assert (result["resultType"], result["cacheScope"], content.mime_type) == ("complete", "private", "text/markdown")


async def test_one_skill_is_returned_by_its_address(world: World) -> None:
    async with world.client() as client:
        (skill,) = (await ask(client, "skills/list"))["skills"]
        assert (await ask(client, "skills/get", uri=URI))["skill"] == skill
        with pytest.raises(MCPError, match="There is no skill skill://other/") as refusal:
            await ask(client, "skills/get", uri="skill://other/SKILL.md")
    assert refusal.value.error.code == -32602


async def test_the_front_matter_is_that_of_the_file(world: World) -> None:
    yaml = pytest.importorskip("yaml")
    async with world.client() as client:
        (skill,) = (await ask(client, "skills/list"))["skills"]
        (content,) = (await client.read_resource(URI)).contents
    assert yaml.safe_load(content.text.split("---\n")[1]) == skill["frontmatter"]
    assert skill["frontmatter"]["name"] == "evolink-images"
    assert len(skill["frontmatter"]["description"]) <= 1024
    assert set(skill["frontmatter"]) <= {"name", "description", "license", "compatibility", "metadata", "allowed-tools"}


async def test_the_skill_names_only_tools_of_this_server(world: World) -> None:
    async with world.client() as client:
        (content,) = (await client.read_resource(URI)).contents
    assert {word for word in TOOL_NAMES if f"`{word}`" in content.text} == set(TOOL_NAMES)


async def test_a_server_that_cannot_buy_has_no_skill(world: World) -> None:
    async with Client(build_server(world.studio, published=["list_tasks"])) as client:
        assert SKILLS not in (client.server_capabilities.extensions or {})
        assert URI not in {str(resource.uri) for resource in (await client.list_resources()).resources}


async def test_an_older_client_reads_the_skill_as_a_resource(world: World) -> None:
    async with Client(build_server(world.studio), mode="legacy") as client:
        with pytest.raises(MCPError, match="Method not found"):
            await ask(client, "skills/list")
        (content,) = (await client.read_resource(URI)).contents
    assert content.text.startswith("---\nname: evolink-images\n")
