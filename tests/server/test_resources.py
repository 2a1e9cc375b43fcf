"""Tasks, pictures and size tables as resources, and word of every change, in both protocol eras."""

from __future__ import annotations

import base64
import json
import os
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import Clock, HeldClock, Open, PlainSimulator, World
from mcp.client import Client
from mcp.shared.exceptions import MCPDeprecationWarning, MCPError
from mcp_types import ResourceUpdatedNotification

from evolink_mcp.api.sizes import RATIOS, RULES
from evolink_mcp.journal.entry import Entry
from evolink_mcp.server.resources import IMAGE_MAX_BYTES, WATCHED_MAX
from evolink_mcp.server.server import build_server
from evolink_mcp.simulator.simulation import SimulatedTask

pytestmark = pytest.mark.anyio
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])
INVALID_PARAMS, INTERNAL_ERROR, METHOD_NOT_FOUND = -32602, -32603, -32601


async def bought(client: Client, **wish: Any) -> dict[str, Any]:
    small = {"prompt": "sim:fast a fox", "size": "1024x640"}
    return (await client.call_tool("generate_image", {**small, **wish})).structured_content


@ERAS
async def test_resources_and_templates_are_listed(world: World, mode: str) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            fixed = {str(resource.uri) for resource in (await client.list_resources()).resources}
            templates = {t.uri_template for t in (await client.list_resource_templates()).resource_templates}
    assert "evolink://sizes" in fixed
    assert templates == {"evolink://tasks/{task_id}", "evolink://images/{task_id}/{index}"}


@ERAS
async def test_the_size_tables_hold_every_ratio_by_both_rules(world: World, mode: str) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            (page,) = (await client.read_resource("evolink://sizes")).contents
    assert page.mime_type == "text/markdown"
    assert [page.text.count(f"## {rule}") for rule in RULES] == [1, 1]
    assert "## anchor-edge (in use)" in page.text
    assert [page.text.count(f"| {ratio} |") for ratio in RATIOS] == [2] * len(RATIOS)


@ERAS
async def test_a_task_reads_as_get_task_answers_it(world: World, mode: str) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            task_id = (await bought(client, n=2))["task_id"]
            (page,) = (await client.read_resource(f"evolink://tasks/{task_id}")).contents
            answer = await client.call_tool("get_task", {"task_id": task_id})
    assert page.mime_type == "application/json"
    assert json.loads(page.text) == answer.structured_content


@ERAS
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
async def test_a_picture_reads_as_the_saved_file_under_its_own_type(world: World, mode: str, kind: str) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            facts = await bought(client, output_format=kind)
            (image,) = facts["images"]
            (page,) = (await client.read_resource(image["resource_uri"])).contents
    assert page.mime_type == image["mime_type"] == f"image/{kind}"
    assert base64.b64decode(page.blob) == Path(image["path"]).read_bytes()


@ERAS
@pytest.mark.parametrize(
    "uri",
    [
        pytest.param("evolink://tasks/task-unified-nobody", id="no such task"),
        pytest.param("evolink://tasks/..%2F..%2Fv1%2Fcredits", id="a path for an id"),
        pytest.param("evolink://tasks/%00", id="NUL"),
        pytest.param("evolink://images/task-unified-nobody/0", id="picture of no such task"),
        pytest.param("evolink://images/{id}/1", id="one picture too many"),
        pytest.param("evolink://images/{id}/-1", id="before the first"),
        pytest.param("evolink://images/{id}/00", id="two noughts"),
        pytest.param("evolink://images/{id}/\u0660", id="another script's nought"),
        pytest.param("evolink://images/{id}/first", id="a word"),
        pytest.param("evolink://nothing", id="nothing"),
    ],
)
async def test_what_is_not_there_is_not_found(world: World, mode: str, uri: str) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            facts = await bought(client)
            before = len(world.simulator.requests)
            with pytest.raises(MCPError) as refusal:
                await client.read_resource(uri.replace("{id}", facts["task_id"]))
    assert refusal.value.code == INVALID_PARAMS
    assert len(world.simulator.requests) == before


