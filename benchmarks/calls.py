"""Compare a free call with a tool that does nothing, and this server's stdio with the SDK's."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.figures import Figure, middle, share
from benchmarks.ledger import fill
from benchmarks.processes import SERVERS, Pipe, environment, timed
from evolink_mcp.journal.entry import account_id_of

TITLE = "Calls"
AT_ONCE = 50
SIZE = {"size": "16:9", "resolution": "2K"}
LIST_SIZE = 50


def run(quick: bool) -> list[Figure]:
    rounds, calls = (6, 40) if quick else (20, 60)
    single_ms: dict[str, list[float]] = {name: [] for name in SERVERS}
    per_call_s: dict[str, list[float]] = {name: [] for name in SERVERS}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder, ExitStack() as stack:
        env = environment(Path(folder))
        account = account_id_of(env["EVOLINK_API_KEY"], env["EVOLINK_BASE_URL"])
        fill(Path(env["EVOLINK_MCP_DATA_DIR"]), 2 * LIST_SIZE, account)
        pipes = {name: stack.enter_context(Pipe(SERVERS[name], env)) for name in SERVERS}
        targets = {name: ("compute_size", SIZE) if name == "ours" else ("nothing", {"word": "x"}) for name in SERVERS}
        for name, pipe in pipes.items():
            pipe.initialize()
            for _ in range(30):
                pipe.call(*targets[name])
        for _ in range(rounds):
            for name, pipe in pipes.items():
                times = [timed(lambda pipe=pipe, name=name: pipe.call(*targets[name])) for _ in range(calls)]
                single_ms[name].append(middle(times) * 1000)
                per_call_s[name].append(
                    timed(lambda pipe=pipe, name=name: pipe.flood(*targets[name], AT_ONCE)) / AT_ONCE
                )
        pipe = pipes["ours"]
        tasks = pipe.call("list_tasks", {"limit": LIST_SIZE})["structuredContent"]["tasks"]
        if len(tasks) != LIST_SIZE:
            raise RuntimeError(f"list_tasks returned {len(tasks)} of {LIST_SIZE} tasks")
        lists = [timed(lambda: pipe.call("list_tasks", {"limit": LIST_SIZE})) * 1000 for _ in range(calls)]
    rate = {name: 1 / middle(times) for name, times in per_call_s.items()}
    return [
        _compare("compute_size ÷ a bare MCPServer's no-op", single_ms["ours"], single_ms["bare"], 1.1),
        _compare("a no-op on this stdio ÷ a bare MCPServer's no-op", single_ms["empty"], single_ms["bare"], 1.1),
        Figure(f"list_tasks of {LIST_SIZE}", middle(lists), "ms", 10, f"95 % within {share(lists, 0.95):.1f} ms"),
        Figure(f"calls per second on this stdio ÷ the SDK's, {AT_ONCE} at once", rate["empty"] / rate["bare"], "×", None,
               f"{rate['empty']:,.0f} and {rate['bare']:,.0f} calls/s; compute_size {rate['ours']:,.0f}"),
    ]  # fmt: skip


def _compare(name: str, times: list[float], reference: list[float], limit: float) -> Figure:
    """Return the median ratio of alternating rounds, with the lowest and the highest."""
    ratios = [time / base for time, base in zip(times, reference, strict=True)]
    note = f"{len(ratios)} rounds, {min(ratios):.2f} to {max(ratios):.2f}; {middle(times):.2f} and {middle(reference):.2f} ms"
    return Figure(name, middle(ratios), "×", limit, note)
