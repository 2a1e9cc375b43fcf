"""Read the issuer of a certificate that is not trusted, for the text of the error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import anyio
import httpx2 as httpx

from evolink_mcp.sanitize import harmless

ISSUER_DEADLINE_S = 5.0
ISSUER_MAX_CHARS = 80
_EXPLICIT_VERSION = 0xA0
_BMP_STRING = 0x1E
# The object identifiers 2.5.4.3 and 2.5.4.10 (X.520).
_COMMON_NAME = b"\x55\x04\x03"
_ORGANIZATION = b"\x55\x04\x0a"


async def issuer_at(url: str) -> str | None:
    """Return the issuer of the certificate of a server, from a request without the key and without verification.

    None: the server shows no certificate, or its issuer has no name.
    """
    certificate: bytes | None = None

    async def trace(event: str, info: dict[str, Any]) -> None:
        nonlocal certificate
        if event.endswith("start_tls.complete"):
            tls = info["return_value"].get_extra_info("ssl_object")
            # Without verification Python parses no certificate: only the binary form is available.
            certificate = tls.getpeercert(binary_form=True)

    # The certificate is only displayed, so it is not verified. Nothing of the answer is used.
    context = httpx.create_ssl_context(verify=False)
    with suppress(httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, ImportError):
        with anyio.move_on_after(ISSUER_DEADLINE_S):
            async with (
                httpx.AsyncClient(verify=context) as client,
                client.stream("HEAD", url, extensions={"trace": trace}),
            ):
                pass
    return None if certificate is None else issuer_of(certificate)


def issuer_of(certificate: bytes) -> str | None:
    """Return the common name, or else the organization, of the issuer of a certificate in DER (RFC 5280)."""
    try:
        (_, whole), *_ = _items(certificate)
        (_, to_be_signed), *_ = _items(whole)
        # Certificates of version 1 have no version field. Without it, the issuer is always the third field.
        fields = [item for item in _items(to_be_signed) if item[0] != _EXPLICIT_VERSION]
        issuer = fields[2][1]  # behind the serial number and the algorithm
        names: dict[bytes, str] = {}
        for _, relative_name in _items(issuer):
            for _, attribute in _items(relative_name):
                (_, kind), (tag, value) = _items(attribute)
                names[kind] = value.decode("utf-16-be" if tag == _BMP_STRING else "utf-8", "replace")
    except (IndexError, ValueError):
        return None
    name = names.get(_COMMON_NAME) or names.get(_ORGANIZATION)
    return harmless(name, ISSUER_MAX_CHARS) if name else None


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and content of each element of DER data."""
    at = 0
    while at < len(data):
        tag = data[at]
        length = data[at + 1]
        at += 2
        if length & 0x80:
            size = length & 0x7F
            length = int.from_bytes(data[at : at + size])
            at += size
        if at + length > len(data):
            raise ValueError("the element is incomplete")
        yield tag, data[at : at + length]
        at += length
