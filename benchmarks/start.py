"""Cold start, memory and what is imported before the first call, beside a bare `MCPServer` with one tool."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

from benchmarks.figures import Figure, middle
from benchmarks.processes import SERVERS, Pipe, cpu_s, environment, memory_mb

TITLE = "Start"
LATE = ("PIL", "sqlite3", "psycopg", "evolink_mcp.simulator")
# Runs the server with a thread that, when asked, tells which modules are loaded and which pages were opened.
SPY = """
import json, os, runpy, sys, threading
asked, told, pages = int(sys.argv[1]), int(sys.argv[2]), []
def heard(event, args):
    if event == "open" and isinstance(args[0], (str, os.PathLike)) and str(args[0]).endswith(".html"):
        pages.append(str(args[0]))
def tell():
    os.read(asked, 1)
    os.write(told, json.dumps([sorted(sys.modules), pages]).encode())
    os.close(told)
sys.addaudithook(heard)
threading.Thread(target=tell, daemon=True).start()
sys.argv = ["evolink-mcp"]
runpy.run_module("evolink_mcp", run_name="__main__")
"""


def run(quick: bool) -> list[Figure]:
    rounds = 3 if quick else 11
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        env = environment(Path(name))
        for server in ("ours", "bare"):  # the first run compiles
            _start(server, env)
        pairs = [(_start("ours", env), _start("bare", env)) for _ in range(rounds)]
        modules, pages = _loaded(env)
        held, calls = _held(env)
    walls = [[one[0] for one in side] for side in zip(*pairs, strict=True)]
    ratio = middle([ours[0] / bare[0] for ours, bare in pairs])
    early = [word for word in LATE if word in modules] + pages
    figures = [
        Figure("cold start to tools/list ÷ bare MCPServer on the SDK's stdio", ratio, "×", 1.10,
               f"median of {rounds} interleaved pairs; {middle(walls[0]) * 1000:.0f} and {middle(walls[1]) * 1000:.0f} ms"),
    ]  # fmt: skip
    if pairs[0][0][1] is not None:
        cpu = middle([ours[1] / bare[1] for ours, bare in pairs])  # pyright: ignore[reportOperatorIssue]
        figures.append(
            Figure("the same by processor time", cpu, "×", None, "hardly moved by other work on the machine")
        )
    what = ", ".join(early) or "nothing of " + ", ".join(LATE[:4]) + ", HTML"
    figures.append(Figure("loaded before the first call although only a call needs it", len(early), "", 0, what))
    figures.append(Figure(f"memory after {calls} free calls", held, "MB", 85))
    return figures


def _start(server: str, env: dict[str, str]) -> tuple[float, float | None]:
    """Seconds from spawn to the list of tools, by the clock and by the processor."""
    started = time.perf_counter()
    with Pipe(SERVERS[server], env) as pipe:
        pipe.greet()
        return time.perf_counter() - started, cpu_s(pipe.process.pid)


def _loaded(env: dict[str, str]) -> tuple[set[str], list[str]]:
    asked, ask = os.pipe()
    tell, told = os.pipe()
    with Pipe(["-c", SPY, str(asked), str(told)], env, fds=(asked, told)) as pipe:
        os.close(asked)
        os.close(told)
        pipe.greet()
        os.write(ask, b".")
        with open(tell, "rb") as file:
            modules, pages = json.load(file)
        os.close(ask)
    return set(modules), [Path(page).name for page in pages]


def _held(env: dict[str, str]) -> tuple[float, int]:
    with Pipe(SERVERS["ours"], env) as pipe:
        pipe.greet()
        for _ in range(8):
            pipe.call("compute_size", {"size": "16:9", "resolution": "2K"})
        for _ in range(2):
            pipe.call("list_tasks", {})
        return memory_mb(pipe.process.pid), 10
