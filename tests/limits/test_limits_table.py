"""Each row of docs/limits.md has a trial in this folder, and shows the number that the code uses."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
TABLE = HERE.parents[1] / "docs" / "limits.md"


def rows() -> Iterator[tuple[str, str]]:
    """Yield the name and the limit of each row."""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 4 and cells[0] != "What" and not cells[0].startswith("---"):
            yield cells[0], cells[2]


def modules() -> Iterator[ModuleType]:
    for path in sorted(HERE.glob("test_*.py")):
        if path != Path(__file__):
            spec = importlib.util.spec_from_file_location(f"trials_of_{path.stem}", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            yield module


def test_every_row_has_a_trial_and_every_trial_a_row() -> None:
    trials = [name for module in modules() for name in module.TRIALS]
    assert sorted(trials) == sorted(name for name, _ in rows())
    for module in modules():
        assert all(trial.__name__ in vars(module) for trial in module.TRIALS.values())


def test_the_rows_show_the_limits_of_the_code() -> None:
    texts = {name: text for module in modules() for name, text in getattr(module, "LIMIT_TEXTS", {}).items()}
    assert texts == {name: limit for name, limit in rows() if name in texts}


def test_the_table_is_not_empty() -> None:
    if len(list(rows())) < 7:
        pytest.fail("the table of docs/limits.md was not found")
