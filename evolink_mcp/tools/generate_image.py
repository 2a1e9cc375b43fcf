"""generate_image: buy images, wait for them and save them."""
# Without `from __future__ import annotations`: the SDK reads the annotations of the nested functions at run time.

from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Annotated, Any, Self

from mcp.server.elicitation import ElicitationResult
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.resolve import Elicit, Resolve
from mcp.server.mcpserver.tools import Tool
from mcp_types import CallToolResult
from pydantic import AfterValidator, Field, model_validator

from evolink_mcp.api import costs, sizes
from evolink_mcp.api.request import GenerationRequest, OrNull, is_file
from evolink_mcp.api.targets import parse_target
from evolink_mcp.api.urls import host_of
from evolink_mcp.sanitize import quoted
from evolink_mcp.studio.jobs import ImageRequest
from evolink_mcp.studio.studio import Studio
from evolink_mcp.tools.adapter import PAID, flat_tool
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
from evolink_mcp.tools.previews import GALLERY_META
from evolink_mcp.tools.task_answer import TaskOut
from evolink_mcp.tools.waiting import JOURNAL_MIN_S, Waiting, WaitSeconds, buyer_of, format_task_error


def _fit(text: str) -> str:
    """Return the text if it is a target."""
    parse_target(text)
    return text


Fit = Annotated[
    str,
    AfterValidator(_fit),
    Field(description="Exact target instead of size: 1200x628, og. Buys the size that covers it."),
]


class GenerateImageArguments(GenerationRequest):
    """The arguments of generate_image: the API's fields and five of this server."""

    fit: Fit | OrNull = None
    wait_seconds: WaitSeconds | OrNull = None
    save_as: Annotated[
        str | OrNull, Field(description="File name, or path in an allowed folder. Never overwrites.")
    ] = None
    max_credits: Credits | OrNull = None
    force_new: ForceNew = False

    @model_validator(mode="after")
    def _fit_chooses_the_size(self) -> Self:
        # The request in an answer has the computed size beside fit, and a caller may send it again.
        if self.cover is not None and self.size not in ("auto", str(self.cover.size)):
            raise ValueError(f"fit chooses the size: leave size out. For fit '{self.fit}' it is {self.cover.size}")
        return self

    @property
    def cover(self) -> sizes.Cover | None:
        """The way from a legal size to the target of `fit`, as compute_size returns it."""
        if self.fit is None:
            return None
        target = parse_target(self.fit).size
        return sizes.cover(target.width, target.height, limits=self.image_model.limits)

    def sized(self) -> Self:
        """Return the request to send: `fit` sets the size."""
        return self if self.cover is None else self.model_copy(update={"size": str(self.cover.size)})


def generate_image_tool(waiting: Waiting) -> Tool:
    """Return the tool."""
    studio = waiting.studio
    approved: set[tuple[str, str]] = set()  # (local file, callback host) that the user has approved

    # The SDK runs resolvers again after the user's answer, so they must not buy or record anything.
    async def priced_order(req: GenerateImageArguments) -> ImageRequest:
        # Resolvers run before the tool, so the deadline of the call does not limit this read yet.
        prices = await studio.prices.refresh(wait_max_s=JOURNAL_MIN_S)
        request = req.sized()
        fit = None if req.fit is None else parse_target(req.fit).name
        return ImageRequest(request, prices.ceiling(request), req.save_as, req.max_credits, req.force_new, fit=fit)

    def confirm(
        req: GenerateImageArguments, order: Annotated[ImageRequest, Resolve(priced_order)], ctx: Context[Any, Any]
    ) -> Confirm | Elicit[Confirm]:
        is_expensive = needs_approval(order.price_ceiling, studio)
        # An injected prompt could send an edit of a private file to a host of its choice.
        disclosures = _disclosures(req) - approved
        if can_ask(ctx) and (is_expensive or disclosures):
            price = f"This will cost at most {costs.format_credits(order.price_ceiling)}. " if is_expensive else ""
            return Elicit(f"{price}{_disclosure_text(disclosures)}Go ahead?", Confirm)
        return confirm_without_question(order.price_ceiling, req.max_credits, studio)

    async def generate_image(
        req: GenerateImageArguments,
        ctx: Context[Any, Any],
        order: Annotated[ImageRequest, Resolve(priced_order)],
        confirmed: Annotated[ElicitationResult[Confirm], Resolve(confirm)],
    ) -> CallToolResult:
        """Make or edit images with EvoLink's gpt-image-2. PAID: every call is billed. Waits, saves the files and returns
        paths, URLs (valid 24 h), sizes and a preview. If the wait ends first, call get_task with the returned task_id.
        Never call generate_image again for the same picture. To edit, give image_urls. Show the user the path
        and the markdown line."""
        check_confirmation(confirmed, order.price_ceiling, studio, ctx)
        # Only after the confirmation, because a refused call must ask again.
        approved.update(_disclosures(req))
        async with AsyncExitStack() as stack:
            # The deadline ends with the preparation. The call stays registered with its job until the answer is built.
            with waiting.call(ctx, req.wait_seconds) as ends_at:
                job = await stack.enter_async_context(studio.ordered(replace(order, client=buyer_of(ctx))))
            return await waiting.answer(
                job,
                ends_at,
                ctx,
                _notes(req, order, studio),
                is_deduplicated=job.is_deduplicated,
                fit=order.fit,
            )

    return flat_tool(
        generate_image,
        GenerateImageArguments,
        TaskOut,
        format_task_error,
        title="Generate image",
        annotations=PAID,
        meta=GALLERY_META,
        has_nested_fields=True,
    )


def _notes(req: GenerateImageArguments, order: ImageRequest, studio: Studio) -> list[str]:
    notes = argument_notes(order.request, order.save_as, studio)
    if (cover := req.cover) is not None:
        copy = "An exact copy is saved beside it."
        if not studio.image_store.is_permanent:
            scaled = f"scale it by {cover.scale:.4g}, then " if cover.scale != 1 else ""
            copy = (
                f"This server saves no copy. For exactly {cover.crop}: {scaled}crop it at ({cover.left}, {cover.top})."
            )
        notes.insert(0, f"fit buys {cover.size}. {copy}")
    return notes


def _disclosures(req: GenerateImageArguments) -> set[tuple[str, str]]:
    """Return each local file that the call would send, with the callback host that would get the result."""
    if req.callback_url is None:
        return set()
    host = host_of(req.callback_url)
    return {(source, host) for source in (*(req.image_urls or ()), req.mask_url or "") if is_file(source)}


def _disclosure_text(disclosures: set[tuple[str, str]]) -> str:
    if not disclosures:
        return ""
    files = " and ".join(quoted(source, 120) for source, _ in sorted(disclosures))
    (host,) = {host for _, host in disclosures}
    return f"It sends your file {files} to EvoLink, and the URL of the result to {quoted(host, 120)}. "
