"""Measure a server that has many tenants and no work: transactions of PostgreSQL, memory and CPU time.

    python tests/teams/idle.py [--tenants 10000] [--calls 100] [--seconds 20]

It runs one server and a PostgreSQL server. `--calls` tenants call a free tool once before the measurement. The last line of
the output is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from cluster import Cluster, run_cluster
from crowd import HEADERS, Usage, free_port, process, wait_for_port

START_WITHIN_S = 600.0
SETTLE_S = 10.0


def transactions(cluster: Cluster, database: str) -> int:
    """Return the transactions of a database since its start. A session reports them within some seconds."""
    with cluster.admin() as db:
        sql = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s"
        row = db.execute(sql, (database,)).fetchone()
    assert row is not None
    return row[0]


def call(port: int, token: str) -> None:
    """List the tasks of a tenant, which adopts entries of dead servers."""
    params = {"name": "list_tasks", "arguments": {}}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}).encode()
    headers = {**HEADERS, "authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/mcp", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert b"structuredContent" in answer.read()


def measure(tenants: int, calls: int, seconds: float, settle_s: float) -> dict[str, Any]:
    with run_cluster() as cluster, tempfile.TemporaryDirectory(prefix="idle-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "tokens.toml").write_text("".join(
            f'[[token]]\nname = "tenant{number}"\nsha256 = "{hashlib.sha256(f"token{number}".encode()).hexdigest()}"\n'
            for number in range(tenants)
        ))  # fmt: skip
        url = cluster.database()
        port = free_port()
        env = {
            "EVOLINK_API_KEY": "sk-idle-0123456789", "EVOLINK_BASE_URL": "http://127.0.0.1:9", "HOME": str(folder),
            "EVOLINK_MCP_TOKENS_FILE": str(folder / "tokens.toml"), "EVOLINK_MCP_DATABASE_URL": url,
            "EVOLINK_MCP_SECRET": "s" * 32, "EVOLINK_MCP_OUTPUT_DIR": str(folder / "pictures"),
        }  # fmt: skip
        command = (sys.executable, "-P", "-m", "evolink_mcp", "http", "--port", str(port))
        with process(*command, cwd=folder, log="server.log", **env) as server:
            wait_for_port(port, START_WITHIN_S)
            for number in range(calls):
                call(port, f"token{number}")
            time.sleep(settle_s)
            database = url.partition("@/")[2].partition("?")[0]
            before = Usage.of(server)
            first_count = transactions(cluster, database)
            started_at = time.monotonic()
            time.sleep(seconds)
            count = transactions(cluster, database) - first_count
            elapsed_s = time.monotonic() - started_at
            usage = Usage.of(server)
            return {
                "transactions_per_s": count / elapsed_s, "memory_mb": usage.now_mb,
                "core": (usage.cpu_s - before.cpu_s) / elapsed_s,
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tenants", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--settle", type=float, default=SETTLE_S)
    options = parser.parse_args()
    print(json.dumps(measure(options.tenants, options.calls, options.seconds, options.settle)))


if __name__ == "__main__":
    main()
