"""Limits for people with a JWT: their number, their requests, and their roles."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from login import ISSUER, Login
from team_server import ANNA, BERT, INITIALIZE, open_team_server

from evolink_mcp.teams.authenticator import TeamAuthenticator
from evolink_mcp.teams.request_rates import REQUESTS_PER_MINUTE, TENANTS_MAX, MinuteCount, RequestRates
from evolink_mcp.teams.roles import BadRoles, Roles
from evolink_mcp.teams.tenants import LateApp, Tenants, unlisted_max_for
from evolink_mcp.teams.tokens import Tenant
from evolink_mcp.transports.authentication import CALLER_KEY, AuthFailure
from evolink_mcp.transports.turns import CALLS_AT_ONCE, Turns

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

PUBLIC = {"EVOLINK_MCP_PUBLIC_URL": "https://pictures.example.org", "EVOLINK_MCP_SECRET": "s" * 32}


# --- the number of people ---


class App:
    """The app of a tenant. `statuses` lists the statuses of its answers."""

    def __init__(self) -> None:
        self.is_idle = True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})


class People:
    """Tenants with at most two people. The tenant anna is in the tokens file."""

    def __init__(self, group: Any) -> None:
        self.apps: dict[str, App] = {}
        self.closed_names: list[str] = []
        self.can_close = anyio.Event()
        self.can_close.set()
        self.now_s = 0.0
        self.tenants = Tenants(
            group, self._open, lambda tenant: tenant.name == "anna", unlisted_max=2, clock=lambda: self.now_s
        )

    @asynccontextmanager
    async def _open(self, tenant: Tenant) -> AsyncIterator[App]:
        app = App()
        self.apps[tenant.name] = app
        yield app
        await self.can_close.wait()
        del self.apps[tenant.name]
        self.closed_names.append(tenant.name)

    async def status(self, name: str) -> int:
        messages: list[Any] = []

        async def send(message: Any) -> None:
            messages.append(message)

        self.now_s += 1
        await self.tenants({"type": "http", CALLER_KEY: Tenant(name)}, None, send)  # pyright: ignore[reportArgumentType]
        return messages[0]["status"]


async def test_a_further_person_gets_the_place_of_the_idle_person_with_the_oldest_request() -> None:
    async with anyio.create_task_group() as group:
        people = People(group)
        for name in ("anna", "bert", "carl", "bert", "dora"):
            assert await people.status(name) == 200
        while not people.closed_names:
            await anyio.sleep(0)
        assert people.closed_names == ["carl"]
        assert sorted(people.apps) == ["anna", "bert", "dora"]
        people.apps["bert"].is_idle = False
        people.apps["dora"].is_idle = False
        assert await people.status("emil") == 503
        assert await people.status("bert") == 200
        people.apps["dora"].is_idle = True
        assert await people.status("emil") == 200
        group.cancel_scope.cancel()


async def test_an_app_in_use_is_not_closed_for_a_further_person() -> None:
    async with anyio.create_task_group() as group:
        people = People(group)
        async with people.tenants.use(Tenant("bert")), people.tenants.use(Tenant("carl")):
            assert await people.status("dora") == 503
        assert await people.status("dora") == 200
        group.cancel_scope.cancel()


async def test_a_tenant_is_opened_again_only_after_its_former_app_has_ended() -> None:
    """The former app releases all entries of the tenant at its end."""
    statuses: list[int] = []

    async with anyio.create_task_group() as group:
        people = People(group)
        people.can_close = anyio.Event()
        for name in ("bert", "carl", "dora"):
            assert await people.status(name) == 200

        async def call_again() -> None:
            statuses.append(await people.status("bert"))

        group.start_soon(call_again)
        await anyio.wait_all_tasks_blocked()
        assert (statuses, people.closed_names) == ([], [])
        people.can_close.set()
        while not statuses:
            await anyio.sleep(0)
        assert "bert" in people.closed_names
        group.cancel_scope.cancel()


async def test_the_app_of_a_tenant_is_built_once_and_only_for_a_request() -> None:
    apps: list[App] = []

    class McpApp(App):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "lifespan":
                return await super().__call__(scope, receive, send)
            while (await receive())["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            return await send({"type": "lifespan.shutdown.complete"})

    def make() -> App:
        apps.append(McpApp())
        return apps[-1]

    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    async with AsyncExitStack() as stack:
        app = LateApp(make, Turns(), stack)
        assert apps == []
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(app, {"type": "http"}, None, send)  # pyright: ignore[reportArgumentType]
        assert len(apps) == 1
    assert [message["status"] for message in messages] == [200] * 3


async def test_a_process_with_few_descriptors_serves_fewer_people() -> None:
    assert [unlisted_max_for(descriptors) for descriptors in (4, 512, 1_000_000)] == [1, 64, 256]


# --- the requests of a person ---


async def test_the_memory_for_the_request_rates_is_limited() -> None:
    rates = RequestRates(tenants_max=3, clock=lambda: 0.0)
    assert rates.failure("anna", 1) is None
    for number in range(10):
        assert rates.failure("anna", 1) is not None
        assert rates.failure(f"person {number}", 1) is None
    assert len(rates) == 3


async def test_a_tenant_without_a_limit_of_its_own_has_the_default() -> None:
    rates = RequestRates(default=2, clock=lambda: 0.0)
    assert [rates.failure("anna", None) is None for _ in range(3)] == [True, True, False]
    assert [rates.failure("bert", 3) is None for _ in range(4)] == [True, True, True, False]


async def test_a_refused_request_does_not_extend_the_minute() -> None:
    now_s = 120.0
    rates = RequestRates(default=1, clock=lambda: now_s)
    assert rates.failure("anna", None) is None
    now_s = 179.0
    failure = rates.failure("anna", None)
    assert failure is not None
    assert dict(failure.headers)[b"retry-after"] == b"2"
    now_s = 180.0
    assert rates.failure("anna", None) is None


async def test_the_requests_at_all_servers_count_together() -> None:
    now_s = 120.0
    first, second = (RequestRates(default=5, clock=lambda: now_s) for _ in range(2))
    table: dict[tuple[str, int], int] = {}

    def exchange(rates: RequestRates) -> None:
        """Exchange the requests with the table, like the heartbeat of a server."""
        totals: list[MinuteCount] = []
        for tenant, minute, requests in rates.take_unsent():
            table[tenant, minute] = table.get((tenant, minute), 0) + requests
            totals.append(MinuteCount(tenant, minute, table[tenant, minute]))
        rates.set_totals(totals)

    assert [first.failure("anna", None) is None for _ in range(3)] == [True] * 3
    exchange(first)
    assert second.failure("anna", None) is None
    exchange(second)
    assert [second.failure("anna", None) is None for _ in range(2)] == [True, False]
    assert second.failure("bert", None) is None
    now_s = 180.0
    first.set_totals([MinuteCount("anna", 2, 5)])  # an answer that is late
    assert first.failure("anna", None) is None


async def test_requests_that_other_servers_did_not_receive_are_sent_again() -> None:
    rates = RequestRates(default=5, clock=lambda: 120.0)
    assert rates.failure("anna", None) is None
    unsent = rates.take_unsent()
    assert rates.failure("anna", None) is None
    rates.restore_unsent(unsent)
    assert rates.take_unsent() == [MinuteCount("anna", 2, 2)]


async def test_the_calls_of_all_tenants_wait_for_the_same_turns(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, ANNA, BERT) as server, AsyncExitStack() as stack:

        async def ask(token: str) -> None:
            async with server.http(token) as http:
                statuses.append((await http.post("/mcp", json=INITIALIZE)).status_code)

        statuses: list[int] = []
        for token in ("a", "b"):  # opens the app of the tenant, which needs a turn too
            await ask(token)
        statuses.clear()
        give_back = [await stack.enter_async_context(server.studios.turns.turn()) for _ in range(CALLS_AT_ONCE)]
        async with anyio.create_task_group() as group:
            for token in ("a", "b"):
                group.start_soon(ask, token)
            await anyio.wait_all_tasks_blocked()
            assert statuses == []
            give_back[0]()
        assert statuses == [200, 200]


# --- roles ---

ROLES = """
denied_subjects = ["mallory"]

