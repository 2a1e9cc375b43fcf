"""Callers whom an OAuth 2.1 issuer knows: its JWTs are checked by its published keys, which are cached and rotated."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import anyio
import httpx2 as httpx
import jwt
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from evolink_mcp.api.http import TRANSPORT_ERRORS, why
from evolink_mcp.api.urls import is_loopback
from evolink_mcp.sanitize import harmless
from evolink_mcp.teams.tokens import FORBIDDEN, UNAUTHORIZED, UNAVAILABLE, Refusal, Tenant

log = logging.getLogger(__name__)

METADATA = "/.well-known/oauth-protected-resource"  # RFC 9728
# An issuer publishes a new key before it signs by it; an unknown key is looked for at once, but not by every request.
KEYS_LIVE_S, KEYS_LIVE_AT_MOST_S, LOOK_AGAIN_AFTER_S = 3600.0, 24 * 3600.0, 30.0
READ_WITHIN_S, ANSWER_MAX_BYTES = 10.0, 1 << 20
CLOCK_SKEW_S = 30.0
SUBJECT_MAX = 255  # characters
# Only algorithms whose keys can be published, by the type of the key.
ALGORITHMS = {
    "RSA": ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    "EC": ("ES256", "ES384", "ES512"),
    "OKP": ("EdDSA",),
}


class _Unusable(Exception):
    """The issuer's metadata or keys cannot be had; the text says why."""


@dataclass(frozen=True, slots=True)
class _Key:
    """A published key, and the algorithms by which it may sign."""

    name: str | None
    key: Any
    algorithms: tuple[str, ...]


