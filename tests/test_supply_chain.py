"""Check pinned actions, images and tools, minimum versions, and the permissions of each job."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
EACH_WORKFLOW = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="the workflows are in the repository only")
# The commit of each release tag, compared with the action's own repository. Change a pin here and in the workflows.
PINS = {
    "actions/attest-build-provenance": ("v4.1.0", "a2bbfa25375fe432b6a289bc6b6cd05ecd0c4c32"),
    "actions/checkout": ("v7.0.1", "3d3c42e5aac5ba805825da76410c181273ba90b1"),
    "actions/download-artifact": ("v8.0.1", "3e5f45b2cfb9172054b4087a40e8e0b5a5461e7c"),
    "actions/setup-node": ("v7.0.0", "820762786026740c76f36085b0efc47a31fe5020"),
    "actions/setup-python": ("v7.0.0", "5fda3b95a4ea91299a34e894583c3862153e4b97"),
    "actions/upload-artifact": ("v7.0.0", "bbbca2ddaa5d8feaa63e36b76fdaad77386f024f"),
    "github/codeql-action": ("v4.36.2", "8aad20d150bbac5944a9f9d289da16a4b0d87c1e"),
    "ossf/scorecard-action": ("v2.4.4", "2d1146689b8cda280b9bc96326124645441f03bc"),
    "pypa/gh-action-pypi-publish": ("v1.14.1", "ba38be9e461d3875417946c167d0b5f3d385a247"),
}
# The jobs that can sign or publish, with the actions that they run.
DOWNLOAD = "actions/download-artifact"
PRIVILEGED = {
    "attest": [DOWNLOAD, "actions/attest-build-provenance"],
    "pypi": [DOWNLOAD, "pypa/gh-action-pypi-publish"],
    "assets": [DOWNLOAD],
    "registry": ["actions/checkout"],
}
# The lowest versions without a known vulnerability that concerns this package.
FLOORS = {"filelock": (3, 20, 3), "pillow": (12, 3), "python-multipart": (0, 0, 22), "starlette": (1,), "mcp": (2, 3)}


def jobs(workflow: Path) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]


def release_jobs() -> dict[str, Any]:
    return jobs(ROOT / ".github" / "workflows" / "release.yml")


def commands(job: dict[str, Any]) -> str:
    return "\n".join(step.get("run", "") for step in job["steps"])


def actions(job: dict[str, Any]) -> list[str]:
    return [step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step]


def jobs_with(permission: str) -> set[tuple[str, str]]:
    return {
        (workflow.stem, name)
        for workflow in WORKFLOWS
        for name, job in jobs(workflow).items()
        if job.get("permissions", {}).get(permission) == "write"
    }


@EACH_WORKFLOW
def test_every_action_is_pinned_to_the_commit_of_a_release_and_a_comment_names_its_tag(workflow: Path) -> None:
    text = workflow.read_text(encoding="utf-8")
    pins = re.findall(r"uses: ([\w.-]+/[\w.-]+)[\w./-]*@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)\n", text)
    assert len(pins) == text.count("uses:") > 0
    assert [(action, tag, commit) for action, commit, tag in pins if PINS.get(action) != (tag, commit)] == []


def test_every_pin_of_the_table_is_in_use() -> None:
    text = "".join(workflow.read_text(encoding="utf-8") for workflow in WORKFLOWS)
    assert [action for action in PINS if f"uses: {action}" not in text] == []


def test_only_jobs_that_sign_or_publish_have_an_identity_or_may_write() -> None:
    published = {("release", name) for name in ("attest", "pypi", "registry")}
    assert jobs_with("id-token") == published | {("security", "scorecard")}
    assert jobs_with("attestations") == {("release", "attest")}
    assert jobs_with("contents") == {("release", "assets")}
    assert jobs_with("packages") == jobs_with("actions") == set()


@pytest.mark.parametrize("name", PRIVILEGED)
def test_a_job_that_signs_or_publishes_installs_nothing_and_runs_no_test(name: str) -> None:
    job = release_jobs()[name]
    assert actions(job) == PRIVILEGED[name]
    assert re.findall(r"\b(?:pip|pipx|uvx?|npm|npx|node|python3?|pytest|make|docker)\b", commands(job)) == []


def test_only_the_jobs_that_build_or_test_have_no_write_permission() -> None:
    unprivileged = {name: job["permissions"] for name, job in release_jobs().items() if name not in PRIVILEGED}
    assert unprivileged == {"test": {"contents": "read"}, "build": {"contents": "read"}}


def test_nothing_is_signed_before_the_tests_passed_and_nothing_is_published_unsigned() -> None:
    needs = {name: job.get("needs", []) for name, job in release_jobs().items()}
    assert needs == {
        "test": [],
        "build": [],
        "attest": ["test", "build"],
        "pypi": ["build", "attest"],
        "assets": ["build", "pypi"],
        "registry": "pypi",
    }


@pytest.mark.parametrize("name", ["attest", "pypi", "assets"])
def test_each_job_first_checks_its_download_against_the_hashes_of_the_build(name: str) -> None:
    """Another job of the run can replace the artifact, but not the output of the build."""
    download, check, *_ = release_jobs()[name]["steps"]
    assert download["uses"].startswith(f"{DOWNLOAD}@")
    assert download["with"] == {"name": "release", "path": "release"}
    assert check["working-directory"] == "release"
    assert check["env"] == {"SUMS": "${{ needs.build.outputs.sums }}"}
    assert check["run"].splitlines() == [
        'echo "$SUMS  SHA256SUMS" | sha256sum --check --strict',
        "sha256sum --check --strict SHA256SUMS",
        'test "$(ls -A | wc -l)" = "$(($(wc -l < SHA256SUMS) + 1))"',
    ]


def test_the_build_passes_on_the_hash_of_its_hashes() -> None:
    build = release_jobs()["build"]
    *_, sums, upload = build["steps"]
    assert build["outputs"] == {"sums": "${{ steps.sums.outputs.sha256 }}"}
    assert sums["id"] == "sums"
    assert 'echo "sha256=$(sha256sum release/SHA256SUMS | cut -d \' \' -f 1)" >> "$GITHUB_OUTPUT"' in sums["run"]
    assert upload["with"] == {"name": "release", "path": "release", "if-no-files-found": "error"}


def test_the_build_installs_only_pinned_tools_and_runs_no_test() -> None:
    text = commands(release_jobs()["build"])
    installs = [line.strip() for line in text.splitlines() if re.search(r"\b(?:pip|npm|npx|uvx|pipx)\b", line)]
    assert installs == [
        '"$RUNNER_TEMP/tools/bin/pip" install -q --require-hashes --only-binary :all: -r .github/release/requirements.txt',
        "npm install --ignore-scripts --no-package-lock --no-audit --no-fund --prefix .github/release",
    ]
    assert "pytest" not in text
    assert "-m build --no-isolation" in text


def test_no_job_of_a_release_uses_a_cache() -> None:
    steps = [step for job in release_jobs().values() for step in job["steps"] if "uses" in step]
    options = [step.get("with", {}) for step in steps]
    assert [step["uses"] for step in steps if "cache" in step["uses"]] == []
    assert [option for option in options if option.get("cache") or option.get("enable-cache")] == []
    node = [step["with"] for step in steps if step["uses"].startswith("actions/setup-node@")]
    assert [option.get("package-manager-cache") for option in node] == [False]


def test_every_tool_of_a_release_has_an_exact_version_and_no_registry_url() -> None:
    python = (ROOT / ".github" / "release" / "requirements.txt").read_text(encoding="utf-8")
    node = (ROOT / ".github" / "release" / "package.json").read_text(encoding="utf-8")
    packages = [line for line in python.splitlines() if line and line[0] not in "# "]
    assert {re.split("==", line)[0] for line in packages} >= {"build", "hatchling", "uv"}
    assert [line for line in packages if not re.fullmatch(r"[\w.-]+==[\w.]+( ; [^\\]+)? \\", line)] == []
    assert len(re.findall(r"\\\n    --hash=sha256:[0-9a-f]{64}", python)) >= len(packages)
    assert [name for name, version in json.loads(node)["dependencies"].items() if not version[0].isdigit()] == []
    assert "://" not in python


@EACH_WORKFLOW
def test_a_workflow_can_only_read_unless_a_job_declares_more(workflow: Path) -> None:
    text = workflow.read_text(encoding="utf-8")
    assert "\npermissions:\n  contents: read\n" in text
    assert "write-all" not in text
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")


@EACH_WORKFLOW
def test_every_downloaded_file_is_checked_by_its_hash(workflow: Path) -> None:
    scripts = [step.get("run", "") for job in jobs(workflow).values() for step in job["steps"]]
    downloads = [script for script in scripts if re.search(r"\b(?:curl|wget)\b", script)]
    assert [
        script for script in downloads if not re.search(r"\bcurl [^|]*\n.*sha256sum --check --strict\n", script)
    ] == []
    assert "/latest/" not in workflow.read_text(encoding="utf-8")


def test_the_image_is_built_on_an_exact_base() -> None:
    bases = re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert all(re.search(r"@sha256:[0-9a-f]{64}$", base) for base in bases)


@pytest.mark.parametrize("name", FLOORS)
def test_the_lowest_allowed_version_has_no_known_vulnerability(name: str) -> None:
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    (need,) = [need for need in needs if re.match(rf"{name}[\[>]", need)]
    floor = re.search(r">=([0-9.]+)", need)
    assert floor is not None
    assert tuple(map(int, floor[1].split("."))) >= FLOORS[name]
    assert re.search(r",<\d", need), "the upper bound is missing"


def test_the_repository_has_no_lock_file() -> None:
    assert [path.name for path in ROOT.iterdir() if path.name in ("uv.lock", "poetry.lock", "package-lock.json")] == []
