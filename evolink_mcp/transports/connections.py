"""Limit the connections of an HTTP server, so that slow clients and many clients do not exhaust its descriptors."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

# Free descriptors for the journal, EvoLink, images and the interpreter.
RESERVED_DESCRIPTORS = 64
# asyncio needs some rounds of its loop from accepting a connection to the protocol, and as many to close it.
ACCEPT_ROUNDS = 5
WINDOWS_DESCRIPTORS = 8_192
UNLIMITED_DESCRIPTORS = 1_000_000
BUSY_RESPONSE = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\nconnection: close\r\n"
    b"content-type: text/plain\r\ncontent-length: 46\r\n\r\nToo many connections; try again in a moment.\r\n"
)


def descriptor_limit() -> int:
    """Return how many files and connections this process may open."""
    if sys.platform == "win32":
        return WINDOWS_DESCRIPTORS
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UNLIMITED_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits for the connections of one server.

    It serves at most `served_max` connections. `refused_max` further ones wait for their request and get a 503.
    `accepted_at_once` connections are accepted in one round of the event loop. The system keeps up to `waiting_max`
    further ones until then. An answer that its client does not read ends after `unread_timeout_s`. All such answers
    together have at most `unread_max_bytes`; above that, the one that waits longest ends.
    """

    served_max: int
    refused_max: int
    accepted_at_once: int
    request_head_timeout_s: float = 10.0
    refusal_timeout_s: float = 1.0
    waiting_max: int = 4_096
    unread_timeout_s: float = 30.0
    unread_max_bytes: int = 32 << 20

    @classmethod
    def for_descriptors(cls, descriptors: int) -> Self:
        """Return the limits for a process with this number of descriptors."""
        accepted_at_once = min(max(descriptors // 64, 8), 512)
        refused_max = 4 * accepted_at_once
        served_max = descriptors - RESERVED_DESCRIPTORS - ACCEPT_ROUNDS * accepted_at_once - refused_max
        return cls(max(served_max, 1), refused_max, accepted_at_once)


async def close_port(server: asyncio.Server, make_protocol: Callable[[], asyncio.Protocol]) -> None:
    """Close the port of a server. Serve the connections in the system's queue, because closing would reset them."""
    queued: list[socket.socket] = []
    for listener in server.sockets:
        # asyncio's socket object has no `accept`, its duplicate has.
        with suppress(OSError), listener.dup() as copy:  # BlockingIOError: the queue is empty
            while True:
                queued.append(copy.accept()[0])
    server.close()
    for connection in queued:
        connection.setblocking(False)
        await asyncio.get_running_loop().connect_accepted_socket(make_protocol, connection)


class UnreadAnswers:
    """The connections of one server whose clients do not read. The one that waits longest is first.

    A connection is here while asyncio's buffer is above its high-water mark of 64 KiB.
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        self._limits = limits
        self._timers: dict[asyncio.Transport, asyncio.TimerHandle] = {}

    def add(self, transport: asyncio.Transport) -> None:
        """The client of this connection stopped reading."""
        self._start_timer(transport)
        while sum(transport.get_write_buffer_size() for transport in self._timers) > self._limits.unread_max_bytes:
            self._abort(next(iter(self._timers)))

    def remove(self, transport: asyncio.Transport) -> None:
        """The client reads again, or the connection is closed."""
        timer = self._timers.pop(transport, None)
        if timer is not None:
            timer.cancel()

    def _start_timer(self, transport: asyncio.Transport) -> None:
        loop = asyncio.get_running_loop()
        size = transport.get_write_buffer_size()
        self._timers[transport] = loop.call_later(self._limits.unread_timeout_s, self._check, transport, size)

    def _check(self, transport: asyncio.Transport, earlier_size: int) -> None:
        """End the connection unless its client read something since the timer began."""
        if transport.get_write_buffer_size() < earlier_size:
            self._start_timer(transport)
        else:
            self._abort(transport)

    def _abort(self, transport: asyncio.Transport) -> None:
        self.remove(transport)
        # Not close(), which would wait until the client has read everything.
        transport.abort()


class LimitedH11Protocol(H11Protocol):
    """One connection. It closes without a complete request head, and answers 503 above the limit of connections."""

    def __init__(self, *args: Any, limits: ConnectionLimits, unread: UnreadAnswers, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limits = limits
        self._unread = unread
        self._is_refused = False

    def connection_made(self, transport: Any) -> None:
        """Accept the connection, or prepare its 503 if the limit is reached."""
        super().connection_made(transport)
        limits = self._limits
        excess = len(self.connections) - limits.served_max
        self._is_refused = excess > 0
        timeout_s = limits.refusal_timeout_s if self._is_refused else limits.request_head_timeout_s
        # uvicorn has no timeout for a request head, only for idle connections after an answer.
        self._timer = self.loop.call_later(timeout_s, self._close_silent)
        if excess > limits.refused_max:
            self._refuse()

    def data_received(self, data: bytes) -> None:
        """Read the request. A refused connection gets its 503 only now: an earlier answer could be lost."""
        if self._is_refused:
            self._refuse()
        else:
            super().data_received(data)

    def pause_writing(self) -> None:
        """The client does not read its answer."""
        super().pause_writing()
        self._unread.add(self.transport)

    def resume_writing(self) -> None:
        """The client has read enough of its answer."""
        self._unread.remove(self.transport)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers of a closed connection."""
        self._timer.cancel()
        self._unread.remove(self.transport)
        super().connection_lost(exc)

    def _refuse(self) -> None:
        self.transport.write(BUSY_RESPONSE)
        self.transport.close()

    def _close_silent(self) -> None:
        if self._is_refused:
            self._refuse()
        # uvicorn sets `cycle` when the request head is complete.
        elif cast("Any", self.cycle) is None:
            self.transport.close()
