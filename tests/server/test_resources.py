"""Tasks, images and size tables as resources, and notifications of changes, in both protocol eras."""

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
from faulty_journal import FaultyJournal
from mcp.client import Client
from mcp.shared.exceptions import MCPDeprecationWarning, MCPError
from mcp_types import ResourceUpdatedNotification

from evolink_mcp.api.models import DEFAULT_MODEL
from evolink_mcp.api.sizes import RULES
from evolink_mcp.journal.entry import Entry
from evolink_mcp.server.server import build_server
from evolink_mcp.simulator.simulation import SimulatedTask

pytestmark = pytest.mark.anyio
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])
IMAGE_MAX_BYTES = 7_000_000
SUBSCRIPTIONS_MAX = 1_000
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
METHOD_NOT_FOUND = -32601


async def buy(client: Client, **arguments: Any) -> dict[str, Any]:
    defaults = {"prompt": "sim:fast a fox", "size": "1024x640"}
    return (await client.call_tool("generate_image", {**defaults, **arguments})).structured_content


@ERAS
async def test_resources_and_templates_are_listed(world: World, mode: str) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            fixed = {str(resource.uri) for resource in (await client.list_resources()).resources}
            templates = {t.uri_template for t in (await client.list_resource_templates()).resource_templates}
    assert "evolink://sizes" in fixed
    assert templates == {"evolink://tasks/{task_id}", "evolink://images/{task_id}/{index}"}


@ERAS
async def test_the_size_tables_have_every_ratio_by_both_rules(world: World, mode: str) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            (page,) = (await client.read_resource("evolink://sizes")).contents
    assert page.mime_type == "text/markdown"
    assert [page.text.count(f"## {rule}") for rule in RULES] == [1, 1]
    assert "## anchor-edge (in use)" in page.text
    assert [page.text.count(f"| {ratio} |") for ratio in DEFAULT_MODEL.limits.ratios] == [2] * len(
        DEFAULT_MODEL.limits.ratios
    )


@ERAS
async def test_a_task_resource_equals_the_answer_of_get_task(world: World, mode: str) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            task_id = (await buy(client, n=2))["task_id"]
            (page,) = (await client.read_resource(f"evolink://tasks/{task_id}")).contents
            answer = await client.call_tool("get_task", {"task_id": task_id})
    assert page.mime_type == "application/json"
    assert json.loads(page.text) == answer.structured_content


@ERAS
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
async def test_an_image_resource_is_the_saved_file_with_its_own_type(world: World, mode: str, kind: str) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            facts = await buy(client, output_format=kind)
            (image,) = facts["images"]
            (page,) = (await client.read_resource(image["resource_uri"])).contents
    assert page.mime_type == image["mime_type"] == f"image/{kind}"
    assert base64.b64decode(page.blob) == Path(image["path"]).read_bytes()


@ERAS
@pytest.mark.parametrize(
    "uri",
    [
        pytest.param("evolink://tasks/task-unified-nobody", id="unknown task"),
        pytest.param("evolink://tasks/..%2F..%2Fv1%2Fcredits", id="a path instead of an id"),
        pytest.param("evolink://tasks/%00", id="NUL"),
        pytest.param("evolink://images/task-unified-nobody/0", id="image of an unknown task"),
        pytest.param("evolink://images/{id}/1", id="index after the last"),
        pytest.param("evolink://images/{id}/-1", id="index before the first"),
        pytest.param("evolink://images/{id}/00", id="two zeros"),
        pytest.param("evolink://images/{id}/\u0660", id="a zero of another script"),
        pytest.param("evolink://images/{id}/first", id="a word"),
        pytest.param("evolink://nothing", id="unknown kind"),
    ],
)
async def test_an_unknown_resource_is_invalid_params_without_a_request_to_evolink(
    world: World, mode: str, uri: str
) -> None:
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            facts = await buy(client)
            before = len(world.simulator.requests)
            with pytest.raises(MCPError) as refusal:
                await client.read_resource(uri.replace("{id}", facts["task_id"]))
    assert refusal.value.code == INVALID_PARAMS
    assert len(world.simulator.requests) == before


@ERAS
@pytest.mark.parametrize(
    ("extra", "fits"), [pytest.param(0, True, id="largest"), pytest.param(1, False, id="too large")]
)
async def test_an_image_too_large_for_one_message_is_answered_with_path_and_url(
    world: World, mode: str, extra: int, fits: bool
) -> None:
    """TypeScript clients close the connection on a message above 10 MiB."""
    with anyio.fail_after(300):
        async with world.client(mode) as client:
            (image,) = (await buy(client))["images"]
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


def _replace_with_link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda path, _: path.unlink(), "cannot be read", id="deleted"),
        pytest.param(lambda path, _: path.write_text("a letter"), "is not a picture any more", id="other content"),
        pytest.param(_replace_with_link, "cannot be read", id="a link to a secret"),
        pytest.param(lambda path, _: (path.unlink(), os.mkfifo(path)), "cannot be read", id="a pipe"),
    ],
)
async def test_another_file_at_the_path_of_an_image_is_not_published(world: World, change: Any, message: str) -> None:
    secret = world.folder / "secret.txt"
    secret.write_text("secret")
    with anyio.fail_after(300):
        async with world.client() as client:
            (image,) = (await buy(client))["images"]
            change(Path(image["path"]), secret)
            with pytest.raises(MCPError) as refusal:
                await client.read_resource(image["resource_uri"])
    assert message in refusal.value.message
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


# --- notifications ---


