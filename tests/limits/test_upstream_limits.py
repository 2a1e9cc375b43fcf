"""Limits for the answers of EvoLink and of its image hosts."""

from __future__ import annotations

import io
from typing import Any

import anyio
import httpx2 as httpx
import pytest
from conftest import World
from pydantic import SecretStr

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.http import DNS_ANSWERS_MAX, JSON_MAX_BYTES, CheckedAddress
from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.api.task import read_task
from evolink_mcp.errors import DownloadFailed, Unreadable
from evolink_mcp.images.download import PICTURE_MAX_BYTES, REDIRECTS_MAX, ByteBudget, download
from evolink_mcp.studio.jobs import ImageRequest

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
BASE = "http://127.0.0.1:9"


def client_of(answer: Any) -> EvolinkClient:
    return EvolinkClient(None, base_url=BASE, transport=httpx.MockTransport(answer))


async def test_a_task_has_at_most_ten_links_and_the_further_ones_are_only_counted() -> None:
    links = [f"https://x.example/{number}.png" for number in range(3000)]
    task = read_task({"id": "task-unified-1-a", "status": "completed", "results": ["no link", *links, *links]})
    assert (task.results, task.links_left_out) == (tuple(links[:10]), 2990)


async def test_the_downloads_of_a_task_share_one_budget() -> None:
    client = client_of(lambda request: httpx.Response(200, stream=httpx.ByteStream(b"x" * 10)))
    budget = ByteBudget(25)
    for _ in range(2):
        assert await download(client, f"{BASE}/a.png", io.BytesIO(), budget) == 10
    with pytest.raises(DownloadFailed, match="more than"):
        await download(client, f"{BASE}/a.png", io.BytesIO(), budget)


async def test_the_images_of_a_job_have_at_most_its_byte_budget(world: World) -> None:
    job = await world.studio.order(ImageRequest(GenerationRequest(prompt="sim:fast a fox", size="1024x640"), 20.0))
    job.download_budget = ByteBudget(100)
    while not job.is_finished:
        await anyio.sleep(0.01)
    await world.studio.depart(job)
    assert [image.is_saved for image in job.entry.images] == [False]
    assert "of this task have more than" in (job.entry.images[0].error or "")


async def test_an_image_has_at_most_100_mib() -> None:
    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self) -> Any:
            while True:
                yield bytes(1 << 20)

    class Nowhere(io.RawIOBase):
        def write(self, data: Any) -> int:
            return len(data)

    client = client_of(lambda request: httpx.Response(200, stream=Endless()))
    budget = ByteBudget()
    with pytest.raises(DownloadFailed, match="larger than 100 MiB"):
        await download(client, f"{BASE}/a.png", Nowhere(), budget)  # pyright: ignore[reportArgumentType]
    assert PICTURE_MAX_BYTES == 100 << 20


async def test_an_image_is_followed_over_three_redirects_at_most() -> None:
    requests: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request.url.path)
        return httpx.Response(302, headers={"location": f"{BASE}/{len(requests)}"})

    with pytest.raises(DownloadFailed, match="more than 3 times"):
        await download(client_of(answer), f"{BASE}/0", io.BytesIO())
    assert len(requests) == REDIRECTS_MAX + 1


async def test_a_host_with_too_many_addresses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    count = DNS_ANSWERS_MAX

    async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        return [(0, 0, 0, "", (f"93.184.{number // 256}.{number % 256}", port)) for number in range(count)]

    monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)
    transport = CheckedAddress(httpx.MockTransport(lambda request: httpx.Response(200)))
    request = httpx.Request("GET", "https://pictures.example.net/a.png")
    assert (await transport.handle_async_request(request)).status_code == 200
    count += 1
    with pytest.raises(httpx.ConnectError, match="more than 64 addresses"):
        await transport.handle_async_request(httpx.Request("GET", "https://pictures.example.net/a.png"))


async def test_a_json_answer_has_at_most_1_mib() -> None:
    size = JSON_MAX_BYTES

    def answer(request: httpx.Request) -> httpx.Response:
        content = b'{"data": {"user": {}, "token": {"x": 1}}}'.ljust(size)
        return httpx.Response(200, stream=httpx.ByteStream(content))

    client = EvolinkClient(SecretStr("sk-test-key"), base_url=BASE, transport=httpx.MockTransport(answer))
    await client.balance()
    size += 1
    with pytest.raises(Unreadable, match="larger than 1 MiB"):
        await client.balance()


TRIALS = {
    "Links of a task": test_a_task_has_at_most_ten_links_and_the_further_ones_are_only_counted,
    "Downloaded bytes of a task": test_the_images_of_a_job_have_at_most_its_byte_budget,
    "Bytes of an image": test_an_image_has_at_most_100_mib,
    "Redirects of an image": test_an_image_is_followed_over_three_redirects_at_most,
    "Addresses of an image host": test_a_host_with_too_many_addresses_is_refused,
    "JSON answer of EvoLink": test_a_json_answer_has_at_most_1_mib,
}
