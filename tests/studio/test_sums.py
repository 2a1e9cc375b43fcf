"""One sum: confirmed charges and reserved credits agree in the list, the command line and the sheet."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import pytest
from conftest import Clock, Open, World
from faulty_gateway import QuickSimulator

from evolink_mcp.api.costs import usd
from evolink_mcp.api.task import Task
from evolink_mcp.cli.image_commands import find_sums, write_sheet
from evolink_mcp.errors import Problem
from evolink_mcp.journal.entry import UNCONFIRMED, Entry, Phase
from evolink_mcp.tools.sums import periods, sums_text

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

LOW = {"size": "1:1", "quality": "low", "wait_seconds": 0}
CEILING = 0.37
CHARGE = 0.3612


async def order(world: World, prompt: str, **options: Any) -> dict[str, Any]:
    async with world.client() as client:
        answer = await client.call_tool("generate_image", {**LOW, "prompt": prompt, **options})
        return answer.structured_content


async def list_tasks(world: World) -> tuple[dict[str, Any], str]:
    async with world.client() as client:
        answer = await client.call_tool("list_tasks", {})
        return answer.structured_content, answer.content[0].text


def entry(phase: Phase, task: Task | None = None, error: Problem | None = None) -> Entry:
    return Entry("k" * 32, "server", phase, 1.0, estimate=2.0, task=task, error=error)


@pytest.mark.parametrize(
    ("entry", "spent", "reserved"),
    [
        pytest.param(entry(Phase.INTENT), 0.0, 2.0, id="not sent yet"),
        pytest.param(entry(Phase.SENDING), 0.0, 2.0, id="being sent"),
        pytest.param(entry(Phase.UNKNOWN), 0.0, 2.0, id="unknown outcome"),
        pytest.param(entry(Phase.REFUSED), 0.0, 0.0, id="refused"),
        pytest.param(entry(Phase.UNSENT), 0.0, 0.0, id="unsent"),
        pytest.param(entry(Phase.SUBMITTED, Task("1")), 0.0, 2.0, id="running"),
        pytest.param(entry(Phase.SUBMITTED, Task("1", credits_reserved=3.5)), 0.0, 3.5, id="EvoLink reserves more"),
        pytest.param(entry(Phase.SUBMITTED, Task("1", "completed", credits_used=1.2)), 1.2, 0.0, id="charged"),
        pytest.param(entry(Phase.SUBMITTED, Task("1", "completed")), 0.0, 2.0, id="completed without a charge"),
        pytest.param(entry(Phase.SUBMITTED, Task("1", "failed")), 0.0, 0.0, id="failed"),
        pytest.param(entry(Phase.SUBMITTED, Task("1", "cancelled")), 0.0, 2.0, id="cancelled"),
        pytest.param(
            entry(Phase.SUBMITTED, Task("1", "completed", credits_used=1.2), UNCONFIRMED),
            0.0,
            2.0,
            id="unconfirmed match",
        ),
        pytest.param(entry(Phase.EXTERNAL, Task("1", "completed", credits_used=1.2)), 0.0, 0.0, id="external"),
    ],
)
async def test_an_entry_has_a_confirmed_charge_or_reserves_its_ceiling(
    entry: Entry, spent: float, reserved: float
) -> None:
    assert (entry.spent, entry.reserved) == (spent, reserved)


async def test_list_command_line_and_sheet_show_the_same_sums(open_world: Open) -> None:
    clock = Clock()
    async with open_world(simulator=QuickSimulator(clock=clock), clock=clock) as world:
        await order(world, "sim:fast a fox", wait_seconds=60)
        await order(world, "sim:fail sim:fast a hen", wait_seconds=60)
        await order(world, "sim:lost-reply a cat", wait_seconds=60)
        await order(world, "sim:slow=900 a dog")
        facts, text = await list_tasks(world)
        starts = periods(clock.now)
        sums = find_sums(world.settings, list(starts.values()))
        assert facts["spent"]["today"]["credits"] == CHARGE
        assert facts["reserved"]["today"]["credits"] == 2 * CEILING
        assert sums_text(dict(zip(starts, sums, strict=True))) in text
        for field in ("spent", "reserved"):
            assert [getattr(each, field) for each in sums] == [each["credits"] for each in facts[field].values()]
        rows = facts["tasks"]
        assert sum(row.get("reserved", 0) for row in rows) == 2 * CEILING
        assert sum(row.get("credits", 0) for row in rows) == CHARGE
        assert sum(row.get("reserved_usd", 0) for row in rows) == pytest.approx(2 * usd(CEILING))
        assert text.count(f"{CEILING:g} credits (${usd(CEILING):g}) reserved") == 2
        page = world.folder / "sheet.html"
        write = partial(write_sheet, world.settings, [], "all", str(page), print, print)
        assert await anyio.to_thread.run_sync(write) == 0
        assert re.search(r"spent 0\.3612 credits \(\$[0-9.]+\), reserved 0\.74 credits", page.read_text("utf-8"))


async def test_a_limit_holds_although_every_answer_is_lost(open_world: Open) -> None:
    clock = Clock()
    limit = {"EVOLINK_MCP_MAX_CREDITS_PER_DAY": str(CEILING + 0.1)}
    async with open_world(limit, simulator=QuickSimulator(clock=clock), clock=clock) as world:
        for number in range(6):
            await order(world, f"sim:lost-reply sim:fast fox {number}", wait_seconds=60, force_new=True)
        assert world.posts == 1
