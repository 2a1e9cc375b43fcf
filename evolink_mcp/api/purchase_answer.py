"""Read the answer to a paid POST. An ID in it counts even if the answer is incomplete, compressed or an error."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field, replace

import httpx2 as httpx
from pydantic import SecretStr

from evolink_mcp.api.http import COMPRESSIONS, JSON_MAX_BYTES, Reply, decompressed
from evolink_mcp.api.request import TASK_ID_PATTERN
from evolink_mcp.api.task import Task, is_task_id, read_task
from evolink_mcp.errors import Unreadable

# The read ends early if a body up to this length is complete JSON with an ID: its connection may stay open.
# Each chunk parses the whole body again, so the limit also bounds that work.
EARLY_END_MAX_BYTES = 1 << 14
_ID = TASK_ID_PATTERN.strip("^$")
# A task ID as a value in JSON. JSON inside a string has backslashes.
_NAMED_ID = re.compile(rf'"(?:id|task_id|taskId)\\*"\s*:\s*\\*"({_ID})\\*"')
# An ID at the very end may be incomplete, so it does not count.
_ANY_ID = re.compile(rf"(?<![0-9A-Za-z_-]){_ID}(?![0-9A-Za-z_-])(?!\Z)")


@dataclass(slots=True)
class PurchaseAnswer:
    """The part of the answer that arrived before the end or a failure. Until the HTTP headers arrive, `status` is None."""

    key: SecretStr | None
    status: int | None = None
    headers: httpx.Headers = field(default_factory=httpx.Headers)
    body: bytearray = field(default_factory=bytearray)

    async def receive(self, response: httpx.Response) -> None:
        """Read the answer to its end, to JSON_MAX_BYTES, or until it is complete JSON with an ID.

        Raises:
            httpx.HTTPError: the connection failed. The part before the failure stays in `body`.
        """
        self.status = response.status_code
        self.headers = response.headers
        # `aiter_bytes` would decompress, and would fail at damaged data.
        async for chunk in response.aiter_raw():
            self.body += chunk[: JSON_MAX_BYTES - len(self.body)]
            if len(self.body) == JSON_MAX_BYTES or self._is_complete():
                return

    @property
    def reply(self) -> Reply:
        """The answer. If its headers name a compression, it is decompressed."""
        assert self.status is not None
        encoding = self.headers.get("content-encoding", "").strip().lower()
        return Reply(self.status, self.headers, self._texts[-1 if encoding in COMPRESSIONS else 0], self.key)

    @property
    def task(self) -> Task | None:
        """The task that the answer names, with as many facts as can be read.

        In an error only an ID in EvoLink's form counts, because errors have their own IDs.
        """
        return next((task for task in map(self._task_in, self._texts) if task is not None), None)

    @property
    def task_ids(self) -> tuple[str, ...]:
        """The complete task IDs anywhere in the answer. One of them may be the task of the purchase."""
        return tuple(dict.fromkeys(task_id for text in self._texts for task_id in _distinct(_ANY_ID, text)))

    @property
    def _texts(self) -> tuple[bytes, bytes]:
        """The body, and the body decompressed: the headers may be wrong about it."""
        body = bytes(self.body)
        return body, decompressed(body)[0]

    def _task_in(self, text: bytes) -> Task | None:
        if self.status is None:
            return None
        task: Task | None = None
        with suppress(Unreadable):
            task = read_task(Reply(self.status, self.headers, text, self.key).json())
        if task is not None and is_task_id(task.id):
            return task
        ids = _distinct(_NAMED_ID, text)
        # With several IDs, the one of this purchase is unknown.
        if len(ids) == 1:
            return Task(ids[0]) if task is None else replace(task, id=ids[0])
        return task if 200 <= self.status < 300 else None

    def _is_complete(self) -> bool:
        body = bytes(self.body)
        # Incomplete JSON is the usual case, and the test of its last byte costs less than parsing it.
        if len(body) > EARLY_END_MAX_BYTES or not body.rstrip().endswith(b"}") or self.status is None:
            return False
        with suppress(Unreadable):
            return is_task_id(read_task(Reply(self.status, self.headers, body, self.key).json()).id)
        return False


def _distinct(pattern: re.Pattern[str], body: bytes) -> tuple[str, ...]:
    return tuple(
        dict.fromkeys(match[match.lastindex or 0] for match in pattern.finditer(body.decode("utf-8", "replace")))
    )
