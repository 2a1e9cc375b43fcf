"""A free call beside a tool that does nothing, and our stdio beside the SDK's."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.figures import Figure, middle
from benchmarks.processes import SERVERS, Pipe, environment, timed

TITLE = "Calls"
AT_ONCE = 50
SIZE = {"size": "16:9", "resolution": "2K"}


def run(quick: bool) -> list[Figure]:
    rounds, calls = (6, 40) if quick else (20, 60)
    single: dict[str, list[float]] = {name: [] for name in SERVERS}
    many: dict[str, list[float]] = {name: [] for name in SERVERS}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder, ExitStack() as stack:
        env = environment(Path(folder))
        pipes = {name: stack.enter_context(Pipe(SERVERS[name], env)) for name in SERVERS}
        what = {name: ("compute_size", SIZE) if name == "ours" else ("nothing", {"word": "x"}) for name in SERVERS}
        for name, pipe in pipes.items():
            pipe.greet()
            for _ in range(30):
                pipe.call(*what[name])
        for _ in range(rounds):
            for name, pipe in pipes.items():
                single[name] += [timed(lambda pipe=pipe, name=name: pipe.call(*what[name])) for _ in range(calls)]
                many[name].append(timed(lambda pipe=pipe, name=name: pipe.flood(*what[name], AT_ONCE)) / AT_ONCE)
    one = {name: middle(times) * 1000 for name, times in single.items()}
    rate = {name: 1 / middle(times) for name, times in many.items()}
    return [
        Figure("compute_size − a tool that does nothing, both on our stdio", one["ours"] - one["empty"], "ms", 0.2,
               f"{one['ours']:.2f} and {one['empty']:.2f} ms, one call at a time"),
        Figure("that empty tool on the SDK's stdio ÷ on ours, one call at a time", one["bare"] / one["empty"], "×", None,
               f"{one['bare']:.2f} and {one['empty']:.2f} ms"),
        Figure(f"calls a second on our stdio ÷ the SDK's, {AT_ONCE} at once", rate["empty"] / rate["bare"], "×", None,
               f"{rate['empty']:,.0f} and {rate['bare']:,.0f} calls/s; compute_size {rate['ours']:,.0f}"),
    ]  # fmt: skip
