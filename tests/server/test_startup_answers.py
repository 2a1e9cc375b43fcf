"""The recorded first answers equal those of the SDK, byte for byte, in every era. The SDK answers unusual requests."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import World
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mcp.shared.message import SessionMessage
from mcp_types import JSONRPCRequest, JSONRPCResponse, jsonrpc_message_adapter
from odd_messages import CASES, FIRST_MESSAGES, LINES
from pydantic import ValidationError

from evolink_mcp.app.wiring import server_for
from evolink_mcp.server.server import build_server, serve_streams
from evolink_mcp.server.startup_answers import (
    FILES_MAX,
    HANDSHAKES,
    LISTS,
    MODERN,
    Results,
    StartupAnswers,
    load,
    record,
    recording_key,
    save,
)
from evolink_mcp.transports.messages import read_message

pytestmark = pytest.mark.anyio

Session = list[bytes]
VERSION = "io.modelcontextprotocol/protocolVersion"
CLIENT_FIELD = "io.modelcontextprotocol/clientInfo"
CAPABILITIES_FIELD = "io.modelcontextprotocol/clientCapabilities"
KEY = b"the versions of a test"
CLIENT = {"name": "claude-code", "version": "2.1.0", "title": "Claude Code"}
CAPABILITIES = {
    "roots": {"listChanged": True},
    "sampling": {"context": {}, "tools": {}},
    "elicitation": {"form": {}, "url": {}},
    "experimental": {"a": {"b": [1]}},
    "extensions": {"io.modelcontextprotocol/ui": {"mimeTypes": ["text/html;profile=mcp-app"]}},
}
ENVELOPE = {VERSION: MODERN, CAPABILITIES_FIELD: CAPABILITIES, CLIENT_FIELD: CLIENT}
INITIALIZED = {"jsonrpc": "2.0", "method": "notifications/initialized"}


def request(name: Any, method: str, params: Any = None, **options: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": name, "method": method, **({} if params is None else {"params": params}), **options}


def handshake(
    version: Any = "2025-11-25", capabilities: Any = CAPABILITIES, client: Any = CLIENT, **options: Any
) -> Any:
    return request(
        0, "initialize", {"protocolVersion": version, "capabilities": capabilities, "clientInfo": client, **options}
    )


def modern_request(name: Any, method: str, **options: Any) -> dict[str, Any]:
    return request(name, method, {"_meta": {**ENVELOPE, **options}})


def lists(first: int) -> list[dict[str, Any]]:
    return [request(first + number, method) for number, method in enumerate(("ping", *LISTS))]


def lines(*messages: Any) -> Session:
    return [item if isinstance(item, bytes) else json.dumps(item, ensure_ascii=False).encode() for item in messages]


@pytest.fixture
async def results(world: World) -> Results:
    """Return the SDK's results, recorded in this test."""
    return await record(partial(serve_streams, build_server(world.studio)))


def early_answers(session: Session, results: Results) -> dict[Any, bytes]:
    """Return the answers from the recording by request ID."""
    startup_answers = StartupAnswers(results)
    answers = [answer for line in session if (answer := startup_answers.answer(line)) is not None]
    by_id = {json.loads(answer)["id"]: answer for answer in answers}
    assert len(by_id) == len(answers)
    assert set(by_id) == startup_answers.answered
    return by_id


async def sdk_answers(world: World, session: Session) -> dict[Any, bytes]:
    """Return the answers of the SDK by request ID, each as a line."""
    to_server, from_client = anyio.create_memory_object_stream[SessionMessage | Exception](1000)
    to_client, from_server = anyio.create_memory_object_stream[SessionMessage](1000)
    expected: set[Any] = set()
    for line in session:
        with suppress(ValidationError):
            message = jsonrpc_message_adapter.validate_json(line, by_name=False)
            await to_server.send(SessionMessage(message))
            if isinstance(message, JSONRPCRequest):
                expected.add(message.id)
    by_id: dict[Any, bytes] = {}
    async with anyio.create_task_group() as group, from_server:
        group.start_soon(serve_streams, server_for(world.studio, world.settings), from_client, to_client)
        while expected - set(by_id):
            message = (await from_server.receive()).message
            line = message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n"
            by_id.setdefault(getattr(message, "id", None), line)
        to_server.close()
    return by_id


