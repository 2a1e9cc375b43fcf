"""The structured content of an answer about a task, built from its journal entry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict

from evolink_mcp.api import costs, sizes
from evolink_mcp.api.models import DEFAULT_MODEL
from evolink_mcp.api.targets import parse_target
from evolink_mcp.api.task import COMPLETED, FAILED, LINKS_MAX, is_task_id
from evolink_mcp.causes import cause_of_task_code
from evolink_mcp.errors import (
    Charged,
    EvolinkError,
    KeyMissing,
    LinkExpired,
    PictureRejected,
    PictureUnusable,
    Problem,
    TaskUnknown,
)
from evolink_mcp.journal.entry import UNCONFIRMED, DerivedFile, Entry, Phase, ResultImage, Stage, iso
from evolink_mcp.sanitize import harmless, quoted
from evolink_mcp.studio.prices import BILL_RULE, FACTOR, QUALITY, SIZE_RULE, Change, difference_of
from evolink_mcp.studio.size_rule import shown_by, size_of
from evolink_mcp.tools.schemas import ErrorOut, error_out, undescribed

TEXT_MAX_CHARS = 200  # of a text of the request in a list or in a limited answer
PROMPT_MAX_CHARS = 80  # of a prompt in a list or in Markdown
OTHER_KEY_NOTE = (
    "It was bought with another key. This server does not poll it, and an identical call buys a new picture."
)


class Pixels(BaseModel):
    """A size in pixels."""

    model_config = ConfigDict(json_schema_extra=undescribed)

    width: int
    height: int


class ImageOut(BaseModel):
    """One picture.

    `url` is its link, valid until `url_expires_at` (ISO 8601, UTC). `path`, `mime_type`, `width` and `height`
    (pixels), `bytes` (file size), `sha256` (hex), `resource_uri` and `markdown` are null until it is saved. `path`
    stays null for a caller on another machine. `error` is the reason why it is not saved or why its file is missing.
    """

    model_config = ConfigDict(json_schema_extra=undescribed)

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
    """The next call."""

    model_config = ConfigDict(json_schema_extra=undescribed)

    tool: str
    arguments: dict[str, Any]


class TaskOut(BaseModel):
    """The answer of generate_image and get_task.

    `task_id` is null until EvoLink returns one. `progress` is in percent. `created_at` is ISO 8601 in UTC. `request`
    is the request as sent to EvoLink. Each of `references` has the caller's argument, its URL at EvoLink, its SHA-256
    and, if it is an earlier picture, that picture's task and index. `expected_size` has the computed pixels of each
    picture. `credits` is EvoLink's charge, null while it is unknown. `guess`: the task is an unconfirmed match of a lost
    answer.
    """

    task_id: str | None = None
    status: str = "unknown"
    progress: float | None = None
    created_at: str | None = None
    request: dict[str, Any] | None = None
    references: list[dict[str, Any]] = []
    images: list[ImageOut] = []
    expected_size: Pixels | None = None
    charged: Charged = "unknown"
    credits: float | None = None
    usd: float | None = None
    bill_difference: str | None = None
    guess: bool = False
    error: ErrorOut | None = None
    next_action: NextAction | None = None
    notes: list[str] = []


def task_out(
    entry: Entry,
    *,
    problem: Problem | None = None,
    is_deduplicated: bool = False,
    is_running: bool = False,
    has_other_key: bool = False,
) -> TaskOut:
    """Return the answer about an entry.

    `problem` is the error of this call. `is_deduplicated`: the call got the purchase of an earlier identical call.
    `is_running`: the job continues, so a request that is not sent yet may still be charged. `has_other_key`: the key of
    this server cannot read the task.
    """
    task = entry.task
    failure = _failure(entry) or problem or _missing_files(entry)
    is_unfinished = entry.stage is Stage.OPEN and failure is None
    # The phase means "not charged" before the POST, but the job may send it after this answer.
    is_being_sent = is_running and entry.phase in (Phase.INTENT, Phase.SENDING)
    charged = "unknown" if is_being_sent else entry.charged
    credits = _credits(entry, charged)
    return TaskOut(
        task_id=entry.task_id,
        status=entry.status,
        progress=100.0 if entry.status == COMPLETED else task.progress if task else None,
        # An external entry without EvoLink's time has the time of this call, so the answer has none.
        created_at=iso(entry.created_at) if entry.is_written or (task and task.created) else None,
        # A caller can send the request of an answer again as a new call.
        request=({**entry.request, "save_as": entry.save_as} if entry.save_as else entry.request) or None,
        references=[reference.published for reference in entry.references],
        images=[image_out(task.id, image, entry.request.get("prompt") or "") for image in entry.images] if task else [],
        expected_size=_expected(entry),
        charged=charged,
        credits=credits,
        usd=None if credits is None else costs.usd(credits),
        bill_difference=_bill_difference(entry),
        guess=entry.is_unconfirmed,
        error=error_out(failure) if failure else None,
        next_action=_next_action(entry, failure, charged) if (is_unfinished or failure) and not has_other_key else None,
        notes=[OTHER_KEY_NOTE] * has_other_key + _notes(entry, is_deduplicated, is_being_sent),
    )


def image_out(task_id: str, image: ResultImage, prompt: str = "") -> ImageOut:
    """Return one image of a task, with its resource and a line of Markdown if its file is present."""
    facts = asdict(image) | {"url_expires_at": iso(image.url_expires_at)}
    if image.is_present:
        facts |= {
            "resource_uri": f"evolink://images/{task_id}/{image.index}",
            "markdown": markdown_of(image.path or image.url, prompt),
            "error": None,
        }
    elif image.is_saved:
        facts["error"] = "; ".join(filter(None, (_missing_file(image), image.error)))
    return ImageOut.model_validate(facts)


def _missing_file(image: ResultImage) -> str:
    """Return the reason why a saved image is not present."""
    if image.is_away:
        return f"the folder of {image.path} does not exist now; its drive or share may be disconnected"
    return f"the file {image.path} was moved or deleted"


def _missing_files(entry: Entry) -> Problem | None:
    """Return the problem of a completed task whose saved images are all missing."""
    saved = [image for image in entry.images if image.is_saved]
    if entry.status != COMPLETED or not saved or any(image.is_present for image in saved):
        return None
    message = "; ".join(_missing_file(image) for image in saved)
    advice = (
        "Connect the drive or put the file back, then call get_task. It downloads a deleted picture again while EvoLink "
        "keeps it."
    )
    return Problem("file_missing", message, True, advice)


def refusal_out(error: EvolinkError) -> TaskOut:
    """Return the answer to a call that created no task."""
    return TaskOut(
        status=FAILED if error.charged == "no" else "unknown",
        charged=error.charged,
        error=error_out(error.problem),
    )


def is_error(out: TaskOut) -> bool:
    """Return whether the answer is an error: failed, unknown, or completed without a saved image."""
    if out.status == COMPLETED:
        return out.error is not None and not any(image.resource_uri for image in out.images)
    return out.error is not None


def shorten_request(out: TaskOut) -> TaskOut:
    """Return the answer for a list, with long prompts and URLs shortened."""
    if out.request is None:
        return out
    return out.model_copy(update={"request": {name: shorten_value(value) for name, value in out.request.items()}})


def limit_answer(out: TaskOut, chars_max: int) -> TaskOut:
    """Return the answer with shortened texts in its request if text and structured content exceed `chars_max`."""
    # The text repeats the facts of the structured content.
    if 2 * len(json.dumps(out.model_dump(mode="json"), ensure_ascii=False)) <= chars_max:
        return out
    note = "Long texts of the request are shortened, because the MCP host limits the size of an answer."
    return shorten_request(out).model_copy(update={"notes": [*out.notes, note]})


def list_facts(entry: Entry, *, has_other_key: bool = False) -> dict[str, Any]:
    """Return the facts of an entry for a list, without empty ones. `has_other_key` is the one of `task_out`."""
    failure = _failure(entry)
    credits = _credits(entry, entry.charged)
    prompt = harmless(entry.request.get("prompt") or "", PROMPT_MAX_CHARS)
    facts: dict[str, Any] = {
        "task_id": entry.task_id,
        "status": entry.status,
        "created_at": iso(entry.created_at),
        "prompt": prompt or None,
        "paths": [image.path for image in entry.images if image.path],
        "edited_from": [
            reference.given if reference.task_id is None else f"{reference.task_id}/{reference.index}"
            for reference in entry.references
        ],
        "charged": entry.charged,
        "credits": credits,
        "usd": None if credits is None else costs.usd(credits),
        "reserved": entry.reserved or None,
        "reserved_usd": costs.usd(entry.reserved) if entry.reserved else None,
        "guess": entry.is_unconfirmed or None,
        "other_key": has_other_key or None,
        "error": failure.message if failure else None,
    }
    return {name: value for name, value in facts.items() if value not in (None, [])}


def shorten_value(value: Any) -> Any:
    """Return a value of a request with each text in it shortened to TEXT_MAX_CHARS."""
    if isinstance(value, list):
        return [shorten_value(item) for item in cast("list[Any]", value)]
    return value if not isinstance(value, str) or len(value) <= TEXT_MAX_CHARS else value[: TEXT_MAX_CHARS - 1] + "…"


def _failure(entry: Entry) -> Problem | None:
    # The journal stores an unconfirmed match as an error. The answer shows it as a note.
    if entry.error is not None and not entry.is_unconfirmed:
        return entry.error
    task = entry.task
    if task is None or not task.settled:
        return None
    if task.status == COMPLETED:
        return _download_failure(entry)
    code = task.error.code if task.error else "request_cancelled" if task.status == "cancelled" else "unknown_error"
    cause = cause_of_task_code(code)
    upstream = f"; EvoLink's message: {quoted(task.error.message)}" if task.error else ""
    return Problem(cause.code, f"{cause.meaning}{upstream}", cause.retryable, cause.next_step)


def _download_failure(entry: Entry) -> Problem | None:
    """Return the problem of a completed task without any saved image. None: one is saved, or a download is unfinished."""
    if entry.stage is Stage.OPEN or any(image.is_saved for image in entry.images):
        return None
    message = "; ".join(dict.fromkeys(image.error for image in entry.images if image.error))
    if all(image.is_rejected for image in entry.images):
        return Problem(PictureRejected.code, message, PictureRejected.retryable, PictureRejected.advice)
    if any(image.is_unusable for image in entry.images):
        return Problem(PictureUnusable.code, message, True, PictureUnusable.advice)
    if entry.images and all(image.is_lost for image in entry.images):
        return Problem(LinkExpired.code, message, LinkExpired.retryable, LinkExpired.advice)
    return Problem(
        "download_failed", message or "EvoLink delivered no picture", True, "Call get_task to try the download again."
    )


def _expected(entry: Entry) -> Pixels | None:
    try:
        size = size_of(entry, entry.rule)
    except ValueError:
        return None
    return Pixels(width=size.width, height=size.height) if size else None


def _credits(entry: Entry, charged: Charged) -> float | None:
    if charged == "no":
        return 0.0
    return entry.charge


def _bill_difference(entry: Entry) -> str | None:
    difference = difference_of(entry)
    if difference is None:
        return None
    credits = costs.format_credits(difference.credits)
    verb = "charged" if difference.is_final else "reserved"
    text = f"EvoLink {verb} {credits}"
    if difference.is_above:
        text += f", more than the price ceiling of {costs.format_credits(difference.ceiling)} for this request"
    if difference.quality is not None:
        requested_quality = entry.request.get("quality", DEFAULT_MODEL.default_quality)
        hint = "" if difference.is_above else ": the quality may be lower than requested"
        text += f". This is the price of quality {difference.quality}, the request was for {requested_quality}{hint}"
    return f"{text}."


def add_price_changes(out: TaskOut, changes: Mapping[str, Change]) -> None:
    """Add changes of prices to the first line of an answer, and a new size rule to its notes."""
    bill_texts, rule_texts = split_price_changes(changes)
    texts = [*([out.bill_difference] if out.bill_difference else []), *bill_texts]
    out.bill_difference = " ".join(texts) or None
    out.notes += rule_texts


def split_price_changes(changes: Mapping[str, Change]) -> tuple[list[str], list[str]]:
    """Return the sentences about bills, which belong in the first line of an answer, and those about the size rule."""
    bills = {kind: change for kind, change in changes.items() if kind != SIZE_RULE}
    rules = {kind: change for kind, change in changes.items() if kind == SIZE_RULE}
    return price_change_texts(bills), price_change_texts(rules)


def price_change_texts(changes: Mapping[str, Change]) -> list[str]:
    """Return one sentence for each change of an account's prices."""
    texts: list[str] = []
    for kind, change in changes.items():
        if kind == SIZE_RULE:
            texts.append(
                f"The pixels of the account's pictures follow EvoLink's {change.after} table. Sizes and prices of this "
                "account are computed by it from now on."
            )
            continue
        bill = "" if change.credits is None else f"EvoLink charged {costs.format_credits(change.credits)}: "
        if kind == FACTOR:
            text = f"its prices for this account are {change.after:g} times the published ones"
            if change.after == 1:
                text = "its prices for this account are the published ones again"
            elif change.before != 1:
                text += f" (before: {change.before:g} times)"
        elif kind == BILL_RULE:
            text = (
                f"it charges by its {change.after} table" if change.after else "it charges by the pictures' table again"
            )
        else:
            quality = kind.removeprefix(QUALITY)
            text = f"it charges {quality} at the price of {change.after}"
            if change.after == quality:
                text = f"it charges {quality} at its own price again"
        sentence = f"{bill}{text}. Prices are computed accordingly from now on."
        texts.append(sentence[:1].upper() + sentence[1:])
    return texts


