"""Who sends a request: the tenant of a token, the person of a JWT, and whose EvoLink key pays."""

from __future__ import annotations

import hmac
from collections.abc import Collection, Mapping
from dataclasses import replace

from pydantic import SecretStr

from evolink_mcp.api.urls import KEY
from evolink_mcp.teams.oauth import Issuer
from evolink_mcp.teams.tokens import BAD_REQUEST, FORBIDDEN, TOO_MANY_REQUESTS, UNAUTHORIZED, Refusal, Tenant, Tokens

OWN_KEY = b"x-evolink-key"
KEYS_MAX = 16  # of one tenant: each opens a part of the journal and connections of its own


class Callers:
    """Everybody who may call: by `tokens`, by the JWTs of `issuer`, or by both.

    With `own_keys` a caller may bring an EvoLink key, which then pays instead of the tenant's or the server's, `key`.
    """

    def __init__(
        self,
        tokens: Tokens | None,
        issuer: Issuer | None = None,
        *,
        own_keys: bool = False,
        key: SecretStr | None = None,
    ) -> None:
        self._key = key
        self._tokens = tokens
        self.issuer = issuer
        self.own_keys = own_keys
        self._keys: dict[str, set[str]] = {}

    @property
    def tenants(self) -> Collection[Tenant]:
        """Those who are known beforehand."""
        return self._tokens.tenants if self._tokens is not None else ()

    @property
    def exposure(self) -> str | None:
        """Return a warning if other users of this machine can read an EvoLink key in the tokens file."""
        return self._tokens.exposure if self._tokens is not None else None

    async def enter(self, headers: Mapping[bytes, bytes]) -> Tenant | Refusal:
        """Whose request it is, by its headers, or why it is refused."""
        entered = await self._caller(headers.get(b"authorization"))
        if isinstance(entered, Tenant) and (key := headers.get(OWN_KEY)) is not None:
            return self._with_own_key(entered, key.decode("latin-1").strip())
        return entered

    async def _caller(self, authorization: bytes | None) -> Tenant | Refusal:
        scheme, _, token = (authorization or b"").strip().partition(b" ")
        is_jwt = scheme.lower() == b"bearer" and token.count(b".") == 2
        if self.issuer is None:
            assert self._tokens is not None
            return self._tokens.enter(authorization)
        if is_jwt:
            return await self.issuer.tenant_of(token.strip())
        if self._tokens is None or not token:
            return Refusal(UNAUTHORIZED, "This server needs a token of its issuer.", (self.issuer.challenge(),))
        entered = self._tokens.enter(authorization)
        if isinstance(entered, Refusal) and entered.status == UNAUTHORIZED:
            return replace(entered, headers=(self.issuer.challenge(', error="invalid_token"'),))
        return entered

    def _with_own_key(self, tenant: Tenant, key: str) -> Tenant | Refusal:
        if not self.own_keys:  # to spend from another account than the caller means would be worse
            return Refusal(FORBIDDEN, "This server takes no keys of callers: leave X-EvoLink-Key out.")
        if not KEY.fullmatch(key):
            return Refusal(BAD_REQUEST, "X-EvoLink-Key is no EvoLink key: 8 to 512 visible ASCII characters.")
        usual = tenant.evolink_key or self._key
        if usual is not None and hmac.compare_digest(usual.get_secret_value(), key):
            return tenant  # the same account, so the same tasks
        known = self._keys.setdefault(tenant.name, set())
        if key not in known and len(known) >= KEYS_MAX:
            return Refusal(TOO_MANY_REQUESTS, f"More than {KEYS_MAX} keys of one caller.", ((b"retry-after", b"3600"),))
        known.add(key)
        return replace(tenant, evolink_key=SecretStr(key), shares_account=False)
