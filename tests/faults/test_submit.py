"""Purchases through a faulty gateway: at most one task, and `charged` is never wrong."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import faulty_gateway as gw
import httpx2 as httpx
import pytest
from faulty_gateway import CURRENT, ONE_SERVER, Fault, Gateway, QuickSimulator
from mcp.client import Client
from shared import CERTIFICATES_READ_ONCE, shared_decoder

from evolink_mcp import errors
from evolink_mcp.api import http
from evolink_mcp.app.wiring import open_studio
from evolink_mcp.server.server import build_server
from evolink_mcp.studio.studio import Studio
from evolink_mcp.teams.settings import TeamSettings

pytestmark = pytest.mark.anyio

KEY = "sk-canary-0123456789abcdef"
REQUEST = {"prompt": "sim:fast a fox", "size": "1024x640", "quality": "low"}


async def no_sleep(_: float) -> None:
    await anyio.sleep(0)


@asynccontextmanager
async def studio_at(
    folder: Path,
    url: str,
    sleep: Callable[[float], Awaitable[None]] = no_sleep,
    options: http.HttpOptions = CERTIFICATES_READ_ONCE,
) -> AsyncIterator[Studio]:
    settings = TeamSettings.from_environment({
        "EVOLINK_API_KEY": KEY, "EVOLINK_BASE_URL": url, "EVOLINK_MCP_DATA_DIR": str(folder / "data"),
        "EVOLINK_MCP_OUTPUT_DIR": str(folder / "pictures"),
    })  # fmt: skip
    deadline = gw.deadline_at_silence
    decoder = shared_decoder()
    async with open_studio(settings, decoder=decoder, sleep=sleep, http_options=options, deadline=deadline) as studio:
        yield studio


async def buy(studio: Studio, **arguments: Any) -> tuple[dict[str, Any], str]:
    """Call generate_image through MCP. Return the structured answer and its text."""
    async with Client(ONE_SERVER) as client:
        return await generate(client, studio, **arguments)


async def generate(client: Client, studio: Studio, **arguments: Any) -> tuple[dict[str, Any], str]:
    CURRENT.studio = studio
    answer = await client.call_tool("generate_image", {**REQUEST, **arguments})
    assert answer.is_error == (answer.structured_content["error"] is not None)
    return answer.structured_content, answer.content[0].text


@dataclass(frozen=True)
class Row:
    """The results of a fault: whether a task was billed, the outcome, and the POSTs if the fault always happens."""

    fault: Fault
    is_billed: bool
    outcome: str = "unknown"
    posts_always: int = 1


LOST = "unknown"
BOUGHT = "bought"
REFUSED = "no"
UNUSUAL_ID = "unusual id"
TABLE = {
    "closed before": Row(gw.before(gw.closes), False),
    "closed after": Row(gw.after(gw.closes), True),
    "reset before": Row(gw.before(gw.resets), False),
    "reset after": Row(gw.after(gw.resets), True),
    "hang before": Row(gw.hang, False),
    "hang after": Row(gw.accept_and_hang, True),
    "drip": Row(gw.accept_and_drip, True),
    "truncated": Row(gw.accept_and_truncate, True, BOUGHT),
    "truncated before the id": Row(gw.accept_and_truncate_before_the_id, True),
    "truncated head": Row(gw.after(gw.sends(b"HTTP/1.1 200 OK\r\nConte")), True),
    "broken chunks": Row(gw.accept_and_break_chunks, True, BOUGHT),
    "garbage": Row(gw.after(gw.sends(b"\x00\xff\x16\x03 no HTTP at all\r\n\r\n")), True),
    "corrupt encoding": Row(gw.accept_and_compress, True),
    **{f"200 {kind}": Row(gw.answer_without_task(kind), True) for kind in (
        "a list", "null", "a number", "no id", "empty", "html", "deep", "not text", "huge",
        "a huge integer")},
    **{f"200 {kind}": Row(gw.answer_without_task(kind), True, UNUSUAL_ID) for kind in ("an odd id", "a number as id")},
    **{f"{status} before": Row(gw.before(gw.error(status, "service_error")), False) for status in (408, 500, 502, 503)},
    **{f"{status} after": Row(gw.after(gw.error(status, "service_error")), True)
       for status in (204, 408, 409, 418, 500, 502, 503, 504, 520)},
    **{f"{status} elsewhere": Row(gw.after(gw.answers(status, location="http://127.0.0.1:9/other")), True)
       for status in (301, 302, 303, 307, 308)},
    "101": Row(gw.after(gw.sends(b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n")), True),
    "early answers": Row(gw.inform_then_behave, True, BOUGHT),
    "a byte order mark": Row(gw.answer_with_byte_order_mark, True, BOUGHT),
    "an envelope": Row(gw.answer_in_envelope, True, BOUGHT),
    **{str(status): Row(gw.before(gw.error(status, code)), False, REFUSED) for status, code in (
        (400, "invalid_request"), (401, "unauthorized"), (402, "insufficient_quota"), (403, "model_access_denied"),
        (413, "too_large"), (422, "invalid_parameters"))},
    "402 html": Row(gw.before(gw.answers(402, b"<html>", content_type="text/html")), False, REFUSED),
    "402 gzip": Row(gw.before(gw.answers(402, b"\x1f\x8b zip", content_encoding="gzip")), False, REFUSED),
    "402 truncated": Row(gw.before(gw.answers(402, b'{"error"', length=500)), False, REFUSED),
    "429": Row(gw.before(gw.answers(429, b"{}", retry_after="1")), False, REFUSED, posts_always=3),
    "429 for long": Row(gw.before(gw.answers(429, b"{}", retry_after="86400")), False, REFUSED),
    "429 html": Row(gw.before(gw.answers(429, b"<html>")), False, REFUSED, posts_always=3),
}  # fmt: skip


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in TABLE.items()])
async def test_a_fault_leads_to_at_most_one_task_and_a_correct_charge(row: Row, tmp_path: Path) -> None:
    """Each fault once or always, with and without idempotency at the gateway, without the task list or in any shape."""
    async with Client(ONE_SERVER) as client:
        shapes = itertools.cycle(("number", "iso", "none"))
        for case in itertools.product((False, True), repeat=3):
            await _one_case(client, row, tmp_path / "-".join(map(str, case)), *case, next(shapes))


async def _one_case(
    client: Client, row: Row, folder: Path, always: bool, honours_idempotency: bool, has_list: bool, list_times: str
) -> None:
    simulator = QuickSimulator(duration_s=0, honours_idempotency=honours_idempotency, list_times=list_times)
    gateway = Gateway(simulator, [row.fault], always, *(() if has_list else (gw.broken_list,)))
    with anyio.fail_after(300):
        async with gateway.open(), studio_at(folder, gateway.url) as studio:
            out, text = await generate(client, studio)
    is_repeated = row.posts_always > 1 and not always
    is_billed = row.is_billed or is_repeated
    assert len(simulator.tasks) == int(is_billed)
    assert gateway.posts == (row.posts_always if always else min(2, row.posts_always))
    is_guess = row.outcome == LOST and is_billed and has_list
    if row.outcome == BOUGHT or is_repeated or is_guess:
        charged = "unknown" if is_guess else "yes"
        assert (out["charged"], out["status"], out["task_id"]) == (charged, "completed", *simulator.tasks)
        assert (out["guess"], text.startswith("Unconfirmed match")) == (is_guess, is_guess)
        assert Path(out["images"][0]["path"]).is_file()
    elif row.outcome == UNUSUAL_ID:
        assert (out["charged"], out["status"]) == ("unknown", "pending")
        assert out["task_id"] in ("../../v1/credits", "7")
        assert out["next_action"] == {"tool": "list_tasks", "arguments": {"sync": True}}
        assert not [path for _, path in gateway.requests if "credits" in path or path.endswith("/7")]
    else:
        status = "unknown" if row.outcome == LOST else "failed"
        assert (out["charged"], out["status"], out["task_id"]) == (row.outcome, status, None)
        assert f"Charged: {row.outcome}" in text
        assert out["error"]["advice"] in text
    assert KEY not in text + json.dumps(out)


async def test_a_task_that_appears_late_in_the_list_is_matched_and_not_bought_again(tmp_path: Path) -> None:
    """The server reads the task list a second time before it reports an unknown outcome."""
    empty = gw.before(gw.answers(200, b'{"data": []}'))
    lists = iter([empty])
    simulator = QuickSimulator(duration_s=0)
    gateway = Gateway(
        simulator, [gw.after(gw.closes)], reads=lambda exchange: next(lists, None) if "?" in exchange.path else None
    )
    with anyio.fail_after(300):
        async with gateway.open(), studio_at(tmp_path, gateway.url) as studio:
            out, _ = await buy(studio)
    assert (out["guess"], out["charged"], out["status"], gateway.posts) == (True, "unknown", "completed", 1)


async def test_each_purchase_opens_a_new_connection(tmp_path: Path) -> None:
    """If an idle connection breaks during the POST, it is unknown whether EvoLink received it."""
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
                head, separator, body = rest.partition(b"\r\n\r\n")
                length = next(
                    (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
                )
                if not separator or len(body) < length:
                    continue
                rest = body[length:]
                connections[-1].append(head.split(b" ")[0].decode())
                answer = json.dumps({"id": f"task-unified-1-{len(connections)}", "status": "failed"}).encode()
                await stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(answer) + answer)

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
async def full_backlog() -> AsyncIterator[str]:
    """Yield an address at which connections time out."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as host:
        address = host.getsockname()
        waiting: list[socket.socket] = []
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(address)
            waiting.append(client)
        await anyio.sleep(0)
        yield f"http://127.0.0.1:{address[1]}"
        for client in waiting:
            client.close()


