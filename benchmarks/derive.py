"""Make 25 files from one 4K image. Measure the time of each file, and of the call with the decoder process."""

from __future__ import annotations

import io
import time
from contextlib import closing

import anyio

from benchmarks.figures import Figure, middle
from benchmarks.standin import draw
from evolink_mcp.api.targets import Target, parse_target
from evolink_mcp.app.environment import decoder_environment
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.images.derive import DerivePlan, derive
from evolink_mcp.studio.derive import DeriveRequest, output_of

TITLE = "Derived files"
TARGETS = (
    "og facebook-cover twitter twitter-header instagram-square instagram-portrait instagram-story youtube-thumbnail "
    "youtube-banner linkedin linkedin-banner pinterest hd full-hd 4k favicon windows-icon apple-touch-icon app-icon "
    "android-icon a4-300dpi a5 letter 1200x628 728x90"
)
KINDS = (("4K", "a 4K image"), ("noise", "a 4K image of noise"))


def run(quick: bool) -> list[Figure]:
    targets = tuple(parse_target(name) for name in TARGETS.split())
    figures: list[Figure] = []
    for kind, label in KINDS[:1] if quick else KINDS:
        content = draw(kind)[0]
        rounds = [_times(content, targets) for _ in range(2 if quick else 5)]
        each_ms = {
            target.name: 1000 * middle([times[number] for times in rounds]) for number, target in enumerate(targets)
        }
        slowest = max(each_ms, key=each_ms.__getitem__)
        call_s = middle([anyio.run(_call, content, targets) for _ in range(1 if quick else 3)])
        goal = 300 if kind == "4K" else None
        figures += [
            Figure(f"slowest of {len(targets)} files from {label}", each_ms[slowest], "ms", goal,
                   f"{slowest}; median of the files {middle(list(each_ms.values())):.0f} ms, "
                   f"fastest {min(each_ms.values()):.0f} ms"),
            Figure(f"one call for {len(targets)} files from {label} ÷ number of files", 1000 * call_s / len(targets), "ms",
                   goal, f"{call_s:.1f} s in the decoder process, with its start and the decoding"),
        ]  # fmt: skip
    return figures


def _plan(targets: tuple[Target, ...]) -> DerivePlan:
    request = DeriveRequest(targets)
    return DerivePlan(tuple(output_of(target, request, "image/png") for target in targets))


def _times(content: bytes, targets: tuple[Target, ...]) -> list[float]:
    """Return the CPU seconds of each file, without the decoding of the source."""
    parts = derive(content, _plan(targets))
    next(parts)
    seconds: list[float] = []
    started = time.process_time()
    for _ in parts:
        seconds.append(time.process_time() - started)
        started = time.process_time()
    return seconds


async def _call(content: bytes, targets: tuple[Target, ...]) -> float:
    with closing(Decoder(decoder_environment())) as decoder:
        started = time.perf_counter()
        await decoder.derive(io.BytesIO(content), _plan(targets), io.BytesIO())
        return time.perf_counter() - started
