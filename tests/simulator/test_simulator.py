"""The simulator follows EvoLink's page, and a prompt can order every fault."""

import base64
import io
import json
import struct
from pathlib import Path

import httpx2 as httpx
import pytest
from PIL import Image

from evolink_mcp.simulator import app, simulation
from evolink_mcp.simulator.app import Simulator
from evolink_mcp.simulator.rules import FAULTS, REFUSED_AT_ONCE, objection, pixels, price

pytestmark = pytest.mark.anyio

SUNSET = {"model": "gpt-image-2", "prompt": "A beautiful colorful sunset over the ocean"}
WIDE = SUNSET | {"size": "16:9", "resolution": "2K", "n": 2}


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Clock:
    now = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now


class Service:
    """A simulator, its clock and a client with a key."""

    def __init__(self, **options) -> None:
        self.clock = Clock()
        self.evolink = Simulator(clock=self.clock, **options)

    def client(self, key: str | None = "sk-one") -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}"} if key is not None else {}
        transport = httpx.ASGITransport(self.evolink.app)
        return httpx.AsyncClient(transport=transport, base_url="https://api.evolink.ai", headers=headers)

    async def post(self, body, key: str | None = "sk-one", **headers) -> httpx.Response:
        async with self.client(key) as client:
            return await client.post("/v1/images/generations", json=body, headers=headers)

    async def get(self, path: str, key: str | None = "sk-one", **params) -> httpx.Response:
        async with self.client(key) as client:
            return await client.get(path, params=params)

    async def order(self, *words: str, **fields) -> tuple[str, httpx.Response]:
        """Buy a task whose prompt contains these words. Return its ID and the answer of a poll one duration later."""
        reply = await self.post(SUNSET | fields | {"prompt": " ".join(words) + " a fox"})
        self.clock.now += 8
        return reply.json()["id"], await self.get(f"/v1/tasks/{reply.json()['id']}")


@pytest.fixture
def service() -> Service:
    return Service()


async def test_a_task_progresses_with_the_clock_and_ends_with_images_of_the_exact_size(service):
    created = (await service.post(WIDE)).json()
    assert (created["status"], created["progress"], created["task_info"]["estimated_time"]) == ("pending", 0, 8)
    tasks_read = []
    for _ in range(9):
        service.clock.now += 1
        tasks_read.append((await service.get(f"/v1/tasks/{created['id']}")).json())
    progress = [task["progress"] for task in tasks_read]
    assert sorted(progress) == progress
    assert 100 == progress[-1] == progress[-2]
    assert max(progress[:7]) <= 95
    assert [tasks_read[0]["status"], tasks_read[-1]["status"]] == ["processing", "completed"]
    assert tasks_read[-1]["results"] == [entry["url"] for entry in tasks_read[-1]["result_data"]]
    images = [await service.get(url, key=None) for url in tasks_read[-1]["results"]]
    assert [image.headers["content-type"] for image in images] == ["image/png"] * 2
    assert [Image.open(io.BytesIO(image.content)).size for image in images] == [(2048, 1152)] * 2
    assert images[0].content != images[1].content


async def test_task_ids_follow_from_the_clock_and_the_order():
    ids = [Service().evolink.create(SUNSET)[2]["id"] for _ in range(2)]
    assert ids[0] == ids[1]
    assert ids[0].startswith("task-unified-1790000000-")
    assert len(ids[0].rpartition("-")[2]) == 8


@pytest.mark.parametrize(
    ("ratio", "tier", "rule", "size"),
    [
        pytest.param("16:9", "1K", "anchor-edge", (1824, 1024), id="rounded to 16"),
        pytest.param("2:3", "2k", "anchor-edge", (1360, 2048), id="portrait, tier in lower case"),
        pytest.param("3:2", "4K", "anchor-edge", (3520, 2336), id="scaled down with a star"),
        pytest.param("1:1", "4K", "anchor-edge", (2880, 2880), id="the square with a star"),
        pytest.param("16:9", "1K", "pixel-budget", (1360, 768), id="today's table"),
        pytest.param("21:9", "4K", "pixel-budget", (3840, 1648), id="today's longest edge"),
        pytest.param("4:3", "4K", "pixel-budget", (3312, 2480), id="today's budget"),
        pytest.param("1536x1024", "4K", "anchor-edge", (1536, 1024), id="pixels as they are"),
        pytest.param("3840×2160", "1K", "anchor-edge", (3840, 2160), id="the multiplication sign"),
        pytest.param("auto", "4K", "anchor-edge", (1024, 1024), id="auto"),
    ],
)
def test_the_simulator_computes_sizes_by_the_page(ratio, tier, rule, size):
    assert size == pixels(ratio, tier, rule)


