"""The tools: what a model may ask for, in words written for a model."""

from functools import partial
from pathlib import Path
from typing import Annotated

from mcp.server.elicitation import AcceptedElicitation, ElicitationResult
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.resolve import Elicit, Resolve
from mcp.server.mcpserver.tools import Tool
from mcp_types import CallToolResult, ToolAnnotations
from pydantic import BaseModel, Field

from evolink_mcp.api import sizes
from evolink_mcp.api.costs import Price
from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.errors import EvolinkError, OverBudget, Refused
from evolink_mcp.studio.jobs import Job, Order
from evolink_mcp.studio.purchase import price_of
from evolink_mcp.studio.studio import Studio
from evolink_mcp.tools import shapes, task_answer
from evolink_mcp.tools.adapter import flat_tool, result
from evolink_mcp.tools.arguments import (
    ComputeSizeArguments,
    GenerateImageArguments,
    GetBalanceArguments,
    GetTaskArguments,
    ListTasksArguments,
    ViewImageArguments,
)
from evolink_mcp.tools.compute_size import compute, size_text
from evolink_mcp.tools.hosts import Host, host_named
from evolink_mcp.tools.list_tasks import task_list
from evolink_mcp.tools.previews import links, picture_block, previews
from evolink_mcp.tools.waiting import follow

GALLERY_URI = "ui://evolink/gallery.html"

PAID = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=False, open_world_hint=True)
READS = ToolAnnotations(read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=True)
OFFLINE = ToolAnnotations(read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False)


class Confirm(BaseModel):
    """What the user is asked before a call above EVOLINK_MCP_CONFIRM_ABOVE."""

    go_ahead: bool = Field(title="Go ahead", description="Spend these credits")


