"""generate_image: buy pictures, wait for them, save them. The only tool that spends credits."""
# No `from __future__ import annotations` here: the SDK reads the annotations of the nested functions at run time.

from typing import Annotated, Any

from mcp.server.elicitation import AcceptedElicitation, ElicitationResult
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.resolve import Elicit, Resolve
from mcp.server.mcpserver.tools import Tool
from mcp_types import CallToolResult
from pydantic import BaseModel, Field, Strict

from evolink_mcp.api import sizes
from evolink_mcp.api.costs import Price
from evolink_mcp.api.request import GenerationRequest, OrNull
from evolink_mcp.errors import OverBudget
from evolink_mcp.studio.jobs import Order
from evolink_mcp.studio.purchase import price_of
from evolink_mcp.tools.adapter import PAID, flat_tool
from evolink_mcp.tools.previews import GALLERY_META
from evolink_mcp.tools.task_answer import TaskOut
from evolink_mcp.tools.waiting import Waiting, WaitSeconds, refuse_task

Credits = Annotated[
    float, Strict(), Field(ge=0, description="Refuse, before anything is sent, if it costs more credits.")
]


class GenerateImageArguments(GenerationRequest):
    """generate_image: the API's fields and ours."""

    wait_seconds: WaitSeconds | OrNull = None
    save_as: Annotated[
        str | OrNull, Field(description="File name, or path inside an allowed folder; never overwrites.")
    ] = None
    max_credits: Credits | OrNull = None
    force_new: Annotated[
        bool,
        Strict(),
        Field(description="Buy even if an identical earlier picture was paid but never delivered."),
    ] = False


class Confirm(BaseModel):
    """What the user is asked before a call above EVOLINK_MCP_CONFIRM_ABOVE."""

    go_ahead: bool = Field(title="Go ahead", description="Spend these credits")


def generate_image_tool(waiting: Waiting) -> Tool:
    """The tool over one studio."""
    studio = waiting.studio

    def priced(req: GenerateImageArguments) -> Order:
        return Order(req, price_of(req, studio.rule), req.save_as, req.max_credits, req.force_new)

    def confirm_cost(
        req: GenerateImageArguments, order: Annotated[Order, Resolve(priced)], ctx: Context[Any, Any]
    ) -> Confirm | Elicit[Confirm]:
        cost, limit = order.price, studio.budget.confirm_above
        if limit is None or cost.credits <= limit:
            return Confirm(go_ahead=True)
        if _can_ask(ctx):
            return Elicit(f"This will cost about {cost.credits:g} credits (${cost.usd:g}). Go ahead?", Confirm)
        return Confirm(go_ahead=req.max_credits is not None and req.max_credits >= cost.credits)

    async def generate_image(
        req: GenerateImageArguments,
        ctx: Context[Any, Any],
        order: Annotated[Order, Resolve(priced)],
        confirm: Annotated[ElicitationResult[Confirm], Resolve(confirm_cost)],
    ) -> CallToolResult:
        """Make or edit images with EvoLink's gpt-image-2. PAID: every call is billed. One call does all: it submits,
        waits, downloads, saves the files and answers with paths, URLs (valid 24 h), sizes and a small preview.
        If the wait ends first, the answer has task_id and next_action: call get_task with that id; never call
        generate_image again for the same picture. To edit, give image_urls. Ratios take a resolution tier; for
        certain pixels give size as WxH (compute_size tells them, and the price, free of charge).
        Show the user the file path and the markdown line."""
        if not (isinstance(confirm, AcceptedElicitation) and confirm.data.go_ahead):
            raise _unconfirmed(order.price, studio.budget.confirm_above, asked=_can_ask(ctx))
        job = await studio.order(order)
        return await waiting.answer(job, req.wait_seconds, ctx, _notes(req), joined=job.joined)

    return flat_tool(
        generate_image,
        GenerateImageArguments,
        TaskOut,
        refuse_task,
        title="Generate image",
        annotations=PAID,
        meta=GALLERY_META,
    )


def _notes(req: GenerateImageArguments) -> list[str]:
    if "resolution" in req.model_fields_set and not sizes.takes_resolution(req.size):
        what = "auto" if req.size == "auto" else "explicit pixels"
        return [f"resolution has no effect with {what}: it was not sent."]
    return []


def _unconfirmed(cost: Price, limit: float | None, *, asked: bool) -> OverBudget:
    if asked:
        return OverBudget(
            f"the user did not agree to spend {cost.credits:g} credits",
            code="not_confirmed",
            advice="Do not call again unless the user asks for it.",
        )
    return OverBudget(
        f"the computed price is {cost.credits:g} credits (${cost.usd:g}), above {limit:g}: the user must agree first",
        code="confirmation_needed",
        advice=f"Ask the user, then call again with max_credits={cost.credits:g}.",
    )


def _can_ask(ctx: Context[Any, Any]) -> bool:
    """Whether this host can put a question to the user, in either protocol era."""
    capabilities = ctx.client_capabilities
    modern = (ctx.protocol_version or "") >= "2026-07-28"
    return bool(capabilities and capabilities.elicitation) and (modern or ctx.session.can_send_request)
