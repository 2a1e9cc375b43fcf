"""Measure a thousand waiting jobs in one process, with and without batch polls.

`python -m benchmarks.crowd PORT JOBS SETTLE_S WINDOW_S END_S` is the process that waits. It buys JOBS images, waits
SETTLE_S seconds for the first polls, and measures itself for WINDOW_S seconds while all tasks run. Then it follows every
job to its end and prints the figures as JSON. The tasks end over END_S seconds; with 0 the process exits before. The
memory is measured without calls, the CPU time with one call per job.
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
from evolink_mcp.teams.settings import TeamSettings
from evolink_mcp.tools.waiting import follow

TITLE = "Many at once"
WAIT_S = 600.0
ACCEPTED_PER_S = 40


def run(quick: bool) -> list[Figure]:
    jobs, settle, window, end = (150, 7, 4, 2) if quick else (1000, 15, 15, 20)

    def wait(*, batch: bool) -> dict[str, Any]:
        with standin(batch=batch) as evolink:
            return _wait(evolink, jobs, settle, window, end if batch else 0)

    # Both processes may run together in the quick mode: CPU time and memory are measured per process.
    with ThreadPoolExecutor(2 if quick else 1) as pool:
        with_batches = pool.submit(wait, batch=True)
        without_batches = pool.submit(wait, batch=False)
        batched = with_batches.result()
        single = without_batches.result()
    return [
        Figure(f"share of one core while {jobs} jobs wait", 100 * batched["share"], "%", 60,
               f"for {window} s, with one call per job"),
        Figure(f"extra memory for {jobs} waiting jobs", batched["extra_mb"], "MB", 15,
               f"from {batched['before_mb']:.0f} MB; {batched['calls_mb']:.0f} MB with one call per job"),
        Figure(f"jobs lost of {jobs}", jobs - batched["saved"], "", 0, "jobs without a saved file at the end"),
        Figure("HTTP requests per second with batch polls", batched["rate"], "/s", None,
               f"{batched['polls_per_s']:.0f} polls per second in them"),
        Figure("HTTP requests per second with single polls only", single["rate"], "/s", None,
               f"{100 * single['share']:.0f} % of a core"),
        Figure("HTTP requests per poll, batch ÷ single", batched["rate"] / batched["polls_per_s"], "",
               None if quick else 0.05, "the target is for 1,000 tasks"),
        Figure("CPU time per job, from request to file", batched["cpu_ms_per_job"], "ms"),
    ]  # fmt: skip


def _wait(evolink: Standin, *numbers: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.crowd", str(evolink.port), *map(str, numbers)]
    process = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if process.returncode:
        raise RuntimeError(f"the waiting process failed:\n{process.stderr[-2000:]}")
    return json.loads(process.stdout)


async def _work(evolink: Standin, jobs: int, settle: float, window: float, end: float) -> None:
    dice = random.Random(4)
    followed_jobs: list[Job] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        settings = TeamSettings.from_environment(environment(Path(name), evolink.port))
        async with open_studio(settings) as studio, anyio.create_task_group() as calls:

            async def order(prompt: str) -> Job:
                request = GenerationRequest(prompt=prompt, size="1:1", quality="low")
                return await studio.order(ImageRequest(request, studio.prices.current.ceiling(request)))

            # Exclude the memory of one-time imports and connections.
            with anyio.fail_after(30):
                for prompt in ("sim:slow=0.5 the first", "sim:slow=0.5 the second"):
                    await follow(await order(prompt), WAIT_S, _ignore_progress)
            before_mb, before_cpu = memory_mb(), _cpu()
            for number in range(jobs):
                task_s = jobs / ACCEPTED_PER_S + settle + window + end * dice.random()
                followed_jobs.append(await order(f"sim:slow={task_s:.1f} picture {number}"))
            await _wait_until_accepted(followed_jobs)
            await anyio.sleep(settle)
            alone_mb = memory_mb()
            for job in followed_jobs:
                calls.start_soon(follow, job, WAIT_S, _ignore_progress)
            counts_before = await _counts(evolink)
            cpu, clock = _cpu(), time.monotonic()
            await anyio.sleep(window)
            with_calls_mb = memory_mb()
            duration_s = time.monotonic() - clock
            share = (_cpu() - cpu) / duration_s
            requests, polls = (
                (after - before) / duration_s
                for before, after in zip(counts_before, await _counts(evolink), strict=True)
            )
            for job in followed_jobs if end else ():
                async with aclosing(job.states()) as states:
                    async for _ in states:
                        pass
            calls.cancel_scope.cancel()
            saved_count = sum(
                job.entry.stage is not Stage.OPEN and all(p.is_saved for p in job.entry.images) for job in followed_jobs
            )
            figures = {
                "share": share, "before_mb": before_mb, "extra_mb": alone_mb - before_mb, "calls_mb": with_calls_mb - before_mb,
                "saved": saved_count, "rate": requests, "polls_per_s": polls,
                "cpu_ms_per_job": 1000 * (_cpu() - before_cpu) / jobs,
            }  # fmt: skip
    print(json.dumps(figures))


async def _counts(evolink: Standin) -> tuple[int, int]:
    """Return the number of HTTP requests that polled tasks so far, and of the polls in them."""
    counts = (await anyio.to_thread.run_sync(evolink.record))["counts"]
    single, batch, batched_polls = (counts.get(word, 0) for word in ("single", "batch", "batched polls"))
    return single + batch, single + batched_polls


async def _wait_until_accepted(jobs: list[Job]) -> None:
    while any(job.entry.task is None for job in jobs):
        if any(job.is_finished for job in jobs):
            problem = next(job.problem for job in jobs if job.is_finished)
            raise RuntimeError(f"a job ended before all were accepted: {problem}")
        await anyio.sleep(0.2)


async def _ignore_progress(progress: float, total: float, message: str) -> None:
    """Ignore progress."""


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    port, jobs, *numbers = sys.argv[1:]
    anyio.run(_work, Standin(int(port)), int(jobs), *map(float, numbers))
