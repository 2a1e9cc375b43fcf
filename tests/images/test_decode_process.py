"""A picture costs its child, never the server: a deadline, a bound on memory, and an end that waits for nothing."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import anyio
import anyio.to_process
import anyio.to_thread
import pytest
from conftest import World
from drawings import drawing, noise
from in_the_child import dies, fails, wants_too_much_memory, works_for_ever

from evolink_mcp.images import decode_process
from evolink_mcp.images.decode_process import in_child
from evolink_mcp.images.inspect import NotAPicture
from evolink_mcp.images.previews import check_and_preview

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]


async def started(mark: Path) -> int:
    """The child's process id, as soon as it works."""
    while not (mark.exists() and mark.read_text()):
        await anyio.sleep(0.01)
    return int(mark.read_text())


def lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True


async def ended(process: int) -> None:
    while lives(process):
        await anyio.sleep(0.01)


async def test_what_takes_too_long_is_killed_and_the_next_picture_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_process, "DEADLINE_S", 0.2)
    with pytest.raises(NotAPicture, match="longer than"):
        await in_child("check", works_for_ever, str(tmp_path / "mark"))
    monkeypatch.undo()
    (tmp_path / "fox.png").write_bytes(drawing())
    facts, _ = await in_child("check", check_and_preview, tmp_path / "fox.png", 0)
    assert (facts.width, facts.height) == (64, 48)


async def test_who_waits_no_longer_kills_the_child(tmp_path: Path) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(in_child, "check", works_for_ever, str(tmp_path / "mark"))
        process = await started(tmp_path / "mark")
        assert lives(process)
        group.cancel_scope.cancel()
    await ended(process)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a process's data")
async def test_memory_is_bounded() -> None:
    with pytest.raises(NotAPicture, match="too much memory"):
        await in_child("check", wants_too_much_memory)


async def test_a_decoder_that_dies_costs_its_picture_only() -> None:
    with pytest.raises(NotAPicture, match="does not survive"):
        await in_child("check", dies, os.getpid())
    assert await in_child("check", os.getpid) != os.getpid()


async def test_what_is_raised_arrives() -> None:
    with pytest.raises(FileNotFoundError):
        await in_child("check", fails)


async def test_a_check_does_not_wait_for_a_preview(tmp_path: Path) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(in_child, "preview", works_for_ever, str(tmp_path / "mark"))
        await started(tmp_path / "mark")
        assert await in_child("check", os.getpid)
        group.cancel_scope.cancel()


@pytest.mark.parametrize("error", [OSError(11, "no more processes"), anyio.BrokenWorkerProcess()])
async def test_where_no_child_starts_the_picture_is_decoded_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    async def refuses(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(anyio.to_process, "run_sync", refuses)
    assert await in_child("check", os.getpid) == os.getpid()
    assert "no child process starts" in caplog.text


async def test_one_decoding_checks_the_picture_and_makes_its_preview(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    async def counted(lane: Any, call: Any, *args: Any) -> Any:
        calls.append(call.__name__)
        return await in_child(lane, call, *args)

    for module in ("evolink_mcp.images.store", "evolink_mcp.tools.previews"):
        monkeypatch.setattr(f"{module}.in_child", counted)
    async with world.client() as client:
        answer = await client.call_tool("generate_image", {"prompt": "sim:fast a fox", "n": 2})
        assert [block.type for block in answer.content] == ["text", "image", "image"]
        assert calls == ["check_and_preview"] * 2
        again = await client.call_tool("get_task", {"task_id": answer.structured_content["task_id"]})
        assert again.content[1] == answer.content[1]
        assert calls == ["check_and_preview"] * 2
        # Another picture now lies there: what is shown is the file as it is.
        path = Path(answer.structured_content["images"][0]["path"])
        path.write_bytes(noise((640, 480)))
        changed = await client.call_tool("get_task", {"task_id": answer.structured_content["task_id"]})
    assert changed.content[1] != answer.content[1]
    assert calls == [*["check_and_preview"] * 2, "preview"]


async def leave_after(delay_s: float) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(in_child, "check", os.getpid)
        await anyio.sleep(delay_s)
        group.cancel_scope.cancel()


@pytest.mark.parametrize("delay_ms", range(20))
async def test_who_leaves_while_the_child_starts_leaves_no_child_behind(delay_ms: int) -> None:
    """What is forgotten says so when it is collected, and every warning is an error here."""
    await anyio.to_thread.run_sync(anyio.run, leave_after, delay_ms / 1000)  # a loop that has no child yet
    gc.collect()
