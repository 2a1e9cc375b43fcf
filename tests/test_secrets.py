"""The key goes to EvoLink and nowhere else: a canary is looked for wherever a server can leave anything."""

from __future__ import annotations

import base64
import json
import traceback
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import anyio
import faulty_gateway as gw
import httpx2 as httpx
import pytest
from child_processes import minimal_environment
from faulty_gateway import Ask, Gateway, QuickSimulator
from killer import Nursery, nursery_of_servers  # noqa: F401
from pydantic import SecretStr

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.app.settings import Settings
from evolink_mcp.app.wiring import open_studio
from evolink_mcp.errors import EvolinkError

pytestmark = pytest.mark.anyio

CANARY = "sk-canary-aXq81ZbT3kLw90vM"
# As it is, and as it may hide: in base64, in hex, in pieces of its own.
TRACES = (CANARY, CANARY[3:], base64.b64encode(CANARY.encode()).decode()[:24], CANARY.encode().hex())
WISH = {"prompt": "a fox", "size": "1024x640", "quality": "low"}


def betrays(data: bytes | str) -> list[str]:
    text = data.decode("utf-8", "replace") if isinstance(data, bytes) else data
    return [trace for trace in TRACES if trace in text]


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    async with Gateway(QuickSimulator(duration_s=0)).open() as opened:
        yield opened


async def quote_the_key(ask: Ask) -> None:
    """An upstream that repeats what it was sent, as some do in their errors."""
    said = f"Incorrect API key provided: {ask.headers['authorization']}"
    ask.answer(401, json.dumps({"error": {"code": said, "message": said}}).encode(), x_request_id=said)


async def echo(ask: Ask) -> None:
    ask.answer(200, ask.raw)


FAULTS: dict[str, gw.Fault] = {
    "none": gw.behave, "the key quoted": quote_the_key, "the request echoed": echo,
    "the request echoed as HTTP": gw.before(lambda ask: ask.say(ask.raw)), "closed": gw.after(gw.closes),
    "reset": gw.after(lambda ask: ask.reset()), "garbage": gw.after(lambda ask: ask.say(b"\x00 no HTTP\r\n\r\n")),
    "elsewhere": gw.after(gw.says(307, location="http://127.0.0.1:9/")), "500": gw.after(gw.error(500, "internal_error")),
    "429": gw.before(gw.says(429, retry_after="100")), "402": gw.before(gw.error(402, "insufficient_quota")),
    "odd": gw.strangely("an odd id"),
}  # fmt: skip


async def test_a_server_leaves_no_trace_of_the_key_whatever_happens(
    gateway: Gateway, servers: Nursery, tmp_path: Path
) -> None:
    """stdout, stderr at its most talkative, the journal's bytes, pictures: after every kind of fault, and a kill."""
    env = minimal_environment(
        tmp_path, EVOLINK_API_KEY=CANARY, EVOLINK_BASE_URL=gateway.url,
        EVOLINK_MCP_DATA_DIR=str(tmp_path / "data"), EVOLINK_MCP_OUTPUT_DIR=str(tmp_path / "pictures"),
    )  # fmt: skip
    told: list[str] = []

    def reads(ask: Ask) -> gw.Fault | None:
        return quote_the_key if ask.path == "/v1/credits" else None

    gateway.reads = reads
    with anyio.fail_after(300):
        async with servers.server(env, "-v") as server, anyio.create_task_group() as calls:
            told.append(json.dumps(await server.ask("tools/list")))

            async def one(name: str, fault: gw.Fault) -> None:
                async with servers.server(env, "-v") as other:
                    gateway.purchases.append(fault)
                    told.append(json.dumps(await other.call("generate_image", **{**WISH, "prompt": name})))
                    told.append(other.err.read_text())

            for name, fault in FAULTS.items():
                calls.start_soon(one, name, fault)
            for tool, arguments in (
                ("get_balance", {}), ("generate_image", {**WISH, "prompt": ""}), ("list_tasks", {"sync": True}),
                ("compute_size", {"size": "16:9"}), ("nothing", {}),
            ):  # fmt: skip
                told.append(json.dumps(await server.call(tool, **arguments)))
            server.kill()
            await server.gone()
            told.append(server.err.read_text())
        async with servers.server(env, "-v", "tasks", "--json", greet=False) as shown:
            await shown.gone()
            told.append(shown.err.read_text())
    assert len(gateway.simulator.tasks) > 3
    assert [betrays(text) for text in told] == [[]] * len(told)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {".png", ".sqlite3"} <= {path.suffix for path in files}
    assert {path.name: betrays(path.read_bytes()) for path in files if betrays(path.read_bytes())} == {}


