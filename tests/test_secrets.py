"""The API key goes only to EvoLink. The tests search for a canary key in all output of a server."""

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
from faulty_gateway import Exchange, Gateway, QuickSimulator
from killer import Launcher, shared_launcher  # noqa: F401
from pydantic import SecretStr

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.app.wiring import open_studio
from evolink_mcp.errors import EvolinkError
from evolink_mcp.teams.settings import TeamSettings

pytestmark = pytest.mark.anyio

CANARY = "sk-canary-aXq81ZbT3kLw90vM"
# The key, its secret part, its start in base64, and its hexadecimal form.
TRACES = (CANARY, CANARY[3:], base64.b64encode(CANARY.encode()).decode()[:24], CANARY.encode().hex())
REQUEST = {"prompt": "a fox", "size": "1024x640", "quality": "low"}


def traces_in(data: bytes | str) -> list[str]:
    text = data.decode("utf-8", "replace") if isinstance(data, bytes) else data
    return [trace for trace in TRACES if trace in text]


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    async with Gateway(QuickSimulator(duration_s=0)).open() as one_gateway:
        yield one_gateway


async def quote_the_key(exchange: Exchange) -> None:
    """Repeat the key in the error, as some APIs do."""
    message = f"Incorrect API key provided: {exchange.headers['authorization']}"
    exchange.answer(401, json.dumps({"error": {"code": message, "message": message}}).encode(), x_request_id=message)


async def echo(exchange: Exchange) -> None:
    exchange.answer(200, exchange.raw)


FAULTS: dict[str, gw.Fault] = {
    "none": gw.behave, "the key quoted": quote_the_key, "the request echoed": echo,
    "the request echoed as HTTP": gw.before(gw.echoes), "closed": gw.after(gw.closes),
    "reset": gw.after(gw.resets), "garbage": gw.after(gw.sends(b"\x00 no HTTP\r\n\r\n")),
    "elsewhere": gw.after(gw.answers(307, location="http://127.0.0.1:9/")), "500": gw.after(gw.error(500, "internal_error")),
    "429": gw.before(gw.answers(429, retry_after="100")), "402": gw.before(gw.error(402, "insufficient_quota")),
    "odd": gw.answer_without_task("an odd id"),
}  # fmt: skip


async def test_no_output_and_no_file_of_a_server_contains_the_key(
    gateway: Gateway, launcher: Launcher, tmp_path: Path
) -> None:
    """Search stdout, verbose stderr, the journal and all images, after every fault and after a kill."""
    env = minimal_environment(
        tmp_path, EVOLINK_API_KEY=CANARY, EVOLINK_BASE_URL=gateway.url,
        EVOLINK_MCP_DATA_DIR=str(tmp_path / "data"), EVOLINK_MCP_OUTPUT_DIR=str(tmp_path / "pictures"),
    )  # fmt: skip
    outputs: list[str] = []

    def reads(exchange: Exchange) -> gw.Fault | None:
        return quote_the_key if exchange.path == "/v1/credits" else None

    gateway.reads = reads
    with anyio.fail_after(300):
        async with launcher.server(env, "-v") as server, anyio.create_task_group() as calls:
            outputs.append(json.dumps(await server.ask("tools/list")))

            async def buy_with_fault(name: str, fault: gw.Fault) -> None:
                async with launcher.server(env, "-v") as second:
                    gateway.purchases.append(fault)
                    outputs.append(json.dumps(await second.call("generate_image", **{**REQUEST, "prompt": name})))
                    outputs.append(second.stderr_file.read_text())

            for name, fault in FAULTS.items():
                calls.start_soon(buy_with_fault, name, fault)
            for tool, arguments in (
                ("get_balance", {}), ("generate_image", {**REQUEST, "prompt": ""}), ("list_tasks", {"sync": True}),
                ("compute_size", {"size": "16:9"}), ("nothing", {}),
            ):  # fmt: skip
                outputs.append(json.dumps(await server.call(tool, **arguments)))
            server.kill()
            await server.wait_for_exit()
            outputs.append(server.stderr_file.read_text())
        async with launcher.server(env, "-v", "tasks", "--json", initialize=False) as command:
            await command.wait_for_exit()
            outputs.append(command.stderr_file.read_text())
    assert len(gateway.simulator.tasks) > 3
    assert [traces_in(text) for text in outputs] == [[]] * len(outputs)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {".png", ".sqlite3"} <= {path.suffix for path in files}
    assert {path.name: traces_in(path.read_bytes()) for path in files if traces_in(path.read_bytes())} == {}


