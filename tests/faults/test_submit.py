"""The money's way out, over real sockets: whatever a gateway does, at most one task, and `charged` is never wrong."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import faulty_gateway as gw
import httpx2 as httpx
import pytest
from faulty_gateway import DOOR, ONE_SERVER, Fault, Gateway, QuickSimulator
from mcp.client import Client

from evolink_mcp import errors
from evolink_mcp.api import client, http
from evolink_mcp.app.wiring import open_studio
from evolink_mcp.server.server import build_server
from evolink_mcp.studio.studio import Studio
from evolink_mcp.teams.settings import TeamSettings

pytestmark = pytest.mark.anyio

KEY = "sk-canary-0123456789abcdef"
WISH = {"prompt": "sim:fast a fox", "size": "1024x640", "quality": "low"}


@pytest.fixture(autouse=True)
def shared_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the machine's certificates once for all tests."""
    monkeypatch.setattr(client.httpx, "create_ssl_context", _trust)


@functools.cache
def _trust() -> Any:
    return _make_trust()


_make_trust = httpx.create_ssl_context


async def no_sleep(_: float) -> None:
    await anyio.sleep(0)


@asynccontextmanager
async def studio_at(
    folder: Path, url: str, sleep: Callable[[float], Awaitable[None]] = no_sleep, **more: str
) -> AsyncIterator[Studio]:
    settings = TeamSettings.from_environment({
        "EVOLINK_API_KEY": KEY, "EVOLINK_BASE_URL": url, "EVOLINK_MCP_DATA_DIR": str(folder / "data"),
        "EVOLINK_MCP_OUTPUT_DIR": str(folder / "pictures"), **more,
    })  # fmt: skip
    async with open_studio(settings, sleep=sleep, deadline=gw.deadline_at_silence) as studio:
        yield studio


async def buy(studio: Studio, **more: Any) -> tuple[dict[str, Any], str]:
    """One generate_image through the front door: what it says as data and as words."""
    async with Client(ONE_SERVER) as asking:
        return await ask(asking, studio, **more)


async def ask(asking: Client, studio: Studio, **more: Any) -> tuple[dict[str, Any], str]:
    DOOR.studio = studio
    answer = await asking.call_tool("generate_image", {**WISH, **more})
    assert answer.is_error == (answer.structured_content["error"] is not None)
    return answer.structured_content, answer.content[0].text


@dataclass(frozen=True)
class Row:
    """What a fault means: how often it lets one POST be repeated, and whether the task came to be."""

    fault: Fault
    billed: bool
    outcome: str = "unknown"
    posts_always: int = 1


