"""Cancel each tool call at each of its suspensions: nothing is bought twice, and no claim or reservation stays."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from conftest import KEY, Clock, PlainSimulator
from mcp.server.mcpserver import MCPServer
from stepped import CallContext, StepBackend, Steps

from evolink_mcp.app.settings import Settings
from evolink_mcp.app.wiring import StudioParts, open_studio
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.journal.entry import Phase
from evolink_mcp.journal.journal import Journal
from evolink_mcp.server.server import build_server
from evolink_mcp.studio.studio import Studio
from evolink_mcp.tools.delivery import Delivery

pytestmark = [pytest.mark.anyio, pytest.mark.journal_file]

LIMIT = 1e6
TURNS_MAX = 3000
POINTS_MAX = 900
POINTS_MIN = 10
# The suspension of generate_image in which its POST is sent already.
CANCEL_AFTER_PURCHASE = 15


@dataclass
class Replica:
    """One server of the journal."""

    studio: Studio
    server: MCPServer[Any]
    backend: StepBackend

    async def call(self, name: str, arguments: dict[str, Any], *, cancel_at: int | None = None) -> bool:
        """Call a tool and settle its delivery. Cancel it at this suspension. Return whether it was answered."""
        delivery = Delivery()
        is_answered = False
        with anyio.CancelScope() as scope:
            call = self.server.call_tool(name, arguments, CallContext(delivery))
            steps = Steps(call, scope.cancel, -1 if cancel_at is None else cancel_at)
            await steps
            is_answered = not scope.cancel_called
        await delivery.settle(is_answered)
        return is_answered

    async def rest(self) -> None:
        """Wait until no job runs, and write everything that the journal could not record."""
        for _ in range(TURNS_MAX):
            if self.studio.is_idle:
                return
            await anyio.sleep(0)
            if not self.studio.jobs:
                await self.studio.flush()
        raise AssertionError("the server does not come to rest")


@dataclass
class Town:
    """Two servers with one journal, and a simulated EvoLink."""

    simulator: PlainSimulator
    first: Replica
    second: Replica


@asynccontextmanager
async def open_town(folder: Path, decoder: Decoder) -> AsyncIterator[Town]:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0)
    settings = Settings.from_environment(
        {
            "EVOLINK_API_KEY": KEY,
            "EVOLINK_BASE_URL": "http://127.0.0.1:9",
            "EVOLINK_MCP_DATA_DIR": str(folder / "data"),
            "EVOLINK_MCP_OUTPUT_DIR": str(folder / "pictures"),
            "EVOLINK_MCP_MAX_CREDITS_PER_DAY": f"{LIMIT}",
        }
    )
    async with AsyncExitStack() as stack:
        replicas: list[Replica] = []
        for _ in range(2):
            backend = StepBackend(folder / "data")
            parts = StudioParts(
                make_journal=lambda identity, profile, backend=backend: Journal(backend, identity, profile=profile)
            )
            options: Any = {
                "transport": httpx.ASGITransport(simulator.app),
                "clock": clock,
                "sleep": clock.sleep,
                "pause": clock.sleep,
            }
            studio = await stack.enter_async_context(open_studio(settings, parts, decoder=decoder, **options))
            replicas.append(Replica(studio, build_server(studio, preview_edge=0), backend))
        yield Town(simulator, *replicas)


def request(number: int) -> dict[str, Any]:
    return {"prompt": f"sim:fast a fox number{number}", "size": "1024x640", "quality": "low"}


async def check(town: Town, number: int) -> None:
    """Check the invariants of one request when both servers are idle."""
    prompt = request(number)["prompt"]
    entries = await town.first.studio.journal.recent(9, words=(f"number{number}",))
    entries = [entry for entry in entries if entry.request["prompt"] == prompt]
    tasks = {task.id for task in town.simulator.tasks.values() if task.body["prompt"] == prompt}
    assert len(tasks) <= 1, [(e.phase, e.task_id, e.delivered_at, e.caller, e.error) for e in entries]
    assert {entry.task_id for entry in entries if entry.task_id} == tasks
    assert [entry.phase for entry in entries if entry.phase in (Phase.INTENT, Phase.SENDING, Phase.UNKNOWN)] == []
    assert [entry.caller for entry in entries if entry.caller and entry.delivered_at is None] == []
    assert [entry.reserved for entry in entries if entry.reserved] == []


async def points_of(town: Town, first: int, scenario: str) -> int:
    """Cancel generate_image at each suspension. Return the number of points."""
    for point in range(POINTS_MAX):
        number = first + point
        arguments = request(number)
        if scenario == "claim":  # an earlier call was cancelled, so this one gets its purchase
            assert not await town.second.call("generate_image", arguments, cancel_at=CANCEL_AFTER_PURCHASE)
        is_answered = await town.first.call("generate_image", arguments, cancel_at=point)
        if is_answered:  # the call has fewer suspensions
            return point
        again = town.second if scenario == "second server" else town.first
        await again.call("generate_image", arguments)
        await town.first.rest()
        await town.second.rest()
        await check(town, number)
    raise AssertionError("the call has more suspensions than POINTS_MAX")


@pytest.mark.parametrize("scenario", ["same server", "second server", "claim"])
async def test_a_call_that_is_cancelled_at_any_point_buys_at_most_once_and_leaves_nothing(
    scenario: str, tmp_path: Path, decoder: Decoder
) -> None:
    with anyio.fail_after(900):
        async with open_town(tmp_path, decoder) as town:
            points = await points_of(town, 1000, scenario)
    assert points >= POINTS_MIN
