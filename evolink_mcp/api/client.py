"""Call EvoLink over HTTP. A read may be repeated. A purchase is one POST.

The key goes only to the two configured EvoLink origins. Redirects are never followed.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import cached_property
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

import anyio
import httpx2 as httpx
from pydantic import SecretStr

from evolink_mcp import __version__
from evolink_mcp.api import urls
from evolink_mcp.api.certificates import issuer_at
from evolink_mcp.api.deadline import Deadline, awake_deadline
from evolink_mcp.api.failures import (
    Target,
    cause_of_failure,
    certificate_error,
    failure_text,
    foreign_answer,
    is_unconnected,
    rejection,
)
from evolink_mcp.api.http import (
    DEFAULT_HTTP_OPTIONS,
    NEVER_CONNECTED,
    POOL,
    POOL_SIZE,
    TRANSPORT_ERRORS,
    CheckedAddress,
    HttpOptions,
    Observe,
    Reply,
    dump,
    ignore,
    lower_first,
    moment_of,
    preparing,
    stream,
    whole_body,
)
from evolink_mcp.api.proxies import proxy_for
from evolink_mcp.api.purchase_answer import PurchaseAnswer
from evolink_mcp.api.task import Balance, Task, as_dict, is_task_id, read_balance, read_task, read_tasks
from evolink_mcp.causes import BY_STATUS, Cause
from evolink_mcp.errors import (
    EvolinkError,
    KeyMissing,
    OutcomeUnknown,
    Rejected,
    Unreachable,
    Unreadable,
)
from evolink_mcp.sanitize import quoted

log = logging.getLogger(__name__)

# EvoLink's image host answered 403 to the default User-Agent of urllib.
USER_AGENT = f"evolink-mcp/{__version__}"

# Deadlines of complete HTTP requests. EvoLink's own client waits 30 s for the answer to a POST, 15 s for a read and 120 s
# for an upload. A POST that is still unanswered at its deadline has an unknown outcome.
SUBMIT_DEADLINE_S = 75.0
READ_DEADLINE_S = 20.0
UPLOAD_DEADLINE_S = 180.0
PROBE_DEADLINE_S = 10.0  # of the request that `doctor` sends
# EvoLink's limit for a batch.
BATCH_MAX = 50
# One search for a lost answer reads at most 1,000 tasks.
PAGE_SIZE = 50
PAGES_MAX = 20


class EvolinkClient:
    """EvoLink's API for one key. Use as an async context manager.

    Every method raises only `EvolinkError`. A caller may repeat a read. `submit` never repeats its POST.
    `clock_skew_s` is the lead of EvoLink's clock over ours in seconds, from the newest answer. None: no answer yet.
    `observe` receives the outcome of each HTTP request.
    """

    def __init__(
        self,
        key: SecretStr | None,
        *,
        base_url: str = urls.BASE_URL,
        files_base_url: str = urls.FILES_BASE_URL,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.time,
        deadline: Deadline = awake_deadline,
        options: HttpOptions = DEFAULT_HTTP_OPTIONS,
        observe: Observe = ignore,
    ) -> None:
        self.observe = observe
        self._key = key
        self._origins = {"api": base_url.rstrip("/"), "files": files_base_url.rstrip("/")}
        # The settings allow http only for this machine, where a simulated EvoLink runs.
        self._loopback = urlsplit(base_url).scheme == "http"
        self._transport = transport
        self._clock = clock
        self._deadline = deadline
        self._options = options
        self._open_clients: list[httpx.AsyncClient] = []
        self._logged_failure: str | None = None
        self.clock_skew_s: float | None = None
        self._purchase_slots = anyio.CapacityLimiter(POOL_SIZE)

    async def __aenter__(self) -> EvolinkClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._open_clients:
            await client.aclose()

    # The HTTP clients open at their first use, because reading the system's certificates takes longer than the start.

    @cached_property
    def _ssl_context(self) -> ssl.SSLContext:
        with preparing():
            return self._options.make_ssl_context()

    @cached_property
    def _read_client(self) -> httpx.AsyncClient:
        return self._open(POOL)

    @cached_property
    def _purchase_client(self) -> httpx.AsyncClient:
        # A purchase opens a new connection. If an idle one breaks, it is unknown whether EvoLink received the POST.
        # Its only deadline after the connection is the one of `submit`, because that one ignores suspensions.
        limits = httpx.Limits(max_connections=POOL_SIZE, max_keepalive_connections=0)
        return self._open(limits, silence_max_s=None)

    @cached_property
    def image_client(self) -> httpx.AsyncClient:
        """The HTTP client for images. It has no key and connects only to public addresses."""
        # A simulated EvoLink serves images from a private address, which the check would refuse.
        if self._transport is None and not self._loopback:
            return self._open(POOL, CheckedAddress(self._make_transport(), self._make_transport))
        return self._open(POOL)

    def _make_transport(self, proxy: str | None = None) -> httpx.AsyncBaseTransport:
        return httpx.AsyncHTTPTransport(verify=self._ssl_context, limits=POOL, proxy=proxy)

    def _open(
        self,
        limits: httpx.Limits,
        transport: httpx.AsyncBaseTransport | None = None,
        silence_max_s: float | None = SUBMIT_DEADLINE_S,
    ) -> httpx.AsyncClient:
        with preparing():
            client = httpx.AsyncClient(
                transport=transport or self._transport,
                limits=limits,
                verify=self._ssl_context,
                timeout=httpx.Timeout(silence_max_s, connect=self._options.connect_timeout_s),
                headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
                follow_redirects=False,
                # A simulated EvoLink has no TLS, so a proxy would see the key.
                trust_env=not self._loopback,
            )
        self._open_clients.append(client)
        return client

    @property
    def has_key(self) -> bool:
        """Whether there is a key. EvoLink answers only with a key."""
        return self._key is not None

    def simulates(self, url: str) -> bool:
        """Return whether `url` belongs to a simulated EvoLink on this machine. It serves its images from there too."""
        return self._loopback and url.startswith(self._origins["api"] + "/")

    # --- the purchase ---

    async def submit(
        self, body: dict[str, Any], *, idempotency_key: str, on_sending: Callable[[], Awaitable[object]]
    ) -> Task:
        """Send `POST /v1/images/generations` once. `on_sending` runs before the first byte.

        If `on_sending` raises an error, nothing is sent.

        Raises:
            Unreachable: no byte was sent.
            Rejected, RateLimited: EvoLink refused the request. Nothing is charged.
            OutcomeUnknown: the POST was sent, but its answer was lost or cannot be read.
        """
        is_sent = False
        is_traced = self._transport is None

        async def trace(event: str, info: dict[str, Any]) -> None:
            nonlocal is_sent
            # The CONNECT to a proxy is traced too, but it is not the purchase.
            if event.endswith("send_request_headers.started") and info["request"].method == b"POST":
                # An error of the journal ends the POST here, and `is_sent` stays false: no byte has left.
                await on_sending()
                is_sent = True

        if not is_traced:  # a transport from outside reports no events
            await on_sending()

        answer = PurchaseAnswer(self._key)
        request: httpx.Request | None = None
        deadline: anyio.CancelScope | None = None
        failure: Exception | None = None
        try:
            request = self.build_request(
                "POST",
                "/v1/images/generations",
                is_purchase=True,
                content=dump(body),
                headers={"Idempotency-Key": idempotency_key},
                extensions={"trace": trace},
            )
            async with self._purchase_slots:  # the wait for a free connection does not count towards the deadline
                with self._deadline(SUBMIT_DEADLINE_S) as deadline:
                    async with stream(self._purchase_client, request, self.observe) as response:
                        self._compare_clocks(response)
                        await answer.receive(response)
        except TRANSPORT_ERRORS as error:
            failure = error
        if deadline is not None and deadline.cancelled_caught:
            failure = Unreadable(f"no complete answer within {SUBMIT_DEADLINE_S:.0f} s")
        # EvoLink has made the task, so its ID counts also in an error or an incomplete answer.
        if (task := answer.task) is not None:
            self._logged_failure = None
            return task
        assert request is not None
        # Without trace events, only the errors of NEVER_CONNECTED prove that no byte was sent.
        if answer.status is None and not is_sent and (is_traced or isinstance(failure, NEVER_CONNECTED)):
            assert failure is not None
            raise self._logged(await self._unreachable(Unreachable, failure, request.url)) from failure
        # A refusal is complete with its status. 409: EvoLink knows this new idempotency key, so something on the way has
        # sent the POST twice.
        if answer.status in BY_STATUS and answer.status != 409:
            raise self._logged(rejection(answer.reply, self._target_of(request.url), request.url, self._clock()))
        flaw = self._flaw_of(answer, failure, request.url)
        raise OutcomeUnknown(f"the request was sent{flaw}", task_ids=answer.task_ids) from failure

    # --- reads ---

    async def task(self, task_id: str) -> Task:
        """Read one task: `GET /v1/tasks/{task_id}`. An ID of another form goes into a body, never into a path."""
        if not is_task_id(task_id):
            if (task := (await self.tasks([task_id])).get(task_id)) is not None:
                return task
            raise Rejected(
                "EvoLink has no task with this unusual id",
                code="not_found",
                http_status=404,
                advice="Call list_tasks with sync=true to see what the account has.",
            )
        task = read_task((await self._ask("GET", f"/v1/tasks/{quote(task_id, safe='')}")).json())
        if task.id != task_id:
            raise Unreadable("EvoLink answered with another task")
        return task

    async def tasks(self, task_ids: Iterable[str]) -> dict[str, Task]:
        """Read up to 50 tasks by ID: `POST /v1/tasks/batch` (undocumented). Unknown tasks are absent."""
        ids = list(task_ids)[:BATCH_MAX]
        reply = await self._ask("POST", "/v1/tasks/batch", content=dump({"task_ids": ids}))
        return {task.id: task for task in read_tasks(reply.json())}

    async def recent_tasks(self, page: int = 1) -> list[Task]:
        """Read a page of the newest tasks, newest first, without links: `GET /v1/tasks` (undocumented)."""
        reply = await self._ask("GET", f"/v1/tasks?page={page}&page_size={PAGE_SIZE}")
        return list(read_tasks(reply.json()))

    async def tasks_since(self, since: float) -> tuple[list[Task], bool]:
        """Read the tasks that were created at `since` (epoch seconds by EvoLink's clock) or later, and perhaps older ones.

        Return also whether the list is complete. It is not if it needs more than PAGES_MAX pages.
        """
        tasks: dict[str, Task] = {}
        for page in range(1, PAGES_MAX + 1):
            rows = await self.recent_tasks(page)
            # A task that is made meanwhile moves the rows, so the next page may repeat one.
            tasks |= {task.id: task for task in rows}
            oldest = min((task.created for task in rows if task.created is not None), default=since)
            if len(rows) < PAGE_SIZE or oldest < since:
                return list(tasks.values()), True
        return list(tasks.values()), False

    async def date(self) -> str | None:
        """Return the `Date` header of the API's host. No key is sent.

        Raises:
            EvolinkError: there is no answer.
        """
        request = self._read_client.build_request("HEAD", self._origins["api"])
        try:
            return (await self._exchange(self._read_client, request, PROBE_DEADLINE_S)).headers.get("date")
        except TRANSPORT_ERRORS as error:
            raise await self._unreadable(error, request.url) from error

    async def balance(self) -> Balance:
        """Read the credits: `GET /v1/credits`."""
        return read_balance((await self._ask("GET", "/v1/credits")).json())

    async def upload(self, name: str, mime_type: str, content: bytes | BinaryIO) -> str:
        """Upload a file: `POST /api/v1/files/upload/stream`. Return its URL. It is free; EvoLink keeps the file 72 h."""
        files = {"file": (name, content, mime_type)}
        path = "/api/v1/files/upload/stream"
        reply = await self._ask("POST", path, origin="files", deadline_s=UPLOAD_DEADLINE_S, files=files)
        answer = as_dict(reply.json())
        # The file API reports an error also with HTTP 200.
        if answer.get("success") is False or not isinstance(answer.get("data"), dict):
            reason = answer.get("msg") or answer.get("message") or "no reason"
            raise Rejected(
                f"EvoLink's file API did not take the picture: {quoted(reason)}",
                code="upload_refused",
                advice="Use another picture or give a public URL instead.",
            )
        data = as_dict(answer["data"])
        url = data.get("file_url") or data.get("download_url")
        if not isinstance(url, str):
            raise Unreadable("EvoLink's file API names no URL for the upload")
        try:
            urls.check_public_url(url, schemes=("https",))
        except ValueError as error:
            # A simulated file API names a URL on this machine.
            if not self._loopback:
                raise Unreadable("EvoLink's file API names an unusable URL for the upload") from error
        return url

    # --- how requests are sent ---

    def build_request(
        self, method: str, path: str, *, origin: str = "api", is_purchase: bool = False, **fields: Any
    ) -> httpx.Request:
        """Build a request with the key. `fields` are those of httpx.

        Raises:
            KeyMissing: there is no key.
            Rejected: the request would go to an origin that must not see the key.
        """
        if self._key is None:
            raise KeyMissing("no EvoLink API key is set")
        headers = {"Authorization": f"Bearer {self._key.get_secret_value()}", **fields.pop("headers", {})}
        if "content" in fields:
            headers["Content-Type"] = "application/json"
        # A request takes its timeouts from the client that builds it.
        client = self._purchase_client if is_purchase else self._read_client
        request = client.build_request(method, self._origins[origin] + path, headers=headers, **fields)
        target = request.url
        # The path is appended to the origin as text. This check proves that it changed no part of the host.
        allowed = httpx.URL(self._origins[origin])
        if (target.scheme, target.host, target.port) != (allowed.scheme, allowed.host, allowed.port):
            raise Rejected("the request would have left EvoLink's origin", code="wrong_origin")
        return request

    async def _ask(self, method: str, path: str, *, deadline_s: float = READ_DEADLINE_S, **fields: Any) -> Reply:
        """Send a request that costs nothing, and return the whole answer. The caller may repeat it."""
        request = self.build_request(method, path, **fields)
        try:
            reply = await self._exchange(self._read_client, request, deadline_s)
        except TRANSPORT_ERRORS as error:
            raise self._logged(await self._unreadable(error, request.url)) from error
        target = self._target_of(request.url)
        if (foreign := foreign_answer(reply, target, request.url)) is not None:
            # A firewall does not know the task or the key, so the read is repeated.
            raise self._logged(
                Unreadable(
                    foreign.meaning,
                    advice=foreign.next_step,
                    http_status=reply.status,
                    cause=foreign,
                )
            )
        if 200 <= reply.status < 300:
            self._logged_failure = None
            return reply
        if reply.status in BY_STATUS:
            raise self._logged(rejection(reply, target, request.url, self._clock()))
        raise Unreadable(f"EvoLink answered HTTP {reply.status}", http_status=reply.status)

    # --- causes of failures ---

    def _target_of(self, url: httpx.URL) -> Target:
        uses_proxy = self._transport is None and not self._loopback
        is_image = not any(str(url).startswith(f"{origin}/") for origin in self._origins.values())
        return Target.of(url, proxy_for(url.scheme, url.host) if uses_proxy else None, is_image=is_image)

    async def cause_of(self, error: Exception, url: httpx.URL) -> Cause | None:
        """Return the cause of a failed request to `url`. None: there was a connection.

        If the certificate of the server is not trusted, read its issuer with a request without the key.
        """
        if not is_unconnected(error):
            return None
        is_certificate = certificate_error(error) is not None and self._transport is None
        issuer = await issuer_at(str(url.copy_with(path="/", query=None))) if is_certificate else None
        return cause_of_failure(error, self._target_of(url), issuer)

    async def _unreachable(
        self, kind: type[Unreachable] | type[Unreadable], error: Exception, url: httpx.URL
    ) -> EvolinkError:
        """Return the error for a request that found no connection. A failure of another kind counts as no connection."""
        if isinstance(error, EvolinkError):  # the deadline
            return kind(f"EvoLink could not be reached ({failure_text(error, self._target_of(url).proxy)})")
        cause = await self.cause_of(error, url) or cause_of_failure(error, self._target_of(url))
        return kind(
            f"EvoLink could not be reached: {cause.meaning}",
            retryable=cause.retryable,
            advice=cause.next_step,
            cause=cause,
        )

    async def _unreadable(self, error: Exception, url: httpx.URL) -> EvolinkError:
        """Return the error of a failed read."""
        if is_unconnected(error):
            return await self._unreachable(Unreadable, error, url)
        return Unreadable(f"EvoLink could not be read ({failure_text(error, self._target_of(url).proxy)})")

    def _logged(self, error: EvolinkError) -> EvolinkError:
        """Log the cause of an error, without EvoLink's own words. The same cause is logged once until a request succeeds."""
        text = error.message if error.cause is None else f"{error.cause.meaning}. {error.cause.next_step}"
        if text != self._logged_failure:
            self._logged_failure = text
            log.warning("%s", text)
        return error

    def _flaw_of(self, answer: PurchaseAnswer, failure: Exception | None, url: httpx.URL) -> str:
        """Return the reason why the answer to a POST does not show the task, as the end of a sentence."""
        target = self._target_of(url)
        if failure is not None:
            return f" and its answer was lost ({failure_text(failure, target.proxy)})"
        assert answer.status is not None
        if (foreign := foreign_answer(answer.reply, target, url)) is not None:
            return f", but {foreign.meaning}"
        if not 200 <= answer.status < 300:
            return f" and EvoLink answered HTTP {answer.status}"
        try:
            read_task(answer.reply.json())
        except Unreadable as error:
            return f", but {lower_first(error.message)}"
        return ", but EvoLink's answer names no task"

    async def _exchange(self, client: httpx.AsyncClient, request: httpx.Request, deadline_s: float) -> Reply:
        """Send a request and read the whole answer, within a total deadline and JSON_MAX_BYTES."""
        with self._deadline(deadline_s):
            async with stream(client, request, self.observe) as response:
                try:
                    body = await whole_body(response)
                except (Unreadable, *TRANSPORT_ERRORS):
                    # A refusal is complete with its status.
                    if response.status_code not in BY_STATUS:
                        raise
                    body = b""
                self._compare_clocks(response)
                return Reply(response.status_code, response.headers, body, self._key)
        raise Unreadable(f"no complete answer within {deadline_s:.0f} s")

    def _compare_clocks(self, response: httpx.Response) -> None:
        sent_at = moment_of(response.headers.get("date", ""))
        if sent_at is not None:
            self.clock_skew_s = sent_at - self._clock()
