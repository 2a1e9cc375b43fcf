"""Check JWTs of an OAuth 2.1 issuer, and publish the RFC 9728 metadata of this server."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import urlsplit

import anyio
import httpx2 as httpx
import jwt
from mcp.server.auth.routes import build_resource_metadata_url, create_protected_resource_routes
from mcp.server.auth.settings import AuthSettings
from starlette.types import ASGIApp

from evolink_mcp.api.http import TRANSPORT_ERRORS, why
from evolink_mcp.api.urls import is_loopback
from evolink_mcp.sanitize import harmless
from evolink_mcp.teams.roles import AccessDenied, Roles
from evolink_mcp.teams.tokens import Tenant
from evolink_mcp.transports.authentication import AuthFailure

log = logging.getLogger(__name__)

METADATA_PATH = "/.well-known/oauth-protected-resource"  # RFC 9728
KEYS_REFRESH_S = 3600.0
# While the issuer is unreachable, its last keys stay valid for this time.
KEYS_MAX_AGE_S = 24 * 3600.0
# A token with an unknown key ID triggers a refresh. Without this limit every forged token would.
REFRESH_INTERVAL_MIN_S = 30.0
READ_TIMEOUT_S = 10.0  # for metadata and keys together
# Callers whose keys are unknown wait for one read of the issuer. Further ones get 503.
WAITING_MAX = 64
RESPONSE_MAX_BYTES = 1 << 20
CLOCK_SKEW_S = 30.0
SUBJECT_MAX_CHARS = 255  # as in OpenID Connect
# Only asymmetric algorithms: an issuer cannot publish the key of HS256. By key type.
ALGORITHMS = {
    "RSA": ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    "EC": ("ES256", "ES384", "ES512"),
    "OKP": ("EdDSA",),
}


class _IssuerUnusable(Exception):
    """The metadata or the keys of the issuer are not readable. The text gives the reason."""


@dataclass(frozen=True, slots=True)
class _PublicKey:
    """A published key and the algorithms that it may verify."""

    key_id: str | None
    key: Any
    algorithms: tuple[str, ...]


class Issuer:
    """The OAuth issuer at the URL `issuer`.

    A JWT needs the `audience` and all `scopes`. `resource` is the public URL of the MCP endpoint. A caller with a known key
    never waits for the issuer; `refresh_loop` keeps the keys up to date. At most `waiting_max` callers wait for an unknown
    key. `roles` limit the people. `transport` and `clock` (seconds) are for tests.
    """

    def __init__(
        self,
        issuer: str,
        audience: str,
        scopes: Sequence[str],
        resource: str,
        *,
        roles: Roles | None = None,
        waiting_max: int = WAITING_MAX,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._issuer = issuer
        self._roles = roles
        self._waiting_max = waiting_max
        self._audience = audience
        self._scopes = tuple(scopes)
        # AuthSettings keeps a URL without a path as it is. AnyHttpUrl adds a slash, and then the issuer does not match.
        self._auth_settings = AuthSettings.model_validate(
            {"issuer_url": issuer, "resource_server_url": resource, "validate_token_resource": False}
        )
        self._transport = transport
        self._clock = clock
        self._issuer_name = issuer  # as the metadata spell it, with or without a final slash
        self._keys: list[_PublicKey] = []
        self._read_at = -KEYS_MAX_AGE_S
        self._tried_at = -KEYS_MAX_AGE_S
        self._lock = anyio.Lock()
        self._waiting = 0

    @property
    def metadata_app(self) -> ASGIApp:
        """The RFC 9728 metadata: where a client gets a token for this server."""
        settings = self._auth_settings
        assert settings.resource_server_url is not None
        (route,) = create_protected_resource_routes(
            resource_url=settings.resource_server_url,
            authorization_servers=[settings.issuer_url],
            scopes_supported=list(self._scopes) or None,
            resource_name="evolink-mcp",
        )
        return route.app

    def challenge(self, parameters: str = "") -> tuple[bytes, bytes]:
        """Return the WWW-Authenticate header with the metadata URL and the scopes."""
        assert self._auth_settings.resource_server_url is not None
        metadata_url = build_resource_metadata_url(self._auth_settings.resource_server_url)
        scope = f', scope="{" ".join(self._scopes)}"' if self._scopes else ""
        return b"www-authenticate", f'Bearer resource_metadata="{metadata_url}"{scope}{parameters}'.encode()

    async def tenant_of(self, token: bytes) -> Tenant | AuthFailure:
        """Return the person whom a JWT names, or the answer that refuses the request."""
        try:
            claims = await self._verify(token.decode("ascii"))
        except _IssuerUnusable:
            text = "Tokens cannot be checked now; try again."
            return AuthFailure(HTTPStatus.SERVICE_UNAVAILABLE, text, ((b"retry-after", b"30"),))
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            reason = error if isinstance(error, jwt.PyJWTError) else "no JWT"
            text = f"This token is not accepted: {harmless(reason, 120)}."
            return AuthFailure(HTTPStatus.UNAUTHORIZED, text, (self.challenge(', error="invalid_token"'),))
        missing = [scope for scope in self._scopes if scope not in _scopes_of(claims)]
        if missing:
            text = f"This token lacks the scope {' '.join(missing)}."
            return AuthFailure(HTTPStatus.FORBIDDEN, text, (self.challenge(', error="insufficient_scope"'),))
        # A name in the tokens file has no blanks, so no token can have the same tenant.
        tenant = Tenant(f"{claims['sub']} at {self._issuer_name}")
        if self._roles is not None:
            try:
                tenant = self._roles.with_limits(tenant, claims)
            except AccessDenied as error:
                return AuthFailure(HTTPStatus.FORBIDDEN, str(error))
        return tenant

    async def problem(self) -> str | None:
        """Return the reason why the issuer is not usable now, if there is one."""
        try:
            await self._published()
        except _IssuerUnusable as error:
            return str(error)
        return None

    async def _verify(self, token: str) -> dict[str, Any]:
        # The header is not verified yet. It only selects a published key.
        key_id = jwt.get_unverified_header(token).get("kid")
        key = await self._key(key_id if isinstance(key_id, str) else None)
        claims = jwt.decode(
            token,
            key.key,
            # The algorithms come from the key, because a forged token can name any algorithm.
            algorithms=key.algorithms,
            audience=self._audience,
            issuer=self._issuer_name,
            leeway=CLOCK_SKEW_S,
            # PyJWT accepts a token without these claims unless they are required.
            options={"require": ["exp", "aud", "iss", "sub"]},
        )
        if not 0 < len(claims["sub"]) <= SUBJECT_MAX_CHARS:
            raise jwt.InvalidTokenError("its sub is empty or too long")
        return claims

    async def refresh(self) -> None:
        """Read the keys again if they are older than KEYS_REFRESH_S. An unusable issuer is logged."""
        async with self._lock:
            if self._clock() - self._read_at > KEYS_REFRESH_S:
                await self._read_keys()

    async def refresh_loop(self, sleep: Callable[[float], Awaitable[object]] = anyio.sleep) -> None:
        """Refresh the keys forever. The first read prepares the server for its first caller."""
        while True:
            await self.refresh()
            # Not KEYS_REFRESH_S, so that a failed read is soon repeated.
            await sleep(REFRESH_INTERVAL_MIN_S)

    async def _key(self, key_id: str | None) -> _PublicKey:
        """Return the key with this ID. A token without a key ID needs an issuer with a single key."""
        key = self._known_key(key_id)
        if key is None or self._is_outdated:
            await self._read_for_caller(key_id)
            key = self._known_key(key_id)
        if self._is_outdated:
            raise _IssuerUnusable
        if key is None:
            raise jwt.InvalidKeyError("it is signed by a key that the issuer does not publish")
        return key

    @property
    def _is_outdated(self) -> bool:
        """Whether the server has no keys, or only keys that it must not trust any more."""
        return not self._keys or self._clock() - self._read_at > KEYS_MAX_AGE_S

    async def _read_for_caller(self, key_id: str | None) -> None:
        """Read the keys, because the caller's key is unknown. Callers that wait at the same time share one read."""
        if self._waiting >= self._waiting_max:
            raise _IssuerUnusable
        self._waiting += 1
        try:
            async with self._lock:
                # Another caller may have read the keys while this one waited.
                if self._known_key(key_id) is None or self._is_outdated:
                    await self._read_keys()
        finally:
            self._waiting -= 1

    def _known_key(self, key_id: str | None) -> _PublicKey | None:
        matches = [key for key in self._keys if key_id is None or key.key_id == key_id]
        return matches[0] if len(matches) == 1 else None

    async def _read_keys(self) -> None:
        """Read the keys, at most once per REFRESH_INTERVAL_MIN_S. Log an unusable issuer."""
        now = self._clock()
        if now - self._tried_at < REFRESH_INTERVAL_MIN_S:
            return
        # A failed read counts too, so an unreachable issuer gets few requests.
        self._tried_at = now
        try:
            self._issuer_name, self._keys = await self._published()
            self._read_at = now
        except _IssuerUnusable as error:
            log.error("the OAuth issuer %s cannot be used: %s", harmless(self._issuer, 200), error)

    async def _published(self) -> tuple[str, list[_PublicKey]]:
        """Read the issuer's name and its current keys."""
        try:
            with anyio.fail_after(READ_TIMEOUT_S):
                return await self._read_metadata_and_keys()
        except TimeoutError as error:
            raise _IssuerUnusable(f"no answer within {READ_TIMEOUT_S:.0f} s") from error

    async def _read_metadata_and_keys(self) -> tuple[str, list[_PublicKey]]:
        metadata = await self._metadata()
        name = metadata.get("issuer")
        keys_url = metadata.get("jwks_uri")
        # RFC 8414 requires this check. Issuers differ in the final slash.
        if not isinstance(name, str) or name.rstrip("/") != self._issuer.rstrip("/"):
            raise _IssuerUnusable("its metadata name another issuer")
        if not isinstance(keys_url, str) or not _is_safe_url(keys_url):
            raise _IssuerUnusable("its metadata name no https address of keys")
        jwks = (await self._read(keys_url)).get("keys")
        values = cast("list[Any]", jwks) if isinstance(jwks, list) else []
        keys = [key for value in values if (key := _public_key(value)) is not None]
        if not keys:
            raise _IssuerUnusable("it publishes no key that can be used")
        return name, keys

    async def _metadata(self) -> dict[str, Any]:
        """Read the metadata of RFC 8414 or OpenID Connect from the first address that has them."""
        parts = urlsplit(self._issuer.rstrip("/"))
        origin = f"{parts.scheme}://{parts.netloc}"
        # RFC 8414 puts .well-known before the path of the issuer, OpenID Connect behind it.
        urls = [
            f"{origin}/.well-known/oauth-authorization-server{parts.path}",
            f"{origin}/.well-known/openid-configuration{parts.path}",
            f"{origin}{parts.path}/.well-known/openid-configuration",
        ]
        for url in dict.fromkeys(urls):
            if metadata := await self._read(url, is_optional=True):
                return metadata
        raise _IssuerUnusable("it publishes no metadata")

    async def _read(self, url: str, *, is_optional: bool = False) -> dict[str, Any]:
        try:
            # A redirect could lead to an address inside the server's network.
            async with (
                httpx.AsyncClient(transport=self._transport, follow_redirects=False) as client,
                client.stream("GET", url, headers={"accept": "application/json"}) as response,
            ):
                body = bytearray()
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > RESPONSE_MAX_BYTES:
                        raise _IssuerUnusable("it answers with more than a megabyte")
        except TRANSPORT_ERRORS as error:
            reason = str(error)
            raise _IssuerUnusable(harmless(reason, 160) if "certificate" in reason.lower() else why(error)) from error
        if response.status_code != HTTPStatus.OK:
            if is_optional and 400 <= response.status_code < 500:
                return {}
            raise _IssuerUnusable(f"it answers HTTP {response.status_code}")
        try:
            value: object = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise _IssuerUnusable("it answers with no JSON") from error
        return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _public_key(value: Any) -> _PublicKey | None:
    """Return a signature key of a JWKS. None: it is of an unknown type or for another use."""
    if not isinstance(value, dict):
        return None
    members = cast("dict[str, Any]", value)
    algorithms = ALGORITHMS.get(str(members.get("kty")), ())
    if (algorithm := members.get("alg")) is not None:
        algorithms = tuple(name for name in algorithms if name == algorithm)
    if not algorithms or members.get("use", "sig") != "sig":
        return None
    try:
        key = jwt.PyJWK.from_dict(members).key
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    key_id = members.get("kid")
    return _PublicKey(key_id if isinstance(key_id, str) else None, key, algorithms)


def _is_safe_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
    except ValueError:
        return False


def _scopes_of(claims: dict[str, Any]) -> set[str]:
    """Return the scopes of a JWT. RFC 9068 has them in one text; some issuers have a list."""
    scopes: set[str] = set()
    for name in ("scope", "scp"):
        value = claims.get(name)
        if isinstance(value, str):
            scopes |= set(value.split())
        elif isinstance(value, list):
            scopes |= {scope for scope in cast("list[Any]", value) if isinstance(scope, str)}
    return scopes