[[role]]
claim = "groups"
value = "design"
max_credits_per_call = 20
requests_per_minute = 2
tools = ["generate_image", "get_task"]

[[role]]
claim = "realm_access.roles"
value = "reader"
tools = ["compute_size"]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "roles.toml"
    path.write_text(ROLES)
    return path


async def _status(login: Login, issuer: Any, rates: RequestRates | None = None, **claims: Any) -> int:
    authenticator = TeamAuthenticator(None, issuer, rates=rates)
    auth_result = await authenticator.authenticate({b"authorization": b"Bearer " + login.token(**claims)})
    return auth_result.status if isinstance(auth_result, AuthFailure) else 200


@pytest.mark.parametrize(
    ("claims", "tools"),
    [
        pytest.param({"groups": ["x", "design"]}, {"generate_image", "get_task"}, id="in a list"),
        pytest.param({"groups": "design"}, {"generate_image", "get_task"}, id="as text"),
        pytest.param({"realm_access": {"roles": ["reader"]}}, {"compute_size"}, id="inside another claim"),
        pytest.param({"realm_access.roles": "reader"}, {"compute_size"}, id="with a dot in its name"),
        pytest.param({"groups": "designers"}, None, id="another value"),
        pytest.param({"groups": {"design": 1}}, None, id="as the name of a member"),
        pytest.param({}, None, id="no claim"),
        pytest.param({"groups": "design", "sub": "mallory"}, None, id="a denied subject"),
    ],
)
async def test_the_first_matching_role_sets_tools_and_limits_and_nobody_else_may_call(
    file: Path, claims: dict[str, Any], tools: set[str] | None
) -> None:
    login = Login()
    auth_result = await login.issuer(roles=Roles(file)).tenant_of(login.token(**claims))
    if tools is None:
        assert isinstance(auth_result, AuthFailure)
        assert auth_result.status == 403
    else:
        assert isinstance(auth_result, Tenant)
        assert auth_result.tools == tools
        assert auth_result.max_credits_per_call == (20 if "generate_image" in tools else None)