LOST, TAKEN, NO = "unknown", "taken", "no"
KEPT = "an id of another form, which is kept and shown"
TABLE = {
    "closed before": Row(gw.before(gw.closes), False),
    "closed after": Row(gw.after(gw.closes), True),
    "reset before": Row(gw.before(lambda ask: ask.reset()), False),
    "reset after": Row(gw.after(lambda ask: ask.reset()), True),
    "hang before": Row(gw.hang, False),
    "hang after": Row(gw.accept_and_hang, True),
    "drip": Row(gw.accept_and_drip, True),
    "truncated": Row(gw.accept_and_truncate, True, TAKEN),
    "truncated before the id": Row(gw.accept_and_truncate_before_the_id, True),
    "truncated head": Row(gw.after(lambda ask: ask.say(b"HTTP/1.1 200 OK\r\nConte")), True),
    "broken chunks": Row(gw.accept_and_break_chunks, True, TAKEN),
    "garbage": Row(gw.after(lambda ask: ask.say(b"\x00\xff\x16\x03 no HTTP at all\r\n\r\n")), True),
    "corrupt encoding": Row(gw.accept_and_compress, True),
    **{f"200 {kind}": Row(gw.strangely(kind), True) for kind in (
        "a list", "null", "a number", "no id", "empty", "html", "deep", "not text", "huge",
        "a huge integer")},
    **{f"200 {kind}": Row(gw.strangely(kind), True, KEPT) for kind in ("an odd id", "a number as id")},
    **{f"{status} before": Row(gw.before(gw.error(status, "service_error")), False) for status in (408, 500, 502, 503)},
    **{f"{status} after": Row(gw.after(gw.error(status, "service_error")), True)
       for status in (204, 408, 409, 418, 500, 502, 503, 504, 520)},
    **{f"{status} elsewhere": Row(gw.after(gw.says(status, location="http://127.0.0.1:9/other")), True)
       for status in (301, 302, 303, 307, 308)},
    "101": Row(gw.after(lambda ask: ask.say(b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n")), True),
    "early answers": Row(gw.inform_then_behave, True, TAKEN),
    "a byte order mark": Row(gw.mark_then_behave, True, TAKEN),
    "an envelope": Row(gw.envelop, True, TAKEN),
    **{str(status): Row(gw.before(gw.error(status, code)), False, NO) for status, code in (
        (400, "invalid_request"), (401, "unauthorized"), (402, "insufficient_quota"), (403, "model_access_denied"),
        (413, "too_large"), (422, "invalid_parameters"))},
    "402 html": Row(gw.before(gw.says(402, b"<html>", content_type="text/html")), False, NO),
    "402 gzip": Row(gw.before(gw.says(402, b"\x1f\x8b zip", content_encoding="gzip")), False, NO),
    "402 truncated": Row(gw.before(gw.says(402, b'{"error"', length=500)), False, NO),
    "429": Row(gw.before(gw.says(429, b"{}", retry_after="1")), False, NO, posts_always=3),
    "429 for long": Row(gw.before(gw.says(429, b"{}", retry_after="86400")), False, NO),
    "429 html": Row(gw.before(gw.says(429, b"<html>")), False, NO, posts_always=3),
}  # fmt: skip


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in TABLE.items()])
async def test_at_most_one_task_and_never_a_wrong_word_about_money(row: Row, tmp_path: Path) -> None:
    """Every fault, once or always, at gateways that honour the key or not, without the account's list or in any shape."""
    async with Client(ONE_SERVER) as asking:
        shapes = itertools.cycle(("number", "iso", "none"))
        for case in itertools.product((False, True), repeat=3):
            await _one_case(asking, row, tmp_path / "-".join(map(str, case)), *case, next(shapes))


async def _one_case(
    asking: Client, row: Row, folder: Path, always: bool, honours: bool, listed: bool, list_times: str
) -> None:
    simulator = QuickSimulator(duration_s=0, honours_idempotency=honours, list_times=list_times)
    gateway = Gateway(simulator, [row.fault], always, *(() if listed else (gw.broken_list,)))
    with anyio.fail_after(300):
        async with gateway.open(), studio_at(folder, gateway.url) as studio:
            out, text = await ask(asking, studio)
    repeated = row.posts_always > 1 and not always
    billed = row.billed or repeated
    assert len(simulator.tasks) == int(billed)
    assert gateway.posts == (row.posts_always if always else min(2, row.posts_always))
    found = row.outcome == LOST and billed and listed
    if row.outcome == TAKEN or repeated or found:
        charged = "unknown" if found else "yes"  # what is found in the account's list is a guess
        assert (out["charged"], out["status"], out["task_id"]) == (charged, "completed", *simulator.tasks)
        assert (out["guess"], text.startswith("Unconfirmed match")) == (found, found)
        assert Path(out["images"][0]["path"]).is_file()
    elif row.outcome == KEPT:
        assert (out["charged"], out["status"]) == ("unknown", "pending")
        assert out["task_id"] in ("../../v1/credits", "7")
        assert out["next_action"] == {"tool": "list_tasks", "arguments": {"sync": True}}
        assert not [path for _, path in gateway.seen if "credits" in path or path.endswith("/7")]
    else:
        status = "unknown" if row.outcome == LOST else "failed"
        assert (out["charged"], out["status"], out["task_id"]) == (row.outcome, status, None)
        assert f"Charged: {row.outcome}" in text
        assert out["error"]["advice"] in text
    assert KEY not in text + json.dumps(out)


async def test_a_task_that_the_list_shows_late_is_found_and_not_bought_again(tmp_path: Path) -> None:
    """The account's list may lag behind: it is asked once more before the outcome is called unknown."""
    empty = gw.before(gw.says(200, b'{"data": []}'))
    lists = iter([empty])
    simulator = QuickSimulator(duration_s=0)
    gateway = Gateway(
        simulator, [gw.after(gw.closes)], reads=lambda ask: next(lists, None) if "?" in ask.path else None
    )
    with anyio.fail_after(300):
        async with gateway.open(), studio_at(tmp_path, gateway.url) as studio:
            out, _ = await buy(studio)
    assert (out["guess"], out["charged"], out["status"], gateway.posts) == (True, "unknown", "completed", 1)


async def test_every_purchase_has_a_connection_of_its_own(tmp_path: Path) -> None:
    """An idle connection may break just when the request leaves, and then nobody knows whether EvoLink got it."""
    connections: list[list[str]] = []

    async def host(stream: anyio.abc.SocketStream) -> None:
        connections.append([])
        async with stream:
            rest = b""
            while True:
                try:
                    rest += await stream.receive()
                except anyio.EndOfStream:
                    return
                head, found, body = rest.partition(b"\r\n\r\n")
                length = next(
                    (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
                )
                if not found or len(body) < length:
                    continue
                rest = body[length:]
                connections[-1].append(head.split(b" ")[0].decode())
                said = json.dumps({"id": f"task-unified-1-{len(connections)}", "status": "failed"}).encode()
                await stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(said) + said)

    with anyio.fail_after(300):
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with listener, anyio.create_task_group() as group:
            group.start_soon(listener.serve, host)
            async with studio_at(tmp_path, f"http://127.0.0.1:{port}") as studio:
                for number in range(3):
                    await buy(studio, prompt=f"fox {number}")
            group.cancel_scope.cancel()
    assert [methods for methods in connections if "POST" in methods] == [["POST"]] * 3


# --- provably unsent ----------------------------------------------------------------------------------------


@asynccontextmanager
async def full_house() -> AsyncIterator[str]:
    """An address that takes no more connections: they time out."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as host:
        address, waiting = host.getsockname(), []
        for _ in range(4):
            guest = socket.socket()
            guest.setblocking(False)
            guest.connect_ex(address)
            waiting.append(guest)
        await anyio.sleep(0)
        yield f"http://127.0.0.1:{address[1]}"
        for guest in waiting:
            guest.close()


@asynccontextmanager
async def closed_door() -> AsyncIterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as host:
        port = host.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


@asynccontextmanager
async def no_tls() -> AsyncIterator[str]:
    async with Gateway(QuickSimulator()).open() as gateway:
        yield gateway.url.replace("http:", "https:")


@asynccontextmanager
async def no_such_host() -> AsyncIterator[str]:
    yield "https://nowhere.invalid"


@pytest.mark.parametrize(
    "place", [pytest.param(place, id=place.__name__) for place in (full_house, closed_door, no_tls, no_such_host)]
)
async def test_what_never_connects_is_repeated_twice_and_was_not_charged(
    place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "CONNECT_TIMEOUT_S", 0.3)  # none of these ever answers
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await anyio.sleep(0)

    with anyio.fail_after(300):
        async with place() as url, studio_at(tmp_path, url, sleep) as studio:
            out, text = await buy(studio)
            entry = (await studio.journal.recent(1))[0]
    assert (out["charged"], out["status"], out["error"]["code"]) == ("no", "failed", "unreachable")
    assert "Charged: no" in text
    assert entry.phase == "unsent"
    assert [0.5 <= wait <= 2.0 for wait in waits] == [True, True]


@pytest.mark.parametrize("honours", [True, False], ids=["key honoured", "key ignored"])
async def test_a_door_that_opens_late_sells_one_task(honours: bool, tmp_path: Path) -> None:
    async with closed_door() as url:
        simulator = QuickSimulator(duration_s=0, honours_idempotency=honours)
        gateway = Gateway(simulator, port=int(url.rpartition(":")[2]))
        opened = gateway.open()

        async def sleep(_: float) -> None:
            if not gateway.seen and not hasattr(gateway, "_talks"):
                await opened.__aenter__()
            await anyio.sleep(0)

        with anyio.fail_after(300):
            async with studio_at(tmp_path, url, sleep) as studio:
                out, _ = await buy(studio)
            await opened.__aexit__(None, None, None)
    assert (out["charged"], len(simulator.tasks), gateway.posts) == ("yes", 1, 1)


async def test_a_proxy_that_refuses_the_tunnel_has_not_seen_the_purchase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tunnel's own headers are bytes on the wire, but none of the purchase's."""
    gateway = Gateway(QuickSimulator(), reads=lambda ask: gw.before(gw.says(502)))
    async with gateway.open():
        monkeypatch.setenv("HTTPS_PROXY", gateway.url)
        with anyio.fail_after(300):
            async with studio_at(tmp_path, "https://api.example.com") as studio:
                out, _ = await buy(studio)
    assert {method for method, _ in gateway.seen} == {"CONNECT"}
    assert (out["charged"], out["error"]["code"]) == ("no", "unreachable")


async def test_the_key_of_the_entry_goes_out_with_every_try(tmp_path: Path) -> None:
    keys: list[str] = []

    async def busy(ask: gw.Ask) -> None:
        keys.append(ask.headers["idempotency-key"])
        ask.answer(429, b"{}")

    gateway = Gateway(QuickSimulator(), [busy], always=True)
    with anyio.fail_after(300):
        async with gateway.open(), studio_at(tmp_path, gateway.url) as studio:
            await buy(studio)
            entry = (await studio.journal.recent(1))[0]
    assert keys == [entry.key] * 3
    assert 16 <= len(entry.key) <= 96


@pytest.mark.parametrize(
    ("retry_after", "posts", "waited"),
    [
        pytest.param("3", 2, 3.0, id="seconds"),
        pytest.param("-5", 2, None, id="negative"),
        pytest.param("inf", 1, None, id="for ever"),
        pytest.param("1e9", 1, None, id="an astronomical number"),
        pytest.param("soon", 2, None, id="a word"),
        pytest.param("Wed, 21 Oct 2015 07:28:00 GMT", 2, None, id="a date gone by"),
        pytest.param("Fri, 31 Dec 2099 23:59:59 GMT", 1, None, id="a date far off"),
    ],
)
async def test_a_purchase_waits_as_long_as_it_is_asked_within_half_a_minute(
    retry_after: str, posts: int, waited: float | None, tmp_path: Path
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await anyio.sleep(0)

    gateway = Gateway(QuickSimulator(duration_s=0), [gw.before(gw.says(429, b"{}", retry_after=retry_after))])
    with anyio.fail_after(300):
        async with gateway.open(), studio_at(tmp_path, gateway.url, sleep) as studio:
            out, _ = await buy(studio)
    assert (gateway.posts, out["charged"]) == (posts, "yes" if posts == 2 else "no")
    if waited is not None:
        assert waits[0] == waited


# --- the caller goes -----------------------------------------------------------------------------------------


async def test_a_cancelled_call_does_not_cancel_its_purchase(tmp_path: Path) -> None:
    """The call may go while its POST is on its way: the answer is noted, and the next identical call gets it."""
    arrived, go = asyncio.Event(), asyncio.Event()

    async def slowly(ask: gw.Ask) -> None:
        arrived.set()
        await go.wait()
        await gw.behave(ask)

    gateway = Gateway(QuickSimulator(duration_s=0), [slowly])
    with anyio.fail_after(300):
        async with gateway.open(), studio_at(tmp_path, gateway.url) as studio, anyio.create_task_group() as calls:
            calls.start_soon(buy, studio)
            await arrived.wait()
            calls.cancel_scope.cancel()
            go.set()
        # the first studio is closed: a second one finds what it noted
        async with gateway.open(), studio_at(tmp_path, gateway.url) as studio:
            out, _ = await buy(studio)
    assert (gateway.posts, out["charged"], out["status"]) == (1, "yes", "completed")
    assert "earlier identical call" in out["notes"][0]


# --- everything foreign has a name of ours -----------------------------------------------------------------


def test_every_exception_of_the_http_client_is_a_transport_error() -> None:
    foreign = [
        thing for module in (httpx, __import__("httpcore2")) for _, thing in inspect.getmembers(module, inspect.isclass)
        if issubclass(thing, Exception) and not issubclass(thing, Warning)
    ]  # fmt: skip
    ours = [thing for thing in foreign if thing.__module__.startswith("httpx2")]
    assert len(ours) >= 20
    assert [thing.__name__ for thing in ours if not issubclass(thing, http.TRANSPORT_ERRORS)] == []


def _family(kind: type[errors.EvolinkError]) -> list[type[errors.EvolinkError]]:
    return [kind, *(child for branch in kind.__subclasses__() for child in _family(branch))]


@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.__name__) for kind in _family(errors.EvolinkError)])
@pytest.mark.parametrize("tool", ["generate_image", "get_task", "list_tasks", "get_balance"])
async def test_every_error_of_ours_reaches_the_model_as_words_about_money(
    kind: type[errors.EvolinkError], tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise kind("the lamp is out", advice="Light it")

    arguments = {"generate_image": WISH, "get_task": {"task_id": "task-unified-1-x"}}.get(tool, {})
    with anyio.fail_after(300):
        async with studio_at(tmp_path, "http://127.0.0.1:9") as studio:
            for name in ("order", "resume", "wake", "balance"):
                monkeypatch.setattr(studio, name, fail)
            async with Client(build_server(studio)) as asking:
                answer = await asking.call_tool(tool, arguments)
    text = answer.content[0].text
    assert answer.is_error
    assert "lamp is out" in text
    assert "Light it" in text
    assert "Charged: " in text
    if tool in ("generate_image", "get_task"):
        assert answer.structured_content["charged"] == kind.charged