@ERAS
@pytest.mark.parametrize(
    ("extra", "fits"), [pytest.param(0, True, id="just fits"), pytest.param(1, False, id="too big")]
)
async def test_a_picture_too_big_for_one_message_is_told_by_path_and_url(
    world: World, mode: str, extra: int, fits: bool
) -> None:
    """Clients in TypeScript close the connection on a message above 10 MiB."""
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            (image,) = (await bought(client))["images"]
            os.truncate(image["path"], IMAGE_MAX_BYTES + extra)
            if fits:
                answer = await client.read_resource(image["resource_uri"])
                assert len(answer.model_dump_json()) < 10 << 20
                return
            with pytest.raises(MCPError) as refusal:
                await client.read_resource(image["resource_uri"])
    assert refusal.value.code == INTERNAL_ERROR
    assert image["path"] in refusal.value.message
    assert image["url"] in refusal.value.message
    assert "7,000,001 bytes" in refusal.value.message


def _replaced(path: Path, by: Path) -> None:
    path.unlink()
    path.symlink_to(by)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda path, _: path.unlink(), "cannot be read", id="deleted"),
        pytest.param(lambda path, _: path.write_text("a letter"), "is no picture any more", id="another content"),
        pytest.param(_replaced, "cannot be read", id="a link to a secret"),
        pytest.param(lambda path, _: (path.unlink(), os.mkfifo(path)), "cannot be read", id="a pipe"),
    ],
)
async def test_what_lies_where_a_picture_was_is_not_given_away(world: World, change: Any, words: str) -> None:
    secret = world.folder / "secret.txt"
    secret.write_text("secret")
    with anyio.fail_after(300):
        async with world.client() as client:
            (image,) = (await bought(client))["images"]
            change(Path(image["path"]), secret)
            with pytest.raises(MCPError) as refusal:
                await client.read_resource(image["resource_uri"])
    assert words in refusal.value.message
    assert image["url"] in refusal.value.message


