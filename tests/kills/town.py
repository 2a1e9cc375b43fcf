"""A simulated EvoLink behind a gateway, and the servers of any number of households there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import poor_environment
from faulty_gateway import Gateway, QuickSimulator
from killer import Nursery, Server

WISH = {"prompt": "a fox", "size": "1024x640", "quality": "low"}


@dataclass
class Town:
    """One simulated EvoLink behind a gateway; every household has its own key and folders there."""

    gateway: Gateway
    nursery: Nursery
    folder: Path

    def env(self, name: str, **more: str) -> dict[str, str]:
        home = self.folder / name
        home.mkdir(exist_ok=True)
        return poor_environment(
            home, EVOLINK_API_KEY=self.key(name),
            EVOLINK_BASE_URL=self.gateway.url, EVOLINK_MCP_DATA_DIR=str(home / "data"),
            EVOLINK_MCP_OUTPUT_DIR=str(home / "pictures"), EVOLINK_MCP_PREVIEW="off", **more,
        )  # fmt: skip

    @staticmethod
    def key(name: str) -> str:
        return f"sk-canary-{name}-0123456789"

    def billed(self, name: str) -> list[str]:
        return [task.id for task in self.gateway.simulator.tasks.values() if task.key == self.key(name)]

    def pictures(self, name: str) -> list[Path]:
        return sorted((self.folder / name / "pictures").glob("*.png"))


@pytest.fixture(name="town")
async def town_with_a_nursery(tmp_path: Path, servers: Nursery) -> AsyncIterator[Town]:
    async with Gateway(QuickSimulator(duration_s=0)).open() as gateway:
        yield Town(gateway, servers, tmp_path)


async def tasks(server: Server) -> list[dict[str, Any]]:
    answer = await server.call("list_tasks", detail=True)
    assert answer is not None
    return answer["structuredContent"]["tasks"]


async def settled(server: Server, wanted: list[str]) -> list[dict[str, Any]]:
    """The journal's tasks as soon as every wanted one has its picture on disk."""
    while True:
        listed = await tasks(server)
        saved = {t["task_id"] for t in listed if t["images"] and all(i["path"] for i in t["images"])}
        if set(wanted) <= saved:
            return listed
        await anyio.sleep(0.02)
