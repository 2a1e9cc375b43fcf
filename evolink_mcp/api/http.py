"""What HTTP carries: one whole answer, a definite no in any of EvoLink's shapes, and where a connection may go."""

from __future__ import annotations

import email.utils
import ipaddress
import json
import math
import re
import ssl
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import httpx2 as httpx

from evolink_mcp.api import urls
from evolink_mcp.api.task import as_dict
from evolink_mcp.errors import BY_STATUS, EvolinkError, RateLimited, Rejected, Unreadable
from evolink_mcp.sanitize import harmless

CONNECT_TIMEOUT_S = 10.0
RETRY_AFTER_MAX_S = 120.0
JSON_MAX_BYTES = 1 << 20
POOL_SIZE = 16

# Everything httpx raises for a request that went wrong on the way; a test holds this against its whole tree.
TRANSPORT_ERRORS = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, httpx.CookieConflict, ssl.SSLError, OSError)
NEVER_CONNECTED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)
POOL = httpx.Limits(max_connections=POOL_SIZE, max_keepalive_connections=POOL_SIZE, keepalive_expiry=30)


@dataclass(frozen=True, slots=True)
class Reply:
    """One HTTP answer, read whole and within the cap."""

    status: int
    headers: httpx.Headers
    body: bytes

    def json(self) -> Any:
        """The body as JSON; BOMs are skipped, NaN and Infinity become None.

        Raises:
            Unreadable: it is not JSON.
        """
        try:
            return json.loads(self.body.decode("utf-8-sig"), parse_constant=lambda _: None)
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"EvoLink's answer (HTTP {self.status}) is not JSON") from error


class CheckedAddress(httpx.AsyncBaseTransport):
    """Connects to the very address that was checked to be public, so that DNS cannot answer differently later."""

    def __init__(self, inner: httpx.AsyncBaseTransport) -> None:
        self._inner = inner

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request to the address that was checked, under the name that was asked for.

        Raises:
            httpx.ConnectError: one of the host's addresses is not public, or it has none.
        """
        host = request.url.host
        found = await anyio.getaddrinfo(host, request.url.port or 443)
        public = [str(entry[4][0]) for entry in found if urls.is_public_ip(str(entry[4][0]))]
        if not public or len(public) != len(found):
            raise httpx.ConnectError(f"{harmless(host, 80)} is not a public address")
        chosen = next((ip for ip in public if ipaddress.ip_address(ip).version == 4), public[0])
        request.extensions = {**request.extensions, "sni_hostname": host}
        request.url = request.url.copy_with(host=chosen)
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        """Close the transport that connects."""
        await self._inner.aclose()


@asynccontextmanager
async def stream(client: httpx.AsyncClient, request: httpx.Request) -> AsyncGenerator[httpx.Response]:
    """An answer as it arrives. Its connection is given back even if the reader is cancelled."""
    response = await client.send(request, stream=True)
    try:
        yield response
    finally:
        with anyio.CancelScope(shield=True):
            await response.aclose()


async def whole_body(response: httpx.Response) -> bytes:
    """The body as it came; it is never decompressed, because a small body can become a very large one.

    Raises:
        Unreadable: it is compressed, or larger than JSON_MAX_BYTES.
    """
    if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
        raise Unreadable("EvoLink's answer is compressed although it was asked not to be")
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > JSON_MAX_BYTES:
            raise Unreadable("EvoLink's answer is larger than 1 MiB")
    return bytes(body)


def retry_after_s(headers: httpx.Headers, now: float | None = None) -> float | None:
    """`Retry-After` in seconds, from seconds or an HTTP date, clamped to [0, 120]; None when absent or garbage."""
    text = headers.get("retry-after", "").strip()
    if not text or len(text) > 64:
        return None
    if re.fullmatch(r"[+-]?(\d+(\.\d*)?|inf|nan)", text, re.IGNORECASE) or re.fullmatch(r"\d+e\d+", text):
        wait = float(text)
        return None if math.isnan(wait) else min(max(wait, 0.0), RETRY_AFTER_MAX_S)
    try:
        when = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError, OSError):
        return None
    return min(max(when - (time.time() if now is None else now), 0.0), RETRY_AFTER_MAX_S)


def rejection(reply: Reply) -> EvolinkError:
    """The error for an answer whose status is in BY_STATUS, in any of the shapes that EvoLink is known to use."""
    code, advice = BY_STATUS[reply.status]
    said, upstream_code = _words(reply)
    what = f"{advice.meaning} (HTTP {reply.status}"
    what += f", {upstream_code})" if upstream_code and upstream_code != str(reply.status) else ")"
    if said:
        what += f"; EvoLink says: “{said}”"
    kind = RateLimited if reply.status == 429 else Rejected
    return kind(
        what,
        code=code,
        retryable=advice.repeat,
        advice=advice.todo,
        http_status=reply.status,
        retry_after_s=retry_after_s(reply.headers),
    )


def _words(reply: Reply) -> tuple[str, str]:
    """(message, code) of an error body: {"error": {...}}, {"error": "x"}, {"code", "msg"}, or neither."""
    try:
        data = reply.json()
    except Unreadable:
        return "", ""
    told = as_dict(data)
    inner = told.get("error")
    source = as_dict(inner) or told
    message = source.get("message") or source.get("msg") or source.get("error_description")
    if message is None and isinstance(inner, str):
        message = inner
    code = source.get("code")
    return harmless(message) if message else "", harmless(code, 60) if isinstance(code, str | int) else ""


def dump(body: dict[str, Any]) -> bytes:
    """The body of a request as JSON in UTF-8."""
    return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()


def why(error: BaseException) -> str:
    """The kind of a transport failure in words of ours; the text of a foreign exception may hold a secret."""
    if isinstance(error, EvolinkError):
        return lower_first(error.what)
    return {
        "ConnectError": "no connection",
        "ConnectTimeout": f"no connection within {CONNECT_TIMEOUT_S:.0f} s",
        "ReadError": "the connection broke",
        "WriteError": "the connection broke",
        "RemoteProtocolError": "the connection was closed early or the answer was not HTTP",
    }.get(type(error).__name__, type(error).__name__)


def lower_first(text: str) -> str:
    """A sentence as the part of a longer one: its first letter small, unless it is EvoLink's."""
    return text if text.startswith("EvoLink") else text[:1].lower() + text[1:]
