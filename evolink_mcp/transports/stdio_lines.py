"""Read and write stdin and stdout as lines, with one thread for each direction. This module imports no SDK.

Before the server exists, `early` may answer a line. The server receives every line, in order.
"""

from __future__ import annotations

import errno
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

from evolink_mcp.transports.json_rpc import INVALID_REQUEST, error_line, request_id_in

TYPE_CHECKING = False  # `typing` takes long to import
if TYPE_CHECKING:
    import logging

LINE_MAX_BYTES = 96 << 20
CHUNK_BYTES = 1 << 18
# With LEAVE_WITHIN_S it stays below the 2 s that clients wait before they terminate the server.
FLUSH_S = 0.3
STDERR = 2
FAILED = 1  # exit code

HandleLine = Callable[[bytes | None], None]  # a line, or None at the end of stdin
Early = Callable[[bytes], bytes | None]


class StdioLines:
    """Both ends of the protocol, with one thread each.

    An unexpected error costs only its line: the client gets a JSON-RPC error, and the thread continues. However a thread
    ends, the server handles the end of stdin.
    """

    def __init__(
        self,
        early: Early,
        ends: tuple[int, int] | None = None,
        *,
        line_max_bytes: int = LINE_MAX_BYTES,
        can_leave: bool = True,
        # sys.exit in a thread would end only this thread.
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        """Begin to read. `early(line)` answers a line before the server exists.

        `ends` are the descriptors to read from and to write to. Without them, take stdin and stdout. `leave(code)` ends
        the process at the end of stdin if the server was never needed. With `can_leave=False` this waits for `allow_leave`.

        Raises:
            OSError: stdin or stdout is closed.
        """
        self._in, self._out = ends or _reserve_standard_streams()
        self._early: Early = early
        self._line_max_bytes = line_max_bytes
        self._can_leave = can_leave
        self._leave = leave
        self._handle: HandleLine | None = None
        self._waiting: list[bytes | None] = []
        self._has_unanswered = False
        self._lock = threading.Lock()
        self._outbox: queue.SimpleQueue[tuple[bytes, Callable[[], object] | None] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, daemon=True, name="stdout")
        self._writer.start()
        # A thread that blocks on stdin must not keep the process.
        threading.Thread(target=self._read, daemon=True, name="stdin").start()

    def handle_lines(self, handle: HandleLine) -> None:
        """Pass every line to `handle`, the earlier lines in this thread. From now on `early` answers nothing."""
        while True:
            with self._lock:
                waiting = self._waiting
                self._waiting = []
                if not waiting:
                    self._handle = handle
                    return
            for line in waiting:
                self._pass(handle, line)

    def allow_leave(self) -> None:
        """The start has no error to report, so the process may end at the end of stdin. Without a request it ends now."""
        with self._lock:
            self._can_leave = True
            self._leave_if_unused()

    def write(self, data: bytes, written: Callable[[], object] | None = None) -> None:
        """Write a line after the earlier ones. Then the writer's thread calls `written()`."""
        self._outbox.put((data, written))

    def flush(self) -> None:
        """Wait until everything is written, at most FLUSH_S: the client may have stopped reading."""
        if threading.current_thread() is self._writer:
            return  # the client has closed stdout
        self._outbox.put(None)
        self._writer.join(FLUSH_S)

    def _read(self) -> None:
        _succeeds(self._read_lines, "reading stdin failed, the server ends")
        self._arrive(None)

    def _read_lines(self) -> None:
        for line in self._lines():
            self._arrive(line)

    def _lines(self) -> Iterator[bytes]:
        """Yield every line that is not blank, the last one also without a line feed. Refuse lines that are too long."""
        rest = bytearray()
        is_too_long = False
        while chunk := os.read(self._in, CHUNK_BYTES):
            rest += chunk
            # A search in the whole rest would need quadratic time for a long line.
            if b"\n" not in chunk:
                if len(rest) > self._line_max_bytes:
                    rest.clear()
                    is_too_long = True
                continue
            *lines, tail = bytes(rest).split(b"\n")
            rest = bytearray(tail)
            if is_too_long:
                is_too_long = False
                del lines[0]
                self._refuse_long_line()
            yield from filter(bytes.strip, lines)
        if is_too_long:
            self._refuse_long_line()
        elif rest.strip():
            yield bytes(rest)

    def _refuse_long_line(self) -> None:
        self.write(error_line(None, INVALID_REQUEST, f"A line has more than {self._line_max_bytes >> 20} MiB"))

    def _arrive(self, line: bytes | None) -> None:
        with self._lock:
            handle = self._handle
            if handle is None:
                self._keep(line)
                return
        self._pass(handle, line)

    def _pass(self, handle: HandleLine, line: bytes | None) -> None:
        if line is None:
            if not _succeeds(lambda: handle(None), "the end of stdin could not be handled, the process ends now"):
                self._leave(FAILED)
        elif not _succeeds(lambda: handle(line), "a line of stdin could not be handled"):
            text = "Invalid request: the server could not handle this message"
            self.write(error_line(request_id_in(line), INVALID_REQUEST, text))

    def _keep(self, line: bytes | None) -> None:
        """Keep a line until the server exists, and let `early` answer it. If stdin ends and no request waits, end the process."""
        self._waiting.append(line)
        self._leave_if_unused()
        if line is not None and not _succeeds(lambda: self._answer(line), "the early answers failed, the SDK answers"):
            self._early = lambda _: None
            self._has_unanswered = True

    def _leave_if_unused(self) -> None:
        """End the process if stdin has ended and no request waits for the server."""
        if self._can_leave and not self._has_unanswered and None in self._waiting:
            self.flush()
            self._leave(0)

    def _answer(self, line: bytes) -> None:
        answer = self._early(line)
        if answer is not None:
            self.write(answer)
        # An escape could spell the name id.
        elif b'"id"' in line or b'"method"' not in line or b"\\" in line:  # a notification needs no answer
            self._has_unanswered = True

    def _write(self) -> None:
        is_flushed = _succeeds(self._write_lines, "writing stdout failed, the server ends")
        if not is_flushed:
            self._arrive(None)  # the client can get no answer any more

    def _write_lines(self) -> None:
        """Write until `flush` ends it."""
        while (item := self._outbox.get()) is not None:
            data, written = item
            view = memoryview(data)
            while view:
                # A pipe may accept only a part. A text stream would write CRLF on Windows.
                view = view[os.write(self._out, view) :]
            if written is not None:
                _succeeds(written, "a written answer could not be recorded")


def _succeeds(act: Callable[[], object], failure: str) -> bool:
    """Call `act`. If it fails, log `failure` and return False: this is the outer edge of both threads."""
    try:
        act()
    except OSError as error:
        _log().debug("%s (%s)", failure, error.strerror)  # the client has closed its end
    except Exception as error:  # noqa: BLE001 - no message may end the thread that reads or writes all of them
        _log().error("%s (%s)", failure, type(error).__name__)
    else:
        return True
    return False


def _log() -> logging.Logger:
    import logging  # it takes a quarter of the time before the first answer

    return logging.getLogger(__name__)


def _reserve_standard_streams() -> tuple[int, int]:
    """Reserve stdin and stdout for the protocol. Other code finds the end of stdin, and its prints go to stderr."""
    # Python sets a stream without a descriptor to None.
    if any(stream is None for stream in (sys.stdin, sys.stdout)):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    wire_in, wire_out = _above_standard(0), _above_standard(1)
    with suppress(OSError):  # only the prints of other code need this
        null_in = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null_in, 0)
        os.close(null_in)
        try:
            os.dup2(STDERR, 1)
        except OSError:  # there is no stderr
            null_out = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null_out, 1)
            os.close(null_out)
    return wire_in, wire_out


def _above_standard(fd: int) -> int:
    """Return a copy of `fd` that is not a standard descriptor, even if one of these is closed."""
    copy = os.dup(fd)
    if copy > STDERR:
        return copy
    try:
        return _above_standard(fd)
    finally:
        os.close(copy)
