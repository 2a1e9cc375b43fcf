"""The authentication of HTTP requests, as the HTTP guard sees it. `teams` implements it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

CALLER_KEY = "evolink.caller"  # The key in an ASGI scope for the authenticated caller


@dataclass(frozen=True, slots=True)
class AuthFailure:
    """The HTTP answer that refuses a request: a wrong header, no valid token, a limit, or a server that is about to end."""

    status: int
    text: str
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Authenticator(Protocol):
    """Authenticate HTTP requests by their headers."""

    async def authenticate(self, headers: Mapping[bytes, bytes]) -> object | AuthFailure:
        """Return the caller, or the answer that refuses the request."""
        ...