@asynccontextmanager
async def closed_port() -> AsyncIterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as host:
        port = host.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


@asynccontextmanager
async def no_tls() -> AsyncIterator[str]:
    async with Gateway(QuickSimulator()).open() as gateway:
        yield gateway.url.replace("http:", "https:")


@asynccontextmanager
async def unknown_host() -> AsyncIterator[str]:
    yield "https://nowhere.invalid"


@pytest.mark.parametrize(
    "place", [pytest.param(place, id=place.__name__) for place in (full_backlog, closed_port, no_tls, unknown_host)]
)
async def test_a_purchase_without_a_connection_is_tried_three_times_and_not_charged(place: Any, tmp_path: Path) -> None:
    options = replace(CERTIFICATES_READ_ONCE, connect_timeout_s=0.3)  # none of these places accepts a connection
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await anyio.sleep(0)

    with anyio.fail_after(300):
        async with place() as url, studio_at(tmp_path, url, sleep, options) as studio:
            out, text = await buy(studio)
            entry = (await studio.journal.recent(1))[0]
    assert (out["charged"], out["status"], out["error"]["code"]) == ("no", "failed", "unreachable")
    assert "Charged: no" in text
    assert entry.phase == "unsent"
    assert [0.5 <= wait <= 2.0 for wait in waits] == [True, True]


