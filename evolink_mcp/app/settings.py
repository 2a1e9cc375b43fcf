"""Read the settings from environment variables.

`Settings` is the table of all settings: each field names its variable, parser, default and description. README,
`evolink-mcp --help` and the warnings about unknown variables use the same table. `TeamSettings` in `teams.settings`
adds the settings of teams to it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlsplit

from evolink_mcp.api.urls import BASE_URL, FILES_BASE_URL, KEY, is_loopback
from evolink_mcp.app.environment import PREFIX, TOOLS_VARIABLE, environment, path_system
from evolink_mcp.images.folders import Folders
from evolink_mcp.journal.profile import DEFAULT_PROFILE
from evolink_mcp.sanitize import harmless
from evolink_mcp.studio.limits import SpendingLimits
from evolink_mcp.tools.hosts import WAIT_MAX_S

if TYPE_CHECKING:
    from pydantic import SecretStr

FILE_SUFFIX = "_FILE"  # of a variable that names a file with a secret
# A wrong path can name a device or a huge file.
SECRET_MAX_BYTES = 65_536
EXAMPLE_KEY = "sk-..."
KEY_IN_STORE = "keyring"  # instead of a key: the key is in the key store of the system
EVOLINK_DOMAIN = "evolink.ai"
LIMIT_MAX_CREDITS = 1e9
DAYS_MAX = 36_500
PROFILE_MAX_CHARS = 100

# Claude Desktop passes ${user_config.…} unchanged for an optional field that the user left empty.
_PLACEHOLDER = re.compile(r"\$\{[^{}]*\}")
_API_PATH = re.compile(r"/v1(/(images|tasks|credits|models)(/.*)?)?$")
# DNS allows 253 characters.
_HOSTNAME = re.compile(r"[0-9a-z]([0-9a-z.-]{0,251}[0-9a-z])?")
_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}

T = TypeVar("T")

log = logging.getLogger(__name__)


class BadSetting(ValueError):
    """A variable has an invalid value. The text names the variable and states valid values."""


# --- the parts of a table ---


@dataclass(frozen=True, slots=True)
class Setting:
    """One environment variable.

    `parse` converts the text. Its ValueError continues a sentence that begins with the name of the variable.
    `default` is the value of an unset variable, or a function that computes it from the fields before it.
    `requires` is another variable that must be set too, and the reason.
    """

    variable: str
    parse: Callable[[str], Any]
    default: Any
    default_text: str
    description: str
    is_secret: bool
    requires: tuple[str, str] | None


def setting(
    variable: str,
    parse: Callable[[str], T],
    default: T | Callable[[Mapping[str, Any]], T],
    description: str,
    *,
    default_text: str | None = None,
    is_secret: bool = False,
    requires: tuple[str, str] | None = None,
) -> T:
    """Declare a field of a settings class. The arguments are those of `Setting`."""
    if default_text is None:
        default_text = _text_of(default)
    entry = Setting(variable, parse, default, default_text, description, is_secret, requires)
    # A traceback or a log can print the settings.
    return field(kw_only=True, repr=not is_secret, metadata={Setting: entry})


def _text_of(default: object) -> str:
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(int(default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def read(table: Mapping[str, Setting], environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the value of each field of `table`. A blank text and an unreplaced `${…}` count as unset.

    Raises:
        BadSetting: a value is invalid, or a required variable is missing.
    """
    values: dict[str, Any] = {}
    texts = {entry.variable: _text(entry, environ) for entry in table.values()}
    for name, entry in table.items():
        text = texts[entry.variable]
        if not text:
            values[name] = entry.default(values) if callable(entry.default) else entry.default
            continue
        try:
            values[name] = entry.parse(text)
        except ValueError as error:
            # The chained error could show a secret.
            raise BadSetting(f"{entry.variable} {error}") from None
        if entry.requires is not None and not texts[entry.requires[0]]:
            raise BadSetting(f"{entry.variable} needs {entry.requires[0]}: {entry.requires[1]}")
    return values


