"""Fuzz tests of the parsers of external data: each parses its input or raises its documented error."""

from __future__ import annotations

import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from conftest import Clock
from drawings import drawing
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from mcp.client import Client
from pydantic import ValidationError
from shared import shared_decoder

from evolink_mcp.api.http import moment_of, retry_after_s
from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.api.size_grammar import advice, legal_value
from evolink_mcp.api.sizes import IllegalSize, resolve
from evolink_mcp.api.task import Task, read_balance, read_task, read_tasks
from evolink_mcp.api.urls import check_public_url, host_of
from evolink_mcp.app.settings import BadSetting
from evolink_mcp.app.wiring import open_studio
from evolink_mcp.errors import Unreadable
from evolink_mcp.images.inspect import sniff
from evolink_mcp.images.prepare import check_reference, normalize
from evolink_mcp.images.unusable import UnusableImage
from evolink_mcp.journal.rows import entry_of
from evolink_mcp.sanitize import THE_KEY, harmless, quoted, without, word
from evolink_mcp.server.server import build_server
from evolink_mcp.teams.settings import TeamSettings
from evolink_mcp.teams.tokens import BadTokens, Tokens
from evolink_mcp.transports.authentication import AuthFailure
from evolink_mcp.transports.authority import authority_in, origin_in
from evolink_mcp.transports.json_rpc import request_id_in, request_id_in_part
from evolink_mcp.transports.messages import InvalidMessage, read_message

FUZZ = settings(
    max_examples=150, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40)
JSON = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
)
NAMES = st.sampled_from(
    "id status progress created created_at results result_data error task_info usage billing data model code message".split()
)
ODD = SCALAR | st.lists(SCALAR, max_size=3) | st.dictionaries(NAMES, SCALAR, max_size=4)
TASKLIKE = st.dictionaries(NAMES, ODD | JSON, max_size=10)
TASK_ID = "task-unified-1757156493-imcg5zqt"
KIND = st.sampled_from(["PNG", "JPEG", "WEBP"])


# --- answers of EvoLink ---


@FUZZ
@given(TASKLIKE | JSON)
def test_a_task_is_read_or_unreadable(data: Any) -> None:
    with suppress(Unreadable):
        task = read_task(data)
        assert task.progress is None or 0 <= task.progress <= 100
        assert " " not in task.status
    with suppress(Unreadable):
        assert all(isinstance(task, Task) for task in read_tasks(data))
    with suppress(Unreadable):
        read_balance(data)


@FUZZ
@given(st.text(max_size=80) | st.sampled_from(["-1", "inf", "1e9", "nan", "Wed, 21 Oct 2015 07:28:00 GMT"]))
def test_a_wait_is_within_its_limits(text: str) -> None:
    with suppress(ValueError, UnicodeError):
        wait = retry_after_s(httpx.Headers({"retry-after": text}))
        assert wait is None or 0 <= wait <= 120
    moment_of(text)


@FUZZ
@given(st.text(max_size=60), st.text(max_size=60))
def test_external_text_contains_neither_the_key_nor_a_line_break(before: str, after: str) -> None:
    key = "sk-canary-aXq81ZbT3kLw90vM"
    text = f"{before}{key}{after}"
    assert key not in json.dumps(without(key, {text: [text]}), ensure_ascii=False)
    assert THE_KEY in without(key, text)
    assert "\n" not in harmless(text)
    assert "”" not in quoted(text)[1:-1]
    assert not any(char.isspace() for char in word(text, 60))


# --- input of callers ---


@FUZZ
@given(st.dictionaries(st.sampled_from(list(GenerationRequest.model_fields)), JSON, max_size=8))
def test_arguments_are_accepted_or_refused(arguments: dict[str, Any]) -> None:
    with suppress(ValidationError):
        json.dumps(GenerationRequest.model_validate(arguments).body(), allow_nan=False)


@FUZZ
@given(st.text(max_size=30) | st.from_regex(r"[0-9]{1,5}[x×:.,][0-9]{1,5}", fullmatch=True))
def test_a_size_is_legal_or_illegal(size: str) -> None:
    with suppress(IllegalSize):
        resolve(size, "1K", "anchor-edge")
    legal_value(size)
    advice(size)


@FUZZ
@given(st.text(max_size=60) | st.from_regex(r"https?://[a-z0-9.\[\]:@%-]{1,40}(/.*)?"))
def test_a_url_is_public_or_refused(url: str) -> None:
    with suppress(ValueError):
        assert host_of(check_public_url(url))


@FUZZ
@given(st.binary(max_size=300))
def test_bytes_of_a_client_are_parsed_or_refused(data: bytes) -> None:
    with suppress(InvalidMessage):
        read_message(data)
    with suppress(InvalidMessage):
        read_message(data, keep_surrogates=True)
    request_id_in(data)
    request_id_in_part(data)
    authority_in(data)
    origin_in(data)


@FUZZ
@given(
    st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: f"[[token]]\nname = {text!r}".encode("utf-8", "replace"))
)
def test_a_tokens_file_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokens.toml").write_bytes(data)
    with suppress(BadTokens):
        assert isinstance(Tokens(tmp_path / "tokens.toml").authenticate(data[:60]), AuthFailure)


