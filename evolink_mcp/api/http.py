"""HTTP details: whole answers with limits, waits, and connections to public addresses only."""

from __future__ import annotations

import email.utils
import ipaddress
import json
import logging
import math
import re
import socket
import ssl
import time
import zlib
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import anyio
import httpx2 as httpx
from pydantic import SecretStr

from evolink_mcp.api import urls
from evolink_mcp.api.proxies import proxy_for, proxy_variables
from evolink_mcp.causes import ENVIRONMENT_UNUSABLE
from evolink_mcp.errors import EvolinkError, Unreachable, Unreadable
from evolink_mcp.sanitize import harmless, without
from evolink_mcp.tracing import span

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
# The longest pause of polls after a 429.
RETRY_AFTER_MAX_S = 120.0
# The longest Retry-After that delays purchases.
RETRY_AT_MAX_S = 31 * 86_400.0
JSON_MAX_BYTES = 1 << 20
POOL_SIZE = 16  # connections of one HTTP client
DNS_ANSWERS_MAX = 64  # each address of a host is checked
COMPRESSIONS = ("gzip", "x-gzip", "deflate")

# All errors of httpx for a request that failed on the way. A test compares this with its exception tree.
TRANSPORT_ERRORS = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, httpx.CookieConflict, ssl.SSLError, OSError)
NEVER_CONNECTED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)
# The well-known prefix of RFC 6052. The local prefix 64:ff9b:1::/48 may lead into the network of this machine.
DNS64 = ipaddress.IPv6Network("64:ff9b::/96")
POOL = httpx.Limits(max_connections=POOL_SIZE, max_keepalive_connections=POOL_SIZE, keepalive_expiry=30)


# Receives the method and path of each HTTP request, and the status of its answer or NO_ANSWER.
Observe = Callable[[str, str], None]
NO_ANSWER = "no answer"


def ignore(request: str, outcome: str) -> None:
    """Ignore the outcome of an HTTP request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    """How a client opens its connections."""

    connect_timeout_s: float = CONNECT_TIMEOUT_S
    make_ssl_context: Callable[[], ssl.SSLContext] = httpx.create_ssl_context


DEFAULT_HTTP_OPTIONS = HttpOptions()


@dataclass(frozen=True, slots=True)
class Reply:
    """One complete HTTP answer. It may quote `key`, the key of its request."""

    status: int
    headers: httpx.Headers
    body: bytes
    key: SecretStr | None = None

    def json(self) -> Any:
        """Return the body as JSON, without the key. A BOM is skipped; NaN and Infinity become None.

        Raises:
            Unreadable: the body is not JSON.
        """
        try:
            data = json.loads(self.body.decode("utf-8-sig"), parse_constant=lambda _: None)
            # `without` is recursive too, so JSON of great depth may end here with RecursionError.
            return data if self.key is None else without(self.key.get_secret_value(), data)
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"EvoLink's answer (HTTP {self.status}) is not JSON") from error


class CheckedAddress(httpx.AsyncBaseTransport):
    """Connect to exactly the address that was checked to be public, so that a second DNS answer has no effect.

    A URL that the proxy variables of the environment (and NO_PROXY) send through a proxy goes there, and the proxy
    resolves the name. `proxied` makes the transport for the address of a proxy.
    """

    def __init__(
        self,
        inner: httpx.AsyncBaseTransport,
        proxied: Callable[[str], httpx.AsyncBaseTransport] | None = None,
    ) -> None:
        self._inner = inner
        self._proxied = proxied
        self._proxies: dict[str, httpx.AsyncBaseTransport] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request to a checked address of its host.

        Raises:
            httpx.ConnectError: the host has no address, more than DNS_ANSWERS_MAX, or one that is not public.
        """
        proxy = proxy_for(request.url.scheme, request.url.host)
        if proxy is not None and self._proxied is not None:
            if proxy.url not in self._proxies:
                with preparing():
                    self._proxies[proxy.url] = self._proxied(proxy.url)
            return await self._proxies[proxy.url].handle_async_request(request)
        host = request.url.host
        port = request.url.port or 443
        entries = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
        if len(addresses) > DNS_ANSWERS_MAX:
            raise httpx.ConnectError(f"{harmless(host, 80)} has more than {DNS_ANSWERS_MAX} addresses")
        public = [ip for ip in addresses if urls.is_public_ip(_behind_dns64(ip))]
        # A mix of public and internal addresses is a sign of DNS rebinding.
        if not public or len(public) != len(addresses):
            raise httpx.ConnectError(f"{harmless(host, 80)} is not a public address")
        # An IPv6 address may have no route from this machine.
        chosen = next((ip for ip in public if ipaddress.ip_address(ip).version == 4), public[0])
        # The certificate is for the name, but the URL of the connection has the address.
        request.extensions = {**request.extensions, "sni_hostname": host}
        request.url = request.url.copy_with(host=chosen)
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        """Close all transports."""
        for transport in (self._inner, *self._proxies.values()):
            await transport.aclose()


