"""Requests with an image as a data: URI: only with a token, few at the same time, and each with a limit."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import anyio
import pytest
from drawings import noise
from team_server import ANNA, open_team_server

from evolink_mcp.transports.authentication import AuthFailure
from evolink_mcp.transports.http import LARGE_BODIES, REQUEST_MAX_BYTES
from evolink_mcp.transports.http_guard import HttpGuard, LargeBodies

pytestmark = pytest.mark.anyio
SMALL = 1_000
LARGE = LargeBodies(5_000, at_once=2, timeout_s=60.0)
PART = 500


class KnownToken:
    """An authenticator that knows one token."""

    async def authenticate(self, headers: dict[bytes, bytes]) -> object | AuthFailure:
        return "anna" if headers.get(b"authorization") == b"Bearer known" else AuthFailure(401, "Unknown token.")


class HeldApp:
    """An app that records the sizes of bodies and answers only after `release` is set."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.release = anyio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.sizes.append(len((await receive())["body"]))
        await self.release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def post(guard: HttpGuard, size: int, token: bytes = b"Bearer known") -> int:
    """Send a body in parts. Return the status of the answer."""
    parts = [PART] * (size // PART) + ([size % PART] if size % PART else [])
    answers: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        part = b"x" * parts.pop()
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: dict[str, Any]) -> None:
        answers.append(message)

    headers = [(b"host", b"localhost"), (b"authorization", token)]
    with anyio.fail_after(300):
        await guard({"type": "http", "method": "POST", "path": "/mcp", "headers": headers}, receive, send)
    return answers[0]["status"]


def guard_of(app: HeldApp, *, has_tokens: bool = True) -> HttpGuard:
    authenticator: Any = KnownToken() if has_tokens else None
    return HttpGuard(app, (), SMALL, authenticator=authenticator, large_bodies=LARGE)


@pytest.mark.parametrize(
    ("size", "status"), [(SMALL, 200), (SMALL + 1, 200), (LARGE.body_max_bytes, 200), (LARGE.body_max_bytes + 1, 413)]
)
async def test_a_body_of_a_caller_with_a_token_may_be_large(size: int, status: int) -> None:
    app = HeldApp()
    app.release.set()
    assert await post(guard_of(app), size) == status
    assert app.sizes == ([size] if status == 200 else [])


async def test_a_body_without_a_token_may_not_be_large() -> None:
    app = HeldApp()
    app.release.set()
    guard = guard_of(app, has_tokens=False)
    assert await post(guard, SMALL) == 200
    assert await post(guard, SMALL + 1) == 413
    assert await post(guard_of(app), LARGE.body_max_bytes, token=b"Bearer other") == 401


async def test_few_large_bodies_are_served_at_the_same_time() -> None:
    app = HeldApp()
    guard = guard_of(app)
    statuses: list[int] = []

    async def call(size: int) -> None:
        statuses.append(await post(guard, size))

    async with anyio.create_task_group() as group:
        for _ in range(LARGE.at_once):
            group.start_soon(call, SMALL + 1)
        while len(app.sizes) < LARGE.at_once:
            await anyio.sleep(0)
        await call(SMALL + 1)
        assert statuses == [503]
        group.start_soon(call, SMALL)  # a small body needs no place
        while len(app.sizes) < LARGE.at_once + 1:
            await anyio.sleep(0)
        app.release.set()
    assert sorted(statuses) == [200, 200, 200, 503]
    assert await post(guard, SMALL + 1) == 200


async def test_a_cancelled_request_gives_its_place_back() -> None:
    app = HeldApp()
    guard = guard_of(app)
    async with anyio.create_task_group() as group:
        for _ in range(LARGE.at_once):
            group.start_soon(post, guard, SMALL + 1)
        while len(app.sizes) < LARGE.at_once:
            await anyio.sleep(0)
        assert await post(guard, SMALL + 1) == 503
        group.cancel_scope.cancel()
    app.release.set()
    assert await post(guard, SMALL + 1) == 200


async def test_an_image_of_8_mb_as_a_data_uri_is_edited(tmp_path: Path) -> None:
    image = noise((1_760, 1_740), compress_level=1)
    assert 7_500_000 < len(image) <= 8 << 20
    uri = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    assert REQUEST_MAX_BYTES < len(uri) < LARGE_BODIES.body_max_bytes
    arguments = {"prompt": "sim:fast a fox", "size": "1024x640", "image_urls": [uri]}
    with anyio.fail_after(300):
        async with open_team_server(tmp_path, ANNA) as server, server.client("a") as client:
            answer = await client.call_tool("generate_image", arguments)
            assert server.posts == 1
    assert answer.structured_content["status"] == "completed"
    assert answer.structured_content["references"][0]["url"].startswith("http")


TRIALS = {"Bodies above 512 KiB, only with a token": test_few_large_bodies_are_served_at_the_same_time}
LIMIT_TEXTS = {
    "Bodies above 512 KiB, only with a token": (
        f"{LARGE_BODIES.at_once} at once, {LARGE_BODIES.body_max_bytes / (1 << 20):.1f} MiB each"
    )
}
