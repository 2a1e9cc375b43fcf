"""A list of folders with the separator of another system is refused, because it would name one missing folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evolink_mcp.app.settings import BadSetting, Settings

SEPARATORS = {
    ",": "commas",
    ";": "semicolons",
    "|": "bars",
    "\n": "line breaks",
    "\r\n": "line breaks",
    " ; ": "semicolons",
}
FOREIGN = {sign: name for sign, name in SEPARATORS.items() if sign.strip(" ") != os.pathsep}


@pytest.mark.parametrize(("sign", "name"), FOREIGN.items(), ids=[repr(sign) for sign in FOREIGN])
def test_a_foreign_separator_between_folders_is_refused_with_the_right_one(
    tmp_path: Path, sign: str, name: str
) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(BadSetting, match=f"separates its folders by “{os.pathsep}”, not by {name}"):
        Settings.from_environment({"EVOLINK_MCP_ALLOWED_DIRS": f"{tmp_path / 'a'}{sign}{tmp_path / 'b'}"})


def test_a_folder_that_exists_may_contain_the_separator_of_another_system(tmp_path: Path) -> None:
    folder = tmp_path / "a;b" if os.pathsep != ";" else tmp_path / "a,b"
    folder.mkdir()
    settings = Settings.from_environment({"EVOLINK_MCP_ALLOWED_DIRS": str(folder)})
    assert folder in settings.folders.allowed
