"""Find the file of a saved image after a user moved or renamed it: by its size and SHA-256."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from evolink_mcp.images.folders import PICTURE_SUFFIXES, open_plain
from evolink_mcp.journal.entry import ResultImage

# Names that one search reads in each folder tree. A tree of this size takes about 0.1 s.
NAMES_MAX = 20_000
HASHES_MAX = 10_000

# The identity of a file's content: device, inode, bytes, time of the last change in ns.
_FileState = tuple[int, int, int, int]


class MovedFiles:
    """Find saved images in `roots` and their subfolders. Links are not followed."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = roots
        self._hashes: dict[_FileState, str] = {}

    def locate(self, images: Iterable[ResultImage], *, compares_content: bool = True) -> list[ResultImage]:
        """Return each image with the path of its file now. Blocks: one search for all missing files.

        An image stays unchanged if its file is in its place, or is in none of the folders. Without `compares_content` a
        file in its place with the recorded size counts as the image.
        """
        sizes: dict[int, list[Path]] | None = None
        present_images: list[ResultImage] = []
        for image in images:
            if image.path is not None and not self._is_in_place(image, compares_content=compares_content):
                sizes = self._files_by_size() if sizes is None else sizes
                place = next(
                    (path for path in sizes.get(image.bytes or -1, []) if self._has_content(path, image)), None
                )
                image = image if place is None else replace(image, path=str(place))
            present_images.append(image)
        return present_images

    def hash_of(self, path: Path) -> str | None:
        """Return the SHA-256 of a file in hex, or None if it cannot be read."""
        try:
            with open_plain(path) as file:
                facts = os.fstat(file.fileno())
                state = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
                if state not in self._hashes:
                    if len(self._hashes) >= HASHES_MAX:
                        self._hashes.clear()
                    self._hashes[state] = hashlib.file_digest(file, "sha256").hexdigest()
                return self._hashes[state]
        except OSError:
            return None

    def _is_in_place(self, image: ResultImage, *, compares_content: bool) -> bool:
        assert image.path is not None
        path = Path(image.path)
        try:
            size = path.stat().st_size
        except (OSError, ValueError):
            return False
        if image.sha256 is None or image.bytes is None:
            return True
        return size == image.bytes and (not compares_content or self._has_content(path, image))

    def _has_content(self, path: Path, image: ResultImage) -> bool:
        return image.sha256 is not None and self.hash_of(path) == image.sha256

    def _files_by_size(self) -> dict[int, list[Path]]:
        """Return the images in the folders by their size in bytes."""
        sizes: dict[int, list[Path]] = {}
        # One allowed folder may contain another one, so a file may occur twice.
        for path, size in dict(item for root in self._roots for item in _image_files(root)).items():
            sizes.setdefault(size, []).append(path)
        return sizes


def _image_files(root: Path) -> Iterable[tuple[Path, int]]:
    """Yield path and size of the images below a folder, at most NAMES_MAX names. Hidden folders are not searched."""
    folders = [root]
    remaining = NAMES_MAX
    while folders and remaining > 0:
        try:
            with os.scandir(folders.pop()) as items:
                for item in items:
                    remaining -= 1
                    if remaining < 0:
                        return
                    if item.is_dir(follow_symlinks=False):
                        if not item.name.startswith("."):
                            folders.append(Path(item.path))
                    elif item.name.lower().endswith(PICTURE_SUFFIXES) and item.is_file(follow_symlinks=False):
                        yield Path(item.path), item.stat(follow_symlinks=False).st_size
        except OSError:
            continue