async def nothing() -> None:
    """Nothing is written down."""


async def test_the_texts_and_traces_of_every_error_are_without_the_key(gateway: Gateway, tmp_path: Path) -> None:
    """Also the causes of an error, as a traceback prints them."""
    gateway.purchases = [fault for name, fault in FAULTS.items() if name not in ("none", "odd")]
    texts: list[str] = []

    def spoil(ask: Ask) -> gw.Fault | None:
        return quote_the_key

    gateway.reads = spoil
    with anyio.fail_after(300):
        async with EvolinkClient(SecretStr(CANARY), base_url=gateway.url) as client:
            for _ in range(len(gateway.purchases)):
                with pytest.raises(EvolinkError) as caught:
                    await client.submit({"prompt": "x"}, idempotency_key="k" * 20, on_sending=nothing)
                texts += [
                    "".join(traceback.format_exception(caught.value)),
                    repr(caught.value),
                    str(vars(caught.value)),
                ]
            for read in (client.balance, client.recent_tasks, lambda: client.task("task-unified-1-x")):
                with pytest.raises(EvolinkError) as caught:
                    await read()
                texts += ["".join(traceback.format_exception(caught.value)), repr(caught.value)]
            texts += [
                repr(client),
                str(vars(client)),
                repr(client._reads),
                repr(client._request(client._reads, "GET", "/")),
            ]
    assert [betrays(text) for text in texts] == [[]] * len(texts)
    assert any("(the key)" in text for text in texts)


def _settings(**more: str) -> Settings:
    return Settings.from_environment({"EVOLINK_API_KEY": CANARY, **more})


async def test_no_object_shows_the_key_when_it_is_printed(tmp_path: Path) -> None:
    settings = _settings(EVOLINK_MCP_DATA_DIR=str(tmp_path))
    async with open_studio(settings) as studio:
        shown = [
            repr(settings),
            str(settings),
            f"{settings.key}",
            repr(studio),
            str(vars(studio)),
            str(vars(studio._purchases)),
        ]
    assert [betrays(text) for text in shown] == [[]] * len(shown)


@pytest.mark.parametrize("value", [f"{CANARY} {CANARY}", f"Bearer {CANARY}", f"{CANARY}\u200b", f"“{CANARY}”", "short"])
def test_a_key_that_cannot_be_one_is_not_repeated_in_what_is_said_about_it(value: str) -> None:
    settings = Settings.from_environment({"EVOLINK_API_KEY": value})
    assert settings.key is None
    assert value not in (settings.key_problem or "")
    assert betrays(settings.key_problem or "") == []


@pytest.mark.parametrize(
    "path",
    ["http://127.0.0.1:9@127.0.0.1:1", "//127.0.0.1:1/", "@127.0.0.1:1/x", ".example.com/", "\\\\127.0.0.1:1", ":1"],
)
async def test_a_request_never_leaves_the_origin(path: str) -> None:
    async with EvolinkClient(SecretStr(CANARY), base_url="http://127.0.0.1:9") as client:
        with suppress(EvolinkError, httpx.InvalidURL):
            request = client._request(client._reads, "GET", path)
            assert (request.url.scheme, request.url.host, request.url.port) == ("http", "127.0.0.1", 9)


async def test_a_redirect_does_not_take_the_key_along(gateway: Gateway) -> None:
    seen: list[Ask] = []
    other = Gateway(QuickSimulator(), reads=lambda ask: seen.append(ask) or None)
    async with other.open():
        gateway.reads = lambda ask: gw.before(gw.says(302, location=f"{other.url}/v1/credits"))
        async with EvolinkClient(SecretStr(CANARY), base_url=gateway.url) as client:
            with pytest.raises(EvolinkError):
                await client.balance()
    assert seen == []
