"""The server spends only what the caller, the owner and the user allow. It checks this before it sends anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from conftest import Clock, Open, World
from faulty_gateway import CURRENT, ONE_SERVER, QuickSimulator
from mcp.client import Client
from mcp_types import ElicitResult

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("in_time")]

# 1024x1024 low is 196 tokens (0.3599 credits), medium 1756 (3.2241), high 7024 (12.8961); the prompt adds at most 14
# tokens (0.0043). What caps judge is rounded up to a hundredth.
REQUEST = {"prompt": "sim:fast a fox", "size": "1:1", "quality": "low"}
LOW, HIGH = 0.37, 12.91
CHARGED = 0.3612
ERAS = pytest.mark.parametrize("mode", ["auto", "legacy"])


@pytest.fixture
def open_limited(open_world: Open) -> Callable[..., Any]:
    """Return a function that opens a world with limits, in which a purchase takes no time."""

    def open_one(clock: Clock | None = None, **limits: float) -> Any:
        clock = clock or Clock()
        environ = {f"EVOLINK_MCP_{name.upper()}": str(value) for name, value in limits.items()}
        return open_world(environ, simulator=QuickSimulator(clock=clock, duration_s=0), clock=clock)

    return open_one


async def buy(world: World, **options: Any) -> Any:
    CURRENT.studio = world.studio
    async with Client(ONE_SERVER) as client:
        return await client.call_tool("generate_image", {**REQUEST, **options})


def refusal_text(answer: Any, code: str) -> str:
    """Check that the refusal cost nothing. Return its text."""
    facts = answer.structured_content
    assert (answer.is_error, facts["charged"], facts["task_id"], facts["error"]["code"]) == (True, "no", None, code)
    assert "Charged: no" in answer.content[0].text
    return answer.content[0].text


@pytest.mark.parametrize(
    ("max_credits", "posts"),
    [(0, 0), (0.369, 0), pytest.param(LOW, 1, id="exactly the price"), (5, 1)],
)
async def test_a_call_costs_no_more_than_its_caller_allows(open_limited: Any, max_credits: float, posts: int) -> None:
    async with open_limited() as world:
        answer = await buy(world, max_credits=max_credits)
    assert world.posts == posts
    if not posts:
        text = refusal_text(answer, "over_budget")
        assert f"{LOW:g} credits" in text
        assert f"max_credits={LOW:g}" in text


async def test_the_price_a_refusal_names_is_the_one_that_is_accepted(open_limited: Any) -> None:
    async with open_limited() as world:
        for quality in ("low", "medium", "high"):
            for n in (1, 3):
                text = refusal_text(await buy(world, quality=quality, n=n, max_credits=0), "over_budget")
                price = float(text.partition("with max_credits=")[2].split(",")[0])
                assert not (await buy(world, quality=quality, n=n, max_credits=price)).is_error


async def test_the_limit_per_call_applies_although_the_caller_allows_more(open_limited: Any) -> None:
    async with open_limited(max_credits_per_call=1) as world:
        text = refusal_text(await buy(world, quality="high", max_credits=100), "over_budget")
        assert not (await buy(world)).is_error
    assert "EVOLINK_MCP_MAX_CREDITS_PER_CALL" in text
    assert world.posts == 1


async def test_the_daily_limit_ends_after_a_day(open_limited: Any) -> None:
    clock = Clock()
    async with open_limited(clock, max_credits_per_day=2 * CHARGED + 0.01) as world:
        assert not (await buy(world)).is_error
        assert not (await buy(world)).is_error
        text = refusal_text(await buy(world), "over_budget")
        clock.now += 86_400
        assert not (await buy(world)).is_error
    assert "EVOLINK_MCP_MAX_CREDITS_PER_DAY" in text
    assert world.posts == 3


async def test_simultaneous_calls_do_not_exceed_the_daily_limit(open_limited: Any) -> None:
    answers: list[Any] = []
    async with open_limited(max_credits_per_day=3 * LOW + 0.01) as world, world.client() as client:

        async def buy_one() -> None:
            answers.append(await client.call_tool("generate_image", REQUEST))

        async with anyio.create_task_group() as calls:
            for _ in range(8):
                calls.start_soon(buy_one)
    assert sum(not answer.is_error for answer in answers) == 3
    assert world.posts == 3


async def test_failed_and_refused_requests_do_not_count_for_the_daily_limit(open_limited: Any) -> None:
    async with open_limited(max_credits_per_day=LOW + 0.05) as world:
        for prompt in ("sim:fail a fox", "sim:402 a fox", "sim:cancelled a fox"):
            assert (await buy(world, prompt=prompt)).is_error
        # A cancelled task's refund is not known for certain: its estimate stays reserved.
        refusal_text(await buy(world), "over_budget")


async def test_the_daily_sum_has_the_charges_of_evolink(open_limited: Any) -> None:
    async with open_limited() as world, world.client() as client:
        first = await client.call_tool("generate_image", REQUEST)
        await client.call_tool("generate_image", {**REQUEST, "prompt": "sim:fail a fox"})
        task_list = await client.call_tool("list_tasks", {})
    assert task_list.structured_content["spent"]["today"]["credits"] == first.structured_content["credits"]
    assert f"today {first.structured_content['credits']:g}" in task_list.content[0].text


async def test_a_second_delivery_does_not_count_for_the_daily_limit(open_limited: Any) -> None:
    clock = Clock()
    async with open_limited(clock, max_credits_per_day=LOW + 0.01) as world:
        world.simulator.duration_s = 500
        await buy(world, wait_seconds=0)
        repeat = await buy(world)
    assert not repeat.is_error
    assert world.posts == 1


# --- confirmation by the user --------------------------------------------------------------------------------


class User:
    """A user whose host can ask. Records every question."""

    def __init__(self, action: Any, go_ahead: bool = True) -> None:
        self.questions: list[str] = []
        self._answer = ElicitResult(action=action, content={"go_ahead": go_ahead} if action == "accept" else None)

    async def __call__(self, context: Any, params: Any) -> ElicitResult:
        self.questions.append(params.message)
        return self._answer


async def ask(world: World, mode: str, user: User | None, **options: Any) -> Any:
    CURRENT.studio = world.studio
    async with Client(ONE_SERVER, mode=mode, elicitation_callback=user) as client:
        return await client.call_tool("generate_image", {**REQUEST, **options})


@ERAS
@pytest.mark.parametrize(
    ("user", "posts"),
    [
        pytest.param(("accept", True), 1, id="yes"),
        pytest.param(("accept", False), 0, id="accepted with no"),
        pytest.param(("decline",), 0, id="declined"),
        pytest.param(("cancel",), 0, id="dismissed"),
    ],
)
async def test_the_user_is_asked_once_before_much_is_spent(open_limited: Any, mode: str, user: Any, posts: int) -> None:
    user_at_host = User(*user)
    async with open_limited(confirm_above=1) as world:
        answer = await ask(world, mode, user_at_host, quality="high")
    assert len(user_at_host.questions) == 1
    assert f"{HIGH:g} credits" in user_at_host.questions[0]
    assert world.posts == posts
    if posts:
        assert answer.structured_content["charged"] == "yes"
    else:
        assert "did not approve" in refusal_text(answer, "not_confirmed")


@ERAS
async def test_max_credits_does_not_replace_the_confirmation_of_a_user(open_limited: Any, mode: str) -> None:
    """A model must not accept a price instead of a user who can refuse it."""
    user_at_host = User("decline")
    async with open_limited(confirm_above=1) as world:
        refusal_text(await ask(world, mode, user_at_host, quality="high", max_credits=100), "not_confirmed")
    assert (len(user_at_host.questions), world.posts) == (1, 0)


@ERAS
async def test_a_low_price_needs_no_confirmation(open_limited: Any, mode: str) -> None:
    user_at_host = User("decline")
    async with open_limited(confirm_above=LOW) as world:
        answer = await ask(world, mode, user_at_host)
    assert (answer.is_error, user_at_host.questions, world.posts) == (False, [], 1)


@ERAS
async def test_a_host_that_cannot_ask_gets_the_next_step(open_limited: Any, mode: str) -> None:
    async with open_limited(confirm_above=1) as world:
        text = refusal_text(await ask(world, mode, None, quality="high"), "confirmation_needed")
        assert f"call again with max_credits={HIGH:g}" in text
        assert world.posts == 0
        refusal_text(await ask(world, mode, None, quality="high", max_credits=HIGH - 1), "confirmation_needed")
        answer = await ask(world, mode, None, quality="high", max_credits=HIGH)
    assert (answer.is_error, world.posts) == (False, 1)


@ERAS
async def test_the_limits_apply_although_the_user_confirms(open_limited: Any, mode: str) -> None:
    async with open_limited(confirm_above=1, max_credits_per_call=5) as world:
        refusal_text(await ask(world, mode, User("accept"), quality="high"), "over_budget")
    assert world.posts == 0
