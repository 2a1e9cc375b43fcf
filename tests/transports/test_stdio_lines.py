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
from stdio_ends import Ends

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
PING = b'{"jsonrpc":"2.0","id":9,"method":"ping"}'
END = None


@pytest.fixture
def ends() -> Iterator[Ends]:
    pipes = Ends()
    yield pipes
    pipes.close()


def test_a_line_that_cannot_be_handled_is_answered_with_its_id_and_the_next_one_is_handled(
    ends: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    def handle(line: bytes | None) -> None:
        if line is not None and b"odd" in line:
            raise TypeError("unhashable type: 'list'")
        ends.handle(line)

    ends.open().handle_lines(handle)
    ends.say(b'{"jsonrpc":"2.0","id":"a","method":"odd"}', b'{"method":"odd"}', PING)
    errors = [ends.hear(), ends.hear()]
    assert ends.next_handled() == PING
    assert [(error["id"], error["error"]["code"]) for error in errors] == [("a", -32600), (None, -32600)]
    assert [record.exc_info for record in caplog.records] == [None, None]
    assert "TypeError" in caplog.text


def test_an_early_line_that_cannot_be_handled_is_answered_and_the_next_one_is_handled(ends: Ends) -> None:
    arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def handle(line: bytes | None) -> None:
        if line == PING:
            raise RuntimeError("odd")
        ends.handle(line)

    transport = ends.open(arrived.put)
    ends.say(PING, b"second")
    assert [arrived.get(timeout=ANSWER_TIMEOUT_S), arrived.get(timeout=ANSWER_TIMEOUT_S)] == [PING, b"second"]
    transport.handle_lines(handle)
    assert (ends.hear()["id"], ends.next_handled()) == (9, b"second")


def test_early_answers_that_fail_leave_every_line_to_the_server(ends: Ends, caplog: pytest.LogCaptureFixture) -> None:
    early_lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def early(line: bytes) -> bytes | None:
        early_lines.put(line)
        if b"odd" in line:
            raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")
        return b'{"id":"early"}\n'

    lines = [b'{"id":1}', b'{"id":"odd"}', b'{"id":3}']
    transport = ends.open(early)
    ends.say(*lines)
    assert ends.hear() == {"id": "early"}
    ends.hang_up()
    handled: list[bytes | None] = []
    transport.handle_lines(ends.handle)
    while not handled or handled[-1] is not None:
        handled.append(ends.next_handled())
    transport.flush()
    assert handled == [*lines, END]
    assert ends.rest() == []
    assert early_lines.qsize() == 2
    assert [record.exc_info for record in caplog.records] == [None]
    assert ends.exit_codes.empty()


def test_an_end_of_input_before_any_question_ends_the_process(ends: Ends) -> None:
    ends.open()
    ends.say(b'{"jsonrpc":"2.0","method":"notifications/initialized"}')
    ends.hang_up()
    assert ends.exit_code() == 0


@pytest.mark.parametrize("question", [PING, b'{"\\u0069d":1,"method":"ping"}', b"garbage", b"[]"])
def test_an_end_of_input_after_a_question_waits_for_the_server(ends: Ends, question: bytes) -> None:
    before = set(threading.enumerate())
    transport = ends.open()
    (reader,) = [thread for thread in set(threading.enumerate()) - before if thread.name == "stdin"]
    ends.say(question)
    ends.hang_up()
    reader.join(ANSWER_TIMEOUT_S)
    assert ends.exit_codes.empty()
    transport.handle_lines(ends.handle)
    assert [ends.next_handled(), ends.next_handled()] == [question, END]


def test_an_end_of_input_ends_the_process_only_after_the_settings_are_valid(ends: Ends) -> None:
    transport = ends.open(can_leave=False)
    ends.hang_up()
    transport.handle_lines(ends.handle)
    assert (ends.next_handled(), ends.exit_codes.empty()) == (END, True)


def test_an_end_of_input_before_the_settings_are_valid_is_remembered(ends: Ends) -> None:
    transport = ends.open(can_leave=False)
    ends.hang_up()
    transport.allow_leave()
    assert ends.exit_code() == 0


def test_an_end_of_input_after_the_settings_are_valid_ends_the_process(ends: Ends) -> None:
    arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    transport = ends.open(arrived.put, can_leave=False)
    ends.say(b'{"jsonrpc":"2.0","method":"notifications/initialized"}')
    arrived.get(timeout=ANSWER_TIMEOUT_S)
    transport.allow_leave()
    assert ends.exit_codes.empty()
    ends.hang_up()
    assert ends.exit_code() == 0


def test_an_end_that_cannot_be_handled_ends_the_process_at_once(ends: Ends) -> None:
    def handle(line: bytes | None) -> None:
        raise RuntimeError("can't start new thread")

    ends.open().handle_lines(handle)
    ends.hang_up()
    assert ends.exit_code() == 1


@pytest.mark.parametrize("broken", ["no descriptor", -1])
def test_a_reader_that_fails_is_an_end_of_input(ends: Ends, caplog: pytest.LogCaptureFixture, broken: Any) -> None:
    caplog.set_level(logging.DEBUG)
    transport = ends.open(reads_from=broken)
    assert ends.exit_code() == 0
    transport.handle_lines(ends.handle)
    assert ends.next_handled() is END
    assert "reading stdin failed" in caplog.text


def test_a_writer_that_fails_is_an_end_of_input(ends: Ends, caplog: pytest.LogCaptureFixture) -> None:
    transport = ends.open()
    transport.handle_lines(ends.handle)
    odd: Any = "text"
    transport.write(odd)
    assert ends.next_handled() is END
    assert "writing stdout failed" in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="closes a pipe as POSIX does")
def test_a_client_that_stops_reading_is_an_end_of_input(ends: Ends, caplog: pytest.LogCaptureFixture) -> None:
    transport = ends.open()
    transport.handle_lines(ends.handle)
    ends.stop_reading()
    transport.write(b"{}\n")
    assert ends.next_handled() is END
    assert caplog.records == []


def test_an_answer_that_cannot_be_recorded_does_not_stop_the_later_ones(
    ends: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise KeyError("an odd delivery")

    transport = ends.open()
    transport.write(b'{"id":1}\n', fail)
    transport.write(b'{"id":2}\n')
    assert [ends.hear(), ends.hear()] == [{"id": 1}, {"id": 2}]
    assert "KeyError" in caplog.text


def test_the_last_line_needs_no_line_feed(ends: Ends) -> None:
    ends.open().handle_lines(ends.handle)
    ends.write(b"\r\n \n" + PING)
    ends.hang_up()
    assert [ends.next_handled(), ends.next_handled()] == [PING, END]


@pytest.mark.parametrize("is_last", [True, False])
def test_a_line_that_is_too_long_gets_an_answer_and_the_other_ones_too(ends: Ends, is_last: bool) -> None:
    ends.open(line_max_bytes=1 << 20).handle_lines(ends.handle)
    ends.say(PING)
    ends.write(b"x" * (5 << 20))
    if not is_last:
        ends.say(b"", PING)
    ends.hang_up()
    refusal = ends.hear()
    assert (refusal["id"], refusal["error"]["code"], "1 MiB" in refusal["error"]["message"]) == (None, -32600, True)
    assert [ends.next_handled() for _ in range(2 if is_last else 3)] == [PING, END] if is_last else [PING, PING, END]
