"""Decode images in isolated processes: a file from outside can exploit a decoder, or order hours of work.

Usage: `facts, small = await decoder.check(file, edge=1024, order=task_id)`. docs/sandbox.md describes the isolation.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import IO, BinaryIO, Literal, cast

import anyio
import anyio.to_thread

from evolink_mcp.api.targets import ICO
from evolink_mcp.errors import DecoderUnavailable
from evolink_mcp.images import heic
from evolink_mcp.images.decode_protocol import (
    ANSWER_BYTES,
    CONTENT_MAX_BYTES,
    CPU_PER_IMAGE_S,
    DERIVED_BYTES,
    GREETING,
    GREETING_MAGIC,
    HEIC_ARGUMENT,
    IMAGES_PER_PROCESS,
    OPTIONS_MAX_BYTES,
    PAYLOAD_MAX_BYTES,
    DecodeAnswer,
    DecodeRequest,
    Operation,
    unpack_answer,
    unpack_derived,
)
from evolink_mcp.images.derive import DerivedImage, DerivePlan
from evolink_mcp.images.file_types import HEAD_BYTES as TYPE_BYTES
from evolink_mcp.images.file_types import HEIC, foreign_type
from evolink_mcp.images.inspect import ImageFacts, sniff
from evolink_mcp.images.previews import CACHE_MAX_BYTES, PreviewCache
from evolink_mcp.images.sandbox import MEMORY_MAX_BYTES, Protection
from evolink_mcp.images.unusable import Reason, UnusableImage
from evolink_mcp.isolated import isolated_command

log = logging.getLogger(__name__)

# Above CPU_PER_IMAGE_S: a hostile image ends by its CPU time, and an image is late only on a busy machine.
DEADLINE_S = 20.0
DERIVE_DEADLINE_S = 50.0  # for up to 25 files
START_DEADLINE_S = 60.0
END_DEADLINE_S = 2.0
# An image of the largest size takes 0.2 to 0.4 s. After this time another image gets the place.
SLOW_AFTER_S = 0.5
SLOW_MAX = 2  # each may need MEMORY_MAX_BYTES, beside the images of all lanes
# The event loop must answer other callers while images are decoded.
NICENESS = 5
NICENESS_OF_SLOW = 10
BLOCK_BYTES = 1 << 20
SPOOL_MAX_BYTES = 1 << 20  # a longer converted photo goes to a temporary file
HEAD_BYTES = 16  # of a file, for its type
ICO_MAGIC = b"\0\0\1\0"
Lane = Literal["check", "preview", "reference", "derive"]
# Images of one lane at once. Each may need MEMORY_MAX_BYTES.
LANES: Mapping[Lane, int] = {"check": 2, "preview": 1, "reference": 2, "derive": 1}
_ENTRY_POINT = "evolink_mcp.images.decode_worker:main"
_NO_WINDOW: int = getattr(subprocess, "CREATE_NO_WINDOW", 0)  # Windows: an MCP host with windows has no console
_NO_LIMIT = anyio.CapacityLimiter(math.inf)  # the lanes are the limit


def decoder_command(cpu_per_image_s: float = CPU_PER_IMAGE_S, memory_max_bytes: int = MEMORY_MAX_BYTES) -> list[str]:
    """Return the command that starts a decoder process with these limits."""
    return isolated_command(_ENTRY_POINT, ("PIL",), str(cpu_per_image_s), str(memory_max_bytes))


def converter_command() -> list[str]:
    """Return the command that starts a decoder process for HEIC."""
    requirements = ("PIL", heic.PACKAGE)
    return isolated_command(_ENTRY_POINT, requirements, str(CPU_PER_IMAGE_S), str(MEMORY_MAX_BYTES), HEIC_ARGUMENT)


class Decoder:
    """A pool of decoder processes for the whole server. `close()` ends them. `previews` caches previews of saved images.

    An order never waits long for the images of other orders. Each lane serves the order with the fewest running images
    first. A slow image leaves its lane and continues at low priority. If SLOW_MAX images are slow already, the next slow
    one is stopped, and starts again when one of them ends.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        command: Sequence[str] | None = None,
        folder: str | None = None,
        deadline_s: float = DEADLINE_S,
        derive_deadline_s: float = DERIVE_DEADLINE_S,
        slow_after_s: float = SLOW_AFTER_S,
        sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
    ) -> None:
        """Start no process yet.

        `environment` is the complete environment of the processes. `command` replaces the program, `folder` the working
        directory (default: the root folder). `deadline_s` limits the time for one image, `derive_deadline_s`
        the time for all files of one plan. After `slow_after_s` an image gives way to others; `sleep` waits for it.
        """
        self.previews = PreviewCache()
        self._environ = dict(environment)
        self._command = command
        self._folder = folder or os.path.abspath(os.sep)
        self._deadline_s = deadline_s
        self._derive_deadline_s = derive_deadline_s
        self._slow_after_s = slow_after_s
        self._sleep = sleep
        self._lanes = {lane: _FairLimiter(capacity) for lane, capacity in LANES.items()}
        self._slow = anyio.Semaphore(SLOW_MAX)
        self._idle: list[_Process] = []
        self._start_lock = anyio.Lock()
        self._is_closed = False

    async def check(self, file: BinaryIO, *, edge: int = 0, order: str = "") -> tuple[ImageFacts, bytes | None]:
        """Decode a delivered image completely. Return its facts, and a WebP preview if `edge` (pixels) is not 0.

        `order` names the purchase, for fairness between purchases.

        Raises:
            UnusableImage: not a complete image within the limits.
            DecoderUnavailable: no decoder process starts.
        """
        request = DecodeRequest(Operation.CHECK, _size_of(file), edge, CACHE_MAX_BYTES)
        answer = await self._run("check", request, file, order)
        # A process that sends more than the request needs may be under the control of its image.
        if edge == 0 and answer.payload is not None:
            raise UnusableImage(Reason.DECODER_FAILED)
        file.seek(0)
        return _facts_of(answer, file.read(HEAD_BYTES)), answer.payload

    async def preview(self, file: BinaryIO, *, edge: int, budget: int, order: str = "") -> bytes | None:
        """Return a WebP copy: longest edge ≤ `edge` pixels, at most `budget` bytes; None if it does not fit.

        Raises:
            UnusableImage, DecoderUnavailable: as `check`.
        """
        request = DecodeRequest(Operation.PREVIEW, _size_of(file), edge, min(budget, CACHE_MAX_BYTES))
        return (await self._run("preview", request, file, order)).payload

    async def check_reference(self, file: BinaryIO, *, is_mask: bool = False, order: str = "") -> ImageFacts:
        """Decode a reference image completely and return its facts; for a mask also the share of its transparent pixels.

        Raises:
            UnusableImage, DecoderUnavailable: as `check`.
        """
        request = DecodeRequest(Operation.CHECK_REFERENCE, _size_of(file), is_mask=is_mask)
        answer = await self._run("reference", request, file, order)
        return _facts_of(answer, _head_of(file))

    async def normalize(self, file: BinaryIO, into: BinaryIO, *, order: str = "") -> None:
        """Write a reference image upright and without metadata to the empty file `into`, in the same file type.

        Raises:
            UnusableImage, DecoderUnavailable: as `check`.
        """
        request = DecodeRequest(Operation.NORMALIZE, _size_of(file))
        await self._run("reference", request, file, order, into)
        # A hostile image may control the decoder, so the server checks the type of the copy.
        if sniff(_head_of(into)) != sniff(_head_of(file)):
            raise UnusableImage(Reason.DECODER_FAILED)
        into.seek(0)

    async def convert_heic(self, file: BinaryIO, *, order: str = "") -> None:
        """Replace a HEIC photo in `file` by a JPEG, or by a PNG if it has alpha, in a separate process.

        Every other file stays, and without the extra `heic` a HEIC photo too.

        Raises:
            UnusableImage, DecoderUnavailable: as `check`.
        """
        if foreign_type(_head_of(file, TYPE_BYTES)) is not HEIC or not heic.is_available():
            file.seek(0)
            return
        request = DecodeRequest(Operation.CONVERT_HEIC, _size_of(file))
        # The photo must stay until the end: the work may start again when other images need its place.
        with tempfile.SpooledTemporaryFile(SPOOL_MAX_BYTES) as spooled:
            converted = cast("BinaryIO", spooled)
            await self._run("reference", request, file, order, converted)
            if sniff(_head_of(converted)) is None:
                raise UnusableImage(Reason.DECODER_FAILED)
            await anyio.to_thread.run_sync(_replace_content, file, converted)

    async def derive(
        self, file: BinaryIO, plan: DerivePlan, into: BinaryIO, *, order: str = ""
    ) -> tuple[ImageFacts, list[DerivedImage], list[int]]:
        """Make the files of the plan from one image and write them to `into`, one after the other.

        Return the facts of the source, the facts of each file, and its length in bytes (0: it could not be made).

        Raises:
            UnusableImage, DecoderUnavailable: as `check`.
        """
        options = plan.pack()
        if len(options) > OPTIONS_MAX_BYTES:
            raise ValueError("the plan is too long")
        request = DecodeRequest(Operation.DERIVE, _size_of(file), options_bytes=len(options))
        async with self._lanes["derive"].slot(order) as slot:
            answer = await self._decode(request, file, into, slot, plan)
        assert answer is not None
        assert answer.facts is not None
        position = 0
        for image, count in answer.derived:
            into.seek(position)
            if count and not _is_type(into.read(HEAD_BYTES), image.mime_type):
                raise UnusableImage(Reason.DECODER_FAILED)
            position += count
        return answer.facts, [image for image, _ in answer.derived], [count for _, count in answer.derived]

    async def start(self) -> None:
        """Start a process if none is idle, so that the next image need not wait for it. Log an error."""
        async with self._start_lock:
            if self._is_closed or any(process.is_alive for process in self._idle):
                return
            with suppress(DecoderUnavailable):
                await self._reuse(await self._start_process())

    async def protections(self) -> Protection:
        """Start a process if none is idle, and return the protections that are active in it.

        Raises:
            DecoderUnavailable: no decoder process starts.
        """
        process = await self._process()
        self._idle.append(process)
        return process.protections

    def close(self) -> None:
        """End all idle processes. A process that works ends with its call."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().end()

    async def _run(
        self, lane: Lane, request: DecodeRequest, content: BinaryIO, order: str, into: BinaryIO | None = None
    ) -> DecodeAnswer:
        if request.content_bytes > CONTENT_MAX_BYTES:
            raise UnusableImage(Reason.TOO_LARGE)
        async with self._lanes[lane].slot(order) as slot:
            answer = await self._decode(request, content, into, slot)
        if answer is None:
            async with self._slow:
                answer = await self._decode(request, content, into, None)
        assert answer is not None
        return answer

    async def _decode(
        self,
        request: DecodeRequest,
        content: BinaryIO,
        into: BinaryIO | None,
        slot: _Slot | None,
        plan: DerivePlan | None = None,
    ) -> DecodeAnswer | None:
        """Return the answer, or None if the image was slow and must start again. Without a slot it counts as slow.

        The payload goes to `into`, or into the answer. The files of a `plan` take long and give way to no other image.
        """
        converts_heic = request.operation is Operation.CONVERT_HEIC
        process = await (self._start_process(converter_command) if converts_heic else self._process())
        if slot is None:
            process.lower_priority()
        # A slow image starts again from its first byte.
        content.seek(0)
        results: list[DecodeAnswer | UnusableImage] = []
        is_late = True
        try:
            with anyio.move_on_after(self._deadline_s if plan is None else self._derive_deadline_s):
                async with anyio.create_task_group() as group:
                    if slot is not None and plan is None:
                        group.start_soon(self._yield_if_slow, process, slot, group.cancel_scope)
                    results.append(
                        await anyio.to_thread.run_sync(
                            process.exchange, request, content, into, plan, abandon_on_cancel=True, limiter=_NO_LIMIT
                        )
                    )
                    group.cancel_scope.cancel()
                is_late = False
        finally:
            process.images += 1
            # Without a result the process still decodes the image. A process for HEIC may start threads and ends after one photo.
            if results and process.is_reusable and not converts_heic:
                await self._reuse(process)
            else:
                await _end(process)
        # Errors are raised only here, because the task group would put them into an ExceptionGroup.
        if is_late:
            raise UnusableImage(Reason.DECODER_LATE)
        if not results:
            return None
        if isinstance(results[0], UnusableImage):
            raise results[0]
        return results[0]

    async def _yield_if_slow(self, process: _Process, slot: _Slot, scope: anyio.CancelScope) -> None:
        """After a while, give the place in the lane to another image. Without a free slow place, stop this image."""
        await self._sleep(self._slow_after_s)
        try:
            self._slow.acquire_nowait()
        except anyio.WouldBlock:
            scope.cancel()
        else:
            process.lower_priority()
            slot.demote(self._slow)

    async def _process(self) -> _Process:
        """Return an idle process, or start one."""
        if not self._idle and self._start_lock.locked():
            async with self._start_lock:  # `start` is about to add a process
                pass
        while self._idle:
            process = self._idle.pop()
            if process.is_alive:
                return process
            process.end()
        return await self._start_process()

    async def _reuse(self, process: _Process) -> None:
        """Keep a process for the next image. After `close` end it."""
        if self._is_closed:
            await _end(process)
        else:
            self._idle.append(process)

    async def _start_process(self, make_command: Callable[[], list[str]] = decoder_command) -> _Process:
        process = _Process(self._command or make_command(), self._environ, self._folder)
        is_started = False
        try:
            with anyio.fail_after(START_DEADLINE_S):
                await anyio.to_thread.run_sync(process.start, abandon_on_cancel=True, limiter=_NO_LIMIT)
            is_started = True
        except (OSError, TimeoutError, ValueError) as error:
            log.error("no image can be decoded: the decoder process does not start (%s)", error)
            raise DecoderUnavailable("the process that decodes images does not start") from error
        finally:
            if not is_started:
                await _end(process)
        missing = expected_protections() & ~process.protections
        if missing:
            log.warning("the image decoder runs without %s on this system", missing.name)
        return process


def expected_protections() -> Protection:
    """Return the protections that a decoder process should have on this platform."""
    if sys.platform == "win32":
        return Protection.JOB_OBJECT
    if sys.platform == "linux":
        return Protection.RESOURCE_LIMITS | Protection.NO_NEW_PRIVILEGES | Protection.SYSCALL_FILTER
    return Protection.RESOURCE_LIMITS


def _facts_of(answer: DecodeAnswer, head: bytes) -> ImageFacts:
    """Return the facts of an answer. Their type must be that of the first bytes of the file."""
    image_type = sniff(head)
    if answer.facts is None or image_type is None or answer.facts.mime_type != image_type[0]:
        raise UnusableImage(Reason.DECODER_FAILED)
    return answer.facts


def _is_type(head: bytes, mime_type: str) -> bool:
    """Return whether a file with these first bytes has the type."""
    if mime_type == ICO:
        return head.startswith(ICO_MAGIC)
    known = sniff(head)
    return known is not None and known[0] == mime_type


def _head_of(file: BinaryIO, count: int = HEAD_BYTES) -> bytes:
    file.seek(0)
    return file.read(count)


def _replace_content(file: BinaryIO, other: BinaryIO) -> None:
    other.seek(0)
    file.seek(0)
    file.truncate()
    shutil.copyfileobj(other, file, BLOCK_BYTES)
    file.seek(0)


def _size_of(file: BinaryIO) -> int:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


async def _end(process: _Process) -> None:
    # A cancelled caller must not leave a process behind.
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(process.end, limiter=_NO_LIMIT)


class _Process:
    """One decoder process. All methods block."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: str) -> None:
        self._command = command
        self._environ = environment
        self._folder = folder
        self._lock = threading.Lock()
        self._popen: subprocess.Popen[bytes] | None = None
        self.protections = Protection(0)
        self.images = 0
        self._is_valid = True
        self._is_ended = False
        self._greetings: queue.SimpleQueue[bytes] = queue.SimpleQueue()  # `end` puts an empty one

    def start(self) -> None:
        """Start the program and wait for its greeting.

        Raises:
            OSError, ValueError: it does not start, or its greeting is invalid.
        """
        with self._lock:
            if self._is_ended:
                raise ValueError("its call was cancelled before its start")
            self._popen = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # A hostile image may control the process, so it has no descriptor of the server except the two pipes.
                stderr=subprocess.DEVNULL,
                close_fds=True,
                creationflags=_NO_WINDOW,
            )
            self._set_niceness(NICENESS)
            if self._is_ended:  # by a cancelled call, which did not see the program yet
                self._popen.kill()
            # Another process can keep the pipe of a killed program open, so `end` ends this wait too.
            threading.Thread(target=self._read_greeting, name="greeting of a decoder", daemon=True).start()
            greeting = self._greetings.get()
            if len(greeting) != GREETING.size:
                raise ValueError("it ended before its greeting")
            magic, protections = GREETING.unpack(greeting)
            if magic != GREETING_MAGIC:
                raise ValueError("its greeting is invalid")
            self.protections = Protection(protections & sum(Protection))

    def _read_greeting(self) -> None:
        greeting = b""
        with suppress(OSError, ValueError):  # the pipe was closed
            while block := os.read(self._stdout.fileno(), GREETING.size - len(greeting)):
                greeting += block
        self._greetings.put(greeting)

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._popen is not None and self._popen.poll() is None

    @property
    def is_reusable(self) -> bool:
        """Whether it may decode another image."""
        return self._is_valid and self.images < IMAGES_PER_PROCESS

    def exchange(
        self,
        request: DecodeRequest,
        content: BinaryIO,
        into: BinaryIO | None = None,
        plan: DerivePlan | None = None,
    ) -> DecodeAnswer | UnusableImage:
        """Send one request and return the answer, or the reason why the image cannot be used.

        With `into` the payload is written there and not returned. `plan` has the options of DERIVE.
        """
        with self._lock:
            try:
                self._send(request, content, b"" if plan is None else plan.pack())
                if plan is not None and into is not None:
                    return self._receive_derived(plan, into, _head_of(content))
                return self._receive(request, into)
            except UnusableImage as error:
                # After a refusal the process waits for the next request. After anything else its state is unknown.
                self._is_valid = self._is_valid and error.reason not in (Reason.DECODER_FAILED, Reason.CHANGED)
                return error
            except (OSError, ValueError):
                self._is_valid = False
                return UnusableImage(self._reason_of_end())

    def _send(self, request: DecodeRequest, content: BinaryIO, options: bytes) -> None:
        self._stdin.write(request.pack())
        self._stdin.write(options)
        # The worker reads the complete file before it answers, so the two pipes cannot block each other.
        remaining = request.content_bytes
        while remaining:
            block = content.read(min(remaining, BLOCK_BYTES))
            if not block:
                raise UnusableImage(Reason.CHANGED)
            self._stdin.write(block)
            remaining -= len(block)
        self._stdin.flush()

    def _receive(self, request: DecodeRequest, into: BinaryIO | None) -> DecodeAnswer:
        payload_max = {
            Operation.CHECK: request.budget,
            Operation.PREVIEW: request.budget,
            Operation.CHECK_REFERENCE: 0,
            Operation.NORMALIZE: PAYLOAD_MAX_BYTES,
            Operation.CONVERT_HEIC: PAYLOAD_MAX_BYTES,
            Operation.DERIVE: 0,
        }[request.operation]
        record = self._stdout.read(ANSWER_BYTES)
        if len(record) != ANSWER_BYTES:
            raise ValueError("the answer is incomplete")
        head = unpack_answer(record, payload_max)
        if into is not None:
            into.seek(0)
            into.truncate()
            self._copy_payload(head.payload_bytes, into)
            return DecodeAnswer(head.facts)
        payload = self._stdout.read(head.payload_bytes)
        if len(payload) != head.payload_bytes:
            raise ValueError("the payload is incomplete")
        return DecodeAnswer(head.facts, payload if head.has_payload else None)

    def _receive_derived(self, plan: DerivePlan, into: BinaryIO, source_head: bytes) -> DecodeAnswer:
        head = unpack_answer(self._stdout.read(ANSWER_BYTES), 0)
        facts = _facts_of(DecodeAnswer(head.facts), source_head)
        into.seek(0)
        into.truncate()
        derived: list[tuple[DerivedImage, int]] = []
        for output in plan.outputs:
            image, count = unpack_derived(self._stdout.read(DERIVED_BYTES), output, plan)
            self._copy_payload(count, into)
            derived.append((image, count))
        return DecodeAnswer(facts, derived=tuple(derived))

    def _copy_payload(self, count: int, into: BinaryIO) -> None:
        while count:
            block = self._stdout.read(min(count, BLOCK_BYTES))
            if not block:
                raise ValueError("the payload is incomplete")
            into.write(block)
            count -= len(block)

    def _reason_of_end(self) -> Reason:
        """Return why there is no valid answer."""
        assert self._popen is not None
        try:
            code = self._popen.wait(END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            return Reason.DECODER_FAILED  # it lives and sends nonsense
        if sys.platform == "win32":
            return Reason.DECODER_FAILED
        # SIGPROF ends one image, SIGXCPU the process with the CPU time of all its images.
        if code in (-signal.SIGPROF, -signal.SIGXCPU):
            return Reason.TOO_MUCH_TIME
        # Another program ended it, for example the system when memory is short. The image may be good.
        return Reason.DECODER_LATE if code in (-signal.SIGKILL, -signal.SIGTERM) else Reason.DECODER_FAILED

    def lower_priority(self) -> None:
        """Let other processes run first. This cannot be undone, so the process ends after this image."""
        self._is_valid = False
        self._set_niceness(NICENESS_OF_SLOW)

    def _set_niceness(self, niceness: int) -> None:
        if sys.platform != "win32" and self._popen is not None:
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self._popen.pid, niceness)

    def end(self) -> None:
        """Kill the process and release its pipes, within END_DEADLINE_S. A later `start` of this object starts no program."""
        self._is_ended = True
        self._greetings.put(b"")
        if self._popen is not None:
            self._popen.kill()
        # A thread that waits for an answer ends now, because the pipes of a killed process are closed. But another process
        # can have inherited such a pipe and keep it open. Then the thread must not hold up the server.
        closing = threading.Thread(target=self._close, name="end of a decoder", daemon=True)
        closing.start()
        closing.join(END_DEADLINE_S)
        if closing.is_alive():
            log.warning("an image decoder was killed, and its output is still open")

    def _close(self) -> None:
        with self._lock:
            if self._popen is None:
                return
            for pipe in (self._popen.stdin, self._popen.stdout):
                with suppress(OSError):
                    cast("IO[bytes]", pipe).close()
        self._popen.wait()

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._popen is not None
        assert self._popen.stdin is not None
        return self._popen.stdin

    @property
    def _stdout(self) -> IO[bytes]:
        assert self._popen is not None
        assert self._popen.stdout is not None
        return self._popen.stdout


