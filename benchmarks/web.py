"""Measure many callers over HTTP that wait for an image: memory, CPU time, and the lag of their answers."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, middle, share
from benchmarks.processes import ROOT, Standin, cpu_s, environment, free_port, memory_mb, standin

TITLE = "Many at once over HTTP"
SETTLE_S = 5.0
CALL_INTERVAL_S = 0.02
TIMEOUT_S = 600.0  # 5,000 callers buy for up to 200 s before the first image is ready
HEAD = (
    "POST /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: application/json, text/event-stream\r\n"
    "content-type: application/json\r\nmcp-protocol-version: 2025-06-18\r\ncontent-length: {}\r\n\r\n"
)


# The growth with the number of waiting callers. The last one has targets.
CALLERS = (10, 100, 1000)
CALLERS_QUICK = (10, 100)


def run(quick: bool) -> list[Figure]:
    results = [_measure_crowd(callers, 3 if quick else 10) for callers in (CALLERS_QUICK if quick else CALLERS)]
    largest = results[-1]
    figures = [
        *(
            Figure(f"extra memory for {crowd['callers']:,} waiting callers", crowd["extra_mb"], "MB", None,
                   f"compute_size {crowd['beside_ms']:.1f} ms, {100 * crowd['share']:.0f} % of a core; when all end within "
                   f"one second, the lag of 95 % is below {crowd['lag_p95']:.1f} s")
            for crowd in results[:-1]
        ),
        Figure(f"extra memory for {largest['callers']:,} waiting callers", largest["extra_mb"], "MB", 150,
               f"from {largest['before_mb']:.0f} MB; {1024 * largest['extra_mb'] / largest['callers']:.0f} KB per caller"),
        Figure("compute_size meanwhile, 99 % within", largest["beside_p99_ms"], "ms", 100,
               f"50 % below {largest['beside_ms']:.1f} ms, maximum {largest['beside_max_ms']:.0f} ms, {largest['calls']} calls"),
        Figure("longest compute_size meanwhile", largest["beside_max_ms"], "ms", 100, "a stall of the event loop and the call"),
        Figure("share of one core while they wait", 100 * largest["share"], "%"),
        Figure("detection lag when all tasks end within one second, 95 % within", largest["lag_p95"], "s", 5,
               f"50 % below {largest['lag_p50']:.1f} s; {largest['cpu_ms']:.1f} ms of CPU time per image"),
        Figure(f"callers without their image, of {largest['callers']:,}", largest["lost"], "", 0),
    ]  # fmt: skip
    large = _measure_crowd(8 if quick else 40, 1, "4K", 0.5, "auto")
    figures += [
        Figure(f"detection lag when {large['callers']} 4K images end within half a second, 50 % within", large["lag_p50"], "s", 3,
               f"10 % within {large['lag_p10']:.1f} s, 95 % within {large['lag_p95']:.1f} s; with check and preview"),
    ]  # fmt: skip
    if not quick:
        many = _measure_crowd(5000, 5)
        figures += [
            Figure("callers without their image, of 5,000", many["lost"], "", 0,
                   f"lag of 95 % within {many['lag_p95']:.0f} s; {many['extra_mb']:.0f} MB of extra memory"),
        ]  # fmt: skip
    return figures


def _measure_crowd(
    callers: int, window_s: float, pictures: str = "dot", end_within_s: float = 1.0, preview: str = "off"
) -> dict[str, float]:
    with standin(pictures) as evolink, tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        port = free_port()
        env = environment(Path(name), evolink.port) | {
            "EVOLINK_MCP_WAIT_SECONDS": "600",
            "EVOLINK_MCP_PREVIEW": preview,
        }
        command = [sys.executable, "-P", "-m", "evolink_mcp", "http", "--port", str(port)]
        server = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
        try:
            return asyncio.run(_watch(evolink, server.pid, port, callers, window_s, end_within_s))
        finally:
            server.kill()
            server.wait()


async def _watch(
    evolink: Standin, pid: int, port: int, callers: int, window_s: float, end_within_s: float
) -> dict[str, float]:
    await _wait_until_up(port)
    first_calls = [asyncio.create_task(_buy_image(port, f"sim:slow=0.2 the first {number}")) for number in range(5)]
    await asyncio.gather(*first_calls)
    for _ in range(20):
        await _call(port, "compute_size", {"size": "16:9"})
    before_mb = memory_mb(pid)
    calls = [asyncio.create_task(_buy_image(port, f"sim:slow=100000 picture {number}")) for number in range(callers)]
    while (await asyncio.to_thread(evolink.record))["counts"].get("purchases", 0) < callers + len(first_calls):
        await asyncio.sleep(0.2)
    await asyncio.sleep(SETTLE_S)
    extra_mb = memory_mb(pid) - before_mb
    idle_cpu = cpu_s(pid) or 0.0
    started_at = time.monotonic()
    durations: list[float] = []
    while time.monotonic() - started_at < window_s:
        called_at = time.monotonic()
        await _call(port, "compute_size", {"size": "16:9"})
        durations.append(1000 * (time.monotonic() - called_at))
        await asyncio.sleep(CALL_INTERVAL_S)
    core = ((cpu_s(pid) or 0.0) - idle_cpu) / (time.monotonic() - started_at)
    busy_cpu = cpu_s(pid) or 0.0
    await asyncio.to_thread(evolink.end_all, end_within_s)
    answers = await asyncio.gather(*calls, return_exceptions=True)
    ends = (await asyncio.to_thread(evolink.record))["ends"]
    answers_with_image = [answer for answer in answers if not isinstance(answer, BaseException) and answer[1]]
    lags = [answered_at - ends[task_id] for answered_at, task_id in answers_with_image] or [math.inf]
    return {
        "callers": callers, "before_mb": before_mb, "extra_mb": extra_mb, "share": core, "calls": len(durations),
        "beside_ms": middle(durations), "beside_p99_ms": share(durations, 0.99), "beside_max_ms": max(durations),
        "lag_p50": middle(lags), "lag_p95": share(lags, 0.95), "lost": callers - len(answers_with_image),
        "lag_p10": share(lags, 0.1),
        "cpu_ms": 1000 * ((cpu_s(pid) or 0.0) - busy_cpu) / callers,
    }  # fmt: skip


async def _buy_image(port: int, prompt: str) -> tuple[float, str]:
    """Return the time of the answer, and the task ID; an empty ID if no image was saved."""
    answer = await _call(port, "generate_image", {"prompt": prompt, "size": "1:1", "quality": "low"})
    task = answer.get("structuredContent", {})
    is_saved = task.get("status") == "completed" and all(image.get("path") for image in task.get("images", []))
    return time.time(), task["task_id"] if is_saved else ""


async def _call(port: int, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
    params = {"name": tool, "arguments": arguments}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(HEAD.format(len(body)).encode() + body)
        async with asyncio.timeout(TIMEOUT_S):
            while line := await reader.readline():
                if line.startswith(b"data: {") and (message := json.loads(line[6:])).get("id") == 1:
                    return message["result"]
        raise ConnectionError("the connection ended before the answer")
    finally:
        writer.close()


async def _wait_until_up(port: int) -> None:
    async with asyncio.timeout(60):
        while True:
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.05)
