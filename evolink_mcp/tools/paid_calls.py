"""The shared parts of the paid tools: arguments, the confirmation by the user, and notes about arguments."""

from __future__ import annotations

from typing import Annotated, Any

from mcp.server.elicitation import AcceptedElicitation, ElicitationResult
from mcp.server.mcpserver import Context
from pydantic import BaseModel, Field, Strict

from evolink_mcp.api import costs, sizes
from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.errors import OverBudget
from evolink_mcp.studio.studio import Studio

Credits = Annotated[float, Strict(), Field(ge=0, description="Highest allowed charge.")]
ForceNew = Annotated[bool, Strict(), Field(description="Buy again despite an identical undelivered purchase.")]


class Confirm(BaseModel):
    """The question to the user before an expensive call, or before a local file is sent with a callback."""

    go_ahead: bool = Field(title="Go ahead", description="Yes, do this")


def can_ask(ctx: Context[Any, Any]) -> bool:
    """Return whether this host can ask the user, in either protocol era."""
    capabilities = ctx.client_capabilities
    # A question is part of the result since 2026-07-28. Older versions need a connection for requests of the server.
    modern = (ctx.protocol_version or "") >= "2026-07-28"
    return bool(capabilities and capabilities.elicitation) and (modern or ctx.session.can_send_request)


def needs_approval(price_ceiling: float, studio: Studio) -> bool:
    """Return whether the user must approve this price."""
    limit = studio.spending_limits.confirm_above
    return limit is not None and price_ceiling > limit


def confirm_without_question(price_ceiling: float, max_credits: float | None, studio: Studio) -> Confirm:
    """Return the confirmation of a call without a question to the user.

    A host that cannot ask gets a refusal. The user then approves by `max_credits` of the next call.
    """
    is_approved = max_credits is not None and max_credits >= price_ceiling
    return Confirm(go_ahead=is_approved or not needs_approval(price_ceiling, studio))


def check_confirmation(
    answer: ElicitationResult[Confirm], price_ceiling: float, studio: Studio, ctx: Context[Any, Any]
) -> None:
    """Check the confirmation of a call.

    Raises:
        OverBudget: the user did not approve the call.
    """
    if not (isinstance(answer, AcceptedElicitation) and answer.data.go_ahead):
        raise _unconfirmed(price_ceiling, studio.spending_limits.confirm_above, was_asked=can_ask(ctx))


def _unconfirmed(at_most: float, limit: float | None, *, was_asked: bool) -> OverBudget:
    """Return the refusal of a call that the user did not approve. `limit` is the price above which the user must approve."""
    if was_asked:
        return OverBudget(
            f"the user did not approve this call, which may cost {costs.format_credits(at_most)}",
            code="not_confirmed",
            advice="Do not call again unless the user asks for it.",
        )
    return OverBudget(
        f"the highest possible charge is {costs.format_credits(at_most)}, above {limit:g}: the user must approve it first",
        code="confirmation_needed",
        advice=f"Ask the user, then call again with max_credits={at_most:g}.",
    )


def argument_notes(request: GenerationRequest, save_as: str | None, studio: Studio) -> list[str]:
    """Return a note for each argument that has no effect."""
    notes: list[str] = []
    if save_as is not None and not studio.image_store.is_permanent:
        notes.append("save_as has no effect: this server saves no pictures. Download them from their links.")
    if "resolution" in request.model_fields_set and not sizes.takes_resolution(request.size):
        size = "auto" if request.size == "auto" else "explicit pixels"
        notes.append(f"resolution has no effect with {size}. It was not sent.")
    return notes
