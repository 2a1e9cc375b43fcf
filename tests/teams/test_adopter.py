"""One search for the entries of dead servers of all tenants: its cost, and the tenants that it opens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from conftest import PlainSimulator

pytest.importorskip("psycopg")

import psycopg
from child_processes import patient_times
from team_server import ANNA, HEADERS, block, guard_of, open_team_server, tenants_of
from test_called_back import PUBLIC, addresses, body_of, call_back
from test_database import name_of
from test_replicas import REQUEST, Team, open_team

from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.app.environment import decoder_environment
from evolink_mcp.images.decode_process import Decoder
from evolink_mcp.journal.entry import Entry, Phase, new_key
from evolink_mcp.studio.jobs import ImageRequest, Job
from evolink_mcp.studio.studio import Studio
from evolink_mcp.teams.adopter import TRY_AGAIN_AFTER_S, Adopter
from evolink_mcp.teams.authenticator import TeamAuthenticator
from evolink_mcp.teams.database import Database
from evolink_mcp.teams.postgres import PostgresJournal
from evolink_mcp.teams.settings import TeamSettings
from evolink_mcp.teams.studios import Studios, open_team_database
from evolink_mcp.teams.tokens import Tenant, Tokens

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
FOX = GenerationRequest(prompt="a fox", size="1024x640")
JWT_TENANT = Tenant("anna at https://login.example.org")
ANNA_WITH_KEY = block("anna", "a", evolink_key="sk-annas-own")


@pytest.fixture
def url(cluster: Any) -> str:
    return cluster.database()


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of the statements of all connections, without the heartbeats of the leases."""
    texts: list[str] = []
    execute = psycopg.AsyncConnection.execute

    async def recorded(self: Any, query: Any, *args: Any, **options: Any) -> Any:
        text = query.decode() if isinstance(query, bytes) else str(query)
        if "lease_until" not in text or "FROM evolink_servers" in text:
            texts.append(" ".join(text.split()[:4]))
        return await execute(self, query, *args, **options)

    monkeypatch.setattr(psycopg.AsyncConnection, "execute", recorded)
    return texts


class Replica:
    """A server of a team in this process. `adopter.adopt` runs only when a test calls it."""

    def __init__(self, studios: Studios, tokens: Tokens, group: Any) -> None:
        self.now_s = 0.0
        self.studios = studios
        authenticator = TeamAuthenticator(tokens, accepts_caller_keys=True, server_key=studios.settings.key)
        self.tenants = tenants_of(studios, authenticator, group)
        self.adopter = Adopter(studios, self.tenants, authenticator, clock=lambda: self.now_s)
        self.guard = guard_of(studios, authenticator, group, self.tenants, self.adopter)

    @property
    def open_names(self) -> list[str]:
        return sorted(tenant.name for tenant in self.tenants.open_apps)

    @property
    def database(self) -> Database:
        assert self.studios.database is not None
        return self.studios.database

    async def adopt_until_saved(self, folder: Path) -> None:
        while not list(folder.rglob("copies/*.png")):
            await self.adopter.adopt()
            await anyio.sleep(0.01)

    async def call(self, token: str) -> None:
        """Call a free tool that adopts entries."""
        transport = httpx.ASGITransport(self.guard)
        headers = {**HEADERS, "authorization": f"Bearer {token}"}
        params = {"name": "list_tasks", "arguments": {}}
        message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as http:
            answer = await http.post("/mcp", json=message)
            assert "structuredContent" in answer.text


@asynccontextmanager
async def replica(
    url: str, folder: Path, *blocks: str, simulator: PlainSimulator, pause: Any = anyio.sleep, **environ: str
) -> AsyncIterator[Replica]:
    folder.mkdir(exist_ok=True)
    (folder / "tokens.toml").write_text("".join(blocks))
    settings = TeamSettings.from_environment({
        "EVOLINK_API_KEY": "sk-test-key", "EVOLINK_BASE_URL": "http://127.0.0.1:9",
        "EVOLINK_MCP_DATA_DIR": str(folder / "data"), "EVOLINK_MCP_OUTPUT_DIR": str(folder / "pictures"),
        "EVOLINK_MCP_TOKENS_FILE": str(folder / "tokens.toml"), "EVOLINK_MCP_DATABASE_URL": url,
        "EVOLINK_MCP_SECRET": "s" * 32, **environ,
    })  # fmt: skip
    assert settings.tokens_file is not None
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(open_team_database(url, patient_times(grace_s=0.0)))
        group = await stack.enter_async_context(anyio.create_task_group())
        stack.callback(group.cancel_scope.cancel)
        decoder = stack.enter_context(closing(Decoder(decoder_environment())))
        transport = httpx.ASGITransport(simulator.app)
        studios = Studios(settings, database, decoder, group, transport=transport, pause=pause)
        yield Replica(studios, Tokens(settings.tokens_file), group)


