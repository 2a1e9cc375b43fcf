"""generate_images: buy a series of up to ten pictures with one call, one price and one confirmation."""
# Without `from __future__ import annotations`: the SDK reads the annotations of the nested functions at run time.

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import PurePath
from typing import Annotated, Any, Self

import anyio
from mcp.server.elicitation import ElicitationResult
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.resolve import Elicit, Resolve
from mcp.server.mcpserver.tools import Tool
from mcp_types import CallToolResult
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from evolink_mcp.api import costs
from evolink_mcp.api.request import (
    REFERENCES_MAX,
    Arguments,
    Background,
    GenerationRequest,
    ImageUrls,
    OrNull,
    OutputFormat,
    Quality,
    Resolution,
    checked_prompt,
    checked_size,
    list_of,
    size_argument,
)
from evolink_mcp.errors import EvolinkError, OverBudget
from evolink_mcp.sanitize import quoted
from evolink_mcp.studio.jobs import ImageRequest, Job
from evolink_mcp.studio.limits import largest_text
from evolink_mcp.studio.prices import Prices
from evolink_mcp.tools.adapter import PAID, flat_tool, result
from evolink_mcp.tools.paid_calls import (
    Confirm,
    Credits,
    ForceNew,
    argument_notes,
    can_ask,
    check_confirmation,
    confirm_without_question,
    needs_approval,
)
from evolink_mcp.tools.previews import previews
from evolink_mcp.tools.series_answer import SeriesOut, refusal_of_series, series_out, series_text
from evolink_mcp.tools.task_answer import refusal_out, split_price_changes
from evolink_mcp.tools.task_text import count_of_pictures
from evolink_mcp.tools.waiting import JOURNAL_MIN_S, Report, Waiting, WaitSeconds, buyer_of, follow

PICTURES_MAX = 10
PROMPT_MAX_CHARS = 60
# The arguments that every purchase of the series gets unchanged.
SHARED = ("size", "resolution", "quality", "background", "output_format")

AS_IN_ONE = "See generate_image."
# The type publishes no limits of each prompt, because the tool list has a size limit.
ShortPrompt = Annotated[str, AfterValidator(checked_prompt), Field(description="Instead of prompts: common part.")]
PixelText = Annotated[str, BeforeValidator(size_argument), AfterValidator(checked_size)]
Prompts = Annotated[
    list[Annotated[str, AfterValidator(checked_prompt)]],
    BeforeValidator(list_of),
    Field(max_length=PICTURES_MAX),
]


class GenerateImagesArguments(Arguments):
    """The arguments of generate_images: the prompts, and the arguments that all pictures share."""

    prompts: Annotated[Prompts, Field(description="One per picture, all different.")] | OrNull = None
    prompt: ShortPrompt | OrNull = None
    variations: Annotated[Prompts, Field(description="Texts added to prompt, one per picture.")] | OrNull = None
    image_urls: Annotated[ImageUrls, Field(description=AS_IN_ONE)] | OrNull = None
    style_references: Annotated[ImageUrls, Field(description="Added to image_urls: a style or character.")] | OrNull = (
        None
    )
    size: Annotated[PixelText, Field(description=AS_IN_ONE)] | OrNull = None
    resolution: Annotated[Resolution, Field(description=AS_IN_ONE)] | OrNull = None
    quality: Annotated[Quality, Field(description=AS_IN_ONE)] | OrNull = None
    background: Annotated[Background, Field(description=AS_IN_ONE)] | OrNull = None
    output_format: Annotated[OutputFormat, Field(description=AS_IN_ONE)] | OrNull = None
    save_as: Annotated[str | OrNull, Field(description="File name; -1, -2 … is added.")] = None
    wait_seconds: Annotated[WaitSeconds, Field(description=AS_IN_ONE)] | OrNull = None
    max_credits: Annotated[Credits, Field(description="Highest charge of all.")] | OrNull = None
    force_new: Annotated[ForceNew, Field(description=AS_IN_ONE)] = False

    @property
    def all_prompts(self) -> list[str]:
        """The prompt of each picture. A variation follows the common prompt on a new line."""
        if self.prompts is not None:
            return list(self.prompts)
        return [f"{self.prompt}\n{variation}" for variation in self.variations or ()]

    @property
    def requests(self) -> list[GenerationRequest]:
        """The request of each picture."""
        references = [*(self.image_urls or ()), *(self.style_references or ())]
        # EvoLink gets only the caller's arguments, so an omitted one must stay unset.
        shared = {name: getattr(self, name) for name in SHARED if name in self.model_fields_set}
        if references:
            shared["image_urls"] = references
        return [GenerationRequest(prompt=prompt, **shared) for prompt in self.all_prompts]

    def file_name(self, number: int) -> str | None:
        """Return the file name of a picture: hero-1.png for number 1 of hero.png."""
        if self.save_as is None:
            return None
        path = PurePath(self.save_as)
        return self.save_as.removesuffix(path.name) + f"{path.stem}-{number}{path.suffix}"

    @model_validator(mode="after")
    def _is_one_series(self) -> Self:
        if self.prompts is not None and (self.prompt is not None or self.variations is not None):
            raise ValueError("give either prompts, or prompt with variations")
        if self.prompts is None and (self.prompt is None or self.variations is None):
            raise ValueError("give prompts, or prompt with variations; for one picture call generate_image")
        seen: dict[str, int] = {}
        for number, prompt in enumerate(self.all_prompts, start=1):
            # A model that repeats a prompt by mistake would pay for two pictures of one request.
            first = seen.setdefault(" ".join(prompt.split()), number)
            if first != number:
                raise ValueError(
                    f"pictures {first} and {number} have the same prompt {quoted(prompt, PROMPT_MAX_CHARS)}: change one of "
                    "them, or call generate_image with n for several pictures of one prompt"
                )
        count = len(self.image_urls or ()) + len(self.style_references or ())
        if count > REFERENCES_MAX:
            raise ValueError(
                f"image_urls and style_references have {count} images together, and the limit is {REFERENCES_MAX}"
            )
        try:
            _ = self.requests
        # A ValidationError inside a validator would become a dump of all faults in the message.
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            raise ValueError(str(fault.get("ctx", {}).get("error", fault["msg"]))) from None
        return self


