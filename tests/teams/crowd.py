"""Load test of two replicas: one is killed, PostgreSQL restarts once, and each caller gets the image.

Other modes restart the servers in turn, promote a standby, or disturb nothing.

    python tests/teams/crowd.py [--callers 200] [--orders 5] [--tenants 20]

It runs two servers behind nginx (round-robin), a PostgreSQL server, and a simulated EvoLink in another process. A caller
repeats its call after a lost connection. The test prints figures, or the faults.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import psycopg
import yaml
from psycopg.rows import class_row, dict_row

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "faults")]
HEADERS = {"accept": "application/json, text/event-stream", "content-type": "application/json"}
SIZES = ["1024x640", "640x1024", "1024x768", "768x1024", "1024x1024"]
TIMEOUT_S = 420.0

COMPOSE = HERE.parent.parent / "compose.yaml"
# nginx runs in a folder, without root privileges.
ALONE = """
daemon off; master_process off; pid nginx.pid; error_log error.log; worker_processes 1;
"""
HERE_ONLY = """
http {
  access_log off; client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u;
  scgi_temp_path s;"""


def nginx(port: int, ports: list[int]) -> str:
    """Return the configuration of compose.yaml's proxy, for servers on these ports of this machine."""
    text: str = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["configs"]["proxy"]["content"]
    entry = re.compile(r" *server (\w+):8000(.*;)\n")
    options = entry.findall(text)[0][1]
    servers = "".join(f"server 127.0.0.1:{at}{options}\n" for at in ports)
    text = entry.sub("", text).replace("upstream servers {", f"upstream servers {{\n{servers}")
    text = text.replace("listen 8000", f"listen 127.0.0.1:{port}").replace("$$host", "localhost")
    return ALONE + text.replace("http {", HERE_ONLY.strip(), 1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port: int, within_s: float = 60.0) -> None:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit(f"nothing listens on port {port}")


@contextmanager
def process(*command: str, cwd: Path, log: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    with (
        (cwd / log).open("wb") as log_file,
        subprocess.Popen(command, cwd=cwd, env={**os.environ, **env}, stdout=log_file, stderr=log_file) as child,
    ):
        try:
            yield child
        finally:
            child.kill()


def simulate(port: int, seconds: float, proxy: int) -> None:
    """Serve a simulated EvoLink with small images. `/report` returns its requests and purchases."""
    from faulty_gateway import QuickSimulator
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from evolink_mcp.transports.http import serve_app

    simulator = QuickSimulator(duration_s=seconds)

    async def report(_: Any) -> JSONResponse:
        counts = Counter(f"{r.method} {r.path.partition('task-')[0]}" for r in simulator.requests)
        purchases = [[task.body["prompt"], task.key, task.id] for task in simulator.tasks.values()]
        return JSONResponse({"requests": counts, "purchases": purchases})

    async def call_back() -> None:
        """Send a callback for each finished task. The public hostname leads to the proxy."""
        notified_ids: set[str] = set()
        async with httpx.AsyncClient(trust_env=False) as client, asyncio.TaskGroup() as callbacks:
            while True:
                await asyncio.sleep(0.05)
                tasks = simulator.tasks.values()
                for task in [task for task in tasks if task.id not in notified_ids and needs_callback(task)]:
                    notified_ids.add(task.id)
                    callbacks.create_task(send_callback(client, task))

    async def send_callback(client: httpx.AsyncClient, task: Any) -> None:
        url = f"http://127.0.0.1:{proxy}{urlsplit(task.body['callback_url']).path}"
        for wait_s in (0.0, 1.0, 2.0, 4.0):
            await asyncio.sleep(wait_s)
            with suppress(httpx.HTTPError):
                if (await client.post(url, json={"id": task.id, "status": "completed"})).is_success:
                    return

    def needs_callback(task: Any) -> bool:
        return "callback_url" in task.body and simulator.clock() - task.created > task.duration

    async def serve() -> None:
        callbacks = asyncio.create_task(call_back())
        await serve_app(simulator.app, "127.0.0.1", port)
        callbacks.cancel()

    simulator.app.router.routes.insert(0, Route("/report", report))
    asyncio.run(serve())


@dataclass(frozen=True)
class Usage:
    """CPU time and memory of a process, or the difference between two such measurements."""

    cpu_s: float
    peak_mb: float
    now_mb: float

    @classmethod
    def of(cls, process: subprocess.Popen[bytes]) -> Usage:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks = os.sysconf("SC_CLK_TCK")
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        peak, now = (int(status[name].split()[0]) / 1024 for name in ("VmHWM", "VmRSS"))
        return cls((int(fields[11]) + int(fields[12])) / ticks, peak, now)

    def __sub__(self, before: Usage) -> Usage:
        return Usage(self.cpu_s - before.cpu_s, self.peak_mb - before.now_mb, self.now_mb - before.now_mb)


def database_counts(database: str) -> dict[str, float]:
    """Return the commits of a database, and the writes and MB of PostgreSQL's write-ahead log, since its start.

    The cluster does not wait for the disk, so the writes are counted instead of the flushes that would follow them.
    A session reports its counts with a delay, or when it ends. So this ends the other sessions.
    """
    with psycopg.connect(database, autocommit=True, row_factory=dict_row) as db:
        db.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                   "WHERE datname = current_database() AND pid <> pg_backend_pid()")  # fmt: skip
        row = db.execute(
            "SELECT xact_commit::float AS commits, wal_write::float AS writes, (wal_bytes / 1e6)::float AS wal_mb "
            "FROM pg_stat_wal, pg_stat_database WHERE datname = current_database()"
        ).fetchone()
    assert row is not None
    return row


@dataclass(frozen=True)
class Row:
    """An entry of the journal."""

    prompt: str
    key: str
    owner: str
    caller: str
    phase: str
    status: str
    created_at: float
    delivered_at: float | None


class Crowd:
    """The callers, and the result of each request."""

    def __init__(self, url: str, callers: int, orders: int, tokens: list[str], callbacks: bool) -> None:
        self._url, self._tokens = url, tokens
        self.caller_count, self.order_count, self.callbacks = callers, orders, callbacks
        self.results: dict[str, dict[str, Any]] = {}
        self.start_times: dict[str, float] = {}
        self.durations: list[float] = []
        self.failures = Counter[str]()
        self.retries = 0
        self._deadlines: set[asyncio.Timeout] = set()  # of the waiting calls
        self.waiting_max = 0  # the highest number of callers that waited at once

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.caller_count)
        async with (
            httpx.AsyncClient(headers=HEADERS, timeout=TIMEOUT_S, limits=limits, trust_env=False) as client,
            asyncio.TaskGroup() as group,
        ):
            for caller in range(self.caller_count):
                for order in range(self.order_count):
                    group.create_task(self._get_image(client, caller, order))

    def end_calls(self) -> None:
        """End the calls of all waiting callers. They make them again."""
        for deadline in self._deadlines:
            deadline.reschedule(0)

    async def _get_image(self, client: httpx.AsyncClient, caller: int, order: int) -> None:
        await asyncio.sleep(random.random() * 5.0)
        token = self._tokens[caller % len(self._tokens)]
        prompt = f"picture {order} of caller {caller}"
        request = {"prompt": prompt, "size": SIZES[order % len(SIZES)], "quality": "low"}
        self.start_times[prompt] = started_at = time.monotonic()
        self.waiting_max = max(self.waiting_max, len(self.start_times) - len(self.results))
        tool, arguments = "generate_image", request
        # EvoLink repeats a callback for seven seconds, and each of these calls waits for seconds too.
        unknown_retries = 10 if self.callbacks else 0
        while True:
            facts = await self._call(client, token, tool, arguments)
            if facts is None or (facts["error"] and facts["error"]["retryable"]):
                self.retries += 1
                if facts is not None:
                    self.failures[facts["error"]["code"]] += 1
                await asyncio.sleep(0.5 + random.random())
                continue
            if facts["status"] == "completed" or (facts["status"] == "unknown" and not unknown_retries):
                break
            if facts["status"] == "unknown":  # A callback identifies the task, if EvoLink has it
                unknown_retries -= 1
                await asyncio.sleep(0.5 + random.random())
                tool, arguments = "generate_image", request
                continue
            action = facts["next_action"] or {"tool": "generate_image", "arguments": request}
            if not facts["next_action"]:
                self.failures[facts["error"]["code"] if facts["error"] else facts["status"]] += 1
                await asyncio.sleep(0.5 + random.random())
            tool, arguments = action["tool"], action["arguments"]
        self.durations.append(time.monotonic() - started_at)
        self.results[prompt] = {"token": token, **facts}

    async def _call(self, client: httpx.AsyncClient, token: str, tool: str, arguments: Any) -> dict[str, Any] | None:
        message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool, "arguments": arguments}}
        try:
            async with asyncio.timeout(None) as deadline:
                self._deadlines.add(deadline)
                reply = await client.post(self._url, json=message, headers={"authorization": f"Bearer {token}"})
        except (httpx.HTTPError, TimeoutError) as error:
            self.failures[type(error).__name__] += 1
            return None
        finally:
            self._deadlines.discard(deadline)
        lines = [line[5:] for line in reply.text.splitlines() if line.startswith("data:")]
        if reply.status_code != 200 or not lines:
            self.failures[f"HTTP {reply.status_code}"] += 1
            return None
        answer = json.loads(lines[-1])
        return answer["result"]["structuredContent"] if "result" in answer else None


