"""Decide which files the server may read and write. All links of a path are followed before the check."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from evolink_mcp.errors import FolderRefused, ReferenceRefused
from evolink_mcp.pasted import PathSystem, as_wsl_path, clean_file_name, is_windows_path, name_fault, path_readings
from evolink_mcp.sanitize import harmless

# Bytes of UTF-8 in a file name. Encrypted file systems (eCryptfs) accept no longer names.
NAME_MAX_BYTES = 143
# Linux allows no longer path. The checks below need a time that grows with the square of the length: 58 s for 500 KB.
PATH_MAX_CHARS = 4_096
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SOURCE_SUFFIXES = (*PICTURE_SUFFIXES, ".heic", ".heif")
# A folder may have very many files, and the search is only for a hint.
NAMES_READ_MAX = 2_000
# The name of an unfinished file, in its final folder.
PART_PREFIX = ".evolink-"
PART_SUFFIX = ".part"

# Folders inside the containers of chat hosts, where they keep uploaded files.
SANDBOXES = ("/mnt/data/", "/mnt/user-data/", "/home/claude/", "/home/oai/")
# A path has several readings. The search for an equivalent name reads the folders of this many of them.
FOLDERS_READ_MAX = 20
# Marks of a file with its content only in the cloud: Windows (offline, recall on open, recall on data access) and macOS.
CLOUD_ATTRIBUTES = 0x1000 | 0x40000 | 0x400000
CLOUD_FLAG = 0x40000000
THIS_SYSTEM = PathSystem(is_windows=os.name == "nt")
# Refused on every system, so that a folder can be copied to Windows.
RESERVED_NAMES = frozenset(
    ["CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", "CLOCK$"]
    + [f"{port}{digit}" for port in ("COM", "LPT") for digit in "0123456789¹²³"]
)
# Windows: a virus scanner may have a new file open for a moment.
SCANNER_PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8) if sys.platform == "win32" else ()

_FOLLOW_NOTHING = getattr(os, "O_NOFOLLOW", 0)
# Opening a pipe or a device in the place of a file must not block, and must not make it our terminal.
_READ = os.O_RDONLY | _FOLLOW_NOTHING | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY"))
# With O_PATH, a folder that may be entered and not listed can be opened too.
_STEP = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0)


@dataclass(frozen=True, slots=True)
class Folders:
    """`output` is the folder for new images. Files may be read from and saved into `allowed`, which includes `output`.

    `system` is the system of the paths.
    """

    output: Path
    allowed: tuple[Path, ...]
    system: PathSystem = THIS_SYSTEM

    def confines(self, path: Path) -> bool:
        """Return whether `path` is inside an allowed folder, after all links were followed."""
        if path.drive.lower() not in {folder.drive.lower() for folder in self.allowed}:
            return False  # following a Windows network path would send credentials
        real = _resolved(path)
        return any(real.is_relative_to(root) for root in self._roots())

    def root_of(self, path: Path) -> Path:
        """Return the innermost allowed folder that contains `path`. Without one: the folder of `path`."""
        roots = [folder for folder in self.allowed if path.is_relative_to(folder)]
        return max(roots, key=lambda root: len(root.parts), default=path.parent)

    def target(self, save_as: str) -> Path:
        """Return the path for `save_as`: a name or path below the output folder, or an absolute path in an allowed one.

        Raises:
            FolderRefused: outside every allowed folder, in a place that cannot be written, or not a usable name.
        """
        shown = harmless(save_as, 80)
        if len(save_as) <= PATH_MAX_CHARS:
            save_as = clean_file_name(save_as, self.system)
        if len(save_as) > PATH_MAX_CHARS:
            raise FolderRefused(
                f"save_as has {len(save_as):,} characters, and a path has at most {PATH_MAX_CHARS:,}",
                advice="Give a short name such as hero.png.",
            )
        if is_windows_path(save_as) and not self.system.is_windows:
            raise FolderRefused(
                f"save_as “{shown}” is a Windows path, and this server runs on another system",
                advice="Give a name such as hero.png, or a path of this system.",
            )
        try:
            target = Path(save_as).expanduser()
            parts = target.parts[1:] if target.anchor else target.parts
            is_usable = target.name not in ("", ".", "..") and len(target.name.encode()) <= NAME_MAX_BYTES
            if not is_usable:
                raise ValueError("not a name")
            if fault := next(filter(None, map(name_fault, parts)), None):
                raise FolderRefused(
                    f"save_as “{shown}” is not a usable file name: it {fault}",
                    advice="Give a short name such as hero.png.",
                )
            if reserved := next((part for part in parts if part not in ("..", ".") and is_reserved(part)), None):
                raise FolderRefused(
                    f"save_as “{shown}” has a name in it that Windows cannot have: “{harmless(reserved, 40)}”",
                    advice="Give a name such as hero.png, without a dot or blank at the end.",
                )
            if target.drive and not target.root:
                raise FolderRefused(
                    f"save_as “{shown}” depends on the current folder of drive {target.drive}",
                    advice="Give a name, or the whole path from the drive's root.",
                )
            path = target if target.is_absolute() else self.output / target
            if not self.confines(path):
                raise FolderRefused(f"save_as “{shown}” is outside the allowed folders", advice=self._how_to_allow())
            # The last part is not followed: a link there counts as a taken name.
            path = _resolved(path.parent) / path.name
            is_folder = save_as.endswith(("/", os.sep)) or path.is_dir()
            parent = _existing_parent(path.parent)
            is_writable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
        except (ValueError, RuntimeError, OSError) as error:
            raise FolderRefused(
                f"save_as “{shown}” is not a usable file name", advice="Give a short name such as hero.png."
            ) from error
        if is_folder:
            raise FolderRefused(f"save_as “{shown}” is a folder", advice="Give a file name too, such as hero.png.")
        if not is_writable:
            raise FolderRefused(
                f"save_as “{shown}” cannot be written: {parent} is not a folder that this server may write to",
                advice="Choose another place, or make that one writable.",
            )
        return path

    def places(self, reading: str) -> list[Path]:
        """Return the absolute paths that a path may mean. A relative one may be in each allowed folder."""
        try:
            path = Path(reading).expanduser()
        except (RuntimeError, ValueError):
            return []
        if len(reading) > PATH_MAX_CHARS or (path.drive and not path.root):
            return []
        return [path] if path.is_absolute() else [folder / path for folder in self.allowed]

    def find(self, source: str) -> Path | None:
        """Return the existing plain file of a pasted path, inside an allowed folder, or None. Open it with `opened`.

        A file with the literal name comes first. Then quotes, escapes, percent codes, `file:` and other decorations are
        removed, and equivalent letters are accepted.
        """
        inside = self._inside(path_readings(source, self.system))
        for path in inside:
            if self._is_readable(path):
                return path.resolve()
        for path in filter(None, map(_same_letters, inside[:FOLDERS_READ_MAX])):
            if self._is_readable(path):
                return path.resolve()
        return None

    def readable(self, source: str) -> Path:
        """Return the existing file of `source`, as `find` does.

        Raises:
            ReferenceRefused: missing (with a suggestion), not a plain file, or outside every allowed folder.
        """
        path = self.find(source)
        if path is None:
            raise self._refusal(source)
        with suppress(OSError):
            # Reading would start a download.
            if is_in_cloud(path.stat()):
                raise _not_downloaded(source)
        return path

    def _inside(self, readings: Sequence[str]) -> list[Path]:
        """Return the paths of the readings that are inside an allowed folder, each once."""
        inside: dict[Path, None] = {}
        for path in (path for reading in readings for path in self.places(reading)):
            with suppress(OSError, RuntimeError, ValueError):
                if self.confines(path):
                    inside[path] = None
        return list(inside)

    def _is_readable(self, path: Path) -> bool:
        try:
            return path.is_file() and self.confines(path)
        except (OSError, RuntimeError, ValueError):
            return False

    def _refusal(self, source: str) -> ReferenceRefused:
        """Return the reason why a path names no readable file, with the next step."""
        shown = harmless(source, 120)
        readings = path_readings(source, self.system)
        absolute = [reading for reading in readings if _is_absolute(reading)]
        plain = (absolute or readings)[-1]
        windows_paths = [] if self.system.is_windows else [text for text in readings if is_windows_path(text)]
        inside = self._inside(readings)
        if any(reading.replace("\\", "/").startswith(SANDBOXES) for reading in readings) and not self._inside([plain]):
            return ReferenceRefused(
                f"“{shown}” is in the sandbox of the chat, which is not on this machine",
                advice="Save the picture on this machine and give its path there, or give a public URL.",
            )
        try:
            # macOS gives a file this name while its content is only in iCloud.
            if any(path.with_name(f".{path.name}.icloud").exists() for path in inside if path.name):
                return _not_downloaded(source)
            if any(path.exists() for path in inside):
                return ReferenceRefused(f"“{shown}” is not a plain file", advice="Give the path of a picture.")
            if windows_paths and not any(map(self._wsl_path, windows_paths)):
                return ReferenceRefused(
                    f"“{shown}” is a Windows path. This server runs on another system and cannot read it",
                    advice="Copy the picture to this system and give its path there, or give a public URL.",
                )
            if plain[:5].lower() == "file:":
                return ReferenceRefused(
                    "a file: URI must name a file of this machine", advice="Use file:///absolute/path.png."
                )
            if self.system.is_windows and Path(plain).drive and not Path(plain).root:
                return ReferenceRefused(
                    f"“{shown}” depends on the current folder of drive {Path(plain).drive}",
                    advice="Give the whole path from the drive's root.",
                )
            places = self.places(plain)
            if not any(self.confines(path) for path in places):  # raises for an endless link
                if not places:
                    return ReferenceRefused(f"“{shown}” cannot be read", advice="Check the path and its rights.")
                return ReferenceRefused(f"“{shown}” is outside the allowed folders", advice=self._how_to_allow())
            return ReferenceRefused(f"there is no file “{shown}”", advice=self._did_you_mean(inside))
        except (OSError, RuntimeError, ValueError):
            return ReferenceRefused(f"“{shown}” cannot be read", advice="Check the path and its rights.")

    def opened(self, path: Path) -> BinaryIO:
        """Open a path from `readable`. A link that has replaced a part of the path since then is not followed.

        Raises:
            OSError: it is gone, or it is no longer a plain file.
        """
        root = next((root for root in self._roots() if path.is_relative_to(root)), None)
        if root is None:
            raise PermissionError(errno.EACCES, "it is outside the allowed folders")
        if os.open not in os.supports_dir_fd:  # Windows has no safer way
            if path.resolve() != path:
                raise PermissionError(errno.EACCES, "a link took its place")
            return open_plain(path)
        *folders, name = path.relative_to(root).parts
        parent = os.open(root, _STEP)
        try:
            for folder in folders:
                child = os.open(folder, _STEP | _FOLLOW_NOTHING, dir_fd=parent)
                os.close(parent)
                parent = child
            return _plain(os.open(name, _READ, dir_fd=parent))
        finally:
            os.close(parent)

    def _wsl_path(self, text: str) -> str | None:
        return None if self.system.distribution is None else as_wsl_path(text, self.system.distribution)

    def _roots(self) -> list[Path]:
        return [folder.resolve() for folder in self.allowed]

    def _how_to_allow(self) -> str:
        return (
            "Use a file in " + " or ".join(str(folder) for folder in self.allowed) + ", or let the user add its folder "
            "to EVOLINK_MCP_ALLOWED_DIRS."
        )

    def _did_you_mean(self, paths: Sequence[Path]) -> str:
        """Return advice with similar names of images in the same folder, if there are any."""
        import difflib

        for path in paths:
            if not path.parent.is_dir() or not self.confines(path.parent):
                continue
            siblings = islice(path.parent.iterdir(), NAMES_READ_MAX)
            names = [child.name for child in siblings if child.suffix.lower() in PICTURE_SUFFIXES]
            if close := difflib.get_close_matches(path.name, names, n=3, cutoff=0.6):
                suggestions = " or ".join(harmless(path.parent / name, 200) for name in close)
                return f"Did you mean {suggestions}?"
        return "Give the absolute path of an existing picture."


def _is_absolute(text: str) -> bool:
    return text.startswith("~") or Path(text).is_absolute()


def is_in_cloud(facts: Any) -> bool:
    """Return whether the content of a file is only in the cloud (OneDrive, iCloud). `facts` are those of `os.stat`."""
    attributes = getattr(facts, "st_file_attributes", 0)
    flags = getattr(facts, "st_flags", 0)
    return bool(attributes & CLOUD_ATTRIBUTES or flags & CLOUD_FLAG)


def _not_downloaded(source: str) -> ReferenceRefused:
    return ReferenceRefused(
        f"“{harmless(source, 120)}” is only in the cloud: this computer has not downloaded it",
        advice="Open the file once, or choose “Download now” or “Always keep on this device” in the file manager. Then "
        "call again with the same path.",
    )


def _same_letters(path: Path) -> Path | None:
    """Return a file with an equivalent name. macOS decomposes letters, and writes U+202F into names of screenshots."""
    wanted = _folded(path.name)
    try:
        # `find` refused the file with the exact name, so another one must not replace it.
        if path.exists() or not path.parent.is_dir():
            return None
        siblings = islice(path.parent.iterdir(), NAMES_READ_MAX)
        return next((child for child in siblings if _folded(child.name) == wanted), None)
    except (OSError, ValueError):
        return None


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).split())


def open_plain(path: Path) -> BufferedReader:
    """Open the plain file at `path`. A link is refused, and a pipe or device does not block.

    Raises:
        OSError: there is no plain file.
    """
    return _plain(os.open(path, _READ))


def _plain(handle: int) -> BufferedReader:
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a plain file")
    return os.fdopen(handle, "rb")


def make_folder(folder: Path) -> None:
    """Create `folder` and its missing parents for this user only. `Path.mkdir` would restrict only the last one."""
    for missing in reversed([place for place in (folder, *folder.parents) if not place.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)


def check_writable(folder: Path) -> None:
    """Create and remove a file in `folder`. If the folder is missing, do that in its nearest existing parent.

    Raises:
        OSError: this server cannot create files there.
    """
    # `os.access` knows no ACL of Windows, and a full disk still accepts an empty file. So the check writes some bytes.
    parent = _existing_parent(folder)
    handle, name = tempfile.mkstemp(prefix=PART_PREFIX, suffix=PART_SUFFIX, dir=parent)
    try:
        os.write(handle, b"evolink-mcp checks that it can write here")
    finally:
        os.close(handle)
        os.unlink(name)


def _resolved(path: Path) -> Path:
    """Follow all links of a path.

    Raises:
        OSError, RuntimeError: a link leads to itself. From Python 3.13 on Path.resolve returns such a link.
    """
    real = path.resolve()
    if any(part.is_symlink() for part in (real, *real.parents)):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return real


def _existing_parent(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


def free_bytes_of(folder: Path) -> int:
    """Return the free space in bytes of the disk that holds `folder`, which may be missing.

    Raises:
        OSError: the system cannot read the folder.
    """
    return shutil.disk_usage(_existing_parent(folder)).free


def write_new_file(path: Path, content: bytes) -> bool:
    """Write a file that only this user can read, complete or not at all. Return False if the name is taken.

    A link at `path` counts as taken. Nothing is written through it.

    Raises:
        OSError: the folder does not exist, cannot be written or is full.
    """
    with part_file(path.parent, content) as part:
        return move_to_free_name(part, path)


@contextmanager
def part_file(folder: Path, content: bytes) -> Generator[Path]:
    """Write a file with mode 0600 and a temporary name in `folder`. Remove it at the end if it was not moved.

    Raises:
        OSError: the folder does not exist, cannot be written or is full.
    """
    handle, name = tempfile.mkstemp(prefix=PART_PREFIX, suffix=PART_SUFFIX, dir=folder)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            # After a power cut, an incomplete file must not have the final name.
            os.fsync(file.fileno())
        yield part
    finally:
        with suppress(OSError):
            part.unlink()


def move_to_free_name(part: Path, path: Path) -> bool:
    """Move `part` to `path` and return True. If something is there, do nothing and return False.

    It uses a hard link, or else first creates an empty file at `path`. Windows renames a file only to a free name.
    """
    try:
        if sys.platform == "win32":
            move_patiently(os.rename, part, path)
        else:
            # A rename would overwrite an existing file on POSIX.
            os.link(part, path)
    except FileExistsError:
        return False
    except OSError:
        try:
            # Some file systems have no hard links, for example FAT.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return False
        try:
            move_patiently(os.replace, part, path)
        except OSError:
            # An empty file must not stay under the name of an image.
            path.unlink()
            raise
    return True


def move_patiently(
    move: Callable[[Path, Path], None],
    source: Path,
    target: Path,
    *,
    pauses_s: Sequence[float] = SCANNER_PAUSES_S,
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Move a file. After a PermissionError, pause and try again.

    Raises:
        OSError: the file cannot be moved.
    """
    for pause_s in pauses_s:
        try:
            return move(source, target)
        except PermissionError:
            sleep(pause_s)
    return move(source, target)


def stem_of(path: Path) -> str:
    """Return the file name without the suffix of an image. The text after any other dot is part of the name."""
    return path.stem if path.suffix.lower() in SOURCE_SUFFIXES else path.name


def cut_to_bytes(text: str, size: int) -> str:
    """Return the beginning of `text` that has at most `size` bytes of UTF-8. No character is split."""
    return text.encode()[: max(size, 0)].decode(errors="ignore")


def build_name(stem: str, ending: str) -> str:
    """Return a file name of at most NAME_MAX_BYTES bytes. It leaves out the end of a `stem` that is too long."""
    return cut_to_bytes(stem, NAME_MAX_BYTES - len(ending.encode())) + ending


def is_reserved(name: str) -> bool:
    """Return whether Windows reserves this name: NUL, com1.png, a trailing dot or blank."""
    return name.endswith((".", " ")) or name.split(".")[0].rstrip(" ").upper() in RESERVED_NAMES
