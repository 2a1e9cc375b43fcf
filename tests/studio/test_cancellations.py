"""Cancel each tool call at each of its suspensions: nothing is bought twice, and no claim or reservation stays."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from conftest import KEY, Clock, PlainSimulator
from mcp.server.mcpserver import MCPServer
from slow import SLOW
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
POINTS_MAX = 900
# Without EVOLINK_TEST_SLOW only every fifth suspension of these tools is tried, and only with the shortest turns.
EVERY = 5
# The suspension of generate_image in which its POST is sent already.
CANCEL_AFTER_PURCHASE = 15
# Turns of the event loop that an action of the journal takes. Other numbers order the steps of two tasks otherwise.
TURNS = (1, 2, 3, 5, 8)
# Actions of the journal that fail after the cancellation.
LOCKED_ACTIONS = 3
SCENARIOS = ["same server", "second server", "claim", "locked journal"]
TOOLS = ["generate_image", "generate_images", "get_task", "list_tasks", "view_image", "derive_image", "compute_size"]
POINTS_TOTAL_MIN = 2000


@dataclass
class Replica:
    """One server of the journal."""

    studio: Studio
    server: MCPServer[Any]
    backend: StepBackend

    async def call(
        self, name: str, arguments: dict[str, Any], *, cancel_at: int | None = None, locked_actions: int = 0
    ) -> bool:
        """Call a tool and settle its delivery. Cancel it at this suspension. Return whether it was answered.

        Another program locks the journal at the same suspension for `locked_actions` actions.
        """

        def cancel() -> None:
            self.backend.locked_actions = locked_actions
            scope.cancel()

        delivery = Delivery()
        is_answered = False
        with anyio.CancelScope() as scope:
            call = self.server.call_tool(name, arguments, CallContext(delivery))
            steps = Steps(call, cancel, -1 if cancel_at is None else cancel_at)
            await steps
            is_answered = not scope.cancel_called
        await delivery.settle(is_answered)
        return is_answered

    async def settle(self) -> None:
        """Wait until no job runs, and write everything that the journal could not record."""
        with anyio.fail_after(300):
            while not self.studio.is_idle:
                await anyio.sleep(0)
                if not self.studio.jobs:
                    await self.studio.flush()


@dataclass
class TwoServers:
    """Two servers with one journal, and a simulated EvoLink."""

    simulator: PlainSimulator
    first: Replica
    second: Replica


@asynccontextmanager
async def open_servers(folder: Path, decoder: Decoder, turns: int = 1) -> AsyncIterator[TwoServers]:
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
            backend = StepBackend(folder / "data", turns)
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
        yield TwoServers(simulator, *replicas)


@dataclass
class Case:
    """A tool with the arguments of its call number `number`, and the prompts that it may buy."""

    tool: str
    number: int

    @property
    def prompts(self) -> list[str]:
        prompt = f"sim:fast a fox number{self.number}"
        return [prompt] if self.tool != "generate_images" else [prompt, f"{prompt} at night"]

    @property
    def purchase(self) -> dict[str, Any]:
        """The arguments of an order."""
        words = {"prompts": self.prompts} if self.tool == "generate_images" else {"prompt": self.prompts[0]}
        return {**words, "size": "1024x640", "quality": "low"}

    def arguments(self, servers: TwoServers) -> dict[str, Any]:
        """The arguments of the call. Only the tools that buy need no earlier task."""
        task_id = next(
            (task.id for task in servers.simulator.tasks.values() if task.body["prompt"] == self.prompts[0]), ""
        )
        return {
            "get_task": {"task_id": task_id},
            "list_tasks": {"sync": True},
            "view_image": {"task_id": task_id},
            "derive_image": {"source": task_id, "targets": ["32x32"]},
            "compute_size": {"size": "16:9"},
        }.get(self.tool, self.purchase)


async def check(servers: TwoServers, case: Case) -> None:
    """Check the invariants of one request when both servers are idle."""
    entries_of_case = await servers.first.studio.journal.recent(9, words=(f"number{case.number}",))
    for prompt in case.prompts:
        entries = [entry for entry in entries_of_case if entry.request["prompt"] == prompt]
        tasks = {task.id for task in servers.simulator.tasks.values() if task.body["prompt"] == prompt}
        assert len(tasks) <= 1, [(e.phase, e.task_id, e.delivered_at, e.caller, e.error) for e in entries]
        assert {entry.task_id for entry in entries if entry.task_id} == tasks
        assert [entry.phase for entry in entries if entry.phase in (Phase.INTENT, Phase.SENDING, Phase.UNKNOWN)] == []
        assert [entry.caller for entry in entries if entry.caller and entry.delivered_at is None] == []
        assert [entry.reserved for entry in entries if entry.reserved] == []


async def check_sums(servers: TwoServers) -> None:
    """Check that the journal and EvoLink have the same sum, and that nothing is reserved."""
    sums = await servers.first.studio.journal.sums_since(0)
    assert (round(sums.spent, 4), sums.reserved) == (round(servers.simulator.credits(KEY)[1], 4), 0)


async def points_of(servers: TwoServers, first: int, tool: str, scenario: str, every: int = 1) -> int:
    """Cancel a tool call at suspensions with the distance `every`. Return their number."""
    for points, point in enumerate(range(0, POINTS_MAX, every)):
        case = Case(tool, first + points)
        buys = tool in ("generate_image", "generate_images")
        if not buys and tool != "compute_size":
            # The purchase is not delivered, so the cancelled call is the first one that could deliver it.
            await servers.second.call("generate_image", case.purchase, cancel_at=CANCEL_AFTER_PURCHASE)
            await servers.second.settle()
        elif buys and scenario == "claim":  # an earlier call was cancelled, so this one gets its purchase
            assert not await servers.second.call(tool, case.purchase, cancel_at=CANCEL_AFTER_PURCHASE)
        locked_actions = LOCKED_ACTIONS if scenario == "locked journal" else 0
        is_answered = await servers.first.call(
            tool, case.arguments(servers), cancel_at=point, locked_actions=locked_actions
        )
        if is_answered:  # the call has fewer suspensions
            return points
        servers.first.backend.locked_actions = 0
        next_server = servers.second if scenario == "second server" else servers.first
        await next_server.call(tool, case.arguments(servers))
        await servers.first.settle()
        await servers.second.settle()
        await check(servers, case)
    raise AssertionError("the call has more suspensions than POINTS_MAX")


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_a_call_that_is_cancelled_at_any_point_buys_at_most_once_and_leaves_nothing(
    tool: str, scenario: str, tmp_path: Path, decoder: Decoder
) -> None:
    with anyio.fail_after(900):
        async with open_servers(tmp_path, decoder) as servers:
            points = await points_of(servers, 1000, tool, scenario, 1 if tool == "generate_image" else EVERY)
            await check_sums(servers)
    assert points >= 1
    # No tool of this test works without a purchase, except compute_size. A test without one would prove nothing.
    assert bool(servers.simulator.tasks) == (tool != "compute_size")


@pytest.mark.parametrize("turns", [pytest.param(turns, marks=SLOW) for turns in TURNS])
async def test_every_tool_call_may_be_cancelled_at_every_suspension(
    turns: int, tmp_path: Path, decoder: Decoder
) -> None:
    total = 0
    with anyio.fail_after(3600):
        async with open_servers(tmp_path, decoder, turns) as servers:
            for number, (tool, scenario) in enumerate(product(TOOLS, SCENARIOS), start=1):
                total += await points_of(servers, number * POINTS_MAX, tool, scenario)
            await check_sums(servers)
    print(f"{total} points")
    assert total >= POINTS_TOTAL_MIN // len(TURNS)


async def test_a_server_that_loses_its_lease_while_it_records_a_purchase_sends_nothing(
    tmp_path: Path, decoder: Decoder
) -> None:
    """The process was frozen between the write and its answer, and another server may own the entry now."""
    with anyio.fail_after(900):
        async with open_servers(tmp_path, decoder) as servers:
            case = Case("generate_image", 1)
            servers.first.backend.has_lease = False
            assert await servers.first.call("generate_image", case.purchase)
            await servers.first.settle()
            assert not servers.simulator.tasks
            assert await servers.second.call("generate_image", case.purchase)
            await servers.second.settle()
            assert len(servers.simulator.tasks) == 1
            await check_sums(servers)
