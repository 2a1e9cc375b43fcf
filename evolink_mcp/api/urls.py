"""Decide whether a URL or an IP address leads to the public internet, in every spelling.

Nothing is resolved here. The HTTP client checks each resolved address with `is_public_ip`.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from urllib.parse import urlsplit

BASE_URL = "https://api.evolink.ai"
FILES_BASE_URL = "https://files-api.evolink.ai"
KEY = re.compile(r"[\x21-\x7e]{8,512}")  # the form of a key: visible ASCII characters, no blanks

# Fixed lists from the IANA special-purpose registries: `is_global` changes with Python and lets NAT64, 6to4,
# v4-compatible and multicast addresses through.
_NOT_PUBLIC_V4 = tuple(
    ipaddress.IPv4Network(block)
    for block in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
        *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # Azure's platform service has a public number
    )
)
# IANA assigns global unicast addresses only from this block (RFC 4291).
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
# Protocol assignments with Teredo, documentation, 6to4, documentation.
_NOT_PUBLIC_V6 = tuple(
    ipaddress.IPv6Network(block) for block in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)

# RFC 6761 and its registry, RFC 6762 appendix G, RFC 8375, RFC 9476: these names are never delegated.
_SPECIAL_SUFFIXES = frozenset(
    {
        *("alt", "arpa", "corp", "example", "home", "internal", "intranet", "invalid"),
        *("lan", "local", "localdomain", "localhost", "onion", "private", "svc", "test"),
    }
)
# RFC 2606 reserves these names for examples. _SPECIAL_SUFFIXES contains the reserved top levels.
_EXAMPLE_DOMAINS = frozenset({("example", suffix) for suffix in ("com", "net", "org")})
_TEMPLATE = re.compile(
    r"[<>{}]|//(?:[^/?]*\.)?your[-_]|(?<![a-z0-9])your[-_.]?(?:api|app|bucket|callback|cdn|company|domain|endpoint|file|"
    r"host|image|mask|photo|picture|project|server|site|subdomain|tunnel|url|webhook|website)(?![a-z])",
    re.IGNORECASE,
)

# The ideographic, full-width, half-width and one-dot-leader stops: resolvers may read each as a dot.
_DOT_LOOKALIKES = "\u3002\uff0e\uff61\u2024"
# IDNA drops these marks, so that one of them can hide "127.0.0.1".
_VANISHING = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?]*)(.*)", re.DOTALL)
_AUTHORITY = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::([0-9]{1,5}))?")
_ASCII_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?")
_HEX_NUMBER = re.compile(r"0x[0-9a-f]*")
_MAX_PORT = 65_535
# RFC 1035 limits a label to 63 bytes and a name to 253 characters.
_MAX_LABEL = 63
_MAX_HOST = 253


def check_public_url(text: str, *, schemes: tuple[str, ...] = ("https",), max_length: int = 2048) -> str:
    """Return `text` unchanged if it is a URL of one of `schemes` to a public host.

    Raises:
        ValueError: it is not. The message is one sentence without the URL, which may contain a secret.
    """
    if len(text) > max_length:
        raise ValueError(f"The URL is longer than {max_length} characters.")
    if any(_unfit(char) for char in text):
        raise ValueError("The URL holds a blank, a backslash, or a control or invisible character.")
    if "#" in text:
        raise ValueError("The URL has a fragment (#...), which is never sent to a server.")
    url = _URL.fullmatch(text)
    if url is None or url[1].lower() not in schemes:
        raise ValueError(f"The URL does not start with {' or '.join(f'{scheme}://' for scheme in schemes)}.")
    authority = url[2]
    rest = url[3]
    # Some parsers end the host only at a slash. For them the text before "?...@" is a user name.
    if "@" in authority or (rest.startswith("?") and "@" in rest):
        raise ValueError("The URL has a user name or an @ before its path, which can hide the real host.")
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        raise ValueError("The URL's host or port is malformed.")
    if parts[2] is not None and not 1 <= int(parts[2]) <= _MAX_PORT:
        raise ValueError(f"The URL's port is not within 1 to {_MAX_PORT}.")
    if parts[1].startswith("["):
        # RFC 3986 allows no IPv4 address in brackets, but `ipaddress` would accept it.
        _check_ip(parts[1][1:-1] if ":" in parts[1] else "")
    else:
        _check_host(parts[1])
    return text


def check_no_placeholder(url: str) -> None:
    """Check a URL that `check_public_url` accepts: it names no reserved example host and contains no template.

    Raises:
        ValueError: it does. The message is one sentence without the URL.
    """
    if tuple(host_of(url).split(".")[-2:]) in _EXAMPLE_DOMAINS:
        raise ValueError("The URL's host is reserved for examples.")
    if _TEMPLATE.search(url):
        raise ValueError("The URL is a template such as your-domain, not a real address.")


def host_of(url: str) -> str:
    """The host name of a URL, in small letters and without the dot of the root."""
    return (urlsplit(url).hostname or "").rstrip(".")


def is_public_ip(address: str | ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return whether an address is on the public internet. False for special ranges and for any other text."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in block for block in _NOT_PUBLIC_V4)
    # A scope names a network interface of this machine.
    if parsed.scope_id is not None:
        return False
    return parsed in _PUBLIC_V6 and not any(parsed in block for block in _NOT_PUBLIC_V6)


def is_loopback(host: str) -> bool:
    """Return whether `host`, a name or an IP address, is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_ip(address: str) -> None:
    if not is_public_ip(address):
        raise ValueError("The URL's host is not a public IP address.")


def _check_host(host: str) -> None:
    if not host:
        raise ValueError("The URL has no host.")
    if unicodedata.normalize("NFKC", host) != host or _VANISHING.search(host):
        raise ValueError("The URL's host is written with characters that stand for others.")
    if any(char in _DOT_LOOKALIKES for char in host):
        raise ValueError("The URL's host uses a character that only looks like a dot.")
    labels = host.removesuffix(".").lower().split(".")
    if not all(map(_is_label, labels)) or sum(map(_wire_length, labels)) + len(labels) - 1 > _MAX_HOST:
        raise ValueError("The URL's host is not a valid name.")
    last = labels[-1]
    if last.isdecimal() or _HEX_NUMBER.fullmatch(last):
        # Resolvers also read octal, hex, short and single numbers: only a strict dotted quad has one meaning.
        _check_ip(host)
    elif len(labels) == 1 or last.casefold() in _SPECIAL_SUFFIXES:
        raise ValueError("The URL's host is a local or special-use name, not one on the public internet.")


def _unfit(char: str) -> bool:
    if char.isascii():
        return char <= " " or char in "\\\x7f"
    return unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zs", "Zl", "Zp"}


def _is_label(label: str) -> bool:
    if _wire_length(label) > _MAX_LABEL:
        return False
    if label.isascii():
        return _ASCII_LABEL.fullmatch(label) is not None
    return all(char in "-_" or char.isalnum() or unicodedata.category(char)[0] == "M" for char in label)


def _wire_length(label: str) -> int:
    # The limits of DNS apply to the encoded form.
    return len(label) if label.isascii() else len("xn--") + len(label.encode("punycode"))