class _Slot:
    """The place of one image in a lane. `demote` exchanges it for a place among the slow images."""

    def __init__(self, lane: _FairLimiter, order: str) -> None:
        self._lane = lane
        self._order = order
        self._slow: anyio.Semaphore | None = None

    def demote(self, slow: anyio.Semaphore) -> None:
        """Give the place in the lane back. `slow` was acquired for this image."""
        self._slow = slow
        self._lane.release(self._order)

    def release(self) -> None:
        """Give the place back."""
        if self._slow is None:
            self._lane.release(self._order)
        else:
            self._slow.release()


@dataclass(eq=False, slots=True)
class _Waiter:
    order: str
    event: anyio.Event


class _FairLimiter:
    """At most `capacity` holders. The next place goes to the order with the fewest holders, then to the oldest waiter."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._holders: Counter[str] = Counter()
        self._waiters: deque[_Waiter] = deque()

    @asynccontextmanager
    async def slot(self, order: str) -> AsyncGenerator[_Slot]:
        """Wait for a place and hold it."""
        await self._acquire(order)
        slot = _Slot(self, order)
        try:
            yield slot
        finally:
            slot.release()

    async def _acquire(self, order: str) -> None:
        waiter = _Waiter(order, anyio.Event())
        self._waiters.append(waiter)
        self._admit()
        try:
            await waiter.event.wait()
        except anyio.get_cancelled_exc_class():
            # The cancellation came after `_admit` counted this waiter as a holder.
            if waiter.event.is_set():
                self.release(order)
            else:
                self._waiters.remove(waiter)
            raise

    def release(self, order: str) -> None:
        """Give a place back."""
        self._holders[order] -= 1
        self._holders += Counter()  # drops orders without a holder
        self._admit()

    def _admit(self) -> None:
        while self._waiters and self._holders.total() < self._capacity:
            waiter = min(self._waiters, key=lambda one: self._holders[one.order])
            self._waiters.remove(waiter)
            self._holders[waiter.order] += 1
            waiter.event.set()
