"""Run a function of this package in a new Python process that imports nothing from the working directory.

`python -m` and `python -c` put the working directory first on the import path. MCP hosts start the server in the
user's project, so a file `pickle.py` of that project would run inside the child process. Python's option -I prevents
this, but it also hides packages outside the standard site folder. So the parent passes the folders of the packages.

This file is also the program that the child process runs. It must import nothing of the package at module level.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_PACKAGE = "evolink_mcp"


def isolated_command(entry_point: str, requirements: Sequence[str], *arguments: str) -> list[str]:
    """Return the command that calls `entry_point` ("module:function") in an isolated interpreter.

    `requirements` are the import names of outside packages that the function needs. The function sees `arguments` in
    `sys.argv[1:]`.
    """
    folders = os.pathsep.join(dict.fromkeys(filter(None, map(_folder_of, requirements))))
    return [sys.executable, "-I", __file__, entry_point, folders, *arguments]


def _folder_of(package: str) -> str | None:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    origin = Path(spec.origin).absolute()
    return str(origin.parent.parent if spec.submodule_search_locations else origin.parent)


def _load_package() -> None:
    """Import the package that this very file belongs to, without its parent folder on the import path."""
    folder = Path(__file__).absolute().parent
    spec = importlib.util.spec_from_file_location(
        _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {folder}")
    package = importlib.util.module_from_spec(spec)
    sys.modules[_PACKAGE] = package
    spec.loader.exec_module(package)


def _main() -> None:
    entry_point, folders, *arguments = sys.argv[1:]
    # Behind the standard library and the site folder, so these folders cannot replace a module of them.
    sys.path += [folder for folder in folders.split(os.pathsep) if folder]
    _load_package()
    module, _, function = entry_point.partition(":")
    sys.argv = [_PACKAGE, *arguments]
    getattr(importlib.import_module(module), function)()


if __name__ == "__main__":
    _main()
