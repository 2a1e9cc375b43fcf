"""The tokens file: authentication on every path, isolated tenants, and a reload of a changed file."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from child_processes import SERVER_COMMAND, minimal_environment, open_http_server
from conftest import Clock
from team_server import ANNA, BERT, HEADERS, INITIALIZE, REQUEST, block, open_team_server

from evolink_mcp.teams.app import Readiness
from evolink_mcp.teams.authenticator import TeamAuthenticator
from evolink_mcp.teams.request_rates import RequestRates
from evolink_mcp.teams.settings import TeamSettings
from evolink_mcp.teams.tenants import Tenants
from evolink_mcp.teams.tokens import BadTokens, Tenant, Tokens, new_token
from evolink_mcp.transports.authentication import CALLER_KEY, AuthFailure

pytestmark = pytest.mark.anyio
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])


def bearer(token: str) -> bytes:
    return f"Bearer {token}".encode()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.toml"


# --- the tokens file ---


def test_a_new_token_matches_its_block(file: Path) -> None:
    token, text = new_token("anna")
    file.write_text(text)
    assert token.startswith("evt_")
    assert len(token) == len("evt_") + 43
    assert token not in text
    tenant = Tokens(file).authenticate(bearer(token))
    assert isinstance(tenant, Tenant)
    assert tenant.name == "anna"


@pytest.mark.parametrize("name", ["", "a b", "../x", "NUL", "anna.", "\u202eanna", "a" * 65, "anna\n[[token]]"])
def test_a_name_that_no_folder_can_have_is_invalid(name: str) -> None:
    with pytest.raises(BadTokens):
        new_token(name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("", "needs one or more", id="empty"),
        pytest.param("[[token]\nname=", "no TOML", id="no TOML"),
        pytest.param("tokens = []", "needs one or more", id="an unknown table"),
        pytest.param("[[token]]\nname = 'anna'", "sha256 must be", id="no sha256"),
        pytest.param(
            block("anna", "a").replace('sha256 = "', 'sha256 = "evt_'),
            "not the token itself",
            id="a token instead of its hash",
        ),
        pytest.param(block("anna", "a") * 2, "the same sha256", id="a repeated token"),
        pytest.param(
            block("anna", "a", max_credits_per_dya=1), "max_credits_per_dya is unknown", id="a misspelled setting"
        ),
        pytest.param(block("anna", "a", max_credits_per_day=-1), "max_credits_per_day must be", id="below 0"),
        pytest.param(block("anna", "a", max_credits_per_day="5"), "max_credits_per_day must be", id="a text"),
        pytest.param(
            block("anna", "a") + "max_credits_per_day = nan", "max_credits_per_day must be", id="not a number"
        ),
        pytest.param(block("anna", "a") + "max_running = true", "max_running must be a whole number", id="a truth"),
        pytest.param(block("anna", "a", max_running=1.5), "max_running must be a whole number", id="a half"),
        pytest.param(block("anna", "a", tools=["buy"]), "tools must be a list of generate_image", id="no such tool"),
        pytest.param(block("anna", "a", tools=[["get_task"]]), "tools must be a list", id="a list in a list"),
        pytest.param(block("anna", "a", tools=[]), "tools must be a list", id="no tool"),
        pytest.param(block("anna", "a", evolink_key="sk 1"), "evolink_key is no EvoLink key", id="no key"),
        pytest.param(block("an na", "a"), "is no valid name", id="an invalid name"),
        pytest.param(
            block("anna", "a") + block("anna", "b", max_running=1), "have different settings", id="two limits"
        ),
    ],
)
def test_an_invalid_file_is_refused_with_its_fault(file: Path, text: str, words: str) -> None:
    file.write_text(text)
    with pytest.raises(BadTokens, match=words) as refusal:
        Tokens(file)
    assert "sk 1" not in str(refusal.value)


def test_a_missing_file_is_refused(file: Path) -> None:
    with pytest.raises(BadTokens, match="cannot be read"):
        Tokens(file)


def test_a_changed_file_is_reloaded_and_an_invalid_one_keeps_the_last_tokens(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    file.write_text(block("anna", "a"))
    tokens = Tokens(file, clock=clock)
    clock.now += 2
    file.write_text(block("anna", "a") + block("bert", "b"))
    assert isinstance(tokens.authenticate(bearer("b")), Tenant)
    clock.now += 2
    file.write_text("[[token")
    with caplog.at_level(logging.ERROR):
        assert isinstance(tokens.authenticate(bearer("b")), Tenant)
        clock.now += 2
        assert isinstance(tokens.authenticate(bearer("a")), Tenant)
    assert caplog.text.count("last valid tokens stay in use") == 1
    clock.now += 2
    file.write_text(block("bert", "b"))
    assert isinstance(tokens.authenticate(bearer("a")), AuthFailure)
    file.unlink()
    clock.now += 2
    assert isinstance(tokens.authenticate(bearer("b")), Tenant)


@pytest.mark.parametrize(
    "header", [None, b"", b"Bearer", b"Bearer ", b"Basic YTph", b"evt_a", b"Bearer b", b"Bearer \xff", b"Bearer a b"]
)
def test_a_request_without_a_known_token_gets_401(file: Path, header: bytes | None) -> None:
    file.write_text(block("anna", "a"))
    failure = Tokens(file).authenticate(header)
    assert isinstance(failure, AuthFailure)
    assert failure.status == 401
    assert dict(failure.headers)[b"www-authenticate"].startswith(b'Bearer realm="evolink-mcp"')


@pytest.mark.parametrize("header", [b"Bearer a", b"bearer a", b"BEARER   a  "])
def test_the_scheme_bearer_may_have_any_case(file: Path, header: bytes) -> None:
    file.write_text(block("anna", "a"))
    assert isinstance(Tokens(file).authenticate(header), Tenant)


@pytest.mark.anyio
async def test_a_tenant_above_its_requests_per_minute_gets_429(file: Path) -> None:
    now_s = 60.0
    file.write_text(block("anna", "a", requests_per_minute=2) + block("bert", "b"))
    authenticator = TeamAuthenticator(Tokens(file), rates=RequestRates(clock=lambda: now_s))

    async def result_of(token: str) -> Tenant | AuthFailure:
        return await authenticator.authenticate({b"authorization": bearer(token)})

    assert [isinstance(await result_of("a"), Tenant) for _ in range(3)] == [True, True, False]
    failure = await result_of("a")
    assert isinstance(failure, AuthFailure)
    assert (failure.status, dict(failure.headers)[b"retry-after"]) == (429, b"61")
    assert isinstance(await result_of("b"), Tenant)
    now_s = 120.0
    assert isinstance(await result_of("a"), Tenant)


def test_a_tenant_with_a_separate_key_shares_no_account(file: Path) -> None:
    file.write_text(
        block("anna", "a") + block("bert", "b", evolink_key="sk-berts-key") + block("bert", "b2", evolink_key="sk-berts-key")
        + block("carl", "c", evolink_key="sk-one-key") + block("dora", "d", evolink_key="sk-one-key")
    )  # fmt: skip
    shares_account = {tenant.name: tenant.shares_account for tenant in Tokens(file).tenants.values()}
    assert shares_account == {"anna": True, "bert": False, "carl": True, "dora": True}


WITH_KEY = block("anna", "a", evolink_key="sk-annas-own")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o444])
def test_a_file_with_a_key_that_other_users_can_read_is_reported_with_its_mode(file: Path, mode: int) -> None:
    file.write_text(BERT + WITH_KEY)
    file.chmod(mode)
    exposure = Tokens(file).exposure
    assert exposure is not None
    assert len(exposure.splitlines()) == 1
    assert f"{file} (mode {mode:04o})" in exposure
    assert f"chmod 600 {file}" in exposure
    assert "sk-annas-own" not in exposure


@pytest.mark.parametrize(("text", "mode"), [(WITH_KEY, 0o600), (WITH_KEY, 0o400), (ANNA, 0o644)])
def test_a_private_file_and_one_without_keys_need_no_report(file: Path, text: str, mode: int) -> None:
    file.write_text(text)
    file.chmod(mode)
    assert Tokens(file).exposure is None


def test_a_key_that_is_added_to_a_readable_file_later_is_reported_too(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    file.write_text(ANNA)
    file.chmod(0o644)
    tokens = Tokens(file, clock=clock)
    file.write_text(WITH_KEY)
    clock.now += 2
    tokens.authenticate(bearer("a"))
    assert [record.message for record in caplog.records if "chmod 600" in record.message] == [tokens.exposure]


# --- over HTTP ---


async def test_every_path_needs_a_token_except_the_health_checks(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, ANNA) as server:
        async with server.http() as http:
            for method, path in (
                ("POST", "/mcp"),
                ("GET", "/mcp"),
                ("DELETE", "/mcp"),
                ("GET", "/"),
                ("OPTIONS", "/mcp"),
            ):
                answer = await http.request(method, path, json=INITIALIZE)
                assert (answer.status_code, "www-authenticate" in answer.headers) == (401, True), path
            for path in ("/healthz", "/readyz"):
                assert (await http.get(path)).json()["status"] == "ok"
                assert (await http.post(path, json=INITIALIZE)).status_code == 401
            assert (await http.get("/healthz", headers={"host": "evil.dev"})).status_code == 421
        async with server.http("wrong") as http:
            answer = await http.post("/mcp", json=INITIALIZE)
            assert answer.headers["www-authenticate"].endswith('error="invalid_token"')
        async with server.http("a") as http:
            assert (await http.post("/mcp", json=INITIALIZE)).status_code == 200
    assert server.simulator.requests == []


@ERAS
async def test_identical_requests_of_two_tenants_are_two_purchases(tmp_path: Path, mode: str) -> None:
    async with open_team_server(tmp_path, ANNA, BERT) as server:
        first = await server.call("a", "generate_image", mode, **REQUEST, wait_seconds=0)
        second = await server.call("b", "generate_image", mode, **REQUEST, wait_seconds=0)
    assert first.structured_content["task_id"] != second.structured_content["task_id"]
    assert server.posts == 2


@ERAS
async def test_no_tool_and_no_resource_shows_the_task_of_another_tenant(tmp_path: Path, mode: str) -> None:
    async with open_team_server(tmp_path, ANNA, BERT) as server:
        purchase = (await server.call("a", "generate_image", mode, **REQUEST)).structured_content
        task_id, uri = purchase["task_id"], purchase["images"][0]["resource_uri"]
        visible = len(server.simulator.requests)
        async with server.client("b", mode) as client:
            for tool in ("get_task", "view_image"):
                answer = await client.call_tool(tool, {"task_id": task_id})
                assert answer.is_error
                assert "there is no task" in answer.content[0].text.lower()
            edit = await client.call_tool("generate_image", {"prompt": "an edit", "image_urls": [uri]})
            assert edit.structured_content["error"]["code"] == "reference_refused"
            task_list = await client.call_tool("list_tasks", {"sync": True})
            assert task_list.structured_content["tasks"] == []
            for address in (uri, f"evolink://tasks/{task_id}"):
                with pytest.raises(Exception, match=r"no |not "):
                    await client.read_resource(address)
        texts = [task_list.model_dump_json(), edit.model_dump_json(), answer.model_dump_json()]
        assert not any("anna" in text for text in texts)
        assert len(server.simulator.requests) == visible
        assert (await server.call("a", "get_task", mode, task_id=task_id)).structured_content["status"] == "completed"


async def test_a_lost_answer_is_never_matched_with_the_task_of_another_tenant(tmp_path: Path) -> None:
    """The account's task list has the tasks of all tenants. Time and price do not prove a match."""
    async with open_team_server(tmp_path, ANNA, BERT) as server:
        purchase = await server.call("a", "generate_image", prompt="sim:fast sim:lost-reply a fox", size="1024x640")
        assert (purchase.structured_content["status"], purchase.structured_content["charged"]) == ("unknown", "unknown")
        assert purchase.structured_content["task_id"] is None
        assert not any(request.path == "/v1/tasks" for request in server.simulator.requests)


