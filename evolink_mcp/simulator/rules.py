"""Check requests by EvoLink's page: limits, prices, sizes, and the faults that a prompt can order.

It shares no code with the client, so that one mistake cannot hide in both.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable
from typing import Any, cast

FAULTS: dict[str, str] = {
    "sim:fail": "the task fails in the end: content_policy_violation; its credits come back",
    "sim:fail=CODE": "the task fails in the end with this error code",
    "sim:cancelled": "the task ends as cancelled; its credits come back",
    "sim:surrogate": "the task fails with a lone surrogate in its message",
    "sim:lost-reply": "the task is created, the answer is a 502 HTML page",
    "sim:503-created": "the task is created, the answer is 503",
    "sim:html": "the task is created, the answer is 200 with an HTML page",
    "sim:no-id": "the task is created, the answer is 200 without its id",
    "sim:400": "refused: invalid_request",
    "sim:401": "refused: unauthorized",
    "sim:402": "refused: insufficient_quota",
    "sim:403": "refused: model_access_denied",
    "sim:429": "the first POST of this prompt is refused with Retry-After: 1, later ones are taken",
    "sim:429-always": "every POST is refused with Retry-After: 1",
    "sim:500": "500 and no task",
    "sim:slow": "takes ten times as long",
    "sim:slow=SECONDS": "takes this long",
    "sim:fast": "completed at the first poll",
    "sim:done": "completed in the POST's own answer",
    "sim:poll-500": "every second poll, from the first, answers 500",
    "sim:poll-429": "every second poll, from the first, answers 429 with Retry-After: 1",
    "sim:envelope": 'a poll answers {"data": {the task}}',
    "sim:backwards": "progress falls back now and then",
    "sim:unknown-status": "status queued_for_gpu in the middle third",
    "sim:fewer": "one picture, independent of n",
    "sim:duplicate": "the first link is given twice",
    "sim:no-results": "completed without any link",
    "sim:expired": "the links answer 403 as if a day had passed",
    "sim:truncated-picture": "the picture's file stops half way",
    "sim:not-a-picture": "the link answers 200 with an HTML page",
    "sim:hostile-picture": "the first link answers a JPEG with 100,000 fill bytes",
    "sim:other-size": "the picture is half as wide and high as asked for",
}
REFUSALS = {  # code: HTTP status, error.type, message
    "invalid_request": (400, "invalid_request_error", "Invalid request parameters"),
    "invalid_task_id": (400, "invalid_request_error", "Task id must start with task-unified-"),
    "unauthorized": (401, "authentication_error", "Invalid or expired token"),
    "insufficient_quota": (402, "insufficient_quota", "Insufficient credits. Please top up"),
    "model_access_denied": (403, "invalid_request_error", "This key has no access to the model"),
    "permission_denied": (403, "invalid_request_error", "This task belongs to another user"),
    "task_not_found": (404, "invalid_request_error", "Task not found"),
    "not_found": (404, "invalid_request_error", "No such endpoint"),
    "link_expired": (403, "invalid_request_error", "This link has expired"),
    "idempotency_conflict": (409, "invalid_request_error", "Idempotency-Key was used with another body"),
    "rate_limit_exceeded": (429, "rate_limit_error", "Too many requests"),
    "internal_error": (500, "api_error", "Internal server error"),
    "service_unavailable": (503, "service_unavailable_error", "Service temporarily unavailable"),
}
REFUSED_AT_ONCE = {
    "400": "invalid_request", "401": "unauthorized", "402": "insufficient_quota",
    "403": "model_access_denied", "500": "internal_error", "429-always": "rate_limit_exceeded",
}  # fmt: skip
HTML = "<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"
LINK_LIFE_S, UPLOAD_LIFE_S = 24 * 3600.0, 72 * 3600.0
MOST_PIXELS, LEAST_PIXELS, LONGEST_EDGE = 8_294_400, 655_360, 3840
MOST_UPLOADS, MOST_UPLOAD_BYTES = 2000, 100 * 1024**2
PAIRS = ((1, 1), (2, 1), (3, 1), (3, 2), (4, 3), (5, 4), (16, 9), (21, 9))
RATIOS = {f"{a}:{b}" for pair in PAIRS for a, b in (pair, pair[::-1])}
DEFAULT_URL = "http://127.0.0.1"


def pixels(size: str, resolution: str, rule: str) -> tuple[int, int]:
    """Return the width and height of a legal size by the page. auto gives a square."""

    def near16(edge: float) -> int:
        return 16 * round(edge / 16)

    if size == "auto":
        return 1024, 1024
    a, b = (int(part) for part in re.split("[:x×]", size))
    if ":" not in size:
        return a, b
    ratio, tier = max(a, b) / min(a, b), ("1K", "2K", "4K").index(resolution.upper())
    if rule == "anchor-edge":
        long = (near16(1024 * ratio), 2048, 3840)[tier]
        short = 1024 if tier == 0 else near16(long / ratio)
    else:
        budget = (1024**2, 2048**2, MOST_PIXELS)[tier]
        long, short = near16(math.sqrt(budget * ratio)), near16(math.sqrt(budget / ratio))
        if long > LONGEST_EDGE:
            long, short = LONGEST_EDGE, near16(LONGEST_EDGE / ratio)
    if long * short > MOST_PIXELS:
        shrink = math.sqrt(MOST_PIXELS / (long * short))
        long, short = int(long * shrink) // 16 * 16, int(short * shrink) // 16 * 16
    return (long, short) if a >= b else (short, long)


def price(body: dict[str, Any], size: tuple[int, int], pictures: int) -> float:
    """Return the credits for output, text and image tokens. Each is rounded up to 0.0001 credit, per image."""
    base = {"low": 16, "medium": 48, "high": 96}[body.get("quality", "medium")]
    long, short = max(size), min(size)
    tiles = (2 * base * short + long) // (2 * long)
    drawn = math.ceil(base * tiles * (2_000_000 + long * short) / 4_000_000)
    text_tokens, image_tokens = math.ceil(len(body["prompt"].encode()) / 4), 1536 * len(body.get("image_urls", ()))
    rates = ((drawn, 18_360), (text_tokens, 3_060), (image_tokens, 4_896))  # ten-millionths of a credit a token
    return pictures * sum(-(-tokens * rate // 1000) for tokens, rate in rates) / 10_000


def _drawable(size: Any) -> bool:
    if not isinstance(size, str):
        return False
    # Without re.ASCII, \d accepts digits of other scripts.
    match = re.fullmatch(r"([1-9]\d{0,4})[x×]([1-9]\d{0,4})", size, re.ASCII)
    if match is None:
        return size == "auto" or size in RATIOS
    long, short = sorted(map(int, match.groups()), reverse=True)
    return (
        long % 16 == short % 16 == 0
        and long <= LONGEST_EDGE
        and long <= 3 * short
        and LEAST_PIXELS <= long * short <= MOST_PIXELS
    )


def is_link(value: Any) -> bool:
    """Return whether `value` is an http(s) URL."""
    return isinstance(value, str) and re.fullmatch(r"https?://[^/\s?#]+\S*", value) is not None


def _callback(value: Any) -> bool:
    if not is_link(value) or len(value) > 2048:
        return False
    match = re.fullmatch(r"https://(\[[^]]*\]|[^/:?#@\s\[]+)(:\d+)?([/?#]\S*)?", value)
    if match is None:
        return False
    try:
        return ipaddress.ip_address(match[1].strip("[]")).is_global
    except ValueError:
        return re.fullmatch(r"[^.\[]+(\.[^.\[]+)*\.[A-Za-z][^.\[]*\.?", match[1]) is not None


def _one_of(*words: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in words


SURROGATE = re.compile("[\ud800-\udfff]")
PAGE: dict[str, tuple[Callable[[Any], bool], str]] = {  # field of the page: its check, and the text of a refusal
    "model": (_one_of("gpt-image-2"), "must be gpt-image-2"),
    "prompt": (
        lambda v: isinstance(v, str) and 1 <= len(v) <= 32_000 and not SURROGATE.search(v),
        "must be a string of 1 to 32000 Unicode code points",
    ),
    "image_urls": (
        lambda v: (
            isinstance(v, list) and 1 <= len(cast("list[Any]", v)) <= 16 and all(map(is_link, cast("list[Any]", v)))
        ),
        "must be 1 to 16 http(s) URLs",
    ),
    "mask_url": (is_link, "must be an http(s) URL"),
    "size": (_drawable, "must be auto, one of the 15 ratios, or WxH within the page's limits"),
    "resolution": (lambda v: isinstance(v, str) and v.upper() in ("1K", "2K", "4K"), "must be 1K, 2K or 4K"),
    "quality": (_one_of("low", "medium", "high"), "must be low, medium or high"),
    "background": (_one_of("opaque", "transparent"), "must be opaque or transparent"),
    "output_format": (_one_of("png", "jpeg", "webp"), "must be png, jpeg or webp"),
    # isinstance would accept `true`.
    "n": (lambda v: type(v) is int and 1 <= v <= 10, "must be an integer from 1 to 10"),
    "callback_url": (_callback, "must be a public https URL of at most 2048 characters"),
}


def faults_of(prompt: str) -> dict[str, str]:
    """Return the faults in a prompt, by name. The value is empty if the prompt gives none."""
    return dict(re.findall(r"(?<![A-Za-z0-9])sim:([a-z0-9]+(?:-[a-z0-9]+)*)(?:=(\w+(?:\.\d+)?))?", prompt))


def objection(body: Any) -> str:
    """Return the reason why the page forbids this request. Empty: the request is legal."""
    if not isinstance(body, dict):
        return "The body must be a JSON object"
    fields = cast("dict[str, Any]", body)
    for name in [*fields, "model", "prompt"]:
        if name not in PAGE or name not in fields:
            return f"Unknown field: {name}" if name in fields else f"{name} is required"
        if not PAGE[name][0](fields[name]):
            return f"{name} {PAGE[name][1]}"
    if fields.get("background") == "transparent" and fields.get("output_format") == "jpeg":
        return "background transparent needs output_format png or webp"
    fault_names = {word.partition("=")[0] for word in FAULTS}
    for name, value in faults_of(fields["prompt"]).items():
        if f"sim:{name}" not in fault_names or (name == "slow" and not re.fullmatch(r"(\d+(\.\d+)?)?", value)):
            return f"Unknown magic word sim:{name}={value}"
    return ""