async def order(studio: Studio) -> Job:
    """Buy an image. Return when the journal has its task."""
    job = await studio.order(ImageRequest(FOX, 9.0))
    while (await studio.journal.recent(1))[0].task is None:
        await anyio.sleep(0.01)
    return job


@asynccontextmanager
async def dying_server(url: str, folder: Path, tenant: Tenant, simulator: PlainSimulator) -> AsyncIterator[Job]:
    """Buy an image at a server whose session ends with the context. It releases no entry."""
    async with AsyncExitStack() as stack:
        victim = await stack.enter_async_context(replica(url, folder, ANNA, simulator=simulator))
        studio, _ = await stack.enter_async_context(victim.studios.open(tenant))
        yield await order(studio)
        await victim.database.close()


def tenant_of(folder: Path, text: str) -> Tenant:
    """Return the only tenant of a tokens file."""
    folder.mkdir(exist_ok=True)
    (folder / "one.toml").write_text(text)
    (tenant,) = Tokens(folder / "one.toml").tenants.values()
    return tenant


def finish_tasks(simulator: PlainSimulator) -> None:
    for task in simulator.tasks.values():
        task.duration = 0


def key_polls(simulator: PlainSimulator) -> list[str]:
    """Return the keys of all polls of single tasks."""
    return [r.headers["authorization"] for r in simulator.requests if r.path.startswith("/v1/tasks/task-")]


# --- the cost ---


async def test_a_search_costs_the_same_for_any_number_of_tenants(
    cluster: Any, tmp_path: Path, statements: list[str]
) -> None:
    """The other server is alive and works on an entry of each tenant."""
    simulator = PlainSimulator()
    counts: list[int] = []
    for number in (1, 200):
        names = [f"tenant{index}" for index in range(number)]
        blocks = [block(name, name) for name in names]
        folder = tmp_path / str(number)
        url = cluster.database()
        async with (
            replica(url, folder, *blocks, simulator=simulator) as one,
            replica(url, folder, *blocks, simulator=simulator) as other,
        ):
            for name in names:
                journal = PostgresJournal(other.database, "a1", profile=name)
                await journal.intend(Entry(new_key(), journal.owner, Phase.INTENT, 1.0, account="a1"))
            await one.adopter.adopt()  # it opens the connection
            statements.clear()
            await one.adopter.adopt()
            counts.append(len(statements))
            assert one.open_names == []
    assert counts == [3, 3], statements  # the servers, the lease of the other one, the orphans


async def test_an_idle_open_tenant_executes_no_statement(url: str, tmp_path: Path, statements: list[str]) -> None:
    simulator = PlainSimulator()
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await anyio.sleep_forever()

    async with replica(url, tmp_path, ANNA, simulator=simulator, pause=pause) as one:
        await one.adopter.adopt()
        assert one.open_names == []
        await one.call("a")
        await one.call("a")
        assert one.open_names == ["anna"]
        statements.clear()
        await one.adopter.adopt()
        assert len(statements) == 2, statements  # the servers, the orphans
    assert pauses == []  # no loop of the studio searches for entries


# --- tenants that never call ---


async def test_the_entry_of_a_tenant_with_a_key_in_the_tokens_file_is_adopted(url: str, tmp_path: Path) -> None:
    simulator = PlainSimulator(duration_s=3600)
    anna = tenant_of(tmp_path, ANNA_WITH_KEY)
    async with replica(url, tmp_path, ANNA_WITH_KEY, simulator=simulator) as successor:
        async with dying_server(url, tmp_path / "doomed", anna, simulator):
            await successor.adopter.adopt()
            assert successor.open_names == []
        finish_tasks(simulator)
        before = len(key_polls(simulator))
        await successor.adopt_until_saved(tmp_path / "data")
        assert set(key_polls(simulator)[before:]) == {"Bearer sk-annas-own"}
    assert len(simulator.tasks) == 1


async def check_adoption(
    url: str, folder: Path, successor_block: str, tenant: Tenant, simulator: PlainSimulator
) -> None:
    """Let a server with this tokens file finish the task of the tenant after the death of its owner. It buys nothing."""
    async with replica(url, folder, successor_block, simulator=simulator) as successor:
        async with dying_server(url, folder / "doomed", tenant, simulator):
            pass
        finish_tasks(simulator)
        await successor.adopt_until_saved(folder / "data")
    assert len(simulator.tasks) == 1


async def test_the_entry_of_a_tenant_with_a_jwt_is_adopted_with_the_servers_key(url: str, tmp_path: Path) -> None:
    await check_adoption(url, tmp_path, ANNA, JWT_TENANT, PlainSimulator(duration_s=3600))


