"""What comes from outside is named exactly: actions, images, the lowest versions; and no workflow may do more than it must."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
EACH_WORKFLOW = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="the workflows are in the repository only")
# The lowest versions in which no hole is known that concerns us.
FLOORS = {"filelock": (3, 20, 3), "pillow": (12, 3), "python-multipart": (0, 0, 22), "starlette": (1,), "mcp": (2, 3)}


@EACH_WORKFLOW
def test_every_action_is_pinned_by_its_commit(workflow: Path) -> None:
    used = re.findall(r"uses: (\S+)(.*)", workflow.read_text(encoding="utf-8"))
    loose = [name for name, said in used if not re.search(r"@[0-9a-f]{40}$", name) or not re.match(r" # v\d", said)]
    assert used
    assert loose == []


@EACH_WORKFLOW
def test_a_workflow_reads_and_does_no_more_unless_a_job_says_so(workflow: Path) -> None:
    text = workflow.read_text(encoding="utf-8")
    assert "\npermissions:\n  contents: read\n" in text
    assert "write-all" not in text
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")


@EACH_WORKFLOW
def test_what_is_fetched_is_checked_by_its_sum(workflow: Path) -> None:
    text = workflow.read_text(encoding="utf-8")
    assert text.count("curl ") == text.count("sha256sum --check")
    assert "/latest/" not in text


def test_the_image_is_built_on_an_exact_base() -> None:
    bases = re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert all(re.search(r"@sha256:[0-9a-f]{64}$", base) for base in bases)


@pytest.mark.parametrize("name", FLOORS)
def test_the_lowest_version_that_may_be_installed_has_no_known_hole(name: str) -> None:
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    (need,) = [need for need in needs if re.match(rf"{name}[\[>]", need)]
    floor = re.search(r">=([0-9.]+)", need)
    assert floor is not None
    assert tuple(map(int, floor[1].split("."))) >= FLOORS[name]
    assert re.search(r",<\d", need), "an upper bound too"


def test_no_lock_file_and_no_registrys_host_is_kept() -> None:
    assert [path.name for path in ROOT.iterdir() if path.name in ("uv.lock", "poetry.lock", "package-lock.json")] == []
