"""The Docker image: packages with hashes, and its health check."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).parents[2]
RELEASE = ROOT / ".github" / "release"
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")


def pins(name: str) -> dict[str, tuple[str, int]]:
    """Return version and number of hashes of each package in a list."""
    text = (RELEASE / name).read_text("utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    entries = [re.match(r"([\w.-]+)(?:\[[^\]]*\])?==(\S+)", line) for line in lines]
    counts = [line.count("--hash=sha256:") for line in lines]
    return {entry[1].lower(): (entry[2], count) for entry, count in zip(entries, counts, strict=True) if entry}


@pytest.mark.parametrize(("name", "extra"), [("image.txt", None), ("image[teams].txt", "teams")])
def test_the_list_has_every_dependency_with_a_hash(name: str, extra: str | None) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needs = [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else [])]
    packages = pins(name)
    assert [package for package, (_, hashes) in packages.items() if hashes == 0] == []
    for need in needs:
        match = re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+),<(\d+)", need)
        assert match is not None
        version = packages[match[1].lower()][0]
        numbers = [int(part) for part in re.findall(r"\d+", version)]
        assert numbers >= [int(part) for part in match[2].split(".")]
        assert numbers[0] < int(match[3]) or match[3] == "1"
    assert "hatchling" in packages


def test_the_image_installs_only_files_with_known_hashes() -> None:
    installs = re.findall(r"pip install ([^\n]+)", DOCKERFILE)
    assert len(installs) == 2
    assert "--require-hashes --only-binary :all:" in installs[0]
    assert "--no-deps --no-build-isolation" in installs[1]
    included = (ROOT / ".dockerignore").read_text("utf-8").split()
    assert "!.github/release/image*.txt" in included


class Health(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def check(tmp_path: Path, *command: str) -> int:
    """Run the health check of the image as if the container had started `command`."""
    text = DOCKERFILE.split("HEALTHCHECK", 1)[1].split("CMD ", 1)[1].split('"]', 1)[0] + '"]'
    program, option, code = json.loads(text.replace("\\\n", ""))
    assert (program, option) == ("python", "-c")
    words = tmp_path / "cmdline"
    words.write_bytes(b"\0".join(word.encode() for word in ("python", "evolink-mcp", *command)) + b"\0")
    code = code.replace("/proc/1/cmdline", words.as_posix())
    return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, timeout=300).returncode


def test_a_container_over_stdio_is_healthy(tmp_path: Path) -> None:
    assert check(tmp_path) == 0


@pytest.mark.parametrize("command", ["http", "sse"])
def test_a_container_over_http_is_healthy_while_it_answers(tmp_path: Path, command: str) -> None:
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        port = str(server.server_port)
        Thread(target=server.serve_forever).start()
        try:
            assert check(tmp_path, command, "--port", port) == 0
        finally:
            server.shutdown()
    assert check(tmp_path, command, "--port", port) == 1
