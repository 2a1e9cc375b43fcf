"""The threads that read stdin and write stdout: no line, no failure and no end leaves the server silent."""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from child_processes import ANSWER_TIMEOUT_S
from stdio_ends import Pipes

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
PING = b'{"jsonrpc":"2.0","id":9,"method":"ping"}'
END = None


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    client_pipes = Pipes()
    yield client_pipes
    client_pipes.close()


def test_a_line_that_cannot_be_handled_is_answered_with_its_id_and_the_next_one_is_handled(
    pipes: Pipes, caplog: pytest.LogCaptureFixture
) -> None:
    def handle(line: bytes | None) -> None:
        if line is not None and b"odd" in line:
            raise TypeError("unhashable type: 'list'")
        pipes.handle(line)

    pipes.open().handle_lines(handle)
    pipes.send(b'{"jsonrpc":"2.0","id":"a","method":"odd"}', b'{"method":"odd"}', PING)
    errors = [pipes.receive(), pipes.receive()]
    assert pipes.next_handled() == PING
    assert [(error["id"], error["error"]["code"]) for error in errors] == [("a", -32600), (None, -32600)]
    assert [record.exc_info for record in caplog.records] == [None, None]
    assert "TypeError" in caplog.text


def test_an_early_line_that_cannot_be_handled_is_answered_and_the_next_one_is_handled(pipes: Pipes) -> None:
    arrived_lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def handle(line: bytes | None) -> None:
        if line == PING:
            raise RuntimeError("odd")
        pipes.handle(line)

    transport = pipes.open(arrived_lines.put)
    pipes.send(PING, b"second")
    assert [arrived_lines.get(timeout=ANSWER_TIMEOUT_S), arrived_lines.get(timeout=ANSWER_TIMEOUT_S)] == [
        PING,
        b"second",
    ]
    transport.handle_lines(handle)
    assert (pipes.receive()["id"], pipes.next_handled()) == (9, b"second")


def test_early_answers_that_fail_leave_every_line_to_the_server(pipes: Pipes, caplog: pytest.LogCaptureFixture) -> None:
    early_lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def answer_early(line: bytes) -> bytes | None:
        early_lines.put(line)
        if b"odd" in line:
            raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")
        return b'{"id":"early"}\n'

    lines = [b'{"id":1}', b'{"id":"odd"}', b'{"id":3}']
    transport = pipes.open(answer_early)
    pipes.send(*lines)
    assert pipes.receive() == {"id": "early"}
    pipes.close_stdin()
    handled_lines: list[bytes | None] = []
    transport.handle_lines(pipes.handle)
    while not handled_lines or handled_lines[-1] is not None:
        handled_lines.append(pipes.next_handled())
    transport.flush()
    assert handled_lines == [*lines, END]
    assert pipes.read_rest() == []
    assert early_lines.qsize() == 2
    assert [record.exc_info for record in caplog.records] == [None]
    assert pipes.exit_codes.empty()


def test_an_end_of_input_before_any_question_ends_the_process(pipes: Pipes) -> None:
    pipes.open()
    pipes.send(b'{"jsonrpc":"2.0","method":"notifications/initialized"}')
    pipes.close_stdin()
    assert pipes.exit_code() == 0


@pytest.mark.parametrize("question", [PING, b'{"\\u0069d":1,"method":"ping"}', b"garbage", b"[]"])
def test_an_end_of_input_after_a_question_waits_for_the_server(pipes: Pipes, question: bytes) -> None:
    before = set(threading.enumerate())
    transport = pipes.open()
    (reader,) = [thread for thread in set(threading.enumerate()) - before if thread.name == "stdin"]
    pipes.send(question)
    pipes.close_stdin()
    reader.join(ANSWER_TIMEOUT_S)
    assert pipes.exit_codes.empty()
    transport.handle_lines(pipes.handle)
    assert [pipes.next_handled(), pipes.next_handled()] == [question, END]