def _text(entry: Setting, environ: Mapping[str, str]) -> str:
    text = _without_quotes(environ.get(entry.variable, "").strip())
    file = _without_quotes(environ.get(entry.variable + FILE_SUFFIX, "").strip()) if entry.is_secret else ""
    if file and not _PLACEHOLDER.fullmatch(file):
        if text and not _PLACEHOLDER.fullmatch(text):
            raise BadSetting(f"{entry.variable} and {entry.variable}{FILE_SUFFIX} are both set. Remove one of them.")
        text = _without_quotes(_text_in(file, entry.variable + FILE_SUFFIX))
    return "" if _PLACEHOLDER.fullmatch(text) else text


def _text_in(path: str, variable: str) -> str:
    """Return the text in a file with a secret.

    Raises:
        BadSetting: the file cannot be read, or is empty. The text does not show its content.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            text = file.read(SECRET_MAX_BYTES).decode("utf-8").strip()
    except OSError as error:
        raise BadSetting(f"{variable} names a file that cannot be read ({error.strerror})") from None
    except ValueError:
        raise BadSetting(f"{variable} names a file that is not text in UTF-8") from None
    if not text:
        raise BadSetting(f"{variable} names an empty file")
    return text


def _without_quotes(text: str) -> str:
    """Remove the quotes that some configuration files pass on."""
    # Docker's --env-file and `set` of cmd.exe keep quotes as a part of the value.
    is_quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1].strip() if is_quoted else text


# --- parsers ---


def plain(text: str) -> str:
    """Accept any text."""
    return text


def switch(text: str) -> bool:
    """Parse 1 or 0, or a word for it."""
    if text.lower() not in _SWITCH:
        raise ValueError("must be 0 or 1")
    return _SWITCH[text.lower()]


def number(maximum: float) -> Callable[[str], float]:
    """Return a parser for a number from 0 to `maximum`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= maximum:
            raise ValueError(f"must be a number from 0 to {maximum:g}")
        return value

    return parse


def url(text: str) -> str:
    """Parse a base URL: https, or http on loopback. Remove the slash at its end."""
    try:
        parts = urlsplit(text)
        hostname = parts.hostname or ""
        _ = parts.port  # raises for an invalid port
    except ValueError:
        parts = urlsplit("")
        hostname = ""
    is_safe = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(hostname))
    if not hostname or not is_safe or "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("must be an https URL (http only on loopback) without user name and query")
    return text.rstrip("/")


def _api_url(text: str) -> str:
    """Parse the base URL of the API. Remove /v1 and the path of an endpoint: they are not part of it."""
    base = url(text)
    shortened = _API_PATH.sub("", base)
    if shortened != base:
        log.warning("EVOLINK_BASE_URL must end before /v1: the server uses %s", harmless(shortened, 200))
    return shortened


def path(text: str) -> Path:
    """Parse an absolute path. Replace `~` and the placeholders of MCP bundles, for example ${HOME}."""
    # Imported late, because stdio reads the settings before its first answers.
    import platformdirs

    folders = {
        "${HOME}": lambda: str(Path.home()),
        "${DESKTOP}": platformdirs.user_desktop_dir,
        "${DOCUMENTS}": platformdirs.user_documents_dir,
        "${DOWNLOADS}": platformdirs.user_downloads_dir,
        "${PICTURES}": platformdirs.user_pictures_dir,
    }
    for placeholder, folder in folders.items():
        if placeholder in text:
            text = text.replace(placeholder, folder())
    if unknown := _PLACEHOLDER.search(text):
        raise ValueError(f"contains {harmless(unknown[0], 80)}, which the MCP host did not replace; give the full path")
    try:
        absolute = Path(text).expanduser()
    except RuntimeError:
        raise ValueError("names the home folder of an unknown user") from None
    if not absolute.is_absolute():
        raise ValueError(
            f"must be an absolute path; “{harmless(text, 80)}” depends on the working directory of the MCP host"
        )
    return absolute


# Other signs between folders, with their names. A folder that exists may contain one.
FOREIGN_SEPARATORS = {",": "commas", ";": "semicolons", "|": "bars", "\n": "line breaks", "\r": "line breaks"}


def paths(text: str) -> tuple[Path, ...]:
    """Parse several absolute paths, separated as in PATH."""
    parts = (_without_quotes(part.strip()) for part in text.split(os.pathsep))
    folders = tuple(path(part) for part in parts if part and not _PLACEHOLDER.fullmatch(part))
    missing = "".join(str(folder) for folder in folders if not folder.exists())
    for sign, name in FOREIGN_SEPARATORS.items():
        if sign in missing and sign != os.pathsep:
            raise ValueError(f"separates its folders by “{os.pathsep}”, not by {name}")
    return folders


