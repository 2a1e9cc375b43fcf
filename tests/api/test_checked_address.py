"""The server downloads a picture only from the address that it checked, and never from an internal address."""

from __future__ import annotations

import socket
from typing import Any

import anyio
import httpx2 as httpx
import pytest

from evolink_mcp.api.http import CheckedAddress

pytestmark = pytest.mark.anyio

V4, V6, INSIDE = "93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "10.0.0.7"


class FakeTransport(httpx.AsyncBaseTransport):
    """Records the requests and sends none."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.is_closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return httpx.Response(200)

    async def aclose(self) -> None:
        self.is_closed = True


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Return the answers of the resolver by hostname."""
    values: dict[str, list[str]] = {}

    async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        return [
            (socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port))
            for ip in values[host]
        ]

    monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)
    return values


@pytest.mark.parametrize(
    ("addresses", "chosen_address"),
    [
        pytest.param([V4], V4, id="IPv4"),
        pytest.param([V6], V6, id="IPv6"),
        pytest.param([V6, V4], V4, id="IPv4 before IPv6, which may have no route"),
    ],
)
async def test_the_client_connects_to_the_checked_address(
    names: dict[str, list[str]], addresses: list[str], chosen_address: str
) -> None:
    names["files.example.net"] = addresses
    transport = FakeTransport()
    async with httpx.AsyncClient(transport=CheckedAddress(transport)) as client:
        answer = await client.get("https://files.example.net/a.png?b=c")
    (request,) = transport.requests
    assert answer.status_code == 200
    assert request.url.host == chosen_address
    assert request.url.raw_path == b"/a.png?b=c"
    # The certificate and the virtual host are those of the name, not of the address.
    assert (request.headers["host"], request.extensions["sni_hostname"]) == ("files.example.net", "files.example.net")
    assert transport.is_closed


@pytest.mark.parametrize(
    "addresses",
    [
        pytest.param([INSIDE], id="an address inside the network"),
        pytest.param([V4, INSIDE], id="one of two inside"),
        pytest.param(["::1"], id="loopback"),
        pytest.param(["169.254.169.254"], id="the cloud's metadata"),
        pytest.param([], id="no address"),
    ],
)
async def test_a_name_with_an_internal_address_is_refused(names: dict[str, list[str]], addresses: list[str]) -> None:
    names["files.example.net"] = addresses
    transport = FakeTransport()
    async with httpx.AsyncClient(transport=CheckedAddress(transport)) as client:
        with pytest.raises(httpx.ConnectError, match="is not a public address"):
            await client.get("https://files.example.net/a.png")
    assert transport.requests == []


@pytest.mark.parametrize(
    ("addresses", "public"),
    [
        pytest.param(["64:ff9b::5db8:d822"], True, id="an IPv4 address behind DNS64"),
        pytest.param(["64:ff9b::5db8:d822", V4], True, id="both"),
        pytest.param(["64:ff9b::a00:7"], False, id="an inside address behind DNS64"),
        pytest.param(["64:ff9b::7f00:1"], False, id="this machine behind DNS64"),
        pytest.param(["64:ff9b:1::5db8:d822"], False, id="a local-use prefix"),
    ],
)
async def test_an_address_behind_dns64_is_checked_by_its_ipv4_address(
    names: dict[str, list[str]], addresses: list[str], public: bool
) -> None:
    names["files.example.net"] = addresses
    transport = FakeTransport()
    async with httpx.AsyncClient(transport=CheckedAddress(transport)) as client:
        if public:
            await client.get("https://files.example.net/1.png")
        else:
            with pytest.raises(httpx.ConnectError):
                await client.get("https://files.example.net/1.png")
    assert len(transport.requests) == int(public)


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variables", "expected_proxy"),
    [
        pytest.param({"HTTPS_PROXY": "http://proxy:3128"}, "http://proxy:3128", id="HTTPS_PROXY"),
        pytest.param({"ALL_PROXY": "socks5://proxy:1080"}, "socks5://proxy:1080", id="ALL_PROXY"),
        pytest.param({"HTTP_PROXY": "http://proxy:3128"}, None, id="for http only"),
        pytest.param({"NO_PROXY": "*"}, None, id="NO_PROXY alone"),
        pytest.param({"npm_config_https_proxy": "http://proxy:3128"}, None, id="npm's"),
        pytest.param({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "example.net"}, None, id="exempted"),
    ],
)
async def test_the_check_is_decided_for_each_url(
    names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, no_proxies: None, variables: dict[str, str],
    expected_proxy: str | None,
) -> None:  # fmt: skip
    """The client never connects to an internal address. Only a proxy may."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    names["files.example.net"] = [INSIDE]
    used_proxies: list[str] = []
    transport, proxy_transport = FakeTransport(), FakeTransport()

    def open_proxy(proxy: str) -> httpx.AsyncBaseTransport:
        used_proxies.append(proxy)
        return proxy_transport

    async with httpx.AsyncClient(transport=CheckedAddress(transport, open_proxy)) as client:
        if expected_proxy is None:
            with pytest.raises(httpx.ConnectError):
                await client.get("https://files.example.net/1.png")
        else:
            await client.get("https://files.example.net/1.png")
    assert (used_proxies, len(proxy_transport.requests), transport.requests) == (
        [expected_proxy] * (expected_proxy is not None),
        int(expected_proxy is not None),
        [],
    )
    assert transport.is_closed


async def test_the_key_does_not_go_through_a_proxy_unencrypted(
    monkeypatch: pytest.MonkeyPatch, no_proxies: None
) -> None:
    """An EvoLink on this machine has no TLS, so the proxy of HTTP_PROXY must not get the request."""
    from pydantic import SecretStr

    from evolink_mcp.api.client import EvolinkClient
    from evolink_mcp.errors import EvolinkError

    messages: list[bytes] = []

    async def proxy(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            messages.append(await stream.receive())

    with anyio.fail_after(300):
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        async with listener, anyio.create_task_group() as group:
            group.start_soon(listener.serve, proxy)
            async with EvolinkClient(SecretStr("sk-0123456789"), base_url="http://127.0.0.1:9") as client:
                with pytest.raises(EvolinkError):
                    await client.balance()
            group.cancel_scope.cancel()
    assert messages == []
