"""Compare the start and the list of tools with published servers for images. Needs Node and npm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.figures import Figure, middle
from benchmarks.processes import SERVERS, Pipe, environment, memory_mb, record_first_answers

TITLE = "Peers"
PACKAGES = {"@evolinkai/evolink-media": "evolink-media", "mcp-image": "mcp-image"}  # package and command
# The servers start with any key. No request is sent.
KEYS = {"EVOLINK_API_KEY": "sk-benchmark-0123456789", "GEMINI_API_KEY": "benchmark-0123456789"}


def run(quick: bool) -> list[Figure]:
    """Measure nothing in the quick mode or without npm."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if quick or npm is None or node is None:
        return [
            Figure("peers measured", 0, "", None, "not in the quick mode" if npm and node else "Node is not installed")
        ]
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        install = [npm, "install", "--prefix", name, "--no-audit", "--no-fund", "--loglevel=error", *PACKAGES]
        process = subprocess.run(install, check=False, capture_output=True, text=True, timeout=300)
        if process.returncode:
            return [Figure("peers measured", 0, "", None, "npm could not install them")]
        env = environment(folder) | KEYS | {"PATH": os.environ.get("PATH", "")}
        record_first_answers(env, folder)  # this run also compiles the modules
        for package, command in PACKAGES.items():
            version = json.loads((folder / "node_modules" / package / "package.json").read_text())["version"]
            peer_command = [str(folder / "node_modules" / ".bin" / command)]
            pairs = [(_start(SERVERS["ours"], None, env), _start(peer_command, node, env)) for _ in range(7)]
            figures += _figures(f"{package} {version}", pairs)
    return figures


Start = tuple[float, float, float]  # seconds to the list of tools, its size in bytes, memory in MB


def _figures(peer: str, pairs: list[tuple[Start, Start]]) -> list[Figure]:
    def compare(part: int, unit: str, scale: float = 1) -> tuple[float, str]:
        ratios = [project[part] / peer_start[part] for project, peer_start in pairs]
        project_value, peer_value = (middle([pair[side][part] for pair in pairs]) * scale for side in (0, 1))
        return middle(
            ratios
        ), f"{min(ratios):.2f} to {max(ratios):.2f}; {project_value:,.0f} and {peer_value:,.0f} {unit}"

    start = compare(0, "ms", 1000)
    size = compare(1, "bytes")
    memory = compare(2, "MB")
    return [
        Figure(
            f"from process start to the list of tools ÷ {peer}", start[0], "×", None, f"{len(pairs)} pairs, {start[1]}"
        ),
        Figure(f"size of the list of tools ÷ {peer}", size[0], "×", None, size[1]),
        Figure(f"memory after it ÷ {peer}", memory[0], "×", None, memory[1]),
    ]


def _start(arguments: list[str], program: str | None, env: dict[str, str]) -> Start:
    started_at = time.perf_counter()
    with Pipe(arguments, env, program=program) as pipe:
        tools = pipe.initialize()
        duration_s = time.perf_counter() - started_at
        pipe.wait_until_ready()
        return duration_s, len(json.dumps(tools)), memory_mb(pipe.process.pid)