class Tools:
    """The tools over one studio. `wait_s` None lets the host decide; `preview_edge` 0 sends no previews."""

    def __init__(
        self,
        studio: Studio,
        *,
        wait_s: float | None = None,
        preview_edge: int | None = None,
        resource_links: bool = False,
    ) -> None:
        self._studio = studio
        self._wait_s = wait_s
        self._preview_edge = preview_edge
        self._links = resource_links

    def all(self) -> list[Tool]:
        """Every tool, as the server publishes them."""
        studio, tools = self._studio, self
        app = {"ui": {"resourceUri": GALLERY_URI}, "ui/resourceUri": GALLERY_URI}

        def confirm_cost(req: GenerateImageArguments, ctx: Context) -> Confirm | Elicit[Confirm]:
            cost = price_of(req, studio.rule)
            limit = studio.till.budget.confirm_above
            if limit is None or cost.credits <= limit:
                return Confirm(go_ahead=True)
            if _can_ask(ctx):
                return Elicit(f"This will cost about {cost.credits:g} credits (${cost.usd:g}). Go ahead?", Confirm)
            return Confirm(go_ahead=req.max_credits is not None and req.max_credits >= cost.credits)

        async def generate_image(
            req: GenerateImageArguments,
            ctx: Context,
            confirm: Annotated[ElicitationResult[Confirm], Resolve(confirm_cost)],
        ) -> CallToolResult:
            """Make or edit images with EvoLink's gpt-image-2. PAID: every call is billed. One call does all: it submits,
            waits, downloads, saves the files and answers with paths, URLs (valid 24 h), sizes and a small preview.
            If the wait ends first, the answer has task_id and next_action: call get_task with that id; never call
            generate_image again for the same picture. To edit, give image_urls. Ratios take a resolution tier; for
            certain pixels give size as WxH (compute_size tells them, and the price, free of charge).
            Show the user the file path and the markdown line."""
            if not (isinstance(confirm, AcceptedElicitation) and confirm.data.go_ahead):
                raise tools._unconfirmed(price_of(req, studio.rule), asked=_can_ask(ctx))
            order = Order(_request(req), req.save_as, req.max_credits, req.force_new)
            job = await studio.order(order)
            return await tools._follow(job, req.wait_seconds, ctx, _notes(req), joined=job.joined)

        async def get_task(req: GetTaskArguments, ctx: Context) -> CallToolResult:
            """Wait for a task and get its pictures, by id: any time later, after a restart, or for a task of another
            client with the same key. Free of charge; saves what is not saved yet, and never twice. If the wait ends
            first, call it again with the same id."""
            return await tools._follow(await studio.resume(req.task_id), req.wait_seconds, ctx, [])

        async def compute_size(req: ComputeSizeArguments, ctx: Context) -> CallToolResult:
            """What pixels and what price a size, ratio and tier mean, before anything is spent: offline, free. Or the
            other way round: give width and height you need (such as 1200 and 628) for the nearest legal size that
            covers them, the closest ratio and tier, and what to crop."""
            out = compute(req, studio.rule)
            return result(size_text(out), out, is_error=out.error is not None)

        async def view_image(req: ViewImageArguments, ctx: Context) -> CallToolResult:
            """Look at a saved picture: returns the image itself, made small. Use it to check your work or when you only
            got a path. Free of charge."""
            return await tools._view(req, ctx)

        async def list_tasks(req: ListTasksArguments, ctx: Context) -> CallToolResult:
            """What was bought with this server, newest first: pictures, paths, costs, and calls whose outcome is unknown.
            Use it to find a lost task id or file. Free of charge."""
            return await tools._list(req)

        async def get_balance(req: GetBalanceArguments, ctx: Context) -> CallToolResult:
            """Credits left on the EvoLink account and key. Free of charge."""
            balance = await studio.balance()
            out = shapes.BalanceOut(
                account_remaining=balance.account_remaining,
                account_used=balance.account_used,
                key_remaining=balance.key_remaining,
                key_used=balance.key_used,
                key_unlimited=balance.key_unlimited,
            )
            words = [f"{name.replace('_', ' ')}: {_amount(value)}" for name, value in out if name != "error"]
            return result("Credits. " + ", ".join(words) + ".", out)

        task, size = shapes.TaskOut, shapes.SizeOut
        return [
            flat_tool(generate_image, GenerateImageArguments, task, _refuse_task, title="Generate image",
                      annotations=PAID, meta=app),
            flat_tool(get_task, GetTaskArguments, task, _refuse_task, title="Get task", annotations=READS, meta=app),
            flat_tool(compute_size, ComputeSizeArguments, size, _refuse_size, title="Compute size", annotations=OFFLINE),
            flat_tool(view_image, ViewImageArguments, None, _refuse_plain, title="View image", annotations=READS),
            flat_tool(list_tasks, ListTasksArguments, shapes.TaskList, partial(_refuse, shapes.TaskList),
                      title="List tasks", annotations=READS),
            flat_tool(get_balance, GetBalanceArguments, shapes.BalanceOut, partial(_refuse, shapes.BalanceOut),
                      title="Get balance", annotations=READS),
        ]  # fmt: skip

    # --- generate_image and get_task ---

    async def _follow(
        self, job: Job, wait: float | None, ctx: Context, notes: list[str], *, joined: bool = False
    ) -> CallToolResult:
        """Watch the job for as long as the call may wait; leave it running when that ends, however it ends."""
        host = _host(ctx)
        with self._studio.attending(job):
            await follow(job, self._wait(host, wait), ctx.report_progress)
            out = task_answer.task_out(
                job.entry, rule=self._studio.rule, problem=job.problem, joined=joined, running=not job.finished
            )
            out.notes[:0] = notes
            pictures = await previews(out, self._preview_edge, host.answer_max)
            more = links(out) if self._links else []
            if job.finished and job.problem is None and job.entry.conclusive:
                self._studio.deliver(job)
        return result(task_answer.task_text(out), out, *pictures, *more, is_error=task_answer.is_error(out))

    def _wait(self, host: Host, asked: float | None = None) -> float:
        """What the caller asks, else the owner's setting, else the host's own; never beyond the host's end."""
        if asked is None:
            return host.wait_s if self._wait_s is None else self._wait_s
        return min(asked, host.longest_wait_s)

    def _unconfirmed(self, cost: Price, *, asked: bool) -> OverBudget:
        limit = self._studio.till.budget.confirm_above
        if asked:
            return OverBudget(
                f"the user did not agree to spend {cost.credits:g} credits", code="not_confirmed",
                advice="Do not call again unless the user asks for it.",
            )  # fmt: skip
        return OverBudget(
            f"the computed price is {cost.credits:g} credits (${cost.usd:g}), above {limit:g}: the user must agree first",
            code="confirmation_needed",
            advice=f"Ask the user, then call again with max_credits={cost.credits:g}.",
        )

    # --- the others ---

    async def _view(self, req: ViewImageArguments, ctx: Context) -> CallToolResult:
        job = await self._studio.resume(req.task_id)
        await follow(job, self._wait(_host(ctx)), ctx.report_progress)
        picture = next((p for p in job.entry.pictures if p.index == req.index), None)
        if picture is None or picture.path is None:
            out = task_answer.task_out(job.entry, rule=self._studio.rule, problem=job.problem)
            raise Refused(
                f"there is no saved picture {req.index} of {req.task_id} (status {out.status}, {len(out.images)} pictures)",
                code="no_such_picture",
                charged=out.charged,
                advice="Call get_task with this id; indexes count from 0.",
            )
        block = await picture_block(Path(picture.path), req.max_edge, _host(ctx).answer_max)
        if block is None:
            raise Refused(
                f"the file {picture.path} cannot be shown",
                code="no_preview",
                charged=job.entry.charged,
                advice="It may have been moved or deleted; call get_task.",
            )
        line = f"Picture {req.index} of {req.task_id}: {picture.width}×{picture.height} pixels, {picture.path}"
        return result(line, None, block)

    async def _list(self, req: ListTasksArguments) -> CallToolResult:
        self._studio.wake()
        elsewhere, problem = await self._studio.sync(req.limit) if req.sync else ([], None)
        out, text = task_list(self._studio, req, elsewhere, problem)
        return result(text, out)


