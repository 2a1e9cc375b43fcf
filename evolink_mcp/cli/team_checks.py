"""What one check of `doctor` finds; and the checks of what a team's servers need besides the database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evolink_mcp.errors import StoreUnusable
from evolink_mcp.sanitize import harmless
from evolink_mcp.teams.settings import TeamSettings

Verdict = Literal["ok", "warning", "broken", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found, and what to do about it."""

    subject: str
    verdict: Verdict
    words: str
    todo: str = ""


async def team(settings: TeamSettings) -> list[Finding]:
    """Tokens, issuer and store, those of them that the settings name."""
    return [*tokens(settings), *await issuer(settings), *await store(settings)]


def tokens(settings: TeamSettings) -> list[Finding]:
    """The tokens file can be used, and how many may call."""
    if settings.tokens_file is None:
        return []
    from evolink_mcp.teams.tokens import BadTokens, Tokens

    try:
        file = Tokens(settings.tokens_file)
    except BadTokens as error:
        return [Finding("tokens", "broken", str(error), "Correct the file: at the start it is refused.")]
    if file.exposure is not None:
        return [Finding("tokens", "warning", file.exposure)]
    names = {tenant.name for tenant in file.tenants}
    return [Finding("tokens", "ok", f"{settings.tokens_file}: {len(names)} tenants")]


async def issuer(settings: TeamSettings) -> list[Finding]:
    """The OAuth issuer publishes its keys."""
    oauth = settings.oauth
    if oauth is None:
        return []
    from evolink_mcp.teams.oauth import Issuer

    problem = await Issuer(oauth.issuer, oauth.audience, oauth.scopes, oauth.audience).problem()
    shown = harmless(oauth.issuer, 200)
    if problem is not None:
        return [Finding("issuer", "broken", f"{shown}: {problem}", "Nobody can call by a JWT until it can be read.")]
    return [Finding("issuer", "ok", f"{shown} publishes its keys; JWTs must name {harmless(oauth.audience, 200)}")]


async def store(settings: TeamSettings) -> list[Finding]:
    """A picture can be written into the store, read and removed."""
    if settings.store is None:
        return []
    from evolink_mcp.app.wiring import store_of

    place = store_of(settings)
    assert place is not None
    try:
        await place.try_out()
    except StoreUnusable as error:
        return [
            Finding("store", "broken", error.message, "Look at EVOLINK_MCP_STORE, and at the store's own variables.")
        ]
    return [Finding("store", "ok", f"{harmless(settings.store, 200)} can be written and read")]
