"""A simulated OAuth issuer."""

from __future__ import annotations

import json
import time
from typing import Any

import anyio
import httpx2 as httpx
import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from evolink_mcp.teams.oauth import Issuer

ISSUER = "https://login.example.org/realms/team"
RESOURCE = "https://pictures.example.org/mcp"
CONFIGURATION = "/realms/team/.well-known/openid-configuration"


class Login:
    """A simulated issuer. `reads` lists the documents that the server read.

    It does not answer while `can_answer` is not set.
    """

    def __init__(self, **metadata: Any) -> None:
        self.keys = {"one": rsa.generate_private_key(65537, 2048)}
        self.metadata = {"issuer": ISSUER, "jwks_uri": f"{ISSUER}/keys", **metadata}
        self.algorithms: dict[str, str] = {}  # those that keys name
        self.reads: list[str] = []
        self.is_down = False
        self.can_answer = anyio.Event()
        self.can_answer.set()
        self.now = 1_000_000.0
        routes = [Route(CONFIGURATION, self._serve_metadata), Route("/realms/team/keys", self._serve_keys)]
        self._app = Starlette(routes=routes)

    def issuer(self, scopes: tuple[str, ...] = (), **options: Any) -> Issuer:
        transport = httpx.ASGITransport(self._app)
        return Issuer(ISSUER, RESOURCE, scopes, RESOURCE, transport=transport, clock=lambda: self.now, **options)

    def token(self, key_id: str | None = "one", algorithm: str = "RS256", key: Any = None, **changes: Any) -> bytes:
        now = int(time.time())
        claims = {"iss": ISSUER, "aud": RESOURCE, "sub": "anna", "iat": now, "exp": now + 600, **changes}
        claims = {name: value for name, value in claims.items() if value is not None}
        headers = {} if key_id is None else {"kid": key_id}
        return jwt.encode(claims, key or self.keys[key_id or "one"], algorithm, headers).encode()

    async def _serve_metadata(self, request: Request) -> Response:
        self.reads.append("metadata")
        await self.can_answer.wait()
        return Response(status_code=503) if self.is_down else JSONResponse(self.metadata)

    async def _serve_keys(self, request: Request) -> Response:
        self.reads.append("keys")
        keys: list[Any] = [{"kty": "unheard-of", "kid": "x"}, "nonsense"]
        for name, key in self.keys.items():
            algorithm: Any = (
                jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
            )
            keys.append({**json.loads(algorithm.to_jwk(key.public_key())), "kid": name, "use": "sig"})
            if name in self.algorithms:
                keys[-1]["alg"] = self.algorithms[name]
        return Response(status_code=503) if self.is_down else JSONResponse({"keys": keys})
