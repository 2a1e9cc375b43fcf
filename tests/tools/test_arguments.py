"""Arguments of the tools: a refused call names the fault, sends nothing and costs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import World

pytestmark = pytest.mark.anyio
PROMPT = "A calm sunset"
FAMILY = "\U0001f468‍\U0001f469‍\U0001f467‍\U0001f466"

TWO_URLS = "https://cdn.pixabay.com/a.png, https://cdn.pixabay.com/b.png"

REFUSED = [
    pytest.param({}, "prompt: required", id="no prompt"),
    pytest.param({"prompt": ""}, "at least 1 character", id="empty prompt"),
    pytest.param({"prompt": " \t\n"}, "only white space", id="blank prompt"),
    pytest.param({"prompt": "a" * 32_001}, "at most 32000", id="one code point too many"),
    pytest.param({"prompt": "\ud800"}, "surrogate", id="half a surrogate pair"),
    pytest.param({"prompt": 1.5}, "prompt", id="a number as prompt"),
    pytest.param({"prompt": PROMPT, "n": -1}, "greater than or equal to 1", id="n below"),
    pytest.param(
        {"prompt": PROMPT, "n": 0},
        "n: input should be greater than or equal to 1 (got 0); leave it out for the default",
        id="n of zero",
    ),
    pytest.param({"prompt": PROMPT, "n": 11}, "less than or equal to 10", id="n above"),
    pytest.param({"prompt": PROMPT, "n": "3"}, "n: ", id="n as text"),
    pytest.param({"prompt": PROMPT, "n": True}, "n: ", id="n as boolean"),
    pytest.param({"prompt": PROMPT, "n": 2.5}, "n: ", id="n with a fraction"),
    pytest.param({"prompt": PROMPT, "quality": "hd"}, "'low', 'medium' or 'high'", id="quality of another API"),
    pytest.param({"prompt": PROMPT, "resolution": "8K"}, "'1K', '2K' or '4K'", id="unknown tier"),
    pytest.param(
        {"prompt": PROMPT, "seed": 1}, "seed: unknown argument; gpt-image-2 has no seed", id="unknown argument"
    ),
    pytest.param({"prompt": PROMPT, "sizes": "16:9"}, "did you mean size?", id="misspelt argument"),
    pytest.param({"Prompt": PROMPT}, "did you mean prompt?", id="argument in another case"),
    pytest.param({"promt": PROMPT}, "did you mean prompt?", id="argument with a typo"),
    pytest.param({"prompt": PROMPT, "mode": "edit"}, "mode: unknown argument; leave it out", id="similar spelling"),
    pytest.param({"prompt": PROMPT, "size": "1000x1000"}, "1008x1008", id="illegal size"),
    pytest.param({"prompt": PROMPT, "size": "１６:９"}, "size", id="full-width digits"),
    pytest.param({"prompt": PROMPT, "size": "9" * 1_000_000}, "size", id="a megabyte of nines"),
    pytest.param({"prompt": PROMPT, "callback_url": "http://example.com/h"}, "callback_url", id="plain http callback"),
    pytest.param({"prompt": PROMPT, "callback_url": "https://127.1/h"}, "callback_url", id="short loopback"),
    pytest.param({"prompt": PROMPT, "callback_url": "https://[::ffff:10.0.0.1]/"}, "callback_url", id="v4-mapped"),
    pytest.param(
        {"prompt": PROMPT, "image_urls": ["https://cdn.pixabay.com/a.png"] * 17}, "at most 16", id="17 references"
    ),
    pytest.param({"prompt": PROMPT, "image_urls": ["ftp://cdn.pixabay.com/a.png"]}, "image_urls.0", id="ftp reference"),
    pytest.param({"prompt": PROMPT, "image_urls": ["http://localhost/a.png"]}, "image_urls.0", id="loopback reference"),
    pytest.param(
        {"prompt": PROMPT, "mask_url": "https://cdn.pixabay.com/m.png"},
        "mask_url needs image_urls",
        id="mask without reference",
    ),
    pytest.param(
        {"prompt": PROMPT, "background": "transparent", "output_format": "jpeg"}, "jpeg has no", id="no alpha"
    ),
    pytest.param({"prompt": PROMPT, "wait_seconds": 901}, "wait_seconds", id="wait above the limit"),
    pytest.param(
        {"prompt": PROMPT, "save_as": "../../x.png"}, "outside the allowed folders", id="path outside the folder"
    ),
    pytest.param(
        {"prompt": PROMPT, "aspect_ratio": "16:9"}, "aspect_ratio: unknown argument; did you mean size?", id="ratio"
    ),
    pytest.param({"prompt": PROMPT, "filename": "a.png"}, "did you mean save_as?", id="file name"),
    pytest.param({"prompt": PROMPT, "reference_images": []}, "did you mean image_urls?", id="references"),
    pytest.param({"prompt": PROMPT, "num_images": 2}, "did you mean n?", id="number"),
    pytest.param({"prompt": PROMPT, "negative_prompt": "x"}, "write it into the prompt", id="negative prompt"),
    pytest.param(
        {"prompt": PROMPT, "user": "x"}, "gpt-image-2 has no user, leave it out", id="argument of another API"
    ),
    pytest.param(
        {"prompt": PROMPT, "random_string": "x"},
        "random_string: unknown argument; leave it out",
        id="argument that a host adds",
    ),
    pytest.param(
        {"prompt": PROMPT, "image_urls": TWO_URLS}, "holds two addresses: give a list", id="two URLs in one text"
    ),
    pytest.param(
        {"prompt": PROMPT, "image_urls": [TWO_URLS]}, "holds two addresses: give a list", id="two URLs in one list item"
    ),
    pytest.param(
        {"prompt": PROMPT, "image_urls": ["/mnt/user-data/uploads/a.png"]}, "the sandbox of the chat", id="sandbox"
    ),
    pytest.param(
        {"prompt": PROMPT, "image_urls": ["file:///mnt/data/a.png"]},
        "not on this machine",
        id="file of another machine",
    ),
    pytest.param({"prompt": PROMPT, "api_key": "sk-abcdefghijkl"}, "api_key: unknown argument", id="a key as argument"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
async def test_a_wrong_argument_is_refused_without_a_request(
    world: World, arguments: dict[str, Any], message: str
) -> None:
    with anyio.fail_after(300):
        async with world.client() as client:
            answer = await client.call_tool("generate_image", arguments)
    assert answer.is_error is True
    assert message in answer.content[0].text
    assert len(answer.content[0].text) < 2_000
    assert answer.structured_content["charged"] == "no"
    assert world.simulator.requests == []


ACCEPTED = [
    pytest.param({}, {}, id="the prompt alone, without defaults"),
    pytest.param({"size": "16:9", "resolution": "2K"}, {"size": "16:9", "resolution": "2K"}, id="ratio and tier unchanged"),
    pytest.param({"size": " 1536 X 1024 "}, {"size": "1536x1024"}, id="blanks and case of pixels"),
    pytest.param({"n": 2.0}, {"n": 2}, id="2.0 is 2"),
    pytest.param({"size": "3840×2160"}, {"size": "3840x2160"}, id="multiplication sign"),
    pytest.param({"size": "AUTO"}, {"size": "auto"}, id="auto in capitals"),
    pytest.param({"quality": "HIGH"}, {"quality": "high"}, id="quality in capitals"),
    pytest.param({"size": "3:2", "resolution": "2k"}, {"size": "3:2", "resolution": "2K"}, id="tier in small letters"),
    pytest.param({"size": "1024x1024", "resolution": "4K"}, {"size": "1024x1024"}, id="a tier without effect"),
    pytest.param({"quality": None}, {}, id="null is absent"),
    pytest.param({"callback_url": None, "wait_seconds": None}, {}, id="null of an optional argument"),
    pytest.param({"n": 1}, {"n": 1}, id="an explicit default"),
    pytest.param({"callback_url": "https://8.8.8.8/h"}, {"callback_url": "https://8.8.8.8/h"}, id="public address"),
    pytest.param(
        {"image_urls": '["https://cdn.pixabay.com/a.png"]'}, {"image_urls": ["https://cdn.pixabay.com/a.png"]},
        id="a list as JSON text",
    ),
    pytest.param({"output_format": "webp", "background": "transparent"},
                 {"output_format": "webp", "background": "transparent"}, id="optional fields"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "body_fields"), ACCEPTED)
async def test_the_body_contains_exactly_the_given_arguments(
    world: World, arguments: dict[str, Any], body_fields: dict[str, Any]
) -> None:
    with anyio.fail_after(300):
        async with world.client() as client:
            answer = await client.call_tool("generate_image", {"prompt": PROMPT, "wait_seconds": 0, **arguments})
    assert answer.is_error is False
    body = next(r.body for r in world.simulator.requests if r.path == "/v1/images/generations")
    assert json.loads(body) == {"model": "gpt-image-2", "prompt": PROMPT, **body_fields}


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param("é" * 16_000, id="32,000 code points without normalisation"),
        pytest.param(FAMILY * 4_571, id="graphemes of seven code points"),
        pytest.param("\ufeffstart", id="byte order mark"),
        pytest.param("'; DROP TABLE entries; --", id="SQL"),
        pytest.param("a\x07\x1b[31mred", id="control characters"),
        pytest.param("../../etc/passwd", id="a path"),
    ],
)
async def test_a_prompt_is_sent_unchanged(world: World, prompt: str) -> None:
    with anyio.fail_after(300):
        async with world.client() as client:
            answer = await client.call_tool("generate_image", {"prompt": prompt, "wait_seconds": 0})
    assert answer.is_error is False
    body = next(r.body for r in world.simulator.requests if r.path == "/v1/images/generations")
    assert json.loads(body)["prompt"] == prompt


async def test_a_tier_without_effect_gets_a_note(world: World) -> None:
    async with world.client() as client:
        arguments = {"prompt": PROMPT, "size": "auto", "resolution": "4K", "wait_seconds": 0}
        answer = await client.call_tool("generate_image", arguments)
    assert "resolution has no effect with auto. It was not sent." in answer.structured_content["notes"]


@pytest.mark.parametrize(
    "task_id",
    ["   ", "task-unified-", "../credits", "task-unified-1/../../credits", "task-unified-1?x=1", "task-unified-1#f",
     "//evil.example/task-unified-1", "https://evil.example/task-unified-1", "task-unified-1 2", "{id}", "null",
     "TASK-UNIFIED-1757156493-imcg5zqt", "task-unified-\u017f", "evolink://tasks/Task-unified-1"],
)  # fmt: skip
async def test_an_invalid_task_id_sends_no_request(world: World, task_id: str) -> None:
    async with world.client() as client:
        answer = await client.call_tool("get_task", {"task_id": task_id})
    assert answer.is_error is True
    assert world.simulator.requests == []


async def test_blanks_around_a_task_id_are_trimmed_and_an_unknown_task_is_not_found(world: World) -> None:
    async with world.client() as client:
        answer = await client.call_tool("get_task", {"task_id": " task-unified-1757156493-imcg5zqt\n"})
    assert answer.structured_content["error"]["code"] == "not_found"
    assert [r.path for r in world.simulator.requests] == ["/v1/tasks/task-unified-1757156493-imcg5zqt"]


async def test_compute_size_needs_no_key_no_network_and_no_folder(open_world: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    environ = {
        "EVOLINK_API_KEY": "",
        "EVOLINK_MCP_DATA_DIR": str(tmp_path / "file" / "data"),
        "EVOLINK_MCP_OUTPUT_DIR": str(tmp_path / "file" / "pictures"),
    }
    async with open_world(environ) as world, world.client() as client:
        answer = await client.call_tool("compute_size", {"size": "16:9", "resolution": "2K"})
        refusal = await client.call_tool("generate_image", {"prompt": PROMPT})
    assert (answer.structured_content["width"], answer.structured_content["height"]) == (2048, 1152)
    assert "EVOLINK_API_KEY" in refusal.content[0].text
    assert world.simulator.requests == []


@pytest.mark.parametrize(
    ("quality", "tokens", "credits"), [("low", 196, 0.3599), ("medium", 1756, 3.2241), ("high", 7024, 12.8961)]
)
async def test_compute_size_returns_the_price(world: World, quality: str, tokens: int, credits: float) -> None:
    async with world.client() as client:
        answer = await client.call_tool("compute_size", {"size": "1024x1024", "quality": quality})
    facts = answer.structured_content
    assert (facts["estimated_tokens"], facts["estimated_credits"]) == (tokens, credits)


async def test_compute_size_finds_a_size_for_a_target(world: World) -> None:
    async with world.client() as client:
        answer = await client.call_tool("compute_size", {"width": 1200, "height": 628})
    facts = answer.structured_content
    assert facts["explicit_size"] == "1200x640"
    assert facts["crop"] == {"left": 0, "top": 6, "width": 1200, "height": 628}
    assert facts["closest_ratio"] == "2:1"