@pytest.mark.parametrize("honours", [True, False], ids=["key honoured", "key ignored"])
async def test_a_gateway_that_opens_late_gets_one_purchase(honours: bool, tmp_path: Path) -> None:
    async with closed_port() as url:
        simulator = QuickSimulator(duration_s=0, honours_idempotency=honours)
        gateway = Gateway(simulator, port=int(url.rpartition(":")[2]))
        context = gateway.open()

        is_open = False

        async def sleep(_: float) -> None:
            nonlocal is_open
            if not is_open:
                is_open = True
                await context.__aenter__()
            await anyio.sleep(0)

        with anyio.fail_after(300):
            async with studio_at(tmp_path, url, sleep) as studio:
                out, _ = await buy(studio)
            await context.__aexit__(None, None, None)
    assert (out["charged"], len(simulator.tasks), gateway.posts) == ("yes", 1, 1)


async def test_a_purchase_is_unsent_if_the_proxy_refuses_the_tunnel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The headers of the CONNECT request are sent, but no byte of the POST."""
    gateway = Gateway(QuickSimulator(), reads=lambda exchange: gw.before(gw.answers(502)))
    async with gateway.open():
        monkeypatch.setenv("HTTPS_PROXY", gateway.url)
        with anyio.fail_after(300):
            async with studio_at(tmp_path, "https://api.example.com") as studio:
                out, _ = await buy(studio)
    assert {method for method, _ in gateway.requests} == {"CONNECT"}
    assert (out["charged"], out["error"]["code"]) == ("no", "unreachable")


async def test_each_attempt_sends_the_idempotency_key_of_the_entry(tmp_path: Path) -> None:
    keys: list[str] = []

    async def refuse_with_429(exchange: gw.Exchange) -> None:
        keys.append(exchange.headers["idempotency-key"])
        exchange.answer(429, b"{}")

    gateway = Gateway(QuickSimulator(), [refuse_with_429], always=True)
    with anyio.fail_after(300):
        async with gateway.open(), studio_at(tmp_path, gateway.url) as studio:
            await buy(studio)
            entry = (await studio.journal.recent(1))[0]
    assert keys == [entry.key] * 3
    assert 16 <= len(entry.key) <= 96


@pytest.mark.parametrize(
    ("retry_after", "posts", "first_wait_s"),
    [
        pytest.param("3", 2, 3.0, id="seconds"),
        pytest.param("-5", 2, None, id="negative"),
        pytest.param("inf", 1, None, id="infinite"),
        pytest.param("1e9", 1, None, id="an astronomical number"),
        pytest.param("soon", 2, None, id="a word"),
        pytest.param("Wed, 21 Oct 2015 07:28:00 GMT", 2, None, id="a past date"),
        pytest.param("Fri, 31 Dec 2099 23:59:59 GMT", 1, None, id="a distant date"),
    ],
)
async def test_a_purchase_obeys_retry_after_up_to_half_a_minute(
    retry_after: str, posts: int, first_wait_s: float | None, tmp_path: Path
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await anyio.sleep(0)

    gateway = Gateway(QuickSimulator(duration_s=0), [gw.before(gw.answers(429, b"{}", retry_after=retry_after))])
    with anyio.fail_after(300):
        async with gateway.open(), studio_at(tmp_path, gateway.url, sleep) as studio:
            out, _ = await buy(studio)
    assert (gateway.posts, out["charged"]) == (posts, "yes" if posts == 2 else "no")
    if first_wait_s is not None:
        assert waits[0] == first_wait_s


# --- cancelled calls -----------------------------------------------------------------------------------------


async def test_a_cancelled_call_does_not_cancel_its_purchase(tmp_path: Path) -> None:
    """The server records the answer of the POST. The next identical call gets the image."""
    has_arrived = asyncio.Event()
    may_answer = asyncio.Event()

    async def answer_later(exchange: gw.Exchange) -> None:
        has_arrived.set()
        await may_answer.wait()
        await gw.behave(exchange)

    gateway = Gateway(QuickSimulator(duration_s=0), [answer_later])
    with anyio.fail_after(300):
        async with gateway.open(), studio_at(tmp_path, gateway.url) as studio, anyio.create_task_group() as calls:
            calls.start_soon(buy, studio)
            await has_arrived.wait()
            calls.cancel_scope.cancel()
            may_answer.set()
        # a second studio reads the journal of the first
        async with gateway.open(), studio_at(tmp_path, gateway.url) as studio:
            out, _ = await buy(studio)
    assert (gateway.posts, out["charged"], out["status"]) == (1, "yes", "completed")
    assert "earlier identical call" in out["notes"][0]


# --- exceptions -----------------------------------------------------------------


def test_every_exception_of_the_http_client_is_a_transport_error() -> None:
    exceptions = [
        member for _, member in inspect.getmembers(httpx, inspect.isclass)
        if issubclass(member, Exception) and not issubclass(member, Warning) and member.__module__.startswith("httpx2")
    ]  # fmt: skip
    assert len(exceptions) >= 20
    assert [member.__name__ for member in exceptions if not issubclass(member, http.TRANSPORT_ERRORS)] == []


def _family(kind: type[errors.EvolinkError]) -> list[type[errors.EvolinkError]]:
    return [kind, *(child for branch in kind.__subclasses__() for child in _family(branch))]


class FailingStudio:
    """A studio that raises an error in every operation."""

    def __init__(self, studio: Studio, error: Exception) -> None:
        self._studio = studio
        self._error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._studio, name)

    async def _fail(self, *_: Any, **__: Any) -> Any:
        raise self._error

    resume = wake = balance = prepare_series = _fail

    @asynccontextmanager
    async def ordered(self, *_: object) -> AsyncIterator[None]:
        raise self._error
        yield


@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.__name__) for kind in _family(errors.EvolinkError)])
@pytest.mark.parametrize("tool", ["generate_image", "generate_images", "get_task", "list_tasks", "get_balance"])
async def test_every_error_reaches_the_model_with_its_charge(
    kind: type[errors.EvolinkError], tool: str, tmp_path: Path
) -> None:
    series = {"prompts": ["a fox", "a hen"]}
    arguments = {"generate_image": REQUEST, "generate_images": series, "get_task": {"task_id": "task-unified-1-x"}}.get(
        tool, {}
    )
    with anyio.fail_after(300):
        async with studio_at(tmp_path, "http://127.0.0.1:9") as studio:
            failing_studio: Any = FailingStudio(studio, kind("the lamp is out", advice="Light it"))
            async with Client(build_server(failing_studio)) as client:
                answer = await client.call_tool(tool, arguments)
    text = answer.content[0].text
    assert answer.is_error
    assert "lamp is out" in text
    assert "Light it" in text
    assert "Charged: " in text
    if tool in ("generate_image", "get_task"):
        assert answer.structured_content["charged"] == kind.charged
