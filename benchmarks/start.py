"""Compare the first answers, the complete start, memory and imports with a bare `MCPServer` with one tool."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

from benchmarks.figures import Figure, middle
from benchmarks.processes import (
    SERVERS,
    Pipe,
    Standin,
    cpu_s,
    environment,
    memory_mb,
    record_first_answers,
    standin,
    timed,
)

TITLE = "Start"
PAUSE_S = 4.0  # two seconds after its start the server searches for work of dead servers, which takes a moment
ARGUMENTS = {"compute_size": {"size": "1:1"}, "nothing": {}}
LATE = ("PIL", "sqlite3", "psycopg", "evolink_mcp.simulator")
# Run the server with a thread that reports the loaded modules and the opened HTML pages on request.
REPORTER_SCRIPT = """
import json, os, runpy, sys, threading
request_fd = int(sys.argv[1])
report_fd = int(sys.argv[2])
pages = []
def record_page(event, args):
    if event == "open" and isinstance(args[0], (str, os.PathLike)) and str(args[0]).endswith(".html"):
        pages.append(str(args[0]))
def report():
    os.read(request_fd, 1)
    os.write(report_fd, json.dumps([sorted(sys.modules), pages]).encode())
    os.close(report_fd)
sys.addaudithook(record_page)
threading.Thread(target=report, daemon=True).start()
sys.argv = ["evolink-mcp"]
runpy.run_module("evolink_mcp", run_name="__main__")
"""


def run(quick: bool) -> list[Figure]:
    rounds = 3 if quick else 11
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        env = environment(Path(name))
        # The first run compiles the modules, and this server records its first answers.
        _start("bare", env)
        record_first_answers(env, Path(name))
        pairs = [(_start("ours", env), _start("bare", env)) for _ in range(rounds)]
        # Another home has no recorded answers, so the SDK answers.
        homes = [env | {"HOME": f"{name}/home-{number}"} for number in range(rounds)]
        without_answers = [(_start("ours", home), _start("bare", env)) for home in homes]
        with_call = [(_start("ours", env, "compute_size"), _start("bare", env, "nothing")) for _ in range(rounds)]
        with standin() as evolink:
            with_post = [
                (_first_post(env, evolink, number), _start("bare", env, "nothing")) for number in range(rounds)
            ]
            later_post = [
                (_first_post(env, evolink, rounds + number, PAUSE_S), _later_call("bare", env, "nothing"))
                for number in range(rounds)
            ]
        later = [(_later_call("ours", env, "compute_size"), _later_call("bare", env, "nothing")) for _ in range(rounds)]
        uncompiled = env | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": f"{name}/nothing"}
        cold = [(_start("ours", uncompiled), _start("bare", uncompiled)) for _ in range(3)]
        modules, pages = _loaded_modules(env)
        memory, calls = _memory_after_calls(env)
    early = [word for word in LATE if word in modules] + pages
    figures = [
        _ratio("from process start to the list of tools ÷ bare MCPServer on the SDK's stdio", pairs, 0.06),
        _ratio("the same without bytecode", cold, None),
        _ratio("the same without recorded answers", without_answers, 1.10),
        _ratio("from process start to the answer of compute_size ÷ of a tool that does nothing", with_call, 0.8),
        _later(f"the first compute_size {PAUSE_S:g} s after the list of tools", later),
        _ratio("from process start to the first POST ÷ to the answer of a tool that does nothing", with_post, 1.1),
        _later(f"from the first purchase {PAUSE_S:g} s after the list of tools to its POST", later_post),
    ]
    if without_answers[0][0][1] is not None:
        cpu = middle([project[1] / bare[1] for project, bare in without_answers])  # pyright: ignore[reportOperatorIssue]
        figures.append(
            Figure(
                "without recorded answers, by CPU time", cpu, "×", None, "other work on the machine hardly changes it"
            )
        )
    note = ", ".join(early) or "none of " + ", ".join(LATE[:4]) + ", HTML"
    figures.append(Figure("modules for calls that are loaded before the first call", len(early), "", 0, note))
    figures.append(Figure(f"memory after {calls} free calls", memory, "MB", 85))
    return figures


Pairs = list[tuple[tuple[float, float | None], tuple[float, float | None]]]


def _ratio(name: str, pairs: Pairs, limit: float | None) -> Figure:
    ratios = [project[0] / bare[0] for project, bare in pairs]
    project_ms, bare_ms = (middle([times[0] for times in side]) * 1000 for side in zip(*pairs, strict=True))
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    note = f"median of {len(pairs)} interleaved pairs, {spread}; {project_ms:.0f} and {bare_ms:.0f} ms"
    return Figure(name, middle(ratios), "×", limit, note)


def _later(name: str, pairs: Pairs) -> Figure:
    """Return the time of a first call that comes after the start. It has no target: all modules are loaded then."""
    project_ms, bare_ms = ([times[0] * 1000 for times in side] for side in zip(*pairs, strict=True))
    note = f"median of {len(pairs)} starts, {min(project_ms):.0f} to {max(project_ms):.0f} ms"
    note += (
        f"; the first no-op of a bare MCPServer {middle(bare_ms):.1f} ms, {min(bare_ms):.0f} to {max(bare_ms):.0f} ms"
    )
    return Figure(name, middle(project_ms), "ms", None, note)


def _start(server: str, env: dict[str, str], tool: str = "") -> tuple[float, float | None]:
    """Return the wall time and the CPU time from the process start to the list of tools, or to the answer of a tool."""
    started_at = time.perf_counter()
    with Pipe(SERVERS[server], env) as pipe:
        pipe.initialize()
        if tool:
            pipe.call(tool, ARGUMENTS[tool])
        return time.perf_counter() - started_at, cpu_s(pipe.process.pid)


def _later_call(server: str, env: dict[str, str], tool: str) -> tuple[float, None]:
    """Return the wall time of the first call, some time after the list of tools, as a person causes it."""
    with Pipe(SERVERS[server], env) as pipe:
        pipe.initialize()
        time.sleep(PAUSE_S)
        return timed(lambda: pipe.call(tool, ARGUMENTS[tool])), None


def _first_post(env: dict[str, str], evolink: Standin, number: int, pause_s: float = 0.0) -> tuple[float, None]:
    """Return the wall time from the process start to the arrival of the first purchase at the simulated EvoLink.

    With a pause after the list of tools, the time begins at the end of the pause.
    """
    started_at = time.time()
    with Pipe(SERVERS["ours"], env | {"EVOLINK_BASE_URL": f"http://127.0.0.1:{evolink.port}"}) as pipe:
        pipe.initialize()
        if pause_s:
            time.sleep(pause_s)
            started_at = time.time()
        # The ID is in the answer as soon as EvoLink has accepted the purchase.
        answer = pipe.call("generate_image", {"prompt": f"sim:fast start {number}", "wait_seconds": 0})
        return evolink.record()["purchased_at"][answer["structuredContent"]["task_id"]] - started_at, None


def _loaded_modules(env: dict[str, str]) -> tuple[set[str], list[str]]:
    request_read, request_write = os.pipe()
    report_read, report_write = os.pipe()
    with Pipe(
        ["-P", "-c", REPORTER_SCRIPT, str(request_read), str(report_write)], env, fds=(request_read, report_write)
    ) as pipe:
        os.close(request_read)
        os.close(report_write)
        pipe.initialize()
        pipe.wait_until_ready()
        os.write(request_write, b".")
        with open(report_read, "rb") as file:
            modules, pages = json.load(file)
        os.close(request_write)
    return set(modules), [Path(page).name for page in pages]


def _memory_after_calls(env: dict[str, str]) -> tuple[float, int]:
    with Pipe(SERVERS["ours"], env) as pipe:
        pipe.initialize()
        for _ in range(8):
            pipe.call("compute_size", {"size": "16:9", "resolution": "2K"})
        for _ in range(2):
            pipe.call("list_tasks", {})
        return memory_mb(pipe.process.pid), 10