USUAL = {
    **{f"handshake {version}": (lines(handshake(version), INITIALIZED, *lists(1)), 5) for version in HANDSHAKES},
    "a version that nobody knows": (lines(handshake("2099-01-01"), *lists(1)), 5),
    "the modern version in a handshake": (lines(handshake(MODERN), INITIALIZED, *lists(1)), 5),
    "no capabilities": (lines(handshake(capabilities={}, client={"name": "x", "version": "1"}), *lists(1)), 5),
    "ids are words": (lines(handshake(), request("é", "tools/list"), request("", "ping"), request("a\tb\"\\/\x7f", "ping")), 4),
    "a call in the same write": (lines(handshake(), INITIALIZED, request(1, "tools/call", {"name": "x"}), request(2, "ping")), 2),
    "a progress token": (lines(handshake(), request(1, "tools/list", {"_meta": {"progressToken": 7}})), 2),
    "modern": (lines(*(modern_request(n, method) for n, method in enumerate(("server/discover", *LISTS)))), 4),
    "modern without a name": (lines(request(1, "tools/list", {"_meta": {VERSION: MODERN, CAPABILITIES_FIELD: {}}})), 1),
    "probe, then initialize": (lines(modern_request(1, "server/discover"), request(2, "initialize", handshake()["params"])), 1),
    "modern, then without envelope": (
        lines(modern_request(1, "tools/list"), request(2, "tools/list"), modern_request(3, "ping")), 1
    ),
    "handshake, then envelope": (lines(handshake(), modern_request(1, "tools/list"), request(2, "ping")), 2),
}  # fmt: skip
UNUSUAL = {
    "list first": lines(request(1, "tools/list"), handshake(), request(2, "tools/list")),
    "half an envelope": lines(request(1, "tools/list", {"_meta": {VERSION: MODERN}})),
    "another envelope": lines(request(1, "tools/list", {"_meta": {**ENVELOPE, VERSION: "2027-01-01"}})),
    "a cursor": lines(handshake(), request(1, "tools/list", {"cursor": "x"})),
    "a cursor of null": lines(handshake(), request(1, "tools/list", {"cursor": None})),
    "a number for a version": lines(handshake(20251125), request(1, "tools/list")),
    "no client": lines(handshake(client=None), request(1, "tools/list")),
    "a client without version": lines(handshake(client={"name": "x"}), request(1, "tools/list")),
    "capabilities are a list": lines(handshake(capabilities=[]), request(1, "tools/list")),
    "roots are true": lines(handshake(capabilities={"roots": True}), request(1, "tools/list")),
    "params are a list": lines(handshake(), request(1, "tools/list", [])),
    "ids repeat": lines(handshake(), request(0, "tools/list"), request(2, "ping")),
    "twice initialize": lines(handshake(), request(1, "initialize", handshake()["params"])),
    "an id of 1.5": lines(handshake(), request(1.5, "tools/list"), request(2, "ping")),
    "an id of true": lines(handshake(), request(True, "tools/list")),
    "an id of null": lines(handshake(), request(None, "tools/list")),
    "a long id": lines(handshake(), request(10**30, "tools/list")),
    "another protocol": lines({**handshake(), "jsonrpc": "1.0"}),
    "a batch": lines([handshake()], handshake()),
    "no JSON": lines(b"{", handshake()),
    "not a number": lines(handshake(), b'{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{"_meta":{"x":NaN}}}'),
    "a name twice": lines(handshake(), b'{"jsonrpc":"2.0","id":1,"id":2,"method":"ping"}'),
    "a lone surrogate": lines(handshake(), b'{"jsonrpc":"2.0","id":"\\ud800","method":"ping"}'),
    "more members": lines({**handshake(), "more": 1}),
    "discover after a handshake": lines(handshake(), request(1, "server/discover")),
}  # fmt: skip


@pytest.mark.parametrize(("session", "count"), USUAL.values(), ids=USUAL)
async def test_a_usual_session_is_answered_as_the_sdk_answers_it(
    session: Session, count: int, world: World, results: Results
) -> None:
    answers = early_answers(session, results)
    assert len(answers) == count
    expected = await sdk_answers(world, session)
    assert {name: expected[name] for name in answers} == answers


@pytest.mark.parametrize("session", UNUSUAL.values(), ids=UNUSUAL)
async def test_an_unusual_session_is_left_to_the_sdk_or_answered_like_the_sdk(
    session: Session, world: World, results: Results
) -> None:
    answers = early_answers(session, results)
    assert len(answers) < len(session)
    if answers:
        expected = await sdk_answers(world, session)
        assert {name: expected[name] for name in answers} == answers


ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    "",
    "x",
    [],
    [{}],
    {},
    {"a": 1},
    {"a": {}},
    {"listChanged": 1},
    {"a": {"b": None}},
]


def with_odd_value(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """Return the value with an odd value in one place."""
    if not isinstance(value, dict) or not value or rng.random() < 0.15 * depth:
        return rng.choice(ODD)
    key = rng.choice(list(value))
    kind = rng.random()
    if kind < 0.15:
        return {name: item for name, item in value.items() if name != key}
    if kind < 0.3:
        return {**value, rng.choice(["more", "tasks", "roots", "_meta", "cursor", "title", "icons"]): rng.choice(ODD)}
    return {**value, key: with_odd_value(rng, value[key], depth + 1)}


@pytest.mark.parametrize("seed", range(4))
async def test_no_form_of_a_session_is_answered_otherwise_than_by_the_sdk(
    seed: int, world: World, results: Results
) -> None:
    rng = random.Random(seed)
    answer_count = 0
    for _ in range(60):
        first, second = (
            handshake(rng.choice(HANDSHAKES)),
            request(1, rng.choice(LISTS), {"_meta": {"progressToken": "t"}}),
        )
        if rng.random() < 0.5:
            first, second = (
                modern_request(0, rng.choice(["server/discover", *LISTS])),
                modern_request(1, rng.choice(LISTS)),
            )
        if rng.random() < 0.7:
            first = {**first, "params": with_odd_value(rng, first["params"])}
        else:
            second = {**second, "params": with_odd_value(rng, second["params"])}
        session = lines(first, second)
        answers = early_answers(session, results)
        answer_count += len(answers)
        if answers:
            expected = await sdk_answers(world, session)
            assert {name: expected[name] for name in answers} == answers, session
    assert answer_count > 10


async def test_a_recording_covers_every_request_of_every_era(results: Results) -> None:
    handshakes = {(method, version) for method in ("initialize", "ping", *LISTS) for version in HANDSHAKES}
    modern_keys = {(method, MODERN) for method in ("server/discover", *LISTS)}
    assert set(results) == {*handshakes, ("initialize", "*"), *modern_keys}


async def test_answers_of_another_form_are_not_recorded(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    """A recorded result is a part of the line of the SDK, so the line must have the usual order."""
    monkeypatch.setattr(JSONRPCResponse, "model_dump_json", lambda *_, **__: '{"result":{},"jsonrpc":"2.0","id":0}')
    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="another order"), flatten_subgroups=True):
        await record(partial(serve_streams, build_server(world.studio)))


