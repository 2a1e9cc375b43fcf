"""Send the requests of hostile tenants to a server: `python -m benchmarks.hostile_clients FILE`.

The file has the port, the tokens and the issuer's key. The requests are bytes that were built before, and the clients share one
event loop, so that they need little time of the processor. The process runs until it is killed.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.hostile import MARKER_FLOODS
from benchmarks.normal_clients import Jwts, call, head, png
from evolink_mcp.images.references import REFERENCE_MAX_BYTES

SMALL_BUFFER = 4_096
ANSWER_MAX_BYTES = 1 << 16
CALL_INTERVAL_S = 0.05
RETRY_INTERVAL_S = 1.0
UNREAD_REQUESTS = 40
UNREAD_CONNECTIONS = 3
SLOW_CONNECTIONS = 4
SLOW_BODY_BYTES = 400_000
SLOW_BYTE_INTERVAL_S = 1.0
TIMEOUT_S = 60.0
IMAGES_OF_A_BUYER = 2

Action = Callable[[], Awaitable[None]]


class Clients:
    """The hostile clients of one server. Each method is an endless attack of one tenant."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._numbers = count()
        self._floods = [make() for make in MARKER_FLOODS]
        self._large = memoryview(png().ljust(REFERENCE_MAX_BYTES, b"\0"))

    async def _connect(self, buffer: int | None = None) -> socket.socket:
        connection = socket.socket()
        connection.setblocking(False)
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        try:
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self._port))
        except BaseException:
            connection.close()
            raise
        return connection

    async def _exchange(self, *parts: bytes | memoryview) -> bytes:
        """Send the parts on a new connection, and return the begin of the answer. Empty: the server closed it."""
        loop = asyncio.get_running_loop()
        with await self._connect() as connection:
            async with asyncio.timeout(TIMEOUT_S):
                with suppress(ConnectionError):
                    for part in parts:
                        await loop.sock_sendall(connection, part)
                return await loop.sock_recv(connection, ANSWER_MAX_BYTES)

    async def unread(self, token: str) -> None:
        """Send many requests on each connection, and read no answer."""

        async def attack() -> None:
            loop = asyncio.get_running_loop()
            with await self._connect(SMALL_BUFFER) as connection:
                async with asyncio.timeout(TIMEOUT_S):
                    await loop.sock_sendall(connection, call(token, "tools/list") * UNREAD_REQUESTS)
                    while True:  # a closed connection refuses a further byte
                        await asyncio.sleep(RETRY_INTERVAL_S)
                        await loop.sock_sendall(connection, b"\n")

        await _run_together(attack, UNREAD_CONNECTIONS)

    async def uploads(self, token: str) -> None:
        """Upload images of the largest size."""
        await self._upload(token, self._large)

    async def markers(self, token: str) -> None:
        """Upload images that need much work, and buy a few images with them."""
        await self._upload(token, self._floods[next(self._numbers) % len(self._floods)])

    async def _upload(self, token: str, content: bytes | memoryview) -> None:
        answer = await self._exchange(head("PUT", "/uploads", token, len(content)), content)
        if b" 201 " not in answer[:20]:
            await asyncio.sleep(RETRY_INTERVAL_S)

    async def buy(self, token: str, prompts: list[str]) -> None:
        """Buy images. Each prompt is unique, so no purchase is deduplicated."""
        for prompt in prompts:
            arguments = {"prompt": f"sim:slow=2 {prompt}", "size": "1:1", "quality": "low"}
            await self._exchange(call(token, "tools/call", name="generate_image", arguments=arguments))

    async def slow(self, token: str) -> None:
        """Send the bodies of calls and of one upload byte by byte."""

        async def attack(method: str, path: str) -> None:
            loop = asyncio.get_running_loop()
            with await self._connect() as connection:
                await loop.sock_sendall(connection, head(method, path, token, SLOW_BODY_BYTES))
                while True:
                    await asyncio.sleep(SLOW_BYTE_INTERVAL_S)
                    await loop.sock_sendall(connection, b" ")

        await _run_together(lambda: attack("POST", "/mcp"), SLOW_CONNECTIONS)

    async def free(self, token: str) -> None:
        """Call a free tool."""
        await self._exchange(call(token, "tools/call", name="compute_size", arguments={"size": "16:9"}))
        await asyncio.sleep(CALL_INTERVAL_S)


async def _run_together(action: Action, number: int) -> None:
    await asyncio.gather(*(_run_once(action) for _ in range(number)))


async def _run_once(action: Action) -> None:
    with suppress(OSError, TimeoutError):
        await action()


async def _run_forever(action: Action) -> None:
    while True:
        with suppress(OSError, TimeoutError):
            await action()
            continue
        await asyncio.sleep(RETRY_INTERVAL_S)


async def run(plan: dict[str, Any]) -> None:
    """Run the attacks of the plan: the tokens of each kind, and the numbers of callers with new subjects and key IDs."""
    clients = Clients(plan["port"])
    jwts = Jwts(plan["key"], plan["issuer"], plan["audience"])
    async with asyncio.TaskGroup() as group:
        for kind in ("unread", "uploads", "markers", "slow"):
            for token in plan[kind]:
                group.create_task(_run_forever(lambda kind=kind, token=token: getattr(clients, kind)(token)))
                group.create_task(_run_forever(lambda token=token: clients.free(token)))
        for number, token in enumerate([*plan["uploads"], *plan["markers"]]):
            prompts = [f"hostile {number} {image}" for image in range(IMAGES_OF_A_BUYER)]
            group.create_task(_run_once(lambda token=token, prompts=prompts: clients.buy(token, prompts)))
        for _ in range(plan["subjects"]):
            group.create_task(_run_forever(lambda: clients.free(jwts.token(secrets.token_hex(8)))))
        for _ in range(plan["kids"]):
            group.create_task(_run_forever(lambda: clients.free(jwts.token("x", secrets.token_hex(8)))))
        print("running", flush=True)


if __name__ == "__main__":
    asyncio.run(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
