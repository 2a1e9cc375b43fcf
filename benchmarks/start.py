"""The first answers, the whole start, memory and what is imported, beside a bare `MCPServer` with one tool."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

from benchmarks.figures import Figure, middle
from benchmarks.processes import SERVERS, Pipe, cpu_s, environment, memory_mb
from evolink_mcp.tools.names import TOOL_NAMES

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
        # The owner's choice of tools is not in the recording: the SDK answers.
        slow = env | {"EVOLINK_MCP_TOOLS": ",".join(TOOL_NAMES)}
        whole = [(_start("ours", slow), _start("bare", env)) for _ in range(rounds)]
        called = [(_start("ours", env, "compute_size"), _start("bare", env, "nothing")) for _ in range(rounds)]
        uncompiled = env | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": f"{name}/nothing"}
        cold = [(_start("ours", uncompiled), _start("bare", uncompiled)) for _ in range(3)]
        modules, pages = _loaded(env)
        held, calls = _held(env)
    early = [word for word in LATE if word in modules] + pages
    figures = [
        _ratio("from spawn to the list of tools ÷ bare MCPServer on the SDK's stdio", pairs, 0.15),
        _ratio("the same without bytecode", cold, None),
        _ratio("the same without the recording", whole, 1.10),
        _ratio("from spawn to the answer of compute_size ÷ of a tool that does nothing", called, None),
    ]
    if whole[0][0][1] is not None:
        cpu = middle([ours[1] / bare[1] for ours, bare in whole])  # pyright: ignore[reportOperatorIssue]
        figures.append(
            Figure(
                "without the recording, by processor time", cpu, "×", None, "hardly moved by other work on the machine"
            )
        )
    what = ", ".join(early) or "nothing of " + ", ".join(LATE[:4]) + ", HTML"
    figures.append(Figure("loaded before the first call although only a call needs it", len(early), "", 0, what))
    figures.append(Figure(f"memory after {calls} free calls", held, "MB", 85))
    return figures


Pairs = list[tuple[tuple[float, float | None], tuple[float, float | None]]]


def _ratio(name: str, pairs: Pairs, limit: float | None) -> Figure:
    ratios = [ours[0] / bare[0] for ours, bare in pairs]
    ours, bare = (middle([one[0] for one in side]) * 1000 for side in zip(*pairs, strict=True))
    note = f"median of {len(pairs)} interleaved pairs, {min(ratios):.2f} to {max(ratios):.2f}; {ours:.0f} and {bare:.0f} ms"
    return Figure(name, middle(ratios), "×", limit, note)


def _start(server: str, env: dict[str, str], tool: str = "") -> tuple[float, float | None]:
    """Seconds from spawn to the list of tools or to the answer of a tool, by the clock and by the processor."""
    started = time.perf_counter()
    with Pipe(SERVERS[server], env) as pipe:
        pipe.greet()
        if tool:
            pipe.call(tool, {"size": "1:1"} if tool == "compute_size" else {})
        return time.perf_counter() - started, cpu_s(pipe.process.pid)


def _loaded(env: dict[str, str]) -> tuple[set[str], list[str]]:
    asked, ask = os.pipe()
    tell, told = os.pipe()
    with Pipe(["-P", "-c", SPY, str(asked), str(told)], env, fds=(asked, told)) as pipe:
        os.close(asked)
        os.close(told)
        pipe.greet()
        pipe.ready()
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
