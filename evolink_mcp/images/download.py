"""Download a result image: without the key, from a public address, with limits for size, time and speed."""

from __future__ import annotations

import time
from typing import BinaryIO
from urllib.parse import urljoin

import anyio
import httpx2 as httpx

from evolink_mcp.api import urls
from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.http import TRANSPORT_ERRORS, stream, why
from evolink_mcp.errors import DownloadFailed, FolderRefused, LinkExpired
from evolink_mcp.images.decode_protocol import CONTENT_MAX_BYTES

DOWNLOAD_DEADLINE_S = 120.0
PICTURE_MAX_BYTES = CONTENT_MAX_BYTES
# Ten images of the largest size need 0.4 GB. The rest is for repeated downloads.
TASK_MAX_BYTES = 2 << 30
# A host that sends single bytes would otherwise occupy the download for the whole deadline.
SLOWEST_BYTES_PER_S = 10_000
SLOW_START_S = 15.0  # the rate counts after this time
REDIRECTS_MAX = 3
REDIRECTS = (301, 302, 303, 307, 308)


class ByteBudget:
    """The bytes that the images of one task may transfer, with all repeated downloads."""

    def __init__(self, max_bytes: int = TASK_MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._spent_bytes = 0

    def spend(self, count: int) -> None:
        """Count received bytes.

        Raises:
            DownloadFailed: the budget is spent.
        """
        self._spent_bytes += count
        if self._spent_bytes > self._max_bytes:
            raise DownloadFailed(
                f"the pictures of this task have more than {self._max_bytes >> 20:,} MiB with all repeats",
                retryable=False,
            )


async def download(client: EvolinkClient, url: str, into: BinaryIO, budget: ByteBudget | None = None) -> int:
    """Write the image at `url` to `into`, without the key. Return its size in bytes.

    At most REDIRECTS_MAX redirects are followed. Each target must pass the same checks. `budget` is that of the task.

    Raises:
        FolderRefused: the disk is full or cannot be written.
        LinkExpired: the host answered 403, 404 or 410.
        DownloadFailed: any other failure. `into` may contain a part of the image.
    """
    try:
        with anyio.fail_after(DOWNLOAD_DEADLINE_S):
            for _ in range(REDIRECTS_MAX + 1):
                _check(client, url)
                request = client.image_client.build_request("GET", url)
                async with stream(client.image_client, request, client.observe) as response:
                    if response.status_code not in REDIRECTS:
                        return await _write_all(response, into, budget or ByteBudget())
                    url = urljoin(url, response.headers.get("location", ""))
            raise DownloadFailed(f"the picture's host sends us on more than {REDIRECTS_MAX} times")
    except TimeoutError as error:
        raise DownloadFailed(f"the picture took longer than {DOWNLOAD_DEADLINE_S:.0f} s") from error
    except TRANSPORT_ERRORS as error:
        if (cause := await client.cause_of(error, httpx.URL(url))) is None:
            raise DownloadFailed(f"the picture could not be fetched ({why(error)})") from error
        raise DownloadFailed(
            f"the picture could not be fetched: {cause.meaning}",
            advice=f"The picture is paid, and EvoLink keeps it for 24 hours. {cause.next_step} Then call get_task.",
        ) from error


def _check(client: EvolinkClient, url: str) -> None:
    try:
        urls.check_public_url(url, schemes=("https",), max_length=8192)
    except ValueError as error:
        if not client.simulates(url):
            raise DownloadFailed(f"EvoLink's link to the picture is not usable: {error}", retryable=False) from error


async def _write_all(response: httpx.Response, into: BinaryIO, budget: ByteBudget) -> int:
    # A host of signed links answers 403 when a link has expired.
    if response.status_code in (403, 404, 410):
        raise LinkExpired("EvoLink's link to the picture has expired")
    if response.status_code != 200:
        raise DownloadFailed(f"the picture's host answered HTTP {response.status_code}")
    started = time.monotonic()
    written = 0
    # Raw bytes, because a decompressed body could exceed the limits in one chunk.
    async for chunk in response.aiter_raw(64 << 10):
        written += len(chunk)
        if written > PICTURE_MAX_BYTES:
            raise DownloadFailed(f"the picture is larger than {PICTURE_MAX_BYTES >> 20} MiB", retryable=False)
        budget.spend(len(chunk))
        _write(into, chunk)
        elapsed_s = time.monotonic() - started
        if elapsed_s > SLOW_START_S and written < elapsed_s * SLOWEST_BYTES_PER_S:
            raise DownloadFailed(f"the picture's host sends less than {SLOWEST_BYTES_PER_S // 1000} kB/s")
    declared = response.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:15]) != written:
        raise DownloadFailed("the picture arrived incomplete")
    return written


def _write(into: BinaryIO, chunk: bytes) -> None:
    try:
        into.write(chunk)
    except OSError as error:
        raise FolderRefused(
            f"the picture could not be written ({error.strerror or type(error).__name__})",
            charged="yes",
            advice="Free some space or set EVOLINK_MCP_OUTPUT_DIR, then call get_task: EvoLink keeps it for 24 h.",
        ) from error
