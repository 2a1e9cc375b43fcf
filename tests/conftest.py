"""A studio in a folder: simulated EvoLink in process, a clock that only tests turn, nothing outside tmp_path."""

from __future__ import annotations

import io
import os
import sys
import tomllib
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from child_processes import keep_the_database
from mcp.client import Client
from PIL import Image

from evolink_mcp.app.settings import decoder_environment
from evolink_mcp.app.wiring import open_studio
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.server.server import build_server
from evolink_mcp.simulator.app import Simulator
from evolink_mcp.simulator.simulation import SimulatedTask
from evolink_mcp.studio.jobs import Sleep
from evolink_mcp.studio.studio import Studio
from evolink_mcp.teams.settings import TeamSettings
from evolink_mcp.teams.studios import open_team_studio

# Their asserts show what they saw, as those of tests do.
pytest.register_assert_rewrite("town", "killer", "office", "faulty_gateway", "cluster", "drawings", "blocking")

KEY = "sk-canary-0123456789abcdef"
TEAM = os.environ.get("EVOLINK_TEST_DATABASE") == "postgres"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Two more than there are cores: many tests wait for other processes."""
    return (os.cpu_count() or 1) + 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first. Under Windows, skip what is missing there, and say why.

    In PostgreSQL, what looks into the journal's file is skipped.
    """
    items.sort(key=lambda item: "killed" not in item.path.name)
    if TEAM:
        for item in items:
            if item.get_closest_marker("journal_file"):
                item.add_marker(pytest.mark.skip(reason="this is about the journal's file"))
    if sys.platform != "win32":
        return
    lacking = tomllib.loads((Path(__file__).parent / "windows" / "lacking.toml").read_text("utf-8"))
    for item in items:
        for reason, tests in lacking.items():
            if item.nodeid.startswith(tuple(tests)):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def in_time() -> AsyncIterator[None]:
    """No test may hang; five minutes are enough on a crowded machine."""
    with anyio.fail_after(300):
        yield


class Clock:
    """Wall time for studio and simulator: sleeping turns it, and lets everything else run."""

    def __init__(self) -> None:
        self.now = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await anyio.sleep(0)


class HeldClock(Clock):
    """A clock whose sleeper waits while it is held."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.asleep, self.go_on = False, anyio.Event(), anyio.Event()

    async def sleep(self, seconds: float) -> None:
        if self.held:
            self.asleep.set()
            await self.go_on.wait()
        await super().sleep(seconds)


@lru_cache(maxsize=256)
def flat_picture(mark: int, size: tuple[int, int], kind: str, clear: bool, plain: bool = False) -> bytes:
    """A picture of two colours (one if `plain`), made in a fiftieth of the time that a painted one takes."""
    colour = (mark & 255, mark >> 8 & 255, mark >> 16 & 255)
    out = io.BytesIO()
    image = Image.new("RGBA" if clear else "RGB", size, (*colour, 0)[: 4 if clear else 3])
    if not plain:
        image.paste(tuple(255 - part for part in colour), (0, 0, size[0] // 2, size[1] // 2))
    image.save(out, kind.upper())
    return out.getvalue()


class PlainSimulator(Simulator):
    """EvoLink simulated, with plain pictures: no two pictures are alike, and each has its size, type and alpha."""

    def _draw(self, task: SimulatedTask, index: int) -> bytes:
        size = (task.size[0] // 2, task.size[1] // 2) if "other-size" in task.faults else task.size
        mark = zlib.crc32(f"{index} {task.body['prompt']}".encode("utf-8", "surrogatepass"))
        return flat_picture(mark, size, task.kind, task.body.get("background") == "transparent")


@dataclass
class World:
    """One studio, its simulator and clock, and the folder it lives in."""

    studio: Studio
    simulator: Simulator
    clock: Clock
    folder: Path
    settings: TeamSettings

    @property
    def posts(self) -> int:
        """How many purchases went out."""
        return sum(r.method == "POST" and r.path == "/v1/images/generations" for r in self.simulator.requests)

    @property
    def files(self) -> list[Path]:
        """The saved pictures, and whatever else lies among them that should not."""
        return sorted(p for p in (self.folder / "pictures").rglob("*") if p.is_file() and p.suffix != ".json")

    @asynccontextmanager
    async def client(self, mode: Any = "auto", **server: Any) -> AsyncIterator[Client]:
        """A real MCP client, in process."""
        async with Client(build_server(self.studio, **server), mode=mode) as client:
            yield client


Open = Callable[..., AbstractAsyncContextManager[World]]


@pytest.fixture
def open_world(tmp_path: Path, request: pytest.FixtureRequest) -> Open:
    """Open a world: `environ` adds settings, `simulator` and `clock` carry over from an earlier life.

    EVOLINK_TEST_DATABASE=postgres lays the journals of all worlds into PostgreSQL.
    """
    team: dict[str, str] = {}
    if TEAM:
        database = request.getfixturevalue("cluster").database()
        team = {"EVOLINK_MCP_DATABASE_URL": database, "EVOLINK_MCP_SECRET": "s" * 32}

    @asynccontextmanager
    async def opened(
        environ: dict[str, str] | None = None,
        simulator: Simulator | None = None,
        clock: Clock | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        pause: Sleep = anyio.sleep,
        decoder_command: list[str] | None = None,
    ) -> AsyncIterator[World]:
        clock = clock or Clock()
        simulator = simulator or PlainSimulator(clock=clock)
        settings = TeamSettings.from_environment(
            {
                "EVOLINK_API_KEY": KEY,
                "EVOLINK_BASE_URL": "http://127.0.0.1:9",
                "EVOLINK_MCP_DATA_DIR": str(tmp_path / "data"),
                "EVOLINK_MCP_OUTPUT_DIR": str(tmp_path / "pictures"),
                **team,
                **(environ or {}),
            }
        )
        transport = transport or httpx.ASGITransport(simulator.app)
        with closing(Decoder(decoder_environment(), command=decoder_command)) as decoder:
            own: Any = {"transport": transport, "clock": clock, "sleep": clock.sleep, "pause": pause}
            opening = open_studio if settings.database_url is None else open_team_studio
            async with opening(settings, decoder=decoder, **own) as studio:
                yield World(studio, simulator, clock, tmp_path, settings)

    return opened


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    """A decoder with real processes."""
    with closing(Decoder(decoder_environment())) as opened:
        yield opened


@pytest.fixture
async def world(open_world: Open) -> AsyncIterator[World]:
    async with open_world() as opened:
        yield opened


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A PostgreSQL of the tests' own."""
    if sys.platform == "win32":
        pytest.skip("PostgreSQL's programs for Windows are not installed here")
    from cluster import programs, running

    if programs() is None:
        pytest.skip("PostgreSQL is not installed here: Debian's package postgresql has it")
    keep_the_database()  # unless a test says otherwise
    with running() as made:
        yield made
