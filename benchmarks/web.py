"""A crowd over HTTP: callers who all wait for a picture, what they cost, and how soon each has it in the end."""

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
ASKED_EVERY_S = 0.02
GIVE_UP_S = 240.0
HEAD = (
    "POST /mcp HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: application/json, text/event-stream\r\n"
    "content-type: application/json\r\nmcp-protocol-version: 2025-06-18\r\ncontent-length: {}\r\n\r\n"
)


def run(quick: bool) -> list[Figure]:
    few = _crowd(100 if quick else 1000, 3 if quick else 10)
    figures = [
        Figure(f"extra memory for {few['callers']:,} waiting callers", few["extra_mb"], "MB", 150,
               f"from {few['before_mb']:.0f} MB; {1024 * few['extra_mb'] / few['callers']:.0f} KB each"),
        Figure("compute_size beside them, 99 of 100", few["beside_p99_ms"], "ms", 100,
               f"half below {few['beside_ms']:.1f} ms, the longest {few['beside_max_ms']:.0f} ms, of {few['asked']}"),
        Figure("longest wait for compute_size beside them", few["beside_max_ms"], "ms", 100, "a stall of the loop and its work"),
        Figure("share of one core while they wait", 100 * few["share"], "%"),
        Figure("lag when all end within one second, 95 of 100", few["lag_p95"], "s", 5,
               f"half below {few['lag_p50']:.1f} s; {few['cpu_ms']:.1f} ms of processor time a picture"),
        Figure(f"callers without their picture, of {few['callers']:,}", few["lost"], "", 0),
    ]  # fmt: skip
    large = _crowd(8 if quick else 40, 1, "4K", 0.5, "auto")
    figures += [
        Figure(f"lag when {large['callers']} 4K pictures end within half a second, half of them", large["lag_p50"], "s", 3,
               f"10 of 100 within {large['lag_p10']:.1f} s, 95 within {large['lag_p95']:.1f} s; with check and preview"),
    ]  # fmt: skip
    if not quick:
        many = _crowd(5000, 5)
        figures += [
            Figure("callers without their picture, of 5,000", many["lost"], "", 0,
                   f"lag of 95 of 100 {many['lag_p95']:.0f} s; {many['extra_mb']:.0f} MB more"),
        ]  # fmt: skip
    return figures


def _crowd(
    callers: int, window_s: float, pictures: str = "dot", end_within_s: float = 1.0, preview: str = "off"
) -> dict[str, float]:
    with standin(pictures) as at, tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        port = free_port()
        env = environment(Path(name), at.port) | {"EVOLINK_MCP_WAIT_SECONDS": "600", "EVOLINK_MCP_PREVIEW": preview}
        command = [sys.executable, "-P", "-m", "evolink_mcp", "http", "--port", str(port)]
        server = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
        try:
            return asyncio.run(_watch(at, server.pid, port, callers, window_s, end_within_s))
        finally:
            server.kill()
            server.wait()


async def _watch(
    at: Standin, pid: int, port: int, callers: int, window_s: float, end_within_s: float
) -> dict[str, float]:
    await _up(port)
    warm = [asyncio.create_task(_picture(port, f"sim:slow=0.2 the first {number}")) for number in range(5)]
    await asyncio.gather(*warm)
    for _ in range(20):
        await _call(port, "compute_size", {"size": "16:9"})
    before_mb = memory_mb(pid)
    calls = [asyncio.create_task(_picture(port, f"sim:slow=100000 picture {number}")) for number in range(callers)]
    while (await asyncio.to_thread(at.seen))["counts"].get("bought", 0) < callers + len(warm):
        await asyncio.sleep(0.2)
    await asyncio.sleep(SETTLE_S)
    extra_mb, idle_cpu, began = memory_mb(pid) - before_mb, cpu_s(pid) or 0.0, time.monotonic()
    asked: list[float] = []
    while time.monotonic() - began < window_s:
        started = time.monotonic()
        await _call(port, "compute_size", {"size": "16:9"})
        asked.append(1000 * (time.monotonic() - started))
        await asyncio.sleep(ASKED_EVERY_S)
    core = ((cpu_s(pid) or 0.0) - idle_cpu) / (time.monotonic() - began)
    busy_cpu = cpu_s(pid) or 0.0
    await asyncio.to_thread(at.end_all, end_within_s)
    answers = await asyncio.gather(*calls, return_exceptions=True)
    ends = (await asyncio.to_thread(at.seen))["ends"]
    good = [one for one in answers if not isinstance(one, BaseException) and one[1]]
    lags = [came - ends[task_id] for came, task_id in good] or [math.inf]
    return {
        "callers": callers, "before_mb": before_mb, "extra_mb": extra_mb, "share": core, "asked": len(asked),
        "beside_ms": middle(asked), "beside_p99_ms": share(asked, 0.99), "beside_max_ms": max(asked),
        "lag_p50": middle(lags), "lag_p95": share(lags, 0.95), "lost": callers - len(good),
        "lag_p10": share(lags, 0.1),
        "cpu_ms": 1000 * ((cpu_s(pid) or 0.0) - busy_cpu) / callers,
    }  # fmt: skip


async def _picture(port: int, prompt: str) -> tuple[float, str]:
    """When the answer with a saved picture came, and the task's id; an empty id if there is no picture."""
    answer = await _call(port, "generate_image", {"prompt": prompt, "size": "1:1", "quality": "low"})
    task = answer.get("structuredContent", {})
    saved = task.get("status") == "completed" and all(image.get("path") for image in task.get("images", []))
    return time.time(), task["task_id"] if saved else ""


async def _call(port: int, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
    params = {"name": tool, "arguments": arguments}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(HEAD.format(len(body)).encode() + body)
        async with asyncio.timeout(GIVE_UP_S):
            while line := await reader.readline():
                if line.startswith(b"data: {") and (message := json.loads(line[6:])).get("id") == 1:
                    return message["result"]
        raise ConnectionError("the connection ended before the answer")
    finally:
        writer.close()


async def _up(port: int) -> None:
    async with asyncio.timeout(60):
        while True:
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.05)
