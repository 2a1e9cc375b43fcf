"""Images of remote callers: no path of the server, lasting links, an unusable store, and uploads."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from child_processes import without_coverage
from conftest import PlainSimulator
from team_server import ANNA, BERT, TeamServer, open_team_server

pytest.importorskip("obstore")

from drawings import drawing

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.task import Task
from evolink_mcp.errors import StoreUnusable
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.images.references import REFERENCE_MAX_BYTES
from evolink_mcp.journal.entry import Entry, ResultImage
from evolink_mcp.journal.sqlite import SqliteJournal
from evolink_mcp.teams.object_store import MARKER, Links, ObjectStore
from evolink_mcp.teams.remote_images import RemoteImageStore

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])
PNG = drawing()
# With a separate callback URL the server does not wait for a callback at its public URL.
REQUEST = {"prompt": "sim:fast a fox", "size": "1024x640", "callback_url": "https://hooks.evolink-team.dev/x"}
PUBLIC = {"EVOLINK_MCP_PUBLIC_URL": "https://pictures.example.org", "EVOLINK_MCP_SECRET": "s" * 32}


def facts(answer: Any) -> dict[str, Any]:
    return answer.structured_content


def forget_copies(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "data" / "copies")


async def fetch(server: TeamServer, url: str, **headers: str) -> httpx.Response:
    async with server.http(host="pictures.example.org", **headers) as http:
        return await http.get(url.removeprefix("https://pictures.example.org"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def store_settings(folder: Path) -> dict[str, str]:
    return {**PUBLIC, "EVOLINK_MCP_STORE": str(folder)}


# --- without an object store ---


@ERAS
async def test_no_answer_shows_a_path_of_the_server(tmp_path: Path, mode: str) -> None:
    async with open_team_server(tmp_path, ANNA) as server, server.client("a", mode) as client:
        purchase = await client.call_tool("generate_image", {**REQUEST, "save_as": "hero.png"})
        (image,) = facts(purchase)["images"]
        task = {"task_id": facts(purchase)["task_id"]}
        answers = [purchase] + [
            await client.call_tool(tool, arguments)
            for tool, arguments in (("get_task", task), ("view_image", task), ("list_tasks", {"detail": True}))
        ]
        resources = [
            await client.read_resource(uri) for uri in (image["resource_uri"], f"evolink://tasks/{task['task_id']}")
        ]
        refusal = await client.call_tool("generate_image", {**REQUEST, "save_as": "../hero.png"})
        local = await client.call_tool("generate_image", {**REQUEST, "image_urls": [str(tmp_path / "x.png")]})
    assert image["path"] is None
    assert image["url"].startswith("http://127.0.0.1:9/")
    assert image["markdown"].endswith(f"({image['url']})")
    assert (image["width"], image["height"], image["mime_type"]) == (1024, 640, "image/png")
    assert [block.type for block in answers[0].content] == ["text", "image"]
    assert "completed: 1 picture ready" in answers[0].content[0].text
    assert "save_as has no effect" in answers[0].content[0].text
    assert resources[0].contents[0].mime_type == "image/png"
    assert facts(refusal)["error"]["code"] == "folder_refused"
    assert "PUT the file to /uploads" in facts(local)["error"]["advice"]
    text = "".join(answer.model_dump_json() for answer in (*answers, *resources, refusal))
    assert str(tmp_path) not in text.replace(json.dumps(str(tmp_path / "x.png")), "")
    assert not (tmp_path / "pictures").exists()


async def test_an_image_in_a_local_folder_is_shown_without_its_path(tmp_path: Path, decoder: Decoder) -> None:
    (old := tmp_path / "fox.png").write_bytes(PNG)
    picture = ResultImage(0, "https://x.example/1.png", 2e9, path=str(old), sha256="0" * 64)
    entry = Entry("key", "", "submitted", 1.0, task=Task("task-unified-1-abcdefgh"), images=(picture,))
    journal = SqliteJournal(tmp_path / "data", "", profile="a1")
    image_store = RemoteImageStore(EvolinkClient(None), journal, None, tmp_path / "copies", decoder)
    assert (await image_store.entry_for_caller(entry)).images[0].path is None
    assert await image_store.local_file("task-unified-1-abcdefgh", picture) == old


async def test_a_server_without_a_local_copy_downloads_the_image_from_evolink(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, ANNA) as server, server.client("a") as client:
        purchase = facts(await client.call_tool("generate_image", REQUEST))
        forget_copies(tmp_path)
        view = await client.call_tool("view_image", {"task_id": purchase["task_id"]})
        forget_copies(tmp_path)
        repeat = await client.call_tool("get_task", {"task_id": purchase["task_id"]})
    assert [block.type for block in view.content] == ["image", "text"]
    assert [block.type for block in repeat.content] == ["text", "image"]


async def test_an_image_with_an_expired_link_is_reported_as_expired(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, ANNA) as server, server.client("a") as client:
        purchase = facts(await client.call_tool("generate_image", REQUEST))
        forget_copies(tmp_path)
        server.clock.shift_s = 25 * 3600
        view = await client.call_tool("view_image", {"task_id": purchase["task_id"]})
        with pytest.raises(Exception, match="link to it has ended"):
            await client.read_resource(purchase["images"][0]["resource_uri"])
    assert view.is_error


# --- a folder as the object store ---


@ERAS
async def test_a_stored_image_has_a_signed_link_that_needs_no_token(
    tmp_path: Path, folder: Path, store_settings: dict[str, str], mode: str
) -> None:
    async with open_team_server(tmp_path, ANNA, **store_settings) as server:
        purchase = facts(await server.call("a", "generate_image", mode, **REQUEST, save_as="heró.png"))
        (image,) = purchase["images"]
        picture = await fetch(server, image["url"])
        async with server.http(host="pictures.example.org") as http:
            head = await http.head(image["url"].removeprefix("https://pictures.example.org"))
        answers = [
            await fetch(server, image["url"].replace("/pictures/", "/pictures/9")),
            await fetch(server, image["url"].replace("her", "../her")),
            await fetch(server, "/pictures/"),
        ]
    (file,) = (path for path in folder.rglob("*.png") if path.is_file())
    assert file.name == "heró.png"
    assert (picture.status_code, picture.content) == (200, file.read_bytes())
    assert picture.headers["content-type"] == "image/png"
    assert "her%C3%B3.png" in picture.headers["content-disposition"]
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(image["bytes"]), b"")
    assert [answer.status_code for answer in answers] == [404, 404, 404]
    assert image["path"] is None
    assert "anna" not in image["url"]


async def test_a_stored_image_is_available_after_evolinks_link_expired(
    tmp_path: Path, store_settings: dict[str, str]
) -> None:
    async with open_team_server(tmp_path, ANNA, BERT, **store_settings) as server, server.client("a") as client:
        purchase = facts(await client.call_tool("generate_image", REQUEST))
        forget_copies(tmp_path)
        server.clock.shift_s = 48 * 3600
        read = await client.read_resource(purchase["images"][0]["resource_uri"])
        edit = {**REQUEST, "image_urls": [purchase["images"][0]["resource_uri"]]}
        other_task = facts(await server.call("b", "generate_image", **edit))
        own_task = facts(await client.call_tool("generate_image", edit))
    assert read.contents[0].mime_type == "image/png"
    assert other_task["error"]["code"] == "reference_refused"
    assert own_task["status"] == "completed"


async def test_a_store_that_fails_during_a_task_costs_no_image(
    tmp_path: Path, folder: Path, store_settings: dict[str, str]
) -> None:
    async with open_team_server(tmp_path, ANNA, **store_settings) as server, server.client("a") as client:
        server.simulator.duration_s = 3600
        purchase = facts(await client.call_tool("generate_image", {**REQUEST, "wait_seconds": 0}))
        folder.rename(tmp_path / "away")
        folder.write_text("no folder any more")
        for task in server.simulator.tasks.values():
            task.duration = 0
        failed = facts(await client.call_tool("get_task", {"task_id": purchase["task_id"]}))
        (image,) = failed["images"]
        folder.unlink()
        (tmp_path / "away").rename(folder)
        repeat = facts(await client.call_tool("get_task", {"task_id": purchase["task_id"]}))
        assert server.posts == 1
    assert image["error"] == "the folder for pictures has no marker file"
    assert failed["charged"] == "yes"
    assert image["url"].startswith("http://127.0.0.1:9/")
    assert str(folder) not in json.dumps(failed)
    assert repeat["images"][0]["url"].startswith("https://pictures.example.org/pictures/")


@pytest.mark.parametrize("state", ["unmounted", "gone", "another store"])
async def test_nothing_is_bought_and_nothing_is_stored_below_an_empty_mount_point(
    tmp_path: Path, folder: Path, store_settings: dict[str, str], state: str
) -> None:
    async with open_team_server(tmp_path, ANNA, BERT, **store_settings) as server, server.client("a") as client:
        purchase = facts(await client.call_tool("generate_image", REQUEST))
        folder.rename(tmp_path / "away")
        if state != "gone":
            folder.mkdir()
        if state == "another store":
            (folder / MARKER).write_text("0" * 32)
        answer = await client.call_tool("generate_image", {**REQUEST, "prompt": "A hen"})
        other = facts(await server.call("b", "generate_image", **{**REQUEST, "prompt": "A hen"}))
        derived = await client.call_tool("derive_image", {"source": purchase["task_id"], "targets": ["32x32"]})
        assert server.posts == 1
        assert [path.name for path in folder.glob("*")] == ([MARKER] if state == "another store" else [])
        shutil.rmtree(folder, ignore_errors=True)
        (tmp_path / "away").rename(folder)
        repeat = facts(await client.call_tool("generate_image", {**REQUEST, "prompt": "A hen"}))
        assert server.posts == 2
    assert answer.is_error
    assert derived.is_error
    for refusal in (facts(answer), other):
        assert (refusal["charged"], refusal["error"]["code"]) == ("no", "store_unusable")
        assert "must mount the folder of EVOLINK_MCP_STORE" in refusal["error"]["advice"]
        assert str(tmp_path) not in json.dumps(refusal)
    assert repeat["images"][0]["url"].startswith("https://pictures.example.org/pictures/")


@pytest.mark.parametrize("fault", ["no folder", "a folder as marker", "NUL bytes", "empty"])
async def test_a_first_order_that_cannot_write_the_marker_costs_nothing_and_the_next_one_works(
    tmp_path: Path, folder: Path, store_settings: dict[str, str], fault: str
) -> None:
    marker = folder / MARKER
    async with open_team_server(tmp_path, ANNA, **store_settings) as server, server.client("a") as client:
        if fault == "no folder":
            folder.rmdir()
        elif fault == "a folder as marker":
            marker.mkdir()
        else:
            marker.write_bytes(bytes(32) if fault == "NUL bytes" else b"")
        refusal = facts(await client.call_tool("generate_image", REQUEST))
        assert (refusal["charged"], refusal["error"]["code"]) == ("no", "store_unusable")
        assert "The picture is paid" not in refusal["error"]["advice"]
        assert server.posts == 0
        if fault == "no folder":
            folder.mkdir()
        elif fault == "a folder as marker":
            marker.rmdir()
        else:
            marker.unlink()
        purchase = facts(await client.call_tool("generate_image", REQUEST))
        assert purchase["images"][0]["url"].startswith("https://pictures.example.org/pictures/")
    assert len(marker.read_text().strip()) == 32
    assert [path.name for path in folder.glob(f"{MARKER}*")] == [MARKER]


async def test_servers_with_different_journals_agree_on_the_marker_of_a_new_folder(folder: Path) -> None:
    ids: list[str] = []

    async def mark() -> None:
        ids.append(await ObjectStore(str(folder), 24, Links("https://p.example.org", ["s" * 32])).ensure_marker())

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(mark)
    assert len(ids) == 20
    assert len(set(ids)) == 1


async def test_a_server_with_another_journal_uses_the_marker_of_the_store(
    tmp_path: Path, folder: Path, store_settings: dict[str, str]
) -> None:
    (folder / MARKER).write_text("f" * 32 + "\n")
    async with open_team_server(tmp_path, ANNA, **store_settings) as server, server.client("a") as client:
        for prompt in ("A fox", "A hen"):
            purchase = facts(await client.call_tool("generate_image", {**REQUEST, "prompt": prompt}))
            assert purchase["images"][0]["url"].startswith("https://pictures.example.org/pictures/")
    assert (folder / MARKER).read_text() == "f" * 32 + "\n"


async def test_a_link_expires_and_a_changed_link_is_invalid() -> None:
    links = Links("https://p.example.org/", ["s" * 32])
    path = links.to("a/task/fox.png", 1_000.0).removeprefix("https://p.example.org")
    assert links.read(path, 999.0) == "a/task/fox.png"
    assert links.read(path, 1_000.0) is None
    assert links.read(path.replace("1000", "2000"), 999.0) is None
    assert links.read(path.replace("fox", "ox"), 999.0) is None
    assert Links("https://p.example.org", ["t" * 32]).read(path, 999.0) is None
    for odd_path in ("", "/pictures/", "/pictures/1.2/3", "/pictures/" + "9" * 40, path + "\n"):
        assert links.read(odd_path, 0.0) is None


async def test_a_link_of_the_old_secret_stays_valid_while_both_are_set() -> None:
    address = "https://p.example.org"
    path = Links(address, ["old" * 11]).to("a/fox.png", 1_000.0).removeprefix(address)
    both_links = Links(address, ["new" * 11, "old" * 11])
    assert both_links.read(path, 999.0) == "a/fox.png"
    new_path = both_links.to("a/fox.png", 1_000.0).removeprefix(address)
    assert Links(address, ["new" * 11]).read(new_path, 999.0) == "a/fox.png"
    assert Links(address, ["new" * 11]).read(path, 999.0) is None


async def test_the_error_of_a_full_disk_shows_no_path(tmp_path: Path) -> None:
    async def pause(_: float) -> None:
        await anyio.sleep(0.01)

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "copies").write_text("no folder")
    async with open_team_server(tmp_path, ANNA, pause=pause) as server, server.client("a") as client:
        refusal = await client.call_tool("generate_image", REQUEST)
        assert (facts(refusal)["charged"], server.posts) == ("no", 0)
        (tmp_path / "data" / "copies").unlink()
        repeat = facts(await client.call_tool("generate_image", REQUEST))
        assert server.posts == 1
    text = refusal.model_dump_json()
    assert "this server's disk cannot take the picture now" in text
    assert str(tmp_path) not in text
    assert repeat["images"][0]["sha256"]


# --- S3 of a third-party server ---


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (
        (tmp_path / "moto.txt").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=without_coverage(os.environ)) as moto,
    ):
        try:
            with anyio.from_thread.start_blocking_portal() as portal:
                portal.call(_create_bucket, f"{address}/bucket")
            for name, value in {
                "AWS_ACCESS_KEY_ID": "one", "AWS_SECRET_ACCESS_KEY": "two", "AWS_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": address, "AWS_ALLOW_HTTP": "true",
            }.items():  # fmt: skip
                monkeypatch.setenv(name, value)
            yield address
        finally:
            moto.kill()


async def _create_bucket(bucket: str) -> None:
    async with httpx.AsyncClient() as http:
        with anyio.fail_after(300):
            while True:
                try:
                    answer = await http.put(bucket, content=b"")
                except httpx.ConnectError:
                    await anyio.sleep(0.1)
                else:
                    assert answer.status_code == 200
                    return


async def test_s3_stores_the_image_and_presigns_its_link(tmp_path: Path, bucket: str) -> None:
    async with (
        open_team_server(tmp_path, ANNA, EVOLINK_MCP_STORE="s3://bucket/team") as server,
        server.client("a") as client,
    ):
        purchase = facts(await client.call_tool("generate_image", REQUEST))
        (image,) = purchase["images"]
        async with httpx.AsyncClient() as http:
            picture = await http.get(image["url"])
            unsigned = await http.get(image["url"].partition("X-Amz-Expires")[0])
        forget_copies(tmp_path)
        server.clock.shift_s = 48 * 3600
        view = await client.call_tool("view_image", {"task_id": purchase["task_id"]})
    assert image["url"].startswith(f"{bucket}/bucket/team/")
    assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")
    assert len(picture.content) == image["bytes"]
    assert unsigned.status_code != 200 or b"<Error>" in unsigned.content or not unsigned.content.startswith(b"\x89PNG")
    assert view.content[0].type == "image"


async def test_a_missing_bucket_is_one_clear_error(tmp_path: Path, bucket: str) -> None:
    store = ObjectStore("s3://nobody", 24)
    file = tmp_path / "x.png"
    file.write_bytes(PNG)
    with pytest.raises(StoreUnusable, match="cannot be used") as error:
        await store.put("x.png", file, "image/png")
    assert "nobody" not in str(error.value)
    with pytest.raises(StoreUnusable):
        async with store.reading("x.png"):
            pass


# --- uploads ---


@ERAS
async def test_an_upload_is_a_reference_image_only_for_its_tenant(tmp_path: Path, mode: str) -> None:
    async with open_team_server(tmp_path, ANNA, BERT) as server:
        async with server.http("a") as http:
            answer = await http.put("/uploads", content=PNG)
            upload = answer.json()
        edit = {"prompt": "sim:fast bluer", "image_urls": [upload["uri"]]}
        own_task = facts(await server.call("a", "generate_image", mode, **edit))
        other_task = facts(await server.call("b", "generate_image", mode, **edit))
        (order,) = (json.loads(r.body) for r in server.simulator.requests if r.path == "/v1/images/generations")
    assert (answer.status_code, upload["mime_type"], upload["bytes"]) == (201, "image/png", len(PNG))
    assert upload["uri"].startswith("evolink://uploads/")
    assert own_task["status"] == "completed"
    assert own_task["references"][0]["given"] == upload["uri"]
    assert order["image_urls"][0].startswith("http")
    assert other_task["error"]["code"] == "reference_refused"


async def test_an_upload_and_a_data_uri_of_the_same_image_are_identical_requests(tmp_path: Path) -> None:
    import base64

    async with open_team_server(tmp_path, ANNA) as server, server.http("a") as http:
        uri = (await http.put("/uploads", content=PNG)).json()["uri"]
        data = "data:image/png;base64," + base64.b64encode(PNG).decode()
        arguments = {"prompt": "sim:slow=60 bluer", "wait_seconds": 0}
        first = facts(await server.call("a", "generate_image", **arguments, image_urls=[uri]))
        second = facts(await server.call("a", "generate_image", **arguments, image_urls=[data]))
        assert first["task_id"] is not None
        assert (second["task_id"], server.posts) == (first["task_id"], 1)


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        pytest.param(
            b"GIF89a" + b"x" * 100, {}, 400, "is a GIF image, and EvoLink reads only PNG, JPEG and WebP", id="no image"
        ),
        pytest.param(PNG[:-20], {}, 400, "cannot be a reference", id="incomplete"),
        pytest.param(b"", {}, 400, "is an empty file, and EvoLink reads only PNG, JPEG and WebP", id="empty"),
        pytest.param(
            b"x", {"content-length": str(REFERENCE_MAX_BYTES + 1)}, 413, "50 MB", id="too large by its header"
        ),
    ],
)
async def test_an_upload_that_cannot_be_a_reference_image_is_refused(
    tmp_path: Path, content: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    async with open_team_server(tmp_path, ANNA) as server, server.http("a") as http:
        answer = await http.put("/uploads", content=content, headers=headers)
        assert answer.status_code == status
        assert words in answer.json()["error"]
        assert server.simulator.requests == []


async def test_an_upload_that_is_too_large_is_refused_before_its_end(tmp_path: Path) -> None:
    sent_bytes = 0

    async def parts() -> Any:
        nonlocal sent_bytes
        while sent_bytes < 2 * REFERENCE_MAX_BYTES:
            sent_bytes += 1 << 20
            yield b"x" * (1 << 20)

    async with open_team_server(tmp_path, ANNA) as server, server.http("a") as http:
        answer = await http.put("/uploads", content=parts())
        assert answer.status_code == 413


async def test_uploads_need_a_token_a_key_and_the_method_put(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, ANNA) as server:
        async with server.http() as http:
            assert (await http.put("/uploads", content=PNG)).status_code == 401
        async with server.http("a") as http:
            assert (await http.get("/uploads")).status_code == 405
    async with open_team_server(tmp_path, ANNA, EVOLINK_API_KEY="") as server, server.http("a") as http:
        answer = await http.put("/uploads", content=PNG)
        assert (answer.status_code, "EVOLINK_API_KEY" in answer.json()["error"]) == (503, True)


async def test_a_refusal_of_evolinks_file_api_is_reported(tmp_path: Path) -> None:
    simulator = PlainSimulator()
    forward = simulator.app

    async def refuse_uploads(scope: Any, receive: Any, send: Any) -> None:
        if "upload" not in scope.get("path", ""):
            await forward(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b"busy"})

    simulator.app = refuse_uploads
    async with open_team_server(tmp_path, ANNA, simulator=simulator) as server, server.http("a") as http:
        answer = await http.put("/uploads", content=PNG)
    assert answer.status_code == 502
    assert "Nothing was charged" in answer.json()["error"]
