"""Our own share of one finished job, over stdio: from the call to the purchase, and from "completed" to the answer.

Taken off are EvoLink's time, the lag of the look that found the end, and the download; left are the journal, the
connection, checking and saving the file, and the preview.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.figures import Figure, middle
from benchmarks.processes import SERVERS, Pipe, Standin, environment, standin

TITLE = "Our share of one job"


def run(quick: bool) -> list[Figure]:
    repeats = 2 if quick else 7
    figures: list[Figure] = []
    kinds = {"1K": {"size": "1:1", "resolution": "1K"}, "4K": {"size": "16:9", "resolution": "4K"}}
    for kind in ("4K",) if quick else kinds:
        with (
            standin(kind) as at,
            tempfile.TemporaryDirectory(prefix="benchmark-") as name,
            Pipe(SERVERS["ours"], environment(Path(name), at.port)) as pipe,
        ):
            pipe.greet()
            pipe.ready()
            first, *later = [_job(pipe, at, kinds[kind], number) for number in range(repeats + 1)]
        before, after = (middle([one[part] for one in later]) for part in (0, 1))
        figures += [
            Figure(f"our share of one {kind} picture", middle([sum(one) for one in later]), "s", 0.5,
                   f"before the purchase {before:.3f} s, after “completed” {after:.3f} s"),
            Figure(f"the same for the first {kind} picture of a server", sum(first), "s", 0.5,
                   f"before the purchase {first[0]:.3f} s, after “completed” {first[1]:.3f} s"),
        ]  # fmt: skip
    return figures


def _job(pipe: Pipe, at: Standin, size: dict[str, str], number: int) -> tuple[float, float]:
    """Our seconds before the purchase and after the look that found the end."""
    asked = time.time()
    answer = pipe.call("generate_image", {"prompt": f"sim:slow=1.5 picture {number}", "wait_seconds": 60, **size})
    answered = time.time()
    facts = answer["structuredContent"]
    if answer.get("isError") or not all(image["path"] for image in facts["images"]):
        raise RuntimeError(f"the tool failed: {answer['content'][0]['text'][:300]}")
    task_id, seen = facts["task_id"], at.seen()
    fetched = sum(end - begin for begin, end in seen["fetched"][task_id])
    return seen["bought"][task_id] - asked, answered - seen["told"][task_id] - fetched