def words(text: str) -> list[str]:
    """Split a comma-separated list."""
    return [word for word in map(str.strip, text.split(",")) if word]


def _profile(text: str) -> str:
    if len(text) > PROFILE_MAX_CHARS or not text.isprintable():
        raise ValueError(f"must be a name of at most {PROFILE_MAX_CHARS} printable characters")
    return text


def _size_rule(text: str) -> str:
    from evolink_mcp.studio.size_rule import SETTINGS

    if text.lower() not in SETTINGS:
        raise ValueError(f"must be {' or '.join(SETTINGS)}")
    return text.lower()


@dataclass(frozen=True, slots=True)
class PreviewSetting:
    """The longest edge of previews in pixels: None chooses it, 0 sends none. `is_for_all`: send them to every client."""

    edge: int | None = None
    is_for_all: bool = False


PREVIEW_WORDS = {"auto": PreviewSetting(), "on": PreviewSetting(is_for_all=True), "off": PreviewSetting(edge=0)}


def _preview(text: str) -> PreviewSetting:
    if (setting := PREVIEW_WORDS.get(text.lower())) is not None:
        return setting
    from evolink_mcp.images.previews import PREVIEW_EDGE_MAX, PREVIEW_EDGE_MIN

    # int() refuses more than 4,300 digits with an error of another kind.
    if not text.isascii() or not text.isdigit() or not PREVIEW_EDGE_MIN <= int(text[:6]) <= PREVIEW_EDGE_MAX:
        raise ValueError(f"must be auto, on, off, or pixels from {PREVIEW_EDGE_MIN} to {PREVIEW_EDGE_MAX}")
    return PreviewSetting(int(text), is_for_all=True)


def _tools(text: str) -> frozenset[str]:
    from evolink_mcp.tools.names import tools_named

    try:
        return tools_named(words(text))
    except ValueError as error:
        raise ValueError(f"is invalid: {error}") from error


def _hostnames(text: str) -> frozenset[str]:
    names = frozenset(name.lower().rstrip(".") for name in words(text))
    for name in names:
        if not _HOSTNAME.fullmatch(name):
            raise ValueError(f"contains “{harmless(name, 60)}”; give hostnames like hooks.example.com, or none")
    return names - {"none"}


# --- defaults that depend on this machine or on other settings ---


def _files_base_url(values: Mapping[str, Any]) -> str:
    # A simulated EvoLink serves both APIs. The key must not reach the real file API then.
    return FILES_BASE_URL if values["base_url"] == BASE_URL else values["base_url"]


def _data_dir(_: Mapping[str, Any]) -> Path:
    import platformdirs

    return platformdirs.user_data_path("evolink-mcp", appauthor=False).absolute()


def _output_dir(values: Mapping[str, Any]) -> Path:
    import platformdirs

    # Simulated images must not mix with bought ones.
    is_simulated = values["base_url"].startswith("http:")
    return platformdirs.user_pictures_path().absolute() / ("EvoLink simulated" if is_simulated else "EvoLink")


def _working_folder() -> tuple[Path, ...]:
    """Return the working directory, unless it is the root, the home folder or a parent of it."""
    try:
        folder = Path.cwd().resolve()
        home = Path.home().resolve()
    except (OSError, RuntimeError):
        return ()
    # Claude Desktop starts servers in /, so every file of the user would be readable.
    return () if folder == Path(folder.anchor) or home.is_relative_to(folder) else (folder,)


def _days(text: str) -> float:
    days = number(DAYS_MAX)(text)
    if days < 1:
        raise ValueError(f"must be a number of days from 1 to {DAYS_MAX}")
    return days


