"""The environment becomes one frozen `Settings`; nobody else reads the environment."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import SecretStr

from evolink_mcp.api.client import BASE_URL, FILES_BASE_URL
from evolink_mcp.api.sizes import RULES
from evolink_mcp.api.urls import is_loopback
from evolink_mcp.pictures.folders import Folders
from evolink_mcp.pictures.previews import PREVIEW_EDGE_MAX, PREVIEW_EDGE_MIN
from evolink_mcp.studio.purchase import Budget
from evolink_mcp.tools.hosts import WAIT_MAX_S

KEY = re.compile(r"[\x21-\x7e]{8,512}")
PLACEHOLDER = re.compile(r"\$\{[^{}]*\}")
EXAMPLE_KEY = "sk-..."

# Every variable, its default as README names it, and what it does; README's table is held to this.
VARIABLES: dict[str, tuple[str, str]] = {
    "EVOLINK_API_KEY": ("none", "Your EvoLink key. Without it only the free, offline tools work."),
    "EVOLINK_BASE_URL": (BASE_URL, "The API's address: https, or http on loopback."),
    "EVOLINK_FILES_BASE_URL": (FILES_BASE_URL, "The file API's address, for local reference pictures."),
    "EVOLINK_SIZE_RULE": ("anchor-edge", "How ratios become pixels: anchor-edge or pixel-budget."),
    "EVOLINK_MCP_DATA_DIR": ("the user's data folder", "Where the journal lies."),
    "EVOLINK_MCP_OUTPUT_DIR": ("Pictures/EvoLink", "Where pictures are saved."),
    "EVOLINK_MCP_ALLOWED_DIRS": (
        "output and working folder",
        "Folders that local files may come from and go to.",
    ),
    "EVOLINK_MCP_WAIT_SECONDS": ("what the host bears", "How long one call waits, 0 to 900."),
    "EVOLINK_MCP_PREVIEW": ("auto", "Inline preview: auto, off, or its longest edge in pixels."),
    "EVOLINK_MCP_SIDECAR": ("1", "0 leaves out the JSON file beside each picture that says how it was made."),
    "EVOLINK_MCP_RESOURCE_LINKS": ("0", "1 adds resource_link blocks; some hosts fail on them."),
    "EVOLINK_MCP_MAX_CREDITS_PER_CALL": ("none", "Refuse a call whose computed price is higher."),
    "EVOLINK_MCP_MAX_CREDITS_PER_DAY": ("none", "Refuse what would take the day's total higher."),
    "EVOLINK_MCP_CONFIRM_ABOVE": ("none", "Ask the user before a call that costs more credits."),
}


class BadSetting(ValueError):
    """A variable has a value that cannot be used; the text names both and says what would do."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the owner of the server decides; README's table says what each one does.

    `key_problem` says why a given key cannot be used. `wait_s` is in seconds, None leaves it to the host.
    `preview_edge` is in pixels, None chooses it, 0 sends no previews. `budget` is in credits.
    """

    key: SecretStr | None
    key_problem: str | None
    base_url: str
    files_base_url: str
    size_rule: str
    data_dir: Path
    folders: Folders
    allowed_dirs_given: bool
    wait_s: float | None
    preview_edge: int | None
    resource_links: bool
    sidecars: bool
    budget: Budget

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read every variable; blank values and unsubstituted `${...}` placeholders count as unset.

        Raises:
            BadSetting: for any value that cannot be used, except the key's (paid tools explain that one).
        """
        said = _said(os.environ if environ is None else environ)
        key, key_problem = _key(said.get("EVOLINK_API_KEY"))
        base = _base_url("EVOLINK_BASE_URL", said.get("EVOLINK_BASE_URL", BASE_URL))
        files = said.get("EVOLINK_FILES_BASE_URL")
        # A simulated EvoLink serves both; only the real one has a host of its own for files.
        files = _base_url("EVOLINK_FILES_BASE_URL", files or (FILES_BASE_URL if base == BASE_URL else base))
        output = _folder(said, "EVOLINK_MCP_OUTPUT_DIR") or _pictures()
        allowed = tuple(
            _path("EVOLINK_MCP_ALLOWED_DIRS", part)
            for part in map(str.strip, said.get("EVOLINK_MCP_ALLOWED_DIRS", "").split(os.pathsep))
            if part and not PLACEHOLDER.fullmatch(part)
        )
        return cls(
            key=key,
            key_problem=key_problem,
            base_url=base,
            files_base_url=files,
            size_rule=_one_of(said, "EVOLINK_SIZE_RULE", RULES),
            data_dir=_folder(said, "EVOLINK_MCP_DATA_DIR") or _data(),
            folders=Folders(output, tuple(dict.fromkeys((output, *(allowed or _working_folder()))))),
            allowed_dirs_given=bool(allowed),
            wait_s=_number(said, "EVOLINK_MCP_WAIT_SECONDS", WAIT_MAX_S),
            preview_edge=_preview(said.get("EVOLINK_MCP_PREVIEW", "auto")),
            resource_links=_switch(said, "EVOLINK_MCP_RESOURCE_LINKS"),
            sidecars=_switch(said, "EVOLINK_MCP_SIDECAR"),
            budget=Budget(
                per_call=_number(said, "EVOLINK_MCP_MAX_CREDITS_PER_CALL"),
                per_day=_number(said, "EVOLINK_MCP_MAX_CREDITS_PER_DAY"),
                confirm_above=_number(said, "EVOLINK_MCP_CONFIRM_ABOVE"),
            ),
        )


