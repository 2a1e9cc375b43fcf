"""Decoding happens in isolated processes: they hold no secret, run no code of the project, and cannot harm the server."""

from __future__ import annotations

import io
import os
import pickle
import signal
import struct
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from child_processes import without_coverage
from conftest import Open
from drawings import drawing, noise
from fake_decoders import (
    ENDLESS_OR_REFUSE,
    REFUSE,
    answering,
    program,
    silent_decoder,
    silent_with_inherited_output,
    with_inherited_output,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from evolink_mcp.app.environment import decoder_environment
from evolink_mcp.errors import DecoderUnavailable
from evolink_mcp.images.decode_process import Decoder, decoder_command
from evolink_mcp.images.decode_protocol import (
    ANSWER_BYTES,
    DecodeAnswer,
    DecodeRequest,
    Operation,
    pack_refusal,
    unpack_answer,
)
from evolink_mcp.images.decode_worker import perform, serve
from evolink_mcp.images.derive import DerivePlan, Output
from evolink_mcp.images.inspect import Alpha, ImageFacts
from evolink_mcp.images.sandbox import Protection
from evolink_mcp.images.unusable import Reason, UnusableImage

in_time = pytest.mark.usefixtures("in_time")
LARGE = (2880, 2880)
NEVER = 1e9  # seconds
PLAN = DerivePlan((Output(((8, 8),), "image/png"),))
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc and system call filters")
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")


@asynccontextmanager
async def decoder_of(command: Sequence[str] | None = None, **options: Any) -> AsyncIterator[Decoder]:
    with closing(Decoder(decoder_environment(), command=command, **options)) as decoder:
        yield decoder


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True


async def process_id_in(marker: Path) -> int:
    while not (marker.exists() and marker.read_text()):
        await anyio.sleep(0.01)
    return int(marker.read_text())


async def reason_of(decoder: Decoder, content: bytes) -> Reason:
    with pytest.raises(UnusableImage) as error:
        await decoder.check(io.BytesIO(content))
    return error.value.reason


# --- the real decoder ---


@in_time
@pytest.mark.anyio
async def test_every_operation_works_inside_the_sandbox() -> None:
    content = noise((640, 480), "JPEG")
    async with decoder_of() as decoder:
        facts, small = await decoder.check(io.BytesIO(content), edge=128)
        assert (facts.mime_type, facts.width, facts.height) == ("image/jpeg", 640, 480)
        assert small is not None
        assert small[8:12] == b"WEBP"
        assert await decoder.preview(io.BytesIO(content), edge=64, budget=10_000)
        assert (await decoder.check_reference(io.BytesIO(content))).width == 640
        copy = io.BytesIO()
        await decoder.normalize(io.BytesIO(content), copy)
        assert copy.getvalue() == content
        _, images, _ = await decoder.derive(io.BytesIO(content), PLAN, copy)
        assert (images[0].width, images[0].height) == (8, 8)


@in_time
@pytest.mark.anyio
async def test_a_refused_image_does_not_end_the_process(tmp_path: Path) -> None:
    async with decoder_of() as decoder:
        assert await reason_of(decoder, b"a letter") == Reason.NOT_AN_IMAGE
        assert await reason_of(decoder, drawing()[:-20]) == Reason.INCOMPLETE
        facts, _ = await decoder.check(io.BytesIO(drawing()))
    assert (facts.width, facts.height) == (64, 48)


@in_time
@pytest.mark.anyio
@linux_only
async def test_the_process_has_no_environment_no_folder_and_no_descriptors_of_the_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EVOLINK_API_KEY", "sk-canary-0123456789abcdef")
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "secret").open("w") as secret:
        os.set_inheritable(secret.fileno(), True)
        others = decoders_of(os.getpid())
        async with decoder_of() as decoder:
            assert await decoder.protections() == (
                Protection.RESOURCE_LIMITS | Protection.NO_NEW_PRIVILEGES | Protection.SYSCALL_FILTER
            )
            (process,) = set(decoders_of(os.getpid())) - set(others)
            environ = (process / "environ").read_bytes()
            open_files = {os.readlink(link) for link in (process / "fd").iterdir()}
            assert b"EVOLINK" not in environ
            assert b"HOME" not in environ
            assert os.readlink(process / "cwd") == "/"
            assert all(name.startswith("pipe:") or name == "/dev/null" for name in open_files)


