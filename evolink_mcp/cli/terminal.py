"""Print for a person: lines as wide as the terminal, links to files, and a moving progress line."""

from __future__ import annotations

import codecs
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from evolink_mcp.sanitize import printable

WIDTH_MIN = 20  # columns
BAR_WIDTH = 28
BAR_WIDTH_MIN = 8
_RAW_BYTES = "evolink-raw-bytes"


def configure(stream: io.TextIOWrapper[Any]) -> None:
    """Let every text be printed, whatever the encoding of the stream: cp1252 has no arrow.

    POSIX paths are bytes, so unknown characters become their bytes in UTF-8. Windows prints "?" instead.
    """
    codecs.register_error(_RAW_BYTES, _raw_bytes)
    stream.reconfigure(errors="replace" if sys.platform == "win32" else _RAW_BYTES)


def _raw_bytes(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return error.object[error.start : error.end].encode("utf-8", "surrogateescape"), error.end


class Terminal:
    """The standard output. Without a terminal it prints plain lines, which programs can read."""

    def __init__(self, stream: TextIO | None = None, width: Callable[[], int] | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._width = width or (lambda: shutil.get_terminal_size().columns)
        self.is_terminal = self._stream.isatty()

    @property
    def width(self) -> int:
        """The columns that a line may use. The last column stays free, because some terminals wrap there."""
        return max(self._width() - 1, WIDTH_MIN)

    def print(self, text: str = "", indent: str = "", hanging: str | None = None) -> None:
        """Print a line. A terminal gets it wrapped: the first line with `indent`, the others with `hanging`."""
        self._write_line(self.wrapped(text, indent, hanging))

    def wrapped(self, text: str, indent: str = "", hanging: str | None = None) -> str:
        """Return the line wrapped for a terminal, otherwise on one line. Words and paths stay whole."""
        if not self.is_terminal or not text:
            return f"{indent}{text}"
        return textwrap.fill(
            text,
            self.width,
            initial_indent=indent,
            subsequent_indent=indent if hanging is None else hanging,
            break_long_words=False,
            break_on_hyphens=False,
        )

    def print_path(self, path: Path, indent: str = "") -> None:
        """Print a path on a line of its own: never wrapped, and as a link if the terminal has links (OSC 8)."""
        from evolink_mcp.app.environment import has_links  # the start of a server needs no terminal

        text = self.path_text(path)
        if self.is_terminal and has_links():
            text = f"\x1b]8;;{path.absolute().as_uri()}\x1b\\{text}\x1b]8;;\x1b\\"
        self._write_line(f"{indent}{text}")

    def path_text(self, path: Path) -> str:
        """Return the path in characters that the stream can print, so that the printed path exists.

        POSIX: the bytes of the path, also in another encoding. Windows: the short name of the file, or else its URI.
        Control and invisible characters are replaced.
        """
        # A file name can contain escape sequences of the terminal.
        text = printable(path)
        if sys.platform != "win32":
            is_unicode = codecs.lookup(self._stream.encoding or "utf-8").name == "utf-8"
            return text if is_unicode else os.fsencode(text).decode("ascii", "surrogateescape")
        if self.can_print(text):
            return text
        short = _short_path(path)
        return short if short is not None and self.can_print(short) else path.absolute().as_uri()

    def _write_line(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def can_print(self, text: str) -> bool:
        """Return whether the encoding of the stream has these characters."""
        try:
            text.encode(self._stream.encoding or "ascii")
        except UnicodeEncodeError:
            return False
        return True


def _short_path(path: Path) -> str | None:
    """Return the name of a file in the form 8.3, which Windows keeps beside the long one. None: it has none."""
    if sys.platform != "win32":
        return None
    import ctypes

    buffer = ctypes.create_unicode_buffer(1024)
    length = ctypes.windll.kernel32.GetShortPathNameW(str(path), buffer, len(buffer))
    return buffer.value if 0 < length < len(buffer) and os.path.exists(buffer.value) else None


class ProgressLine:
    """A progress bar that moves on one line of a terminal. Without a terminal: one line per new message."""

    def __init__(self, terminal: Terminal, write: Callable[[str], object]) -> None:
        self._terminal = terminal
        self._write = write
        self._full, self._empty = "█░" if terminal.can_print("█░") else "#-"
        self._last_message = ""

    def show(self, percent: float, message: str) -> None:
        """Show a percentage and a message."""
        # A narrow terminal needs the space for the message.
        bar_width = max(BAR_WIDTH - max(80 - self._terminal.width, 0), BAR_WIDTH_MIN)
        filled = round(bar_width * percent / 100)
        line = f"  [{self._full * filled}{self._empty * (bar_width - filled)}] {percent:3.0f} %  {message}"
        if self._terminal.is_terminal:
            width = self._terminal.width
            # The blanks cover the rest of a longer line.
            self._write("\r" + line[:width].ljust(width))
        elif message != self._last_message:
            self._write(f"{line}\n")
        self._last_message = message

    def end(self) -> None:
        """Continue on a new line."""
        if self._terminal.is_terminal:
            self._write("\n")
