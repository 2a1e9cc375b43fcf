"""The text of an answer about a task: the same facts as its structured content."""

from __future__ import annotations

import json
from typing import Any

from evolink_mcp.api.costs import format_credits
from evolink_mcp.api.task import COMPLETED, FAILED
from evolink_mcp.sanitize import harmless
from evolink_mcp.tools.task_answer import TEXT_MAX_CHARS, ImageOut, TaskOut, shorten_value


# Gemini CLI gives the model only the text, Codex only the structured content.
def task_text(out: TaskOut) -> str:
    """Return event, charge and next step, then one line for each fact of `out`."""
    bill = f"{out.bill_difference} " if out.bill_difference else ""
    lines = [bill + "Unconfirmed match, a guess: " * out.guess + _headline(out), _money(out)]
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


def row_text(row: dict[str, Any]) -> str:
    """Return one task of a list as a few lines."""
    paid = {"yes": format_credits(row["credits"]) if "credits" in row else "charged", "no": "not charged"}.get(
        row["charged"], "charged: unknown"
    )
    if "reserved" in row:
        paid += f", {format_credits(row['reserved'])} reserved"
    when = str(row["created_at"])[:16].replace("T", " ")
    head = ", ".join([f"{when} UTC", row["status"] + " (unconfirmed match)" * row.get("guess", False), paid])
    lines = [f"{row.get('task_id', 'No task id')}: {head}{', bought with another key' * row.get('other_key', False)}"]
    if "prompt" in row:
        lines.append(f"“{row['prompt']}”")
    lines += row.get("paths", [])
    if "edited_from" in row:
        lines.append(f"Edited from {', '.join(row['edited_from'])}")
    if "error" in row:
        lines.append(sentence(row["error"]))
    return "\n".join(lines)


def sentence(text: str) -> str:
    """Return the text with a capital letter and one full stop."""
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '?', '!', '.”', '?”')) else '.'}"


def count_of_pictures(count: int) -> str:
    """Return "1 picture" or "3 pictures"."""
    return "1 picture" if count == 1 else f"{count} pictures"


def _headline(out: TaskOut) -> str:
    name = f"Task {out.task_id}" if out.task_id else "The request"
    saved = [image for image in out.images if image.resource_uri]
    if out.status == COMPLETED and saved:
        count = count_of_pictures(len(saved))
        verb = "saved" if any(image.path for image in saved) else "ready"
        missing = sum(image.resource_uri is None and image.path is not None for image in out.images)
        unsaved = len(out.images) - len(saved) - missing
        failed = f", {unsaved} could not be saved" * bool(unsaved) + f", {missing} missing" * bool(missing)
        return f"{name} is completed: {count} {verb}{failed}."
    if out.error is not None:
        return f"{name} {_outcome(out)}: {sentence(out.error.message)}"
    if out.status == COMPLETED:
        return f"{name} is completed. The server is downloading its pictures."
    progress = f", {out.progress:.0f} %" if out.progress is not None else ""
    return (
        f"{name} is not finished yet (status {out.status}{progress}). This is not an error. The task continues at "
        "EvoLink and cannot be cancelled."
    )


def _outcome(out: TaskOut) -> str:
    if out.task_id is None:
        return "has an unknown outcome" if out.charged == "unknown" else "was not carried out"
    return {COMPLETED: "is completed, but", FAILED: "failed", "cancelled": "was cancelled"}.get(
        out.status, f"could not be read (status {out.status})"
    )


def _money(out: TaskOut) -> str:
    if out.charged == "yes":
        return f"Charged: yes{f', {format_credits(out.credits)}' if out.credits is not None else ''}."
    if out.charged == "no":
        return f"Charged: no, {format_credits(0)}." if out.credits is not None else "Charged: no."
    if out.guess:
        return "Charged: unknown. It is not confirmed that this task belongs to the call with the lost answer."
    return "Charged: unknown yet." if out.error is None else "Charged: unknown."


def _image_lines(image: ImageOut) -> list[str]:
    lines = [f"Picture {image.index}:"]
    if image.resource_uri:
        lines += [image.path] if image.path else []
        lines += [image.markdown or ""]
        lines.append(
            f"{image.width}×{image.height} pixels, {image.mime_type}, {image.bytes or 0:,} bytes, sha256 {image.sha256}"
        )
    if image.error:
        lines.append(f"{'Missing' if image.path else 'Not saved'}: {sentence(image.error)}")
    # Claude Desktop makes a URL clickable only on a separate line.
    if image.url:
        lines += [image.url] if image.path or not image.resource_uri else []  # otherwise the Markdown line has it
        lines.append(f"(link expires {image.url_expires_at})")
    if image.resource_uri:
        lines.append(image.resource_uri)
    return lines


def _about(out: TaskOut) -> list[str]:
    lines = [f"Task: {out.task_id or 'none'}, created {out.created_at or 'at an unknown time'}."]
    lines += [f"Edited from {_reference_text(reference)}." for reference in out.references]
    if out.expected_size:
        lines.append(f"Computed size: {out.expected_size.width}×{out.expected_size.height}.")
    if out.request:
        lines.append("Request: " + _compact(out.request))
    if out.error:
        lines.append(f"Error code: {out.error.code} (a repeat {'may' if out.error.retryable else 'does not'} help).")
    return lines


def _reference_text(reference: dict[str, Any]) -> str:
    """Return the caller's value, with the earlier picture that it names and the value that EvoLink got."""
    given = reference["given"]
    task_id = reference["task_id"]
    details: list[str] = []
    if task_id is not None and task_id not in given:
        details.append(f"picture {reference['index']} of {task_id}")
    if reference["url"] not in (None, given):
        details.append(f"sent as {reference['url']}")
    if reference["sha256"] is not None:
        details.append(f"sha256 {reference['sha256']}")
    return f"{given} ({', '.join(details)})" if details else given


def _compact(data: dict[str, Any]) -> str:
    """Return arguments as one line of JSON, with long texts shortened."""
    short = {k: harmless(v, TEXT_MAX_CHARS) if isinstance(v, str) else shorten_value(v) for k, v in data.items()}
    return json.dumps(short, ensure_ascii=False)