def test_the_price_of_a_real_task_is_reproduced_to_the_last_digit():
    """27 text tokens and one low 1024 x 1024 picture were charged 0.3682 credits."""
    body = SUNSET | {"prompt": "x" * 108, "quality": "low"}
    assert price(body, (1024, 1024), 1) == 0.3682
    assert price(body, (1024, 1024), 2) == 0.7364


@pytest.mark.parametrize(
    ("change", "word"),
    [
        pytest.param({"sizes": "1:1"}, "sizes", id="a field that the page does not know"),
        pytest.param({"model": "gpt-image-1"}, "model", id="another model"),
        pytest.param({"prompt": ""}, "prompt", id="nothing to draw"),
        pytest.param({"prompt": "x" * 32_001}, "prompt", id="one code point too many"),
        pytest.param({"prompt": "\ud800"}, "prompt", id="half a character"),
        pytest.param({"prompt": "sim:fial"}, "sim:fial", id="a magic word with a typo"),
        pytest.param({"size": "5:3"}, "size", id="not one of the 15 ratios"),
        pytest.param({"size": "1000x1000"}, "size", id="edges not multiples of 16"),
        pytest.param({"size": "3856x1024"}, "size", id="one edge too long"),
        pytest.param({"size": "512x512"}, "size", id="too few pixels"),
        pytest.param({"size": "3840x2176"}, "size", id="too many pixels"),
        pytest.param({"size": "3088x1024"}, "size", id="longer than 3:1"),
        pytest.param({"resolution": "8K"}, "resolution", id="no such tier"),
        pytest.param({"quality": "High"}, "quality", id="quality is lower case"),
        pytest.param({"n": 11}, "n", id="eleven pictures"),
        pytest.param({"n": True}, "n", id="a boolean is not a number"),
        pytest.param({"n": 1.0}, "n", id="a float is not an integer"),
        pytest.param({"image_urls": []}, "image_urls", id="no picture in the list"),
        pytest.param({"image_urls": ["https://a.example/1.png"] * 17}, "image_urls", id="17 pictures"),
        pytest.param({"image_urls": ["data:image/png;base64,"]}, "image_urls", id="a data URI"),
        pytest.param({"callback_url": "http://a.example/"}, "callback_url", id="callback without TLS"),
        pytest.param({"callback_url": "https://10.0.0.1/"}, "callback_url", id="callback inside"),
        pytest.param({"callback_url": "https://u@a.example/"}, "callback_url", id="callback with a user"),
        pytest.param({"callback_url": "https://a.example/" + "x" * 2031}, "callback_url", id="2049 characters"),
        pytest.param({"background": "transparent", "output_format": "jpeg"}, "background", id="clear JPEG"),
    ],
)
async def test_a_request_against_the_page_is_refused_by_name_and_costs_nothing(service, change, word):
    async with service.client() as client:
        content = json.dumps(SUNSET | change)
        reply = await client.post("/v1/images/generations", content=content)
    assert reply.status_code == 400
    assert (
        reply.json()["error"]["code"],
        reply.json()["error"]["type"],
    ) == ("invalid_request", "invalid_request_error")
    assert word in reply.json()["error"]["message"]
    assert service.evolink.tasks == {}


