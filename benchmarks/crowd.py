"""A thousand waiting jobs in one process, with and without batch reads.

`python -m benchmarks.crowd PORT JOBS SETTLE_S WINDOW_S END_S` is the process that waits: it buys JOBS pictures, lets
the first looks pass for SETTLE_S seconds, measures itself for WINDOW_S while all are under way, follows every job to
its end (they end over END_S seconds; 0: leaves before), and prints what it saw as JSON. Memory is what the jobs
take by themselves; while processor time is measured, a call follows every one of them.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio

from benchmarks.figures import Figure
from benchmarks.processes import ROOT, Standin, environment, memory_mb, standin
from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.app.wiring import open_studio
from evolink_mcp.journal.entry import Stage
from evolink_mcp.studio.jobs import ImageRequest, Job
from evolink_mcp.studio.purchase import price_of
from evolink_mcp.teams.settings import TeamSettings
from evolink_mcp.tools.waiting import follow

TITLE = "Many at once"
WAIT_S = 600.0
ACCEPTED_A_SECOND = 40


def run(quick: bool) -> list[Figure]:
    jobs, settle, window, end = (150, 7, 4, 2) if quick else (1000, 15, 15, 20)

    def wait(*, batch: bool) -> dict[str, Any]:
        with standin(batch=batch) as at:
            return _wait(at, jobs, settle, window, end if batch else 0)

    # Processor time and memory are a process's own: where time is short, both wait at once.
    with ThreadPoolExecutor(2 if quick else 1) as pool:
        together, singly = pool.submit(wait, batch=True), pool.submit(wait, batch=False)
        saw, alone = together.result(), singly.result()
    return [
        Figure(f"share of one core while {jobs} jobs wait", 100 * saw["share"], "%", 60,
               f"for {window} s, every job followed by a call"),
        Figure(f"extra memory for {jobs} waiting jobs", saw["extra_mb"], "MB", 15,
               f"from {saw['before_mb']:.0f} MB; {saw['calls_mb']:.0f} MB with a call on each"),
        Figure(f"jobs lost of {jobs}", jobs - saw["saved"], "", 0, "lost: without a file in the end"),
        Figure("requests a second with batch reads", saw["rate"], "/s", None,
               f"{saw['looks_a_second']:.0f} looks a second in them"),
        Figure("requests a second with single reads only", alone["rate"], "/s", None,
               f"{100 * alone['share']:.0f} % of a core"),
        Figure("requests for one look, batch reads ÷ single reads", saw["rate"] / saw["looks_a_second"], "",
               None if quick else 0.05, "promised for 1,000 tasks"),
        Figure("processor time a job, from order to file", saw["cpu_ms_a_job"], "ms"),
    ]  # fmt: skip


def _wait(at: Standin, *numbers: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.crowd", str(at.port), *map(str, numbers)]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"the waiting process failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


async def _work(at: Standin, jobs: int, settle: float, window: float, end: float) -> None:
    dice = random.Random(4)
    followed: list[Job] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        settings = TeamSettings.from_environment(environment(Path(name), at.port))
        async with open_studio(settings) as studio, anyio.create_task_group() as calls:

            async def order(prompt: str) -> Job:
                request = GenerationRequest(prompt=prompt, size="1:1", quality="low")
                return await studio.order(ImageRequest(request, price_of(request, studio.size_rule.possible)))

            # Everything that is opened or imported once is no waiting job's memory.
            with anyio.fail_after(30):
                for prompt in ("sim:slow=0.5 the first", "sim:slow=0.5 the second"):
                    await follow(await order(prompt), WAIT_S, _silent)
            before_mb, before_cpu = memory_mb(), _cpu()
            for number in range(jobs):
                lasts = jobs / ACCEPTED_A_SECOND + settle + window + end * dice.random()
                followed.append(await order(f"sim:slow={lasts:.1f} picture {number}"))
            await _all_accepted(followed)
            await anyio.sleep(settle)
            alone_mb = memory_mb()
            for job in followed:
                calls.start_soon(follow, job, WAIT_S, _silent)
            begin = await _counts(at)
            cpu, clock = _cpu(), time.monotonic()
            await anyio.sleep(window)
            with_calls_mb = memory_mb()
            took = time.monotonic() - clock
            share = (_cpu() - cpu) / took
            requests, looks = ((after - before) / took for before, after in zip(begin, await _counts(at), strict=True))
            for job in followed if end else ():
                async with aclosing(job.states()) as states:
                    async for _ in states:
                        pass
            calls.cancel_scope.cancel()
            saved = sum(
                job.entry.stage is not Stage.OPEN and all(p.is_saved for p in job.entry.images) for job in followed
            )
            seen = {
                "share": share, "before_mb": before_mb, "extra_mb": alone_mb - before_mb, "calls_mb": with_calls_mb - before_mb,
                "saved": saved, "rate": requests, "looks_a_second": looks, "cpu_ms_a_job": 1000 * (_cpu() - before_cpu) / jobs,
            }  # fmt: skip
    print(json.dumps(seen))


async def _counts(at: Standin) -> tuple[int, int]:
    """Requests that read tasks so far, and the looks in them."""
    counts = (await anyio.to_thread.run_sync(at.seen))["counts"]
    single, batch, looks = (counts.get(word, 0) for word in ("single", "batch", "looks in batches"))
    return single + batch, single + looks


async def _all_accepted(followed: list[Job]) -> None:
    while any(job.entry.task is None for job in followed):
        if any(job.finished for job in followed):
            problem = next(job.problem for job in followed if job.finished)
            raise RuntimeError(f"a job ended before all were accepted: {problem}")
        await anyio.sleep(0.2)


async def _silent(progress: float, total: float, message: str) -> None:
    """A host that asked for no progress."""


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    port, jobs, *numbers = sys.argv[1:]
    anyio.run(_work, Standin(int(port)), int(jobs), *map(float, numbers))
