"""Simulate EvoLink without HTTP. The state of a task follows from its age, so no code runs in the background."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from evolink_mcp.simulator.rules import (
    DEFAULT_URL,
    HTML,
    MOST_UPLOAD_BYTES,
    MOST_UPLOADS,
    REFUSALS,
    REFUSED_AT_ONCE,
    UPLOAD_LIFE_S,
    faults_of,
    objection,
    pixels,
    price,
)

LIST_TIMES = ("number", "iso", "none")  # formats of the creation time in the account's list

Answer = tuple[int, dict[str, str], dict[str, Any]]  # status, headers, JSON


@dataclass(frozen=True)
class Recorded:
    """One received request, refused or not. Header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float


@dataclass(frozen=True)
class Upload:
    """One uploaded image. It expires after 72 h."""

    id: str
    path: str
    mime: str
    data: bytes
    at: float


@dataclass
class SimulatedTask:
    """One paid task. Only the number of reads changes later. Times are in seconds, `reserved` is in credits."""

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
        """The number of result images."""
        return 1 if "fewer" in self.faults else self.body.get("n", 1)

    @property
    def kind(self) -> str:
        """png, jpeg or webp."""
        return self.body.get("output_format", "png")

    @property
    def end(self) -> str:
        """The final status."""
        if self.faults.keys() & {"fail", "surrogate"}:
            return "failed"
        return "cancelled" if "cancelled" in self.faults else "completed"


def ok(data: dict[str, Any]) -> Answer:
    """Return a successful answer."""
    return 200, {}, data


def error(code: str, message: str = "", **details: Any) -> Answer:
    """Return a refusal by its code in REFUSALS."""
    status, kind, text = REFUSALS[code]
    headers = {"retry-after": "1"} if status == 429 else {}
    return status, headers, {"error": {"code": code, "message": message or text, "type": kind, **details}}


def file_error(code: int, message: str, status: int = 400) -> Answer:
    """Return a refusal in the format of the file API."""
    return status, {}, {"success": False, "code": code, "msg": message}


