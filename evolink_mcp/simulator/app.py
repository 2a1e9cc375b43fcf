"""EvoLink's HTTP API as a Starlette app over a simulation: no key, no network, no jobs.

It has its own reading of EvoLink's page, so that one mistake cannot hide in both. Words in a prompt order faults,
like test card numbers (`FAULTS`).
"""

import base64
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any, cast

import anyio.to_thread
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from evolink_mcp.simulator.rules import (
    FAULTS,
    HTML,
    LINK_LIFE_S,
    MOST_UPLOADS,
    is_link,
)
from evolink_mcp.simulator.simulation import (
    Answer,
    Recorded,
    SimulatedTask,
    Simulation,
    Upload,
    error,
    file_error,
    ok,
    parsed,
)

__all__ = ["FAULTS", "Recorded", "SimulatedTask", "Simulator", "Upload"]

Act = Callable[[Request, str], Awaitable[Answer | Response]]  # the work of one endpoint for one API key


class Simulator(Simulation):
    """EvoLink in one process. `app` serves the API host and the files host."""

    def __init__(self, **simulation: Any) -> None:
        super().__init__(**simulation)
        endpoints = [
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
                *(Route(path, self._endpoint(act), methods=[method]) for method, path, act in endpoints),
                Route("/{path:path}", self._endpoint(self._nowhere), methods=["GET", "POST", "PUT", "DELETE"]),
            ]
        )

    # --- the API over HTTP ---

    def _endpoint(self, act: Act) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint that records the request, checks the key if one is needed, and answers."""

        async def endpoint(request: Request) -> Response:
            path, headers, body = request.url.path, dict(request.headers), await request.body()
            self.requests.append(Recorded(request.method, path, headers, body, self.clock()))
            bearer = re.fullmatch(r"Bearer (\S+)", headers.get("authorization", ""))
            key = bearer[1] if bearer else ""
            welcome = bool(key) if self.keys is None else key in self.keys
            if welcome or not path.startswith(("/v1/", "/api/")):
                answer = await act(request, self.accounts.get(key, key))
            elif path.startswith("/api/"):
                answer = file_error(401, "Invalid or expired token", 401)
            else:
                answer = error("unauthorized")
            if isinstance(answer, tuple):
                status, extra, data = answer
                # ASCII only, so that a lone surrogate becomes a JSON escape
                content = data["html"] if "content-type" in extra else json.dumps(data)
                answer = Response(content, status, extra, media_type="application/json")
            answer.headers["x-request-id"] = f"req-{len(self.requests)}"
            return answer

        return endpoint

    async def _nowhere(self, request: Request, key: str) -> Answer:
        return error("not_found")

    async def _post(self, request: Request, key: str) -> Answer:
        origin, once = _origin(request), request.headers.get("idempotency-key")
        return self.create(parsed(await request.body()), key=key, idempotency_key=once, base_url=origin)

    async def _get(self, request: Request, key: str) -> Answer:
        return self.task(request.path_params["id"], key=key, base_url=_origin(request))

    async def _list(self, request: Request, key: str) -> Answer:
        # EvoLink's filter `processing` includes queued tasks.
        query, groups = request.query_params, {"pending": "processing", "queued_for_gpu": "processing"}
        page, per_page = query.get("page", "1"), query.get("page_size", "20")
        if not (re.fullmatch(r"[1-9]\d{0,5}", page) and re.fullmatch(r"[1-9]\d?|100", per_page)):
            return error("invalid_request", "page starts at 1, page_size is 1 to 100")
        tasks = [task for task in reversed(self.tasks.values()) if task.key == key]
        views = [self.row(task) for task in tasks]
        status, filters = query.get("status"), ("type", "model")
        views = [v for v in views if status in (None, v["status"], groups.get(v["status"]))]
        matches = [v for v in views if all(query.get(name) in (None, v[name]) for name in filters)]
        start = (int(page) - 1) * int(per_page)
        page_views, number = matches[start : start + int(per_page)], {"page": int(page), "page_size": int(per_page)}
        return ok({"data": page_views, "total": len(matches)} | number)

    async def _batch(self, request: Request, key: str) -> Answer:
        body = parsed(await request.body())
        ids = cast("dict[str, Any]", body).get("task_ids") if isinstance(body, dict) else None
        ids = cast("list[Any]", ids) if isinstance(ids, list) else []
        if not (1 <= len(ids) <= 50 and all(isinstance(task_id, str) for task_id in ids)):
            return error("invalid_request", "task_ids must be 1 to 50 strings", param="task_ids")
        # EvoLink omits unknown and foreign IDs without an error.
        own_tasks = [self.tasks[task_id] for task_id in ids if task_id in self.tasks and self.tasks[task_id].key == key]
        return ok({"data": [self.view(task, _origin(request)) for task in own_tasks]})

    async def _credits(self, request: Request, key: str) -> Answer:
        remaining, used = self.credits(key)
        user = {"remaining_credits": remaining, "used_credits": used}
        both = {"user": user, "token": user | {"unlimited_credits": False}}
        return ok({"success": True, "message": "", "data": both})

    async def _models(self, request: Request, key: str) -> Answer:
        return ok({"object": "list", "data": [{"id": "gpt-image-2", "object": "model"}]})

    async def _quota(self, request: Request, key: str) -> Answer:
        used = len(self._living())
        files = {"used_files": used, "max_files": MOST_UPLOADS, "remain_files": MOST_UPLOADS - used}
        group = {"user_group": "default", "is_custom": False, "quota_reason": "default"}
        return ok({"success": True, "code": 200, "data": group | files})

    async def _upload(self, request: Request, key: str) -> Answer:
        how, data = request.path_params["how"], None
        if how == "stream":
            async with request.form() as form:
                fields: Any = {name: value for name, value in form.items() if isinstance(value, str)}
                file = form.get("file")
                fields = {"file_name": fields.get("fileName"), "upload_path": fields.get("uploadPath")} | fields
                if isinstance(file, UploadFile):
                    data, fields["file_name"] = await file.read(), fields["file_name"] or file.filename
        else:
            fields = parsed(await request.body())
        fields = cast("dict[str, Any]", fields) if isinstance(fields, dict) else {}
        if any(not isinstance(value, str) for value in fields.values() if value is not None):
            return file_error(400, "Every field is a string")
        if how == "base64" and fields.get("base64_data"):
            try:
                data = base64.b64decode(fields["base64_data"].rpartition(",")[2], validate=True)
            except ValueError:
                return file_error(400, "base64_data is not base64")
        if how == "url" and is_link(fields.get("file_url")):
            data = await self._fetched(fields["file_url"])
        if data is None:
            return file_error(400, f"Nothing to upload by {how}")
        return self.keep(data, fields.get("file_name"), fields.get("upload_path"), _origin(request))

    async def _fetched(self, url: str) -> bytes:
        """Return the image of a URL, drawn from its words: the simulator has no network."""
        from evolink_mcp.simulator.paintings import paint

        return await anyio.to_thread.run_sync(paint, url, 1, (512, 512))

    async def _file(self, request: Request, key: str) -> Answer | Response:
        for upload in self._living():
            if upload.path == request.path_params["path"]:
                return Response(upload.data, media_type=upload.mime)
        return error("not_found", "No such file")

    async def _picture(self, request: Request, key: str) -> Answer | Response:
        task = self.tasks.get(request.path_params["id"])
        name = re.fullmatch(r"([1-9]\d?)\.(\w+)", request.path_params["name"])
        if task is None or name is None or name[2] != task.kind or int(name[1]) > task.pictures:
            return error("not_found", "No such picture")
        if self.state(task)[0] != "completed":
            return error("not_found", "No such picture yet")
        if "expired" in task.faults or self.clock() - task.created - task.duration >= LINK_LIFE_S:
            return error("link_expired")
        if "not-a-picture" in task.faults:
            return Response(HTML, media_type="text/html")
        if "hostile-picture" in task.faults and int(name[1]) == 1:
            return Response(b"\xff\xd8" + b"\xff" * 100_000 + b"\xd9", media_type="image/jpeg")
        # A drawing takes long, and the other requests of the same client need their answers meanwhile.
        data = await anyio.to_thread.run_sync(self.draw, task, int(name[1]))
        return Response(
            data[: len(data) // 2] if "truncated-picture" in task.faults else data, media_type=f"image/{task.kind}"
        )

    def draw(self, task: SimulatedTask, index: int) -> bytes:
        """Return image `index` of a task as a file."""
        from evolink_mcp.simulator.paintings import paint

        # A client may download an image again, and a drawing is slow.
        if (task.id, index) not in self._drawn:
            width, height = (edge // 2 for edge in task.size) if "other-size" in task.faults else task.size
            self._drawn[task.id, index] = paint(
                task.body["prompt"], index, (width, height), task.kind, task.body.get("background") == "transparent"
            )
        return self._drawn[task.id, index]


def _origin(request: Request) -> str:
    return str(request.base_url).rstrip("/")
