"""SSE with tokens in one process: a stream answers its own tenant, and messages of another tenant never reach it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import anyio
import pytest
from drawings import drawing
from team_server import ANNA, BERT, INITIALIZE, REQUEST, TeamServer, open_team_server

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]


class Stream:
    """An SSE stream, and the text that it has received."""

    def __init__(self, server: TeamServer, token: str) -> None:
        self._app = server.guard
        self._headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {token}".encode())]
        self.text = ""
        self.has_ended = anyio.Event()

    def _scope(self, method: str, path: str, query: str = "", extra: tuple[tuple[bytes, bytes], ...] = ()) -> Any:
        return {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
            "headers": [*self._headers, *extra], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        }  # fmt: skip

    async def run(self) -> None:
        async def receive() -> Any:
            await self.has_ended.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            self.text += message.get("body", b"").decode()

        await self._app(self._scope("GET", "/sse"), receive, send)

    async def wait_for(self, words: str) -> str:
        while words not in self.text:
            await anyio.sleep(0.01)
        return self.text

    async def session_id(self) -> str:
        return (await self.wait_for("session_id=")).partition("session_id=")[2].split()[0]

    async def post(self, session_id: str, message: Any) -> int:
        messages = [{"type": "http.request", "body": json.dumps(message).encode(), "more_body": False}]
        answers: list[Any] = []

        async def receive() -> Any:
            return messages.pop() if messages else await anyio.sleep_forever()

        async def send(answer: Any) -> None:
            answers.append(answer)

        extra = ((b"content-type", b"application/json"),)
        await self._app(self._scope("POST", "/messages/", f"session_id={session_id}", extra), receive, send)
        return answers[0]["status"]


async def test_a_session_answers_its_tenant_and_ignores_messages_of_another_tenant(tmp_path: Path) -> None:
    picture = "data:image/png;base64," + base64.b64encode(drawing((800, 600))).decode()
    params = {"name": "generate_image", "arguments": {**REQUEST, "image_urls": [picture]}}
    calls = [
        INITIALIZE,
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": params},
    ]
    async with open_team_server(tmp_path, ANNA, BERT, transport="sse") as server, anyio.create_task_group() as group:
        anna, bert = Stream(server, "a"), Stream(server, "b")
        group.start_soon(anna.run)
        session_id = await anna.session_id()
        assert await bert.post(session_id, INITIALIZE) == 404
        assert await Stream(server, "unknown").post(session_id, INITIALIZE) == 401
        for call in calls:
            assert await anna.post(session_id, call) == 202
        text = await anna.wait_for('"id":2')
        assert text.count('"id":1') == 1
        assert '"status":"completed"' in text
        assert server.posts == 1
        anna.has_ended.set()
