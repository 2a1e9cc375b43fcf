"""Read pasted text: remove the additions of a chat, a shell or a file manager to a path, a URL or an ID."""

from __future__ import annotations

import ntpath
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

# A path in several decorations has fewer readings. The limit bounds the work for a hostile text.
READINGS_MAX = 200

_QUOTES = "\"'`“”„‟‘’‚‛«»‹›"
_MARKDOWN = re.compile(r"[-*+\s]*!?\[[^\]]*\]\(\s*(?:<([^<>]*)>|(.*?))(?:\s+[\"'][^\"']*[\"'])?\s*\)\s*")
_FILE_URI = re.compile(r"file:(?://(?:localhost)?(?=/|[A-Za-z]:)|(?=/[^/]|[A-Za-z]:))", re.IGNORECASE)
_DRIVE_AFTER_SLASH = re.compile(r"/[A-Za-z]:[\\/]")
_PERCENT_CODE = re.compile(r"%[0-9A-Fa-f]{2}")
_SHELL_ESCAPE = re.compile(r"\\([^A-Za-z0-9])")
_HOME_VARIABLE = re.compile(
    r"(?:\$HOME|\$\{HOME\}|%USERPROFILE%|%HOMEDRIVE%%HOMEPATH%|\$env:USERPROFILE|\$env:HOME)(?=[\\/])", re.IGNORECASE
)
_DRIVE_PATH = re.compile(r"([A-Za-z]):[\\/](.*)", re.DOTALL)
_NETWORK_PATH = re.compile(r"(?:\\\\|//)[^\\/]")
_WSL_SHARE = re.compile(r"[\\/]{2}wsl(?:\$|\.localhost)[\\/]([^\\/]+)([\\/].*)", re.IGNORECASE | re.DOTALL)
_MOUNTED_DRIVE = re.compile(r"(?:/mnt)?/([A-Za-z])/(.*)", re.DOTALL)


# No part of a new file's name: control, format (bidi, zero width), surrogate and private characters, line separators.
_HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_REFUSED_CHARS = re.compile(r'[<>:"|?*\\]')
_VARIABLE = re.compile(r"^\$(?:env:)?[A-Za-z_]\w*|\$\{\w+\}|%[A-Za-z_][\w()]*%")


@dataclass(frozen=True, slots=True)
class PathSystem:
    """The system of the paths. `distribution` is the name of the WSL distribution, None outside WSL."""

    is_windows: bool
    distribution: str | None = None


def undecorate(text: str) -> str:
    """Return the text without blanks, quotes, <>, and without the Markdown of a link or an image around it."""
    while True:
        inner = _without_blanks(text) or _without_quotes(text) or _without_angles(text) or _without_markdown(text)
        if inner is None:
            return text
        text = inner


def path_readings(text: str, system: PathSystem) -> list[str]:
    """Return the possible paths of a pasted text: the literal one first, the one without any decoration last.

    The function reads no file. The caller takes the first reading of an existing file.
    """
    steps = (*_STEPS, *((_as_windows_path,) if system.is_windows else (_with_slashes,)))
    readings = [text]
    # The list grows in the loop, because a pasted path can have several decorations.
    for reading in readings:
        texts = [step(reading) for step in steps]
        if system.distribution is not None:
            texts.append(as_wsl_path(reading, system.distribution))
        readings += dict.fromkeys(new for new in texts if new and new not in readings)
        if len(readings) >= READINGS_MAX:
            break
    return readings[:READINGS_MAX]


def clean_file_name(text: str, system: PathSystem) -> str:
    """Return a pasted name or path for a new file: without line ends, quotes and `file:`, in the system's own form.

    Percent codes stay, except in a `file:` URI, because they may be a part of the name.
    """
    while (cleaned := _clean_once(text, system)) != text:
        text = cleaned
    return text


def name_fault(part: str) -> str | None:
    """Return the reason why a part of a path must not be the name of a new file, or None."""
    hidden = next((char for char in part if unicodedata.category(char) in _HIDDEN_CATEGORIES), None)
    if hidden is not None:
        return f"has an invisible or control character (U+{ord(hidden):04X})"
    if part.startswith("-"):
        return "begins with “-”, which many programs read as an option"
    if variable := _VARIABLE.search(part):
        return f"has the variable “{variable[0]}”, which this server does not replace"
    if refused := _REFUSED_CHARS.search(part):
        return f"has the character {refused[0]}, which Windows and cloud folders refuse"
    return None


