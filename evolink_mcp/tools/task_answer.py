"""A task as tools answer it: everything that is known of an entry, as structured content."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field

from evolink_mcp.api import costs, sizes
from evolink_mcp.api.task import COMPLETED, FAILED, LINKS_MAX, is_task_id
from evolink_mcp.errors import (
    Charged,
    EvolinkError,
    LinkExpired,
    PictureRejected,
    PictureUnusable,
    Problem,
    TaskUnknown,
    advice_for,
)
from evolink_mcp.journal.entry import ADOPTED, Entry, Picture, iso
from evolink_mcp.sanitize import harmless, quoted
from evolink_mcp.studio.size_rule import shown_by, size_of
from evolink_mcp.tools.schemas import ErrorOut, error_out, undescribed

TEXT_SHOWN, PROMPT_SHOWN = 200, 80  # characters


class Pixels(BaseModel):
    """A size in pixels."""

    model_config = ConfigDict(json_schema_extra=undescribed)

    width: int
    height: int


class ImageOut(BaseModel):
    """One picture.

    `url` is a link to it, valid until `url_expires_at` (ISO 8601, UTC). `path`, `mime_type`, `width` and
    `height` (pixels), `bytes` (file size), `sha256` (hex), `resource_uri` and `markdown` are null until it is saved;
    `path` stays null for a caller on another machine. `error` says why it is not saved.
    """

    index: int
    url: str | None = None
    url_expires_at: str | None = None
    path: str | None = None
    mime_type: str | None = None
    width: int | None = None
    height: int | None = None
    bytes: int | None = None
    sha256: str | None = None
    resource_uri: str | None = None
    markdown: str | None = None
    error: str | None = None


class NextAction(BaseModel):
    """The call that goes on from here."""

    model_config = ConfigDict(json_schema_extra=undescribed)

    tool: str
    arguments: dict[str, Any]


class TaskOut(BaseModel):
    """What generate_image and get_task answer.

    `task_id` is null while EvoLink has not named one. `progress` is in percent, `references` say what the caller gave,
    its address at EvoLink, its SHA-256, and the earlier picture that it is, `created_at` ISO 8601 in UTC,
    `request` what was sent to EvoLink, `expected_size` the computed pixels of each picture. `credits` is what EvoLink
    charged; it is null while that is not known.
    """

    task_id: str | None = None
    status: str = Field("unknown", description="pending, processing, completed, failed, cancelled or unknown")
    progress: float | None = None
    created_at: str | None = None
    request: dict[str, Any] | None = None
    references: list[dict[str, Any]] = []
    images: list[ImageOut] = []
    expected_size: Pixels | None = None
    charged: Charged = "unknown"
    credits: float | None = Field(default=None, description="charged by EvoLink")
    usd: float | None = None
    guess: bool = Field(default=False, description="the answer was lost; this task was found by time and price")
    error: ErrorOut | None = None
    next_action: NextAction | None = None
    notes: list[str] = []


def task_out(entry: Entry, *, problem: Problem | None = None, joined: bool = False, running: bool = False) -> TaskOut:
    """Everything there is to say about an entry.

    `problem` is what stopped this very call. `joined`: the call took over what an
    earlier one bought. `running`: its job goes on, so a request that was not sent yet may still be charged.
    """
    task = entry.task
    failure = _failure(entry) or problem
    waiting = not entry.ended and failure is None
    on_its_way = running and entry.phase in ("intent", "sending")
    charged = "unknown" if on_its_way else entry.charged
    credits = _credits(entry, charged)
    return TaskOut(
        task_id=entry.task_id,
        status=entry.status,
        progress=100.0 if entry.status == COMPLETED else task.progress if task else None,
        created_at=iso(entry.created_at) if entry.is_written or (task and task.created) else None,
        request=({**entry.request, "save_as": entry.save_as} if entry.save_as else entry.request) or None,
        references=[asdict(one) for one in entry.references],
        images=[image_out(task.id, picture, entry.request.get("prompt") or "") for picture in entry.pictures]
        if task
        else [],
        expected_size=_expected(entry),
        charged=charged,
        credits=credits,
        usd=None if credits is None else costs.usd(credits),
        guess=entry.guessed,
        error=error_out(failure) if failure else None,
        next_action=_next_action(entry, failure, charged) if waiting or failure else None,
        notes=_notes(entry, joined, on_its_way),
    )


def image_out(task_id: str, picture: Picture, prompt: str = "") -> ImageOut:
    """One picture of this task, with its resource and a line of Markdown once it is saved."""
    facts = asdict(picture) | {"url_expires_at": iso(picture.url_expires_at)}
    if picture.saved:
        facts |= {
            "resource_uri": f"evolink://images/{task_id}/{picture.index}",
            "markdown": _markdown(picture.path or picture.url, prompt),
        }
    return ImageOut.model_validate(facts)


def refusal(error: EvolinkError) -> TaskOut:
    """A call that made no task, in the shape of a task."""
    return TaskOut(
        status=FAILED if error.charged == "no" else "unknown",
        charged=error.charged,
        error=error_out(error.problem),
    )


def is_error(out: TaskOut) -> bool:
    """Whether the caller did not get what was asked: failed, unknown, or finished without a single picture."""
    if out.status == COMPLETED:
        return out.error is not None and not any(image.resource_uri for image in out.images)
    return out.error is not None


def brief(out: TaskOut) -> TaskOut:
    """The same for a list: long prompts and addresses are cut."""
    if out.request is None:
        return out
    return out.model_copy(update={"request": {name: shortened(value) for name, value in out.request.items()}})


def row(entry: Entry) -> dict[str, Any]:
    """One line of a list: what a person needs to find a picture again. What there is not is left out."""
    failure = _failure(entry)
    credits = _credits(entry, entry.charged)
    prompt = harmless(entry.request.get("prompt") or "", PROMPT_SHOWN)
    facts: dict[str, Any] = {
        "task_id": entry.task_id,
        "status": entry.status,
        "created_at": iso(entry.created_at),
        "prompt": prompt or None,
        "paths": [picture.path for picture in entry.pictures if picture.path],
        "edited_from": [one.given if one.task_id is None else f"{one.task_id}/{one.index}" for one in entry.references],
        "charged": entry.charged,
        "credits": credits,
        "usd": None if credits is None else costs.usd(credits),
        "guess": entry.guessed or None,
        "error": failure.message if failure else None,
    }
    return {name: value for name, value in facts.items() if value not in (None, [])}


def shortened(value: Any) -> Any:
    """A value of a request with every text in it cut to TEXT_SHOWN characters."""
    if isinstance(value, list):
        return [shortened(item) for item in cast("list[Any]", value)]
    return value if not isinstance(value, str) or len(value) <= TEXT_SHOWN else value[: TEXT_SHOWN - 1] + "…"


def _failure(entry: Entry) -> Problem | None:
    if entry.error is not None and not entry.guessed:
        return entry.error
    task = entry.task
    if task is None or not task.settled or task.status == COMPLETED:
        if task and task.status == COMPLETED and entry.ended and not any(p.saved for p in entry.pictures):
            told = "; ".join(dict.fromkeys(p.error for p in entry.pictures if p.error))
            if all(picture.is_rejected for picture in entry.pictures):
                return Problem(PictureRejected.code, told, PictureRejected.retryable, PictureRejected.advice)
            if any(picture.unusable for picture in entry.pictures):
                return Problem(PictureUnusable.code, told, True, PictureUnusable.advice)
            if entry.pictures and all(picture.lost for picture in entry.pictures):
                return Problem(LinkExpired.code, told, LinkExpired.retryable, LinkExpired.advice)
            return Problem(
                "download_failed", told or "no picture came", True, "Call get_task to try the download again."
            )
        return None
    code = task.error.code if task.error else "request_cancelled" if task.status == "cancelled" else "unknown_error"
    advice = advice_for(code)
    said = f"; EvoLink says: {quoted(task.error.message)}" if task.error else ""
    return Problem(code, f"{advice.meaning}{said}", advice.retryable, advice.next_step)


def _expected(entry: Entry) -> Pixels | None:
    try:
        size = size_of(entry, entry.rule)
    except ValueError:
        return None
    return Pixels(width=size.width, height=size.height) if size else None


def _credits(entry: Entry, charged: Charged) -> float | None:
    if charged == "no":
        return 0.0
    task = entry.task
    return task.credits_used if task and task.status == COMPLETED and not entry.guessed else None


def _next_action(entry: Entry, failure: Problem | None, charged: Charged) -> NextAction | None:
    gone = failure is not None and (
        entry.status in (FAILED, "cancelled")
        or failure.code in (LinkExpired.code, PictureRejected.code, TaskUnknown.code)
    )
    if is_task_id(entry.task_id) and not gone:
        return NextAction(tool="get_task", arguments={"task_id": entry.task_id})
    if charged == "unknown":
        return NextAction(tool="list_tasks", arguments={"sync": True})
    return None


def _notes(entry: Entry, joined: bool, on_its_way: bool) -> list[str]:
    notes: list[str] = []
    if joined and entry.phase == "unknown":
        notes.append("An earlier identical call has this unknown outcome; nothing was sent again. force_new=true buys.")
    elif joined:
        notes.append(
            "This was bought by an earlier identical call that never received it; nothing was charged again. "
            "force_new=true buys another."
        )
    asked = entry.request.get("n", 1)
    task = entry.task
    if task and task.status == COMPLETED and entry.pictures and len(entry.pictures) < asked:
        notes.append(f"Asked for {asked} pictures, {len(entry.pictures)} came; each is billed singly, "
                     "so only what came is charged.")  # fmt: skip
    if task and task.links_left_out:
        notes.append(f"EvoLink named {task.links_left_out} links more than the {LINKS_MAX} that were taken.")
    # A row of the account's list has no links by design; that is no fault.
    if task and task.status == COMPLETED and not task.results and entry.is_written:
        notes.append("EvoLink says the task is completed but names no picture. Do not buy it again at once: call "
                     "get_task later, or ask support@evolink.ai with this task id.")  # fmt: skip
    notes += _delivered_otherwise(entry)
    notes += [
        f"The file of picture {picture.index} was moved or deleted."
        for picture in entry.pictures
        if picture.path and not Path(picture.path).is_file()
    ]
    if on_its_way:
        notes.append("EvoLink has not answered to the request yet; it goes on in the background, and may be charged.")
    if entry.guessed:
        notes.append(f"{ADOPTED.message}. {ADOPTED.advice}")
    return notes


def _delivered_otherwise(entry: Entry) -> list[str]:
    """In what the delivered pictures differ from what was asked: none of it is an error."""
    notes: list[str] = []
    saved = [picture for picture in entry.pictures if picture.saved]
    asked = entry.request
    wish = _expected(entry)
    odd = next((p for p in saved if wish and (p.width, p.height) != (wish.width, wish.height)), None)
    if wish and odd:
        told = f"Computed {wish.width}×{wish.height} pixels, got {odd.width}×{odd.height}"
        certain = "Give size as WxH where the pixels must be certain."
        if not sizes.takes_resolution(str(asked.get("size", "auto"))):
            notes.append(f"{told}, although size named the pixels.")
        elif shown_by(entry) is not None:
            notes.append(f"{told}: EvoLink did not follow its {entry.rule} table. {certain}")
        else:
            notes.append(f"{told}, which is in neither of EvoLink's tables. {certain}")
    wanted = asked.get("output_format")
    types = sorted({picture.mime_type.removeprefix("image/") for picture in saved if picture.mime_type})
    notes += [f"EvoLink delivered {kind}, although {wanted} was asked." for kind in types if wanted not in (None, kind)]
    clear = [picture for picture in saved if picture.transparent is not None]
    if asked.get("background") == "transparent" and saved:
        if not clear:
            notes.append("A transparent background was asked, but the picture has no transparency at all.")
        elif any(picture.transparent == 0 for picture in clear):
            notes.append("A transparent background was asked, but no pixel of the picture can be seen through.")
    notes += [f"Picture {picture.index} is of one single colour." for picture in saved if picture.one_colour]
    return notes


def _markdown(path: str, prompt: str) -> str:
    """A line of Markdown that shows the picture; the prompt stands for it where it cannot be shown."""
    target = f"<{path}>" if any(c in path for c in " ()<>") else path
    alt = harmless(prompt, PROMPT_SHOWN).translate(str.maketrans("[]\\`", "()/'"))
    return f"![{alt or Path(path).stem}]({target})"
