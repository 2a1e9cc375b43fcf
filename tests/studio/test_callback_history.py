"""All servers of an account know whether EvoLink's callbacks arrive. Without them they poll as usual."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Clock, Open, PlainSimulator, World

from evolink_mcp.studio.callback_history import missed_in
from evolink_mcp.teams.callbacks import Callbacks

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
PUBLIC = Callbacks("https://nowhere.example.org", ["s" * 32])
LONG_REST_S = 60.0  # while a callback is expected


class Rests(Clock):
    """Record the pauses of the servers in seconds. If `has_callbacks`, EvoLink sends a callback during each pause."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.has_callbacks = False
        self.worlds: list[World] = []

    async def sleep(self, seconds: float) -> None:
        self.seconds.append(seconds)
        await super().sleep(seconds)
        for world in self.worlds if self.has_callbacks else []:
            for job in world.studio.jobs:
                await world.studio.receive_callback(job.entry.key, job.entry.task_id or "")

    async def is_long(self, world: World, prompt: str) -> bool:
        """Buy an image. Return whether the server rested long before its first poll."""
        self.worlds.append(world)
        self.seconds.clear()
        async with world.client() as client:
            order = {"prompt": prompt, "size": "1024x640", "quality": "low", "wait_seconds": 900}
            answer = await client.call_tool("generate_image", order)
        assert answer.structured_content["status"] == "completed"
        return max(self.seconds) >= LONG_REST_S


async def test_missed_callbacks_count_for_all_servers_of_the_account(open_world: Open) -> None:
    clock = Rests()
    simulator = PlainSimulator(clock=clock, duration_s=20)
    options: dict[str, Any] = {"simulator": simulator, "clock": clock, "callbacks": PUBLIC}
    async with open_world(**options) as first:
        assert [await clock.is_long(first, f"fox {number}") for number in range(4)] == [True, True, True, False]
        assert first.studio.misses_callbacks
        async with open_world(**options) as second:
            assert not await clock.is_long(second, "a fox of the second server")
            assert second.studio.misses_callbacks
            clock.has_callbacks = True
            assert not await clock.is_long(second, "a fox with a callback")
            assert not second.studio.misses_callbacks
            clock.has_callbacks = False
        # The first server reads it in the journal before its next task.
        assert await clock.is_long(first, "another fox")
    async with open_world(**options) as third:
        assert await clock.is_long(third, "a fox of the third server")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (None, 0),
        ("", 0),
        ("2", 2),
        ("3", 3),
        ("-1", 0),
        ("1e9", 0),
        ("٣", 0),
        pytest.param("9" * 5000, 0, id="huge"),
        ("many", 0),
    ],
)
async def test_a_damaged_count_counts_as_missing(text: str | None, number: int) -> None:
    assert missed_in(text) == number
