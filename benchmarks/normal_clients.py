"""Clients that call a server over raw sockets and measure the time until each answer."""

from __future__ import annotations

import io
import json
import math
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import jwt
from PIL import Image

CALL_INTERVAL_S = 4.0
IMAGE_INTERVAL_S = 2.0
TIMEOUT_S = 60.0
JWT_LIFETIME_S = 3_600
KEY_ID = "benchmark"


class Jwts:
    """Sign JWTs with the issuer's private key, a PEM text."""

    def __init__(self, key: str, issuer: str, audience: str) -> None:
        self._key = key
        self._claims = {"iss": issuer, "aud": audience, "exp": int(time.time()) + JWT_LIFETIME_S}

    def token(self, subject: str, key_id: str = KEY_ID) -> str:
        return jwt.encode(self._claims | {"sub": subject}, self._key, "EdDSA", {"kid": key_id})


def head(method: str, path: str, token: str, size: int) -> bytes:
    """Return the head of an HTTP request with a body of `size` bytes."""
    return (
        f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {token}\r\n"
        "accept: application/json, text/event-stream\r\ncontent-type: application/json\r\n"
        f"mcp-protocol-version: 2025-06-18\r\ncontent-length: {size}\r\n\r\n"
    ).encode()


def call(token: str, method: str, **params: Any) -> bytes:
    """Return an HTTP request with one call."""
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
    return head("POST", "/mcp", token, len(body)) + body


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 9, 9)).save(out, "PNG")
    return out.getvalue()


def exchange(port: int, request: bytes) -> tuple[int, bytes]:
    """Send a request on a new connection. Return the status and the answer; status 0: no answer."""
    answer = bytearray()
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
        connection.sendall(request)
        while part := connection.recv(1 << 16):
            answer += part
            if _is_complete(answer):
                return int(answer[9:12]), bytes(answer)
    return 0, bytes(answer)


def _is_complete(answer: bytearray) -> bool:
    answer_head, end, body = bytes(answer).partition(b"\r\n\r\n")
    if not end:
        return False
    if b"transfer-encoding: chunked" in answer_head.lower():
        return body.endswith(b"0\r\n\r\n")
    size = answer_head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return len(body) >= int(size or 0)


class NormalClients:
    """Clients that call a free tool and buy images, each in a thread, until `stop`.

    `call_s` and `image_s` are seconds until the answer. A call without a usable answer counts as infinite, and `failures`
    has its last characters.
    """

    def __init__(self, port: int, tokens: list[str], *, buys_images: bool = True) -> None:
        self.call_s: list[float] = []
        self.image_s: list[float] = []
        self.failures: list[str] = []
        self._port = port
        self._tokens = tokens
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=[token]) for token in tokens]
        if buys_images:
            self._threads += [threading.Thread(target=self._buy, args=[token]) for token in tokens]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Wait for the last answers."""
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _call(self, token: str) -> None:
        request = call(token, "tools/call", name="compute_size", arguments={"size": "16:9"})
        if self._end.wait(CALL_INTERVAL_S * self._tokens.index(token) / len(self._tokens)):
            return
        while not self._end.wait(CALL_INTERVAL_S):
            self.call_s.append(self._measure(request, b'"structuredContent"'))

    def _buy(self, token: str) -> None:
        if self._end.wait(IMAGE_INTERVAL_S * self._tokens.index(token)):
            return
        while True:
            prompt = f"sim:slow=2 normal {time.monotonic_ns()}"
            arguments = {"prompt": prompt, "size": "1:1", "quality": "low"}
            request = call(token, "tools/call", name="generate_image", arguments=arguments)
            self.image_s.append(self._measure(request, b'"status":"completed"'))
            if self._end.wait(IMAGE_INTERVAL_S * len(self._tokens)):
                return

    def _measure(self, request: bytes, sign: bytes) -> float:
        started_at = time.monotonic()
        status, answer = exchange(self._port, request)
        if status == 200 and sign in answer.replace(b'": "', b'":"'):
            return time.monotonic() - started_at
        self.failures.append(f"{status} …{answer[-200:]!r}")
        return math.inf
