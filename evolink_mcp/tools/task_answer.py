"""The last place where data becomes words: one answer as structured content and the same facts as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evolink_mcp.api import sizes
from evolink_mcp.api.task import COMPLETED, FAILED
from evolink_mcp.errors import Charged, EvolinkError, LinkExpired, Problem, advice_for
from evolink_mcp.journal.entry import ADOPTED, Entry, Picture, iso
from evolink_mcp.sanitize import harmless
from evolink_mcp.tools.shapes import ErrorOut, ImageOut, NextAction, Pixels, TaskOut

PROMPT_SHOWN = 200


# --- from data to those ------------------------------------------------------------------------------------


def error_out(problem: Problem) -> ErrorOut:
    return ErrorOut(code=problem.code, message=problem.message, retryable=problem.retryable, advice=problem.advice)


def image_out(task_id: str, picture: Picture) -> ImageOut:
    saved = picture.path is not None
    return ImageOut(
        index=picture.index,
        url=picture.url,
        url_expires_at=iso(picture.url_expires_at),
        path=picture.path,
        mime_type=picture.mime_type,
        width=picture.width,
        height=picture.height,
        bytes=picture.bytes,
        sha256=picture.sha256,
        resource_uri=f"evolink://images/{task_id}/{picture.index}" if saved else None,
        markdown=_markdown(picture) if saved else None,
        error=picture.error,
    )


def task_out(
    entry: Entry, *, rule: str, problem: Problem | None = None, joined: bool = False, running: bool = False
) -> TaskOut:
    """Everything there is to say about an entry. `problem` is what kept this very call from its end; while it is
    `running`, a request that has not left yet may still be charged."""
    task = entry.task
    failure = _failure(entry) or problem
    waiting = not entry.ended and failure is None
    on_its_way = running and entry.phase in ("intent", "sending")
    charged = "unknown" if on_its_way else entry.charged
    return TaskOut(
        task_id=entry.task_id,
        status=entry.status,
        progress=100.0 if entry.status == COMPLETED else task.progress if task else None,
        created_at=iso(entry.created_at),
        request=({**entry.request, "save_as": entry.save_as} if entry.save_as else entry.request) or None,
        images=[image_out(task.id, picture) for picture in entry.pictures] if task else [],
        expected_size=_expected(entry, rule),
        charged=charged,
        credits=task.credits_used if task and task.status == COMPLETED else 0.0 if charged == "no" else None,
        error=error_out(failure) if failure else None,
        next_action=_next_action(entry, failure, charged) if waiting or failure else None,
        notes=_notes(entry, rule, joined, on_its_way),
    )


def refusal(error: EvolinkError) -> TaskOut:
    """A call that came to nothing, in the shape of a task."""
    return TaskOut(
        status=FAILED if error.charged == "no" else "unknown",
        charged=error.charged,
        error=error_out(error.problem),
    )


def is_error(out: TaskOut) -> bool:
    """Whether the caller did not get what was asked: failed, unknown, or finished without a single picture."""
    if out.status == COMPLETED:
        return out.error is not None and not any(image.path for image in out.images)
    return out.error is not None


def brief(out: TaskOut) -> TaskOut:
    """The same for a list: long prompts and addresses cut."""
    if out.request is None:
        return out
    return out.model_copy(update={"request": {name: _short(value) for name, value in out.request.items()}})


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(item) for item in value]
    return value if not isinstance(value, str) or len(value) <= PROMPT_SHOWN else value[: PROMPT_SHOWN - 1] + "…"


def _failure(entry: Entry) -> Problem | None:
    if entry.error is not None and entry.error != ADOPTED:
        return entry.error
    task = entry.task
    if task is None or not task.settled or task.status == COMPLETED:
        if task and task.status == COMPLETED and entry.ended and not any(p.saved for p in entry.pictures):
            told = "; ".join(dict.fromkeys(p.error for p in entry.pictures if p.error))
            if entry.pictures and all(picture.lost for picture in entry.pictures):
                return Problem(LinkExpired.code, told, LinkExpired.retryable, LinkExpired.advice)
            return Problem(
                "download_failed", told or "no picture came", True, "Call get_task to try the download again."
            )
        return None
    code = task.error.code if task.error else "request_cancelled" if task.status == "cancelled" else "unknown_error"
    advice = advice_for(code)
    said = f"; EvoLink says: “{task.error.message}”" if task.error else ""
    return Problem(code, f"{advice.meaning}{said}", advice.repeat, advice.todo)


def _expected(entry: Entry, rule: str) -> Pixels | None:
    if not entry.request:
        return None
    try:
        size = sizes.resolve(entry.request.get("size", "auto"), entry.request.get("resolution", "1K"), rule).size
    except ValueError:
        return None
    return Pixels(width=size.width, height=size.height) if size else None


def _next_action(entry: Entry, failure: Problem | None, charged: Charged) -> NextAction | None:
    gone = failure is not None and (entry.status in (FAILED, "cancelled") or failure.code == LinkExpired.code)
    if entry.task_id and not gone:
        return NextAction(tool="get_task", arguments={"task_id": entry.task_id})
    if charged == "unknown":
        return NextAction(tool="list_tasks", arguments={"sync": True})
    return None


def _notes(entry: Entry, rule: str, joined: bool, on_its_way: bool) -> list[str]:
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
    if task and task.status == COMPLETED and not task.results:
        notes.append("EvoLink says the task is completed but names no picture. Do not buy it again at once: call "
                     "get_task later, or ask support@evolink.ai with this task id.")  # fmt: skip
    wish = _expected(entry, rule)
    odd = [p for p in entry.pictures if wish and p.saved and (p.width, p.height) != (wish.width, wish.height)]
    if wish and odd:
        notes.append(f"Computed {wish.width}×{wish.height} pixels (rule {rule}), got {odd[0].width}×{odd[0].height}. "
                     "Give size as WxH to be certain, or set EVOLINK_SIZE_RULE.")  # fmt: skip
    notes += [
        f"The file of picture {picture.index} was moved or deleted."
        for picture in entry.pictures
        if picture.path and not Path(picture.path).is_file()
    ]
    if on_its_way:
        notes.append("EvoLink has not answered to the request yet; it goes on in the background, and may be charged.")
    if entry.error == ADOPTED:
        notes.append(f"{ADOPTED.message}. {ADOPTED.advice}")
    return notes


def _markdown(picture: Picture) -> str:
    path = picture.path or ""
    target = f"<{path}>" if any(c in path for c in " ()<>") else path
    return f"![{Path(path).stem}]({target})"


# --- the same in words -----------------------------------------------------------------------------------


def task_text(out: TaskOut) -> str:
    """What happened, what it cost, what to do now; then every fact of `out`, one to a line."""
    lines = [_headline(out), _money(out)]
    if out.error is not None and out.error.advice:
        lines.append(out.error.advice)
    if out.next_action is not None:
        lines.append(f"Next: call {out.next_action.tool} with {_compact(out.next_action.arguments)}.")
    for image in out.images:
        lines += ["", *_image_lines(image)]
    if out.notes:
        lines += ["", *(f"Note: {note}" for note in out.notes)]
    if out.task_id or out.request:
        lines += ["", *_about(out)]
    return "\n".join(lines)


def _headline(out: TaskOut) -> str:
    name = f"Task {out.task_id}" if out.task_id else "The request"
    saved = [image for image in out.images if image.path]
    if out.status == COMPLETED and saved:
        count = "1 picture" if len(saved) == 1 else f"{len(saved)} pictures"
        failed = f", {len(out.images) - len(saved)} could not be saved" if len(saved) < len(out.images) else ""
        return f"{name} is completed: {count} saved{failed}."
    if out.error is not None:
        message = out.error.message[:1].upper() + out.error.message[1:]
        return f"{name} {_fate(out)}: {message}{'' if message.endswith(('.', '?', '”')) else '.'}"
    if out.status == COMPLETED:
        return f"{name} is completed; its pictures are being fetched."
    progress = f", {out.progress:.0f} %" if out.progress is not None else ""
    return f"{name} is not finished yet (status {out.status}{progress}). This is not an error: it goes on by itself."


def _fate(out: TaskOut) -> str:
    if out.task_id is None:
        return "has an unknown outcome" if out.charged == "unknown" else "was not carried out"
    return {COMPLETED: "is completed, but", FAILED: "failed", "cancelled": "was cancelled"}.get(
        out.status, f"could not be followed (status {out.status})"
    )


def _money(out: TaskOut) -> str:
    if out.charged == "yes":
        return f"Charged: yes{f', {out.credits:g} credits' if out.credits is not None else ''}."
    if out.charged == "no":
        return "Charged: no (credits: 0)." if out.credits is not None else "Charged: no."
    return "Charged: unknown yet." if out.error is None else "Charged: unknown."


def _image_lines(image: ImageOut) -> list[str]:
    lines = [f"Picture {image.index}:"]
    if image.path:
        lines += [image.path, image.markdown or ""]
        lines.append(
            f"{image.width}×{image.height} pixels, {image.mime_type}, {image.bytes} bytes, sha256 {image.sha256}"
        )
    if image.error:
        lines.append(f"Not saved: {image.error}.")
    if image.url:
        lines += [image.url, f"(link expires {image.url_expires_at})"]
    if image.resource_uri:
        lines.append(image.resource_uri)
    return lines


def _about(out: TaskOut) -> list[str]:
    lines = [f"Task: {out.task_id or 'none'}, status {out.status}, created {out.created_at}."]
    if out.expected_size:
        lines.append(f"Computed size: {out.expected_size.width}×{out.expected_size.height}.")
    if out.request:
        lines.append("Request: " + _compact(out.request))
    if out.error:
        lines.append(f"Error code: {out.error.code} (repeating {'may' if out.error.retryable else 'does not'} help).")
    return lines


def _compact(data: dict[str, Any]) -> str:
    """Arguments in one line of JSON, long texts cut."""
    import json

    short = {k: harmless(v, PROMPT_SHOWN) if isinstance(v, str) else _short(v) for k, v in data.items()}
    return json.dumps(short, ensure_ascii=False)
