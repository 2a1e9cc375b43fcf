"""Authenticate HTTP requests by a token of the tokens file or a JWT of the issuer, and accept a caller's own EvoLink key.

The SDK's BearerAuthBackend (mcp 2.3) does not fit: its token verifier answers only "valid" or "invalid". This server must
also answer 503 while the issuer cannot be read, 429 for too many requests, and 400 or 403 for X-EvoLink-Key.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING

from pydantic import SecretStr

from evolink_mcp.api.urls import KEY
from evolink_mcp.teams.request_rates import RequestRates
from evolink_mcp.teams.tokens import Tenant, Tokens
from evolink_mcp.transports.authentication import AuthFailure

if TYPE_CHECKING:
    from evolink_mcp.teams.oauth import Issuer

CALLER_KEY_HEADER = b"x-evolink-key"
CALLER_KEYS_MAX = 16  # per tenant: each key opens a studio with its own connections


class TeamAuthenticator:
    """Authenticate callers by `tokens`, by JWTs of `issuer`, or by both.

    `accepts_caller_keys`: a caller may send an EvoLink key. It replaces the tenant's key and the server's key,
    `server_key`.
    """

    def __init__(
        self,
        tokens: Tokens | None,
        issuer: Issuer | None = None,
        *,
        accepts_caller_keys: bool = False,
        server_key: SecretStr | None = None,
        rates: RequestRates | None = None,
    ) -> None:
        self.issuer = issuer
        self.rates = RequestRates() if rates is None else rates
        self.accepts_caller_keys = accepts_caller_keys
        self._tokens = tokens
        self._server_key = server_key
        self._caller_keys: dict[str, set[str]] = {}

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        """The tenants of the tokens file, by name."""
        return self._tokens.tenants if self._tokens is not None else {}

    @property
    def exposure(self) -> str | None:
        """A warning if other users of this machine can read an EvoLink key in the tokens file."""
        return self._tokens.exposure if self._tokens is not None else None

    async def authenticate(self, headers: Mapping[bytes, bytes]) -> Tenant | AuthFailure:
        """Return the tenant of a request, or the answer that refuses it."""
        auth_result = await self._tenant_of(headers.get(b"authorization"))
        if isinstance(auth_result, AuthFailure):
            return auth_result
        # After the authentication, so that no other caller can use up the requests of a tenant.
        if (failure := self.rates.failure(auth_result.name, auth_result.requests_per_minute)) is not None:
            return failure
        key = headers.get(CALLER_KEY_HEADER)
        return auth_result if key is None else self._with_caller_key(auth_result, key.decode("latin-1").strip())

    async def _tenant_of(self, authorization: bytes | None) -> Tenant | AuthFailure:
        if self.issuer is None:
            assert self._tokens is not None
            return self._tokens.authenticate(authorization)
        scheme, _, token = (authorization or b"").strip().partition(b" ")
        if scheme.lower() == b"bearer" and token.count(b".") == 2:  # only a JWT has two dots
            return await self.issuer.tenant_of(token.strip())
        if self._tokens is None or not token:
            text = "This server needs a token of its issuer."
            return AuthFailure(HTTPStatus.UNAUTHORIZED, text, (self.issuer.challenge(),))
        auth_result = self._tokens.authenticate(authorization)
        if isinstance(auth_result, AuthFailure) and auth_result.status == HTTPStatus.UNAUTHORIZED:
            return replace(auth_result, headers=(self.issuer.challenge(', error="invalid_token"'),))
        return auth_result

    def _with_caller_key(self, tenant: Tenant, key: str) -> Tenant | AuthFailure:
        # Without this refusal the request would spend from another account than the caller expects.
        if not self.accepts_caller_keys:
            return AuthFailure(HTTPStatus.FORBIDDEN, "This server takes no keys of callers: leave X-EvoLink-Key out.")
        if not KEY.fullmatch(key):
            text = "X-EvoLink-Key is no EvoLink key: 8 to 512 visible ASCII characters."
            return AuthFailure(HTTPStatus.BAD_REQUEST, text)
        usual_key = tenant.evolink_key or self._server_key
        # In constant time, so that a caller cannot find the server's key character by character.
        if usual_key is not None and hmac.compare_digest(usual_key.get_secret_value(), key):
            return tenant  # the same account, so the same tasks
        known_keys = self._caller_keys.setdefault(tenant.name, set())
        if key not in known_keys and len(known_keys) >= CALLER_KEYS_MAX:
            # Several studios of one caller share their entries, so none of them closes before the server ends.
            text = f"One caller may use {CALLER_KEYS_MAX} keys until this server restarts. Use one of the earlier keys."
            return AuthFailure(HTTPStatus.TOO_MANY_REQUESTS, text)
        known_keys.add(key)
        return replace(tenant, evolink_key=SecretStr(key), shares_account=False)
