"""The tokens file: the allowed callers, with their limits and tools."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import shlex
import stat
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

from pydantic import SecretStr

from evolink_mcp.api.urls import KEY
from evolink_mcp.images.folders import is_reserved
from evolink_mcp.sanitize import harmless
from evolink_mcp.teams.reloaded_file import ReloadedFile
from evolink_mcp.tools.names import TOOL_NAMES, tools_named
from evolink_mcp.transports.authentication import AuthFailure

log = logging.getLogger(__name__)

TOKEN_PREFIX = "evt_"
NUMBER_MAX = 1e9
_NAME = re.compile(r"[0-9A-Za-z]([0-9A-Za-z._@-]{0,62}[0-9A-Za-z])?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NUMBER_TYPES = {
    "max_credits_per_call": (int, float),
    "max_credits_per_day": (int, float),
    "max_running": (int,),
    "requests_per_minute": (int,),
}
LIMIT_NAMES = frozenset({*_NUMBER_TYPES, "tools"})


class BadTokens(ValueError):
    """The tokens file is invalid. The text names the fault and shows no secret."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """The identity of an HTTP caller, with its limits. None is the server's own setting, or no limit.

    Without an `evolink_key` the tenant uses the server's key. `shares_account`: other tenants use the same key.
    """

    name: str
    evolink_key: SecretStr | None = None
    max_credits_per_call: float | None = None
    max_credits_per_day: float | None = None
    max_running: int | None = None
    requests_per_minute: int | None = None
    tools: frozenset[str] | None = None
    shares_account: bool = True


@dataclass(frozen=True, slots=True)
class _Content:
    """The tenants of the tokens file, and a warning if the file is exposed. A digest is the SHA-256 of a token, in hex."""

    by_digest: Mapping[str, Tenant]
    by_name: Mapping[str, Tenant]
    exposure: str | None


class Tokens:
    """The tokens file at `path`. A changed file is read again. An invalid one changes nothing."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file. `clock` (seconds) is for tests.

        Raises:
            BadTokens: the file is not readable or not valid.
        """
        self._file = ReloadedFile(path, _read, "tokens", clock=clock)

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        """The tenants of all tokens, by name."""
        return self._file.content.by_name

    @property
    def exposure(self) -> str | None:
        """A warning if other users of this machine can read an EvoLink key in the file."""
        return self._file.content.exposure

    def authenticate(self, authorization: bytes | None) -> Tenant | AuthFailure:
        """Return the tenant of the token in an Authorization header, or the answer that refuses the request."""
        if self._file.reload():
            content = self._file.content
            log.warning("reloaded the tokens file: %d tokens", len(content.by_digest))
            if content.exposure is not None:
                log.warning("%s", content.exposure)
        scheme, _, token = (authorization or b"").strip().partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            return _unauthorized(b"", "This server needs a token: send Authorization: Bearer evt_…")
        tenant = self._tenant_of(token.strip())
        if tenant is None:
            return _unauthorized(b', error="invalid_token"', "This server does not know the token.")
        return tenant

    def _tenant_of(self, token: bytes) -> Tenant | None:
        # Compare all digests, each in constant time, so that the duration shows nothing about the tokens.
        digest = hashlib.sha256(token).hexdigest()
        by_digest = self._file.content.by_digest
        matches = [tenant for known_digest, tenant in by_digest.items() if hmac.compare_digest(known_digest, digest)]
        return matches[0] if matches else None


def new_token(name: str) -> tuple[str, str]:
    """Return a new token for a tenant, and its block for the tokens file.

    Raises:
        BadTokens: the name is not valid.
    """
    _check_name(name)
    # A token has 256 random bits, so a hash without a salt protects it.
    token = TOKEN_PREFIX + secrets.token_urlsafe(32)
    return token, f'[[token]]\nname = "{name}"\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n'


def _unauthorized(parameters: bytes, text: str) -> AuthFailure:
    challenge = b'Bearer realm="evolink-mcp"' + parameters
    return AuthFailure(HTTPStatus.UNAUTHORIZED, text, ((b"www-authenticate", challenge),))


def _read(path: Path) -> _Content:
    try:
        with path.open("rb") as file:
            # From the open file, because the path may lead to another file by now.
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read()
        # Editors on Windows write a byte order mark.
        table = tomllib.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise BadTokens(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise BadTokens(f"{path} is no TOML: {harmless(error, 200)}") from error
    blocks = table.pop("token", [])
    if table or not isinstance(blocks, list) or not blocks:
        raise BadTokens(f"{path} needs one or more [[token]] blocks, and nothing else")
    by_digest: dict[str, Tenant] = {}
    by_name: dict[str, Tenant] = {}
    for number, block in enumerate(cast("list[Any]", blocks), 1):
        location = f"token {number} in {path}"
        digest, tenant = _parse_block(block, location)
        if digest in by_digest:
            raise BadTokens(f"{location}: another token has the same sha256")
        # A tenant has two tokens while it replaces one.
        if by_name.setdefault(tenant.name, tenant) != tenant:
            raise BadTokens(f"{location}: the tokens of {tenant.name} have different settings")
        by_digest[digest] = tenant
    by_digest = _with_shared_accounts(by_digest)
    by_name = {tenant.name: tenant for tenant in by_digest.values()}
    return _Content(by_digest, by_name, _exposure_of(path, mode, by_name.values()))


def _exposure_of(path: Path, mode: int, tenants: Iterable[Tenant]) -> str | None:
    """Return a warning if the file has an EvoLink key and its mode lets other users read it. Windows has no such mode."""
    has_key = any(tenant.evolink_key is not None for tenant in tenants)
    is_readable = bool(mode & (stat.S_IRGRP | stat.S_IROTH))
    if os.name != "posix" or not has_key or not is_readable:
        return None
    return (
        f"other users of this machine can read the EvoLink keys in the tokens file {path} (mode {mode:04o}). "
        f"Run: chmod 600 {shlex.quote(str(path))}"
    )


def _parse_block(block: Any, location: str) -> tuple[str, Tenant]:
    """Return the SHA-256 of the token, in hex, and its tenant."""
    if not isinstance(block, dict):
        raise BadTokens(f"{location}: it must be a [[token]] block")
    values = cast("dict[str, Any]", block)
    names = {field.name for field in fields(Tenant)} - {"shares_account"} | {"sha256"}
    if unknown := sorted(set(values) - names):
        raise BadTokens(f"{location}: {harmless(unknown[0], 60)} is unknown; use {', '.join(sorted(names))}")
    name = values.get("name")
    if not isinstance(name, str):
        raise BadTokens(f"{location}: it needs a name")
    try:
        _check_name(name)
    except BadTokens as error:
        raise BadTokens(f"{location}: {error}") from error
    digest = values.get("sha256")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest.lower()):
        raise BadTokens(f"{location}: sha256 must be the 64 hex digits of the token's SHA-256, not the token itself")
    key = values.get("evolink_key")
    if key is not None and not (isinstance(key, str) and KEY.fullmatch(key)):
        raise BadTokens(f"{location}: evolink_key is no EvoLink key")
    secret = None if key is None else SecretStr(key)
    return digest.lower(), Tenant(name, secret, **parse_limits(values, location))


def parse_limits(values: Mapping[str, Any], location: str) -> dict[str, Any]:
    """Return the limits and tools in a block of a TOML file, as fields of `Tenant`. `location` names the block.

    Raises:
        BadTokens: a value is not valid.
    """
    numbers = {name: values[name] for name in _NUMBER_TYPES if name in values}
    for name, number in numbers.items():
        # isinstance would accept `true`, because bool is a subclass of int.
        if type(number) not in _NUMBER_TYPES[name] or not 0 <= number <= NUMBER_MAX:
            kind = "number" if float in _NUMBER_TYPES[name] else "whole number"
            raise BadTokens(f"{location}: {name} must be a {kind}, 0 or more")
    return {**numbers, "tools": _parse_tools(values.get("tools"), location)}


def _parse_tools(value: Any, location: str) -> frozenset[str] | None:
    if value is None:
        return None
    names = cast("list[Any]", value) if isinstance(value, list) else []
    try:
        return tools_named(str(name) for name in names)
    except ValueError as error:
        raise BadTokens(f"{location}: tools must be a list of {', '.join(TOOL_NAMES)}") from error


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or is_reserved(name):
        raise BadTokens(
            f"“{harmless(name, 60)}” is no valid name: use at most 64 letters and digits, with . _ @ - between them"
        )


def _with_shared_accounts(by_digest: dict[str, Tenant]) -> dict[str, Tenant]:
    """Set `shares_account` of each tenant."""
    names: dict[str | None, set[str]] = {}
    for tenant in by_digest.values():
        names.setdefault(_secret_of(tenant), set()).add(tenant.name)
    return {
        # The task list of a shared account would show the tasks of other tenants.
        digest: replace(tenant, shares_account=tenant.evolink_key is None or len(names[_secret_of(tenant)]) > 1)
        for digest, tenant in by_digest.items()
    }


def _secret_of(tenant: Tenant) -> str | None:
    return None if tenant.evolink_key is None else tenant.evolink_key.get_secret_value()
