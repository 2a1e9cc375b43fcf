"""Measure a server that 200 hostile tenants attack at once: memory, descriptors, and the delay of normal tenants.

The hostile clients run in a separate process (`benchmarks.hostile_clients`), and the normal ones in this process. All of
them share the machine with the server. So the normal calls are measured again with the same hostile clients and a server
that does nothing: this shows the share of the machine in the delay.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import OKPAlgorithm

from benchmarks.figures import Figure, middle, share
from benchmarks.normal_clients import KEY_ID, Jwts, NormalClients, call, exchange
from benchmarks.processes import KEY, ROOT, cpu_s, environment, free_port, memory_mb, standin

TITLE = "Hostile tenants"
PUBLIC_URL = "https://pictures.example.org"
# The usual limit of Linux for a process, and a hard limit that every system allows.
DESCRIPTORS = (1_024, 4_096)
TENANTS = {"unread": 34, "uploads": 33, "markers": 33, "slow": 34, "subjects": 33, "kids": 33}
TOKEN_KINDS = ("unread", "uploads", "markers", "slow")
NORMAL_TENANTS = 16
QUIET_S = 12.0
REFERENCE_S = 10.0
START_TIMEOUT_S = 60.0
SAMPLE_INTERVAL_S = 0.25
ISSUER_DELAY_S = 1.0
IMAGE_CREDITS = 0.2
# The hostile tenants buy fewer images while normal ones buy. Then they try to buy more than the rest of the limit.
IMAGES_BEFORE_THE_END = 2 * (TENANTS["uploads"] + TENANTS["markers"])
IMAGES_LEFT = 40


@dataclass(frozen=True, slots=True)
class _Peak:
    server_mb: float
    memory_mb: float
    descriptors: int


def run(quick: bool) -> list[Figure]:
    seconds = 60.0 if quick else 600.0
    results = _attack(seconds)
    quiet_s: list[float] = results["quiet_image_s"]
    call_s: list[float] = results["call_s"]
    image_s: list[float] = results["image_s"]
    peak: _Peak = results["peak"]
    delays = sorted(duration - middle(quiet_s) for duration in image_s)
    used_share = results["credits"] / results["credits_max"]
    return [
        Figure(f"memory of the server with {sum(TENANTS.values())} hostile tenants for {seconds:.0f} s", peak.server_mb, "MB",
               400),
        Figure("the same with its decoder processes", peak.memory_mb, "MB", 400, f"{results['idle_mb']:.0f} MB before"),
        Figure("descriptors in use", 100 * peak.descriptors / results["descriptors_max"], "%", 90,
               f"{peak.descriptors:,} of {results['descriptors_max']:,}"),
        Figure("a free call of a normal tenant, 99 % within", share(call_s, 0.99), "s", 0.3,
               f"50 % within {middle(call_s):.3f} s, 90 % within {share(call_s, 0.9):.2f} s, maximum {max(call_s):.2f} s, "
               f"{len(call_s):,} calls; {len(results['failures'])} calls and images failed{_first_failure(results['failures'])}"),
        Figure("the same with a server that does nothing", share(results["reference_s"], 0.99), "s", None,
               f"50 % within {middle(results['reference_s']):.3f} s: the share of the machine"),
        Figure("delay of a normal image", max(delays), "s", 2,
               f"50 % within {middle(delays):.2f} s, 90 % within {share(delays, 0.9):.2f} s, {len(delays)} images; "
               f"{middle(quiet_s):.2f} s without the attack"),
        Figure("spent share of the total limit", 100 * used_share, "%", 100,
               f"{results['credits']:.1f} credits; {results['refusals']} further purchases were refused"),
        Figure("share of one core that the server uses", 100 * results["core"], "%"),
    ]  # fmt: skip


def _first_failure(failures: list[str]) -> str:
    return f": {failures[0]}" if failures else ""


def _attack(seconds: float) -> dict[str, Any]:
    port = free_port()
    with (
        standin("1K", callback_port=port) as evolink,
        tempfile.TemporaryDirectory(prefix="benchmark-") as name,
        _issuer() as (issuer, key),
    ):
        folder = Path(name)
        tokens = {f"{kind}{number}": f"token-{kind}{number}" for kind in TOKEN_KINDS for number in range(TENANTS[kind])}
        normal_names = {f"normal{number}": f"token-normal{number}" for number in range(NORMAL_TENANTS - 1)}
        audience = f"{PUBLIC_URL}/mcp"
        jwts = Jwts(key, issuer, audience)
        normal_tokens = [*normal_names.values(), jwts.token("normal")]
        plan: dict[str, Any] = {
            kind: [tokens[f"{kind}{number}"] for number in range(TENANTS[kind])] for kind in TOKEN_KINDS
        }
        plan |= {"subjects": TENANTS["subjects"], "kids": TENANTS["kids"], "key": key, "issuer": issuer}
        plan |= {"audience": audience}
        images = IMAGES_BEFORE_THE_END + IMAGES_LEFT + int((seconds + QUIET_S) / 2)
        credits_max = round(images * IMAGE_CREDITS, 1)
        (folder / "tokens.toml").write_text(
            "\n".join(_token_block(name, token) for name, token in (tokens | normal_names).items())
        )
        env = environment(folder, evolink.port) | {
            "EVOLINK_MCP_TOKENS_FILE": str(folder / "tokens.toml"),
            "EVOLINK_MCP_OAUTH_ISSUER": issuer,
            "EVOLINK_MCP_PUBLIC_URL": PUBLIC_URL,
            "EVOLINK_MCP_SECRET": "s" * 32,
            "EVOLINK_MCP_TOTAL_CREDITS_PER_DAY": str(credits_max),
        }
        with _server(port, env) as server:
            _wait_until_all_answer(port, [*tokens.values(), *normal_tokens])
            idle_mb = _memory_mb(server.pid)
            quiet_clients = NormalClients(port, normal_tokens)
            _measure(quiet_clients, QUIET_S)
            clients = NormalClients(port, normal_tokens)
            with _hostile_clients(folder, plan | {"port": port}), _peaks(server.pid) as peaks:
                cpu_before = cpu_s(server.pid) or 0.0
                started_at = time.monotonic()
                _measure(clients, seconds)
                core = ((cpu_s(server.pid) or 0.0) - cpu_before) / (time.monotonic() - started_at)
                refusal_count = _buy_too_much(port, list(tokens.values()))
            used_credits = _used_credits(evolink.port)
        return {
            "quiet_image_s": quiet_clients.image_s, "call_s": clients.call_s, "image_s": clients.image_s,
            "failures": clients.failures, "idle_mb": idle_mb, "core": core,
            "peak": _Peak(*(max(getattr(peak, name) for peak in peaks) for name in _Peak.__slots__)),
            "descriptors_max": DESCRIPTORS[1], "credits": used_credits, "credits_max": credits_max, "refusals": refusal_count,
            "reference_s": _reference(folder, plan, normal_tokens),
        }  # fmt: skip


def _token_block(name: str, token: str) -> str:
    return f'[[token]]\nname = "{name}"\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n'


def _measure(clients: NormalClients, seconds: float) -> None:
    clients.start()
    time.sleep(seconds)
    clients.stop()


@contextmanager
def _server(port: int, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, {DESCRIPTORS})"
    start = f"{limit}; from evolink_mcp.cli.main import main; main()"
    command = [sys.executable, "-P", "-c", start, "http", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def _hostile_clients(folder: Path, plan: dict[str, Any]) -> Iterator[None]:
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "benchmarks.hostile_clients", str(folder / "plan.json")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout
    try:
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _wait_until_all_answer(port: int, tokens: list[str]) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    for token in tokens:
        request = call(token, "tools/call", name="compute_size", arguments={"size": "16:9"})
        while exchange(port, request)[0] != 200:
            if time.monotonic() > end:
                raise RuntimeError("the server does not answer")
            time.sleep(0.2)


@contextmanager
def _peaks(pid: int) -> Iterator[list[_Peak]]:
    """Collect memory and descriptors of the server."""
    peaks: list[_Peak] = []
    end = threading.Event()

    def sample() -> None:
        while not end.wait(SAMPLE_INTERVAL_S):
            with suppress(OSError):  # a thread of the server ended
                peaks.append(_Peak(memory_mb(pid), _memory_mb(pid), len(os.listdir(f"/proc/{pid}/fd"))))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peaks
    finally:
        end.set()
        thread.join()


def _memory_mb(pid: int) -> float:
    """Return the resident memory of the server and its child processes."""
    total = memory_mb(pid)
    for names in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in names.read_text().split():
            with suppress(OSError, StopIteration):  # the decoder ended
                total += memory_mb(int(child))
    return total


def _buy_too_much(port: int, tokens: list[str]) -> int:
    """Let all tenants buy at once. Return the number of refused purchases."""

    def buy(number: int) -> bool:
        arguments = {"prompt": f"sim:slow=1 last {number}", "size": "1:1", "quality": "low"}
        request = call(tokens[number], "tools/call", name="generate_image", arguments=arguments)
        _, answer = exchange(port, request)
        return b"TOTAL_CREDITS" in answer or b"limit" in answer

    with ThreadPoolExecutor(32) as pool:
        return sum(pool.map(buy, range(len(tokens))))


def _used_credits(port: int) -> float:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/credits", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["data"]["user"]["used_credits"]


# --- the issuer ---


@contextmanager
def _issuer() -> Iterator[tuple[str, str]]:
    """Serve a slow OAuth issuer with one key. Yield its URL and the private key."""
    private_key = Ed25519PrivateKey.generate()
    public = json.loads(OKPAlgorithm.to_jwk(private_key.public_key())) | {"kid": KEY_ID, "use": "sig"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(ISSUER_DELAY_S)
            metadata = {"issuer": url, "jwks_uri": f"{url}/keys"}
            body = json.dumps({"keys": [public]} if self.path == "/keys" else metadata).encode()
            with suppress(OSError):  # the server ended
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    pem = private_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        yield url, pem.decode()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# --- the reference ---


def _reference(folder: Path, plan: dict[str, Any], tokens: list[str]) -> list[float]:
    """Return the seconds of normal calls beside the hostile clients, with a server that does nothing."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.tenants", str(port)], cwd=ROOT)
    try:
        _wait_until_all_answer(port, tokens[:1])
        clients = NormalClients(port, tokens, buys_images=False)
        with _hostile_clients(folder, plan | {"port": port}):
            _measure(clients, REFERENCE_S)
        return clients.call_s
    finally:
        process.kill()
        process.wait()


async def _serve_nothing(port: int) -> None:
    """Read each request, and answer at its end with a few bytes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while request := await reader.readuntil(b"\r\n\r\n"):
                size = int(request.partition(b"content-length: ")[2].partition(b"\r\n")[0])
                while size > 0 and (part := await reader.read(min(size, 1 << 16))):
                    size -= len(part)
                writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 19\r\n\r\n"structuredContent"')
                await writer.drain()
        writer.close()

    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS[1], DESCRIPTORS[1]))
    async with await asyncio.start_server(serve, "127.0.0.1", port, backlog=4_096) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve_nothing(int(sys.argv[1])))
