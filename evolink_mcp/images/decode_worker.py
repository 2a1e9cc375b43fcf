"""The program of the decoder process: read a request from stdin, decode the image, write the answer to stdout.

It holds no secret: its environment has no API key, and it opens no file.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from itertools import product
from typing import BinaryIO

from evolink_mcp.api.targets import MIME_TYPES
from evolink_mcp.images import heic
from evolink_mcp.images.decode_protocol import (
    CPU_PER_IMAGE_S,
    GREETING,
    GREETING_MAGIC,
    HEIC_ARGUMENT,
    IMAGES_PER_PROCESS,
    REQUEST_BYTES,
    DecodeAnswer,
    DecodeRequest,
    Operation,
    pack_derived,
    pack_refusal,
)
from evolink_mcp.images.derive import DerivePlan, Output, derive
from evolink_mcp.images.inspect import ImageFacts
from evolink_mcp.images.metadata import ORIENTATION
from evolink_mcp.images.prepare import check_reference, normalize
from evolink_mcp.images.previews import check_and_preview, preview
from evolink_mcp.images.sandbox import enter_sandbox
from evolink_mcp.images.unusable import Reason, UnusableImage


def main() -> None:
    """Start the decoder. The arguments of the process: CPU seconds per image, bytes of memory, "heic" to convert HEIC."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches all processes; the server decides
    cpu_s = float(sys.argv[1])
    memory_bytes = int(sys.argv[2])
    converts_heic = sys.argv[3:] == [HEIC_ARGUMENT]
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    _self_test()  # imports all modules that decoding needs: afterwards no file can be opened
    if converts_heic:
        heic.load()
    protections = enter_sandbox(int(cpu_s * IMAGES_PER_PROCESS), memory_bytes, allows_threads=converts_heic)
    # The second test proves that decoding works inside the sandbox, before the server sends an image.
    _self_test()
    answers.write(GREETING.pack(GREETING_MAGIC, protections))
    answers.flush()
    serve(requests, answers, cpu_s)


def serve(requests: BinaryIO, answers: BinaryIO, cpu_s: float = CPU_PER_IMAGE_S) -> None:
    """Answer requests until the input ends.

    Raises:
        ValueError: the input is not a valid request.
    """
    while record := requests.read(REQUEST_BYTES):
        request = DecodeRequest.unpack(record)
        options = requests.read(request.options_bytes)
        content = requests.read(request.content_bytes)
        if len(content) != request.content_bytes:
            return
        _limit_cpu(cpu_s)
        try:
            if request.operation is Operation.DERIVE:
                _derive(content, DerivePlan.unpack(options), answers, cpu_s)
            else:
                answer = perform(request, content)
                answers.write(answer.pack())
                answers.write(answer.payload or b"")
                del answer
        except UnusableImage as error:
            answers.write(pack_refusal(error))
        except MemoryError:
            answers.write(pack_refusal(UnusableImage(Reason.TOO_MUCH_MEMORY)))
        # The next image needs the memory.
        del content
        _limit_cpu(0)
        answers.flush()


def perform(request: DecodeRequest, content: bytes) -> DecodeAnswer:
    """Do the work of one request.

    Raises:
        UnusableImage: the content cannot be used.
        MemoryError: the work needs more memory than the limit.
    """
    match request.operation:
        case Operation.CHECK:
            return DecodeAnswer(*check_and_preview(content, request.edge, request.budget))
        case Operation.PREVIEW:
            return DecodeAnswer(payload=preview(content, request.edge, request.budget))
        case Operation.CHECK_REFERENCE:
            return DecodeAnswer(check_reference(content, request.is_mask))
        case Operation.NORMALIZE:
            return DecodeAnswer(payload=normalize(content))
        case Operation.CONVERT_HEIC:
            return DecodeAnswer(payload=heic.convert(content))
        case Operation.DERIVE:
            raise ValueError("this operation has several answers")


def _derive(content: bytes, plan: DerivePlan, answers: BinaryIO, cpu_s: float) -> None:
    """Write the facts of the image, then each output when it is finished. Each one may use `cpu_s` seconds.

    Raises:
        UnusableImage, MemoryError: the image cannot be decoded. Nothing is written then.
    """
    for part in derive(content, plan):
        if isinstance(part, ImageFacts):
            answers.write(DecodeAnswer(part).pack())
        else:
            image, file = part
            answers.write(pack_derived(image, len(file)))
            answers.write(file)
        answers.flush()
        _limit_cpu(cpu_s)


def _limit_cpu(seconds: float) -> None:
    """End the process by SIGPROF after this CPU time. 0 removes the limit."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _self_test() -> None:
    """Decode and encode small images of each type, upright and rotated, with and without alpha.

    Raises:
        UnusableImage: decoding does not work here.
    """
    from PIL import Image

    exif = Image.Exif()
    for kind, mode, exif[ORIENTATION] in product(("PNG", "JPEG", "WEBP"), ("RGB", "RGBA"), (1, 6)):
        out = io.BytesIO()
        image = Image.new(mode if kind != "JPEG" else "RGB", (24, 16), "teal")
        image.save(out, kind, exif=exif.tobytes())
        check_and_preview(out.getvalue(), 8)
        check_reference(out.getvalue(), is_mask=True)
        normalize(out.getvalue())
        outputs = tuple(Output(((8, 8),), mime_type) for mime_type in MIME_TYPES.values())
        list(derive(out.getvalue(), DerivePlan(outputs, "pad", trim=True)))
