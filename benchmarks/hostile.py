"""Measure the cost of hostile images and silent connections, and the delay of normal callers."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

import anyio
import httpx2 as httpx
from PIL import Image

from benchmarks.figures import Figure
from benchmarks.processes import ROOT, environment, free_port, memory_mb, standin
from evolink_mcp.app.environment import decoder_environment
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.images.structure import SCANS_MAX
from evolink_mcp.images.unusable import UnusableImage

TITLE = "Hostile input"
MIB = 1 << 20
LARGEST = (2880, 2880)
DESCRIPTORS = 256
SAMPLE_EVERY_S = 0.01
HOSTILE_AT_ONCE = 4
HEADERS = {"accept": "application/json, text/event-stream", "content-type": "application/json"}


def run(quick: bool) -> list[Figure]:
    costs = anyio.run(_costs)
    slowest = max(costs, key=lambda name: costs[name][0])
    largest = max(costs, key=lambda name: costs[name][1])
    delay_s, alone_s = anyio.run(_delay)
    silent, callers = (300, 100) if quick else (1_100, 300)
    with standin() as evolink, tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        figures = _under_load(Path(name), evolink.port, silent, callers)
    return [
        Figure("the most expensive hostile image", costs[slowest][0], "s", 3, f"{slowest}; of {len(costs)} kinds"),
        Figure("most memory for one", costs[largest][1], "MiB", 300, largest),
        Figure(f"delay of a normal image beside {HOSTILE_AT_ONCE} hostile images", delay_s, "s", 2,
               f"check of a largest image; {alone_s:.2f} s alone"),
        Figure(f"server's memory for {silent:,} silent connections", figures["silent_mb"], "MB", 30,
               f"at a limit of {DESCRIPTORS} descriptors; {figures['stderr']:,} bytes on stderr"),
        Figure("time until a normal request is answered meanwhile", figures["beside_s"], "s", 15,
               "the server closes silent connections after 10 s"),
        Figure(f"of {callers} callers at once at that limit, answered", figures["served"] + figures["refused"], "", None,
               f"{figures['served']} served, {figures['refused']} got a 503; {figures['lost']} closed before their request"),
        Figure("end after SIGTERM meanwhile", figures["end_s"], "s", 2),
    ]  # fmt: skip


# --- images ---


def _jpeg() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", LARGEST, (9, 9, 9)).save(out, "JPEG", progressive=True, quality=50)
    return out.getvalue()


def _scans(count: int) -> bytes:
    """Return a JPEG of the largest size with `count` scans. The last one is repeated."""
    data = _jpeg()
    last = data.rindex(b"\xff\xda")
    after = last + 2 + struct.unpack(">H", data[last + 2 : last + 4])[0]
    end = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]").search(data, after)
    assert end is not None
    scans = data.count(b"\xff\xda")
    return data[: end.start()] + data[last : end.start()] * (count - scans) + b"\xff\xd9"


def _before_segments(data: bytes) -> bytes:
    """Return a JPEG with these bytes before its first segment."""
    plain = _jpeg()
    return plain[:2] + data + plain[2:]


def _segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(between: bytes) -> bytes:
    """Return a PNG of the largest size, all zero, with these bytes after its header."""
    width, height = LARGEST
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    row = b"\0" + b"\0" * (width * 4)
    pixels = zlib.compress(row * height, 1)
    return b"\x89PNG\r\n\x1a\n" + head + between + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _webp() -> bytes:
    out = io.BytesIO()
    Image.effect_noise(LARGEST, 100).convert("RGBA").save(out, "WEBP", lossless=True, method=0)
    return out.getvalue()


def _webp_chunks() -> bytes:
    return b"RIFF" + struct.pack("<I", 10 * MIB + 4) + b"WEBP" + b"XXXX\0\0\0\0" * (10 * MIB // 8)


# A block with one large entry. Pillow would copy its value.
_EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x10E, 2, 60_000, 26) + bytes(60_010)
_PHOTOSHOP = b"Photoshop 3.0\0" + (b"8BIM" + bytes(8)) * 5_000
_TABLES = (b"\0" + bytes(64)) * 1_000
_PROFILE = b"x\0\0" + zlib.compress(bytes(200 * MIB), 9)

HOSTILE: dict[str, Callable[[], bytes]] = {
    f"a JPEG of {SCANS_MAX} scans, the most that are decoded": lambda: _scans(SCANS_MAX),
    "a JPEG of 3,600 scans": lambda: _scans(3_600),
    "a JPEG with 30 MiB of empty segments": lambda: _before_segments(_segment(0xE5, b"") * (30 * MIB // 4)),
    "a JPEG with 24 MB of fill bytes": lambda: _before_segments(b"\xff" * 24_000_000),
    "a JPEG with 12 million restart markers": lambda: _before_segments(b"\xff\xd0" * 12_000_000),
    "a JPEG with 65 MB of quantization tables": lambda: _before_segments(_segment(0xDB, _TABLES) * 1_000),
    "a JPEG with 1,500 Photoshop blocks": lambda: _before_segments(_segment(0xED, _PHOTOSHOP) * 1_500),
    "a JPEG with 1,500 EXIF blocks": lambda: _before_segments(_segment(0xE1, _EXIF) * 1_500),
    "a PNG with 12 MB of EXIF": lambda: _png(_chunk(b"eXIf", _EXIF[6:] * 200)),
    "a PNG with 10 MiB of empty chunks": lambda: _png(_chunk(b"teXt", b"") * (10 * MIB // 12)),
    "a PNG of the largest size, all zero": lambda: _png(b""),
    "a PNG with a profile of 200 MiB unpacked": lambda: _png(_chunk(b"iCCP", _PROFILE)),
    "a lossless WebP of noise": _webp,
    "a WebP of 10 MiB of empty chunks": _webp_chunks,
}

# Images of a few MiB that need much work. Many callers upload them at once.
MARKER_FLOODS: tuple[Callable[[], bytes], ...] = (
    lambda: _scans(SCANS_MAX),
    lambda: _before_segments(_segment(0xE5, b"") * (8 * MIB // 4)),
    lambda: _before_segments(b"\xff\xd0" * (4 * MIB)),
    lambda: _png(_chunk(b"teXt", b"") * (10 * MIB // 12)),
    _webp_chunks,
)


async def _costs() -> dict[str, tuple[float, float]]:
    """Return (seconds, MiB at most) for each kind, as a result image and as a reference."""
    costs: dict[str, tuple[float, float]] = {}
    for name, content_of in HOSTILE.items():
        content = content_of()
        for role in ("", ", as a reference"):
            with closing(Decoder(decoder_environment())) as decoder:
                await decoder.protections()  # starts the process
                async with _peak_memory() as samples:
                    started_at = time.perf_counter()
                    with suppress(UnusableImage):
                        if role:
                            await decoder.check_reference(io.BytesIO(content))
                        else:
                            await decoder.check(io.BytesIO(content), edge=1024)
                    costs[name + role] = (time.perf_counter() - started_at, max(samples))
    return costs


@asynccontextmanager
async def _peak_memory() -> AsyncIterator[list[float]]:
    """Collect the peak memory of the child processes in MiB. Only Linux reports it."""
    samples = [0.0]

    async def sample() -> None:
        while True:
            samples.extend(_child_peaks_mib())
            await anyio.sleep(SAMPLE_EVERY_S)

    async with anyio.create_task_group() as group:
        group.start_soon(sample)
        yield samples
        samples.extend(_child_peaks_mib())
        group.cancel_scope.cancel()


def _child_peaks_mib() -> list[float]:
    peaks: list[float] = []
    for names in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for child in names.read_text().split():
            with suppress(OSError):
                match = re.search(r"VmHWM:\s+(\d+)", Path("/proc", child, "status").read_text())
                if match is not None:
                    peaks.append(int(match[1]) / 1024)
    return peaks


async def _delay() -> tuple[float, float]:
    """Return the seconds that an order waits longer beside hostile images of other orders, and its seconds alone."""
    hostile = _scans(SCANS_MAX)
    normal_image = _webp()

    async def attack(decoder: Decoder, order: str) -> None:
        with suppress(UnusableImage):
            await decoder.check(io.BytesIO(hostile), edge=1024, order=order)

    async def seconds(decoder: Decoder) -> float:
        started_at = time.perf_counter()
        await decoder.check(io.BytesIO(normal_image), edge=1024, order="honest")
        return time.perf_counter() - started_at

    with closing(Decoder(decoder_environment())) as decoder:
        await decoder.protections()
        alone_s = await seconds(decoder)
        async with anyio.create_task_group() as group:
            for number in range(HOSTILE_AT_ONCE):
                group.start_soon(attack, decoder, f"hostile {number}")
            await anyio.sleep(0.05)
            beside_s = await seconds(decoder)
            group.cancel_scope.cancel()
    return max(beside_s - alone_s, 0.0), alone_s


# --- connections ---


def _under_load(folder: Path, evolink: int, silent: int, callers: int) -> dict[str, float]:
    port = free_port()
    stderr_file = folder / "stderr"
    low_limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({DESCRIPTORS}, {DESCRIPTORS}))"
    start = f"{low_limit}; from evolink_mcp.cli.main import main; main()"
    command = [sys.executable, "-P", "-c", start, "http", "--port", str(port)]
    with stderr_file.open("wb") as stderr:
        server = subprocess.Popen(command, cwd=ROOT, env=environment(folder, evolink), stderr=stderr)
    try:
        figures = anyio.run(_flood, server.pid, port, silent, callers)
        started_at = time.perf_counter()
        server.send_signal(signal.SIGTERM)
        server.wait(30)
        return {**figures, "end_s": time.perf_counter() - started_at, "stderr": stderr_file.stat().st_size}
    finally:
        server.kill()


async def _flood(pid: int, port: int, silent: int, callers: int) -> dict[str, float]:
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient() as client:
        await _wait_for_answer(client, f"{url}/healthz")
    before = memory_mb(pid)
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(silent)]
    started_at = time.perf_counter()
    await anyio.sleep(0.5)
    during = memory_mb(pid)
    async with httpx.AsyncClient() as client:
        await _wait_for_answer(client, f"{url}/healthz")
    beside_s = time.perf_counter() - started_at
    for connection in sockets:
        connection.close()
    outcomes: list[str] = []

    async def call(number: int) -> None:
        body = {
            "jsonrpc": "2.0", "id": number, "method": "tools/call",
            "params": {"name": "compute_size", "arguments": {"size": "16:9"}},
        }  # fmt: skip
        with suppress(httpx.HTTPError):
            async with httpx.AsyncClient(timeout=30) as client:
                answer = await client.post(f"{url}/mcp", json=body, headers=HEADERS)
                outcomes.append({200: "served", 503: "refused"}.get(answer.status_code, "other"))

    async with anyio.create_task_group() as group:
        for number in range(callers):
            group.start_soon(call, number)
    return {
        "silent_mb": during - before,
        "beside_s": beside_s,
        "served": outcomes.count("served"),
        "refused": outcomes.count("refused"),
        "lost": callers - outcomes.count("served") - outcomes.count("refused"),
    }


async def _wait_for_answer(client: httpx.AsyncClient, url: str) -> None:
    with anyio.fail_after(60):
        while True:
            with suppress(httpx.HTTPError):
                if (await client.get(url)).status_code == 200:
                    return
            await anyio.sleep(0.05)