async def restart_in_turn(crowd: Crowd, servers: list[subprocess.Popen[bytes]], start: Any) -> None:
    """Replace each server during the orders, as an upgrade does."""

    async def restarts() -> None:
        total = crowd.caller_count * crowd.order_count
        for number, server in enumerate(servers):
            while len(crowd.results) < total * (number + 1) // (len(servers) + 2):
                await asyncio.sleep(0.05)
            server.terminate()
            code = await asyncio.to_thread(server.wait)
            print(f"  server {number} ended with {code} after {len(crowd.results)} results", flush=True)
            await asyncio.to_thread(start, number)

    async with asyncio.timeout(TIMEOUT_S):
        async with asyncio.TaskGroup() as group:
            group.create_task(crowd.run())
            group.create_task(restarts())


async def kill_server_and_database(
    crowd: Crowd, server: subprocess.Popen[bytes], cluster: Any, start_server: Any
) -> None:
    """Kill a server and later PostgreSQL during the orders, and start both again."""

    async def kill_and_restart() -> None:
        total = crowd.caller_count * crowd.order_count
        while len(crowd.results) < total // 4:
            await asyncio.sleep(0.05)
        server.send_signal(signal.SIGKILL)
        print(f"  one server killed after {len(crowd.results)} results", flush=True)
        while len(crowd.results) < total // 2:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(cluster.stop)
        await asyncio.to_thread(cluster.start)
        print(f"  PostgreSQL restarted after {len(crowd.results)} results", flush=True)
        start_server()

    async with asyncio.timeout(TIMEOUT_S):
        async with asyncio.TaskGroup() as group:
            group.create_task(crowd.run())
            group.create_task(kill_and_restart())


