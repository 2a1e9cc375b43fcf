"""500 lost answers among 500 purchases of others: almost none gets the task of another purchase."""

from __future__ import annotations

import random
from typing import Any

import anyio
import pytest
from conftest import KEY, Clock, Open, PlainSimulator
from slow import SLOW
from test_reconcile import LosesAnswers

pytestmark = [pytest.mark.anyio, *SLOW]

ORDERS = 500
WRONG_MAX_SHARE = 0.01
SIZES = ["1024x640", "640x1024", "1024x1024", "1536x1024"]
QUALITIES = ["low", "medium"]
PAUSE_MAX_S = 240.0


async def test_500_lost_answers_among_500_purchases_of_other_programs(open_world: Open) -> None:
    dice = random.Random(23)
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0, keys={KEY: 1e6})

    def request(prompt: str) -> dict[str, Any]:
        return {"prompt": prompt, "size": dice.choice(SIZES), "quality": dice.choice(QUALITIES)}

    async with (
        open_world(simulator=simulator, clock=clock, transport=LosesAnswers(simulator)) as world,
        world.client() as client,
    ):
        with anyio.fail_after(1800):
            for number in range(ORDERS):
                clock.now += dice.uniform(0, PAUSE_MAX_S)
                simulator.create({"model": "gpt-image-2", **request(f"stranger {number}")}, key=KEY)
                clock.now += dice.uniform(0, PAUSE_MAX_S)
                answer = await client.call_tool("generate_image", request(f"sim:fast order {number}"))
                assert answer.structured_content["charged"] == "unknown"
        entries = await world.studio.journal.recent(2 * ORDERS)
    assert len(entries) == ORDERS
    matched = [entry for entry in entries if entry.task_id is not None]
    wrong = [
        entry for entry in matched if simulator.tasks[entry.task_id or ""].body["prompt"] != entry.request["prompt"]
    ]
    print(f"{len(matched)} matched, {len(wrong)} of them wrong, {ORDERS - len(matched)} unknown")
    assert len(wrong) <= WRONG_MAX_SHARE * ORDERS
    assert len(matched) >= ORDERS / 2
