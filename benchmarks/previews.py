"""Order ten 4K images in one call of the real tool. Measure the stalls of the event loop and the size of the answer."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
from mcp.client import Client
from mcp_types import Implementation

from benchmarks.figures import Figure, middle
from benchmarks.processes import environment, standin, timed
from benchmarks.standin import draw
from evolink_mcp.app.wiring import open_studio
from evolink_mcp.images.previews import check_and_preview, preview
from evolink_mcp.server.server import build_server
from evolink_mcp.teams.settings import TeamSettings
from evolink_mcp.tools.hosts import UNKNOWN

TITLE = "Previews"
TICK_S = 0.005
KINDS = (("4K", "4K images"), ("noise", "4K images of noise"))
CLIENT = Implementation(name="benchmark", version="1")  # the default names of SDKs get no previews
REQUEST = {"size": "16:9", "resolution": "4K", "n": 10, "wait_seconds": 120}


def run(quick: bool) -> list[Figure]:
    repeats, rounds = (3, 1) if quick else (7, 5)
    figures: list[Figure] = []
    for kind, label in KINDS[:1] if quick else KINDS:
        preview_s, size, ratio = _measure_preview(kind, repeats)
        with standin(kind) as evolink:
            answers = [anyio.run(_measure_answer, evolink.port) for _ in range(rounds)]
        measurements = answers[0]
        figures += [
            Figure(f"longest stall of the event loop, ten {label}",
                   1000 * middle([max(answer.stalls) for answer in answers]), "ms", 50,
                   f"median of {rounds}; idle before {1000 * middle([max(answer.idle) for answer in answers]):.0f} ms, "
                   f"longest write to disk in it {1000 * middle([max(answer.write_s) for answer in answers]):.0f} ms"),
            Figure(f"characters of the answer, ten {label}", measurements.characters, "", 900_000,
                   f"{measurements.previews} previews, {middle([answer.duration_s for answer in answers]):.1f} s with download"),
            Figure(f"one preview of {label}", 1000 * preview_s, "ms", None, f"{size:,} bytes of WebP"),
            Figure(f"check and preview of {label} from one decoding ÷ from two", ratio, "×", 0.8,
                   f"median of {repeats} pairs"),
        ]  # fmt: skip
    return figures


def _measure_preview(kind: str, repeats: int) -> tuple[float, int, float]:
    """Return the seconds for one preview, its bytes, and the time of check and preview together ÷ one after the other."""
    content = draw(kind)[0]
    budget = UNKNOWN.answer_max * 3 // 4
    small = preview(content, 1024, budget)
    seconds = [timed(lambda: preview(content, 1024, budget)) for _ in range(repeats)]
    ratios = [
        timed(lambda: check_and_preview(content, 1024)) / (timed(lambda: check_and_preview(content, 0)) + preview_s)
        for preview_s in seconds
    ]
    return middle(seconds), len(small or b""), middle(ratios)


def _time_updates(journal: Any, seconds: list[float]) -> None:
    """Record how long the journal takes to record a saved image."""
    update_images = journal.update_images

    async def timed_update(*arguments: Any) -> bool:
        started_at = time.perf_counter()
        try:
            return await update_images(*arguments)
        finally:
            seconds.append(time.perf_counter() - started_at)

    journal.update_images = timed_update


@dataclass
class _Measurements:
    """Measurements of one answer. Stalls are in seconds beyond the tick."""

    idle: list[float] = field(default_factory=lambda: [0.0])
    stalls: list[float] = field(default_factory=lambda: [0.0])
    write_s: list[float] = field(default_factory=lambda: [0.0])
    characters: int = 0
    previews: int = 0
    duration_s: float = 0.0


async def _measure_answer(port: int) -> _Measurements:
    measurements = _Measurements()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        settings = TeamSettings.from_environment(environment(Path(name), port))
        async with (
            open_studio(settings) as studio,
            Client(build_server(studio), client_info=CLIENT) as client,
            anyio.create_task_group() as group,
        ):
            # The first image also imports modules and reads the system's certificates.
            await client.call_tool("generate_image", {"prompt": "sim:slow=0.5 a first one", "wait_seconds": 60})
            ticks: list[float] = measurements.idle

            async def tick() -> None:
                while True:
                    before = time.perf_counter()
                    await anyio.sleep(TICK_S)
                    ticks.append(time.perf_counter() - before - TICK_S)

            group.start_soon(tick)
            await anyio.sleep(1)
            ticks = measurements.stalls
            _time_updates(studio.journal, measurements.write_s)
            started_at = time.perf_counter()
            answer: Any = await client.call_tool("generate_image", {"prompt": "sim:slow=2 ten of them", **REQUEST})
            measurements.duration_s = time.perf_counter() - started_at - 2
            group.cancel_scope.cancel()
    saved_images = [image for image in answer.structured_content["images"] if image["path"]]
    measurements.previews = sum(block.type == "image" for block in answer.content)
    if answer.is_error or len(saved_images) != 10 or measurements.previews != 10:
        raise RuntimeError(f"the tool failed or sent no previews: {answer.content[0].text[:300]}")
    measurements.characters = len(answer.model_dump_json(by_alias=True, exclude_unset=True))
    return measurements
