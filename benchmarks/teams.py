"""What servers of a team bear: one alone, then two behind nginx, with PostgreSQL and a simulated EvoLink that calls back.

Callers of 20 tenants order within five seconds and wait; nothing is killed (`tests/teams/crowd.py --calm`, which also
judges that every order was bought once and answered to its tenant). Everything shares the machine, so two servers do not
help where its cores are busy: the processor time of the servers alone, for each order, says how far a core of their own
would carry them.
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
LOOKS_MAX = 2.0


def run(quick: bool) -> list[Figure]:
    if shutil.which("nginx") is None:
        print("teams: nginx and PostgreSQL are needed (apt-get install nginx-light postgresql)", file=sys.stderr)
        return []
    callers = 40 if quick else 200
    one, two = _crowd(callers, 1), _crowd(callers, 2)
    orders = callers * 5
    return [
        Figure(f"orders a second, {orders} at one server", one["orders_a_second"], "/s", None,
               f"up to {one['waiting']} callers wait at once; half have their picture within {one['median_s']:.1f} s"),
        Figure("the same at two servers", two["orders_a_second"], "/s", None,
               f"{two['orders_a_second'] / one['orders_a_second']:.2f} times as many on this machine"),
        Figure("processor time of the servers for an order, one server", one["cpu_ms"], "ms", None,
               f"a core carries {1000 / one['cpu_ms']:.0f} orders a second"),
        Figure("the same at two servers", two["cpu_ms"], "ms", None, "of both together"),
        Figure("memory above an idle server", max(one["extra_mb"]), "MB", None,
               f"{1000 * max(one['extra_mb']) / one['waiting']:.0f} kB for each waiting caller"),
        Figure("the same at each of two servers", max(two["extra_mb"]), "MB"),
        Figure("requests that read tasks, for each order, with callbacks", max(one["looks"], two["looks"]), "",
               LOOKS_MAX, "a callback is a hint: one look believes it"),
    ]  # fmt: skip


def _crowd(callers: int, servers: int) -> dict[str, Any]:
    command = [
        sys.executable, "tests/teams/crowd.py", "--calm", "--callbacks", "--callers", str(callers), "--servers", str(servers),
    ]  # fmt: skip
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"the crowd went wrong:\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