async def test_a_saved_recording_is_loaded_unchanged_and_only_with_its_key(tmp_path: Path, results: Results) -> None:
    save(tmp_path / "cache", KEY, results)
    assert load(tmp_path / "cache", KEY) == results
    assert load(tmp_path / "cache", b"another version") is None
    assert load(tmp_path / "none", KEY) is None


def test_the_key_depends_on_the_published_tools() -> None:
    keys = [recording_key(""), recording_key("get_task"), recording_key("get_task, compute_size")]
    assert len(set(keys)) == 3
    assert recording_key("\udcff \ud800") not in keys  # bytes of the environment that are not UTF-8
    assert all(b"\n" not in key and b"pydantic" in key for key in keys)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:-1], id="one byte short"),
        pytest.param(lambda content: content.replace(b"generate_image", b"generate_imagf", 1), id="one letter changed"),
        pytest.param(lambda content: b"\n".join([b"0" * 8, *content.split(b"\n")[1:]]), id="wrong checksum"),
        pytest.param(lambda content: content + bytes(1 << 20), id="too large"),
    ],
)
def test_a_damaged_recording_is_ignored(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    save(tmp_path, KEY, {("ping", MODERN): b'{"tools":["generate_image"]}'})
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert load(tmp_path, KEY) is None


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_recording_that_another_user_could_change_is_ignored(tmp_path: Path) -> None:
    save(tmp_path, KEY, {("ping", MODERN): b"{}"})
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o666)
    assert load(tmp_path, KEY) is None
    file.chmod(0o600)
    assert load(tmp_path, KEY) is not None
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert load(tmp_path, KEY) is None


def test_old_recordings_are_deleted(tmp_path: Path) -> None:
    for number in range(FILES_MAX + 3):
        save(tmp_path, b"version %d" % number, {("ping", MODERN): b"{}"})
    assert len(list(tmp_path.iterdir())) == FILES_MAX
    assert load(tmp_path, b"version %d" % (FILES_MAX + 2)) is not None


async def test_without_a_recording_the_sdk_answers() -> None:
    assert early_answers(lines(handshake(), *lists(1)), {}) == {}
    assert StartupAnswers(None).answer(lines(handshake())[0]) is None


async def test_notifications_and_other_calls_do_not_end_the_early_answers(results: Results) -> None:
    cancel = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}}
    session = lines(
        INITIALIZED,
        handshake(),
        cancel,
        request(1, "resources/list"),
        request(2, "tools/call", {"name": 1}),
        request(3, "ping"),
    )
    assert set(early_answers(session, results)) == {0, 3}


FUZZ = settings(
    max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
DEEP: Any = {}
for _ in range(250):
    DEEP = {"a": DEEP}


def check_early_answers(session: Session, results: Results) -> None:
    """Check that each early answer belongs to a line that the transport reads as a request with the same ID."""
    startup_answers = StartupAnswers(results)
    for line in session:
        answer = startup_answers.answer(line)
        if answer is not None:
            message = read_message(line, keep_surrogates=True)
            assert isinstance(message, JSONRPCRequest)
            assert json.loads(answer)["id"] == message.id


@pytest.mark.parametrize("era", FIRST_MESSAGES)
async def test_no_odd_line_makes_the_early_answers_fail(era: str, results: Results) -> None:
    for case in CASES.values():
        check_early_answers([case.line], results)
        check_early_answers([*lines(FIRST_MESSAGES[era]), case.line], results)


@pytest.mark.parametrize("era", FIRST_MESSAGES)
async def test_no_generated_line_makes_the_early_answers_fail(era: str, results: Results) -> None:
    @FUZZ
    @example(session=lines(handshake(capabilities={"experimental": {"a": DEEP}})))
    @given(
        st.lists(LINES, max_size=5)
        | st.lists(LINES, max_size=5).map(lambda session: [*lines(FIRST_MESSAGES[era]), *session])
    )
    def check(session: Session) -> None:
        check_early_answers(session, results)

    check()