def _next_action(entry: Entry, failure: Problem | None, charged: Charged) -> NextAction | None:
    # No tool can poll a task without a key.
    if failure is not None and failure.code == KeyMissing.code:
        return None
    is_final = failure is not None and (
        entry.status in (FAILED, "cancelled")
        or failure.code in (LinkExpired.code, PictureRejected.code, TaskUnknown.code)
    )
    # get_task refuses a task ID of unusual form, because polls put the ID into a URL.
    if is_task_id(entry.task_id) and not is_final:
        return NextAction(tool="get_task", arguments={"task_id": entry.task_id})
    if charged == "unknown":
        return NextAction(tool="list_tasks", arguments={"sync": True})
    return None


def _notes(entry: Entry, is_deduplicated: bool, is_being_sent: bool) -> list[str]:
    notes: list[str] = []
    if is_deduplicated and entry.phase == Phase.UNKNOWN:
        notes.append(
            "An earlier identical call has this unknown outcome. Nothing was sent again. force_new=true buys another picture."
        )
    elif is_deduplicated:
        notes.append(
            "An earlier identical call bought this and never received it. Nothing was charged again. "
            "force_new=true buys another picture."
        )
    count = entry.request.get("n", 1)
    task = entry.task
    if task and task.status == COMPLETED and entry.images and len(entry.images) < count:
        notes.append(
            f"The request was for {count} pictures and EvoLink delivered {len(entry.images)}. "
            "EvoLink bills each picture separately."
        )
    if task and task.links_left_out:
        notes.append(
            f"EvoLink delivered {task.links_left_out} links more than the limit of {LINKS_MAX}. They were ignored."
        )
    # A task of EvoLink's list has no links by design, so only journal entries get this note.
    if task and task.status == COMPLETED and not task.results and entry.is_written:
        notes.append(
            "EvoLink reports the task as completed but returns no picture. Do not buy it again yet. Call get_task "
            "later, or ask support@evolink.ai with this task id."
        )
    notes += _deviations(entry)
    notes += [
        f"Picture {image.index} is missing: {_missing_file(image)}."
        for image in entry.images
        if image.is_saved and not image.is_present
    ]
    notes += [
        f"Picture {image.index} was saved into the data folder, because {image.fallback_reason}."
        for image in entry.images
        if image.is_present and image.fallback_reason
    ]
    notes += [
        f"File made from picture {image.index}: {file.target}, {file.width}x{file.height} {file.mime_type}, {place}."
        for image in entry.images
        for file in image.derived
        if (place := _place_of(file)) is not None
    ]
    if is_being_sent:
        notes.append("EvoLink has not answered the request yet. It continues in the background and may be charged.")
    if entry.is_unconfirmed:
        notes.append(f"{UNCONFIRMED.message}. {UNCONFIRMED.advice}")
    return notes


