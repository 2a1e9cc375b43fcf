"""Host and Origin are compared completely: only a hostname with an optional port passes, and only that of this server."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from evolink_mcp.cli.arguments import parse_arguments
from evolink_mcp.transports.authority import authority_in, canonical, origin_in
from evolink_mcp.transports.http_guard import HttpGuard

pytestmark = pytest.mark.anyio

GOOD_HOSTS = {
    b"localhost": b"localhost",
    b"localhost:8000": b"localhost:8000",
    b"localhost:0": b"localhost:0",
    b"localhost:65535": b"localhost:65535",
    b"localhost:080": b"localhost:80",
    b"LOCALHOST:8000": b"localhost:8000",
    b"LocalHost": b"localhost",
    b"127.0.0.1": b"127.0.0.1",
    b"127.0.0.1:1": b"127.0.0.1:1",
    b"[::1]": b"[::1]",
    b"[::1]:8000": b"[::1]:8000",
    b"[0:0:0:0:0:0:0:1]": b"[::1]",
    b"images.example.com": b"images.example.com",
    b"IMAGES.Example.COM:443": b"images.example.com:443",
    b"[2001:DB8::5]": b"[2001:db8::5]",
}
BAD_HOSTS = [
    b"",
    b":8000",
    b"localhost:",
    b"localhost:x",
    b"localhost:80x",
    b"localhost:+80",
    b"localhost:-80",
    b"localhost:8_0",
    b"localhost:65536",
    b"localhost:000080",
    b"localhost:99999999999999999999",
    b"localhost:\xd9\xa3",
    b"localhost:80:80",
    b"localhost:80@evil.example",
    b"localhost@evil.example",
    b"evil.example@localhost",
    b"user:password@localhost",
    b"localhost/",
    b"localhost/path",
    b"localhost:80/path",
    b"localhost\\@evil.example",
    b"localhost\\evil.example",
    b"localhost?x",
    b"localhost#x",
    b"localhost.",
    b"localhost.:80",
    b".localhost",
    b"localhost.evil.example",
    b"evil.localhost",
    b"evil.example",
    b" localhost",
    b"localhost ",
    b"localhost :80",
    b"local host",
    b"localhost\t",
    b"localhost\r\n",
    b"localhost\n",
    b"localhost\x00",
    b"localhost,evil.example",
    b"localhost;evil.example",
    b"localhost%00",
    b"localhost%2eevil.example",
    b"\xef\xbd\x8cocalhost",
    b"127.1",
    b"0x7f.0.0.1",
    b"2130706433",
    b"127.0.0.1.evil.example",
    b"127.0.0.2",
    b"::1",
    b"[::1",
    b"::1]",
    b"[::1]x",
    b"[::1]evil.example",
    b"[::1].evil.example",
    b"[::1]:",
    b"[::1]:x",
    b"[::1]]",
    b"[[::1]]",
    b"[::1%25lo]",
    b"[::1%lo]",
    b"[::ffff:127.0.0.1]",
    b"[localhost]",
    b"[127.0.0.1]",
    b"[]",
    b"[:]",
    b"null",
    b"http://localhost",
    b"*",
]
BAD_ORIGINS = [
    b"",
    b"null",
    b"localhost",
    b"//localhost",
    b"://localhost",
    b"http:localhost",
    b"http:/localhost",
    b"http:///localhost",
    b"http:\\\\localhost",
    b"file://localhost",
    b"ws://localhost",
    b"chrome-extension://localhost",
    b"javascript://localhost",
    b"https+http://localhost",
    b" http://localhost",
    b"http ://localhost",
    b"http:// localhost",
    b"http://localhost http://evil.example",
    b"http://localhost, http://evil.example",
    b"http://http://localhost",
    b"http://localhost://evil.example",
]


async def echo_headers(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer with the headers that have passed the guard."""
    headers = [pair for pair in scope["headers"] if pair[0] in (b"host", b"origin")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body"})


GUARD = HttpGuard(echo_headers, ["Images.Example.COM", "2001:db8:0::5"], 1000)


async def status_and_headers(*headers: tuple[bytes, bytes], path: str = "/mcp") -> tuple[int, dict[bytes, bytes]]:
    """Return the status of a request with these headers, and the headers that the app received."""
    start_messages: list[Any] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            start_messages.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "method": "GET", "path": path, "headers": list(headers)}
    await GUARD(scope, receive, send)
    (start,) = start_messages
    return start["status"], {name: value for name, value in start["headers"] if name in (b"host", b"origin")}