def unknown_variables(environ: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """Variables that look like ours but are not, each with the one that was probably meant."""
    names = [name for name in (os.environ if environ is None else environ) if name.startswith("EVOLINK_")]
    return {
        name: next(iter(difflib.get_close_matches(name, VARIABLES, n=1)), None)
        for name in sorted(names)
        if name not in VARIABLES
    }


def environment_without_ours() -> dict[str, str]:
    """This process's environment for a child that gets settings of its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("EVOLINK_")}


def _said(environ: Mapping[str, str]) -> dict[str, str]:
    values = {name: environ.get(name, "").strip() for name in VARIABLES}
    return {name: value for name, value in values.items() if value and not PLACEHOLDER.fullmatch(value)}


def _key(value: str | None) -> tuple[SecretStr | None, str | None]:
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
    return SecretStr(value), None


def _base_url(name: str, value: str) -> str:
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        parts, host = urlsplit(""), ""
    safe = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host))
    if not host or not safe or parts.username or parts.query or parts.fragment:
        raise BadSetting(f"{name} must be an https address (http only on loopback), without user name or query")
    return value.rstrip("/")


def _folder(said: Mapping[str, str], name: str) -> Path | None:
    return _path(name, said[name]) if name in said else None


def _path(name: str, text: str) -> Path:
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
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise BadSetting(f"{name} names the home folder of a user who does not exist here") from error


def _pictures() -> Path:
    import platformdirs

    return platformdirs.user_pictures_path().absolute() / "EvoLink"


def _data() -> Path:
    import platformdirs

    return platformdirs.user_data_path("evolink-mcp", appauthor=False).absolute()


def _working_folder() -> tuple[Path, ...]:
    """The project an IDE agent works in; never the whole disk or the whole home."""
    try:
        here = Path.cwd().resolve()
        home = Path.home().resolve()
    except (OSError, RuntimeError):
        return ()
    return () if here == home or here == Path(here.anchor) or home.is_relative_to(here) else (here,)


def _one_of(said: Mapping[str, str], name: str, words: tuple[str, ...]) -> str:
    value = said.get(name, words[0]).lower()
    if value not in words:
        raise BadSetting(f"{name} must be {' or '.join(words)}")
    return value


def _number(said: Mapping[str, str], name: str, most: float = 1e9) -> float | None:
    if name not in said:
        return None
    try:
        value = float(said[name])
    except ValueError:
        value = -1.0
    if not 0 <= value <= most:
        raise BadSetting(f"{name} must be a number from 0 to {most:g}")
    return value


def _preview(value: str) -> int | None:
    if value.lower() in ("auto", "off"):
        return None if value.lower() == "auto" else 0
    if not value.isascii() or not value.isdigit() or not PREVIEW_EDGE_MIN <= int(value[:6]) <= PREVIEW_EDGE_MAX:
        raise BadSetting(
            f"EVOLINK_MCP_PREVIEW must be auto, off, or pixels from {PREVIEW_EDGE_MIN} to {PREVIEW_EDGE_MAX}"
        )
    return int(value)


def _switch(said: Mapping[str, str], name: str) -> bool:
    value = said.get(name, VARIABLES[name][0]).lower()
    if value not in ("0", "1", "false", "true", "no", "yes", "off", "on"):
        raise BadSetting(f"{name} must be 0 or 1")
    return value in ("1", "true", "yes", "on")
