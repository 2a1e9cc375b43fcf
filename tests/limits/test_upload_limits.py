"""Limits for `PUT /uploads`: bytes at once, bytes per day, memory, and repeated uploads."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from drawings import drawing
from team_server import ANNA, BERT, TeamServer, block, open_team_server

from evolink_mcp.teams.uploads import BURST_BYTES, BYTES_PER_S, ByteLimit, Pace, UploadApp

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
PNG = drawing()
OTHER_PNG = drawing((65, 48))


def sent_uploads(server: TeamServer) -> int:
    return sum("upload" in request.path for request in server.simulator.requests)


async def put(server: TeamServer, token: str, content: Any = PNG) -> Any:
    async with server.http(token) as http:
        return await http.put("/uploads", content=content)


class SlowUploads:
    """Uploads of unknown size that wait for `end` before their last part."""

    def __init__(self, server: TeamServer) -> None:
        self._server = server
        self._end = anyio.Event()
        self.started_count = 0
        self.statuses: list[int] = []

    async def run(self, token: str) -> None:
        self.statuses.append((await put(self._server, token, self._parts())).status_code)

    async def _parts(self) -> AsyncIterator[bytes]:
        self.started_count += 1
        yield PNG[:10]
        await self._end.wait()
        yield PNG[10:]

    async def begin(self, group: Any, *tokens: str) -> None:
        for token in tokens:
            group.start_soon(self.run, token)
        while self.started_count < len(tokens):
            await anyio.sleep(0.01)

    def end(self) -> None:
        self._end.set()


async def test_a_tenant_may_upload_two_of_the_largest_images_at_once(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, ANNA, BERT) as server, anyio.create_task_group() as group:
        uploads = SlowUploads(server)
        await uploads.begin(group, "a", "a")
        refusal = await put(server, "a")
        assert (refusal.status_code, refusal.headers["retry-after"]) == (503, "5")
        assert (await put(server, "b")).status_code == 201
        uploads.end()
        while len(uploads.statuses) < 2:
            await anyio.sleep(0.01)
        assert uploads.statuses == [201, 201]
        assert (await put(server, "a")).status_code == 201


async def test_all_tenants_together_may_upload_eight_of_the_largest_images_at_once(tmp_path: Path) -> None:
    blocks = [block(f"tenant{number}", f"t{number}") for number in range(5)]
    async with open_team_server(tmp_path, *blocks) as server, anyio.create_task_group() as group:
        uploads = SlowUploads(server)
        await uploads.begin(group, *(f"t{number}" for number in range(4) for _ in range(2)))
        refusal = await put(server, "t4")
        assert (refusal.status_code, refusal.headers["retry-after"]) == (503, "5")
        uploads.end()
        while len(uploads.statuses) < 8:
            await anyio.sleep(0.01)
        assert (await put(server, "t4")).status_code == 201


async def test_a_byte_limit_is_exact() -> None:
    limit = ByteLimit(10)
    with limit.used(4):
        assert [limit.has_room(size) for size in (6, 7)] == [True, False]
    assert limit.has_room(10)


async def test_a_tenant_has_a_quota_of_uploads_per_day(tmp_path: Path) -> None:
    megabytes = f"{1.5 * len(PNG) / 1e6:.6f}"
    async with open_team_server(tmp_path, ANNA, BERT, EVOLINK_MCP_UPLOAD_MB_PER_DAY=megabytes) as server:
        assert (await put(server, "a")).status_code == 201
        refusal = await put(server, "a", OTHER_PNG)
        assert refusal.status_code == 429
        assert 0 < int(refusal.headers["retry-after"]) <= 90_000
        assert sent_uploads(server) == 1
        assert (await put(server, "b")).status_code == 201
        server.clock.shift_s = 86_400
        assert (await put(server, "a", OTHER_PNG)).status_code == 201


async def test_an_identical_upload_is_sent_to_evolink_once_in_71_hours(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, ANNA, BERT) as server:
        first = await put(server, "a")
        server.clock.shift_s = 70 * 3600
        repeat = await put(server, "a")
        assert (repeat.status_code, repeat.json()) == (201, first.json())
        assert sent_uploads(server) == 1
        server.clock.shift_s = 71 * 3600
        third = await put(server, "a")
        assert sent_uploads(server) == 2
        assert third.json()["expires_at"] > first.json()["expires_at"]
        await put(server, "b")  # another tenant must not learn that the image exists
        assert sent_uploads(server) == 3


async def test_an_upload_of_40_mb_needs_no_copy_in_memory(tmp_path: Path) -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield PNG
        for _ in range(40):
            yield bytes(1 << 20)  # bytes after the end of a PNG are removed

    async with open_team_server(tmp_path, ANNA) as server:
        await put(server, "a", OTHER_PNG)  # opens the tenant's app and the decoder
        tracemalloc.start()
        try:
            answer = await put(server, "a", parts())
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert (answer.status_code, answer.json()["bytes"]) == (201, (40 << 20) + len(PNG))
    assert peak < 12 << 20


async def test_all_uploads_share_one_speed() -> None:
    """Two uploads of 8 parts arrive at once. The first 4 parts need no pause, and no time passes."""
    pauses_s: list[float] = []
    pace = Pace(10.0, 40, clock=lambda: 0.0)

    async def sleep(seconds: float) -> None:
        pauses_s.append(seconds)

    async def send(message: dict[str, Any]) -> None:
        pass

    class Journal:
        async def spend_quota(self, *_: object) -> bool:
            return True

    studio: Any = SimpleNamespace(now=lambda: 0.0, journal=Journal())
    app: Any = None
    for _ in range(2):
        parts = [bytes(10)] * 8

        async def receive(parts: list[bytes] = parts) -> dict[str, Any]:
            is_open = bool(parts)
            return (
                {"type": "http.request", "body": parts.pop(), "more_body": True}
                if is_open
                else {"type": "http.disconnect"}
            )

        uploads = UploadApp(app, studio, lambda: True, ByteLimit(1 << 30), pace, day_max_bytes=1 << 30, sleep=sleep)
        await uploads({"type": "http", "method": "PUT", "path": "/uploads", "headers": []}, receive, send)
    assert pauses_s == [pytest.approx(seconds) for seconds in range(1, 13)]


LIMIT_TEXTS = {
    "Speed of all uploads": f"{BYTES_PER_S >> 20} MiB/s after {BURST_BYTES >> 20} MiB",
}

TRIALS = {
    "Speed of all uploads": test_all_uploads_share_one_speed,
    "Uploads in progress of a tenant": test_a_tenant_may_upload_two_of_the_largest_images_at_once,
    "Uploads in progress": test_all_tenants_together_may_upload_eight_of_the_largest_images_at_once,
    "Uploads of a day": test_a_tenant_has_a_quota_of_uploads_per_day,
    "Upload of an image": test_an_upload_of_40_mb_needs_no_copy_in_memory,
    "Identical uploads": test_an_identical_upload_is_sent_to_evolink_once_in_71_hours,
}
