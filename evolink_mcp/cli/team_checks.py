"""The finding of a check by `doctor`, and the checks of a team's tokens file, OAuth issuer and object store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evolink_mcp.errors import StoreUnusable
from evolink_mcp.sanitize import harmless
from evolink_mcp.teams.settings import TeamSettings

Verdict = Literal["ok", "warning", "broken", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check, and the next step. `doctor --json` publishes the fields."""

    subject: str
    verdict: Verdict
    words: str
    todo: str = ""


async def check_team(settings: TeamSettings) -> list[Finding]:
    """Check the tokens file, the issuer and the object store, if they are set."""
    return [*_check_tokens(settings), *await _check_issuer(settings), *await _check_store(settings)]


def _check_tokens(settings: TeamSettings) -> list[Finding]:
    if settings.tokens_file is None:
        return []
    from evolink_mcp.teams.tokens import BadTokens, Tokens

    try:
        file = Tokens(settings.tokens_file)
    except BadTokens as error:
        return [Finding("tokens", "broken", str(error), "Correct the file. No server starts with it.")]
    if file.exposure is not None:
        return [Finding("tokens", "warning", file.exposure)]
    return [Finding("tokens", "ok", f"{settings.tokens_file}: {len(file.tenants)} tenants")]


async def _check_issuer(settings: TeamSettings) -> list[Finding]:
    oauth = settings.oauth
    if oauth is None:
        return []
    from evolink_mcp.teams.oauth import Issuer
    from evolink_mcp.teams.roles import BadRoles, Roles

    if settings.oauth_roles is not None:
        try:
            Roles(settings.oauth_roles)
        except BadRoles as error:
            return [Finding("issuer", "broken", str(error), "Correct the file. No server starts with it.")]
    # The check publishes no metadata, so any URL can be the resource. An audience may be no URL.
    problem = await Issuer(oauth.issuer, oauth.audience, oauth.scopes, resource=oauth.issuer).problem()
    name = harmless(oauth.issuer, 200)
    if problem is not None:
        return [
            Finding("issuer", "broken", f"{name}: {problem}", "The server accepts no JWT until its keys are readable.")
        ]
    return [
        Finding("issuer", "ok", f"{name} publishes its keys; JWTs need the audience {harmless(oauth.audience, 200)}")
    ]


async def _check_store(settings: TeamSettings) -> list[Finding]:
    if settings.store is None:
        return []
    from evolink_mcp.teams.object_store import MARKER
    from evolink_mcp.teams.studios import object_store_of

    store = object_store_of(settings)
    assert store is not None
    try:
        # Before `check`, which writes, perhaps below an empty mount point.
        if store.is_folder and Path(settings.store).is_dir() and await store.read_marker() is None:
            return [
                Finding(
                    "store",
                    "warning",
                    f"{harmless(settings.store, 200)} has no file {MARKER}",
                    "The first order writes it. If the store has been in use, its share is not mounted.",
                )
            ]
        await store.check()
    except StoreUnusable as error:
        advice = "Check EVOLINK_MCP_STORE and the variables of the object store."
        return [Finding("store", "broken", error.message, advice)]
    return [Finding("store", "ok", f"{harmless(settings.store, 200)} is writable and readable")]
