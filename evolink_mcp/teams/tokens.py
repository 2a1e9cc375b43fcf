"""Who may call over HTTP: the tokens file, a tenant for each token, and how often a tenant may call."""

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
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

from pydantic import SecretStr

from evolink_mcp.api.urls import KEY
from evolink_mcp.images.folders import is_reserved
from evolink_mcp.sanitize import harmless
from evolink_mcp.tools.names import TOOL_NAMES, tools_named
from evolink_mcp.transports.authentication import AuthFailure

log = logging.getLogger(__name__)

TOKEN_PREFIX = "evt_"
LOOK_AGAIN_AFTER_S = 1.0
MINUTE_S = 60.0
_NAME = re.compile(r"[0-9A-Za-z]([0-9A-Za-z._@-]{0,62}[0-9A-Za-z])?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NUMBERS = {
    "max_credits_per_call": (int, float), "max_credits_per_day": (int, float),
    "max_running": (int,), "requests_per_minute": (int,),
}  # fmt: skip


class BadTokens(ValueError):
    """The tokens file cannot be used; the text says what is wrong in it, and shows no secret."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Somebody who may call, as the tokens file says. Caps are in credits; None is the server's own setting, or no limit.

    `evolink_key` None spends from the server's account. `shares_account`: others spend from the same account.
    """

    name: str
    evolink_key: SecretStr | None = None
    max_credits_per_call: float | None = None
    max_credits_per_day: float | None = None
    max_running: int | None = None
    requests_per_minute: int | None = None
    tools: frozenset[str] | None = None
    shares_account: bool = True