# --- small things ---


def _request(req: GenerateImageArguments) -> GenerationRequest:
    said = {name for name in req.model_fields_set if name in GenerationRequest.model_fields}
    return GenerationRequest.model_construct(_fields_set=said, **{
        name: getattr(req, name) for name in GenerationRequest.model_fields
    })  # fmt: skip


def _notes(req: GenerateImageArguments) -> list[str]:
    if "resolution" in req.model_fields_set and req.size not in sizes.RATIOS:
        what = "auto" if req.size == "auto" else "explicit pixels"
        return [f"resolution has no effect with {what}: it was not sent."]
    return []


def _refuse_task(error: EvolinkError, _: tuple[str, ...]) -> CallToolResult:
    out = task_answer.refusal(error)
    return result(task_answer.task_text(out), out, is_error=True)


def _refuse_size(error: EvolinkError, nearest: tuple[str, ...]) -> CallToolResult:
    out = shapes.SizeOut(alternatives=list(nearest), error=task_answer.error_out(error.problem))
    return result(size_text(out), out, is_error=True)


def _refuse(shape: type[BaseModel], error: EvolinkError, _: tuple[str, ...]) -> CallToolResult:
    told = task_answer.error_out(error.problem)
    return result(f"{told.message}. Charged: no. {told.advice}", shape(error=told), is_error=True)  # pyright: ignore[reportCallIssue]


def _refuse_plain(error: EvolinkError, _: tuple[str, ...]) -> CallToolResult:
    return result(f"{error.what}. Nothing was charged for looking. {error.advice}", None, is_error=True)


def _host(ctx: Context) -> Host:
    params = ctx.session.client_params
    return host_named(params.client_info.name if params else None)


def _can_ask(ctx: Context) -> bool:
    """Whether this host can put a question to the user, in either protocol era."""
    capabilities = ctx.client_capabilities
    modern = (ctx.protocol_version or "") >= "2026-07-28"
    return bool(capabilities and capabilities.elicitation) and (modern or ctx.session.can_send_request)


def _amount(value: object) -> str:
    return "not told" if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower()