async def test_an_open_tenant_adopts_its_entry_without_a_call(url: str, tmp_path: Path) -> None:
    simulator = PlainSimulator(duration_s=3600)
    async with replica(url, tmp_path, ANNA, simulator=simulator) as successor:
        await successor.call("a")
        async with dying_server(url, tmp_path / "doomed", Tenant("anna"), simulator):
            pass
        finish_tasks(simulator)
        await successor.adopt_until_saved(tmp_path / "data")
        assert successor.open_names == ["anna"]
    assert len(simulator.tasks) == 1


async def test_the_entry_of_a_frozen_server_is_adopted_after_its_deadline(
    url: str, tmp_path: Path, cluster: Any
) -> None:
    """Its session stays open, and no heartbeat comes."""
    simulator = PlainSimulator(duration_s=3600)
    async with (
        replica(url, tmp_path, ANNA, simulator=simulator) as successor,
        replica(url, tmp_path / "frozen", ANNA, simulator=simulator) as frozen,
        frozen.studios.open(Tenant("anna")) as (studio, _),
    ):
        await order(studio)
        await successor.adopter.adopt()
        assert successor.open_names == []
        with cluster.admin(name_of(url)) as db:
            number = int(frozen.database.owner.removeprefix("server-"))
            db.execute("UPDATE evolink_servers SET lease_until = clock_timestamp() WHERE number = %s", (number,))
        await successor.adopter.adopt()
        assert successor.open_names == ["anna"]
        (entry,) = await studio.journal.recent(1)
        assert entry.owner == successor.database.owner
        assert await studio.journal.update(entry) is False
    assert len(simulator.tasks) == 1


# --- keys ---


async def test_a_tenant_is_opened_once_for_an_entry_of_an_unknown_account(
    url: str, tmp_path: Path, statements: list[str]
) -> None:
    """The caller sent an EvoLink key with the request. Only the test of the server's key needs the studio."""
    simulator = PlainSimulator(duration_s=3600)
    caller = tenant_of(tmp_path / "caller", ANNA_WITH_KEY)
    async with replica(url, tmp_path, ANNA, simulator=simulator) as successor:
        async with dying_server(url, tmp_path / "doomed", caller, simulator) as job:
            pass
        before = len(key_polls(simulator))
        await successor.adopter.adopt()
        assert key_polls(simulator)[before:] == ["Bearer sk-test-key"]
        statements.clear()
        await successor.adopter.adopt()
        await successor.adopter.adopt()
        assert len(statements) <= 2 * 3, statements
        journal = PostgresJournal(successor.database, profile="anna")
        entry = await journal.by_key(job.entry.key)
        assert entry is not None
        assert (entry.owner, entry.status) == ("", "pending")
        assert len(key_polls(simulator)) == before + 1


async def test_a_replaced_key_of_the_same_account_continues_the_entry(url: str, tmp_path: Path) -> None:
    accounts = {"sk-annas-new": "sk-annas-own"}
    simulator = PlainSimulator(duration_s=3600, accounts=accounts)
    new_block = block("anna", "a", evolink_key="sk-annas-new")
    await check_adoption(url, tmp_path, new_block, tenant_of(tmp_path / "old", ANNA_WITH_KEY), simulator)


async def test_without_a_key_for_the_tenant_no_studio_is_opened(url: str, tmp_path: Path) -> None:
    simulator = PlainSimulator(duration_s=3600)
    bert = block("bert", "b", evolink_key="sk-berts-key")
    async with replica(url, tmp_path, bert, simulator=simulator, EVOLINK_API_KEY="") as successor:
        async with dying_server(url, tmp_path / "doomed", Tenant("anna"), simulator):
            pass
        await successor.adopter.adopt()
        assert successor.open_names == []


async def test_an_entry_that_a_studio_could_not_finish_is_tried_again_after_an_hour(
    url: str, tmp_path: Path, cluster: Any, statements: list[str]
) -> None:
    """EvoLink does not accept the key, so each try would fail."""
    simulator = PlainSimulator(duration_s=3600)
    async with replica(url, tmp_path, ANNA, simulator=simulator) as successor:
        async with dying_server(url, tmp_path / "doomed", Tenant("anna"), simulator):
            pass
        simulator.keys = {}
        await successor.adopter.adopt()
        while any(studio.jobs for studio in successor.studios):
            await anyio.sleep(0.01)
        await successor.adopter.adopt()  # the release of the entry looks like that of another server
        statements.clear()
        await successor.adopter.adopt()
        idle = list(statements)
        assert len(idle) <= 3
        with cluster.admin(name_of(url)) as db:  # another server adopted it and died
            db.execute("UPDATE evolink_entries SET owner = 'server-7'")
        statements.clear()
        await successor.adopter.adopt()
        assert len(statements) > len(idle) + 4, statements
        successor.now_s += TRY_AGAIN_AFTER_S
        statements.clear()
        await successor.adopter.adopt()
        assert len(statements) > len(idle)