async def subscribe(client: Client, uri: str) -> None:
    """Subscribe as clients of older protocol versions do. The SDK warns each time that this is deprecated."""
    with pytest.warns(MCPDeprecationWarning):
        await client.subscribe_resource(uri)


async def test_a_listening_client_is_notified_of_its_task_only(open_world: Open) -> None:
    clock = HeldClock()
    clock.is_held = True  # otherwise the first task may end before the client listens
    with anyio.fail_after(300):
        async with open_world(clock=clock) as world, world.client() as client:
            first = (await buy(client, prompt="a fox", wait_seconds=0))["task_id"]
            second = (await buy(client, prompt="a cat", wait_seconds=0))["task_id"]
            uri = f"evolink://tasks/{first}"
            async with client.listen(resource_subscriptions=[uri]) as events:
                clock.release.set()
                await client.call_tool("get_task", {"task_id": second})
                await client.call_tool("get_task", {"task_id": first})
                async for event in events:
                    assert event.uri == uri
                    (page,) = (await client.read_resource(uri)).contents
                    if json.loads(page.text)["status"] == "completed":
                        break


async def test_a_notified_client_reads_the_new_state(open_world: Open) -> None:
    """The journal may still write the state. No later notification follows."""
    clock = HeldClock()
    is_written = anyio.Event()
    clock.is_held = True
    with anyio.fail_after(300):
        async with open_world(clock=clock, wrap_journal=FaultyJournal) as world, world.client() as client:
            journal: Any = world.studio.journal

            async def update_slowly(write: Any, entry: Entry, *facts: Any) -> bool:
                if entry.status == "completed":
                    await is_written.wait()
                return await write(entry, *facts)

            journal.replacements["update"] = update_slowly
            task_id = (await buy(client, prompt="a fox", wait_seconds=0))["task_id"]
            uri = f"evolink://tasks/{task_id}"
            async with client.listen(resource_subscriptions=[uri]) as events:
                clock.release.set()
                async for _ in events:
                    (page,) = (await client.read_resource(uri)).contents
                    if json.loads(page.text)["status"] == "completed":
                        break
            is_written.set()


class HeldSimulator(PlainSimulator):
    """A simulated EvoLink that delivers no image before `can_deliver` is set."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock=clock)
        self.can_deliver = threading.Event()

    def draw(self, task: SimulatedTask, index: int) -> bytes:
        self.can_deliver.wait(30)
        return super().draw(task, index)


async def test_older_clients_are_notified_until_they_unsubscribe(open_world: Open) -> None:
    uris: list[str] = []
    clock = Clock()
    simulator = HeldSimulator(clock)

    async def listen(message: Any) -> None:
        if isinstance(message, ResourceUpdatedNotification):
            uris.append(str(message.params.uri))

    with anyio.fail_after(300):
        async with (
            open_world(simulator=simulator, clock=clock) as world,
            Client(build_server(world.studio), mode="legacy", message_handler=listen) as client,
        ):
            assert client.server_capabilities.resources.subscribe is True
            ids = [(await buy(client, prompt=f"fox {k}", wait_seconds=0))["task_id"] for k in range(3)]
            first, second, third = (f"evolink://tasks/{task_id}" for task_id in ids)
            for uri in (first, second, first):
                await subscribe(client, uri)
            for uri in (second, third):
                with pytest.warns(MCPDeprecationWarning):
                    await client.unsubscribe_resource(uri)
            simulator.can_deliver.set()
            for task_id in reversed(ids):
                await client.call_tool("get_task", {"task_id": task_id})
    assert set(uris) == {first}


async def test_the_subscriptions_of_a_closed_connection_do_not_disturb_later_clients(world: World) -> None:
    server = build_server(world.studio)
    with anyio.fail_after(300):
        async with Client(server, mode="legacy") as client:
            task_id = (await buy(client, prompt="a fox", wait_seconds=0))["task_id"]
            await subscribe(client, f"evolink://tasks/{task_id}")
        async with Client(server, mode="legacy") as client:
            answer = await client.call_tool("get_task", {"task_id": task_id})
    assert answer.structured_content["status"] == "completed"


@pytest.mark.parametrize("uri", ["file:///etc/passwd", "evolink://sizes/more", "https://example.org/", "evolink://"])
async def test_a_subscription_to_an_unknown_resource_is_refused(world: World, uri: str) -> None:
    with anyio.fail_after(300):
        async with world.client("legacy") as client:
            with pytest.raises(MCPError) as refusal:
                await subscribe(client, uri)
    assert refusal.value.code == INVALID_PARAMS


async def test_the_number_of_subscriptions_is_limited(world: World) -> None:
    with anyio.fail_after(300):
        async with world.client("legacy") as client:
            for number in range(SUBSCRIPTIONS_MAX):
                await subscribe(client, f"evolink://tasks/task-unified-{number}")
            await subscribe(client, "evolink://tasks/task-unified-0")
            with pytest.raises(MCPError, match="1000 subscriptions"):
                await subscribe(client, "evolink://tasks/task-unified-1000")


async def test_without_sessions_older_clients_cannot_subscribe(world: World) -> None:
    """Stateless HTTP cannot send a notification later."""
    server = build_server(world.studio)
    server.streamable_http_app(stateless_http=True)
    with anyio.fail_after(300):
        async with Client(server, mode="legacy") as client:
            assert not client.server_capabilities.resources.subscribe
            with pytest.raises(MCPError) as refusal:
                await subscribe(client, "evolink://tasks/task-unified-1")
    assert refusal.value.code == METHOD_NOT_FOUND
