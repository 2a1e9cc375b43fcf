"""The two pipes between a client and the stdio transport, both in the test's own process."""

from __future__ import annotations

import json
import os
import queue
import threading
from typing import Any

from child_processes import ANSWER_TIMEOUT_S

from evolink_mcp.transports.stdio_lines import Early, StdioLines


def no_answer(line: bytes) -> bytes | None:
    return None


class Pipes:
    """The two pipes of a client, and the lines that the server received."""

    def __init__(self) -> None:
        self._server_in, self._to_server = os.pipe()
        self._from_server, self._server_out = os.pipe()
        self._reader: threading.Thread | None = None
        self._output: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._handled_lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.exit_codes: queue.SimpleQueue[int] = queue.SimpleQueue()

    def open(self, early: Early = no_answer, *, reads_from: Any = None, **options: Any) -> StdioLines:
        """Begin to read from the client, or from `reads_from`."""
        pipes = (self._server_in if reads_from is None else reads_from, self._server_out)
        return StdioLines(early, pipes, leave=self.exit_codes.put, **options)

    def send(self, *lines: bytes) -> None:
        self.write(b"".join(line + b"\n" for line in lines))

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._to_server, view) :]

    def receive(self) -> Any:
        """Return the next message of the server."""
        return json.loads(self._next_line())

    def read_rest(self) -> list[bytes]:
        """Close the server's end, and return all lines that `receive` has not returned."""
        os.close(self._server_out)
        self._server_out = -1
        return list(iter(self._next_line, b""))

    def close_stdin(self) -> None:
        if self._to_server >= 0:
            os.close(self._to_server)
            self._to_server = -1

    def stop_reading(self) -> None:
        """Close the client's end of stdout. Call it only before `receive`."""
        os.close(self._from_server)
        self._from_server = -1

    def close(self) -> None:
        self.close_stdin()
        if self._server_out >= 0:
            os.close(self._server_out)
        if self._reader is not None:
            self._reader.join()
        elif self._from_server >= 0:
            os.close(self._from_server)

    def handle(self, line: bytes | None) -> None:
        """Handle a line as the server does."""
        self._handled_lines.put(line)

    def next_handled(self) -> bytes | None:
        """Return the next line that the server handled. None is the end of stdin."""
        return self._handled_lines.get(timeout=ANSWER_TIMEOUT_S)

    def exit_code(self) -> int:
        return self.exit_codes.get(timeout=ANSWER_TIMEOUT_S)

    def _next_line(self) -> bytes:
        if self._reader is None:
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()
        return self._output.get(timeout=ANSWER_TIMEOUT_S)

    def _read(self) -> None:
        with os.fdopen(self._from_server, "rb") as stream:
            for line in stream:
                self._output.put(line)
        self._output.put(b"")
