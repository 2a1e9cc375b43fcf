"""The server follows a task until it is settled and its images are saved. Forty bad answers do not stop it."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import httpx2 as httpx
import pytest
from conftest import Clock, Open, PlainSimulator

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.api.task import read_task
from evolink_mcp.errors import DownloadFailed
from evolink_mcp.images.download import download

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

REQUEST = {"prompt": "a fox", "size": "1024x640", "quality": "low"}


class Refuses(httpx.ASGITransport):
    """Answer the first `times` requests whose path begins with `path` with `status`."""

    def __init__(self, simulator: PlainSimulator, path: str, status: int, times: int) -> None:
        super().__init__(simulator.app)
        self.path, self.status, self.times = path, status, times

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.times and request.url.path.startswith(self.path):
            self.times -= 1
            return httpx.Response(self.status, stream=httpx.ByteStream(b"{}"))
        return await super().handle_async_request(request)


@pytest.mark.parametrize("status", [400, 402, 403])
@pytest.mark.parametrize("times", [1, 20])
async def test_a_refused_poll_does_not_end_the_job(open_world: Open, status: int, times: int) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=20)
    refuses = Refuses(simulator, "/v1/tasks/", status, times)
    # Links die after a day: a picture that was made while EvoLink refused for twenty hours can still be fetched.
    async with open_world(simulator=simulator, clock=clock, transport=refuses) as world, world.client() as client:
        answer = await client.call_tool("generate_image", REQUEST)
    assert (answer.structured_content["status"], answer.structured_content["charged"]) == ("completed", "yes")
    assert answer.structured_content["images"][0]["path"] is not None
    assert answer.structured_content["error"] is None


async def test_while_evolink_refuses_polls_the_answer_says_that_they_continue(open_world: Open) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=20)
    refuses = Refuses(simulator, "/v1/tasks/", 402, 10**9)
    never = anyio.Event()

    async def sleep(seconds: float) -> None:
        clock.now += seconds
        if clock.now > 1_790_000_000 + 300:
            await never.wait()
        await anyio.sleep(0)

    clock.sleep = sleep
    async with open_world(simulator=simulator, clock=clock, transport=refuses) as world, world.client() as client:
        answer = await client.call_tool("generate_image", {**REQUEST, "wait_seconds": 0})
        arguments = {"task_id": answer.structured_content["task_id"], "wait_seconds": 0}
        while not any("repeats the poll" in note for note in answer.structured_content["notes"]):
            answer = await client.call_tool("get_task", arguments)
    facts = answer.structured_content
    assert (answer.is_error, facts["error"], facts["charged"]) == (False, None, "unknown")
    assert facts["next_action"]["tool"] == "get_task"
    assert any("402" in note for note in facts["notes"])


@pytest.mark.journal_file
@pytest.mark.parametrize("times", [4, 14])
async def test_a_picture_host_that_fails_for_a_while_costs_no_picture(open_world: Open, times: int) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0)
    refuses = Refuses(simulator, "/pictures/", 503, times)
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await anyio.sleep(0.001)

    async with (
        open_world(simulator=simulator, clock=clock, transport=refuses, pause=pause) as world,
        world.client() as client,
    ):
        answer = await client.call_tool("generate_image", REQUEST)
        (image,) = answer.structured_content["images"]
        if times > 4:
            assert (answer.structured_content["charged"], image["path"]) == ("yes", None)
            assert image["url"].startswith("http")
        while image["path"] is None:
            (task,) = (await client.call_tool("list_tasks", {"detail": True})).structured_content["tasks"]
            (image,) = task["images"]
    assert image["path"] == str(world.files[0])
    retries = [seconds for seconds in pauses if seconds > 2]
    assert retries == sorted(retries)


async def test_a_failed_task_with_pictures_shows_them(open_world: Open) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0)

    class Fails(httpx.ASGITransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            reply = await super().handle_async_request(request)
            if not request.url.path.startswith("/v1/tasks/"):
                return reply
            content = (await reply.aread()).replace(b'"completed"', b'"failed"')
            return httpx.Response(200, stream=httpx.ByteStream(content))

    transport = Fails(simulator.app)
    async with (
        open_world(simulator=simulator, clock=clock, transport=transport) as world,
        world.client() as client,
    ):
        answer = await client.call_tool("generate_image", REQUEST)
    assert (answer.is_error, answer.structured_content["status"]) == (True, "failed")
    assert answer.structured_content["images"][0]["path"] == str(world.files[0])
    assert str(world.files[0]) in answer.content[0].text


# --- odd answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["4dd0c2f2-2b0c-4e5c-9a0e-6f4a1c8b7f55", "task-image-1790000000-abc", "x" * 130])
async def test_an_id_of_another_form_is_polled_in_a_request_body(open_world: Open, name: str) -> None:
    clock = Clock()
    simulator = PlainSimulator(clock=clock, duration_s=0)

    class Renames(httpx.ASGITransport):
        """Give the tasks another ID, which the batch poll knows."""

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            (own_id,) = list(simulator.tasks) or ["none"]
            if request.url.path == "/v1/tasks/batch":
                request = httpx.Request(
                    "POST", request.url, headers=request.headers,
                    content=request.content.replace(name.encode(), own_id.encode()),
                )  # fmt: skip
                request.headers["content-length"] = str(len(request.content))
            reply = await super().handle_async_request(request)
            (own_id,) = list(simulator.tasks) or ["none"]
            if not request.url.path.startswith("/v1/"):
                return reply
            content = (await reply.aread()).replace(f'"{own_id}"'.encode(), f'"{name}"'.encode())
            return httpx.Response(reply.status_code, stream=httpx.ByteStream(content))

    transport = Renames(simulator.app)
    async with (
        open_world(simulator=simulator, clock=clock, transport=transport) as world,
        world.client() as client,
    ):
        answer = await client.call_tool("generate_image", REQUEST)
    facts = answer.structured_content
    assert (facts["task_id"], facts["status"], facts["charged"]) == (name, "completed", "yes")
    assert facts["images"][0]["path"] == str(world.files[0])
    assert not [r.path for r in simulator.requests if name in r.path]


async def test_at_most_ten_links_are_used_and_the_rest_is_counted() -> None:
    links = [f"https://x.example/{number}.png" for number in range(3000)]
    task = read_task({"id": "task-unified-1-a", "status": "completed", "results": links})
    assert (task.results, task.links_left_out) == (tuple(links[:10]), 2990)


def redirects(**locations: str) -> Callable[[httpx.Request], httpx.Response]:
    """Return an image host that redirects each path to another one. The path "end" has the image."""

    def answer(request: httpx.Request) -> httpx.Response:
        assert "authorization" not in request.headers
        name = request.url.path.strip("/")
        if name == "end":
            return httpx.Response(200, stream=httpx.ByteStream(b"picture"))
        return httpx.Response(302, headers={"location": locations[name]}, stream=httpx.ByteStream(b""))

    return answer


async def fetch(url: str, **locations: str) -> tuple[bytes, list[str]]:
    import io

    urls: list[str] = []

    def host(request: httpx.Request) -> httpx.Response:
        urls.append(str(request.url))
        return redirects(**locations)(request)

    target = io.BytesIO()
    async with EvolinkClient(None, transport=httpx.MockTransport(host)) as client:
        try:
            await download(client, url, target)
        except DownloadFailed as error:
            return error.message.encode(), urls
    return target.getvalue(), urls


async def test_a_redirected_picture_is_followed_three_times(open_world: Open) -> None:
    content, _ = await fetch("https://a.example.com/1", **{"1": "/2", "2": "https://b.example.com/3", "3": "end"})
    assert content == b"picture"
    answer, urls = await fetch("https://a.example.com/1", **{"1": "/2", "2": "/3", "3": "/4", "4": "/end"})
    assert b"more than 3 times" in answer
    assert len(urls) == 4


@pytest.mark.parametrize(
    "target",
    [
        "http://b.example.com/end",
        "https://127.0.0.1/end",
        "https://10.0.0.1/end",
        "file:///etc/passwd",
        "https://u:p@b.example.com/",
    ],
)
async def test_a_redirect_to_a_forbidden_address_is_not_followed(target: str) -> None:
    answer, urls = await fetch("https://a.example.com/1", **{"1": target})
    assert b"not usable" in answer
    assert urls == ["https://a.example.com/1"]
