"""An entry with a certain task takes it from an entry with an unconfirmed match, in every database."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import Open

from evolink_mcp.api.task import Task
from evolink_mcp.errors import TaskKnown
from evolink_mcp.journal.entry import UNCONFIRMED, Entry, Phase, ResultImage, new_key

pytestmark = pytest.mark.anyio
TASK = Task("task-unified-1790000000-abcd1234", "completed", credits_used=0.2)


async def test_a_certain_task_is_taken_from_an_unconfirmed_match_and_from_no_other_entry(open_world: Open) -> None:
    async with open_world() as world:
        journal = world.studio.journal
        now = world.clock()
        first_entry, own_entry, third = (
            Entry(
                new_key(),
                journal.owner,
                Phase.SENDING,
                now,
                estimate=1.0,
                account=journal.account,
            )
            for _ in range(3)
        )
        for entry in (first_entry, own_entry, third):
            await journal.intend(entry)
        images = (ResultImage(0, "https://files.example/1.png", now, sha256="aa"),)
        match = replace(first_entry, phase=Phase.SUBMITTED, task=TASK, error=UNCONFIRMED, images=images)
        assert await journal.update_images(match)
        assert not await journal.belongs_to_other(TASK.id, own_entry.key)
        with pytest.raises(TaskKnown):
            await journal.update(replace(own_entry, phase=Phase.SUBMITTED, task=TASK, error=UNCONFIRMED))
        assert await journal.update(replace(own_entry, phase=Phase.SUBMITTED, task=TASK))
        assert await journal.belongs_to_other(TASK.id, first_entry.key)
        with pytest.raises(TaskKnown):
            await journal.update(replace(third, phase=Phase.SUBMITTED, task=TASK))
        before = await journal.by_key(first_entry.key)
        after = await journal.by_key(own_entry.key)
        sums = await journal.sums_since(0)
    assert before is not None
    assert (before.phase, before.task, before.images, before.charged) == (Phase.UNKNOWN, None, (), "unknown")
    assert after is not None
    assert (after.task_id, after.is_unconfirmed) == (TASK.id, False)
    assert (sums.spent, sums.reserved) == (0.2, 2.0)


async def test_a_certain_task_ends_an_unconfirmed_match_in_another_profile(open_world: Open) -> None:
    """The two entries can exist at once, so no rule of the database finds the wrong one."""
    async with open_world({"EVOLINK_MCP_PROFILE": "other"}) as other, open_world() as world:
        entries: list[Entry] = []
        for journal in (other.studio.journal, world.studio.journal):
            entry = Entry(new_key(), journal.owner, Phase.SENDING, world.clock(), account=journal.account)
            entries.append(await journal.intend(entry))
        first_entry, own_entry = entries
        await other.studio.journal.update(replace(first_entry, phase=Phase.SUBMITTED, task=TASK, error=UNCONFIRMED))
        assert await world.studio.journal.update(replace(own_entry, phase=Phase.SUBMITTED, task=TASK))
        before = await other.studio.journal.by_key(first_entry.key)
    assert before is not None
    assert (before.phase, before.task) == (Phase.UNKNOWN, None)


async def test_a_state_without_a_task_never_removes_the_certain_task(open_world: Open) -> None:
    async with open_world() as world:
        journal = world.studio.journal
        entry = Entry(new_key(), journal.owner, Phase.SENDING, world.clock(), account=journal.account)
        await journal.intend(entry)
        await journal.update(replace(entry, phase=Phase.SUBMITTED, task=TASK))
        assert not await journal.update(replace(entry, phase=Phase.UNKNOWN))
        newest = await journal.by_key(entry.key)
    assert newest is not None
    assert newest.task_id == TASK.id