@FUZZ
@given(st.dictionaries(st.sampled_from([
    "EVOLINK_BASE_URL", "EVOLINK_SIZE_RULE", "EVOLINK_MCP_WAIT_SECONDS", "EVOLINK_MCP_PREVIEW", "EVOLINK_MCP_TOOLS",
    "EVOLINK_MCP_MAX_CREDITS_PER_DAY", "EVOLINK_MCP_CALLBACK_HOSTS", "EVOLINK_MCP_ALLOWED_DIRS", "EVOLINK_API_KEY",
]), st.text(max_size=40), max_size=5))  # fmt: skip
def test_settings_are_read_or_refused(environ: dict[str, str]) -> None:
    with suppress(BadSetting):
        TeamSettings.from_environment(environ)


# --- files ---


@FUZZ
@given(
    st.dictionaries(st.sampled_from("key phase task request pictures error owner created_at".split()), JSON, max_size=8)
)
def test_a_row_of_the_journal_is_an_entry_or_damaged(row: dict[str, Any]) -> None:
    with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        entry_of(row)


@FUZZ
@given(KIND, st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6), st.integers(0, 400))
def test_a_damaged_image_is_refused_or_sent_as_an_image(
    kind: str, changes: list[tuple[int, int]], cut_length: int
) -> None:
    data = bytearray(drawing((40, 30), kind))
    for position, byte in changes:
        data[position % len(data)] = byte
    if cut_length:
        del data[-cut_length:]
    with suppress(UnusableImage):
        check_reference(bytes(data), is_mask=True)
        normalized = normalize(bytes(data))
        assert sniff(normalized[:16]) == sniff(bytes(data)[:16])
        assert normalize(normalized) == normalized


@FUZZ
@given(st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x40\0\0\0WEBP"]), st.binary(max_size=300))
def test_random_bytes_after_a_signature_are_refused(magic: bytes, rest: bytes) -> None:
    with suppress(UnusableImage):
        check_reference(magic + rest, is_mask=False)
        normalize(magic + rest)
    assert sniff(io.BytesIO(magic + rest).read(16))


# --- answers of EvoLink through the tools ---


@settings(FUZZ, max_examples=40)
@example(status=200, first={"id": 0}, later=[{"id": None}])
@given(
    st.sampled_from([200, 201, 400, 401, 404, 429, 500, 503]),
    TASKLIKE | JSON,
    st.lists(TASKLIKE.map(lambda task: {"id": TASK_ID, **task}) | JSON, min_size=1, max_size=4),
)
@pytest.mark.parametrize("tool", ["generate_image", "get_task", "get_balance", "list_tasks"])
def test_no_answer_of_evolink_breaks_a_tool(
    tmp_path: Path, tool: str, status: int, first: Any, later: list[Any]
) -> None:
    """The answer fits the schema, and the tool sends at most one POST."""
    posts = 0
    polls = 0

    def failed_tasks(path: str, request_body: bytes) -> Any:
        """Return each polled task as failed."""
        ids = json.loads(request_body)["task_ids"] if request_body else [path.rpartition("/")[2]]
        tasks = [{"id": task_id, "status": "failed", "error": {"message": "enough"}} for task_id in ids]
        return {"data": tasks} if request_body else tasks[0]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal posts, polls
        request_body = (await receive()).get("body", b"")
        if scope["method"] == "POST" and scope["path"].endswith("generations"):
            posts += 1
            answer, code = first, status
        else:
            answer, code = later[min(polls, len(later) - 1)], 200
            polls += 1
            if polls > 60:
                answer = failed_tasks(scope["path"], request_body)
        body = json.dumps(answer).encode("utf-8", "replace")
        await send({"type": "http.response.start", "status": code, "headers": []})
        await send({"type": "http.response.body", "body": body})

    arguments: dict[str, Any] = {
        "generate_image": {"prompt": "a fox", "wait_seconds": 900, "force_new": True},
        "get_task": {"task_id": TASK_ID, "wait_seconds": 900},
        "list_tasks": {"sync": True},
    }.get(tool, {})

    async def ask() -> Any:
        clock = Clock()
        environ = {
            "EVOLINK_API_KEY": "sk-test-key",
            "EVOLINK_BASE_URL": "http://127.0.0.1:9",
            "EVOLINK_MCP_DATA_DIR": str(tmp_path / "data"),
            "EVOLINK_MCP_OUTPUT_DIR": str(tmp_path / "pictures"),
        }
        transport = httpx.ASGITransport(app)
        with anyio.fail_after(300):
            async with (
                open_studio(
                    TeamSettings.from_environment(environ),
                    decoder=shared_decoder(),
                    transport=transport,
                    clock=clock,
                    sleep=clock.sleep,
                    pause=clock.sleep,
                ) as studio,
                Client(build_server(studio)) as client,
            ):
                (schema,) = [
                    published.output_schema for published in (await client.list_tools()).tools if published.name == tool
                ]
                return schema, await client.call_tool(tool, arguments)

    schema, answer = anyio.run(ask)
    assert answer.content[0].text
    Draft202012Validator(schema).validate(answer.structured_content)
    assert posts <= (3 if status == 429 else 1)