class Tokens:
    """The tokens file at `path`. A changed file is read again. A broken one changes nothing.

    `exposure` is a warning if other users of this machine can read an EvoLink key in it.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file.

        Raises:
            BadTokens: it cannot be read, or something in it is wrong.
        """
        self._path = path
        self._clock = clock
        self._mark = self._now_at_path()
        self._tenants, self.exposure = _read(path)
        self._looked = clock()
        self._calls: dict[str, deque[float]] = {}

    @property
    def tenants(self) -> Collection[Tenant]:
        """Everybody who may call."""
        return frozenset(self._tenants.values())

    def authenticate(self, authorization: bytes | None) -> Tenant | AuthFailure:
        """The tenant whose token this header holds, or why the request is refused."""
        self._look_again()
        scheme, _, token = (authorization or b"").strip().partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            return _unauthorized(b"", "This server needs a token: send Authorization: Bearer evt_…")
        tenant = self._tenant_of(token.strip())
        if tenant is None:
            return _unauthorized(b', error="invalid_token"', "This token is not known here.")
        return self._too_often(tenant) or tenant

    def _tenant_of(self, token: bytes) -> Tenant | None:
        """Every token is compared, each in constant time: how long it takes tells nothing."""
        digest = hashlib.sha256(token).hexdigest()
        found = [tenant for known, tenant in self._tenants.items() if hmac.compare_digest(known, digest)]
        return found[0] if found else None

    def _too_often(self, tenant: Tenant) -> AuthFailure | None:
        limit = tenant.requests_per_minute
        if limit is None:
            return None
        now = self._clock()
        calls = self._calls.setdefault(tenant.name, deque())
        while calls and calls[0] <= now - MINUTE_S:
            calls.popleft()
        if len(calls) >= limit:
            wait = str(int(calls[0] + MINUTE_S - now) + 1 if calls else int(MINUTE_S)).encode()
            text = f"More than {limit} requests a minute; try again in {wait.decode()} s."
            return AuthFailure(HTTPStatus.TOO_MANY_REQUESTS, text, ((b"retry-after", wait),))
        calls.append(now)
        return None

    def _look_again(self) -> None:
        now = self._clock()
        if now - self._looked < LOOK_AGAIN_AFTER_S:
            return
        self._looked = now
        mark = self._now_at_path()
        if mark == self._mark:
            return
        self._mark = mark
        try:
            self._tenants, self.exposure = _read(self._path)
        except BadTokens as error:
            log.error("the changed tokens file cannot be used, so the tokens stay as they were: %s", error)
        else:
            log.warning("the tokens file was read again: %d tokens", len(self._tenants))
            if self.exposure is not None:
                log.warning("%s", self.exposure)

    def _now_at_path(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def new_token(name: str) -> tuple[str, str]:
    """A new token for this tenant, and the block that the tokens file needs for it.

    Raises:
        BadTokens: `name` cannot be a tenant's.
    """
    _check_name(name)
    token = TOKEN_PREFIX + secrets.token_urlsafe(32)
    return token, f'[[token]]\nname = "{name}"\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n'


def _unauthorized(more: bytes, text: str) -> AuthFailure:
    return AuthFailure(HTTPStatus.UNAUTHORIZED, text, ((b"www-authenticate", b'Bearer realm="evolink-mcp"' + more),))


def _read(path: Path) -> tuple[dict[str, Tenant], str | None]:
    """Return the tenants by the SHA-256 of their tokens, in hex, and a warning if the file is exposed."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read()
        said = tomllib.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise BadTokens(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:  # neither UTF-8 nor TOML
        raise BadTokens(f"{path} is no TOML: {harmless(error, 200)}") from error
    blocks = said.pop("token", [])
    if said or not isinstance(blocks, list) or not blocks:
        raise BadTokens(f"{path} needs one [[token]] block or more, and nothing else")
    found: dict[str, Tenant] = {}
    for number, block in enumerate(cast("list[Any]", blocks), 1):
        where = f"token {number} in {path}"
        digest, tenant = _tenant(block, where)
        if digest in found:
            raise BadTokens(f"{where}: this sha256 is there twice")
        twin = next((other for other in found.values() if other.name == tenant.name and other != tenant), None)
        if twin is not None:
            raise BadTokens(f"{where}: the tokens of {tenant.name} say different things")
        found[digest] = tenant
    return _told_apart(found), _exposure_of(path, mode, found.values())


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


def _tenant(block: Any, where: str) -> tuple[str, Tenant]:
    if not isinstance(block, dict):
        raise BadTokens(f"{where}: it must be a [[token]] block")
    said = cast("dict[str, Any]", block)
    known = {field.name for field in fields(Tenant)} - {"shares_account"} | {"sha256"}
    if strange := sorted(set(said) - known):
        raise BadTokens(f"{where}: {harmless(strange[0], 60)} means nothing; known are {', '.join(sorted(known))}")
    name, digest, key, tools = (said.get(word) for word in ("name", "sha256", "evolink_key", "tools"))
    if not isinstance(name, str):
        raise BadTokens(f"{where}: it needs a name")
    try:
        _check_name(name)
    except BadTokens as error:
        raise BadTokens(f"{where}: {error}") from error
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest.lower()):
        raise BadTokens(f"{where}: sha256 must be the 64 hex digits of the token's SHA-256, not the token itself")
    if key is not None and not (isinstance(key, str) and KEY.fullmatch(key)):
        raise BadTokens(f"{where}: evolink_key is no EvoLink key")
    secret = None if key is None else SecretStr(key)
    return digest.lower(), Tenant(name, secret, **_numbers(said, where), tools=_tools(tools, where))


def _numbers(said: Mapping[str, Any], where: str) -> dict[str, Any]:
    numbers = {word: said[word] for word in _NUMBERS if word in said}
    for word, number in numbers.items():
        if type(number) not in _NUMBERS[word] or not 0 <= number <= 1e9:
            raise BadTokens(f"{where}: {word} must be a {'whole ' * (len(_NUMBERS[word]) == 1)}number, 0 or more")
    return numbers


def _tools(said: Any, where: str) -> frozenset[str] | None:
    if said is None:
        return None
    words = cast("list[Any]", said) if isinstance(said, list) else []
    try:
        return tools_named(str(word) for word in words)
    except ValueError as error:
        raise BadTokens(f"{where}: tools must be a list of {', '.join(TOOL_NAMES)}") from error


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or is_reserved(name):
        raise BadTokens(
            f"“{harmless(name, 60)}” is no tenant's name: letters, digits and . _ @ - inside, at most 64 characters"
        )


def _told_apart(found: dict[str, Tenant]) -> dict[str, Tenant]:
    """Say of each tenant whether others spend from the same account."""
    names: dict[str | None, set[str]] = {}
    for tenant in found.values():
        names.setdefault(_secret(tenant), set()).add(tenant.name)
    return {
        digest: replace(tenant, shares_account=_secret(tenant) is None or len(names[_secret(tenant)]) > 1)
        for digest, tenant in found.items()
    }


def _secret(tenant: Tenant) -> str | None:
    return None if tenant.evolink_key is None else tenant.evolink_key.get_secret_value()
