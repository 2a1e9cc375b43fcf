"""This process's stdin and stdout as lines of bytes, read and written by a thread each, before anything is imported.

Until the server is there, `early` may answer a line; every line is kept for the server, in order.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import cast

log = logging.getLogger(__name__)

LINE_MAX_BYTES = 96 << 20
INVALID_REQUEST = -32600
FLUSH_S = 0.3
STDERR = 2

Take = Callable[[bytes | None], None]  # a line, or None at the end of stdin
Early = Callable[[bytes], bytes | None]


class Wires:
    """The two ends of the protocol. `early(line)` answers what can be answered before the server is there."""

    def __init__(self, early: Early) -> None:
        """Take stdin and stdout and begin to read.

        Raises:
            OSError: one of them is closed.
        """
        self._in, self._out = _claimed()
        self._early = early
        self._take: Take | None = None
        self._waiting: list[bytes | None] = []
        self._unanswered = False
        self._lock = threading.Lock()
        self._outbox: queue.SimpleQueue[tuple[bytes, Callable[[], object] | None] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, daemon=True, name="stdout")
        self._writer.start()
        threading.Thread(target=self._read, daemon=True, name="stdin").start()

    def take_lines(self, take: Take) -> None:
        """Give every line to `take`, the earlier ones first, in this thread. Nothing is answered early from now on."""
        while True:
            with self._lock:
                waiting, self._waiting = self._waiting, []
                if not waiting:
                    self._take = take
                    return
            for line in waiting:
                take(line)

    def write(self, data: bytes, written: Callable[[], object] | None = None) -> None:
        """Write a line, after those before it. `written()` is called in the writer's thread when it was."""
        self._outbox.put((data, written))

    def flush(self) -> None:
        """Wait until everything is written, but not long: nobody may be reading."""
        if threading.current_thread() is self._writer:
            return  # it ends because nobody reads any more
        self._outbox.put(None)
        self._writer.join(FLUSH_S)

    def _read(self) -> None:
        rest = bytearray()
        too_long = False
        try:
            while chunk := os.read(self._in, 1 << 18):
                rest += chunk
                if b"\n" not in chunk:
                    if len(rest) > LINE_MAX_BYTES:
                        rest.clear()
                        too_long = True
                    continue
                *lines, tail = bytes(rest).split(b"\n")
                rest = bytearray(tail)
                if too_long:
                    too_long = False
                    del lines[0]
                    self.write(error_line(None, INVALID_REQUEST, f"A line has more than {LINE_MAX_BYTES >> 20} MiB"))
                for line in lines:
                    if line.strip():
                        self._arrive(line)
            self._arrive(None)
        except OSError:
            log.debug("stdin was closed")
            self._arrive(None)

    def _arrive(self, line: bytes | None) -> None:
        with self._lock:
            take = self._take
            if take is None:
                self._keep(line)
                return
        take(line)

    def _keep(self, line: bytes | None) -> None:
        """Answer or note a line before the server is there. Nothing is left to do at an end before any question."""
        if line is None and not self._unanswered:
            self.flush()
            os._exit(0)
        self._waiting.append(line)
        if line is None:
            return
        answer = self._early(line)
        if answer is not None:
            self.write(answer)
        elif b'"id"' in line or b'"method"' not in line:  # a notification needs no answer
            self._unanswered = True

    def _write(self) -> None:
        try:
            while (item := self._outbox.get()) is not None:
                data, written = item
                view = memoryview(data)
                while view:
                    view = view[os.write(self._out, view) :]
                if written is not None:
                    written()
        except OSError:
            log.debug("stdout was closed by the client")
            self._arrive(None)  # nobody can be answered any more: end as at the end of stdin


def error_line(name: str | float | None, code: int, text: str) -> bytes:
    """A JSON-RPC error as a line; `name` is the id of what it answers."""
    import json

    return json.dumps({"jsonrpc": "2.0", "id": name, "error": {"code": code, "message": text}}).encode() + b"\n"


def _claimed() -> tuple[int, int]:
    """Keep stdin and stdout for the protocol: other code that reads stdin finds its end, and its prints go to stderr."""
    # Python's types do not say so: it has no stream where the descriptor was closed.
    if None in cast("list[object]", [sys.stdin, sys.stdout]):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    wire_in, wire_out = _above_standard(0), _above_standard(1)
    with suppress(OSError):  # if they cannot be diverted, only other code's prints could disturb
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        try:
            os.dup2(STDERR, 1)
        except OSError:  # there is no stderr
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.close(nowhere)
    return wire_in, wire_out


def _above_standard(fd: int) -> int:
    """A copy of `fd` that is no standard descriptor, even if one of those is closed."""
    copy = os.dup(fd)
    if copy > STDERR:
        return copy
    try:
        return _above_standard(fd)
    finally:
        os.close(copy)
