"""Pictures are fetched from the very address that was checked: never from inside the network."""

from __future__ import annotations

import socket
from typing import Any

import anyio
import httpx2 as httpx
import pytest

from evolink_mcp.api.http import CheckedAddress

pytestmark = pytest.mark.anyio

V4, V6, INSIDE = "93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "10.0.0.7"


class Wire(httpx.AsyncBaseTransport):
    """Notes where a request would connect to."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return httpx.Response(200)

    async def aclose(self) -> None:
        self.closed = True


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What the resolver says, by host name."""
    known: dict[str, list[str]] = {}

    async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        return [
            (socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port))
            for ip in known[host]
        ]

    monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)
    return known


@pytest.mark.parametrize(
    ("addresses", "chosen"),
    [
        pytest.param([V4], V4, id="IPv4"),
        pytest.param([V6], V6, id="IPv6"),
        pytest.param([V6, V4], V4, id="IPv4 before IPv6, which may have no route"),
    ],
)
async def test_the_checked_address_is_the_one_that_is_connected_to(
    names: dict[str, list[str]], addresses: list[str], chosen: str
) -> None:
    names["files.example.net"] = addresses
    wire = Wire()
    async with httpx.AsyncClient(transport=CheckedAddress(wire)) as client:
        answer = await client.get("https://files.example.net/a.png?b=c")
    (request,) = wire.requests
    assert answer.status_code == 200
    assert request.url.host == chosen
    assert request.url.raw_path == b"/a.png?b=c"
    # The certificate and the virtual host are those of the name, not of the address.
    assert (request.headers["host"], request.extensions["sni_hostname"]) == ("files.example.net", "files.example.net")
    assert wire.closed


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
async def test_a_name_that_leads_inside_is_not_connected_to(names: dict[str, list[str]], addresses: list[str]) -> None:
    names["files.example.net"] = addresses
    wire = Wire()
    async with httpx.AsyncClient(transport=CheckedAddress(wire)) as client:
        with pytest.raises(httpx.ConnectError, match="is not a public address"):
            await client.get("https://files.example.net/a.png")
    assert wire.requests == []