async def test_spending_limits_count_per_tenant(tmp_path: Path) -> None:
    limited_block = block("anna", "a", max_credits_per_day=0.4)
    async with open_team_server(tmp_path, limited_block, BERT, EVOLINK_MCP_MAX_CREDITS_PER_CALL="50") as server:
        arguments = {**REQUEST, "quality": "low"}
        assert not (await server.call("a", "generate_image", **arguments)).is_error
        second = await server.call("a", "generate_image", **{**arguments, "prompt": "sim:fast a hare"})
        assert second.structured_content["error"]["code"] == "over_budget"
        assert not (await server.call("b", "generate_image", **{**arguments, "prompt": "sim:fast a hare"})).is_error
        expensive = await server.call("b", "generate_image", prompt="dear", size="3840x2160", quality="high", n=10)
        assert expensive.structured_content["error"]["code"] == "over_budget"


async def test_a_tenant_cannot_exceed_its_limit_of_running_tasks(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, block("anna", "a", max_running=2), BERT) as server:
        server.simulator.duration_s = 500
        answers: list[Any] = []

        async def order(number: int) -> None:
            arguments = {**REQUEST, "prompt": f"fox {number}"}
            answers.append(await server.call("a", "generate_image", **arguments, wait_seconds=0))

        async with anyio.create_task_group() as calls:
            for number in range(4):
                calls.start_soon(order, number)
        codes = sorted(answer.structured_content["error"]["code"] for answer in answers if answer.is_error)
        assert codes == ["too_many_running"] * 2
        assert server.posts == 2
        assert not (await server.call("b", "generate_image", **REQUEST, wait_seconds=0)).is_error