async def promote_standby(crowd: Crowd, primary: Any, standby: Any) -> None:
    """Stop the replication to the standby, and promote it after some later results.

    Then all callers repeat their calls. If the standby lacked an entry, such a call could buy again.
    """

    async def failover() -> None:
        total = crowd.caller_count * crowd.order_count
        while len(crowd.results) < total // 4:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(standby.stop_replication)
        replicated_count = len(crowd.results)
        while len(crowd.results) < total // 3:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(primary.stop)
        print(
            f"  the primary ended after {len(crowd.results)} results, the standby received no changes after {replicated_count}",
            flush=True,
        )
        crowd.end_calls()
        await asyncio.to_thread(standby.promote)

    async with asyncio.timeout(TIMEOUT_S):
        async with asyncio.TaskGroup() as group:
            group.create_task(crowd.run())
            group.create_task(failover())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--callers", type=int, default=200)
    parser.add_argument("--orders", type=int, default=5)
    parser.add_argument("--tenants", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds that EvoLink takes for an image")
    parser.add_argument("--callbacks", action="store_true", help="EvoLink sends a callback when an image is complete")
    parser.add_argument("--calm", action="store_true", help="disturb nothing, and print the load of the servers")
    parser.add_argument("--promote", action="store_true", help="promote a standby that lacks the newest entries")
    parser.add_argument("--rolling", action="store_true", help="restart one server after another; no call may fail")
    parser.add_argument("--servers", type=int, choices=(1, 2, 3), default=2, help="servers that share the work")
    parser.add_argument("--simulate", type=int)
    parser.add_argument("--proxy", type=int, default=0)
    options = parser.parse_args()
    if options.simulate:
        simulate(options.simulate, options.seconds, options.proxy)
        return
    from cluster import run_cluster

    if shutil.which("nginx") is None:
        raise SystemExit("nginx is not installed")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crowd-", ignore_cleanup_errors=True)))
        cluster = stack.enter_context(run_cluster())
        upstream, port, *ports = (free_port() for _ in range(5))
        ports = ports[: options.servers]
        names = [f"tenant{number}" for number in range(options.tenants)]
        tokens = [f"evt_{hashlib.sha256(name.encode()).hexdigest()[:43]}" for name in names]
        keys = {token: f"sk-{name}-key" for token, name in zip(tokens, names, strict=True)}
        (folder / "tokens.toml").write_text("".join(
            f'[[token]]\nname = "{name}"\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n'
            f'evolink_key = "{keys[token]}"\n' for token, name in zip(tokens, names, strict=True)
        ))  # fmt: skip
        (folder / "nginx.conf").write_text(nginx(port, ports))
        database = cluster.database()
        standby = stack.enter_context(cluster.standby()) if options.promote else None
        if standby is not None:
            name = database.partition("@/")[2].partition("?")[0]
            database = (
                f"postgresql://postgres@/{name}?host={cluster.folder},{standby.folder}&target_session_attrs=read-write"
            )
        env = {
            "EVOLINK_BASE_URL": f"http://127.0.0.1:{upstream}", "EVOLINK_MCP_TOKENS_FILE": str(folder / "tokens.toml"),
            "EVOLINK_MCP_DATABASE_URL": database, "EVOLINK_MCP_SECRET": "s" * 32,
            "EVOLINK_MCP_OUTPUT_DIR": str(folder / "pictures"), "HOME": str(folder),
        }  # fmt: skip
        if options.callbacks:
            (folder / "store").mkdir()
            env |= {
                "EVOLINK_MCP_PUBLIC_URL": "https://pictures.example.org", "EVOLINK_MCP_STORE": str(folder / "store"),
            }  # fmt: skip
        stack.enter_context(process(
            sys.executable, __file__, "--simulate", str(upstream), "--seconds", str(options.seconds), "--proxy", str(port),
            cwd=folder, log="simulator.log",
        ))  # fmt: skip
        wait_for_port(upstream)

        def start_replica(number: int) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-P", "-m", "evolink_mcp", "http", "--port", str(ports[number])]
            server = stack.enter_context(process(*command, cwd=folder, log=f"server{number}.log", **env))
            wait_for_port(ports[number])
            return server

        servers = [start_replica(number) for number in range(options.servers)]
        stack.enter_context(process(
            shutil.which("nginx") or "nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "error.log",
            cwd=folder, log="nginx.log",
        ))  # fmt: skip
        wait_for_port(port)
        crowd = Crowd(f"http://127.0.0.1:{port}/mcp", options.callers, options.orders, tokens, options.callbacks)
        order_count = options.callers * options.orders
        usages: list[Usage] = []
        started_at = time.monotonic()
        try:
            if options.calm:
                before = [Usage.of(server) for server in servers]
                asyncio.run(crowd.run())
                usages = [Usage.of(server) - first for server, first in zip(servers, before, strict=True)]
            elif options.rolling:
                asyncio.run(restart_in_turn(crowd, servers, start_replica))
                if crowd.failures:
                    raise SystemExit(f"calls failed during the restarts: {crowd.failures}")
            elif standby is not None:
                asyncio.run(promote_standby(crowd, cluster, standby))
            else:
                asyncio.run(kill_server_and_database(crowd, servers[0], cluster, lambda: start_replica(0)))
        except BaseException:
            print(f"{len(crowd.results)} results, {crowd.failures.most_common(8)}")
            for name in sorted(path.name for path in folder.glob("*.log")):
                print(f"--- {name}\n{(folder / name).read_text()[-3000:]}")
            raise
        wall_s = time.monotonic() - started_at
        report = httpx.get(f"http://127.0.0.1:{upstream}/report", trust_env=False).json()
        counts = database_counts(database)
        with psycopg.connect(database, row_factory=class_row(Row)) as db:
            rows = db.execute(
                "SELECT request::json->>'prompt' AS prompt, key, owner, caller, phase, status, created_at, delivered_at "
                "FROM evolink_entries ORDER BY created_at"
            ).fetchall()
        logs = "".join((folder / f"server{number}.log").read_text() for number in range(options.servers))
    if options.calm:
        polls = sum(count for request, count in report["requests"].items() if "/v1/tasks" in request)
        print(json.dumps({
            "orders_a_second": order_count / wall_s, "cpu_ms": 1000 * sum(usage.cpu_s for usage in usages) / order_count,
            "extra_mb": [usage.peak_mb for usage in usages], "waiting": crowd.waiting_max, "polls": polls / order_count,
            "median_s": sorted(crowd.durations)[len(crowd.durations) // 2],
            **{f"{name}_per_order": count / order_count for name, count in counts.items()},
            "writes_a_second": counts["writes"] / wall_s,
        }))  # fmt: skip
    check_results(crowd, order_count, report, keys, logs, wall_s, rows)


def answers_sent_before(prompt: str, rows: list[Row]) -> int:
    """Return the number of answers that a server sent before the next purchase. The calls ended before the answers arrived."""
    entries = [row for row in rows if row.prompt == prompt]
    return sum(
        entry.delivered_at is not None and entry.delivered_at < next_entry.created_at
        for entry, next_entry in pairwise(entries)
    )


def check_results(
    crowd: Crowd, order_count: int, report: dict[str, Any], keys: dict[str, str], logs: str, wall_s: float,
    rows: list[Row],
) -> None:  # fmt: skip
    purchase_counts = Counter(prompt for prompt, _, _ in report["purchases"])
    owners = {task: (prompt, key) for prompt, key, task in report["purchases"]}
    duplicates = {
        prompt: count for prompt, count in purchase_counts.items() if count > 1 + answers_sent_before(prompt, rows)
    }
    wrong_results = [
        prompt for prompt, facts in crowd.results.items()
        if facts["task_id"] and owners[facts["task_id"]] != (prompt, keys[facts["token"]])
    ]  # fmt: skip
    guess_count = sum(facts["guess"] for facts in crowd.results.values())
    unknown = {prompt for prompt, facts in crowd.results.items() if facts["status"] == "unknown"}
    durations = sorted(crowd.durations)
    repeated_count = sum(count - 1 for prompt, count in purchase_counts.items() if prompt not in duplicates)
    if repeated_count:
        print(f"  {repeated_count} calls ended while their answers were being sent, so the repeated calls bought again")
    print(f"  {order_count} orders, {sum(purchase_counts.values())} tasks upstream, {len(crowd.results)} results, "
          f"{len(duplicates)} double, {len(wrong_results)} wrong; {guess_count} guesses, {len(unknown)} of unknown outcome; "
          f"{crowd.retries} calls made again ({dict(crowd.failures)})")  # fmt: skip
    median_s = durations[len(durations) // 2]
    print(f"  {wall_s:.1f} s in all; a result took {median_s:.1f} s (median), {durations[-1]:.1f} s at most")
    print(f"  requests to EvoLink: {report['requests']}")
    error_lines = [line for line in logs.splitlines() if "Traceback" in line or "Error:" in line]
    # A POST that was lost before it reached EvoLink also has an unknown outcome.
    missing = set(crowd.results) - set(purchase_counts) - unknown
    # EvoLink sent a callback for each of its tasks.
    ignored_callbacks = unknown & set(purchase_counts) if crowd.callbacks else set[str]()
    if len(crowd.results) != order_count or duplicates or wrong_results or missing or ignored_callbacks or error_lines:
        for row in rows:
            if row.prompt in duplicates:
                print("  ", row, crowd.results[row.prompt]["task_id"])
        faults = [sorted(names)[:5] for names in (duplicates, wrong_results, missing, ignored_callbacks, error_lines)]
        raise SystemExit(f"wrong: {faults}\n{logs[-3000:]}")
    print("  each order has one task and its result, or the error that its answer was lost with a server")


if __name__ == "__main__":
    main()
