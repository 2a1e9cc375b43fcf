"""Measure all figures in one run: `python -m benchmarks [--json] [--quick] [--only NAME]`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from importlib.metadata import version

from benchmarks import calls, crowd, derive, hostile, ledger, peers, polls, previews, shares, start, teams, tenants, web
from benchmarks.figures import Figure

PARTS = {
    "start": start,
    "calls": calls,
    "polls": polls,
    "crowd": crowd,
    "web": web,
    "teams": teams,
    "journal": ledger,
    "previews": previews,
    "derive": derive,
    "share": shares,
    "hostile": hostile,
    "tenants": tenants,
    "peers": peers,
}


def main() -> int:
    options = _parser().parse_args()
    names = options.only or list(PARTS)
    results: dict[str, list[Figure]] = {}
    failed: list[str] = []
    is_text = not (options.json or options.markdown)
    if is_text:
        print("\n".join(f"# {name}: {value}" for name, value in _machine().items()))
    for name in names:
        started = time.perf_counter()
        try:
            results[name] = PARTS[name].run(options.quick)
        except Exception:  # noqa: BLE001 - the figures of the other parts are still valid
            traceback.print_exc()
            failed.append(name)
        else:
            # An interrupted run keeps the figures of its finished parts.
            if is_text:
                print("\n".join(["", PARTS[name].TITLE, *(figure.line() for figure in results[name])]), flush=True)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    if options.json:
        print(json.dumps(_data(results, quick=options.quick), indent=2, ensure_ascii=False))
    elif options.markdown:
        print("| Figure | Measured | Target | | |\n|---|---|---|---|---|")
        for name, figures in results.items():
            print("\n".join([f"| **{PARTS[name].TITLE}** | | | | |", *(figure.row() for figure in figures)]))
    missed = [figure.name for figures in results.values() for figure in figures if figure.is_met is False]
    if missed:
        print(f"{len(missed)} not met: {'; '.join(missed)}", file=sys.stderr)
    if failed:
        print(f"parts that failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or (missed and options.strict) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--markdown", action="store_true", help="the table of docs/speed.md")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and smaller crowds, about a minute")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a figure misses its target")
    parser.add_argument("--only", action="append", choices=PARTS, metavar="NAME", help=f"one part: {', '.join(PARTS)}")
    return parser


def _machine() -> dict[str, str]:
    busy = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return {
        "machine": f"{os.cpu_count()} cores{busy}",
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {version(name)}" for name in ("mcp", "httpx2", "pydantic", "pillow")),
    }


def _data(results: dict[str, list[Figure]], *, quick: bool) -> dict[str, object]:
    parts = {name: [figure.data() for figure in figures] for name, figures in results.items()}
    return {**_machine(), "quick": quick, "parts": parts}


if __name__ == "__main__":
    sys.exit(main())
