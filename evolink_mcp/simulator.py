"""EvoLink's HTTP API as a Starlette app whose state is a function of its clock: no key, no network, no jobs.

It reads EvoLink's page on its own and shares no rule with the client: one mistake cannot hide in both. Words in
a prompt order faults, like test card numbers (`FAULTS`).
"""

import base64
import hashlib
import ipaddress
import json
import math
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

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
    "sim:fast": "completed at the first look",
    "sim:done": "completed in the POST's own answer",
    "sim:poll-500": "every second look, from the first, answers 500",
    "sim:poll-429": "every second look, from the first, answers 429 with Retry-After: 1",
    "sim:envelope": 'a look answers {"data": {the task}}',
    "sim:backwards": "progress falls back now and then",
    "sim:unknown-status": "status queued_for_gpu in the middle third",
    "sim:fewer": "one picture, however many were asked for",
    "sim:duplicate": "the first link is given twice",
    "sim:no-results": "completed without any link",
    "sim:expired": "the links answer 403 as if a day had passed",
    "sim:truncated-picture": "the picture's file stops half way",
    "sim:not-a-picture": "the link answers 200 with an HTML page",
    "sim:other-size": "the picture is half as wide and high as asked for",
}
REFUSALS = {  # what EvoLink calls it: HTTP status, error.type, message
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
REFUSED_AT_ONCE = {"400": "invalid_request", "401": "unauthorized", "402": "insufficient_quota"}
REFUSED_AT_ONCE |= {"403": "model_access_denied", "500": "internal_error", "429-always": "rate_limit_exceeded"}
HTML = "<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"
LINK_LIFE_S, UPLOAD_LIFE_S = 24 * 3600.0, 72 * 3600.0
MOST_PIXELS, LEAST_PIXELS, LONGEST_EDGE = 8_294_400, 655_360, 3840
MOST_UPLOADS, MOST_UPLOAD_BYTES = 2000, 100 * 1024**2
PAIRS = ((1, 1), (2, 1), (3, 1), (3, 2), (4, 3), (5, 4), (16, 9), (21, 9))
RATIOS = {f"{a}:{b}" for pair in PAIRS for a, b in (pair, pair[::-1])}
DEFAULT_URL = "http://127.0.0.1"

Answer = tuple[int, dict[str, str], dict[str, Any]]  # status, headers, JSON


def pixels(size: str, resolution: str, rule: str) -> tuple[int, int]:
    """Width and height that the page promises for a legal size; auto comes as a square."""

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
    """Credits: output, text and image tokens, each rounded up to 0.0001 credit, every picture by itself."""
    base = {"low": 16, "medium": 48, "high": 96}[body.get("quality", "medium")]
    long, short = max(size), min(size)
    tiles = (2 * base * short + long) // (2 * long)
    drawn = math.ceil(base * tiles * (2_000_000 + long * short) / 4_000_000)
    read, seen = math.ceil(len(body["prompt"].encode()) / 4), 1536 * len(body.get("image_urls", ()))
    rates = ((drawn, 18_360), (read, 3_060), (seen, 4_896))  # ten-millionths of a credit a token
    return pictures * sum(-(-tokens * rate // 1000) for tokens, rate in rates) / 10_000


def _drawable(size: Any) -> bool:
    if not isinstance(size, str):
        return False
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


def _link(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"https?://[^/\s?#]+\S*", value) is not None


def _callback(value: Any) -> bool:
    if not _link(value) or len(value) > 2048:
        return False
    found = re.fullmatch(r"https://(\[[^]]*\]|[^/:?#@\s\[]+)(:\d+)?([/?#]\S*)?", value)
    if found is None:
        return False
    try:
        return ipaddress.ip_address(found[1].strip("[]")).is_global
    except ValueError:
        return re.fullmatch(r"[^.\[]+(\.[^.\[]+)*\.[A-Za-z][^.\[]*\.?", found[1]) is not None


def _one_of(*words: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in words


SURROGATE = re.compile("[\ud800-\udfff]")
PAGE: dict[str, tuple[Callable[[Any], bool], str]] = {  # every field of the page: is it legal, and what would be
    "model": (_one_of("gpt-image-2"), "must be gpt-image-2"),
    "prompt": (
        lambda v: isinstance(v, str) and 1 <= len(v) <= 32_000 and not SURROGATE.search(v),
        "must be a string of 1 to 32000 Unicode code points",
    ),
    "image_urls": (
        lambda v: isinstance(v, list) and 1 <= len(v) <= 16 and all(map(_link, v)),
        "must be 1 to 16 http(s) URLs",
    ),
    "mask_url": (_link, "must be an http(s) URL"),
    "size": (_drawable, "must be auto, one of the 15 ratios, or WxH within the page's limits"),
    "resolution": (lambda v: isinstance(v, str) and v.upper() in ("1K", "2K", "4K"), "must be 1K, 2K or 4K"),
    "quality": (_one_of("low", "medium", "high"), "must be low, medium or high"),
    "background": (_one_of("opaque", "transparent"), "must be opaque or transparent"),
    "output_format": (_one_of("png", "jpeg", "webp"), "must be png, jpeg or webp"),
    "n": (lambda v: type(v) is int and 1 <= v <= 10, "must be an integer from 1 to 10"),
    "callback_url": (_callback, "must be a public https URL of at most 2048 characters"),
}


def faults_of(prompt: str) -> dict[str, str]:
    """The faults that a prompt orders: name -> value, empty where none was given."""
    return dict(re.findall(r"(?<![A-Za-z0-9])sim:([a-z0-9]+(?:-[a-z0-9]+)*)(?:=(\w+(?:\.\d+)?))?", prompt))


def objection(body: Any) -> str:
    """What the page has against this request, in words; empty if nothing."""
    if not isinstance(body, dict):
        return "The body must be a JSON object"
    for name in [*body, "model", "prompt"]:
        if name not in PAGE or name not in body:
            return f"Unknown field: {name}" if name in body else f"{name} is required"
        if not PAGE[name][0](body[name]):
            return f"{name} {PAGE[name][1]}"
    if body.get("background") == "transparent" and body.get("output_format") == "jpeg":
        return "background transparent needs output_format png or webp"
    known = {word.partition("=")[0] for word in FAULTS}
    for name, value in faults_of(body["prompt"]).items():
        if f"sim:{name}" not in known or (name == "slow" and not re.fullmatch(r"(\d+(\.\d+)?)?", value)):
            return f"Unknown magic word sim:{name}={value}"
    return ""


@dataclass(frozen=True)
class Recorded:
    """One request as it came, refused ones too; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float


@dataclass(frozen=True)
class Upload:
    """One uploaded picture; it lives 72 h."""

    id: str
    path: str
    mime: str
    data: bytes
    at: float


@dataclass
class SimulatedTask:
    """One task, paid for; everything but the count of looks is fixed when it is created."""

    id: str
    created: float
    key: str
    body: dict[str, Any]
    faults: dict[str, str]
    size: tuple[int, int]
    duration: float
    reserved: float
    looks: int = 0

    @property
    def pictures(self) -> int:
        return 1 if "fewer" in self.faults else self.body.get("n", 1)

    @property
    def kind(self) -> str:
        return self.body.get("output_format", "png")

    @property
    def end(self) -> str:
        if self.faults.keys() & {"fail", "surrogate"}:
            return "failed"
        return "cancelled" if "cancelled" in self.faults else "completed"


def _ok(data: dict[str, Any]) -> Answer:
    return 200, {}, data


def _error(code: str, message: str = "", **more: Any) -> Answer:
    status, kind, text = REFUSALS[code]
    headers = {"retry-after": "1"} if status == 429 else {}
    return status, headers, {"error": {"code": code, "message": message or text, "type": kind, **more}}


def _file_error(code: int, message: str, status: int = 400) -> Answer:
    return status, {}, {"success": False, "code": code, "msg": message}


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


Act = Callable[[Request, str], Awaitable[Answer | Response]]  # what one endpoint does for one API key


class Simulator:
    """EvoLink in one process; `app` answers for the API host and the files host alike."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.time,
        duration_s: float = 8.0,
        rule: str = "anchor-edge",
        keys: Mapping[str, float] | None = None,
        honours_idempotency: bool = True,
        public_url: str | None = None,
    ) -> None:
        if rule not in ("anchor-edge", "pixel-budget"):
            raise ValueError(f"unknown size rule {rule!r}")
        self.clock, self.duration_s, self.rule, self.keys = clock, duration_s, rule, keys
        self.honours_idempotency, self.public_url = honours_idempotency, public_url
        self.tasks: dict[str, SimulatedTask] = {}
        self.requests: list[Recorded] = []
        self.uploads: dict[str, Upload] = {}
        self._replays: dict[tuple[str, str], tuple[str, str]] = {}  # (API key, Idempotency-Key) -> body, task id
        self._turned_away: set[str] = set()
        self._uploaded = 0
        self._drawn: dict[tuple[str, int], bytes] = {}
        doors = [
            ("POST", "/v1/images/generations", self._post),
            ("GET", "/v1/tasks", self._list),
            ("POST", "/v1/tasks/batch", self._batch),
            ("GET", "/v1/tasks/{id}", self._get),
            ("GET", "/v1/credits", self._credits),
            ("GET", "/v1/models", self._models),
            ("POST", "/api/v1/files/upload/{how}", self._upload),
            ("GET", "/api/v1/files/quota", self._quota),
            ("GET", "/pictures/{id}/{name}", self._picture),
            ("GET", "/files/{path:path}", self._file),
        ]
        self.app = Starlette(
            routes=[
                *(Route(path, self._door(act), methods=[method]) for method, path, act in doors),
                Route("/{path:path}", self._door(self._nowhere), methods=["GET", "POST", "PUT", "DELETE"]),
            ]
        )

    # The clock's side: what is, as a function of age.

    def state(self, task: SimulatedTask) -> tuple[str, int]:
        """Status and progress now."""
        age = self.clock() - task.created
        share = age / task.duration if task.duration > 0 else 1.0
        if share >= 1:
            return task.end, 100 if task.end == "completed" else 0
        if share < 0.1:
            return "pending", 0
        strange = "unknown-status" in task.faults and 1 / 3 <= share < 2 / 3
        back = 20 if "backwards" in task.faults and int(share * 10) % 2 else 0
        progress = max(0, 5 + int(90 * (share - 0.1) / 0.9) - back)
        return "queued_for_gpu" if strange else "processing", progress

    def credits(self, key: str) -> tuple[float, float]:
        """Credits left and used: reserved while a task runs, settled when it completes, back when it fails."""
        held = used = 0.0
        for task in self.tasks.values():
            if task.key == key:
                status, _ = self.state(task)
                used += price(task.body, task.size, task.pictures) if status == "completed" else 0
                held += 0 if status in ("completed", "failed", "cancelled") else task.reserved
        bought = 1000.0 if self.keys is None else self.keys.get(key, 0.0)
        return round(bought - used - held, 4), round(used, 4)

    def view(self, task: SimulatedTask, base_url: str, *, fresh: bool = False, links: bool = True) -> dict:
        """The task as JSON; a fresh one is pending, and a list gives no links."""
        status, progress = ("pending", 0) if fresh and "done" not in task.faults else self.state(task)
        seen = {"created": int(task.created), "id": task.id, "model": "gpt-image-2", "type": "image"}
        seen |= {"object": "image.generation.task", "progress": progress, "status": status}
        if status == "failed":
            code = task.faults.get("fail", "service_error") or "content_policy_violation"
            text = "Half a letter: \ud800" if "surrogate" in task.faults else f"The prompt ordered {code}."
            return seen | {"error": {"code": code, "message": f"{text}\nChange it.", "type": "task_error"}}
        if status != "completed":
            info = {"can_cancel": status != "cancelled", "estimated_time": max(1, round(task.duration))}
            usage = {"billing_rule": "per_token", "credits_reserved": task.reserved, "user_group": "default"}
            return seen | {"task_info": info, "usage": usage}
        cost = price(task.body, task.size, task.pictures)
        base = f"{self.public_url or base_url}/pictures/{task.id}"
        urls = [f"{base}/{k + 1}.{task.kind}" for k in range(task.pictures)]
        if "duplicate" in task.faults:
            urls.append(urls[0])
        if "no-results" in task.faults:
            urls = []
        if links:
            seen |= {"results": urls, "result_data": [{"url": url} for url in urls]}
        money = {"credits": cost, "usd": round(cost / 68, 4), "cny": round(cost / 10, 4)}
        usage = {"billing_rule": "per_token", "credits_used": cost, "user_group": "default", "cost": money}
        return seen | {"duration": int(task.duration), "task_info": {"can_cancel": False}, "usage": usage}

    # The API without HTTP.

    def create(
        self, body: Any, *, key: str = "", idempotency_key: str | None = None, base_url: str = DEFAULT_URL
    ) -> Answer:
        """The paid POST. A page of HTML comes as {"html": ...} under content-type text/html."""
        if self.keys is not None and key not in self.keys:
            return _error("unauthorized")
        if wrong := objection(body):
            return _error("invalid_request", wrong)
        faults, text = faults_of(body["prompt"]), json.dumps(body, sort_keys=True)
        earlier = self._replays.get((key, idempotency_key or "")) if self.honours_idempotency else None
        if earlier is not None:
            if earlier[0] != text:
                return _error("idempotency_conflict")
            return 200, {"idempotency-replayed": "true"}, self.view(self.tasks[earlier[1]], base_url)
        if refused := [REFUSED_AT_ONCE[name] for name in faults if name in REFUSED_AT_ONCE]:
            return _error(refused[0])
        if "429" in faults and body["prompt"] not in self._turned_away:
            self._turned_away.add(body["prompt"])
            return _error("rate_limit_exceeded")
        size = body.get("size", "auto")
        drawn = pixels(size, body.get("resolution", "1K"), self.rule)
        reserved = price(body, (2048, 2048) if size == "auto" else drawn, body.get("n", 1))
        left, _ = self.credits(key)
        if reserved > left:
            return _error("insufficient_quota", estimated_credits=reserved, account_balance_credits=left)
        now = self.clock()
        name = int.from_bytes(hashlib.sha256(f"{now} {len(self.tasks)}".encode()).digest()) % 36**8
        letters = "".join("0123456789abcdefghijklmnopqrstuvwxyz"[name // 36**k % 36] for k in range(8))
        takes = float(faults.get("slow") or self.duration_s * (10 if "slow" in faults else 1))
        task_id = f"task-unified-{int(now)}-{letters}"
        if faults.keys() & {"fast", "done"}:
            takes = 0.0
        task = SimulatedTask(task_id, now, key, body, faults, drawn, takes, reserved)
        self.tasks[task.id] = task
        if idempotency_key:
            self._replays[key, idempotency_key] = text, task.id
        seen = self.view(task, base_url, fresh=True)
        if faults.keys() & {"lost-reply", "html"}:
            return 502 if "lost-reply" in faults else 200, {"content-type": "text/html"}, {"html": HTML}
        if "no-id" in faults:
            del seen["id"]
        return _error("service_unavailable") if "503-created" in faults else _ok(seen)

    def task(self, task_id: str, *, key: str = "", base_url: str = DEFAULT_URL) -> Answer:
        """One look at a task; without a key, at anybody's."""
        if not task_id.startswith("task-unified-"):
            return _error("invalid_task_id", param="task_id")
        task = self.tasks.get(task_id)
        if task is None or (key and key != task.key):
            return _error("permission_denied" if task else "task_not_found")
        task.looks += 1
        if task.looks % 2 and "poll-500" in task.faults:
            return _error("internal_error")
        if task.looks % 2 and "poll-429" in task.faults:
            return _error("rate_limit_exceeded")
        seen = self.view(task, base_url)
        return _ok({"data": seen} if "envelope" in task.faults else seen)

    def keep(self, data: bytes, name: str | None, folder: str | None, base_url: str = DEFAULT_URL) -> Answer:
        """One upload; the same name in the same folder overwrites."""
        kinds = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
        kind = next((kind for magic, kind in kinds.items() if data.startswith(magic)), None)
        if len(data) > MOST_UPLOAD_BYTES:
            return _file_error(40001, "File too large")
        if kind is None or (kind == "webp" and data[8:12] != b"WEBP"):
            return _file_error(40002, "Unsupported file type")
        if len(self._living()) >= MOST_UPLOADS:
            return _file_error(40003, "File quota exceeded")
        now = self.clock()
        self._uploaded += 1
        file_id = "file_" + hashlib.sha256(f"{now} {self._uploaded}".encode()).hexdigest()[:16]
        name = re.sub(r"[^\w.-]", "_", name or f"{file_id}.{kind}")
        folder = re.sub(r"[^\w/-]", "_", folder or "images").strip("/")
        for known in [upload.id for upload in self.uploads.values() if upload.path == f"{folder}/{name}"]:
            del self.uploads[known]
        self.uploads[file_id] = Upload(file_id, f"{folder}/{name}", f"image/{kind}", data, now)
        url = f"{self.public_url or base_url}/files/{folder}/{name}"
        born, dies = (time.strftime("%Y-%m-%dT%XZ", time.gmtime(at)) for at in (now, now + UPLOAD_LIFE_S))
        what = {"file_id": file_id, "file_name": name, "original_name": name, "file_size": len(data)}
        where = {"mime_type": f"image/{kind}", "upload_path": folder, "file_url": url, "download_url": url}
        when = {"upload_time": born, "expires_at": dies}
        return _ok({"success": True, "code": 200, "msg": "success", "data": what | where | when})

    def _living(self) -> list[Upload]:
        return [upload for upload in self.uploads.values() if self.clock() - upload.at < UPLOAD_LIFE_S]

    # The API over HTTP.

    def _door(self, act: Act) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint that notes the request, asks for the key where one is needed, and answers."""

        async def endpoint(request: Request) -> Response:
            path, headers, body = request.url.path, dict(request.headers), await request.body()
            self.requests.append(Recorded(request.method, path, headers, body, self.clock()))
            bearer = re.fullmatch(r"Bearer (\S+)", headers.get("authorization", ""))
            key = bearer[1] if bearer else ""
            welcome = bool(key) if self.keys is None else key in self.keys
            if welcome or not path.startswith(("/v1/", "/api/")):
                answer = await act(request, key)
            elif path.startswith("/api/"):
                answer = _file_error(401, "Invalid or expired token", 401)
            else:
                answer = _error("unauthorized")
            if isinstance(answer, tuple):
                status, extra, data = answer
                # ASCII only, so that a lone surrogate goes out as a JSON escape
                content = data["html"] if "content-type" in extra else json.dumps(data)
                answer = Response(content, status, extra, media_type="application/json")
            answer.headers["x-request-id"] = f"req-{len(self.requests)}"
            return answer

        return endpoint

    async def _nowhere(self, request: Request, key: str) -> Answer:
        return _error("not_found")

    async def _post(self, request: Request, key: str) -> Answer:
        origin, once = _origin(request), request.headers.get("idempotency-key")
        return self.create(_parsed(await request.body()), key=key, idempotency_key=once, base_url=origin)

    async def _get(self, request: Request, key: str) -> Answer:
        return self.task(request.path_params["id"], key=key, base_url=_origin(request))

    async def _list(self, request: Request, key: str) -> Answer:
        asked, groups = request.query_params, {"pending": "processing", "queued_for_gpu": "processing"}
        page, per_page = asked.get("page", "1"), asked.get("page_size", "20")
        if not (re.fullmatch(r"[1-9]\d{0,5}", page) and re.fullmatch(r"[1-9]\d?|100", per_page)):
            return _error("invalid_request", "page starts at 1, page_size is 1 to 100")
        tasks = [task for task in reversed(self.tasks.values()) if task.key == key]
        views = [self.view(task, "", links=False) for task in tasks]
        status, others = asked.get("status"), ("type", "model")
        views = [v for v in views if status in (None, v["status"], groups.get(v["status"]))]
        found = [v for v in views if all(asked.get(name) in (None, v[name]) for name in others)]
        start = (int(page) - 1) * int(per_page)
        shown, number = found[start : start + int(per_page)], {"page": int(page), "page_size": int(per_page)}
        return _ok({"data": shown, "total": len(found)} | number)

    async def _batch(self, request: Request, key: str) -> Answer:
        body = _parsed(await request.body())
        ids = body.get("task_ids") if isinstance(body, dict) else None
        if not (isinstance(ids, list) and 1 <= len(ids) <= 50 and all(isinstance(one, str) for one in ids)):
            return _error("invalid_request", "task_ids must be 1 to 50 strings", param="task_ids")
        mine = [self.tasks[one] for one in ids if one in self.tasks and self.tasks[one].key == key]
        return _ok({"data": [self.view(task, _origin(request)) for task in mine]})

    async def _credits(self, request: Request, key: str) -> Answer:
        left, used = self.credits(key)
        user = {"remaining_credits": left, "used_credits": used}
        both = {"user": user, "token": user | {"unlimited_credits": False}}
        return _ok({"success": True, "message": "", "data": both})

    async def _models(self, request: Request, key: str) -> Answer:
        return _ok({"object": "list", "data": [{"id": "gpt-image-2", "object": "model"}]})

    async def _quota(self, request: Request, key: str) -> Answer:
        used = len(self._living())
        files = {"used_files": used, "max_files": MOST_UPLOADS, "remain_files": MOST_UPLOADS - used}
        group = {"user_group": "default", "is_custom": False, "quota_reason": "default"}
        return _ok({"success": True, "code": 200, "data": group | files})

    async def _upload(self, request: Request, key: str) -> Answer:
        how, data = request.path_params["how"], None
        if how == "stream":
            async with request.form() as form:
                told: Any = {name: value for name, value in form.items() if isinstance(value, str)}
                file = form.get("file")
                told = {"file_name": told.get("fileName"), "upload_path": told.get("uploadPath")} | told
                if isinstance(file, UploadFile):
                    data, told["file_name"] = await file.read(), told["file_name"] or file.filename
        else:
            told = _parsed(await request.body())
        told = told if isinstance(told, dict) else {}
        if any(not isinstance(value, str) for value in told.values() if value is not None):
            return _file_error(400, "Every field is a string")
        if how == "base64" and told.get("base64_data"):
            try:
                data = base64.b64decode(told["base64_data"].rpartition(",")[2], validate=True)
            except ValueError:
                return _file_error(400, "base64_data is not base64")
        if how == "url" and _link(told.get("file_url")):
            data = await self._fetched(told["file_url"])
        if data is None:
            return _file_error(400, f"Nothing to upload by {how}")
        return self.keep(data, told.get("file_name"), told.get("upload_path"), _origin(request))

    async def _fetched(self, url: str) -> bytes:
        """What lies behind a URL: there is no network here, so a stranger's picture is drawn from its name."""
        from evolink_mcp.paintings import paint

        return await anyio.to_thread.run_sync(paint, url, 1, (512, 512))

    async def _file(self, request: Request, key: str) -> Answer | Response:
        for upload in self._living():
            if upload.path == request.path_params["path"]:
                return Response(upload.data, media_type=upload.mime)
        return _error("not_found", "No such file")

    async def _picture(self, request: Request, key: str) -> Answer | Response:
        task = self.tasks.get(request.path_params["id"])
        name = re.fullmatch(r"([1-9]\d?)\.(\w+)", request.path_params["name"])
        if task is None or name is None or name[2] != task.kind or int(name[1]) > task.pictures:
            return _error("not_found", "No such picture")
        if self.state(task)[0] != "completed":
            return _error("not_found", "No such picture yet")
        if "expired" in task.faults or self.clock() - task.created - task.duration >= LINK_LIFE_S:
            return _error("link_expired")
        if "not-a-picture" in task.faults:
            return Response(HTML, media_type="text/html")
        data = await anyio.to_thread.run_sync(self._draw, task, int(name[1]))
        return Response(
            data[: len(data) // 2] if "truncated-picture" in task.faults else data, media_type=f"image/{task.kind}"
        )

    def _draw(self, task: SimulatedTask, index: int) -> bytes:
        from evolink_mcp.paintings import paint

        if (task.id, index) not in self._drawn:
            width, height = (edge // 2 for edge in task.size) if "other-size" in task.faults else task.size
            self._drawn[task.id, index] = paint(
                task.body["prompt"], index, (width, height), task.kind, task.body.get("background") == "transparent"
            )
        return self._drawn[task.id, index]


def _origin(request: Request) -> str:
    return str(request.base_url).rstrip("/")
