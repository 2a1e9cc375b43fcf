"""Which folders may be read and written: a path counts only after every link in it has been followed."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evolink_mcp.errors import FolderRefused, ReferenceRefused
from evolink_mcp.quoting import harmless

NAME_MAX_BYTES = 200


@dataclass(frozen=True, slots=True)
class Folders:
    """`output` takes the pictures; files may be read from and saved into `allowed` (output among them)."""

    output: Path
    allowed: tuple[Path, ...]

    def confines(self, path: Path) -> bool:
        """Whether `path`, all links followed, lies inside an allowed folder."""
        real = path.resolve()
        return any(real.is_relative_to(folder.resolve()) for folder in self.allowed)

    def target(self, save_as: str) -> Path:
        """Where `save_as` points: a name or path below the output folder, or an absolute path in an allowed one.

        Raises:
            FolderRefused: outside every allowed folder, or not a usable name.
        """
        shown = harmless(save_as, 80)
        name = Path(save_as).name
        if "\0" in save_as or not name or name in (".", "..") or len(name.encode()) > NAME_MAX_BYTES:
            raise FolderRefused(
                f"save_as “{shown}” is not a usable file name", advice="Give a short name such as hero.png."
            )
        path = Path(save_as).expanduser()
        path = path if path.is_absolute() else self.output / path
        try:
            inside = self.confines(path)
        except (OSError, RuntimeError):
            inside = False
        if not inside:
            raise FolderRefused(f"save_as “{shown}” is outside the allowed folders", advice=self._how_to_allow())
        return path

    def readable(self, source: str) -> Path:
        """The existing file that `source` names, relative paths tried in each allowed folder.

        Raises:
            ReferenceRefused: missing (with a suggestion), not a plain file, or outside every allowed folder.
        """
        shown = harmless(source, 120)
        given = Path(source).expanduser()
        candidates = [given] if given.is_absolute() else [folder / given for folder in self.allowed]
        try:
            inside = [path for path in candidates if self.confines(path)]
            if not inside:
                raise ReferenceRefused(f"“{shown}” is outside the allowed folders", advice=self._how_to_allow())
            found = next((path.resolve() for path in inside if path.is_file()), None)
        except (OSError, RuntimeError, ValueError) as error:
            raise ReferenceRefused(f"“{shown}” cannot be read", advice="Check the path and its rights.") from error
        if found is None:
            raise ReferenceRefused(f"there is no file “{shown}”", advice=_did_you_mean(inside))
        return found

    def _how_to_allow(self) -> str:
        return (
            "Use a file in " + " or ".join(str(folder) for folder in self.allowed) + ", or let the user add its folder "
            "to EVOLINK_MCP_ALLOWED_DIRS."
        )


def _did_you_mean(paths: Sequence[Path]) -> str:
    for path in paths:
        if path.parent.is_dir():
            names = [child.name for child in path.parent.iterdir() if child.is_file()]
            if close := difflib.get_close_matches(path.name, names, n=3, cutoff=0.6):
                return "Did you mean " + " or ".join(str(path.parent / name) for name in close) + "?"
    return "Give the absolute path of an existing picture."