async def test_a_tenant_has_only_the_tools_of_its_token(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, block("anna", "a", tools=["get_task", "compute_size"]), BERT) as server:
        async with server.client("a") as client:
            tool_list = await client.list_tools()
        assert [tool.name for tool in tool_list.tools] == ["get_task", "compute_size"]
        assert tool_list.cache_scope == "private"  # another tenant has other tools
        assert (await server.call("a", "generate_image", **REQUEST)).is_error
        assert server.posts == 0


async def test_a_tenant_with_a_key_spends_from_its_account(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, block("anna", "a", evolink_key="sk-annas-own"), BERT) as server:
        await server.call("a", "generate_image", **REQUEST)
        await server.call("b", "generate_image", **REQUEST)
        used_keys = {
            request.headers.get("authorization") for request in server.simulator.requests if request.method == "POST"
        }
    assert used_keys == {"Bearer sk-annas-own", "Bearer sk-test-key"}


async def test_an_entry_without_a_tenant_is_shown_to_no_tenant(tmp_path: Path) -> None:
    from evolink_mcp.api.task import Task
    from evolink_mcp.journal.entry import Entry
    from evolink_mcp.journal.sqlite import SqliteJournal

    journal = SqliteJournal(tmp_path / "data")
    entry = Entry.external(Task("task-unified-1757156493-imcg5zqt", status="completed"), 1.0)
    await journal.intend(Entry(**{**{name: getattr(entry, name) for name in entry.__slots__}, "key": "k" * 32}))
    await journal.close()
    async with open_team_server(tmp_path, ANNA) as server:
        task_list = await server.call("a", "list_tasks")
    assert task_list.structured_content["tasks"] == []