def parsed(data: bytes) -> Any:
    """Return a body as JSON. None: it is not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


class Simulation:
    """EvoLink without HTTP: accounts, tasks and uploads, each a function of its age."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.time,
        duration_s: float = 8.0,
        rule: str = "anchor-edge",
        keys: Mapping[str, float] | None = None,
        honours_idempotency: bool = True,
        public_url: str | None = None,
        list_times: str = "number",
        accounts: Mapping[str, str] | None = None,
    ) -> None:
        """`keys` are the accepted keys with their credits. `accounts` maps a key to the first key of its account."""
        if list_times not in LIST_TIMES:
            raise ValueError(f"unknown shape of times {list_times!r}")
        if rule not in ("anchor-edge", "pixel-budget"):
            raise ValueError(f"unknown size rule {rule!r}")
        self.clock, self.duration_s, self.rule, self.keys = clock, duration_s, rule, keys
        self.honours_idempotency, self.public_url = honours_idempotency, public_url
        self.list_times = list_times
        self.accounts = dict(accounts or {})
        self.tasks: dict[str, SimulatedTask] = {}
        self.requests: list[Recorded] = []
        self.uploads: dict[str, Upload] = {}
        self._replays: dict[tuple[str, str], tuple[str, str]] = {}  # (API key, Idempotency-Key) -> body, task id
        self._turned_away: set[str] = set()
        self._uploaded = 0
        self._drawn: dict[tuple[str, int], bytes] = {}

    # --- states, as functions of age ---

    def state(self, task: SimulatedTask) -> tuple[str, int]:
        """Return the current status and progress."""
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
        """Return the remaining and used credits. A running task reserves credits; a failed one returns them."""
        held = used = 0.0
        for task in self.tasks.values():
            if task.key == key:
                status, _ = self.state(task)
                used += price(task.body, task.size, task.pictures) if status == "completed" else 0
                held += 0 if status in ("completed", "failed", "cancelled") else task.reserved
        bought = 1000.0 if self.keys is None else self.keys.get(key, 0.0)
        return round(bought - used - held, 4), round(used, 4)

    def view(self, task: SimulatedTask, base_url: str, *, fresh: bool = False, links: bool = True) -> dict[str, Any]:
        """Return the task as JSON. A new task is pending. A list has no links."""
        status, progress = ("pending", 0) if fresh and "done" not in task.faults else self.state(task)
        view: dict[str, Any] = {"created": int(task.created), "id": task.id, "model": "gpt-image-2", "type": "image"}
        view |= {"object": "image.generation.task", "progress": progress, "status": status}
        if status == "failed":
            code = task.faults.get("fail", "service_error") or "content_policy_violation"
            text = "Half a letter: \ud800" if "surrogate" in task.faults else f"The prompt ordered {code}."
            return view | {"error": {"code": code, "message": f"{text}\nChange it.", "type": "task_error"}}
        if status != "completed":
            # EvoLink has this flag, but no endpoint that cancels a task.
            info = {"can_cancel": status != "cancelled", "estimated_time": max(1, round(task.duration))}
            usage = {"billing_rule": "per_token", "credits_reserved": task.reserved, "user_group": "default"}
            return view | {"task_info": info, "usage": usage}
        cost = price(task.body, task.size, task.pictures)
        base = f"{self.public_url or base_url}/pictures/{task.id}"
        urls = [f"{base}/{k + 1}.{task.kind}" for k in range(task.pictures)]
        if "duplicate" in task.faults:
            urls.append(urls[0])
        if "no-results" in task.faults:
            urls = []
        if links:
            view |= {"results": urls, "result_data": [{"url": url} for url in urls]}
        # EvoLink sells 68 credits for 1 USD.
        money = {"credits": cost, "usd": round(cost / 68, 4), "cny": round(cost / 10, 4)}
        usage = {"billing_rule": "per_token", "credits_used": cost, "user_group": "default", "cost": money}
        return view | {"duration": int(task.duration), "task_info": {"can_cancel": False}, "usage": usage}

    def row(self, task: SimulatedTask) -> dict[str, Any]:
        """Return the task as a row of the account's list: without links or credits, and with another name for the time."""
        row = self.view(task, "", links=False)
        row.pop("usage", None)
        created = row.pop("created")
        if self.list_times == "iso":
            return row | {"created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created))}
        return row | ({"created_at": created} if self.list_times == "number" else {})

    # --- the API without HTTP ---

    def create(
        self, body: Any, *, key: str = "", idempotency_key: str | None = None, base_url: str = DEFAULT_URL
    ) -> Answer:
        """Answer the paid POST. An HTML page is {"html": ...} with content-type text/html."""
        if self.keys is not None and key not in self.keys:
            return error("unauthorized")
        if wrong := objection(body):
            return error("invalid_request", wrong)
        faults, text = faults_of(body["prompt"]), json.dumps(body, sort_keys=True)
        earlier = self._replays.get((key, idempotency_key or "")) if self.honours_idempotency else None
        if earlier is not None:
            if earlier[0] != text:
                return error("idempotency_conflict")
            return 200, {"idempotency-replayed": "true"}, self.view(self.tasks[earlier[1]], base_url)
        if refused := [REFUSED_AT_ONCE[name] for name in faults if name in REFUSED_AT_ONCE]:
            return error(refused[0])
        if "429" in faults and body["prompt"] not in self._turned_away:
            self._turned_away.add(body["prompt"])
            return error("rate_limit_exceeded")
        size = body.get("size", "auto")
        drawn = pixels(size, body.get("resolution", "1K"), self.rule)
        # For auto, EvoLink's own estimate assumes 2048×2048.
        reserved = price(body, (2048, 2048) if size == "auto" else drawn, body.get("n", 1))
        remaining, _ = self.credits(key)
        if reserved > remaining:
            return error("insufficient_quota", estimated_credits=reserved, account_balance_credits=remaining)
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
        view = self.view(task, base_url, fresh=True)
        if faults.keys() & {"lost-reply", "html"}:
            return 502 if "lost-reply" in faults else 200, {"content-type": "text/html"}, {"html": HTML}
        if "no-id" in faults:
            del view["id"]
        return error("service_unavailable") if "503-created" in faults else ok(view)

    def task(self, task_id: str, *, key: str = "", base_url: str = DEFAULT_URL) -> Answer:
        """Answer a read of a task. Without a key, every account's task is readable."""
        if not task_id.startswith("task-unified-"):
            return error("invalid_task_id", param="task_id")
        task = self.tasks.get(task_id)
        # EvoLink answers 403 for a task of another account, and 404 only for an unknown one.
        if task is None or (key and key != task.key):
            return error("permission_denied" if task else "task_not_found")
        task.looks += 1
        if task.looks % 2 and "poll-500" in task.faults:
            return error("internal_error")
        if task.looks % 2 and "poll-429" in task.faults:
            return error("rate_limit_exceeded")
        view = self.view(task, base_url)
        return ok({"data": view} if "envelope" in task.faults else view)

    def keep(self, data: bytes, name: str | None, folder: str | None, base_url: str = DEFAULT_URL) -> Answer:
        """Store an upload. The same name in the same folder overwrites."""
        kinds = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
        kind = next((kind for magic, kind in kinds.items() if data.startswith(magic)), None)
        if len(data) > MOST_UPLOAD_BYTES:
            return file_error(40001, "File too large")
        if kind is None or (kind == "webp" and data[8:12] != b"WEBP"):
            return file_error(40002, "Unsupported file type")
        if len(self._living()) >= MOST_UPLOADS:
            return file_error(40003, "File quota exceeded")
        now = self.clock()
        self._uploaded += 1
        file_id = "file_" + hashlib.sha256(f"{now} {self._uploaded}".encode()).hexdigest()[:16]
        name = re.sub(r"[^\w.-]", "_", name or f"{file_id}.{kind}")
        folder = re.sub(r"[^\w/-]", "_", folder or "images").strip("/")
        for upload_id in [upload.id for upload in self.uploads.values() if upload.path == f"{folder}/{name}"]:
            del self.uploads[upload_id]
        self.uploads[file_id] = Upload(file_id, f"{folder}/{name}", f"image/{kind}", data, now)
        url = f"{self.public_url or base_url}/files/{folder}/{name}"
        born, dies = (time.strftime("%Y-%m-%dT%XZ", time.gmtime(at)) for at in (now, now + UPLOAD_LIFE_S))
        description = {"file_id": file_id, "file_name": name, "original_name": name, "file_size": len(data)}
        where = {"mime_type": f"image/{kind}", "upload_path": folder, "file_url": url, "download_url": url}
        when = {"upload_time": born, "expires_at": dies}
        return ok({"success": True, "code": 200, "msg": "success", "data": description | where | when})

    def _living(self) -> list[Upload]:
        return [upload for upload in self.uploads.values() if self.clock() - upload.at < UPLOAD_LIFE_S]