@pytest.mark.journal_file
async def test_resources_work_without_a_key_and_without_a_journal(open_world: Open, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    data = str(tmp_path / "file" / "data")
    async with open_world({"EVOLINK_API_KEY": "", "EVOLINK_MCP_DATA_DIR": data}) as world:
        with anyio.fail_after(300):
            async with world.client() as client:
                assert (await client.read_resource("evolink://sizes")).contents
                with pytest.raises(MCPError, match="EVOLINK_MCP_DATA_DIR"):
                    await client.read_resource("evolink://tasks/task-unified-1")


# --- word of changes ---


async def subscribe(client: Client, uri: str) -> None:
    """As older clients do; the SDK says each time that it is old."""
    with pytest.warns(MCPDeprecationWarning):
        await client.subscribe_resource(uri)


async def test_whoever_listens_to_a_task_hears_when_it_changes(world: World) -> None:
    with anyio.fail_after(300):
        async with world.client() as client:
            one = (await bought(client, prompt="a fox", wait_seconds=0))["task_id"]
            other = (await bought(client, prompt="a cat", wait_seconds=0))["task_id"]
            uri = f"evolink://tasks/{one}"
            async with client.listen(resource_subscriptions=[uri]) as events:
                await client.call_tool("get_task", {"task_id": other})
                await client.call_tool("get_task", {"task_id": one})
                async for event in events:
                    assert event.uri == uri
                    (page,) = (await client.read_resource(uri)).contents
                    if json.loads(page.text)["status"] == "completed":
                        break


async def test_who_is_told_of_a_change_reads_what_has_changed(
    open_world: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while that is still being written down: no later word would come."""
    clock, written = HeldClock(), anyio.Event()
    clock.held = True
    with anyio.fail_after(300):
        async with open_world(clock=clock) as world, world.client() as client:
            write = world.studio.journal.update

            async def slowly(entry: Entry) -> bool:
                if entry.status == "completed":
                    await written.wait()
                return await write(entry)

            monkeypatch.setattr(world.studio.journal, "update", slowly)
            task_id = (await bought(client, prompt="a fox", wait_seconds=0))["task_id"]
            uri = f"evolink://tasks/{task_id}"
            async with client.listen(resource_subscriptions=[uri]) as events:
                clock.go_on.set()
                async for _ in events:
                    (page,) = (await client.read_resource(uri)).contents
                    if json.loads(page.text)["status"] == "completed":
                        break
            written.set()


class HeldSimulator(PlainSimulator):
    """No picture is given out before `go` is set."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock=clock)
        self.go = threading.Event()

    def _draw(self, task: SimulatedTask, index: int) -> bytes:
        self.go.wait(30)
        return super()._draw(task, index)


async def test_older_clients_subscribe_and_hear_until_they_unsubscribe(open_world: Open) -> None:
    heard: list[str] = []
    clock = Clock()
    simulator = HeldSimulator(clock)

    async def listen(message: Any) -> None:
        if isinstance(message, ResourceUpdatedNotification):
            heard.append(str(message.params.uri))

    with anyio.fail_after(300):
        async with (
            open_world(simulator=simulator, clock=clock) as world,
            Client(build_server(world.studio), mode="legacy", message_handler=listen) as client,
        ):
            assert client.server_capabilities.resources.subscribe is True
            ids = [(await bought(client, prompt=f"fox {k}", wait_seconds=0))["task_id"] for k in range(3)]
            one, other, third = (f"evolink://tasks/{task_id}" for task_id in ids)
            for uri in (one, other, one):
                await subscribe(client, uri)
            for uri in (other, third):
                with pytest.warns(MCPDeprecationWarning):
                    await client.unsubscribe_resource(uri)
            simulator.go.set()
            for task_id in reversed(ids):
                await client.call_tool("get_task", {"task_id": task_id})
    assert set(heard) == {one}


async def test_a_client_that_left_is_forgotten_and_harms_nobody(world: World) -> None:
    server = build_server(world.studio)
    with anyio.fail_after(300):
        async with Client(server, mode="legacy") as client:
            task_id = (await bought(client, prompt="a fox", wait_seconds=0))["task_id"]
            await subscribe(client, f"evolink://tasks/{task_id}")
        async with Client(server, mode="legacy") as client:
            answer = await client.call_tool("get_task", {"task_id": task_id})
    assert answer.structured_content["status"] == "completed"


@pytest.mark.parametrize("uri", ["file:///etc/passwd", "evolink://sizes/more", "https://example.org/", "evolink://"])
async def test_nothing_else_can_be_subscribed_to(world: World, uri: str) -> None:
    with anyio.fail_after(300):
        async with world.client("legacy") as client:
            with pytest.raises(MCPError) as refusal:
                await subscribe(client, uri)
    assert refusal.value.code == INVALID_PARAMS


async def test_subscriptions_are_not_without_end(world: World) -> None:
    with anyio.fail_after(300):
        async with world.client("legacy") as client:
            for number in range(WATCHED_MAX):
                await subscribe(client, f"evolink://tasks/task-unified-{number}")
            await subscribe(client, "evolink://tasks/task-unified-0")
            with pytest.raises(MCPError, match="1000 subscriptions"):
                await subscribe(client, "evolink://tasks/task-unified-1000")


async def test_without_sessions_older_clients_are_offered_no_subscriptions(world: World) -> None:
    """Stateless HTTP has no way to tell them anything later."""
    server = build_server(world.studio)
    server.streamable_http_app(stateless_http=True)
    with anyio.fail_after(300):
        async with Client(server, mode="legacy") as client:
            assert not client.server_capabilities.resources.subscribe
            with pytest.raises(MCPError) as refusal:
                await subscribe(client, "evolink://tasks/task-unified-1")
    assert refusal.value.code == METHOD_NOT_FOUND