def test_each_request_that_the_documentation_allows_is_accepted():
    options = {"size": "9:21", "resolution": "4k", "quality": "high", "n": 10, "background": "transparent"}
    links = {"image_urls": ["https://a.example/1.png"] * 16, "mask_url": "http://a.example/m.png"}
    callback = {"callback_url": "https://a.example/" + "x" * 2030, "output_format": "webp"}
    assert objection(SUNSET | options | links | callback | {"prompt": "é" * 32_000}) == ""
    assert objection(SUNSET | {"size": "auto", "callback_url": "https://8.8.8.8:8443/done?x=1"}) == ""


async def test_credits_are_reserved_settled_and_refunded():
    service = Service(keys={"sk-one": 10.0, "sk-poor": 0.1})
    square = SUNSET | {"size": "1:1"}
    cost = price(square, (1024, 1024), 1)

    async def remaining() -> float:
        return (await service.get("/v1/credits")).json()["data"]["user"]["remaining_credits"]

    await service.post(square)
    await service.post(square | {"prompt": "sim:fail"})
    assert 10 - 2 * 3.2 > await remaining() > 10 - 2 * cost - 0.01
    service.clock.now += 8
    assert round(10 - cost, 4) == await remaining()
    refusal = await service.post(square, key="sk-poor")
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (402, "insufficient_quota")
    assert (await service.post(square, key="sk-stranger")).status_code == 401
    assert len(service.evolink.tasks) == 2


async def test_without_a_key_only_images_are_served(service):
    for path in ("/v1/tasks", "/v1/credits", "/v1/models"):
        reply = await service.get(path, key=None)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "unauthorized")
    reply = await service.get("/api/v1/files/quota", key=None)
    assert (reply.status_code, reply.json()["success"]) == (401, False)


async def test_a_task_is_shown_to_its_owner_only(service):
    task_id = (await service.post(SUNSET)).json()["id"]
    polls = {
        (403, "permission_denied"): await service.get(f"/v1/tasks/{task_id}", key="sk-two"),
        (404, "task_not_found"): await service.get("/v1/tasks/task-unified-1-abcdefgh"),
        (400, "invalid_task_id"): await service.get("/v1/tasks/nonsense"),
    }
    for expected, reply in polls.items():
        assert expected == (reply.status_code, reply.json()["error"]["code"])


async def test_the_list_is_newest_first_without_links_and_the_batch_excludes_tasks_of_other_keys(service):
    ids = [(await service.post(SUNSET | {"prompt": f"{word} {k}"})).json()["id"] for k, word in enumerate("abc")]
    other = (await service.post(SUNSET, key="sk-two")).json()["id"]
    service.clock.now += 4
    last = (await service.post(SUNSET)).json()["id"]
    service.clock.now += 4
    page = (await service.get("/v1/tasks", page_size=2)).json()
    assert ([last, ids[2]], 4, 1, 2) == (
        [t["id"] for t in page["data"]],
        *(page[k] for k in ("total", "page", "page_size")),
    )
    finished = (await service.get("/v1/tasks", status="completed", model="gpt-image-2", type="image")).json()
    assert ids[::-1] == [task["id"] for task in finished["data"]]
    assert not any("results" in task or "result_data" in task for task in finished["data"])
    assert [last] == [t["id"] for t in (await service.get("/v1/tasks", status="processing")).json()["data"]]
    async with service.client() as client:
        polled_ids = [ids[0], other, "task-unified-1-abcdefgh", last]
        batch = (await client.post("/v1/tasks/batch", json={"task_ids": polled_ids})).json()["data"]
        assert [(ids[0], "completed"), (last, "processing")] == [(t["id"], t["status"]) for t in batch]
        assert (await client.post("/v1/tasks/batch", json={"task_ids": ids * 20})).status_code == 400