def decoders_of(parent: int) -> list[Path]:
    names = Path(f"/proc/{parent}/task").glob("*/children")
    children = [Path("/proc", child) for name in names for child in name.read_text().split()]
    return [child for child in children if b"decode_worker" in (child / "cmdline").read_bytes()]


async def outcome_in_sandbox(attempt: str, options: str = "") -> bytes:
    """Run a line of Python in the sandbox. Return "denied" if the system refused it, else "allowed"."""
    script = (
        "import mmap, os, resource, socket, subprocess, sys, threading\n"
        "sys.path.append(sys.argv[1])\n"
        "from evolink_mcp.images.sandbox import enter_sandbox\n"
        f"enter_sandbox(60, {options})\n"
        f"try:\n    {attempt}\n"
        "except (OSError, RuntimeError):\n    print('denied', flush=True)\n"
        "else:\n    print('allowed', flush=True)\n"
        "os._exit(0)\n"
    )
    root = str(Path(__file__).parent.parent.parent)
    # Coverage would write its data inside the sandbox and damage the file.
    process = await anyio.run_process(
        [sys.executable, "-I", "-c", script, root], stderr=None, env=without_coverage(os.environ)
    )
    return process.stdout.splitlines()[-1]


@in_time
@pytest.mark.anyio
@linux_only
@pytest.mark.parametrize(
    "attempt",
    [
        "open('/etc/passwd').read()",
        "os.listdir('/')",
        "os.unlink('{canary}')",
        "open('{canary}', 'w')",
        "socket.socket()",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.kill({parent}, 0)",
        "open('/proc/{parent}/mem', 'rb')",
        "threading.Thread(target=print).start()",
        "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)",
        "resource.prlimit({parent}, resource.RLIMIT_NOFILE)",
    ],
)
async def test_code_inside_the_sandbox_reaches_nothing(tmp_path: Path, attempt: str) -> None:
    canary = tmp_path / "canary"
    canary.write_text("alive")
    action = attempt.format(canary=canary, parent=os.getpid())
    assert await outcome_in_sandbox(action) == b"denied"
    assert canary.read_text() == "alive"


@pytest.mark.anyio
@linux_only
@pytest.mark.parametrize(
    ("attempt", "outcome"),
    [
        ("threading.Thread(target=print).start()", b"allowed"),
        ("os.fork()", b"denied"),
        ("subprocess.Popen(['/bin/true'])", b"denied"),
        ("open('/etc/passwd').read()", b"denied"),
    ],
)
async def test_the_process_for_heic_may_start_a_thread_and_no_process(attempt: str, outcome: bytes) -> None:
    assert await outcome_in_sandbox(attempt, "allows_threads=True") == outcome


@in_time
@pytest.mark.anyio
@linux_only
async def test_an_image_that_needs_more_memory_than_the_limit_is_rejected() -> None:
    async with decoder_of(decoder_command(memory_max_bytes=48 << 20)) as decoder:
        reason = await reason_of(decoder, drawing(LARGE, mode="RGBA"))
    assert reason == Reason.TOO_MUCH_MEMORY


@in_time
@pytest.mark.anyio
@posix_only
async def test_an_image_that_needs_more_cpu_time_than_the_limit_is_rejected() -> None:
    async with decoder_of(decoder_command(cpu_per_image_s=0.01)) as decoder:
        reason = await reason_of(decoder, noise(LARGE))
        assert reason == Reason.TOO_MUCH_TIME
        assert UnusableImage(reason).is_hostile


# --- a decoder that misbehaves ---


@in_time
@pytest.mark.anyio
async def test_a_decoder_that_does_not_answer_is_killed_after_the_deadline(tmp_path: Path) -> None:
    async with decoder_of(silent_decoder(tmp_path / "marker"), deadline_s=0.2) as decoder:
        reason = await reason_of(decoder, drawing())
    assert reason == Reason.DECODER_LATE
    assert not UnusableImage(reason).is_hostile, "a suspended machine must not cost the image"


@in_time
@pytest.mark.anyio
async def test_a_cancelled_caller_kills_the_process(tmp_path: Path) -> None:
    async with decoder_of(silent_decoder(tmp_path / "marker"), slow_after_s=NEVER) as decoder:
        async with anyio.create_task_group() as group:
            group.start_soon(decoder.check, io.BytesIO(drawing()))
            process = await process_id_in(tmp_path / "marker")
            assert is_running(process)
            group.cancel_scope.cancel()
        assert not is_running(process)


