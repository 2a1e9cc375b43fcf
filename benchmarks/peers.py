"""Servers of others beside ours, where Node and the package registry are: from spawn to the list of tools, and its size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.figures import Figure, middle
from benchmarks.processes import SERVERS, Pipe, environment, memory_mb

TITLE = "Peers"
PACKAGES = {"@evolinkai/evolink-media": "evolink-media", "mcp-image": "mcp-image"}  # the package, and its command
# They start with any key. No request is sent.
KEYS = {"EVOLINK_API_KEY": "sk-benchmark-0123456789", "GEMINI_API_KEY": "benchmark-0123456789"}


def run(quick: bool) -> list[Figure]:
    """Nothing is measured in a quick run, and where there is no npm."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if quick or npm is None or node is None:
        return [
            Figure("peers measured", 0, "", None, "not in a quick run" if npm and node else "there is no Node here")
        ]
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        install = [npm, "install", "--prefix", name, "--no-audit", "--no-fund", "--loglevel=error", *PACKAGES]
        done = subprocess.run(install, check=False, capture_output=True, text=True, timeout=300)
        if done.returncode:
            return [Figure("peers measured", 0, "", None, "npm could not install them")]
        env = environment(folder) | KEYS | {"PATH": os.environ.get("PATH", "")}
        _seen(SERVERS["ours"], None, env)  # the first run compiles
        for package, command in PACKAGES.items():
            version = json.loads((folder / "node_modules" / package / "package.json").read_text())["version"]
            theirs = [str(folder / "node_modules" / ".bin" / command)]
            pairs = [(_seen(SERVERS["ours"], None, env), _seen(theirs, node, env)) for _ in range(7)]
            figures += _figures(f"{package} {version}", pairs)
    return figures


Seen = tuple[float, float, float]  # seconds to the list of tools, its size in bytes, memory in MB


def _figures(peer: str, pairs: list[tuple[Seen, Seen]]) -> list[Figure]:
    def beside(part: int, unit: str, scale: float = 1) -> tuple[float, str]:
        ratios = [ours[part] / theirs[part] for ours, theirs in pairs]
        ours, theirs = (middle([one[side][part] for one in pairs]) * scale for side in (0, 1))
        return middle(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}; {ours:,.0f} and {theirs:,.0f} {unit}"

    start, size, memory = beside(0, "ms", 1000), beside(1, "bytes"), beside(2, "MB")
    return [
        Figure(f"from spawn to the list of tools ÷ {peer}", start[0], "×", None, f"{len(pairs)} pairs, {start[1]}"),
        Figure(f"size of the list of tools ÷ {peer}", size[0], "×", None, size[1]),
        Figure(f"memory after it ÷ {peer}", memory[0], "×", None, memory[1]),
    ]


def _seen(arguments: list[str], program: str | None, env: dict[str, str]) -> Seen:
    started = time.perf_counter()
    with Pipe(arguments, env, program=program) as pipe:
        tools = pipe.greet()
        took = time.perf_counter() - started
        pipe.ready()
        return took, len(json.dumps(tools)), memory_mb(pipe.process.pid)
