"""The settings that only servers of a team need: where pictures go, who else may call, what is told about the work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from evolink_mcp.app import values
from evolink_mcp.app.values import BadSetting

LINK_HOURS, LINK_HOURS_MAX = 24.0, 168.0  # S3 signs for a week at most
# Every variable, its default as README names it, and what it does.
TEAM_VARIABLES: dict[str, tuple[str, str]] = {
    "EVOLINK_MCP_OAUTH_ISSUER": (
        "none",
        "Over HTTP: the OAuth 2.1 issuer whose JWTs may call, instead of or beside tokens. Needs the public URL.",
    ),
    "EVOLINK_MCP_OAUTH_AUDIENCE": ("the public URL + /mcp", "The audience that a JWT must name."),
    "EVOLINK_MCP_OAUTH_SCOPES": ("none", "The scopes that a JWT must have, separated by blanks or commas."),
    "EVOLINK_MCP_CALLER_KEYS": ("0", "1: a caller with a token may bring an own EvoLink key in `X-EvoLink-Key`."),
    "EVOLINK_MCP_STORE": (
        "nowhere",
        "Where pictures of callers with a token go: s3://…, gs://…, az://…, or a folder that all servers mount.",
    ),
    "EVOLINK_MCP_STORE_LINK_HOURS": ("24", "How long a link to a stored picture lives."),
    "EVOLINK_MCP_AUDIT": ("0", "1: one JSON line on stderr for each paid call."),
    "EVOLINK_MCP_METRICS_PORT": ("none", "Over HTTP: serve Prometheus metrics on this port, to whoever reaches it."),
    "EVOLINK_MCP_METRICS_TOKEN": (
        "none",
        "Over HTTP: `/metrics` is for who sends this as a bearer token, and no longer for every caller.",
    ),
}


@dataclass(frozen=True, slots=True)
class OAuth:
    """An issuer whose JWTs may call, the audience and the scopes that they need."""

    issuer: str
    audience: str
    scopes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TeamSettings:
    """What TEAM_VARIABLES say. `store` is an address or an absolute folder; `metrics_port` is a TCP port."""

    oauth: OAuth | None = None
    caller_keys: bool = False
    store: str | None = None
    store_link_hours: float = LINK_HOURS
    audit: bool = False
    metrics_port: int | None = None
    metrics_token: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, said: Mapping[str, str], public_url: str | None) -> TeamSettings:
        """Read every variable.

        Raises:
            BadSetting: one cannot be used, or needs another one.
        """
        hours = values.number(said, "EVOLINK_MCP_STORE_LINK_HOURS", LINK_HOURS_MAX)
        return cls(
            oauth=_oauth(said, public_url),
            caller_keys=values.switch(said, "EVOLINK_MCP_CALLER_KEYS", default=False),
            store=_store(said.get("EVOLINK_MCP_STORE"), public_url),
            store_link_hours=hours or LINK_HOURS,
            audit=values.switch(said, "EVOLINK_MCP_AUDIT", default=False),
            metrics_port=_port(said),
            metrics_token=_metrics_token(said),
        )


def _oauth(said: Mapping[str, str], public_url: str | None) -> OAuth | None:
    issuer = said.get("EVOLINK_MCP_OAUTH_ISSUER")
    if issuer is None:
        for name in ("EVOLINK_MCP_OAUTH_AUDIENCE", "EVOLINK_MCP_OAUTH_SCOPES"):
            if name in said:
                raise BadSetting(f"{name} needs EVOLINK_MCP_OAUTH_ISSUER")
        return None
    values.address("EVOLINK_MCP_OAUTH_ISSUER", issuer)
    if public_url is None:
        raise BadSetting(
            "EVOLINK_MCP_OAUTH_ISSUER needs EVOLINK_MCP_PUBLIC_URL, by which clients find out where to log in"
        )
    audience = said.get("EVOLINK_MCP_OAUTH_AUDIENCE", f"{public_url}/mcp")
    return OAuth(issuer, audience, tuple(said.get("EVOLINK_MCP_OAUTH_SCOPES", "").replace(",", " ").split()))


def _store(value: str | None, public_url: str | None) -> str | None:
    if value is None:
        return None
    from evolink_mcp.teams.object_store import REMOTE

    if value.startswith(REMOTE):
        parts = urlsplit(value)
        if not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
            raise BadSetting(
                "EVOLINK_MCP_STORE must be like s3://bucket/prefix; credentials go into the store's own variables"
            )
    else:
        if "://" in value:
            raise BadSetting(f"EVOLINK_MCP_STORE must begin with {', '.join(REMOTE)} or be an absolute folder")
        folder = values.path("EVOLINK_MCP_STORE", value)
        if not folder.is_dir():
            raise BadSetting(f"EVOLINK_MCP_STORE: there is no folder {folder}; make it, or mount what belongs there")
        if public_url is None:
            raise BadSetting("EVOLINK_MCP_STORE names a folder: links into it need EVOLINK_MCP_PUBLIC_URL")
        value = str(folder)
    values.need("obstore", "EVOLINK_MCP_STORE")
    return value


def _port(said: Mapping[str, str]) -> int | None:
    port = values.number(said, "EVOLINK_MCP_METRICS_PORT", 65_535)
    if port is None:
        return None
    if port != int(port) or not port:
        raise BadSetting("EVOLINK_MCP_METRICS_PORT must be a port from 1 to 65535")
    values.need("prometheus_client", "EVOLINK_MCP_METRICS_PORT")
    return int(port)


def _metrics_token(said: Mapping[str, str]) -> str | None:
    token = said.get("EVOLINK_MCP_METRICS_TOKEN")
    if token is not None:
        values.check_length("EVOLINK_MCP_METRICS_TOKEN", token)
        values.need("prometheus_client", "EVOLINK_MCP_METRICS_TOKEN")
    return token
