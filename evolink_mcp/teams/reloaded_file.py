"""A configuration file that is read again when it changes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 1.0
T = TypeVar("T")


def is_mount_of_one_file(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Return whether this file is a mount point of Linux. It keeps its first content when the file is replaced.

    `mounts` lists the mount points in the fifth column (man page proc_pid_mountinfo).
    """
    try:
        points = [line.split(" ")[4] for line in mounts.read_text("utf-8").splitlines()]
    except (OSError, ValueError, IndexError):
        return False
    # The kernel writes these characters as octal numbers.
    escapes = ((" ", r"\040"), ("\t", r"\011"))
    point = str(path.absolute())
    for char, escape in escapes:
        point = point.replace(char, escape)
    return point in points


class ReloadedFile(Generic[T]):
    """The content of the file at `path`, as `read` returns it. An invalid new version changes nothing.

    `name` names the content in the log. `clock` (seconds) is for tests.
    """

    def __init__(
        self, path: Path, read: Callable[[Path], T], name: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Read the file. The errors of `read` pass: ValueError for an invalid file."""
        self._path = path
        self._read = read
        self._name = name
        self._clock = clock
        # Before the read, so that a change during the read causes another read.
        self._version = self._file_version()
        self.content = read(path)
        self._checked_at = clock()
        if is_mount_of_one_file(path):
            log.warning("the %s file is mounted alone, so a replaced file is not seen: mount its folder", name)

    def reload(self) -> bool:
        """Read a changed file again, at most once per CHECK_INTERVAL_S. Return whether the content was replaced."""
        now = self._clock()
        if now - self._checked_at < CHECK_INTERVAL_S:
            return False
        self._checked_at = now
        version = self._file_version()
        if version == self._version:
            return False
        # Before the read, so that the log reports an invalid version once.
        self._version = version
        try:
            self.content = self._read(self._path)
        except ValueError as error:
            log.error(
                "the changed %s file is invalid, so the last valid %s stay in use: %s", self._name, self._name, error
            )
            return False
        return True

    def _file_version(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        # A replacement can have the time and the size of the former file.
        return status.st_mtime_ns, status.st_size, status.st_ino