async def test_a_role_limits_the_requests_of_each_person_separately(file: Path) -> None:
    login = Login()
    issuer = login.issuer(roles=Roles(file))
    rates = RequestRates(clock=lambda: 0.0)
    statuses = [await _status(login, issuer, rates, groups="design", sub=name) for name in ("a", "a", "a", "b")]
    assert statuses == [200, 200, 429, 200]


async def test_a_changed_file_denies_a_person_at_the_next_request(file: Path) -> None:
    login = Login()
    issuer = login.issuer(roles=Roles(file, clock=lambda: login.now))
    assert await _status(login, issuer, groups="design") == 200
    file.write_text(ROLES.replace("mallory", "anna"))
    os.utime(file, (1, 1))  # a file system may have coarse times
    login.now += 2
    assert await _status(login, issuer, groups="design") == 403
    file.write_text("role = 3")
    login.now += 2
    assert await _status(login, issuer, groups="design") == 403  # the last valid file stays in use


async def test_without_roles_the_file_only_denies_subjects(file: Path) -> None:
    file.write_text('denied_subjects = ["mallory"]')
    login = Login()
    issuer = login.issuer(roles=Roles(file))
    assert await _status(login, issuer) == 200
    assert await _status(login, issuer, sub="mallory") == 403


@pytest.mark.parametrize(
    "text",
    [
        "x = 1",
        "role = 1",
        "role = [1]",
        "denied_subjects = 'mallory'",
        "denied_subjects = [1]",
        "[[role]]\nclaim = 'groups'",
        "[[role]]\nvalue = 'design'",
        "[[role]]\nclaim = ''\nvalue = 'x'",
        "[[role]]\nevolink_key = 'sk-secret-key'",
        "[[role]]\nmax_running = true",
        "[[role]]\ntools = ['buy']",
        "=",
    ],
)
async def test_an_invalid_file_is_refused(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(BadRoles, match=r"roles\.toml"):
        Roles(file)


async def test_a_person_gets_only_the_tools_of_the_role(tmp_path: Path, file: Path) -> None:
    login = Login()
    issuer = login.issuer(roles=Roles(file))
    token = login.token(realm_access={"roles": ["reader"]}).decode()
    async with open_team_server(tmp_path, ANNA, issuer=issuer, EVOLINK_MCP_OAUTH_ISSUER=ISSUER, **PUBLIC) as server:
        async with server.client(token) as client:
            assert [tool.name for tool in (await client.list_tools()).tools] == ["compute_size"]
        async with server.http(login.token(sub="mallory").decode()) as http:
            assert (await http.post("/mcp", json=INITIALIZE)).status_code == 403


LIMIT_TEXTS = {
    "Tenants with counted requests per minute": f"{TENANTS_MAX:,}",
    "Requests of a tenant per minute, at all servers of a team": f"{REQUESTS_PER_MINUTE}, or `requests_per_minute` of the tenant",
}

TRIALS = {
    "Open apps of people with a JWT": test_a_further_person_gets_the_place_of_the_idle_person_with_the_oldest_request,
    "Tenants with counted requests per minute": test_the_memory_for_the_request_rates_is_limited,
    "Requests of a tenant per minute, at all servers of a team": test_a_tenant_without_a_limit_of_its_own_has_the_default,
}
