"""Serve the simulator with a few images, a record of all times, and with or without batch polls.

`python -m benchmarks.standin dot|1K|4K|noise [--no-batch] [--callbacks PORT]` prints its port. All tasks get the same few
images, because drawing takes seconds and is not part of any figure. With `--callbacks` it calls a server on this port
back when a task ends, and forgets its requests and uploads.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpx2 as httpx
import uvicorn

from benchmarks.processes import KEY
from evolink_mcp.simulator.app import Simulator
from evolink_mcp.simulator.simulation import SimulatedTask

PIXELS = {"dot": (16, 16), "1K": (1024, 1024), "4K": (3840, 2160)}
CALLBACK_CHECK_INTERVAL_S = 0.05
PROMPTS = ("a fox in a misty forest", "a lighthouse over the sea at dusk")


def draw(kind: str) -> list[bytes]:
    """Return a few images as PNG. `noise` compresses worse than any photograph."""
    if kind == "noise":
        from PIL import Image

        width, height = PIXELS["4K"]
        bands = [Image.effect_noise((width // 3, height // 3), 90).resize((width, height)) for _ in range(3)]
        out = io.BytesIO()
        Image.merge("RGB", bands).save(out, "png", compress_level=1)
        return [out.getvalue()]
    from evolink_mcp.simulator.paintings import paint

    return [paint(prompt, number, PIXELS[kind]) for number, prompt in enumerate(PROMPTS)]


class Recorder:
    """Serve the images, pass other requests to the simulator, and record their times in epoch seconds."""

    def __init__(self, simulator: Simulator, pictures: list[bytes], *, batch: bool) -> None:
        self._simulator = simulator
        self._pictures = pictures
        self._batch = batch
        self.counts: Counter[str] = Counter()
        self.purchased_at: dict[str, float] = {}
        self.end_reported_at: dict[str, float] = {}
        self._certain_ids: set[str] = set()
        self.downloads: dict[str, list[tuple[float, float]]] = {}

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        path = scope["path"]
        arrived_at = time.time()
        if path == "/benchmark/end":
            self._end_all(float(scope["query_string"]))
            return await _answer(send, 200, b"{}")
        if path == "/benchmark":
            ends = {task.id: task.created + task.duration for task in self._simulator.tasks.values()}
            record = {
                "counts": self.counts,
                "purchased_at": self.purchased_at,
                "end_reported_at": self.end_reported_at,
                "downloads": self.downloads,
                "ends": ends,
            }
            return await _answer(send, 200, json.dumps(record).encode())
        if path.startswith("/pictures/"):
            task_id, name = path.split("/")[2:4]
            number = int(name.partition(".")[0])
            self.counts["picture"] += 1
            await _answer(send, 200, self._pictures[number % len(self._pictures)], b"image/png")
            self.downloads.setdefault(task_id, []).append((arrived_at, time.time()))
            return None
        if path == "/v1/tasks/batch":
            self.counts["batch"] += 1
            if not self._batch:
                return await _answer(send, 404, b'{"error": {"code": "not_found", "message": "unknown path"}}')
        elif path.startswith("/v1/tasks/"):
            self.counts["single"] += 1
        before = len(self._simulator.tasks)
        completed_ids = (
            {task.id for task in self._simulator.tasks.values() if self._is_completed(task)} if before < 20 else set()
        )
        await self._simulator.app(scope, receive, send)
        if path == "/v1/tasks/batch" and self._simulator.requests:
            self.counts["batched polls"] += len(json.loads(self._simulator.requests[-1].body)["task_ids"])
        if len(self._simulator.tasks) > before:
            self.counts["purchases"] += 1
            self.purchased_at[next(reversed(self._simulator.tasks))] = arrived_at
        task = self._simulator.tasks.get(path.removeprefix("/v1/tasks/"))
        if task is not None:
            self._record_poll(task, is_certain=task.id in completed_ids)
        return None

    def _record_poll(self, task: SimulatedTask, *, is_certain: bool) -> None:
        """Record the first poll that reported the end. A task that ended during its poll was perhaps reported as running."""
        if task.id not in self._certain_ids and (is_certain or self._is_completed(task)):
            self.end_reported_at[task.id] = time.time()
        if is_certain:
            self._certain_ids.add(task.id)

    async def send_callbacks(self, port: int) -> None:
        """Send a callback for each task that ends, forever. The public hostname leads to this port."""
        sent: set[str] = set()
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client, anyio.create_task_group() as group:
            while True:
                await anyio.sleep(CALLBACK_CHECK_INTERVAL_S)
                self._simulator.requests.clear()
                self._simulator.uploads.clear()
                for task in list(self._simulator.tasks.values()):
                    if task.id not in sent and self._is_completed(task):
                        sent.add(task.id)
                        url = urlsplit(task.body["callback_url"])._replace(scheme="http", netloc=f"127.0.0.1:{port}")
                        group.start_soon(_send_callback, client, url.geturl(), task.id)

    def _end_all(self, within_s: float) -> None:
        """Complete all running tasks within this time, one after another."""
        now = time.time()
        running = [task for task in self._simulator.tasks.values() if not self._is_completed(task)]
        for number, task in enumerate(running):
            task.duration = now - task.created + within_s * number / len(running)

    def _is_completed(self, task: Any) -> bool:
        return self._simulator.state(task)[0] == "completed"


async def _send_callback(client: httpx.AsyncClient, url: str, task_id: str) -> None:
    for wait_s in (0.0, 1.0, 2.0):
        await anyio.sleep(wait_s)
        with suppress(httpx.HTTPError):
            if (await client.post(url, json={"id": task_id, "status": "completed"})).is_success:
                return


async def _answer(send: Any, status: int, body: bytes, kind: bytes = b"application/json") -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def serve(kind: str, *, batch: bool, callback_port: int | None) -> None:
    app = Recorder(Simulator(keys={KEY: 1e9}), draw(kind), batch=batch)
    web = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))  # pyright: ignore[reportArgumentType]
    async with anyio.create_task_group() as group:
        group.start_soon(web.serve)
        if callback_port is not None:
            group.start_soon(app.send_callbacks, callback_port)
        while not web.started:
            await anyio.sleep(0.01)
        print(web.servers[0].sockets[0].getsockname()[1], flush=True)


if __name__ == "__main__":
    options = sys.argv[2:]
    port = int(options[options.index("--callbacks") + 1]) if "--callbacks" in options else None
    anyio.run(lambda: serve(sys.argv[1], batch="--no-batch" not in options, callback_port=port))
