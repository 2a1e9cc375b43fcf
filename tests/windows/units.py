"""Run the unit tests with a Windows Python under Wine: each file in its own process, several processes at once.

    python3 units.py PYTHON_EXE PROJECT_FOLDER TEST_FILES…

A test that hangs ends its process after HANG_S seconds with the traceback of every thread. A file that fails or hangs runs
once more, because Wine can exceed the time limits of tests on a busy machine. The script prints both outputs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HANG_S = 300
FILE_S = 900
READ_S = 3
# Python runs this. An interpreter that does not exit after its tests ends with the traceback of every thread.
PROGRAM = """
import faulthandler, sys, pytest
code = pytest.main(sys.argv[1:])
faulthandler.dump_traceback_later(60, exit=True)
sys.exit(code)
"""
WINE = "/usr/lib/wine/wine64"
NO_TESTS_COLLECTED = 5


def run(python: str, project: Path, file: str) -> tuple[int, str]:
    """Run the tests of one file. Return pytest's exit code and its output."""
    name = file.removeprefix("tests/").removesuffix(".py").replace("/", "-")
    options = {
        "addopts": "",
        "cache_dir": f"C:\\cache-{name}",
        "faulthandler_timeout": HANG_S,
        "faulthandler_exit_on_timeout": True,
    }
    command = [WINE, python, "-c", PROGRAM, "-q", "-rfEs", "--basetemp", f"C:\\{name}", file]
    for option, value in options.items():
        command += ["-o", f"{option}={value}"]
    process = subprocess.Popen(
        command, cwd=project, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    pipe = process.stdout
    assert pipe is not None
    lines: list[bytes] = []
    # Programs that Wine starts can keep the pipe open after Python ended. So wait for Python and not for the pipe's end.
    reader = threading.Thread(target=lambda: lines.extend(pipe), daemon=True)
    reader.start()
    try:
        code = process.wait(FILE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
        lines.append(b"\nended after %d s" % FILE_S)
    reader.join(READ_S)
    return code, b"".join(lines).decode(errors="replace")


def check(python: str, project: Path, file: str) -> bool:
    """Run one file, and once more if it fails. Print the result. Return whether it passed."""
    for attempt in ("first", "second"):
        started_at = time.monotonic()
        code, output = run(python, project, file)
        duration_s = time.monotonic() - started_at
        lines = output.rstrip().splitlines()
        if code in (0, NO_TESTS_COLLECTED):
            print(f"ok       {file}  {lines[-1] if lines else ''} [{duration_s:.0f} s]", flush=True)
            reasons = [line for line in lines if line.startswith("SKIPPED")]
            print(*reasons, sep="\n", end="\n" if reasons else "", flush=True)
            return True
        print(
            f"FAILED   {file}  {attempt} run, exit code {code} [{duration_s:.0f} s]",
            *lines[-120:],
            sep="\n",
            flush=True,
        )
    return False


def workers() -> int:
    """Return the number of simultaneous processes. Each waits for Wine's server for a quarter of its time."""
    return 1 + (os.cpu_count() or 1)


def main(arguments: Sequence[str]) -> int:
    """Run all files. Return 1 if one failed twice."""
    python, project, *files = arguments
    with ThreadPoolExecutor(workers()) as pool:
        results = Counter(pool.map(lambda file: check(python, Path(project), file), files))
    print(f"{results[True]} files passed, {results[False]} failed")
    return 1 if results[False] or not results[True] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
