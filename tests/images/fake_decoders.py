"""Programs in place of the decoder process. They send its greeting, and then they answer wrongly or not at all.

They start with `-I`, as the real one does, and import only the standard library.
"""

from __future__ import annotations

import sys
from pathlib import Path

GREET = """
import os, sys
requests = os.fdopen(0, "rb")
answers = os.fdopen(1, "wb")
def answer(data):
    answers.write(data)
    answers.flush()
def request():
    head = requests.read(26)
    requests.read(int.from_bytes(head[14:18], "little"))
    return requests.read(int.from_bytes(head[18:26], "little"))
answer(b"EVG1" + bytes([15]))
"""
REFUSE = r'answer(b"EVA1\x01" + bytes(28))'


def program(body: str) -> list[str]:
    """Return the command of a decoder that greets and then runs `body`."""
    return [sys.executable, "-I", "-c", GREET + body]


def silent_decoder(marker: Path) -> list[str]:
    """Return a decoder that writes its process ID to `marker` and never answers."""
    return program(f"request()\nopen({str(marker)!r}, 'w').write(str(os.getpid()))\nwhile True: sys.stdin.read()")


def _child_with_the_output(marker: Path) -> str:
    """Return code that starts a child, which keeps the output open, and writes the child's process ID to `marker`."""
    return f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-I", "-c", "import time; time.sleep(600)"], stdin=subprocess.DEVNULL)
with open({str(marker)!r}, "w") as file:
    file.write(str(child.pid))
"""


def with_inherited_output(marker: Path) -> list[str]:
    """Return a decoder that never answers. Its child keeps the output open. `marker` has the process ID of the child."""
    # The child starts before the greeting, because the deadline of the first request begins with the greeting.
    body = f"{_child_with_the_output(marker)}{GREET}request()\ntime.sleep(600)"
    return [sys.executable, "-I", "-c", body]


def silent_with_inherited_output(marker: Path) -> list[str]:
    """Return the same without a greeting."""
    return [sys.executable, "-I", "-c", f"{_child_with_the_output(marker)}time.sleep(600)"]


def answering(data: bytes) -> list[str]:
    """Return a decoder that answers each request with `data`."""
    return program(f"while requests.peek(1):\n    request()\n    answer({data!r})")


def answering_once(data: bytes) -> list[str]:
    """Return a decoder that answers its first request with `data` and ends."""
    return program(f"request()\nanswer({data!r})")


# Refuses an image, unless its content is "endless": then it never answers.
ENDLESS_OR_REFUSE = program(
    f"""
import threading
while requests.peek(1):
    if request() == b"endless":
        threading.Event().wait()
    {REFUSE}
"""
)