def test_an_end_of_input_ends_the_process_only_after_the_settings_are_valid(pipes: Pipes) -> None:
    transport = pipes.open(can_leave=False)
    pipes.close_stdin()
    transport.handle_lines(pipes.handle)
    assert (pipes.next_handled(), pipes.exit_codes.empty()) == (END, True)


def test_an_end_of_input_before_the_settings_are_valid_is_remembered(pipes: Pipes) -> None:
    transport = pipes.open(can_leave=False)
    pipes.close_stdin()
    transport.allow_leave()
    assert pipes.exit_code() == 0


def test_an_end_of_input_after_the_settings_are_valid_ends_the_process(pipes: Pipes) -> None:
    arrived_lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    transport = pipes.open(arrived_lines.put, can_leave=False)
    pipes.send(b'{"jsonrpc":"2.0","method":"notifications/initialized"}')
    arrived_lines.get(timeout=ANSWER_TIMEOUT_S)
    transport.allow_leave()
    assert pipes.exit_codes.empty()
    pipes.close_stdin()
    assert pipes.exit_code() == 0


def test_an_end_that_cannot_be_handled_ends_the_process_at_once(pipes: Pipes) -> None:
    def handle(line: bytes | None) -> None:
        raise RuntimeError("can't start new thread")

    pipes.open().handle_lines(handle)
    pipes.close_stdin()
    assert pipes.exit_code() == 1


@pytest.mark.parametrize("descriptor", ["no descriptor", -1])
def test_a_reader_that_fails_is_an_end_of_input(
    pipes: Pipes, caplog: pytest.LogCaptureFixture, descriptor: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    transport = pipes.open(reads_from=descriptor)
    assert pipes.exit_code() == 0
    transport.handle_lines(pipes.handle)
    assert pipes.next_handled() is END
    assert "reading stdin failed" in caplog.text


def test_a_writer_that_fails_is_an_end_of_input(pipes: Pipes, caplog: pytest.LogCaptureFixture) -> None:
    transport = pipes.open()
    transport.handle_lines(pipes.handle)
    not_bytes: Any = "text"
    transport.write(not_bytes)
    assert pipes.next_handled() is END
    assert "writing stdout failed" in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="closes a pipe as POSIX does")
def test_a_client_that_stops_reading_is_an_end_of_input(pipes: Pipes, caplog: pytest.LogCaptureFixture) -> None:
    transport = pipes.open()
    transport.handle_lines(pipes.handle)
    pipes.stop_reading()
    transport.write(b"{}\n")
    assert pipes.next_handled() is END
    assert caplog.records == []


def test_an_answer_that_cannot_be_recorded_does_not_stop_the_later_ones(
    pipes: Pipes, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise KeyError("an odd delivery")

    transport = pipes.open()
    transport.write(b'{"id":1}\n', fail)
    transport.write(b'{"id":2}\n')
    assert [pipes.receive(), pipes.receive()] == [{"id": 1}, {"id": 2}]
    assert "KeyError" in caplog.text


def test_the_last_line_needs_no_line_feed(pipes: Pipes) -> None:
    pipes.open().handle_lines(pipes.handle)
    pipes.write(b"\r\n \n" + PING)
    pipes.close_stdin()
    assert [pipes.next_handled(), pipes.next_handled()] == [PING, END]


@pytest.mark.parametrize("is_last", [True, False])
def test_a_line_that_is_too_long_gets_an_answer_and_the_other_ones_too(pipes: Pipes, is_last: bool) -> None:
    pipes.open(line_max_bytes=1 << 20).handle_lines(pipes.handle)
    pipes.send(PING)
    pipes.write(b"x" * (5 << 20))
    if not is_last:
        pipes.send(b"", PING)
    pipes.close_stdin()
    refusal = pipes.receive()
    assert (refusal["id"], refusal["error"]["code"], "1 MiB" in refusal["error"]["message"]) == (None, -32600, True)
    assert [pipes.next_handled() for _ in range(2 if is_last else 3)] == [PING, END] if is_last else [PING, PING, END]
