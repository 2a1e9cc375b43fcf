"""The environment becomes one frozen `Settings`; nobody else reads the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from evolink_mcp.api.urls import BASE_URL, FILES_BASE_URL, is_loopback
from evolink_mcp.app import values
from evolink_mcp.images.folders import Folders
from evolink_mcp.studio.limits import Budget
from evolink_mcp.teams.settings import TEAM_VARIABLES, TeamSettings
from evolink_mcp.tools.hosts import WAIT_MAX_S

if TYPE_CHECKING:
    from pydantic import SecretStr

EVOLINK_DOMAIN = "evolink.ai"

# Every variable, its default as README names it, and what it does; README's table is held to this.
VARIABLES: dict[str, tuple[str, str]] = {
    "EVOLINK_API_KEY": ("none", "Your EvoLink key. Without it only the free, offline tools work."),
    "EVOLINK_BASE_URL": (BASE_URL, "The API's address: https, or http on loopback."),
    "EVOLINK_FILES_BASE_URL": (FILES_BASE_URL, "The file API's address, for local reference pictures."),
    "EVOLINK_SIZE_RULE": (
        "auto",
        "How ratios become pixels: auto (learned from pictures), anchor-edge or pixel-budget.",
    ),
    "EVOLINK_MCP_DATA_DIR": ("the user's data folder", "Where the journal lies."),
    "EVOLINK_MCP_OUTPUT_DIR": (
        "Pictures/EvoLink",
        "Where pictures are saved; a simulated EvoLink's in Pictures/EvoLink simulated.",
    ),
    "EVOLINK_MCP_ALLOWED_DIRS": (
        "output and working folder",
        "Folders that local files may come from and go to.",
    ),
    "EVOLINK_MCP_WAIT_SECONDS": ("what the host bears", "How long one call waits, 0 to 900."),
    "EVOLINK_MCP_PREVIEW": ("auto", "Inline preview: auto, off, or its longest edge in pixels."),
    "EVOLINK_MCP_SIDECAR": ("1", "0 leaves out the JSON file beside each picture that says how it was made."),
    "EVOLINK_MCP_RESOURCE_LINKS": ("0", "1 adds resource_link blocks; some hosts fail on them."),
    "EVOLINK_MCP_TOKENS_FILE": ("none", "Over HTTP: the TOML file that says who may call, by tokens."),
    "EVOLINK_MCP_DATABASE_URL": (
        "none",
        "postgresql://…: the journal lies there instead, for all servers of a team (extra teams).",
    ),
    "EVOLINK_MCP_SECRET": (
        "none",
        "32 characters or more, the same for all servers of a team; needed with a database.",
    ),
    "EVOLINK_MCP_PUBLIC_URL": (
        "none",
        "Over HTTP: the https address that EvoLink reaches; it tells there that a picture is ready. Needs the secret.",
    ),
    **TEAM_VARIABLES,
    "EVOLINK_MCP_TOOLS": ("all", "Comma list of the tools to publish; without generate_image nothing can be bought."),
    "EVOLINK_MCP_CALLBACK_HOSTS": ("any public host", "Comma list of hosts that callback_url may name, or none."),
    "EVOLINK_MCP_MAX_CREDITS_PER_CALL": ("none", "Refuse a call whose computed price is higher."),
    "EVOLINK_MCP_MAX_CREDITS_PER_DAY": ("none", "Refuse what would take the day's total higher."),
    "EVOLINK_MCP_CONFIRM_ABOVE": ("none", "Ask the user before a call that costs more credits."),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What the owner of the server decides; README's table says what each one does.

    `key_problem` says why a given key cannot be used. `wait_s` is in seconds, None leaves it to the host.
    `preview_edge` is in pixels, None chooses it, 0 sends no previews. `budget` is in credits.
    `tools` are published, None for all; `callback_hosts` None allows any public host.
    """

    key_text: str | None = field(repr=False)
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
    tools: frozenset[str] | None
    callback_hosts: frozenset[str] | None
    tokens_file: Path | None
    database_url: str | None = field(repr=False)
    secret: str | None = field(repr=False)
    public_url: str | None
    team: TeamSettings = field(default_factory=TeamSettings)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read every variable; blank values and unsubstituted `${...}` placeholders count as unset.

        Raises:
            BadSetting: for any value that cannot be used, except the key's (paid tools explain that one).
        """
        said = _said(os.environ if environ is None else environ)
        key_text, key_problem = values.key(said.get("EVOLINK_API_KEY"))
        base = values.address("EVOLINK_BASE_URL", said.get("EVOLINK_BASE_URL", BASE_URL))
        files = said.get("EVOLINK_FILES_BASE_URL")
        # A simulated EvoLink serves both; only the real one has a host of its own for files.
        files = values.address("EVOLINK_FILES_BASE_URL", files or (FILES_BASE_URL if base == BASE_URL else base))
        output = values.folder(said, "EVOLINK_MCP_OUTPUT_DIR") or values.pictures_folder(
            simulated=base.startswith("http:")
        )
        allowed = tuple(
            values.path("EVOLINK_MCP_ALLOWED_DIRS", part)
            for part in map(values.unquoted, map(str.strip, said.get("EVOLINK_MCP_ALLOWED_DIRS", "").split(os.pathsep)))
            if part and not values.PLACEHOLDER.fullmatch(part)
        )
        values.refuse_commas(allowed)
        database, secret = values.database(said.get("EVOLINK_MCP_DATABASE_URL"), said.get("EVOLINK_MCP_SECRET"))
        public_url = values.public_url(said.get("EVOLINK_MCP_PUBLIC_URL"), secret)
        return cls(
            key_text=key_text,
            key_problem=key_problem,
            base_url=base,
            files_base_url=files,
            size_rule=values.size_rule(said.get("EVOLINK_SIZE_RULE")),
            data_dir=values.folder(said, "EVOLINK_MCP_DATA_DIR") or values.data_folder(),
            folders=Folders(output, tuple(dict.fromkeys((output, *(allowed or values.working_folder()))))),
            allowed_dirs_given=bool(allowed),
            wait_s=values.number(said, "EVOLINK_MCP_WAIT_SECONDS", WAIT_MAX_S),
            preview_edge=values.preview_edge(said.get("EVOLINK_MCP_PREVIEW", "auto")),
            resource_links=values.switch(said, "EVOLINK_MCP_RESOURCE_LINKS", default=False),
            sidecars=values.switch(said, "EVOLINK_MCP_SIDECAR", default=True),
            budget=Budget(
                per_call=values.number(said, "EVOLINK_MCP_MAX_CREDITS_PER_CALL"),
                per_day=values.number(said, "EVOLINK_MCP_MAX_CREDITS_PER_DAY"),
                confirm_above=values.number(said, "EVOLINK_MCP_CONFIRM_ABOVE"),
            ),
            tools=values.tools(said.get("EVOLINK_MCP_TOOLS")),
            callback_hosts=values.hosts(said.get("EVOLINK_MCP_CALLBACK_HOSTS")),
            tokens_file=values.folder(said, "EVOLINK_MCP_TOKENS_FILE"),
            database_url=database,
            secret=secret,
            public_url=public_url,
            team=TeamSettings.of(said, public_url),
        )

    @property
    def key(self) -> SecretStr | None:
        """The key, in a form that no log prints."""
        from pydantic import SecretStr

        return None if self.key_text is None else SecretStr(self.key_text)

    @property
    def strange_hosts(self) -> list[str]:
        """A sentence for each variable that sends the key to a host that is neither EvoLink's nor this machine."""
        hosts = {
            "EVOLINK_BASE_URL": urlsplit(self.base_url).hostname or "",
            "EVOLINK_FILES_BASE_URL": urlsplit(self.files_base_url).hostname or "",
        }
        return [
            f"{name} sends your key to {host}, which is not EvoLink's"
            for name, host in hosts.items()
            if not is_loopback(host) and host != EVOLINK_DOMAIN and not host.endswith("." + EVOLINK_DOMAIN)
        ]