def _behind_dns64(address: str) -> str:
    """Return the IPv4 address inside a DNS64 address (64:ff9b::/96), and any other address unchanged."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address) and parsed in DNS64:
        return str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF))
    return address


@asynccontextmanager
async def stream(
    client: httpx.AsyncClient, request: httpx.Request, observe: Observe = ignore
) -> AsyncGenerator[httpx.Response]:
    """Yield the answer before its body. The connection is released even if the reader is cancelled."""
    name = _span_name(request)
    outcome = NO_ANSWER
    with span(name, http__request__method=request.method, server__address=request.url.host) as current:
        try:
            response = await client.send(request, stream=True)
            outcome = str(response.status_code)
        finally:
            observe(name, outcome)
        current.set_attribute("http.response.status_code", response.status_code)
        try:
            yield response
        finally:
            with anyio.CancelScope(shield=True):
                await response.aclose()


def _span_name(request: httpx.Request) -> str:
    """Return the name of the span: without a task ID, and without the URL of an image, which may be signed."""
    path = request.url.path if "authorization" in request.headers else "/picture"
    if path.startswith("/v1/tasks/") and not path.endswith("/batch"):
        path = "/v1/tasks/{id}"
    return f"{request.method} {path}"


async def whole_body(response: httpx.Response) -> bytes:
    """Return the body. If the headers name a compression, decompress it.

    Raises:
        Unreadable: the body cannot be decompressed, or is larger than JSON_MAX_BYTES.
    """
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > JSON_MAX_BYTES:
            raise Unreadable("EvoLink's answer is larger than 1 MiB")
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return bytes(body)
    text, is_complete = decompressed(bytes(body))
    if encoding not in COMPRESSIONS or not is_complete:
        raise Unreadable("EvoLink's answer has an unknown or damaged compression")
    return text


def decompressed(data: bytes) -> tuple[bytes, bool]:
    """Return gzip or deflate data decompressed, and whether all of it is intact and at most JSON_MAX_BYTES.

    Otherwise return the part before the damage or the limit: a small body could become a very large one.
    """
    longest = b""
    for format_bits in (zlib.MAX_WBITS | 32, -zlib.MAX_WBITS):  # gzip or zlib by its header, then deflate without one
        decompressor = zlib.decompressobj(format_bits)
        text = bytearray()
        with suppress(zlib.error):
            for start in range(0, len(data), 256):  # short pieces: an error discards the output of its piece
                text += decompressor.decompress(data[start : start + 256], JSON_MAX_BYTES + 1 - len(text))
                if len(text) > JSON_MAX_BYTES:
                    break
        if decompressor.eof and len(text) <= JSON_MAX_BYTES:
            return bytes(text), True
        longest = max(longest, bytes(text[:JSON_MAX_BYTES]), key=len)
    return longest, False


def retry_after_s(headers: httpx.Headers, now: float | None = None) -> float | None:
    """Return `Retry-After` in seconds, clamped to [0, 120]; it may be a number or an HTTP date. None: no valid value."""
    wait_s = _wait_s(headers, time.time() if now is None else now)
    return None if wait_s is None else min(max(wait_s, 0.0), RETRY_AFTER_MAX_S)


def retry_at(headers: httpx.Headers, now: float) -> float | None:
    """Return the time that `Retry-After` names, in epoch seconds. None: no valid value, or it is in the past.

    A wait above RETRY_AT_MAX_S is an error of the sender. It counts as RETRY_AFTER_MAX_S.
    """
    wait_s = _wait_s(headers, now)
    if wait_s is None or wait_s <= 0:
        return None
    return now + (wait_s if wait_s <= RETRY_AT_MAX_S else RETRY_AFTER_MAX_S)


def _wait_s(headers: httpx.Headers, now: float) -> float | None:
    text = headers.get("retry-after", "").strip()
    if not text or len(text) > 64:
        return None
    if re.fullmatch(r"[+-]?(\d+(\.\d*)?|inf|nan)", text, re.IGNORECASE) or re.fullmatch(r"\d+e\d+", text):
        wait_s = float(text)
        return None if math.isnan(wait_s) else wait_s
    when = moment_of(text)
    return None if when is None else when - now


def moment_of(text: str) -> float | None:
    """Return an HTTP date in epoch seconds. None: it is not a date."""
    try:
        return email.utils.parsedate_to_datetime(text[:64]).timestamp()
    except (ValueError, TypeError, OverflowError, OSError):
        return None


@contextmanager
def preparing() -> Generator[None]:
    """Translate the errors of building an HTTP client: a proxy or certificate file cannot be used.

    Raises:
        Unreachable: its text names the variables, not their values.
    """
    try:
        yield
    except (ValueError, ImportError, OSError, httpx.InvalidURL) as error:
        variable = " or ".join(["SSL_CERT_FILE", "SSL_CERT_DIR"] if isinstance(error, OSError) else proxy_variables())
        # The text of the error may contain the password of a proxy.
        cause = ENVIRONMENT_UNUSABLE.about(variable=variable, reason=type(error).__name__)
        log.warning("%s. %s", cause.meaning, cause.next_step)
        raise Unreachable(
            cause.meaning, code=cause.code, retryable=cause.retryable, advice=cause.next_step, cause=cause
        ) from error


def dump(body: dict[str, Any]) -> bytes:
    """Return a request body as JSON in UTF-8."""
    return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()


def why(error: BaseException) -> str:
    """Return the kind of a transport failure. The text of a foreign exception may contain a secret, so it is not used."""
    if isinstance(error, EvolinkError):
        return lower_first(error.message)
    return {
        "ConnectError": "no connection",
        "ConnectTimeout": f"no connection within {CONNECT_TIMEOUT_S:.0f} s",
        "ReadError": "the connection broke",
        "WriteError": "the connection broke",
        "RemoteProtocolError": "the connection was closed early or the answer was not HTTP",
    }.get(type(error).__name__, type(error).__name__)


def lower_first(text: str) -> str:
    """Return the text for the middle of a sentence: with a lower-case first letter, except in "EvoLink"."""
    return text if text.startswith("EvoLink") else text[:1].lower() + text[1:]
