"""Fixtures: a studio in tmp_path with a simulated EvoLink and a clock that only the test moves."""

from __future__ import annotations

import io
import os
import sys
import tomllib
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from child_processes import patient_times
from mcp.client import Client
from mcp_types import Implementation
from PIL import Image
from shared import CERTIFICATES_READ_ONCE, check_each_schema_once, shared_decoder

from evolink_mcp.app.environment import decoder_environment
from evolink_mcp.app.wiring import StudioParts, open_studio
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.journal.journal import Journal
from evolink_mcp.journal.sqlite import SqliteJournal
from evolink_mcp.server.server import build_server
from evolink_mcp.simulator.app import Simulator
from evolink_mcp.simulator.simulation import SimulatedTask
from evolink_mcp.studio.events import Subscriber
from evolink_mcp.studio.jobs import Sleep
from evolink_mcp.studio.purchase import CallbackAddresses
from evolink_mcp.studio.studio import Studio
from evolink_mcp.teams.settings import TeamSettings
from evolink_mcp.teams.studios import open_team_database, team_parts

# A failed assert in these modules shows its values, as in tests.
pytest.register_assert_rewrite(
    "kill_harness", "killer", "team_server", "faulty_gateway", "cluster", "drawings", "blocking"
)

KEY = "sk-canary-0123456789abcdef"
# Without a name of its own a client gets no previews.
TEST_CLIENT = Implementation(name="evolink-tests", version="1")
TEAM = os.environ.get("EVOLINK_TEST_DATABASE") == "postgres"
check_each_schema_once()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Start two workers more than cores: many tests wait for other processes."""
    return (os.cpu_count() or 1) + 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest tests first. Skip tests that need another platform or another journal, with the reason."""
    items.sort(key=lambda item: "killed" not in item.path.name)
    if TEAM:
        for item in items:
            if item.get_closest_marker("journal_file"):
                item.add_marker(pytest.mark.skip(reason="reads the file of the SQLite journal"))
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
    """End a test that hangs. Five minutes are enough on a busy machine."""
    with anyio.fail_after(300):
        yield


class Clock:
    """The time of studio and simulator. `sleep` moves it and lets other coroutines run."""

    def __init__(self) -> None:
        self.now = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await anyio.sleep(0)


class HeldClock(Clock):
    """A clock that can block `sleep`: set `is_held`, wait for `has_sleeper`, then set `release`."""

    def __init__(self) -> None:
        super().__init__()
        self.is_held = False
        self.has_sleeper = anyio.Event()
        self.release = anyio.Event()

    async def sleep(self, seconds: float) -> None:
        if self.is_held:
            self.has_sleeper.set()
            await self.release.wait()
        await super().sleep(seconds)