# --- the table ---


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of every server. `setting()` gives each field its variable, parser, default and description.

    `wait_s`: in seconds; None lets the MCP host decide.
    `tools`, `callback_hosts`: None allows all. `max_running`: the limit of running tasks; it comes from a tokens file.
    """

    key_text: str | None = setting(
        "EVOLINK_API_KEY",
        plain,
        None,
        "EvoLink API key, or keyring for the system's key store. Without it, only the free offline tools work.",
        is_secret=True,
    )
    base_url: str = setting("EVOLINK_BASE_URL", _api_url, BASE_URL, "Base URL of the API: https, or http on loopback.")
    files_base_url: str = setting(
        "EVOLINK_FILES_BASE_URL",
        url,
        _files_base_url,
        "Base URL of the file API, for local reference images.",
        default_text=FILES_BASE_URL,
    )
    size_rule: str = setting(
        "EVOLINK_SIZE_RULE",
        _size_rule,
        "auto",
        "Size table: auto (detected from delivered images), anchor-edge or pixel-budget.",
    )
    profile: str = setting(
        "EVOLINK_MCP_PROFILE",
        _profile,
        DEFAULT_PROFILE,
        "Profile: the owner of purchases, images and limits. It stays the same when the API key changes.",
    )
    data_dir: Path = setting(
        "EVOLINK_MCP_DATA_DIR", path, _data_dir, "Journal folder.", default_text="the user's data folder"
    )
    output_dir: Path = setting(
        "EVOLINK_MCP_OUTPUT_DIR",
        path,
        _output_dir,
        "Output folder. Simulated images go to Pictures/EvoLink simulated.",
        default_text="Pictures/EvoLink",
    )
    allowed_dirs: tuple[Path, ...] = setting(
        "EVOLINK_MCP_ALLOWED_DIRS",
        paths,
        (),
        "Folders for local reference images and for `save_as`, separated as in PATH.",
        default_text="output folder and working directory",
    )
    wait_s: float | None = setting(
        "EVOLINK_MCP_WAIT_SECONDS",
        number(WAIT_MAX_S),
        None,
        f"Default wait of a call, from 0 to {WAIT_MAX_S}.",
        default_text="depends on the MCP host",
    )
    preview: PreviewSetting = setting(
        "EVOLINK_MCP_PREVIEW",
        _preview,
        PreviewSetting(),
        "Inline preview: auto (not for default names of SDKs), on, off, or its longest edge in pixels.",
        default_text="auto",
    )
    has_sidecars: bool = setting(
        "EVOLINK_MCP_SIDECAR", switch, True, "1 writes a JSON file with the request and the task beside each image."
    )
    has_metadata: bool = setting(
        "EVOLINK_MCP_METADATA",
        switch,
        False,
        "1 writes prompt, task ID and model into saved and derived files.",
    )
    has_resource_links: bool = setting(
        "EVOLINK_MCP_RESOURCE_LINKS", switch, False, "1 adds resource_link blocks. Some MCP hosts fail on them."
    )
    tools: frozenset[str] | None = setting(
        TOOLS_VARIABLE,
        _tools,
        None,
        "Comma-separated list of published tools. Without generate_image nothing can be bought. generate_images needs it.",
        default_text="all",
    )
    callback_hosts: frozenset[str] | None = setting(
        "EVOLINK_MCP_CALLBACK_HOSTS",
        _hostnames,
        None,
        "Comma-separated hostnames that `callback_url` may use. `none` disables callbacks.",
        default_text="any public hostname",
    )
    max_credits_per_call: float | None = setting(
        "EVOLINK_MCP_MAX_CREDITS_PER_CALL", number(LIMIT_MAX_CREDITS), None, "Spending limit per call, in credits."
    )
    max_credits_per_day: float | None = setting(
        "EVOLINK_MCP_MAX_CREDITS_PER_DAY", number(LIMIT_MAX_CREDITS), None, "Spending limit per day, in credits."
    )
    total_credits_per_day: float | None = setting(
        "EVOLINK_MCP_TOTAL_CREDITS_PER_DAY",
        number(LIMIT_MAX_CREDITS),
        None,
        "Spending limit per day of all profiles of the server or team together, in credits.",
    )
    confirm_above: float | None = setting(
        "EVOLINK_MCP_CONFIRM_ABOVE",
        number(LIMIT_MAX_CREDITS),
        None,
        "Price in credits above which the user must confirm.",
    )
    retention_days: float | None = setting(
        "EVOLINK_MCP_RETENTION_DAYS",
        _days,
        None,
        "Days after which the journal forgets the request of a finished purchase and expired uploads. Images stay.",
        default_text="forever",
    )
    max_running: int | None = field(kw_only=True, default=None)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Read all variables of the table.

        Raises:
            BadSetting: a value is invalid. An invalid API key does not raise: paid tools report `key_problem`.
        """
        return cls(**read(cls.table(), environment() if environ is None else environ))

    @classmethod
    def table(cls) -> dict[str, Setting]:
        """Return the settings by field name, in the order of their declaration."""
        return {item.name: item.metadata[Setting] for item in fields(cls) if Setting in item.metadata}

    @classmethod
    def variables(cls) -> list[str]:
        """Return the names of all variables."""
        return [entry.variable for entry in cls.table().values()]

    @classmethod
    def file_variables(cls) -> list[str]:
        """Return the names of the variables that name a file with a secret."""
        return [entry.variable + FILE_SUFFIX for entry in cls.table().values() if entry.is_secret]

    @classmethod
    def unknown_variables(cls, environ: Mapping[str, str] | None = None) -> dict[str, str | None]:
        """Return the set variables that begin like a setting but are none, each with the most similar setting."""
        variables = [*cls.variables(), *cls.file_variables()]
        names = environment() if environ is None else environ
        unknown = sorted(name for name in names if name.startswith(PREFIX) and name not in variables)
        return {name: _most_similar(name, variables) for name in unknown}

    def with_stored_key(self) -> Self:
        """Read the key from the system's key store if EVOLINK_API_KEY is "keyring". This can take 0.5 s.

        If the key store has no usable key, `key_problem` reports it.
        """
        if self.key_text is None or self.key_text.lower() != KEY_IN_STORE:
            return self
        from evolink_mcp.app.key_store import KeyStore, KeyStoreUnusable

        try:
            key = KeyStore().load()
        except KeyStoreUnusable as error:
            log.warning("%s", error)
            return self
        return replace(self, key_text=key) if key else self

    @property
    def key_problem(self) -> str | None:
        """Why the API key is unusable; None for a valid or missing key."""
        key = self.key_text
        if key is None:
            return None
        if key.lower() == KEY_IN_STORE:
            return "the system's key store has no usable EvoLink key. Unlock it, or run “evolink-mcp install” again"
        if key == EXAMPLE_KEY:
            return f"EVOLINK_API_KEY is still the example {EXAMPLE_KEY}"
        if _PLACEHOLDER.search(key):
            return "EVOLINK_API_KEY contains a ${...} that the MCP host did not replace"
        if key[0] in "\"'" or key.lower().startswith("bearer"):
            return "EVOLINK_API_KEY must be the key alone, without quotes and without “Bearer”"
        if not KEY.fullmatch(key):
            return "EVOLINK_API_KEY is not a key: a key has 8 to 512 visible ASCII characters and no blanks"
        return None

    @property
    def key(self) -> SecretStr | None:
        """The API key in a form that no log prints; None if it is missing or unusable."""
        from pydantic import SecretStr

        return None if self.key_text is None or self.key_problem else SecretStr(self.key_text)

    @property
    def folders(self) -> Folders:
        """The output folder and all allowed folders."""
        allowed = self.allowed_dirs or _working_folder()
        return Folders(self.output_dir, tuple(dict.fromkeys((self.output_dir, *allowed))), path_system())

    @property
    def spending_limits(self) -> SpendingLimits:
        """The spending limits in credits, and the limit of running tasks."""
        return SpendingLimits(
            per_call=self.max_credits_per_call,
            per_day=self.max_credits_per_day,
            confirm_above=self.confirm_above,
            running=self.max_running,
            total_per_day=self.total_credits_per_day,
        )

    @property
    def foreign_hosts(self) -> list[str]:
        """One warning per base URL that is neither EvoLink's nor on this machine."""
        hostnames = {
            "EVOLINK_BASE_URL": urlsplit(self.base_url).hostname or "",
            "EVOLINK_FILES_BASE_URL": urlsplit(self.files_base_url).hostname or "",
        }
        return [
            f"{variable} sends your API key to {hostname}, which is not EvoLink's"
            for variable, hostname in hostnames.items()
            # With the dot, because notevolink.ai is another domain.
            if not is_loopback(hostname) and hostname != EVOLINK_DOMAIN and not hostname.endswith("." + EVOLINK_DOMAIN)
        ]


def _most_similar(name: str, variables: Sequence[str]) -> str | None:
    import difflib

    return next(iter(difflib.get_close_matches(name, variables, n=1)), None)
