"""Measure the server's own share of a job, over stdio: from the call to the POST, and from "completed" to the answer.

The share excludes EvoLink's time, the detection lag and the download. It includes the journal, the connection, the check
and the save of the file, and the preview.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.figures import Figure, middle
from benchmarks.processes import SERVERS, Pipe, Standin, environment, standin

TITLE = "Own share of one job"


def run(quick: bool) -> list[Figure]:
    repeats = 2 if quick else 7
    figures: list[Figure] = []
    kinds = {"1K": {"size": "1:1", "resolution": "1K"}, "4K": {"size": "16:9", "resolution": "4K"}}
    for kind in ("4K",) if quick else kinds:
        with (
            standin(kind) as evolink,
            tempfile.TemporaryDirectory(prefix="benchmark-") as name,
            Pipe(SERVERS["ours"], environment(Path(name), evolink.port)) as pipe,
        ):
            pipe.initialize()
            pipe.wait_until_ready()
            first, *later = [_job(pipe, evolink, kinds[kind], number) for number in range(repeats + 1)]
        before, after = (middle([job[part] for job in later]) for part in (0, 1))
        figures += [
            Figure(f"own share of one {kind} image", middle([sum(job) for job in later]), "s", 0.5,
                   f"before the purchase {before:.3f} s, after “completed” {after:.3f} s"),
            Figure(f"the same for the first {kind} image of a server", sum(first), "s", 0.5,
                   f"before the purchase {first[0]:.3f} s, after “completed” {first[1]:.3f} s"),
        ]  # fmt: skip
    return figures


def _job(pipe: Pipe, evolink: Standin, size: dict[str, str], number: int) -> tuple[float, float]:
    """Return the server's own seconds before the POST and after the poll that detected the end."""
    called_at = time.time()
    answer = pipe.call("generate_image", {"prompt": f"sim:slow=1.5 picture {number}", "wait_seconds": 60, **size})
    answered_at = time.time()
    facts = answer["structuredContent"]
    if answer.get("isError") or not all(image["path"] for image in facts["images"]):
        raise RuntimeError(f"the tool failed: {answer['content'][0]['text'][:300]}")
    task_id = facts["task_id"]
    record = evolink.record()
    download_s = sum(ended_at - started_at for started_at, ended_at in record["downloads"][task_id])
    return record["purchased_at"][task_id] - called_at, answered_at - record["end_reported_at"][task_id] - download_s