def _place_of(file: DerivedFile) -> str | None:
    """Return the link of a derived file, or its path if the file exists."""
    return file.path if file.path is not None and Path(file.path).is_file() else file.url


def copy_notes(entry: Entry, fit: str | None) -> list[str]:
    """Return a note for each saved image without the exact copy that the caller wants."""
    fit = fit or entry.request.get("fit")
    if not fit or entry.status != COMPLETED:
        return []
    name = parse_target(fit).name
    return [
        f"The exact file of picture {image.index} could not be made. Call derive_image, free of charge: "
        f'source="evolink://images/{entry.task_id}/{image.index}", targets=["{name}"].'
        for image in entry.images
        if image.is_present and all(file.target != name for file in image.derived)
    ]


def _deviations(entry: Entry) -> list[str]:
    """Return how the saved images differ from the request. None of it is an error."""
    notes: list[str] = []
    saved = [image for image in entry.images if image.is_saved]
    body = entry.request
    target = _expected(entry)
    mismatch = next(
        (image for image in saved if target and (image.width, image.height) != (target.width, target.height)), None
    )
    if target and mismatch:
        sizes_text = (
            f"Computed {target.width}×{target.height} pixels, EvoLink delivered {mismatch.width}×{mismatch.height}"
        )
        hint = "Give size as WxH for exact pixels."
        if not sizes.takes_resolution(str(body.get("size", "auto"))):
            notes.append(f"{sizes_text}, although the request named the pixels.")
        elif shown_by(entry) is not None:
            notes.append(f"{sizes_text}. EvoLink did not follow its {entry.rule} table. {hint}")
        else:
            notes.append(f"{sizes_text}. Neither of EvoLink's tables has this size. {hint}")
    requested_format = body.get("output_format")
    types = sorted({image.mime_type.removeprefix("image/") for image in saved if image.mime_type})
    notes += [
        f"EvoLink delivered {kind} instead of {requested_format}."
        for kind in types
        if requested_format not in (None, kind)
    ]
    if body.get("background") == "transparent":
        notes += [f"Picture {image.index}: {_transparency_text(image)}" for image in saved]
    notes += [f"Picture {image.index} has only one colour." for image in saved if image.is_one_colour]
    return notes


