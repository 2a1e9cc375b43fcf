"""derive_image for callers on other machines: no file of the server is read or named, and the object store has the files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from drawings import drawing
from PIL import Image
from team_server import ANNA, BERT, open_team_server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
REQUEST = {
    "prompt": "sim:fast a fox",
    "size": "1024x640",
    "callback_url": "https://hooks.evolink-team.dev/x",
}
PUBLIC = {"EVOLINK_MCP_PUBLIC_URL": "https://pictures.example.org", "EVOLINK_MCP_SECRET": "s" * 32}


@pytest.fixture
def store_settings(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "store").mkdir()
    return {**PUBLIC, "EVOLINK_MCP_STORE": str(tmp_path / "store")}


async def buy(client: Any, **arguments: Any) -> str:
    return (await client.call_tool("generate_image", {**REQUEST, **arguments})).structured_content["task_id"]


async def test_a_local_file_is_refused(tmp_path: Path, store_settings: dict[str, str]) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "mine.png").write_bytes(drawing())
    async with open_team_server(tmp_path, ANNA, **store_settings) as server, server.client("a") as client:
        answer = await client.call_tool(
            "derive_image", {"source": str(tmp_path / "pictures" / "mine.png"), "targets": ["8x8"]}
        )
    assert answer.is_error
    assert "does not read its files for remote callers" in answer.content[0].text


async def test_without_an_object_store_the_call_is_refused_with_the_next_step(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, ANNA) as server, server.client("a") as client:
        task_id = await buy(client)
        answer = await client.call_tool("derive_image", {"source": task_id, "targets": ["og"]})
    assert answer.is_error
    assert "keeps no files for callers on other machines" in answer.content[0].text
    assert "Download the picture" in answer.content[0].text


async def test_the_object_store_gets_the_file_and_the_answer_its_link(
    tmp_path: Path, store_settings: dict[str, str]
) -> None:
    async with open_team_server(tmp_path, ANNA, **store_settings) as server, server.client("a") as client:
        task_id = await buy(client)
        answer = await client.call_tool("derive_image", {"source": task_id, "targets": ["og", "favicon"]})
        again = await client.call_tool("derive_image", {"source": task_id, "targets": ["og", "favicon"]})
        file, icon = answer.structured_content["files"]
        async with server.http(host="pictures.example.org") as http:
            image = await http.get(file["url"].removeprefix("https://pictures.example.org"))
    assert not answer.is_error, answer.content[0].text
    with Image.open(io.BytesIO(image.content)) as opened:
        assert opened.size == (1200, 630)
    assert file["path"] is None
    assert file["markdown"].endswith(f"({file['url']})")
    assert icon["mime_type"] == "image/x-icon"
    assert str(tmp_path) not in answer.model_dump_json()
    assert answer.structured_content["source"] == f"evolink://images/{task_id}/0"
    assert [file["sha256"] for file in again.structured_content["files"]] == [file["sha256"], icon["sha256"]]


async def test_another_tenant_cannot_derive_from_the_picture(tmp_path: Path, store_settings: dict[str, str]) -> None:
    async with open_team_server(tmp_path, ANNA, BERT, **store_settings) as server:
        async with server.client("a") as client:
            task_id = await buy(client)
        async with server.client("b") as client:
            answer = await client.call_tool("derive_image", {"source": task_id, "targets": ["og"]})
            last = await client.call_tool("derive_image", {"source": "last", "targets": ["og"]})
    assert answer.is_error
    assert last.is_error


async def test_fit_delivers_a_link_to_the_exact_copy(tmp_path: Path, store_settings: dict[str, str]) -> None:
    arguments = {"prompt": "sim:fast a fox", "fit": "1200x628", "callback_url": REQUEST["callback_url"]}
    async with open_team_server(tmp_path, ANNA, **store_settings) as server, server.client("a") as client:
        answer = await client.call_tool("generate_image", arguments)
    (note,) = [note for note in answer.structured_content["notes"] if "1200x628 image/png" in note]
    assert "https://pictures.example.org/" in note
    assert str(tmp_path) not in answer.model_dump_json()