def generate_images_tool(waiting: Waiting) -> Tool:
    """Return the tool."""
    studio = waiting.studio

    async def priced_orders(req: GenerateImagesArguments, ctx: Context[Any, Any]) -> list[ImageRequest]:
        prices = await studio.prices.refresh(wait_max_s=JOURNAL_MIN_S)
        client = buyer_of(ctx)
        orders = [
            ImageRequest(request, prices.ceiling(request), req.file_name(number), None, req.force_new, client)
            for number, request in enumerate(req.requests, start=1)
        ]
        return _with_limits(orders, req.max_credits, prices)

    def confirm(
        req: GenerateImagesArguments,
        orders: Annotated[list[ImageRequest], Resolve(priced_orders)],
        ctx: Context[Any, Any],
    ) -> Confirm | Elicit[Confirm]:
        ceiling = _ceiling(orders)
        if can_ask(ctx) and needs_approval(ceiling, studio):
            price = costs.format_credits(ceiling)
            return Elicit(f"This will cost at most {price} for {count_of_pictures(len(orders))}. Go ahead?", Confirm)
        return confirm_without_question(ceiling, req.max_credits, studio)

    async def generate_images(
        req: GenerateImagesArguments,
        ctx: Context[Any, Any],
        orders: Annotated[list[ImageRequest], Resolve(priced_orders)],
        confirmed: Annotated[ElicitationResult[Confirm], Resolve(confirm)],
    ) -> CallToolResult:
        """Make up to 10 different pictures in one call. PAID: each is a purchase. Waits and saves like generate_image. For
        an unfinished picture call its next_action, never this tool again. Show the user all paths."""
        check_confirmation(confirmed, _ceiling(orders), studio, ctx)
        outcomes: list[Job | EvolinkError] = []
        async with AsyncExitStack() as stack:
            with waiting.call(ctx, req.wait_seconds) as ends_at:
                for prepared in await studio.prepare_series(orders):
                    try:
                        outcomes.append(await stack.enter_async_context(studio.ordered(prepared.request, prepared)))
                    except EvolinkError as error:
                        # Earlier pictures of the series are bought already, so their answer must not be lost.
                        outcomes.append(error)
            notes = argument_notes(orders[0].request, req.save_as, studio)
            return await _answer(waiting, orders, outcomes, ends_at, ctx, notes)

    return flat_tool(
        generate_images,
        GenerateImagesArguments,
        SeriesOut,
        _format_series_error,
        title="Generate images",
        annotations=PAID,
    )


def _ceiling(orders: Sequence[ImageRequest]) -> float:
    """Return the price ceiling of the series in credits."""
    return round(sum(order.price_ceiling for order in orders), 4)