def _transparency_text(image: ResultImage) -> str:
    """Return the measured transparency of an image. Its request was for a transparent background."""
    share = image.transparent_share
    if share is None:
        return "the request was for a transparent background, but the picture has no transparency at all."
    if image.alpha_min is None or image.alpha_max is None:  # saved by a version that measured only the share
        return f"{_percent(share)} of the pixels are transparent."
    if image.alpha_max == 0:
        return "it is completely invisible: every pixel is fully transparent."
    if image.alpha_min == 255:
        return "the request was for a transparent background, but no pixel of the picture is transparent."
    if share == 0:
        return (
            "the request was for a transparent background, but every pixel is opaque or nearly opaque: the lowest alpha "
            f"is {image.alpha_min} of 255."
        )
    if share == 1:
        return f"every pixel is transparent: the highest alpha is {image.alpha_max} of 255."
    return f"{_percent(share)} of the pixels are transparent."


def _percent(share: float) -> str:
    """Return a share as a whole percentage. A share that is not 0 or 1 is never shown as 0 % or 100 %."""
    if 0 < share < 0.01:
        return "less than 1 %"
    if 0.99 < share < 1:
        return "more than 99 %"
    return f"{share:.0%}".replace("%", " %")


def markdown_of(path: str, prompt: str) -> str:
    """Return a line of Markdown that shows the image, with the prompt as alternative text."""
    # CommonMark ends a link target at a blank, unless it is in angle brackets.
    target = f"<{path}>" if any(c in path for c in " ()<>") else path
    # A bracket in a prompt would end the alternative text and could begin another link.
    alt = harmless(prompt, PROMPT_MAX_CHARS).translate(str.maketrans("[]\\`", "()/'"))
    return f"![{alt or Path(path).stem}]({target})"
