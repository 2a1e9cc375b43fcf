"""The transactions of a purchase in SQLite. Each of them waits for the disk."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from conftest import Open
from faulty_journal import FaultyJournal

pytestmark = [pytest.mark.anyio, pytest.mark.journal_file, pytest.mark.usefixtures("in_time")]
CALL = {"prompt": "sim:fast a fox", "force_new": True}


def transactions_in(statements: list[str]) -> int:
    """Return the number of transactions that write. A statement outside BEGIN and COMMIT is one."""
    count = 0
    is_open = False
    for statement in statements:
        word = statement.split(maxsplit=1)[0].upper()
        if word == "BEGIN":
            is_open = True
        elif word == "COMMIT":
            is_open = False
            count += 1
        elif word in ("INSERT", "UPDATE", "DELETE") and not is_open:
            count += 1
    return count


@pytest.mark.parametrize("images", [1, 4])
async def test_the_end_of_a_task_needs_two_transactions_or_one_per_image_and_one_more(
    open_world: Open, images: int
) -> None:
    """Before it there are three: the order, the start of the POST, and the task. The last image is written with the release."""
    statements: list[str] = []
    async with open_world() as world, world.client() as client:
        file = world.studio.journal.file  # pyright: ignore[reportAttributeAccessIssue]
        await client.call_tool("generate_image", CALL)  # it also records facts about the account
        file.run(lambda db: db.set_trace_callback(statements.append))
        await client.call_tool("generate_image", {**CALL, "n": images})
        await world.studio.journal.recent(1)  # it waits for all writes before
        file.run(lambda db: db.set_trace_callback(None))
        assert len(world.files) == images + 1
    assert transactions_in(statements) == 3 + images + 1


async def test_the_last_image_is_recorded_although_the_write_of_an_earlier_one_ends_after_it(open_world: Open) -> None:
    async with open_world(wrap_journal=FaultyJournal) as world, world.client() as client:
        journal: Any = world.studio.journal

        async def write_late(real_write: Any, *args: Any) -> bool:
            while not all(image.is_saved for image in world.studio.jobs[0].entry.images):
                await anyio.sleep(0.001)
            return await real_write(*args)

        journal.instead = {"update_images": write_late}
        await client.call_tool("generate_image", {**CALL, "n": 2})
        (entry,) = await journal.recent(1)
        assert [image.is_saved for image in entry.images] == [True, True]
