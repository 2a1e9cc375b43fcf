"""Odd lines on stdin, before and after the SDK is loaded: each request is answered once, and nothing stops the server."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from child_processes import ANSWER_TIMEOUT_S, SERVER_COMMAND, cache_folders, minimal_environment
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from odd_messages import CASES, FIRST_MESSAGES, LINES, proofs

ERAS = pytest.mark.parametrize("era", ["legacy", "modern"])
FUZZ = settings(
    max_examples=150, deadline=None, database=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def parse_strictly(line: bytes) -> dict[str, Any]:
    """Return the message in a line of stdout. Raise an error if the line is not a message."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    message = json.loads(line.decode(), parse_constant=refuse)
    assert message["jsonrpc"] == "2.0"
    return message


def id_key(request_id: Any) -> str:
    """Return the ID as JSON, because True and 1 are different IDs."""
    return json.dumps(request_id)


class Server:
    """A server process. It has no API key, so it can buy nothing."""

    def __init__(self, home: Path, err: Path) -> None:
        self._stderr_file = err
        with self._stderr_file.open("wb") as err:
            self._process = subprocess.Popen(
                SERVER_COMMAND, env=minimal_environment(home), cwd=home,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err,
            )  # fmt: skip
        self._output: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._number = 0
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._read, self._write)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as stdout:
            for line in stdout:
                self._output.put(line)
        self._output.put(b"")

    def _write(self) -> None:
        """Write in a thread: a server that does not read must not stop the test."""
        assert self._process.stdin
        with suppress(OSError), self._process.stdin as stdin:
            while (data := self._outbox.get()) is not None:
                stdin.write(data)
                stdin.flush()

    def send(self, *lines: bytes) -> None:
        self._outbox.put(b"".join(line + b"\n" for line in lines))

    def receive(self) -> dict[str, Any]:
        try:
            line = self._output.get(timeout=ANSWER_TIMEOUT_S)
        except queue.Empty:
            self._process.kill()
            raise
        if not line:
            self._output.put(b"")
        assert line, f"the server has ended: {self._stderr_file.read_text()}"
        return parse_strictly(line)

    def answers(self, ids: list[Any]) -> dict[str, dict[str, Any]]:
        """Wait for the answer to each of `ids`. Return the answers by the keys of their IDs."""
        missing = Counter(map(id_key, ids))
        answers: dict[str, dict[str, Any]] = {}
        while missing.total():
            answer = self.receive()
            name = id_key(answer["id"])
            answers[name] = answer
            assert missing[name] > 0, f"no request had this ID: {answer}"
            missing[name] -= 1
        return answers

    def check_good_requests(self, era: str) -> None:
        """Send good requests and wait for their results. Ignore other messages."""
        self._number += 1
        requests = proofs(era, self._number)
        self.send(*(json.dumps(request).encode() for request in requests.values()))
        waiting = set(requests)
        while waiting:
            answer = self.receive()
            if answer.get("id") in waiting:
                waiting.remove(answer["id"])
                assert "result" in answer, answer

    def check_exit(self) -> None:
        """Check that EOF ends the server with exit code 0 and an empty stderr."""
        self._outbox.put(None)
        assert (self._process.wait(ANSWER_TIMEOUT_S), self._stderr_file.read_text()) == (0, "")

    def read_rest(self) -> list[dict[str, Any]]:
        """Return the rest of stdout, to its end."""
        return [parse_strictly(line) for line in iter(lambda: self._output.get(timeout=ANSWER_TIMEOUT_S), b"")]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._outbox.put(None)
        for thread in self._threads:
            thread.join()


Start = Callable[[], Server]


@contextmanager
def open_launcher(home: Path, folder: Path) -> Iterator[Start]:
    servers: list[Server] = []

    def start() -> Server:
        servers.append(Server(home, folder / f"{len(servers)}.err"))
        return servers[-1]

    try:
        yield start
    finally:
        for server in servers:
            server.kill()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the home of servers that answer early, because an earlier server recorded these answers."""
    folder = tmp_path_factory.mktemp("home")
    with open_launcher(folder, folder) as start:
        server = start()
        server.send(first_message("legacy"))
        while not [file for cache in cache_folders(folder) for file in cache.glob("startup-*.tsv")]:
            server.check_good_requests("legacy")
        server.check_exit()
    return folder


@pytest.fixture
def start(home: Path, tmp_path: Path) -> Iterator[Start]:
    with open_launcher(home, tmp_path) as start_server:
        yield start_server


def first_message(era: str) -> bytes:
    return json.dumps(FIRST_MESSAGES[era]).encode()


@ERAS
@pytest.mark.parametrize("is_loaded", [False, True], ids=["before the SDK is loaded", "after"])
def test_every_odd_request_is_answered_once_and_the_server_continues(start: Start, era: str, is_loaded: bool) -> None:
    server = start()
    server.send(first_message(era))
    if is_loaded:
        server.answers(["hello"])
        server.check_good_requests(era)
    cases = list(CASES.values())
    server.send(*(case.line for case in cases))
    expected = [case.request_id for case in cases if not case.is_silent]
    answers = server.answers(expected if is_loaded else ["hello", *expected])
    for case in cases:
        if case.is_error and not case.is_silent:
            assert answers[id_key(case.request_id)]["error"]["code"] in (-32600, -32700), case.line[:200]
    server.check_good_requests(era)
    server.check_exit()
    assert server.read_rest() == []


@ERAS
def test_no_generated_line_stops_a_server_that_is_loaded(start: Start, era: str) -> None:
    server = start()
    server.send(first_message(era))
    server.check_good_requests(era)

    @FUZZ
    @given(st.lists(LINES, min_size=1, max_size=6))
    def send_lines(lines: list[bytes]) -> None:
        server.send(*lines)
        server.check_good_requests(era)

    send_lines()
    server.check_exit()


@ERAS
def test_no_generated_line_stops_a_server_that_is_starting(start: Start, era: str) -> None:
    @settings(FUZZ, max_examples=5)
    @given(st.lists(LINES, min_size=20, max_size=60))
    def send_lines(lines: list[bytes]) -> None:
        server = start()
        server.send(first_message(era), *lines)
        server.check_good_requests(era)
        server.check_exit()
        server.read_rest()

    send_lines()


def test_odd_lines_before_the_handshake_do_not_prevent_it(start: Start) -> None:
    """None of them is a request, so none decides the protocol era."""
    server = start()
    lines = [case.line for case in CASES.values() if case.is_error or case.is_silent]
    server.send(*lines, first_message("legacy"))
    server.check_good_requests("legacy")
    server.check_exit()