class Issuer:
    """The issuer at the address `issuer`. A JWT must name `audience` and have all `scopes`.

    `resource` is the public address of the MCP endpoint, by which a client finds out where to log in.
    """

    def __init__(
        self,
        issuer: str,
        audience: str,
        scopes: Sequence[str],
        resource: str,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._issuer = issuer
        self._audience = audience
        self._scopes = tuple(scopes)
        self._resource = resource
        self._transport = transport
        self._clock = clock
        self._named = issuer  # as the issuer names itself: with or without a last slash
        self._keys: list[_Key] = []
        self._read_at = self._tried_at = -KEYS_LIVE_AT_MOST_S
        self._reading = anyio.Lock()

    @property
    def page(self) -> ASGIApp:
        """What RFC 9728 tells of this server: who gives tokens for it."""
        told: dict[str, Any] = {
            "resource": self._resource,
            "authorization_servers": [self._issuer],
            "bearer_methods_supported": ["header"],
            "resource_name": "evolink-mcp",
        }
        return JSONResponse({**told, "scopes_supported": list(self._scopes)} if self._scopes else told)

    def challenge(self, more: str = "") -> tuple[bytes, bytes]:
        """The header that tells a client where to get a token, and which scopes it needs."""
        parts = urlsplit(self._resource)
        where = f"{parts.scheme}://{parts.netloc}{METADATA}{parts.path}"
        scope = f', scope="{" ".join(self._scopes)}"' if self._scopes else ""
        return b"www-authenticate", f'Bearer resource_metadata="{where}"{scope}{more}'.encode()

    async def tenant_of(self, token: bytes) -> Tenant | Refusal:
        """The person whom this JWT names, or why the request is refused."""
        try:
            said = await self._checked(token.decode("ascii"))
        except _Unusable:
            return Refusal(UNAVAILABLE, "Tokens cannot be checked now; try again.", ((b"retry-after", b"30"),))
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            told = error if isinstance(error, jwt.PyJWTError) else "no JWT"
            challenge = self.challenge(', error="invalid_token"')
            return Refusal(UNAUTHORIZED, f"This token is not accepted: {harmless(told, 120)}.", (challenge,))
        missing = [scope for scope in self._scopes if scope not in _scopes_of(said)]
        if missing:
            challenge = self.challenge(', error="insufficient_scope"')
            return Refusal(FORBIDDEN, f"This token lacks the scope {' '.join(missing)}.", (challenge,))
        return Tenant(f"{said['sub']} at {self._named}")

    async def problem(self) -> str | None:
        """Why the issuer cannot be used now; None if it can."""
        try:
            await self._published()
        except _Unusable as error:
            return str(error)
        return None

    async def _checked(self, token: str) -> dict[str, Any]:
        kid = jwt.get_unverified_header(token).get("kid")
        key = await self._key(kid if isinstance(kid, str) else None)
        said = jwt.decode(
            token, key.key, algorithms=key.algorithms, audience=self._audience, issuer=self._named, leeway=CLOCK_SKEW_S,
            options={"require": ["exp", "aud", "iss", "sub"]},
        )  # fmt: skip
        if not 0 < len(said["sub"]) <= SUBJECT_MAX:
            raise jwt.InvalidTokenError("its sub is empty or too long")
        return said

    async def _key(self, kid: str | None) -> _Key:
        """The key of this id, or the only one if the token names none."""
        async with self._reading:
            now = self._clock()
            known = self._known(kid)
            if now - self._read_at > KEYS_LIVE_S or known is None:
                await self._look_again(now)
                known = self._known(kid)
        if known is None:
            raise jwt.InvalidKeyError("it is signed by a key that the issuer does not publish")
        return known

    def _known(self, kid: str | None) -> _Key | None:
        found = [key for key in self._keys if kid is None or key.name == kid]
        return found[0] if len(found) == 1 else None

    async def _look_again(self, now: float) -> None:
        if now - self._tried_at >= LOOK_AGAIN_AFTER_S:
            self._tried_at = now
            try:
                self._named, self._keys = await self._published()
                self._read_at = now
            except _Unusable as error:
                log.error("the OAuth issuer %s cannot be used: %s", harmless(self._issuer, 200), error)
        if now - self._read_at > KEYS_LIVE_AT_MOST_S or not self._keys:
            raise _Unusable

    async def _published(self) -> tuple[str, list[_Key]]:
        """The issuer's own name, and its keys of today."""
        told = await self._metadata()
        name, address = told.get("issuer"), told.get("jwks_uri")
        if not isinstance(name, str) or name.rstrip("/") != self._issuer.rstrip("/"):
            raise _Unusable("its metadata name another issuer")
        if not isinstance(address, str) or not _may_be_asked(address):
            raise _Unusable("its metadata name no https address of keys")
        keys = (await self._read(address)).get("keys")
        found = [key for one in (cast("list[Any]", keys) if isinstance(keys, list) else []) if (key := _key_of(one))]
        if not found:
            raise _Unusable("it publishes no key that can be used")
        return name, found

    async def _metadata(self) -> dict[str, Any]:
        """RFC 8414's metadata, or OpenID Connect's, at each address where they may be."""
        parts = urlsplit(self._issuer.rstrip("/"))
        origin = f"{parts.scheme}://{parts.netloc}"
        places = [
            f"{origin}/.well-known/oauth-authorization-server{parts.path}",
            f"{origin}/.well-known/openid-configuration{parts.path}",
            f"{origin}{parts.path}/.well-known/openid-configuration",
        ]
        for place in dict.fromkeys(places):
            if told := await self._read(place, missing_ok=True):
                return told
        raise _Unusable("it publishes no metadata")

    async def _read(self, address: str, *, missing_ok: bool = False) -> dict[str, Any]:
        try:
            with anyio.fail_after(READ_WITHIN_S):
                async with (
                    httpx.AsyncClient(transport=self._transport, follow_redirects=False) as client,
                    client.stream("GET", address, headers={"accept": "application/json"}) as response,
                ):
                    body = bytearray()
                    async for part in response.aiter_bytes():
                        body += part
                        if len(body) > ANSWER_MAX_BYTES:
                            raise _Unusable("it answers with more than a megabyte")
        except TimeoutError as error:
            raise _Unusable(f"no answer within {READ_WITHIN_S:.0f} s") from error
        except TRANSPORT_ERRORS as error:
            said = str(error)
            raise _Unusable(harmless(said, 160) if "certificate" in said.lower() else why(error)) from error
        if response.status_code != 200:
            if missing_ok and 400 <= response.status_code < 500:
                return {}
            raise _Unusable(f"it answers HTTP {response.status_code}")
        try:
            told: object = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise _Unusable("it answers with no JSON") from error
        return cast("dict[str, Any]", told) if isinstance(told, dict) else {}


def _key_of(told: Any) -> _Key | None:
    """A key for signatures out of a JWKS; None for any other, and for a kind that is not known here."""
    if not isinstance(told, dict):
        return None
    said = cast("dict[str, Any]", told)
    algorithms = ALGORITHMS.get(str(said.get("kty")), ())
    if (only := said.get("alg")) is not None:
        algorithms = tuple(name for name in algorithms if name == only)
    if not algorithms or said.get("use", "sig") != "sig":
        return None
    try:
        key = jwt.PyJWK.from_dict(said).key
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    name = said.get("kid")
    return _Key(name if isinstance(name, str) else None, key, algorithms)


def _may_be_asked(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
    except ValueError:
        return False


def _scopes_of(said: dict[str, Any]) -> set[str]:
    """The scopes as RFC 9068 writes them, in one text, or as other issuers do, in a list."""
    found: set[str] = set()
    for name in ("scope", "scp"):
        value = said.get(name)
        if isinstance(value, str):
            found |= set(value.split())
        elif isinstance(value, list):
            found |= {one for one in cast("list[Any]", value) if isinstance(one, str)}
    return found