@lru_cache(maxsize=256)
def flat_image(seed: int, size: tuple[int, int], kind: str, is_transparent: bool, is_plain: bool = False) -> bytes:
    """Return an image with two colours, or one if `is_plain`. The simulator's own images take 50 times longer."""
    colour = (seed & 255, seed >> 8 & 255, seed >> 16 & 255)
    file = io.BytesIO()
    image = Image.new("RGBA", size, (*colour, 0)) if is_transparent else Image.new("RGB", size, colour)
    if not is_plain:
        image.paste(tuple(255 - part for part in colour), (0, 0, size[0] // 2, size[1] // 2))
    image.save(file, kind.upper())
    return file.getvalue()


class PlainSimulator(Simulator):
    """A simulated EvoLink with flat images. Each image is different and has the requested size, type and alpha."""

    def draw(self, task: SimulatedTask, index: int) -> bytes:
        size = (task.size[0] // 2, task.size[1] // 2) if "other-size" in task.faults else task.size
        seed = zlib.crc32(f"{index} {task.body['prompt']}".encode("utf-8", "surrogatepass"))
        return flat_image(seed, size, task.kind, task.body.get("background") == "transparent")


@dataclass
class World:
    """A studio with its simulator, clock and folder."""

    studio: Studio
    simulator: Simulator
    clock: Clock
    folder: Path
    settings: TeamSettings

    @property
    def posts(self) -> int:
        """Return the number of sent purchases."""
        return sum(r.method == "POST" and r.path == "/v1/images/generations" for r in self.simulator.requests)

    @property
    def files(self) -> list[Path]:
        """Return all files of the output folder except sidecars."""
        return sorted(p for p in (self.folder / "pictures").rglob("*") if p.is_file() and p.suffix != ".json")

    @asynccontextmanager
    async def client(self, mode: Any = "auto", **server: Any) -> AsyncIterator[Client]:
        """Connect a real MCP client in this process."""
        async with Client(build_server(self.studio, **server), client_info=TEST_CLIENT, mode=mode) as client:
            yield client


Open = Callable[..., AbstractAsyncContextManager[World]]


@pytest.fixture
def open_world(tmp_path: Path, request: pytest.FixtureRequest, decoder: Decoder) -> Open:
    """Return a function that opens a world. `environ` adds settings. An earlier `simulator` or `clock` can continue.

    `wrap_journal` returns the journal that the studio uses in place of the real one. With a `decoder_command` the world
    has its own decoder. With `is_shared` other tenants use the account too.

    With EVOLINK_TEST_DATABASE=postgres the journals of all worlds are in PostgreSQL.
    """
    team: dict[str, str] = {}
    if TEAM:
        database = request.getfixturevalue("cluster").database()
        team = {"EVOLINK_MCP_DATABASE_URL": database, "EVOLINK_MCP_SECRET": "s" * 32}

    @asynccontextmanager
    async def open_one_world(
        environ: dict[str, str] | None = None,
        simulator: Simulator | None = None,
        clock: Clock | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        pause: Sleep = anyio.sleep,
        decoder_command: list[str] | None = None,
        callbacks: CallbackAddresses | None = None,
        wrap_journal: Callable[[Journal], Any] = lambda journal: journal,
        database_times: Any = None,
        subscribers: tuple[Subscriber, ...] = (),
        is_shared: bool = False,
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
        if database_times is None and settings.database_url is not None:
            database_times = patient_times()
        own_decoder = closing(Decoder(decoder_environment(), command=decoder_command)) if decoder_command else None
        with own_decoder or nullcontext(decoder) as world_decoder:
            options: Any = {"transport": transport, "clock": clock, "sleep": clock.sleep, "pause": pause}
            options["http_options"] = CERTIFICATES_READ_ONCE
            async with open_team_database(settings.database_url, database_times) as team_database:
                parts = StudioParts() if team_database is None else team_parts(settings, team_database, clock=clock)
                make_journal: Callable[..., Journal] = parts.make_journal or (
                    lambda identity, profile: SqliteJournal(settings.data_dir, identity, profile=profile, clock=clock)
                )
                parts = replace(
                    parts,
                    callbacks=callbacks,
                    make_journal=lambda *names: wrap_journal(make_journal(*names)),
                    subscribers=(*parts.subscribers, *subscribers),
                    has_other_tenants=is_shared or parts.has_other_tenants,
                )
                async with open_studio(settings, parts, decoder=world_decoder, **options) as studio:
                    yield World(studio, simulator, clock, tmp_path, settings)

    return open_one_world


@pytest.fixture
def decoder() -> Decoder:
    """Return an image decoder with real processes."""
    return shared_decoder()


@pytest.fixture
async def world(open_world: Open) -> AsyncIterator[World]:
    async with open_world() as one_world:
        yield one_world


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Yield a PostgreSQL server for the tests."""
    if sys.platform == "win32":
        pytest.skip("needs PostgreSQL for Windows")
    from cluster import find_programs, run_cluster

    if find_programs() is None:
        pytest.skip("needs PostgreSQL, for example Debian's package postgresql")
    with run_cluster() as server:
        yield server