@in_time
@pytest.mark.anyio
async def test_a_killed_decoder_whose_output_stays_open_does_not_delay_the_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On Windows another process can inherit the pipe. The thread that reads it waits until that process ends."""
    async with decoder_of(with_inherited_output(tmp_path / "marker"), deadline_s=0.2) as decoder:
        assert await reason_of(decoder, drawing()) == Reason.DECODER_LATE
        os.kill(await process_id_in(tmp_path / "marker"), signal.SIGTERM)
    assert "its output is still open" in caplog.text


def test_a_decoder_that_is_killed_before_its_greeting_leaves_no_thread(tmp_path: Path) -> None:
    """On Windows another process can inherit the pipe. A thread that reads it would prevent the exit of the server."""

    async def cancel_the_start() -> None:
        async with decoder_of(silent_with_inherited_output(marker)) as decoder, anyio.create_task_group() as group:
            group.start_soon(decoder.protections)
            await process_id_in(marker)
            group.cancel_scope.cancel()

    marker = tmp_path / "marker"
    earlier = threading.enumerate()
    anyio.run(cancel_the_start)
    workers = [thread for thread in threading.enumerate() if thread not in earlier and not thread.daemon]
    for worker in workers:
        worker.join(60)
    is_blocked = any(worker.is_alive() for worker in workers)
    os.kill(int(marker.read_text()), signal.SIGTERM)
    assert not is_blocked


@in_time
@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param("request()\nos._exit(3)", Reason.DECODER_FAILED, id="ends"),
        pytest.param("request()\nos.abort()", Reason.DECODER_FAILED, id="crashes", marks=posix_only),
        pytest.param("request()\nos.kill(os.getpid(), 9)", Reason.DECODER_LATE, id="is killed", marks=posix_only),
        pytest.param("request()\nanswer(bytes(5))\nos._exit(0)", Reason.DECODER_FAILED, id="half an answer"),
    ],
)
async def test_a_decoder_that_ends_costs_only_its_image(body: str, reason: Reason) -> None:
    async with decoder_of(program(body)) as decoder:
        assert await reason_of(decoder, drawing()) == reason
        assert await reason_of(decoder, drawing()) == reason


class Exploit:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (open, (self.marker, "w"))


@in_time
@pytest.mark.anyio
async def test_a_pickle_from_the_decoder_is_never_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    data = pickle.dumps(Exploit(str(marker)))
    async with decoder_of(answering(data.ljust(ANSWER_BYTES, b"\0"))) as decoder:
        assert await reason_of(decoder, drawing()) == Reason.DECODER_FAILED
    assert not marker.exists()


VALID = DecodeAnswer(ImageFacts("image/png", 64, 48, has_alpha=True, alpha=Alpha(0.5, 0, 255)), b"abc").pack()
HEIC_HEAD = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
WRONG_TYPE = DecodeAnswer(ImageFacts("image/jpeg", 64, 48, has_alpha=False)).pack()
NO_PAYLOAD = (DecodeAnswer().pack(), WRONG_TYPE)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(VALID, 2)
@example(VALID[:-1], 3)
@example(VALID, 3)
@given(st.binary(min_size=ANSWER_BYTES, max_size=ANSWER_BYTES) | st.binary(max_size=60), st.integers(0, 1 << 30))
def test_any_bytes_are_a_checked_answer_or_an_unusable_image(record: bytes, payload_max: int) -> None:
    with suppress(UnusableImage):
        head = unpack_answer(record, payload_max)
        assert head.payload_bytes <= payload_max
        assert head.facts is None or (head.facts.width > 0 and head.facts.height > 0)


@settings(deadline=None)
@given(st.integers(0, ANSWER_BYTES - 1), st.integers(0, 255))
def test_one_changed_byte_of_an_answer_never_gives_impossible_facts(position: int, byte: int) -> None:
    record = bytearray(VALID)
    record[position] = byte
    try:
        facts = unpack_answer(bytes(record), 1000).facts
    except UnusableImage:
        return
    assert facts is None or (
        facts.mime_type.startswith("image/") and (facts.alpha is None or 0 <= facts.alpha.transparent_share <= 1)
    )


@in_time
@pytest.mark.anyio
@pytest.mark.parametrize("operation", list(Operation))
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(bytes(ANSWER_BYTES), id="zeros"),
        pytest.param(b"\xff" * ANSWER_BYTES * 4, id="ones"),
        pytest.param(b"EVA1" + b"\xff" * (ANSWER_BYTES - 4), id="a reason that does not exist"),
        pytest.param(DecodeAnswer(payload=b"x" * 100).pack() + b"x" * 100, id="a payload that was not ordered"),
        pytest.param(DecodeAnswer().pack(), id="neither facts nor payload"),
        pytest.param(WRONG_TYPE, id="another type"),
    ],
)
async def test_an_invalid_answer_means_an_unusable_image_for_every_operation(operation: Operation, data: bytes) -> None:
    content = drawing()
    async with decoder_of(answering(data)) as decoder:
        calls = {
            Operation.CHECK: lambda: decoder.check(io.BytesIO(content)),
            Operation.PREVIEW: lambda: decoder.preview(io.BytesIO(content), edge=64, budget=10),
            Operation.CHECK_REFERENCE: lambda: decoder.check_reference(io.BytesIO(content)),
            Operation.NORMALIZE: lambda: decoder.normalize(io.BytesIO(content), io.BytesIO()),
            Operation.DERIVE: lambda: decoder.derive(io.BytesIO(content), PLAN, io.BytesIO()),
            Operation.CONVERT_HEIC: lambda: decoder.convert_heic(io.BytesIO(HEIC_HEAD)),
        }
        if operation == Operation.PREVIEW and data in NO_PAYLOAD:
            assert await calls[operation]() is None, "this is the valid answer for a preview that does not fit"
            return
        with pytest.raises(UnusableImage) as error:
            await calls[operation]()
        assert error.value.reason == Reason.DECODER_FAILED


@in_time
@pytest.mark.anyio
async def test_a_payload_longer_than_its_limit_is_not_read() -> None:
    huge = DecodeAnswer(payload=b"").pack()[:-8] + struct.pack("<Q", 1 << 60)
    async with decoder_of(answering(huge)) as decoder:
        with pytest.raises(UnusableImage) as error:
            await decoder.normalize(io.BytesIO(drawing()), io.BytesIO())
    assert error.value.reason is Reason.DECODER_FAILED


@in_time
@pytest.mark.anyio
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["/nonexistent/python"], id="no such program"),
        pytest.param([sys.executable, "-I", "-c", "pass"], id="ends at once"),
        pytest.param([sys.executable, "-I", "-c", "print('hello')"], id="another program"),
    ],
)
async def test_without_a_decoder_process_nothing_is_decoded(
    command: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    async with decoder_of(command) as decoder:
        with pytest.raises(DecoderUnavailable):
            await decoder.check(io.BytesIO(drawing()))
    assert "does not start" in caplog.text


@in_time
@pytest.mark.anyio
async def test_an_order_without_a_decoder_keeps_its_link_and_says_why(open_world: Open) -> None:
    async with open_world(decoder_command=["/nonexistent/python"]) as world, world.client() as client:
        answer = await client.call_tool("generate_image", {"prompt": "sim:fast a fox"})
    facts = answer.structured_content
    assert world.files == []
    assert facts["charged"] == "yes"
    assert facts["images"][0]["url"].startswith("http")
    assert "the process that decodes images does not start" in facts["images"][0]["error"]


# --- a start before the first image ---


def counting_decoder(starts: Path) -> list[str]:
    """Return a decoder that adds a line to `starts` and refuses each image."""
    record = f"open({str(starts)!r}, 'a').write('started\\n')"
    return program(f"{record}\nwhile requests.peek(1):\n    request()\n    {REFUSE}")


@in_time
@pytest.mark.anyio
async def test_the_first_image_gets_the_process_that_was_started_before_it(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    async with decoder_of(counting_decoder(starts)) as decoder:
        await decoder.start()
        await decoder.start()
        await reason_of(decoder, drawing())
    assert starts.read_text() == "started\n"


@in_time
@pytest.mark.anyio
async def test_an_image_during_the_start_of_the_decoder_waits_for_this_process(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    async with decoder_of(counting_decoder(starts)) as decoder, anyio.create_task_group() as group:
        group.start_soon(decoder.start)
        await anyio.sleep(0)
        await reason_of(decoder, drawing())
    assert starts.read_text() == "started\n"


@in_time
@pytest.mark.anyio
async def test_the_decoder_starts_while_evolink_works(open_world: Open, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    async with open_world(decoder_command=counting_decoder(starts)) as world, world.client() as client:
        await client.call_tool("generate_image", {"prompt": "sim:slow=1000000 a fox", "wait_seconds": 0})
        while not starts.exists():
            await anyio.sleep(0.01)


@in_time
@pytest.mark.anyio
async def test_a_decoder_that_does_not_start_early_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with decoder_of(["/nonexistent/python"]) as decoder:
        await decoder.start()
    assert "does not start" in caplog.text


# --- fairness ---


@in_time
@pytest.mark.anyio
async def test_an_order_gets_its_turn_beside_endless_images_of_other_orders() -> None:
    start_count = 0

    async def sleep(_: float) -> None:
        """Return at once for the endless images, and never for the good one."""
        nonlocal start_count
        start_count += 1
        if start_count > 6:
            await anyio.sleep_forever()

    options = {"slow_after_s": 1.0, "deadline_s": NEVER, "sleep": sleep}
    async with decoder_of(ENDLESS_OR_REFUSE, **options) as decoder, anyio.create_task_group() as group:
        for number in range(6):
            group.start_soon(check_in_order, decoder, b"endless", f"other {number}")
        while start_count < 6:
            await anyio.sleep(0.01)
        await check_in_order(decoder, b"a good image", "mine")
        group.cancel_scope.cancel()


@in_time
@pytest.mark.anyio
async def test_an_order_of_many_images_leaves_a_place_for_another_order() -> None:
    """No image is slow here: the orders share the places of the lane."""
    result: list[str] = []
    options = {"slow_after_s": NEVER, "deadline_s": NEVER}
    async with decoder_of(ENDLESS_OR_REFUSE, **options) as decoder, anyio.create_task_group() as group:

        async def check(order: str) -> None:
            await check_in_order(decoder, b"a good image", order)
            result.append(order)

        group.start_soon(check_in_order, decoder, b"endless", "large")
        await anyio.wait_all_tasks_blocked()
        for _ in range(5):
            group.start_soon(check, "large")
        group.start_soon(check, "small")
        while len(result) < 6:
            await anyio.sleep(0.01)
        assert "small" in result[:2]
        group.cancel_scope.cancel()


async def check_in_order(decoder: Decoder, content: bytes, order: str) -> None:
    with pytest.raises(UnusableImage):
        await decoder.check(io.BytesIO(content), order=order)


# --- the program of the process, run inside the test ---


def test_the_worker_answers_requests_until_its_input_ends() -> None:
    content = drawing()
    requests = io.BytesIO(
        DecodeRequest(Operation.CHECK, len(content), 32, 10_000).pack()
        + content
        + DecodeRequest(Operation.CHECK_REFERENCE, 4).pack()
        + b"text"
        + DecodeRequest(Operation.NORMALIZE, len(content)).pack()
        + content[:-1]
    )
    answers = io.BytesIO()
    serve(requests, answers)
    answers.seek(0)
    head = unpack_answer(answers.read(ANSWER_BYTES), 10_000)
    assert head.facts == ImageFacts("image/png", 64, 48, has_alpha=False, is_one_colour=True)
    assert answers.read(head.payload_bytes)[8:12] == b"WEBP"
    with pytest.raises(UnusableImage, match="not a PNG"):
        unpack_answer(answers.read(), 0)


@pytest.mark.parametrize("record", [b"", b"x", b"EVR1" + bytes(22), b"XXXX" + bytes(22)])
def test_an_invalid_request_ends_the_worker(record: bytes) -> None:
    with pytest.raises(ValueError, match=r"request|Operation"):
        DecodeRequest.unpack(record)


def test_a_preview_that_does_not_fit_has_no_payload() -> None:
    content = noise((640, 480))
    answer = perform(DecodeRequest(Operation.PREVIEW, len(content), 640, 10), content)
    head = unpack_answer(answer.pack(), 10)
    assert (head.has_payload, head.facts) == (False, None)


def test_the_size_of_a_too_large_image_reaches_the_server() -> None:
    with pytest.raises(UnusableImage, match="9000×9000"):
        unpack_answer(pack_refusal(UnusableImage(Reason.TOO_LARGE, (9000, 9000))), 0)


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_a_text_and_survives_the_protocol(reason: Reason) -> None:
    with pytest.raises(UnusableImage) as error:
        unpack_answer(pack_refusal(UnusableImage(reason)), 0)
    assert error.value.reason == reason
