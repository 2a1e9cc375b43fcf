"""Hostile pictures and silent connections: what each costs, and what an honest caller notices (R36, R37)."""

from __future__ import annotations

import io
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import suppress
from pathlib import Path

import anyio
import httpx2 as httpx
from PIL import Image

from benchmarks.figures import Figure
from benchmarks.processes import ROOT, environment, free_port, memory_mb, standin
from evolink_mcp.images.decode_process import in_child
from evolink_mcp.images.inspect import NotAPicture
from evolink_mcp.images.prepare import check_reference
from evolink_mcp.images.previews import check_and_preview
from evolink_mcp.images.structure import SCANS_MAX

TITLE = "A hostile world"
MIB = 1 << 20
LARGEST = (2880, 2880)
DESCRIPTORS = 256
HEADERS = {"accept": "application/json, text/event-stream", "content-type": "application/json"}


def run(quick: bool) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        costs = anyio.run(_pictures, Path(name))
    slowest = max(costs, key=lambda what: costs[what][0])
    largest = max(costs, key=lambda what: costs[what][1])
    silent, callers = (300, 100) if quick else (1_100, 300)
    with standin() as at, tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        seen = _besieged(Path(name), at.port, silent, callers)
    return [
        Figure("the dearest hostile picture", costs[slowest][0], "s", 3, f"{slowest}; of {len(costs)} kinds"),
        Figure("most memory for one", costs[largest][1], "MiB", 300, largest),
        Figure(f"server's memory for {silent:,} silent connections", seen["silent_mb"], "MB", 30,
               f"at a limit of {DESCRIPTORS} descriptors; {seen['said']:,} bytes on stderr"),
        Figure("until an honest request is answered beside them", seen["beside_s"], "s", 15,
               "silent connections are closed after 10 s"),
        Figure(f"of {callers} callers at once at that limit, answered", seen["served"] + seen["told"], "", None,
               f"{seen['served']} served, {seen['told']} told 503; {seen['lost']} closed before their request came"),
        Figure("end after SIGTERM beside them", seen["end_s"], "s", 2),
    ]  # fmt: skip


# --- pictures ---


def _progressive(scans: int) -> bytes:
    """A JPEG of the largest size whose last scan is there that often."""
    out = io.BytesIO()
    Image.new("RGB", LARGEST, (9, 9, 9)).save(out, "JPEG", progressive=True, quality=50)
    data = out.getvalue()
    last = data.rindex(b"\xff\xda")
    after = last + 2 + struct.unpack(">H", data[last + 2 : last + 4])[0]
    end = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]").search(data, after)
    assert end is not None
    own = data.count(b"\xff\xda")
    return data[: end.start()] + data[last : end.start()] * (scans - own) + b"\xff\xd9"


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(between: bytes, size: tuple[int, int] = LARGEST, mode: int = 6) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, mode, 0, 0, 0))
    row = b"\0" + b"\0" * (size[0] * 4)
    pixels = zlib.compress(row * size[1], 1)
    return b"\x89PNG\r\n\x1a\n" + head + between + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _hostile() -> dict[str, bytes]:
    webp = io.BytesIO()
    Image.effect_noise(LARGEST, 100).convert("RGBA").save(webp, "WEBP", lossless=True, method=0)
    bomb = _chunk(b"iCCP", b"x\0\0" + zlib.compress(b"\0" * (200 * MIB), 9))
    return {
        f"a JPEG of {SCANS_MAX} scans, the most that are decoded": _progressive(SCANS_MAX),
        "a JPEG of 3,600 scans": _progressive(3_600),
        "30 MiB of empty JPEG segments": b"\xff\xd8" + b"\xff\xe5\0\2" * (30 * MIB // 4) + b"\xff\xd9",
        "10 MiB of empty PNG chunks": _png(_chunk(b"teXt", b"") * (10 * MIB // 12)),
        "a PNG of the largest size, all zero": _png(b""),
        "a PNG whose profile unpacks to 200 MiB": _png(bomb),
        "a lossless WebP of noise": webp.getvalue(),
        "a WebP of 10 MiB of empty chunks": b"RIFF" + struct.pack("<I", 10 * MIB + 4) + b"WEBP"
        + b"XXXX\0\0\0\0" * (10 * MIB // 8),
    }  # fmt: skip


async def _pictures(folder: Path) -> dict[str, tuple[float, float]]:
    """(seconds, MiB at most) of each kind, as a delivered picture and as a reference."""
    path = folder / "picture"
    path.write_bytes(_png(b"", (64, 64)))
    await in_child("check", check_and_preview, path, 1024)  # the child is there
    found: dict[str, tuple[float, float]] = {}
    for what, picture in _hostile().items():
        path.write_bytes(picture)
        for call, arguments in ((check_and_preview, (path, 1024)), (check_reference, (picture, False))):
            started = time.perf_counter()
            with suppress(NotAPicture):
                await in_child("check", call, *arguments)
            took = time.perf_counter() - started
            most = await in_child("check", _peak_mib)
            name = what if call is check_and_preview else f"{what}, as a reference"
            found[name] = (took, most)
    return found


def _peak_mib() -> float:
    """In the child: the most memory that it held since it was asked last."""
    status = Path("/proc/self/status").read_text()
    most = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return most


# --- connections ---


def _besieged(folder: Path, evolink: int, silent: int, callers: int) -> dict[str, float]:
    port = free_port()
    said = folder / "stderr"
    few = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({DESCRIPTORS}, {DESCRIPTORS}))"
    start = f"{few}; from evolink_mcp.cli.main import main; main()"
    command = [sys.executable, "-P", "-c", start, "http", "--port", str(port)]
    with said.open("wb") as stderr:
        server = subprocess.Popen(command, cwd=ROOT, env=environment(folder, evolink), stderr=stderr)
    try:
        seen = anyio.run(_siege, server.pid, port, silent, callers)
        started = time.perf_counter()
        server.send_signal(signal.SIGTERM)
        server.wait(30)
        return {**seen, "end_s": time.perf_counter() - started, "said": said.stat().st_size}
    finally:
        server.kill()


async def _siege(pid: int, port: int, silent: int, callers: int) -> dict[str, float]:
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient() as client:
        await _answered(client, f"{url}/healthz")
    before = memory_mb(pid)
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(silent)]
    started = time.perf_counter()
    await anyio.sleep(0.5)
    most = memory_mb(pid)
    async with httpx.AsyncClient() as client:
        await _answered(client, f"{url}/healthz")
    beside = time.perf_counter() - started
    for one in sockets:
        one.close()
    outcomes: list[str] = []

    async def call(number: int) -> None:
        body = {
            "jsonrpc": "2.0", "id": number, "method": "tools/call",
            "params": {"name": "compute_size", "arguments": {"size": "16:9"}},
        }  # fmt: skip
        with suppress(httpx.HTTPError):
            async with httpx.AsyncClient(timeout=30) as client:
                answer = await client.post(f"{url}/mcp", json=body, headers=HEADERS)
                outcomes.append({200: "served", 503: "told"}.get(answer.status_code, "odd"))

    async with anyio.create_task_group() as group:
        for number in range(callers):
            group.start_soon(call, number)
    return {
        "silent_mb": most - before,
        "beside_s": beside,
        "served": outcomes.count("served"),
        "told": outcomes.count("told"),
        "lost": callers - outcomes.count("served") - outcomes.count("told"),
    }


async def _answered(client: httpx.AsyncClient, url: str) -> None:
    with anyio.fail_after(60):
        while True:
            with suppress(httpx.HTTPError):
                if (await client.get(url)).status_code == 200:
                    return
            await anyio.sleep(0.05)
