"""generate_images: a series of pictures is one call, one price and one answer. Each picture is its own purchase."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import Open, World
from drawings import noise
from mcp_types import ElicitRequestParams, ElicitResult

from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.studio.prices import price_of
from evolink_mcp.tools.task_answer import ImageOut

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])
ANIMALS = ["a fox", "a hen", "an owl", "a cat", "a dog", "a cow", "a pig", "a bee", "an ant", "a bat"]
SMALL = {"size": "1024x640", "quality": "low"}


def ceiling_of(prompt: str, **arguments: Any) -> float:
    """Return the price ceiling of one picture by the price table."""
    rules: Any = ("anchor-edge", "pixel-budget")
    return price_of(GenerationRequest(prompt=prompt, **{**SMALL, **arguments}), rules)


def bodies(world: World) -> list[dict[str, Any]]:
    """Return the bodies of all purchases that EvoLink received."""
    return [
        json.loads(request.body)
        for request in world.simulator.requests
        if request.method == "POST" and request.path == "/v1/images/generations"
    ]


async def series(world: World, mode: str = "auto", **arguments: Any) -> Any:
    async with world.client(mode) as client:
        return await client.call_tool("generate_images", arguments)


@ERAS
async def test_ten_prompts_bring_ten_saved_pictures_with_ten_posts(world: World, mode: str) -> None:
    answer = await series(world, mode, prompts=ANIMALS, **SMALL)
    facts = answer.structured_content
    assert answer.is_error is False
    assert facts["status"] == "completed"
    assert sorted(body["prompt"] for body in bodies(world)) == sorted(ANIMALS)
    assert all(body == {"model": "gpt-image-2", "prompt": body["prompt"], **SMALL} for body in bodies(world))
    assert [task["prompt"] for task in facts["tasks"]] == ANIMALS
    assert sorted(facts["files"]) == [str(path) for path in world.files]
    assert len(facts["files"]) == 10
    text = answer.content[0].text
    assert text.startswith("10 of 10 pictures are saved")
    assert all(path in text for path in facts["files"])
    assert all(task["task_id"] in text for task in facts["tasks"])
    assert facts["spent"]["credits"] == pytest.approx(sum(task["credits"] for task in facts["tasks"]))
    assert facts["reserved"]["credits"] == 0
    for image in (image for task in facts["tasks"] for image in task["images"]):
        assert set(image) == set(ImageOut.model_fields) - {"error"}
        assert f"{image['bytes']:,} bytes" in text
        names = ("path", "url", "url_expires_at", "sha256", "resource_uri", "markdown")
        assert all(image[name] in text for name in names)
    entries = await world.studio.journal.recent(20)
    assert sorted(entry.request["prompt"] for entry in entries) == sorted(ANIMALS)
    assert all(entry.delivered_at is not None for entry in entries)


async def test_variations_follow_the_common_prompt(world: World) -> None:
    answer = await series(world, prompt="a red car", variations=["in the snow", "at night"], save_as="car.png", **SMALL)
    assert {body["prompt"] for body in bodies(world)} == {"a red car\nin the snow", "a red car\nat night"}
    assert [Path(path).name for path in answer.structured_content["files"]] == ["car-1.png", "car-2.png"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        pytest.param({}, "give prompts, or prompt with variations", id="nothing"),
        pytest.param({"prompt": "a fox"}, "for one picture call generate_image", id="no variations"),
        pytest.param({"prompts": ["a fox"], "prompt": "a hen"}, "give either prompts, or prompt", id="both"),
        pytest.param(
            {"prompts": ["a fox", "a hen", "a  fox "]}, "pictures 1 and 3 have the same prompt", id="repeated"
        ),
        pytest.param({"prompt": "a", "variations": ["b", "b"]}, "same prompt “a b”", id="repeated variation"),
        pytest.param({"prompts": [*ANIMALS, "a yak"]}, "at most 10 items", id="eleven"),
        pytest.param({"prompts": ["a fox", " "]}, "must say something", id="blank prompt"),
        pytest.param(
            {"prompts": ["a fox"], "background": "transparent", "output_format": "jpeg"}, "jpeg has no", id="no alpha"
        ),
        pytest.param(
            {
                "prompts": ["a fox"],
                "image_urls": [f"https://pictures.evolink.ai/{n}.png" for n in range(9)],
                "style_references": [f"https://pictures.evolink.ai/s{n}.png" for n in range(8)],
            },
            "have 17 images together, and the limit is 16",
            id="too many references",
        ),
        pytest.param({"prompts": ["a fox"], "n": 2}, "n: unknown argument", id="n"),
    ],
)
async def test_a_wrong_series_is_refused_in_one_line_and_buys_nothing(
    world: World, arguments: dict[str, Any], text: str
) -> None:
    answer = await series(world, **arguments)
    assert answer.is_error
    assert text in answer.content[0].text
    assert answer.structured_content["error"]["code"] == "invalid_arguments"
    assert world.posts == 0


async def test_style_references_are_added_to_each_purchase_and_uploaded_once(world: World) -> None:
    pictures = world.folder / "pictures"
    pictures.mkdir(exist_ok=True)
    style = pictures / "style.png"
    style.write_bytes(noise((64, 48)))
    remote = "https://pictures.evolink.ai/base.png"
    await series(world, prompts=ANIMALS[:4], image_urls=[remote], style_references=[str(style)], **SMALL)
    uploads = [request for request in world.simulator.requests if "upload" in request.path]
    assert len(uploads) == 1
    urls = [body["image_urls"] for body in bodies(world)]
    assert len(urls) == 4
    assert urls == [[remote, urls[0][1]]] * 4
    assert urls[0][1].startswith("http")


async def test_the_other_pictures_are_delivered_if_some_fail(world: World) -> None:
    prompts = ["a fox", "sim:fail a hen", "sim:402 an owl", "a cat"]
    answer = await series(world, prompts=prompts, **SMALL)
    facts = answer.structured_content
    assert answer.is_error is False
    assert facts["status"] == "partial"
    assert [("error" in task, task["charged"]) for task in facts["tasks"]] == [
        (False, "yes"), (True, "no"), (True, "no"), (False, "yes"),
    ]  # fmt: skip
    assert len(facts["files"]) == len(world.files) == 2
    assert answer.content[0].text.startswith("2 of 4 pictures are saved, 2 failed")
    assert all(task["error"]["message"][1:-1] in answer.content[0].text for task in facts["tasks"] if "error" in task)


async def test_each_unfinished_picture_has_a_next_action_that_completes_it(world: World) -> None:
    prompts = ["sim:slow=1000000 a fox", "sim:slow=1000000 a hen"]
    async with world.client() as client:
        answer = await client.call_tool("generate_images", {"prompts": prompts, "wait_seconds": 0, **SMALL})
        facts = answer.structured_content
        assert facts["status"] == "processing"
        assert facts["reserved"]["credits"] > 0
        assert answer.is_error is False
        for simulated in world.simulator.tasks.values():
            simulated.duration = 0
        for task in facts["tasks"]:
            action = task["next_action"]
            assert action["arguments"] == {"task_id": task["task_id"]}
            assert task["progress"] == 0
            assert f"{task['status']}, 0 %, {task['task_id']}." in answer.content[0].text
            completed_task = await client.call_tool(action["tool"], action["arguments"])
            assert completed_task.structured_content["status"] == "completed"
    assert world.posts == 2


async def test_the_same_series_again_gets_undelivered_pictures_and_buys_only_the_others(world: World) -> None:
    prompts = ["sim:slow=1000000 a fox", "sim:slow=1000000 a hen"]
    async with world.client() as client:
        await client.call_tool("generate_images", {"prompts": prompts, "wait_seconds": 0, **SMALL})
        repeat = await client.call_tool(
            "generate_images", {"prompts": [*prompts, "sim:slow=1000000 an owl"], "wait_seconds": 0, **SMALL}
        )
        assert world.posts == 3
        notes = [task.get("notes", []) for task in repeat.structured_content["tasks"]]
        assert ["earlier identical call" in " ".join(task_notes) for task_notes in notes] == [True, True, False]
        await client.call_tool("generate_images", {"prompts": prompts, "wait_seconds": 0, "force_new": True, **SMALL})
        assert world.posts == 5


# --- money ---------------------------------------------------------------------------------------------------


async def test_max_credits_is_the_limit_of_the_whole_series(world: World) -> None:
    total = sum(ceiling_of(prompt) for prompt in ANIMALS)
    refusal = await series(world, prompts=ANIMALS, max_credits=total - 0.01, **SMALL)
    assert refusal.is_error
    assert "price of 10 pictures" in refusal.content[0].text
    assert world.posts == 0
    high = await series(world, prompts=ANIMALS, max_credits=total * 1.5, size="1024x640", quality="high")
    assert 'The largest that fits for each picture is size="1024x640", quality="low"' in high.content[0].text
    purchase = await series(world, prompts=ANIMALS, max_credits=advised_credits(refusal), **SMALL)
    assert purchase.structured_content["status"] == "completed"
    assert world.posts == 10


def advised_credits(answer: Any) -> float:
    """Return the max_credits that a refusal advises."""
    return float(answer.structured_content["error"]["advice"].partition("max_credits=")[2].split(",")[0])


async def test_the_limit_per_day_counts_the_sum_before_the_first_purchase(open_world: Open) -> None:
    ceiling = ceiling_of("a fox")
    async with open_world({"EVOLINK_MCP_MAX_CREDITS_PER_DAY": str(ceiling * 3.5)}) as world:
        refusal = await series(world, prompts=ANIMALS[:4], **SMALL)
        assert refusal.is_error
        assert "price of 4 pictures" in refusal.content[0].text
        assert refusal.structured_content["error"]["code"] == "over_budget"
        assert world.posts == 0
        assert await world.studio.journal.recent(5) == []
        purchase = await series(world, prompts=ANIMALS[:3], **SMALL)
        assert purchase.structured_content["status"] == "completed"


async def test_an_undelivered_picture_does_not_count_against_the_limit_per_day_again(open_world: Open) -> None:
    ceiling = ceiling_of("sim:slow=1000000 a fox")
    prompts = [f"sim:slow=1000000 {animal}" for animal in ANIMALS[:3]]
    async with open_world({"EVOLINK_MCP_MAX_CREDITS_PER_DAY": str(ceiling * 3.5)}) as world:
        await series(world, prompts=prompts, wait_seconds=0, **SMALL)
        repeat = await series(world, prompts=prompts, wait_seconds=0, **SMALL)
    assert repeat.structured_content["error"] is None
    assert world.posts == 3


async def test_the_limit_per_call_applies_to_each_picture(open_world: Open) -> None:
    ceiling = max(ceiling_of(prompt) for prompt in ANIMALS)
    async with open_world({"EVOLINK_MCP_MAX_CREDITS_PER_CALL": str(ceiling)}) as world:
        assert (await series(world, prompts=ANIMALS, **SMALL)).structured_content["status"] == "completed"
        refusal = await series(world, prompts=["a yak", "a " * 4000], **SMALL)
    assert refusal.is_error
    assert "limit of" in refusal.content[0].text
    assert world.posts == 10


async def test_an_expensive_series_is_confirmed_once(open_world: Open) -> None:
    ceiling = ceiling_of("a fox")
    questions: list[str] = []

    async def ask(context: Any, params: ElicitRequestParams) -> ElicitResult:
        questions.append(params.message)
        return ElicitResult(action="accept", content={"go_ahead": len(questions) == 2})

    async with open_world({"EVOLINK_MCP_CONFIRM_ABOVE": str(ceiling * 2)}) as world:
        refusal = await series(world, prompts=ANIMALS[:3], **SMALL)
        assert refusal.structured_content["error"]["code"] == "confirmation_needed"
        async with asking_client(world, ask) as client:
            declined_answer = await client.call_tool("generate_images", {"prompts": ANIMALS[:3], **SMALL})
            assert declined_answer.structured_content["error"]["code"] == "not_confirmed"
            assert world.posts == 0
            approved_answer = await client.call_tool("generate_images", {"prompts": ANIMALS[:3], **SMALL})
            assert approved_answer.structured_content["status"] == "completed"
            cheap_answer = await client.call_tool("generate_images", {"prompts": ["a yak"], **SMALL})
            assert cheap_answer.structured_content["status"] == "completed"
    assert len(questions) == 2
    assert all("for 3 pictures" in question for question in questions)
    assert world.posts == 4


def asking_client(world: World, ask: Any) -> Any:
    from conftest import TEST_CLIENT
    from mcp.client import Client

    from evolink_mcp.server.server import build_server

    return Client(build_server(world.studio), client_info=TEST_CLIENT, elicitation_callback=ask)


async def test_a_damaged_reference_buys_nothing_of_the_series(world: World) -> None:
    pictures = world.folder / "pictures"
    pictures.mkdir(exist_ok=True)
    (pictures / "style.png").write_bytes(noise((64, 48))[:-40])
    answer = await series(world, prompts=ANIMALS, style_references=[str(pictures / "style.png")], **SMALL)
    assert answer.structured_content["error"]["code"] == "reference_refused"
    assert world.simulator.requests == []


# --- cancellation and progress -------------------------------------------------------------------------------


async def test_a_cancelled_series_is_delivered_by_the_next_identical_call(world: World) -> None:
    arguments = {"prompts": [f"sim:slow=1000000 {animal}" for animal in ANIMALS[:3]], "wait_seconds": 60, **SMALL}
    async with world.client() as client:
        async with anyio.create_task_group() as group:
            group.start_soon(client.call_tool, "generate_images", arguments)
            while len([e for e in await world.studio.journal.recent(5) if e.task_id]) < 3:
                await anyio.sleep(0)
            group.cancel_scope.cancel()
        answer = await client.call_tool("generate_images", {**arguments, "wait_seconds": 0})
    notes = [" ".join(task["notes"]) for task in answer.structured_content["tasks"]]
    assert all("earlier identical call" in note for note in notes)
    assert world.posts == 3


@ERAS
async def test_the_progress_is_the_number_of_finished_pictures_and_always_rises(world: World, mode: str) -> None:
    reports: list[tuple[float, float | None, str | None]] = []

    async def log(progress: float, total: float | None, message: str | None) -> None:
        reports.append((progress, total, message))

    async with world.client(mode) as client:
        await client.call_tool(
            "generate_images", {"prompts": ["a fox", "a hen", "sim:402 an owl"], **SMALL}, progress_callback=log
        )
    values = [progress for progress, _, _ in reports]
    assert all(before < after for before, after in pairwise(values))
    assert {total for _, total, _ in reports} == {3}
    assert (reports[-1][2] or "").startswith("3 of 3 pictures")


async def test_previews_of_a_series_are_small_and_fit_the_host(world: World) -> None:
    answer = await series(world, prompts=ANIMALS, size="2048x1152", quality="low")
    previews = [block for block in answer.content if block.type == "image"]
    assert 1 <= len(previews) <= 10
    assert len(answer.model_dump_json(by_alias=True)) < 700_000


async def test_generate_images_cannot_be_published_without_generate_image(open_world: Open) -> None:
    with pytest.raises(Exception, match="generate_images needs generate_image"):
        async with open_world({"EVOLINK_MCP_TOOLS": "generate_images, get_task"}):
            pass
