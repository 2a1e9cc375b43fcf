"""The roles file: which people of an OAuth issuer may call, with which limits and tools."""

from __future__ import annotations

import logging
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from evolink_mcp.api.task import as_dict
from evolink_mcp.sanitize import harmless
from evolink_mcp.teams.reloaded_file import ReloadedFile
from evolink_mcp.teams.tokens import LIMIT_NAMES, BadTokens, Tenant, parse_limits

log = logging.getLogger(__name__)


class BadRoles(ValueError):
    """The roles file is invalid. The text names the fault."""


class AccessDenied(Exception):
    """The roles file does not allow this person to call. The text is for the caller."""


@dataclass(frozen=True, slots=True)
class _Role:
    """The limits of the people whose `claim` is or contains `value`. Without a claim: of all people."""

    claim: str | None
    value: str
    limits: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Rules:
    roles: tuple[_Role, ...]
    denied_subjects: frozenset[str]


class Roles:
    """The roles file at `path`. A changed file is read again. An invalid one changes nothing."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file. `clock` (seconds) is for tests.

        Raises:
            BadRoles: the file is not readable or not valid.
        """
        self._file = ReloadedFile(path, _read, "roles", clock=clock)

    def with_limits(self, tenant: Tenant, claims: Mapping[str, Any]) -> Tenant:
        """Return the tenant with the limits of the first role that matches the claims of a JWT.

        Raises:
            AccessDenied: the subject is denied, or the file has roles and none matches.
        """
        if self._file.reload():
            log.warning("reloaded the roles file: %d roles", len(self._file.content.roles))
        rules = self._file.content
        # Before the roles, so that no role admits a denied person.
        if claims.get("sub") in rules.denied_subjects:
            raise AccessDenied("The owner of this server has denied access to you.")
        role = next((role for role in rules.roles if _matches(role, claims)), None)
        if role is not None:
            return replace(tenant, **role.limits)
        # A file without roles only denies subjects.
        if rules.roles:
            raise AccessDenied("You have no role at this server. Ask its owner for one.")
        return tenant


def _matches(role: _Role, claims: Mapping[str, Any]) -> bool:
    if role.claim is None:
        return True
    value = _claim(claims, role.claim)
    return role.value in cast("list[Any]", value) if isinstance(value, list) else value == role.value


def _claim(claims: Mapping[str, Any], name: str) -> object:
    """Return a claim. A dot leads into an object, unless the JWT has a claim with the whole name."""
    if name in claims:
        return claims[name]
    value: object = dict(claims)
    for part in name.split("."):
        value = as_dict(value).get(part)
    return value


def _read(path: Path) -> _Rules:
    try:
        # Editors on Windows write a byte order mark.
        table = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise BadRoles(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise BadRoles(f"{path} is no TOML: {harmless(error, 200)}") from error
    denied_subjects: object = table.pop("denied_subjects", [])
    blocks: object = table.pop("role", [])
    if table or not isinstance(blocks, list):
        raise BadRoles(f"{path} may have denied_subjects and [[role]] blocks, and nothing else")
    if not isinstance(denied_subjects, list) or not all(
        isinstance(subject, str) for subject in cast("list[Any]", denied_subjects)
    ):
        raise BadRoles(f"{path}: denied_subjects must be a list of texts")
    roles = [
        _parse_role(block, f"role {number} in {path}") for number, block in enumerate(cast("list[Any]", blocks), 1)
    ]
    return _Rules(tuple(roles), frozenset(cast("list[str]", denied_subjects)))


def _parse_role(block: Any, location: str) -> _Role:
    if not isinstance(block, dict):
        raise BadRoles(f"{location}: it must be a [[role]] block")
    values = cast("dict[str, Any]", block)
    fields = {"claim", "value"} | LIMIT_NAMES
    if unknown := sorted(set(values) - fields):
        raise BadRoles(f"{location}: {harmless(unknown[0], 60)} is unknown; use {', '.join(sorted(fields))}")
    claim = values.get("claim")
    value = values.get("value")
    has_both = isinstance(claim, str) and bool(claim) and isinstance(value, str)
    if not has_both and not (claim is None and value is None):
        raise BadRoles(f"{location}: claim and value must both be texts. Without both, the role is for all people.")
    try:
        limits = parse_limits(values, location)
    except BadTokens as error:
        raise BadRoles(str(error)) from error
    return _Role(claim, value or "", limits)
