"""Limits for callers with a JWT: a slow issuer, unknown keys, many people."""

from __future__ import annotations

import anyio
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from login import Login

from evolink_mcp.teams.oauth import READ_TIMEOUT_S, WAITING_MAX, Issuer
from evolink_mcp.teams.tokens import Tenant
from evolink_mcp.transports.authentication import AuthFailure

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
OTHER_PRIVATE_KEY = rsa.generate_private_key(65537, 2048)


async def _status(issuer: Issuer, token: bytes, statuses: list[int]) -> None:
    auth_result = await issuer.tenant_of(token)
    statuses.append(auth_result.status if isinstance(auth_result, AuthFailure) else 200)


async def _until_read(login: Login, count: int) -> None:
    while login.reads.count("metadata") < count:
        await anyio.sleep(0)


async def test_a_caller_with_a_known_key_never_waits_for_the_issuer() -> None:
    login = Login()
    issuer = login.issuer()
    assert isinstance(await issuer.tenant_of(login.token()), Tenant)
    login.can_answer = anyio.Event()
    login.now += 2 * 3600  # the keys are old, and the issuer does not answer
    statuses: list[int] = []
    async with anyio.create_task_group() as group:
        group.start_soon(_status, issuer, login.token("random", key=OTHER_PRIVATE_KEY), statuses)
        await _until_read(login, 2)
        assert isinstance(await issuer.tenant_of(login.token()), Tenant)
        assert statuses == []
        login.can_answer.set()
    assert statuses == [401]


async def test_callers_with_unknown_keys_share_one_read_of_the_issuer_and_their_number_is_limited() -> None:
    login = Login()
    issuer = login.issuer(waiting_max=3)
    assert isinstance(await issuer.tenant_of(login.token()), Tenant)
    login.can_answer = anyio.Event()
    login.now += 60
    statuses: list[int] = []
    async with anyio.create_task_group() as group:
        for number in range(5):
            group.start_soon(_status, issuer, login.token(f"random-{number}", key=OTHER_PRIVATE_KEY), statuses)
        await _until_read(login, 2)
        assert statuses == [503, 503]
        login.can_answer.set()
    assert statuses == [503, 503, 401, 401, 401]
    assert login.reads == ["metadata", "keys"] * 2


async def test_the_server_reads_the_keys_before_its_first_caller() -> None:
    login = Login()
    issuer = login.issuer()
    async with anyio.create_task_group() as group:
        group.start_soon(issuer.refresh_loop)
        while len(login.reads) < 2:
            await anyio.sleep(0)
        assert isinstance(await issuer.tenant_of(login.token()), Tenant)
        assert login.reads == ["metadata", "keys"]
        group.cancel_scope.cancel()


TRIALS = {
    "Callers that wait for the keys of the issuer": (
        test_callers_with_unknown_keys_share_one_read_of_the_issuer_and_their_number_is_limited
    ),
}
LIMIT_TEXTS = {"Callers that wait for the keys of the issuer": f"{WAITING_MAX} callers, {READ_TIMEOUT_S:g} s"}