def unknown_variables(environ: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """Variables that look like ours but are not, each with the one that was probably meant."""
    import difflib

    names = [name for name in (os.environ if environ is None else environ) if name.startswith("EVOLINK_")]
    return {
        name: next(iter(difflib.get_close_matches(name, VARIABLES, n=1)), None)
        for name in sorted(names)
        if name not in VARIABLES
    }


def has_display() -> bool:
    """Whether there is a desktop to open something on (Linux)."""
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def environment_without_ours() -> dict[str, str]:
    """This process's environment for a child that gets settings of its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("EVOLINK_")}


def decoder_environment() -> dict[str, str]:
    """The complete environment of the process that decodes images: only what Python needs to start."""
    # Windows' sockets and random numbers need SYSTEMROOT. Some builds of Python find their libraries by the others.
    needed = ("SYSTEMROOT", "WINDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    return {name: value for name in needed if (value := os.environ.get(name))}


def _said(environ: Mapping[str, str]) -> dict[str, str]:
    given = {name: environ.get(name, "").strip() for name in VARIABLES}
    # A key in quotes is refused in words of its own.
    given |= {name: values.unquoted(value) for name, value in given.items() if name != "EVOLINK_API_KEY"}
    return {name: value for name, value in given.items() if value and not values.PLACEHOLDER.fullmatch(value)}
