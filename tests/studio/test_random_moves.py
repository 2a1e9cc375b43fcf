"""Random sequences of move, rename, swap, delete, restore, unplug and key change lose no paid image."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import Open, World

from evolink_mcp.journal.entry import ResultImage

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time"), pytest.mark.journal_file]
SEEDS = 5
SEQUENCES = 200
OTHER_KEY = "sk-another-0123456789abcdef"
SUBFOLDERS = ("", "2026", "2026/11", "logos & icons", "Größe")


@dataclass
class PaidImage:
    """One paid image: its record, its content, and the place of its file now. A deleted file has no place."""

    task_id: str
    record: ResultImage
    content: bytes
    place: Path | None


@dataclass
class Disk:
    """The user's folders. Every action keeps `images` equal to the files."""

    output: Path
    project: Path
    images: list[PaidImage]
    dice: random.Random
    is_unplugged: bool = False
    actions: list[str] = field(default_factory=list[str])

    @property
    def unplugged_output(self) -> Path:
        """The place of the output folder while its drive is unplugged."""
        return self.output.with_name("unplugged")

    def act_once(self) -> None:
        """Do one random thing that a user can do."""
        action = self.dice.choice(["move", "move", "rename", "swap", "delete", "restore", "unplug"])
        self.actions.append(action)
        image = self.dice.choice(self.images)
        if action == "unplug":
            if self.is_unplugged:
                self.unplugged_output.rename(self.output)
            else:
                self.output.rename(self.unplugged_output)
            self.is_unplugged = not self.is_unplugged
        elif self.is_unplugged:
            return
        elif action == "restore" and image.place is None:
            image.place = self.new_place("restored")
            image.place.write_bytes(image.content)
        elif image.place is None:
            return
        elif action == "delete":
            image.place.unlink()
            image.place = None
        elif action == "swap":
            self.swap(image, self.dice.choice(self.images))
        else:
            folder = image.place.parent if action == "rename" else None
            place = self.new_place("renamed" if action == "rename" else image.place.stem, folder)
            image.place = image.place.rename(place)

    def new_place(self, stem: str, folder: Path | None = None) -> Path:
        """Return a free path in a folder that the server may read."""
        if folder is None:
            folder = self.dice.choice([self.output, self.project]) / self.dice.choice(SUBFOLDERS)
            folder.mkdir(parents=True, exist_ok=True)
        names = (folder / f"{stem[:40]} {self.dice.randrange(10**6)}.png" for _ in range(100))
        return next(path for path in names if not path.exists())

    def swap(self, image: PaidImage, other: PaidImage) -> None:
        """Move an image to the recorded path of another one, if this path is free."""
        path = Path(other.record.path or "")
        assert image.place is not None
        if path.parent.is_dir() and not path.exists():
            image.place = image.place.rename(path)

    def is_readable(self, image: PaidImage) -> bool:
        """Return whether the file of an image is there and its drive is connected."""
        return image.place is not None and not (self.is_unplugged and image.place.is_relative_to(self.output))

    def image_at(self, path: str) -> PaidImage | None:
        """Return the image in the file at a path."""
        return next((image for image in self.images if self.is_readable(image) and str(image.place) == path), None)


async def buy(world: World, prompt: str, count: int) -> list[PaidImage]:
    async with world.client() as client:
        answer = await client.call_tool("generate_image", {"prompt": f"sim:fast {prompt}", "n": count})
    entry = await world.studio.journal.by_task(answer.structured_content["task_id"])
    assert entry is not None
    return [
        PaidImage(entry.task_id or "", image, Path(image.path or "").read_bytes(), Path(image.path or ""))
        for image in entry.images
    ]


async def names_of(disk: Disk, image: PaidImage) -> list[tuple[str, PaidImage]]:
    """Return names of an image, each with the image that it must find."""
    recorded_path = image.record.path or ""
    names = [
        (f"evolink://images/{image.task_id}/{image.record.index}", image),
        (image.record.url, image),
        (recorded_path, disk.image_at(recorded_path) or image),
    ]
    if disk.is_readable(image):
        names.append((f"'{image.place}'", image))
    return names


async def check(world: World, disk: Disk) -> None:
    """Compare the answers of a server with the disk."""
    store = world.studio.image_store
    for task_id in {image.task_id for image in disk.images}:
        entry = await world.studio.journal.by_task(task_id)
        assert entry is not None
        images = [image for image in disk.images if image.task_id == task_id]
        assert [record.path for record in entry.images] == [image.record.path for image in images]
        (listed_entry,) = await store.entries_for_caller([entry])
        shown_entry = await store.entry_for_caller(entry)
        for image, record, row in zip(images, shown_entry.images, listed_entry.images, strict=True):
            if disk.is_readable(image):
                assert record.path == str(image.place)
                assert record.is_present
                assert (await store.local_file(task_id, image.record)).read_bytes() == image.content
            else:
                assert record.path == image.record.path
                with pytest.raises(FileNotFoundError):
                    await store.local_file(task_id, image.record)
            assert row.sha256 == image.record.sha256
    image = disk.dice.choice(disk.images)
    for name, expected in await names_of(disk, image):
        match = await world.studio.known_images.find(name)
        assert match is not None, name
        assert (match.task_id, match.index) == (expected.task_id, expected.record.index), name


def downloads(world: World) -> int:
    return sum(request.path.startswith("/pictures/") for request in world.simulator.requests)


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_random_sequences_lose_no_paid_image_and_report_none_wrongly(
    open_world: Open, tmp_path: Path, seed: int
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    environ = {"EVOLINK_MCP_ALLOWED_DIRS": str(project)}
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(open_world(environ))
        images = [*await buy(world, "a harbour", 1), *await buy(world, "a fox", 2), *await buy(world, "a map", 1)]
        options: Any = {"simulator": world.simulator, "clock": world.clock}
        servers = [world]
        for key in (OTHER_KEY, ""):
            open_server = open_world({**environ, "EVOLINK_API_KEY": key}, **options)
            servers.append(await stack.enter_async_context(open_server))
        sums = await world.studio.journal.sums_since(0)
        download_count = downloads(world)
        disk = Disk(tmp_path / "pictures", project, images, random.Random(seed))
        for _ in range(SEQUENCES):
            disk.actions.clear()
            for _ in range(disk.dice.randint(1, 6)):
                disk.act_once()
            server = disk.dice.choice(servers)
            try:
                await check(server, disk)
                image = disk.dice.choice(images)
                if all(disk.is_readable(other) for other in images if other.task_id == image.task_id):
                    job = await server.studio.resume(image.task_id)
                    assert job.is_finished
            except AssertionError as error:
                raise AssertionError(f"after {disk.actions}") from error
        assert downloads(world) == download_count
        assert world.posts == 3
        assert await world.studio.journal.sums_since(0) == sums
        assert len(await world.studio.journal.recent(10)) == 3