async def record_nothing() -> None:
    """Replace the write to the journal."""


async def test_no_error_and_no_traceback_contains_the_key(gateway: Gateway) -> None:
    """A traceback includes the causes of an error."""
    gateway.purchases = [fault for name, fault in FAULTS.items() if name not in ("none", "odd")]
    texts: list[str] = []

    def quote_always(exchange: Exchange) -> gw.Fault | None:
        return quote_the_key

    gateway.reads = quote_always
    with anyio.fail_after(300):
        async with EvolinkClient(SecretStr(CANARY), base_url=gateway.url) as client:
            for _ in range(len(gateway.purchases)):
                with pytest.raises(EvolinkError) as error:
                    await client.submit({"prompt": "x"}, idempotency_key="k" * 20, on_sending=record_nothing)
                texts += [
                    "".join(traceback.format_exception(error.value)),
                    repr(error.value),
                    str(vars(error.value)),
                ]
            for read in (client.balance, client.recent_tasks, lambda: client.task("task-unified-1-x")):
                with pytest.raises(EvolinkError) as error:
                    await read()
                texts += ["".join(traceback.format_exception(error.value)), repr(error.value)]
            texts += [repr(client), str(vars(client))]
    assert [traces_in(text) for text in texts] == [[]] * len(texts)
    assert any("(the key)" in text for text in texts)


class RequestPrinter(httpx.AsyncBaseTransport):
    """Store how each request prints, and refuse the connection."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert CANARY in request.headers["authorization"]
        self.texts.append(f"{request!r} {request.headers!r}")
        raise httpx.ConnectError("refused", request=request)


async def test_a_printed_request_does_not_contain_the_key() -> None:
    printer = RequestPrinter()
    async with EvolinkClient(SecretStr(CANARY), base_url="http://127.0.0.1:9", transport=printer) as client:
        with pytest.raises(EvolinkError):
            await client.balance()
    assert [traces_in(text) for text in printer.texts] == [[]]


async def test_no_printed_object_contains_the_key(tmp_path: Path) -> None:
    settings = TeamSettings.from_environment({"EVOLINK_API_KEY": CANARY, "EVOLINK_MCP_DATA_DIR": str(tmp_path)})
    async with open_studio(settings) as studio:
        parts = [studio, *vars(studio).values()]
        texts = [repr(settings), str(settings), f"{settings.key}", *map(repr, parts)]
        texts += [str(vars(part)) for part in parts if hasattr(part, "__dict__")]
    assert len(texts) > 10
    assert [traces_in(text) for text in texts] == [[]] * len(texts)


@pytest.mark.parametrize("value", [f"{CANARY} {CANARY}", f"Bearer {CANARY}", f"{CANARY}\u200b", f"“{CANARY}”", "short"])
def test_the_message_about_an_invalid_key_does_not_contain_the_key(value: str) -> None:
    settings = TeamSettings.from_environment({"EVOLINK_API_KEY": value})
    assert settings.key is None
    assert value not in (settings.key_problem or "")
    assert traces_in(settings.key_problem or "") == []


@pytest.mark.parametrize(
    "path",
    ["http://127.0.0.1:9@127.0.0.1:1", "//127.0.0.1:1/", "@127.0.0.1:1/x", ".example.com/", "\\\\127.0.0.1:1", ":1"],
)
async def test_a_request_never_goes_to_another_origin(path: str) -> None:
    async with EvolinkClient(SecretStr(CANARY), base_url="http://127.0.0.1:9") as client:
        with suppress(EvolinkError, httpx.InvalidURL):
            request = client.build_request("GET", path)
            assert (request.url.scheme, request.url.host, request.url.port) == ("http", "127.0.0.1", 9)


async def test_the_client_does_not_send_the_key_to_a_redirect(gateway: Gateway) -> None:
    requests: list[Exchange] = []
    target = Gateway(QuickSimulator(), reads=lambda exchange: requests.append(exchange) or None)
    async with target.open():
        gateway.reads = lambda exchange: gw.before(gw.answers(302, location=f"{target.url}/v1/credits"))
        async with EvolinkClient(SecretStr(CANARY), base_url=gateway.url) as client:
            with pytest.raises(EvolinkError):
                await client.balance()
    assert requests == []
