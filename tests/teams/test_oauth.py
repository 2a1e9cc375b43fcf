"""OAuth: accepted JWTs, the metadata of the server, rotation of keys, and EvoLink keys of callers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2 as httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from login import ISSUER, RESOURCE, Login
from mcp.client.auth.utils import extract_resource_metadata_from_www_auth, extract_scope_from_www_auth
from mcp.shared.auth import ProtectedResourceMetadata
from team_server import ANNA, INITIALIZE, REQUEST, open_team_server

from evolink_mcp.teams.oauth import METADATA_PATH, Issuer
from evolink_mcp.teams.tokens import Tenant
from evolink_mcp.transports.authentication import AuthFailure

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]


@pytest.fixture(scope="module")
def login() -> Login:
    return Login()


async def test_a_valid_jwt_is_a_tenant_named_after_subject_and_issuer(login: Login) -> None:
    auth_result = await login.issuer().tenant_of(login.token())
    assert isinstance(auth_result, Tenant)
    assert auth_result.name == f"anna at {ISSUER}"
    assert auth_result.shares_account


@pytest.mark.parametrize("algorithm", ["RS256", "RS512", "PS256"])
async def test_a_key_without_an_algorithm_may_use_each_algorithm_of_its_type(login: Login, algorithm: str) -> None:
    assert isinstance(await login.issuer().tenant_of(login.token(algorithm=algorithm)), Tenant)


async def test_a_key_with_an_algorithm_may_use_only_this_one() -> None:
    login = Login()
    login.algorithms["one"] = "RS512"
    issuer = login.issuer()
    assert isinstance(await issuer.tenant_of(login.token(algorithm="RS512")), Tenant)
    assert isinstance(await issuer.tenant_of(login.token(algorithm="RS256")), AuthFailure)


OTHER_PRIVATE_KEY = rsa.generate_private_key(65537, 2048)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"exp": 1}, id="expired"),
        pytest.param({"exp": None}, id="without an expiry"),
        pytest.param({"aud": "https://elsewhere.example.org/mcp"}, id="for another server"),
        pytest.param({"aud": None}, id="without an audience"),
        pytest.param({"iss": "https://evil.dev"}, id="of another issuer"),
        pytest.param({"sub": None}, id="without a subject"),
        pytest.param({"sub": ""}, id="with an empty subject"),
        pytest.param({"sub": "x" * 300}, id="with a subject that is too long"),
        pytest.param({"nbf": 4_000_000_000}, id="not yet valid"),
        pytest.param({"key": OTHER_PRIVATE_KEY}, id="signed by another key"),
        pytest.param({"algorithm": "HS256", "key": "x" * 64}, id="signed by a shared secret"),
        pytest.param({"algorithm": "none", "key": ""}, id="not signed"),
    ],
)
async def test_an_invalid_jwt_is_refused(login: Login, changes: dict[str, Any]) -> None:
    if changes.get("algorithm") == "none":
        claims = login.token().split(b".")
        token = jwt.utils.base64url_encode(b'{"alg":"none","kid":"one"}') + b"." + claims[1] + b"."
    else:
        token = login.token(**changes)
    refusal = await login.issuer().tenant_of(token)
    assert isinstance(refusal, AuthFailure)
    assert (refusal.status, 'error="invalid_token"' in dict(refusal.headers)[b"www-authenticate"].decode()) == (
        401,
        True,
    )


@pytest.mark.parametrize("token", [b"", b"..", b"a.b.c", b"\xff.\xff.\xff", b"e30.e30.e30", b"." * 5_000])
async def test_a_malformed_jwt_is_refused(login: Login, token: bytes) -> None:
    refusal = await login.issuer().tenant_of(token)
    assert isinstance(refusal, AuthFailure)
    assert refusal.status == 401


@pytest.mark.parametrize(
    ("claims", "status"),
    [
        pytest.param({"scope": "pictures:buy openid"}, None, id="as text"),
        pytest.param({"scp": ["pictures:buy"]}, None, id="as a list"),
        pytest.param({"scope": "pictures:buyer"}, 403, id="another scope"),
        pytest.param({}, 403, id="no scope"),
    ],
)
async def test_a_jwt_without_a_required_scope_gets_403_with_its_name(
    login: Login, claims: dict[str, Any], status: int | None
) -> None:
    auth_result = await login.issuer(("pictures:buy",)).tenant_of(login.token(**claims))
    assert (auth_result.status if isinstance(auth_result, AuthFailure) else None) == status
    if isinstance(auth_result, AuthFailure):
        challenge = dict(auth_result.headers)[b"www-authenticate"].decode()
        assert 'error="insufficient_scope"' in challenge
        assert 'scope="pictures:buy"' in challenge
        assert 'resource_metadata="https://pictures.example.org/.well-known/oauth-protected-resource/mcp"' in challenge


async def test_a_new_key_is_read_at_once_and_unknown_keys_cause_few_reads() -> None:
    login = Login()
    issuer = login.issuer()
    assert isinstance(await issuer.tenant_of(login.token()), Tenant)
    assert isinstance(await issuer.tenant_of(login.token()), Tenant)
    assert login.reads == ["metadata", "keys"]
    login.keys["two"] = ec.generate_private_key(ec.SECP256R1())
    login.now += 60
    assert isinstance(await issuer.tenant_of(login.token("two", "ES256")), Tenant)
    for _ in range(3):
        refusal = await issuer.tenant_of(login.token("three", key=OTHER_PRIVATE_KEY))
        assert isinstance(refusal, AuthFailure)
        assert refusal.status == 401
    assert login.reads == ["metadata", "keys"] * 2
    former_key = login.keys.pop("one")
    login.now += 3601
    await issuer.refresh()
    assert isinstance(await issuer.tenant_of(login.token("two", "ES256")), Tenant)
    assert isinstance(await issuer.tenant_of(login.token("one", key=former_key)), AuthFailure)


async def test_the_keys_of_an_unreachable_issuer_stay_valid_for_a_day(caplog: pytest.LogCaptureFixture) -> None:
    login = Login()
    issuer = login.issuer()
    token = login.token()
    assert isinstance(await issuer.tenant_of(token), Tenant)
    login.is_down = True
    login.now += 5 * 3600
    await issuer.refresh()
    assert isinstance(await issuer.tenant_of(token), Tenant)
    assert ["cannot be used: it answers HTTP 503" in text for text in caplog.messages] == [True]
    login.now += 20 * 3600
    refusal = await issuer.tenant_of(token)
    assert isinstance(refusal, AuthFailure)
    assert (refusal.status, b"retry-after" in dict(refusal.headers)) == (503, True)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        pytest.param({"issuer": "https://evil.dev"}, "another issuer", id="another issuer"),
        pytest.param({"jwks_uri": "http://evil.dev/keys"}, "no https address", id="keys over http"),
        pytest.param({"jwks_uri": None}, "no https address", id="no key address"),
        pytest.param({"jwks_uri": f"{ISSUER}/nowhere"}, "HTTP 404", id="missing keys"),
    ],
)
async def test_an_unusable_issuer_is_logged_in_one_line(
    caplog: pytest.LogCaptureFixture, metadata: dict[str, Any], words: str
) -> None:
    login = Login(**metadata)
    refusal = await login.issuer().tenant_of(login.token())
    assert isinstance(refusal, AuthFailure)
    assert refusal.status == 503
    assert [words in text for text in caplog.messages] == [True]


async def test_an_expired_certificate_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired")

    issuer = Issuer(ISSUER, RESOURCE, (), RESOURCE, transport=httpx.MockTransport(fail))
    refusal = await issuer.tenant_of(Login().token())
    assert isinstance(refusal, AuthFailure)
    assert refusal.status == 503
    assert ["certificate has expired" in text for text in caplog.messages] == [True]


# --- over HTTP ---

PUBLIC = {"EVOLINK_MCP_PUBLIC_URL": "https://pictures.example.org", "EVOLINK_MCP_SECRET": "s" * 32}
WITH_CALLBACK = {**REQUEST, "callback_url": "https://hooks.shop.dev/x"}


async def test_jwts_and_tokens_work_together_and_their_tenants_are_isolated(tmp_path: Path, login: Login) -> None:
    async with open_team_server(tmp_path, ANNA, issuer=login.issuer(), **PUBLIC) as server:
        jwt_of_anna, jwt_of_bert = (login.token(sub=name).decode() for name in ("anna", "bert"))
        purchase = (await server.call(jwt_of_anna, "generate_image", **WITH_CALLBACK)).structured_content
        task = {"task_id": purchase["task_id"]}
        assert purchase["status"] == "completed"
        assert (await server.call(jwt_of_anna, "get_task", **task)).structured_content["status"] == "completed"
        for other_token in (jwt_of_bert, "a"):  # the token of the tenant anna is not the person anna of the issuer
            assert (await server.call(other_token, "get_task", **task)).is_error
            assert (await server.call(other_token, "list_tasks")).structured_content["tasks"] == []


@pytest.mark.parametrize("token", [None, "evt_wrong", "a.b.c"])
async def test_a_client_without_a_valid_token_gets_the_address_of_the_metadata(
    tmp_path: Path, login: Login, token: str | None
) -> None:
    async with (
        open_team_server(tmp_path, ANNA, issuer=login.issuer(("buy",)), **PUBLIC) as server,
        server.http(token) as http,
    ):
        refusal = await http.post("/mcp", json=INITIALIZE)
        challenge = refusal.headers["www-authenticate"]
        assert refusal.status_code == 401
        assert 'resource_metadata="https://pictures.example.org/.well-known/oauth-protected-resource/mcp"' in challenge
        for path in ("/.well-known/oauth-protected-resource", "/.well-known/oauth-protected-resource/mcp"):
            metadata = (await http.get(path)).json()
            assert (metadata["resource"], metadata["authorization_servers"]) == (RESOURCE, [ISSUER])
            assert metadata["scopes_supported"] == ["buy"]
        # The official client reads the same out of it.
        response = httpx.Response(401, headers=refusal.headers, request=refusal.request)
        assert extract_resource_metadata_from_www_auth(response) == f"{RESOURCE[:-4]}{METADATA_PATH}/mcp"
        assert extract_scope_from_www_auth(response) == "buy"
        assert str(ProtectedResourceMetadata.model_validate(metadata).resource) == RESOURCE


# --- EvoLink keys of callers ---


async def test_a_caller_may_send_a_separate_evolink_key(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, ANNA, EVOLINK_MCP_CALLER_KEYS="1") as server:
        async with server.client("a", x_evolink_key="sk-her-own-key") as client:
            own_task = (await client.call_tool("generate_image", REQUEST)).structured_content
        foreign_view = await server.call("a", "get_task", task_id=own_task["task_id"])
        task_list = await server.call("a", "list_tasks")
        keys = [r.headers["authorization"] for r in server.simulator.requests if r.path == "/v1/images/generations"]
        async with server.http("a", x_evolink_key="no key") as http:
            refusal_of_key = await http.post("/mcp", json=INITIALIZE)
    assert keys == ["Bearer sk-her-own-key"]
    # The history belongs to the tenant. The other key can read it and cannot poll it.
    assert foreign_view.structured_content["task_id"] == own_task["task_id"]
    assert [task["task_id"] for task in task_list.structured_content["tasks"]] == [own_task["task_id"]]
    assert refusal_of_key.status_code == 400
    assert "sk-her-own-key" not in json.dumps(own_task)


async def test_a_caller_key_equal_to_the_servers_key_opens_no_second_studio(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, ANNA, EVOLINK_MCP_CALLER_KEYS="1") as server:
        async with server.client("a", x_evolink_key="sk-test-key") as client:
            own_task = (await client.call_tool("generate_image", REQUEST)).structured_content
        same_task = await server.call("a", "get_task", task_id=own_task["task_id"])
        assert (same_task.structured_content["status"], len(list(server.studios))) == ("completed", 1)


async def test_a_caller_key_is_refused_without_the_setting_and_nothing_is_charged(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, ANNA) as server, server.http("a", x_evolink_key="sk-her-own-key") as http:
        refusal = await http.post("/mcp", json=INITIALIZE)
        assert (refusal.status_code, "sk-her" in refusal.text) == (403, False)
        assert server.simulator.requests == []


async def test_one_caller_may_use_at_most_16_keys(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, ANNA, EVOLINK_MCP_CALLER_KEYS="1") as server:
        statuses: list[int] = []
        for number in range(18):
            async with server.http("a", x_evolink_key=f"sk-key-{number:04}") as http:
                statuses.append((await http.get("/uploads")).status_code)
    assert statuses == [405] * 16 + [429] * 2