def file_name_of(path: str) -> str:
    """Return the last part of a path of any system."""
    # ntpath knows the separators of both systems.
    return ntpath.basename(path.rstrip("\\/"))


def is_windows_path(text: str) -> bool:
    r"""Return whether the text is an absolute path of Windows: C:\… or \\server\share."""
    return _DRIVE_PATH.match(text) is not None or text.startswith("\\\\")


def as_wsl_path(text: str, distribution: str) -> str | None:
    r"""Return the path inside WSL: C:\x is /mnt/c/x, and \\wsl$\Ubuntu\x is /x."""
    if drive := _DRIVE_PATH.fullmatch(text):
        return f"/mnt/{drive[1].lower()}/" + drive[2].replace("\\", "/")
    share = _WSL_SHARE.fullmatch(text)
    is_own = share is not None and share[1].casefold() == distribution.casefold()
    return share[2].replace("\\", "/") if share is not None and is_own else None


def _without_blanks(text: str) -> str | None:
    """Remove blanks, line ends and invisible characters at both ends. Windows' file properties add U+202A."""
    start = 0
    end = len(text)
    while start < end and _is_blank(text[start]):
        start += 1
    while end > start and _is_blank(text[end - 1]):
        end -= 1
    return text[start:end] if end - start < len(text) else None


def _clean_once(text: str, system: PathSystem) -> str:
    text = _without_line_ends(text) or text
    text = _without_quotes(text.strip()) or text
    uri_path = _without_file_scheme(text)
    if uri_path is not None:
        text = _without_percent_codes(uri_path) or uri_path
    text = _with_home(text) or text
    if system.is_windows:
        return _as_windows_path(text) or text
    if system.distribution is not None:
        text = as_wsl_path(text, system.distribution) or text
    unescaped = _without_escapes(text) or text
    return text if is_windows_path(text) or "\\" in unescaped else unescaped


def _without_line_ends(text: str) -> str | None:
    changed = text.strip("\r\n\t")
    return changed if changed and changed != text else None


def _is_blank(char: str) -> bool:
    return char.isspace() or unicodedata.category(char) in ("Cc", "Cf")


def _without_quotes(text: str) -> str | None:
    return text[1:-1] if len(text) > 2 and text[0] in _QUOTES and text[-1] in _QUOTES else None


def _without_angles(text: str) -> str | None:
    return text[1:-1] if len(text) > 2 and text[0] == "<" and text[-1] == ">" else None


def _without_markdown(text: str) -> str | None:
    match = _MARKDOWN.fullmatch(text)
    return (match[1] or match[2]) if match else None


def _without_at(text: str) -> str | None:
    # People write @ before the path of a file in Claude Code and Gemini CLI.
    return text[1:] if text.startswith("@") else None


def _without_sandbox(text: str) -> str | None:
    # ChatGPT writes links to its files as sandbox:/mnt/data/….
    return text[8:] if text[:8].lower() == "sandbox:" else None


def _without_file_scheme(text: str) -> str | None:
    match = _FILE_URI.match(text)
    if match is None:
        return None
    rest = text[match.end() :]
    # A URI has a slash before the drive: file:///C:/x.
    return rest[1:] if _DRIVE_AFTER_SLASH.match(rest) else rest


def _without_percent_codes(text: str) -> str | None:
    return unquote(text) if _PERCENT_CODE.search(text) else None


def _without_escapes(text: str) -> str | None:
    changed = _SHELL_ESCAPE.sub(r"\1", text)
    return changed if changed != text else None


def _with_home(text: str) -> str | None:
    match = _HOME_VARIABLE.match(text)
    return "~" + text[match.end() :] if match else None


def _with_slashes(text: str) -> str | None:
    return text.replace("\\", "/") if "\\" in text and not is_windows_path(text) else None


def _as_windows_path(text: str) -> str | None:
    r"""Return the path of Windows for one of WSL or Git Bash: /mnt/c/x and /c/x are C:\x."""
    match = _MOUNTED_DRIVE.fullmatch(text)
    return f"{match[1].upper()}:\\" + match[2].replace("/", "\\") if match else None


# The order matters only for the readings of equal depth: a file: URI is usually encoded.
_STEPS: tuple[Callable[[str], str | None], ...] = (
    _without_blanks,
    _without_markdown,
    _without_quotes,
    _without_angles,
    _without_at,
    _without_sandbox,
    _without_file_scheme,
    _without_percent_codes,
    _without_escapes,
    _with_home,
)