@pytest.mark.parametrize(("host", "canonical_host"), GOOD_HOSTS.items())
async def test_a_name_of_this_server_is_accepted_and_normalized(host: bytes, canonical_host: bytes) -> None:
    assert await status_and_headers((b"host", host)) == (200, {b"host": canonical_host})
    for scheme in (b"http", b"https", b"HTTP"):
        origin = (b"origin", scheme + b"://" + host)
        expected = {b"host": b"localhost", b"origin": scheme.lower() + b"://" + canonical_host}
        assert await status_and_headers((b"host", b"localhost"), origin) == (200, expected)


@pytest.mark.parametrize("host", BAD_HOSTS)
@pytest.mark.parametrize("path", ["/mcp", "/healthz"])
async def test_every_other_host_is_refused(host: bytes, path: str) -> None:
    assert (await status_and_headers((b"host", host), path=path))[0] == 421


@pytest.mark.parametrize("origin", [*BAD_ORIGINS, *(b"http://" + host for host in BAD_HOSTS)])
@pytest.mark.parametrize("path", ["/mcp", "/healthz"])
async def test_every_other_origin_is_refused(origin: bytes, path: str) -> None:
    assert (await status_and_headers((b"host", b"localhost"), (b"origin", origin), path=path))[0] == 403


async def test_a_missing_or_repeated_header_is_refused() -> None:
    good = (b"host", b"localhost")
    page = (b"origin", b"http://localhost")
    assert (await status_and_headers())[0] == 421
    assert (await status_and_headers(good, good))[0] == 421
    assert (await status_and_headers(good, page, page))[0] == 403
    assert (await status_and_headers(good, (b"origin", b"http://evil.example"), page))[0] == 403
    assert (await status_and_headers(good, page, (b"origin", b"http://evil.example")))[0] == 403


@settings(max_examples=500, deadline=None, database=None, derandomize=True)
@example(b"127.0.0.1:8000@evil.net")
@given(
    st.binary(max_size=20)
    | st.tuples(
        st.sampled_from([b"", b"[", b"user@", b" "]),
        st.sampled_from([b"localhost", b"127.0.0.1", b"::1", b"[::1]"]),
        st.text("]:@/\\.?#%0123456789abx \t", max_size=12).map(str.encode),
    ).map(b"".join)
)
def test_the_parser_accepts_only_a_complete_header(value: bytes) -> None:
    """The header has only the hostname and the port."""
    authority = authority_in(value)
    if authority is not None:
        hostname, _, port = value.decode("ascii").rpartition(":") if authority.port else (value.decode("ascii"), "", "")
        assert canonical(hostname) == authority.hostname
        assert authority.port == (f":{int(port)}" if port else "")
        assert port.isdigit() or port == ""
        assert not set("@/\\?#% \t") & set(value.decode("ascii"))
    origin = origin_in(b"https://" + value)
    assert (None if origin is None else origin.authority) == authority


@pytest.mark.parametrize(
    "name",
    [
        "http://example.com",
        "example.com:8000",
        "example.com/path",
        "user@example.com",
        "*",
        "",
        "[::1",
        "a b",
        "é.example",
    ],
)
def test_a_name_that_is_no_hostname_is_refused_at_the_start(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_error:
        parse_arguments(["http", "--allowed-host", name])
    assert exit_error.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_allowed_name_may_have_capital_letters_or_be_an_address() -> None:
    options = parse_arguments(["http", "--allowed-host", "Example.COM", "--allowed-host", "2001:DB8:0::5"])
    assert options.allowed_host == ["example.com", "[2001:db8::5]"]