async def test_the_same_idempotency_key_pays_once(service):
    first = await service.post(SUNSET, **{"idempotency-key": "run_1"})
    repeat = await service.post(SUNSET, **{"idempotency-key": "run_1"})
    second = await service.post(WIDE, **{"idempotency-key": "run_1"})
    assert first.json()["id"] == repeat.json()["id"]
    assert repeat.headers["idempotency-replayed"] == "true"
    assert (second.status_code, second.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert len(service.evolink.tasks) == 1
    service_without_keys = Service(honours_idempotency=False)
    for _ in range(2):
        await service_without_keys.post(SUNSET, **{"idempotency-key": "run_1"})
    assert len(service_without_keys.evolink.tasks) == 2


async def test_links_expire_after_24_hours_and_uploads_after_72():
    service = Service(public_url="https://files.evolink.ai")
    _, poll = await service.order("sim:fast", size="1024x640")
    link = poll.json()["results"][0]
    async with service.client() as client:
        image = (await client.get(link)).content
        stored = await client.post("/api/v1/files/upload/stream", files={"file": ("fox 1.png", image)})
        assert stored.json()["success"]
        url = stored.json()["data"]["file_url"]
        assert (url, len(service.evolink.uploads)) == ("https://files.evolink.ai/files/images/fox_1.png", 1)
        service.clock.now += 24 * 3600 - 9
        assert (await client.get(link)).status_code == 200
        service.clock.now += 9
        assert (await client.get(link)).status_code == 403
        assert image == (await client.get(url)).content
        service.clock.now += 48 * 3600
        assert (await client.get(url)).status_code == 404
        assert (await client.get("/api/v1/files/quota")).json()["data"]["used_files"] == 0


async def test_files_are_uploaded_as_base64_or_by_url_and_only_images_are_stored(service):
    png = b"\x89PNG\r\n\x1a\n" + bytes(9)
    async with service.client() as client:
        for text in (base64.b64encode(png).decode(), "data:image/png;base64," + base64.b64encode(png).decode()):
            body = {"base64_data": text, "file_name": "a.png", "upload_path": "refs"}
            data = (await client.post("/api/v1/files/upload/base64", json=body)).json()["data"]
            assert (data["file_size"], data["mime_type"], data["upload_path"]) == (17, "image/png", "refs")
        reply = await client.post("/api/v1/files/upload/url", json={"file_url": "https://a.example/x.png"})
        assert reply.json()["success"]
        assert len(service.evolink.uploads) == 2, "the same name overwrites"
        text = base64.b64encode(b"hello").decode()
        refusal = await client.post("/api/v1/files/upload/base64", json={"base64_data": text})
        assert (refusal.json()["success"], refusal.json()["code"]) == (False, 40002)


@pytest.mark.parametrize(
    ("word", "status", "paid"),
    [
        pytest.param("sim:lost-reply", 502, 1, id="lost reply"),
        pytest.param("sim:503-created", 503, 1, id="503 after all"),
        pytest.param("sim:html", 200, 1, id="HTML"),
        pytest.param("sim:no-id", 200, 1, id="no id"),
        pytest.param("sim:400", 400, 0, id="400"),
        pytest.param("sim:401", 401, 0, id="401"),
        pytest.param("sim:402", 402, 0, id="402"),
        pytest.param("sim:403", 403, 0, id="403"),
        pytest.param("sim:429", 429, 0, id="429"),
        pytest.param("sim:429-always", 429, 0, id="429 for ever"),
        pytest.param("sim:500", 500, 0, id="500"),
    ],
)
async def test_faults_of_the_post_say_whether_a_task_was_paid(service, word, status, paid):
    reply = await service.post(SUNSET | {"prompt": f"a fox, {word}, please"})
    assert (status, paid) == (reply.status_code, len(service.evolink.tasks))
    assert len(service.evolink.requests) == 1
    assert ("1" if status == 429 else None) == reply.headers.get("retry-after")
    assert (word in ("sim:lost-reply", "sim:html")) == reply.headers["content-type"].startswith("text/html")
    repeat = await service.post(SUNSET | {"prompt": f"a fox, {word}, please"})
    assert (200 if word == "sim:429" else status) == repeat.status_code


async def test_a_task_fails_if_its_prompt_orders_it(service):
    ends = {"sim:fail": "content_policy_violation", "sim:fail=generation_timeout": "generation_timeout"}
    for word, code in ends.items():
        task = (await service.order(word))[1].json()
        assert ("failed", code, "task_error") == (task["status"], task["error"]["code"], task["error"]["type"])
    assert (await service.order("sim:cancelled"))[1].json()["status"] == "cancelled"
    raw = (await service.order("sim:surrogate"))[1].content
    assert rb"\ud800" in raw


async def test_words_of_the_prompt_set_the_duration(service):
    assert (await service.order("sim:slow"))[1].json()["status"] == "processing"
    assert (await service.order("sim:slow=7.5"))[1].json()["status"] == "completed"
    assert (await service.post(SUNSET | {"prompt": "sim:done"})).json()["status"] == "completed"
    fast = (await service.post(SUNSET | {"prompt": "sim:fast"})).json()
    assert fast["status"] == "pending"
    assert (await service.get(f"/v1/tasks/{fast['id']}")).json()["status"] == "completed"


async def test_words_of_the_prompt_damage_polls(service):
    for word, status in (("sim:poll-500", 500), ("sim:poll-429", 429)):
        task_id, poll = await service.order(word)
        assert [status, 200] == [poll.status_code, (await service.get(f"/v1/tasks/{task_id}")).status_code]
    assert (await service.order("sim:envelope"))[1].json()["data"]["status"] == "completed"
    unknown_task = (await service.order("sim:unknown-status", "sim:slow=16"))[1].json()
    assert (unknown_task["status"], unknown_task["progress"]) == ("queued_for_gpu", 45)
    task_id, poll = await service.order("sim:backwards", "sim:slow=80")
    before = (await service.get(f"/v1/tasks/{task_id}")).json()["progress"]
    service.clock.now += 16
    steps = [before]
    for _ in range(5):
        service.clock.now += 8
        steps.append((await service.get(f"/v1/tasks/{task_id}")).json()["progress"])
    assert steps != sorted(steps)


async def test_words_of_the_prompt_damage_results(service):
    counts = {"sim:fewer": [1, 1], "sim:duplicate": [4, 3], "sim:no-results": [0, 0]}
    for word, expected in counts.items():
        links = (await service.order(word, n=3))[1].json()["results"]
        assert expected == [len(links), len(set(links))]


async def test_words_of_the_prompt_damage_images(service):
    async def image(word: str, **fields) -> httpx.Response:
        return await service.get((await service.order(word, size="1024x640", **fields))[1].json()["results"][0])

    assert (await image("sim:expired")).status_code == 403
    assert (await image("sim:not-a-picture")).headers["content-type"] == "text/html; charset=utf-8"
    second = (await image("sim:other-size")).content
    assert struct.unpack(">II", second[16:24]) == (512, 320)
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO((await image("sim:truncated-picture")).content)).load()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
async def test_images_have_the_requested_format(service, kind):
    clear = {"background": "transparent"} if kind != "jpeg" else {}
    _, poll = await service.order(size="640x1024", output_format=kind, **clear)
    image = await service.get(poll.json()["results"][0])
    picture = Image.open(io.BytesIO(image.content))
    assert (kind.upper(), (640, 1024), f"image/{kind}") == (picture.format, picture.size, image.headers["content-type"])
    assert ("RGBA" if clear else "RGB") == picture.mode


async def test_every_request_is_recorded_unchanged_even_if_it_is_refused(service):
    await service.post({"prompt": 1}, key=None, **{"X-Mark": "a"})
    async with service.client() as client:
        assert (await client.delete("/v2/nothing")).status_code == 404
    first, second = service.evolink.requests
    assert (first.method, first.path, first.body) == ("POST", "/v1/images/generations", b'{"prompt":1}')
    assert ("a", service.clock.now) == (first.headers["x-mark"], first.at)
    assert (second.method, second.path) == ("DELETE", "/v2/nothing")


def test_every_fault_has_a_word_and_a_meaning():
    words = {word.partition("=")[0] for word in FAULTS}
    modules = (simulation.__file__, app.__file__)
    source = "".join(Path(module).read_text(encoding="utf-8") for module in modules)
    assert all(f'"{word.removeprefix("sim:")}"' in source or word[4:] in REFUSED_AT_ONCE for word in words)
    assert all(FAULTS.values())
