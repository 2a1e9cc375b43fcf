"""The environment of the process."""

from __future__ import annotations

import sys
from pathlib import Path

import platformdirs
import pytest

from evolink_mcp.app.environment import cache_folder


def test_the_cache_folder_is_the_one_of_the_system() -> None:
    assert Path(cache_folder()) == platformdirs.user_cache_path("evolink-mcp", appauthor=False)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="XDG_CACHE_HOME is a variable of Linux")
@pytest.mark.parametrize("value", ["", " ", "relative/folder", "/absolute/cache"])
def test_the_cache_folder_follows_xdg_cache_home(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    is_valid = value.startswith("/")
    assert cache_folder() == ("/absolute/cache/evolink-mcp" if is_valid else "/home/someone/.cache/evolink-mcp")