# --- the command ---


def run(tmp_path: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = minimal_environment(tmp_path, **environ)
    command = [*SERVER_COMMAND, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_the_command_creates_a_token(tmp_path: Path) -> None:
    creation = run(tmp_path, "token", "anna")
    assert creation.returncode == 0
    assert creation.stdout.count("evt_") == 1
    refusal = run(tmp_path, "token", "an na")
    assert (refusal.returncode, refusal.stdout) == (2, "")


@pytest.mark.parametrize(
    ("text", "words"), [("[[token", "is no TOML"), (None, "cannot be read"), ("[[token]]", "needs a name")]
)
def test_an_invalid_file_ends_the_start_with_one_line(tmp_path: Path, file: Path, text: str | None, words: str) -> None:
    if text is not None:
        file.write_text(text)
    process = run(tmp_path, "http", EVOLINK_MCP_TOKENS_FILE=str(file))
    assert process.returncode == 2
    assert words in process.stderr
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["http", "sse"])
def test_the_start_reports_a_file_with_a_key_that_other_users_can_read(
    tmp_path: Path, file: Path, command: str
) -> None:
    file.write_text(WITH_KEY)
    file.chmod(0o644)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        process = run(tmp_path, command, "--port", port, EVOLINK_MCP_TOKENS_FILE=str(file))
    assert process.returncode == 1
    (report,) = [line for line in process.stderr.splitlines() if "chmod" in line]
    assert report.startswith("evolink-mcp: other users of this machine can read the EvoLink keys in the tokens file ")
    assert report.endswith(f"{file} (mode 0644). Run: chmod 600 {file}")
    assert "sk-annas-own" not in process.stderr


def test_the_doctor_reports_a_file_with_a_key_that_other_users_can_read(tmp_path: Path, file: Path) -> None:
    file.write_text(WITH_KEY)
    file.chmod(0o644)
    environ = {"EVOLINK_BASE_URL": "http://127.0.0.1:9", "EVOLINK_MCP_TOKENS_FILE": str(file)}
    report = json.loads(run(tmp_path, "doctor", "--json", **environ).stdout)
    (finding,) = [finding for finding in report["findings"] if finding["subject"] == "tokens"]
    assert finding["verdict"] == "warning"
    assert f"chmod 600 {file}" in finding["words"]


async def test_a_server_with_tokens_may_listen_on_every_address(tmp_path: Path, file: Path) -> None:
    """With tokens, a bind beyond loopback needs no --insecure."""
    token, text = new_token("anna")
    file.write_text(text)
    env = minimal_environment(tmp_path, EVOLINK_MCP_TOKENS_FILE=str(file), EVOLINK_API_KEY="sk-simulated")
    async with open_http_server("--host", "0.0.0.0", env={**os.environ, **env}) as server:
        assert "one tenant of" in server.log
        async with httpx.AsyncClient(base_url=server.url, headers=HEADERS) as http:
            assert (await http.post("/mcp", json=INITIALIZE)).status_code == 401
            headers = {"authorization": f"Bearer {token}"}
            assert (await http.post("/mcp", json=INITIALIZE, headers=headers)).status_code == 200
        server.process.terminate()
        assert await server.process.wait() == (1 if sys.platform == "win32" else 143)


@pytest.mark.parametrize(
    ("key", "blocks", "why"),
    [
        ("sk-test-key", ANNA, None),
        (None, ANNA, "no EvoLink API key is set"),
        (None, block("anna", "a", evolink_key="sk-annas-own"), None),
        ("sk-...", ANNA, "EVOLINK_API_KEY is still the example sk-..."),
    ],
)
def test_a_server_without_any_evolink_key_is_not_ready(file: Path, key: str | None, blocks: str, why: str) -> None:
    file.write_text(blocks)
    settings = TeamSettings.from_environment({"EVOLINK_API_KEY": key} if key else {})
    assert Readiness(settings, TeamAuthenticator(Tokens(file))).problem == why


async def test_tasks_of_tenants_with_one_account_are_polled_in_one_batch(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, ANNA, BERT) as server:
        server.simulator.duration_s = 3600
        for token, prompt in (("a", "a fox"), ("a", "a hen"), ("b", "a cow")):
            await server.call(token, "generate_image", prompt=prompt, size="1024x640", wait_seconds=0)
        jobs = [job for studio in server.studios for job in studio.jobs]
        assert len(jobs) == 3
        while not any(r.path == "/v1/tasks/batch" for r in server.simulator.requests):
            for job in jobs:  # Without this call the polls rarely happen at the same moment
                job.poll_now()
            await anyio.sleep(0.01)
        keys = {r.headers["authorization"] for r in server.simulator.requests}
    assert keys == {"Bearer sk-test-key"}


async def test_the_app_of_an_idle_tenant_is_closed_after_an_hour(tmp_path: Path) -> None:
    hour_later = anyio.Event()
    now_s = [1_000.0]

    async def sleep(_: float) -> None:
        await hour_later.wait()
        await anyio.sleep(0)

    class App:
        is_idle = False

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            pass

    opened_names, closed_names, app = [], [], App()

    @asynccontextmanager
    async def open_app(tenant: Tenant) -> AsyncIterator[App]:
        opened_names.append(tenant.name)
        yield app
        closed_names.append(tenant.name)

    with anyio.fail_after(300):
        async with anyio.create_task_group() as group:
            tenants = Tenants(
                group, open_app, lambda tenant: tenant.name == "anna", sleep=sleep, clock=lambda: now_s[0]
            )
            for name in ("anna", "bert", "bert"):
                await tenants({"type": "http", CALLER_KEY: Tenant(name)}, None, None)  # pyright: ignore[reportArgumentType]
            now_s[0] += 3_600
            hour_later.set()
            for _ in range(20):
                await anyio.sleep(0)
            assert closed_names == []  # The app has running work
            app.is_idle = True
            while len(closed_names) < 2:
                await anyio.sleep(0)
            assert (opened_names, sorted(closed_names)) == (["anna", "bert"], ["anna", "bert"])
            await tenants({"type": "http", CALLER_KEY: Tenant("bert")}, None, None)  # pyright: ignore[reportArgumentType]
            assert opened_names == ["anna", "bert", "bert"]
            group.cancel_scope.cancel()


async def test_the_poller_of_an_evolink_key_is_shared_until_its_last_studio_closes(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, ANNA, BERT) as server:
        async with server.studios.open(Tenant("anna")) as (anna, _), server.studios.open(Tenant("bert")) as (bert, _):
            first = anna.rate_limit
            assert bert.rate_limit is first
        async with server.studios.open(Tenant("anna")) as (anna, _):
            assert anna.rate_limit is not first
