"""Measure the capacity of one server and of two behind nginx, with PostgreSQL and a simulated EvoLink that calls back.

Callers of 20 tenants send requests within five seconds and wait. `tests/teams/crowd.py --calm` runs them and checks that
each image was bought once and reached its tenant. All processes share the machine, so two servers do not help if its cores
are busy. The CPU time of the servers per request shows the capacity of a separate core.

`tests/teams/idle.py` measures a server without work. Its transactions are heartbeats and searches for dead servers.
`tests/teams/years.py` measures the journal with the entries of years.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

from benchmarks.figures import Figure
from benchmarks.processes import ROOT

TITLE = "Servers of a team"
POLL_REQUESTS_MAX = 2.0
TRANSACTIONS_MAX = 10.0
IDLE_TENANTS = (1, 100, 10_000)
IDLE_TRANSACTIONS_MAX = 5.0
IDLE_TENANT_KB_MAX = 50.0
YEARS_ENTRIES = 1_000_000
QUICK_ENTRIES = 50_000
LIST_MS_MAX = 50.0
ORDER_MS_MAX = 20.0


def run(quick: bool) -> list[Figure]:
    if shutil.which("nginx") is None:
        print("teams: needs nginx and PostgreSQL (apt-get install nginx-light postgresql)", file=sys.stderr)
        return []
    return [*_figures_of_crowd(quick), *_figures_of_idle_server(quick), *_figures_of_years(quick)]


def _figures_of_crowd(quick: bool) -> list[Figure]:
    callers = 40 if quick else 200
    one_server = _measure_crowd(callers, 1)
    two_servers = _measure_crowd(callers, 2)
    requests = callers * 5
    return [
        Figure(f"requests per second, {requests} to one server", one_server["orders_a_second"], "/s", None,
               f"up to {one_server['waiting']} callers wait at once; 50 % get their image within {one_server['median_s']:.1f} s"),
        Figure("the same with two servers", two_servers["orders_a_second"], "/s", None,
               f"{two_servers['orders_a_second'] / one_server['orders_a_second']:.2f} times the rate of one server"),
        Figure("CPU time of the servers per request, one server", one_server["cpu_ms"], "ms", None,
               f"one core can process {1000 / one_server['cpu_ms']:.0f} requests per second"),
        Figure("the same with two servers", two_servers["cpu_ms"], "ms", None, "the sum of both"),
        Figure("memory above an idle server", max(one_server["extra_mb"]), "MB", None,
               f"{1000 * max(one_server['extra_mb']) / one_server['waiting']:.0f} kB per waiting caller"),
        Figure("the same for each of two servers", max(two_servers["extra_mb"]), "MB"),
        Figure("transactions of PostgreSQL per purchase, one server", one_server["commits_per_order"], "", TRANSACTIONS_MAX,
               f"{1000 * one_server['wal_mb_per_order']:.0f} kB of write-ahead log"),
        Figure("the same with two servers", two_servers["commits_per_order"], "", None,
               "callbacks at the other server and notifications included"),
        Figure("writes of PostgreSQL's log to its disk per purchase, one server", one_server["writes_per_order"], "", None,
               f"{one_server['writes_a_second']:.0f} per second; one write can serve several commits"),
        Figure("the same with two servers", two_servers["writes_per_order"], "", None,
               f"{two_servers['writes_a_second']:.0f} per second"),
        Figure("requests that poll tasks, per purchase, with callbacks", max(one_server["polls"], two_servers["polls"]), "",
               POLL_REQUESTS_MAX, "one poll confirms a callback"),
    ]  # fmt: skip


def _figures_of_idle_server(quick: bool) -> list[Figure]:
    seconds = 10 if quick else 30
    idle = {tenants: _run("tests/teams/idle.py", tenants=tenants, seconds=seconds) for tenants in IDLE_TENANTS}
    called_server = _run("tests/teams/idle.py", tenants=100, calls=100, seconds=seconds)
    tenants_max = max(IDLE_TENANTS)
    tenant_kb = 1000 * (idle[tenants_max]["memory_mb"] - idle[1]["memory_mb"]) / (tenants_max - 1)
    called_kb = 1000 * (called_server["memory_mb"] - idle[100]["memory_mb"]) / 100
    return [
        *(
            Figure(f"transactions per second of an idle server, {tenants:,} tenants", result["transactions_per_s"], "/s",
                   IDLE_TRANSACTIONS_MAX, f"{100 * result['core']:.1f} % of one core")
            for tenants, result in idle.items()
        ),
        Figure("the same after each of 100 tenants called once", called_server["transactions_per_s"], "/s", IDLE_TRANSACTIONS_MAX,
               f"{called_kb:.0f} kB per tenant until an hour after its last call"),
        Figure("memory per idle tenant of the tokens file", tenant_kb, "kB", IDLE_TENANT_KB_MAX,
               f"{idle[tenants_max]['memory_mb']:.0f} MB with {tenants_max:,} tenants"),
    ]  # fmt: skip


def _figures_of_years(quick: bool) -> list[Figure]:
    entries = QUICK_ENTRIES if quick else YEARS_ENTRIES
    result = _run("tests/teams/years.py", entries=entries, repeats=30 if quick else 100)
    rows = [(name, times, LIST_MS_MAX) for name, times in result["lists"].items()]
    rows += [("the three writes of an order", result["order"], ORDER_MS_MAX)]
    rows += [("search for dead servers", result["search for dead servers"], None)]
    return [
        Figure(f"{entries:,} entries in PostgreSQL: {name}", times["median_ms"], "ms", limit,
               f"the slowest took {times['slowest_ms']:.1f} ms")
        for name, times, limit in rows
    ]  # fmt: skip


def _measure_crowd(callers: int, servers: int) -> dict[str, Any]:
    return _run("tests/teams/crowd.py", "--calm", "--callbacks", callers=callers, servers=servers)


def _run(script: str, *flags: str, **options: int) -> dict[str, Any]:
    """Run a script. Return the JSON in its output."""
    command = [sys.executable, script, *flags]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    process = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if process.returncode:
        raise RuntimeError(f"{script} failed:\n{process.stdout[-3000:]}{process.stderr[-2000:]}")
    return json.loads(next(line for line in process.stdout.splitlines() if line.startswith("{")))
