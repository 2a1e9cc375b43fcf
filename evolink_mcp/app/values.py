"""How one variable's text becomes a value; what cannot be used ends the start with a sentence that names it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from evolink_mcp.api.urls import KEY, is_loopback
from evolink_mcp.sanitize import harmless

HOST = re.compile(r"[0-9a-z]([0-9a-z.-]{0,251}[0-9a-z])?")
PLACEHOLDER = re.compile(r"\$\{[^{}]*\}")
HOST_AND_PORT = re.compile(r"(\[[^\[\]]+\]|[^:\[\]]*)(:[0-9]{0,5})?")
BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
EXAMPLE_KEY = "sk-..."
SECRET_MIN = 32


class BadSetting(ValueError):
    """A variable has a value that cannot be used; the text names both and says what would do."""


def key(value: str | None) -> tuple[str | None, str | None]:
    """The key, or why it cannot be used: that ends no start, because the paid tools explain it."""
    if value is None:
        return None, None
    if value == EXAMPLE_KEY:
        return None, f"EVOLINK_API_KEY is still the example's {EXAMPLE_KEY}"
    if PLACEHOLDER.search(value):
        return None, "EVOLINK_API_KEY has a ${...} in it that the host did not replace"
    if value[0] in "\"'" or value.lower().startswith("bearer"):
        return None, "EVOLINK_API_KEY must be the key alone, without quotes and without “Bearer”"
    if not KEY.fullmatch(value):
        return (
            None,
            "EVOLINK_API_KEY is set, but it is not a key: 8 to 512 visible ASCII characters, no blanks",
        )
    return value, None


def address(name: str, value: str) -> str:
    """The base address of an API: https, or http on loopback."""
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        parts, host = urlsplit(""), ""
    safe = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host))
    if not host or not safe or "@" in parts.netloc or parts.query or parts.fragment:
        raise BadSetting(f"{name} must be an https address (http only on loopback), without user name or query")
    return value.rstrip("/")


def database(url: str | None, secret: str | None) -> tuple[str | None, str | None]:
    """The database's address and the team's secret; neither is ever shown.

    Raises:
        BadSetting: the address is wrong or ambiguous, the secret is short or missing, or the extra is not installed.
    """
    if secret is not None:
        check_length("EVOLINK_MCP_SECRET", secret)
    if url is None:
        return None, secret
    if not url.startswith(("postgresql://", "postgres://")):
        raise BadSetting("EVOLINK_MCP_DATABASE_URL must begin with postgresql://")
    if not has_clear_authority(url):
        raise BadSetting(
            "EVOLINK_MCP_DATABASE_URL is ambiguous: percent-encode the user name and the password in it "
            "(@ is %40, / is %2F, ? is %3F, # is %23, : is %3A, % is %25)"
        )
    if secret is None:
        raise BadSetting(
            "EVOLINK_MCP_DATABASE_URL needs EVOLINK_MCP_SECRET, the same on all servers of the team; "
            'make one with: python3 -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    for module in ("psycopg", "psycopg_pool"):
        need(module, "EVOLINK_MCP_DATABASE_URL")
    return url, secret


def has_clear_authority(url: str) -> bool:
    """Return whether user, password, hosts and ports of a database URL can be divided in one way only.

    Otherwise PostgreSQL's client could take a part of the password for a host. It would ask DNS for it, and show it in
    an error.
    """
    rest = url.partition("://")[2]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    hosts = authority.rpartition("@")[2]
    if rest.count("@") > 1 or "@" in rest[len(authority) :] or BROKEN_ESCAPE.search(rest):
        return False
    return all(HOST_AND_PORT.fullmatch(host) for host in hosts.split(","))


def check_length(name: str, secret: str) -> None:
    """Refuse a secret that could be guessed."""
    if len(secret) < SECRET_MIN:
        raise BadSetting(f"{name} must have {SECRET_MIN} characters or more")


def need(module: str, name: str) -> None:
    """Refuse a variable whose library is not installed."""
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise BadSetting(f'{name} needs the extra “teams”: pip install "evolink-mcp[teams]"')


def public_url(value: str | None, secret: str | None) -> str | None:
    """The address at which EvoLink and people reach this server.

    Raises:
        BadSetting: it is no such address, or there is no secret to sign with.
    """
    if value is None:
        return None
    value = address("EVOLINK_MCP_PUBLIC_URL", value)
    if secret is None:
        raise BadSetting("EVOLINK_MCP_PUBLIC_URL needs EVOLINK_MCP_SECRET, which signs the addresses below it")
    return value


def folder(said: Mapping[str, str], name: str) -> Path | None:
    """The folder or file that this variable names; None if it is not set."""
    return path(name, said[name]) if name in said else None


def path(name: str, text: str) -> Path:
    """A folder as people and bundles write it: `~`, ${HOME}, ${DESKTOP}, ${DOCUMENTS}, ${DOWNLOADS}, ${PICTURES}."""
    import platformdirs

    known = {
        "HOME": lambda: str(Path.home()),
        "DESKTOP": platformdirs.user_desktop_dir,
        "DOCUMENTS": platformdirs.user_documents_dir,
        "DOWNLOADS": platformdirs.user_downloads_dir,
        "PICTURES": platformdirs.user_pictures_dir,
    }
    for word, value in known.items():
        if f"${{{word}}}" in text:
            text = text.replace(f"${{{word}}}", value())
    if left := PLACEHOLDER.search(text):
        raise BadSetting(f"{name} has {left[0]} in it, which the host did not replace; give the whole path")
    try:
        found = Path(text).expanduser()
    except RuntimeError as error:
        raise BadSetting(f"{name} names the home folder of a user who does not exist here") from error
    if not found.is_absolute():
        raise BadSetting(
            f"{name} must be an absolute path; “{harmless(text, 80)}” would depend on where the host starts it"
        )
    return found


def refuse_commas(folders: Sequence[Path]) -> None:
    """Refuse a list that was separated by commas: it would be one folder that does not exist."""
    for one in folders:
        if "," in str(one) and not one.exists():
            raise BadSetting(f"EVOLINK_MCP_ALLOWED_DIRS separates its folders by “{os.pathsep}”, not by commas")


def pictures_folder(*, simulated: bool = False) -> Path:
    """Where pictures go by default; those of a simulated EvoLink never lie among the bought ones."""
    import platformdirs

    return platformdirs.user_pictures_path().absolute() / ("EvoLink simulated" if simulated else "EvoLink")


def data_folder() -> Path:
    """Where the journal lies by default."""
    import platformdirs

    return platformdirs.user_data_path("evolink-mcp", appauthor=False).absolute()


def working_folder() -> tuple[Path, ...]:
    """The project an IDE agent works in; never the whole disk or the whole home."""
    try:
        here = Path.cwd().resolve()
        home = Path.home().resolve()
    except (OSError, RuntimeError):
        return ()
    return () if here == home or here == Path(here.anchor) or home.is_relative_to(here) else (here,)


def size_rule(value: str | None) -> str:
    """A name of studio.size_rule.SETTINGS."""
    if value is None:
        return "auto"
    from evolink_mcp.studio.size_rule import SETTINGS

    if value.lower() not in SETTINGS:
        raise BadSetting(f"EVOLINK_SIZE_RULE must be {' or '.join(SETTINGS)}")
    return value.lower()


def number(said: Mapping[str, str], name: str, most: float = 1e9) -> float | None:
    """A number from 0 to `most`; None if it is not set."""
    if name not in said:
        return None
    try:
        value = float(said[name])
    except ValueError:
        value = -1.0
    if not 0 <= value <= most:
        raise BadSetting(f"{name} must be a number from 0 to {most:g}")
    return value


def preview_edge(value: str) -> int | None:
    """Pixels, None for auto, 0 for off."""
    if value.lower() in ("auto", "off"):
        return None if value.lower() == "auto" else 0
    from evolink_mcp.images.previews import PREVIEW_EDGE_MAX, PREVIEW_EDGE_MIN

    if not value.isascii() or not value.isdigit() or not PREVIEW_EDGE_MIN <= int(value[:6]) <= PREVIEW_EDGE_MAX:
        raise BadSetting(
            f"EVOLINK_MCP_PREVIEW must be auto, off, or pixels from {PREVIEW_EDGE_MIN} to {PREVIEW_EDGE_MAX}"
        )
    return int(value)


def tools(value: str | None) -> frozenset[str] | None:
    """The tools to publish; None for all of them."""
    if value is None:
        return None
    from evolink_mcp.tools.schemas import tools_named

    try:
        return tools_named(_listed(value))
    except ValueError as error:
        raise BadSetting(f"EVOLINK_MCP_TOOLS: {error}") from error


def hosts(value: str | None) -> frozenset[str] | None:
    """Host names; None for any, an empty set for `none`."""
    if value is None:
        return None
    names = frozenset(host.lower().rstrip(".") for host in _listed(value))
    for host in names:
        if not HOST.fullmatch(host):
            raise BadSetting(
                f"EVOLINK_MCP_CALLBACK_HOSTS: “{harmless(host, 60)}” is no host name; write hooks.example.com, or none"
            )
    return names - {"none"}


def _listed(value: str) -> list[str]:
    return [part for part in map(str.strip, value.split(",")) if part]


def switch(said: Mapping[str, str], name: str, *, default: bool) -> bool:
    """1 or 0, or a word for it."""
    value = said.get(name, "01"[default]).lower()
    if value not in ("0", "1", "false", "true", "no", "yes", "off", "on"):
        raise BadSetting(f"{name} must be 0 or 1")
    return value in ("1", "true", "yes", "on")


def unquoted(value: str) -> str:
    """Without the quotes that some configuration files pass on."""
    quoted = len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'"
    return value[1:-1].strip() if quoted else value
