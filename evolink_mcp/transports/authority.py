"""Parse the Host and Origin headers of an HTTP request completely, so that they can be compared with hostnames."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

PORT_MAX = 65_535
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_AUTHORITY = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")


@dataclass(frozen=True, slots=True)
class Authority:
    """A canonical hostname, and a port as a URL has it: ":8000", or nothing."""

    hostname: str
    port: str

    def __str__(self) -> str:
        return self.hostname + self.port


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a web page."""

    scheme: str
    authority: Authority

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"


def authority_in(value: bytes) -> Authority | None:
    """Return the hostname and port in a Host header. None: it holds anything else, for example a user name or a path."""
    # A part is not enough: the host of 127.0.0.1:8000@evil.net is evil.net.
    match = _AUTHORITY.fullmatch(value)
    hostname = None if match is None else canonical(match[1].decode("ascii"))
    if match is None or hostname is None:
        return None
    if match[2] is None:
        return Authority(hostname, "")
    port = int(match[2])
    return Authority(hostname, f":{port}") if port <= PORT_MAX else None


def origin_in(value: bytes) -> Origin | None:
    """Return the scheme and authority in an Origin header. None: it is not the origin of a web page."""
    scheme, _, rest = value.partition(b"://")
    authority = authority_in(rest)
    if scheme.lower() not in (b"http", b"https") or authority is None:
        return None
    return Origin(scheme.lower().decode("ascii"), authority)


def canonical(name: str) -> str | None:
    """Return a hostname in lower case, or an IPv6 address in its shortest form and in brackets. None: it is neither."""
    if _NAME.fullmatch(name):
        return name.lower()
    has_brackets = name.startswith("[") and name.endswith("]")
    try:
        address = ipaddress.IPv6Address(name[1:-1] if has_brackets else name)
    except ValueError:
        return None
    return None if address.scope_id else f"[{address}]"