# --- callbacks ---


async def test_a_callback_for_the_lost_answer_of_a_closed_tenant_saves_the_image(url: str, tmp_path: Path) -> None:
    """The outcome is unknown, so the entry has no job. All servers were replaced, and the tenant has not called since."""
    async with open_team(url, tmp_path, ANNA, **PUBLIC) as team, team.client("a") as client:
        arguments = {**REQUEST, "prompt": "sim:fast sim:lost-reply a fox"}
        lost = (await client.call_tool("generate_image", arguments)).structured_content
        assert (lost["status"], lost["task_id"]) == ("unknown", None)
        (address,) = addresses(team)
        simulator = team.simulator
    (task_id,) = simulator.tasks
    async with replica(url, tmp_path / "new", ANNA, simulator=simulator, **PUBLIC) as new:
        await new.adopter.adopt()
        assert new.open_names == []
        new_team = Team([new.guard], simulator, team.settings)
        assert await call_back(new_team, address, body_of(task_id)) == 200
        while not list((tmp_path / "new").rglob("copies/*.png")):
            await anyio.sleep(0.01)
        assert new.open_names == ["anna"]
        (entry,) = await PostgresJournal(new.database, profile="anna").recent(1)
        assert (entry.task_id, entry.is_unconfirmed) == (task_id, False)
    assert len(simulator.tasks) == 1


@pytest.mark.parametrize("adopts", [0, 1], ids=["the server with the callback adopts", "another server adopts"])
async def test_a_callback_before_the_end_of_the_dead_owners_lease_is_used_after_it(
    url: str, tmp_path: Path, cluster: Any, adopts: int
) -> None:
    """The owner died during the POST, so only the callback knows the task."""
    simulator = PlainSimulator(duration_s=0)
    async with (
        replica(url, tmp_path, ANNA, simulator=simulator, **PUBLIC) as successor,
        replica(url, tmp_path / "other", ANNA, simulator=simulator, **PUBLIC) as other,
    ):
        async with (
            replica(url, tmp_path / "dead", ANNA, simulator=simulator, **PUBLIC) as dead,
            dead.studios.open(Tenant("anna")) as (studio, _),
        ):
            key = (await order(studio)).entry.key
            (task_id,) = simulator.tasks
            with cluster.admin(name_of(url)) as db:
                db.execute(
                    "UPDATE evolink_entries SET phase = 'sending', status = 'unknown', task = NULL, task_id = NULL"
                )
            await successor.adopter.receive_callback(studio.journal.channel, key, task_id)
            assert successor.open_names == ["anna"]
            await dead.database.close()
        while not list((tmp_path / "data").rglob("copies/*.png")):
            await (successor, other)[adopts].adopter.adopt()
            await anyio.sleep(0.01)
        (entry,) = await PostgresJournal(successor.database, profile="anna").recent(1)
        assert (entry.task_id, entry.is_unconfirmed) == (task_id, False)


async def test_a_callback_for_a_finished_entry_opens_no_tenant(url: str, tmp_path: Path) -> None:
    async with open_team(url, tmp_path, ANNA, **PUBLIC) as team, team.client("a") as client:
        handle = (await client.call_tool("generate_image", {**REQUEST, "wait_seconds": 0})).structured_content
        (address,) = addresses(team)
        assert await call_back(team, address, body_of(handle["task_id"])) == 200
        done = (await client.call_tool("generate_image", REQUEST)).structured_content
        assert done["status"] == "completed"
        simulator = team.simulator
    async with replica(url, tmp_path / "new", ANNA, simulator=simulator, **PUBLIC) as new:
        new_team = Team([new.guard], simulator, team.settings)
        assert await call_back(new_team, address, body_of(done["task_id"])) == 200
        assert new.open_names == []


# --- SQLite ---


async def test_a_server_with_sqlite_resumes_the_work_of_its_tenants_at_the_start(tmp_path: Path) -> None:
    simulator = PlainSimulator(duration_s=3600)
    async with open_team_server(tmp_path, ANNA, simulator=simulator) as server:
        await server.call("a", "generate_image", **{**REQUEST, "prompt": "a fox", "wait_seconds": 0})
    finish_tasks(simulator)
    async with open_team_server(tmp_path, ANNA, simulator=simulator) as server:
        await server.adopter.run()
        while not list((tmp_path / "data").rglob("copies/*.png")):
            await anyio.sleep(0.01)
    assert len(simulator.tasks) == 1


async def test_a_search_in_sqlite_creates_no_file(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, ANNA) as server:
        await server.adopter.run()
    assert not (tmp_path / "data").exists()
