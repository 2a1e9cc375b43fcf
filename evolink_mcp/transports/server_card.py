"""Serve the server card (SEP-2127): clients and catalogues read it before they connect."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from evolink_mcp.server.catalogue import server_card

CARD_MEDIA_TYPE = "application/mcp-server-card+json"
WELL_KNOWN_PATH = "/.well-known/mcp/server-card.json"
# Every web page may read the card: it contains no secret.
HEADERS = {"Access-Control-Allow-Origin": "*", "Cache-Control": "public, max-age=3600"}


def card_paths(mcp_path: str) -> tuple[str, ...]:
    """Return the paths of the card: the recommended one below the MCP path, and the well-known one."""
    return (f"{mcp_path}/server-card", WELL_KNOWN_PATH)


class ServerCard:
    """An ASGI app with the card of the server at `mcp_path`.

    `public_url` is the address that callers use. None: the address of the request, which the HTTP guard has checked.
    """

    def __init__(self, mcp_path: str, transport: str, public_url: str | None, *, needs_token: bool) -> None:
        self._mcp_path = mcp_path
        self._transport = transport
        self._public_url = public_url
        self._needs_token = needs_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the card."""
        request = Request(scope)
        base_url = self._public_url or f"{request.url.scheme}://{request.url.netloc}"
        card = server_card(f"{base_url}{self._mcp_path}", self._transport, needs_token=self._needs_token)
        await JSONResponse(card, headers=HEADERS, media_type=CARD_MEDIA_TYPE)(scope, receive, send)
