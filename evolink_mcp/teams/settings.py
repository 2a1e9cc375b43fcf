"""The settings of teams: database, allowed callers, object store, callbacks, metrics and audit."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from evolink_mcp.app.settings import BadSetting, Settings, number, path, plain, setting, switch, url

SECRET_MIN_CHARS = 32
LINK_HOURS = 24.0
LINK_HOURS_MAX = 168.0  # S3 signs links for at most a week
UPLOAD_MB_PER_DAY = 1_000.0
UPLOAD_MB_MAX = 1e9
PORT_MAX = 65_535
_SECRET = "EVOLINK_MCP_SECRET"
_NEW_SECRET = 'create one with: python3 -c "import secrets; print(secrets.token_urlsafe(32))"'

_HOST_AND_PORT = re.compile(r"(\[[^\[\]]+\]|[^:\[\]]*)(:[0-9]{0,5})?")
_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class OAuth:
    """An accepted issuer of JWTs, with the required audience and scopes."""

    issuer: str
    audience: str
    scopes: tuple[str, ...]


# --- parsers ---


def _with_extra(parse: Callable[[str], T], *modules: str) -> Callable[[str], T]:
    """Return a parser that first checks that the modules of the extra “teams” are installed."""

    def parse_with_extra(text: str) -> T:
        from importlib.util import find_spec

        value = parse(text)
        if not all(map(find_spec, modules)):
            raise ValueError('needs the extra “teams”: run pip install ".[teams]" in the repository of evolink-mcp')
        return value

    return parse_with_extra


def _secret(text: str) -> str:
    if len(text) < SECRET_MIN_CHARS:
        raise ValueError(f"must have {SECRET_MIN_CHARS} characters or more")
    return text


def _secrets(text: str) -> tuple[str, ...]:
    secrets = tuple(_secret(word) for word in text.split())
    if len(secrets) > 2:
        raise ValueError("must have one secret, or a new and an old one")
    return secrets


def _database_url(text: str) -> str:
    if not text.startswith(("postgresql://", "postgres://")):
        raise ValueError("must begin with postgresql://")
    if not _has_clear_authority(text):
        raise ValueError(
            "is ambiguous: percent-encode the user name and the password in it "
            "(@ is %40, / is %2F, ? is %3F, # is %23, : is %3A, % is %25)"
        )
    return text


def _has_clear_authority(url: str) -> bool:
    """Return whether user, password, hosts and ports of a database URL can be divided in one way only.

    Otherwise PostgreSQL's client could take a part of the password for a host. It would ask DNS for it, and show it in
    an error.
    """
    rest = url.partition("://")[2]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    hosts = authority.rpartition("@")[2]
    if rest.count("@") > 1 or "@" in rest[len(authority) :] or _BROKEN_ESCAPE.search(rest):
        return False
    return all(_HOST_AND_PORT.fullmatch(host) for host in hosts.split(","))


def _issuer(text: str) -> str:
    url(text)
    return text  # JWTs repeat the issuer exactly, with a slash at the end or without


def _scopes(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


def _audience(values: Mapping[str, Any]) -> str | None:
    # The MCP specification uses the URL of the endpoint as the audience.
    return None if values["oauth_issuer"] is None else f"{values['public_url']}/mcp"


def _store(text: str) -> str:
    from evolink_mcp.teams.object_store import REMOTE

    if text.startswith(REMOTE):
        parts = urlsplit(text)
        if not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("must be like s3://bucket/prefix; set credentials in the variables of the store")
        return text
    if "://" in text:
        raise ValueError(f"must begin with {', '.join(REMOTE)} or be an absolute folder")
    folder = path(text)
    if not folder.is_dir():
        raise ValueError(f"names a missing folder: {folder}; create or mount it")
    return str(folder)


def _port(text: str) -> int:
    port = number(PORT_MAX)(text)
    if port != int(port) or not port:
        raise ValueError(f"must be a port from 1 to {PORT_MAX}")
    return int(port)


# --- the table ---


@dataclass(frozen=True, slots=True)
class TeamSettings(Settings):
    """All settings of a server. The fields of this class are those that only teams need."""

    secrets: tuple[str, ...] | None = setting(
        _SECRET,
        _secrets,
        None,
        f"At least {SECRET_MIN_CHARS} characters, the same on all servers of a team. Signs links and callback addresses. "
        "To change it: the new and the old one, separated by a blank.",
        is_secret=True,
    )
    database_url: str | None = setting(
        "EVOLINK_MCP_DATABASE_URL",
        _with_extra(_database_url, "psycopg", "psycopg_pool"),
        None,
        "`postgresql://…`: PostgreSQL database for the journal of all servers of a team. Needs the secret.",
        is_secret=True,
        requires=(_SECRET, f"set the same secret on all servers of the team; {_NEW_SECRET}"),
    )
    public_url: str | None = setting(
        "EVOLINK_MCP_PUBLIC_URL",
        url,
        None,
        "https URL of this server for people and for EvoLink's callbacks, over HTTP. Needs the secret.",
        requires=(_SECRET, f"the server signs the addresses below its URL; {_NEW_SECRET}"),
    )
    tokens_file: Path | None = setting(
        "EVOLINK_MCP_TOKENS_FILE", path, None, "TOML file with the tokens of allowed callers, over HTTP."
    )
    oauth_issuer: str | None = setting(
        "EVOLINK_MCP_OAUTH_ISSUER",
        _issuer,
        None,
        "OAuth 2.1 issuer of accepted JWTs over HTTP, instead of tokens or in addition. Needs the public URL.",
        requires=("EVOLINK_MCP_PUBLIC_URL", "clients find the login page of the issuer there"),
    )
    oauth_audience: str | None = setting(
        "EVOLINK_MCP_OAUTH_AUDIENCE",
        plain,
        _audience,
        "Audience that a JWT must contain.",
        default_text="the public URL + /mcp",
        requires=("EVOLINK_MCP_OAUTH_ISSUER", "only JWTs have an audience"),
    )
    oauth_scopes: tuple[str, ...] = setting(
        "EVOLINK_MCP_OAUTH_SCOPES",
        _scopes,
        (),
        "Scopes that a JWT must have, separated by blanks or commas.",
        default_text="none",
        requires=("EVOLINK_MCP_OAUTH_ISSUER", "only JWTs have scopes"),
    )
    oauth_roles: Path | None = setting(
        "EVOLINK_MCP_OAUTH_ROLES",
        path,
        None,
        "TOML file with the limits, tools and denied subjects of people with a JWT.",
        requires=("EVOLINK_MCP_OAUTH_ISSUER", "only people with a JWT have roles"),
    )
    has_caller_keys: bool = setting(
        "EVOLINK_MCP_CALLER_KEYS",
        switch,
        False,
        "1 lets an authenticated caller send a separate EvoLink key in `X-EvoLink-Key`.",
    )
    store: str | None = setting(
        "EVOLINK_MCP_STORE",
        _with_extra(_store, "obstore"),
        None,
        "Object store for images of remote callers: s3://…, gs://…, az://…, or a folder that all servers mount.",
    )
    store_link_hours: float = setting(
        "EVOLINK_MCP_STORE_LINK_HOURS",
        # A link for 0 hours would never work.
        lambda text: number(LINK_HOURS_MAX)(text) or LINK_HOURS,
        LINK_HOURS,
        "Lifetime of a link to a stored image, in hours.",
    )
    upload_mb_per_day: float = setting(
        "EVOLINK_MCP_UPLOAD_MB_PER_DAY",
        number(UPLOAD_MB_MAX),
        UPLOAD_MB_PER_DAY,
        "Limit of `PUT /uploads` for each tenant and day, in MB.",
    )
    has_audit_log: bool = setting("EVOLINK_MCP_AUDIT", switch, False, "1 writes one JSON line per paid call to stderr.")
    metrics_port: int | None = setting(
        "EVOLINK_MCP_METRICS_PORT",
        _with_extra(_port, "prometheus_client"),
        None,
        "Port for Prometheus metrics without authentication, over HTTP.",
    )
    metrics_token: str | None = setting(
        "EVOLINK_MCP_METRICS_TOKEN",
        _with_extra(_secret, "prometheus_client"),
        None,
        "Bearer token for `/metrics`, over HTTP. Without it, every caller can read the metrics.",
        is_secret=True,
    )

    def __post_init__(self) -> None:
        """Check the settings together.

        Raises:
            BadSetting: links into a folder need a public URL.
        """
        if self.store is not None and "://" not in self.store and self.public_url is None:
            raise BadSetting("EVOLINK_MCP_STORE names a folder. Links into it need EVOLINK_MCP_PUBLIC_URL.")

    @property
    def oauth(self) -> OAuth | None:
        """The accepted issuer with the requirements for its JWTs."""
        if self.oauth_issuer is None or self.oauth_audience is None:
            return None
        return OAuth(self.oauth_issuer, self.oauth_audience, self.oauth_scopes)