def _with_limits(orders: list[ImageRequest], max_credits: float | None, prices: Prices) -> list[ImageRequest]:
    """Return the orders, each with its share of the caller's limit. So a new price cannot exceed the limit of the series.

    Raises:
        OverBudget: the price ceiling of the series is above the limit. Names the largest size and quality that fit.
    """
    ceiling = _ceiling(orders)
    if max_credits is None:
        return orders
    if ceiling > max_credits:
        # The longest prompt costs most, because the shared arguments are equal.
        longest = max(orders, key=lambda order: order.price_ceiling)
        largest = largest_text(longest, prices, max_credits / len(orders), is_series=len(orders) > 1)
        raise OverBudget(
            f"the computed price of {count_of_pictures(len(orders))} is at most {costs.format_credits(ceiling)}, above "
            f"max_credits={max_credits:g}",
            advice=f"Ask the user; then call again with max_credits={ceiling:g}, fewer prompts, or a smaller size or "
            f"quality. {largest}",
        )
    # The spending check of each purchase computes its ceiling again, perhaps with a new price.
    shares = [max_credits * order.price_ceiling / ceiling if ceiling else 0.0 for order in orders]
    # Rounding could put a share below its own ceiling, and the picture would be refused.
    return [
        replace(order, max_credits=max(share, order.price_ceiling)) for order, share in zip(orders, shares, strict=True)
    ]


async def _answer(
    waiting: Waiting,
    orders: Sequence[ImageRequest],
    outcomes: Sequence[Job | EvolinkError],
    ends_at: float,
    ctx: Context[Any, Any],
    notes: list[str],
) -> CallToolResult:
    """Wait for all jobs until `ends_at` and return their states as the answer. The jobs continue after the wait."""
    studio = waiting.studio
    host = waiting.host_of(ctx)
    jobs = [outcome for outcome in outcomes if isinstance(outcome, Job)]
    await follow_all(outcomes, ends_at, ctx.report_progress)
    tasks = [
        await waiting.task_of(outcome, outcome.entry, is_deduplicated=outcome.is_deduplicated)
        if isinstance(outcome, Job)
        else refusal_out(outcome)
        for outcome in outcomes
    ]
    bill_texts, rule_texts = split_price_changes(await studio.take_price_changes())
    prompts = [order.request.prompt for order in orders]
    reserved = sum(job.entry.reserved for job in jobs)
    out = series_out(prompts, tasks, reserved, _ceiling(orders), bill_texts, [*notes, *rule_texts])
    edge = waiting.preview_edge_for(host)
    files = [file for job in jobs for file in await waiting.files_of(job.entry)] if edge != 0 else []
    text = series_text(out)
    room = host.answer_max - len(text) - 3 * len(out.model_dump_json())
    images = await previews(files, edge, room, studio.image_store.decoder)
    # A failure before this line leaves the pictures undelivered, so an identical call gets them.
    for job in jobs:
        if job.is_finished and job.problem is None and job.entry.has_result:
            await waiting.hand_over(job, ctx)
    return result(text, out, *images, is_error=out.error is not None)


async def follow_all(outcomes: Sequence[Job | EvolinkError], ends_at: float, report: Report) -> None:
    """Return at `ends_at` (anyio's clock) or when all jobs are finished. An error counts as finished."""
    progress = SeriesProgress(report, len(outcomes))

    async def follow_one(number: int, outcome: Job | EvolinkError) -> None:
        if isinstance(outcome, Job):
            await follow(outcome, ends_at, progress.of(number))
        if isinstance(outcome, EvolinkError) or outcome.is_finished:
            await progress.finish(number)

    async with anyio.create_task_group() as group:
        for number, outcome in enumerate(outcomes):
            group.start_soon(follow_one, number, outcome)


class SeriesProgress:
    """The progress of a series: the number of finished pictures of all. Each value is above the one before."""

    def __init__(self, report: Report, count: int) -> None:
        self._report = report
        self._shares = [0.0] * count
        self._lock = anyio.Lock()

    def of(self, number: int) -> Report:
        """Return the function that receives the progress of one picture."""

        async def report(progress: float, total: float, message: str) -> None:
            await self._set(number, progress / total, f": {message}")

        return report

    async def finish(self, number: int) -> None:
        """Count a picture as finished. A refused picture has reported no progress."""
        if self._shares[number] < 1:
            await self._set(number, 1.0)

    async def _set(self, number: int, share: float, message: str = "") -> None:
        async with self._lock:  # the notifications must leave in the order of their values
            self._shares[number] = share
            done = len([each for each in self._shares if each >= 1])
            count = len(self._shares)
            await self._report(round(sum(self._shares), 6), count, f"{done} of {count} pictures finished{message}")


def _format_series_error(error: EvolinkError, _: tuple[str, ...]) -> CallToolResult:
    out = refusal_of_series(error)
    return result(series_text(out), out, is_error=True)
