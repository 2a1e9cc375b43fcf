"""Find the task of a purchase with a lost answer in the account's task list. Nothing is sent again.

The list does not prove which task belongs to a purchase. Therefore the result is an unconfirmed match.
"""

from __future__ import annotations

import logging

from pydantic import ValidationError

from evolink_mcp.api import costs, sizes
from evolink_mcp.api.client import SUBMIT_DEADLINE_S, EvolinkClient
from evolink_mcp.api.models import DEFAULT_MODEL
from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.api.task import Task, is_task_id
from evolink_mcp.errors import EvolinkError, OutcomeUnknown, Problem, TaskKnown
from evolink_mcp.journal.entry import UNCONFIRMED, Entry, Phase
from evolink_mcp.studio.events import JournalWriter
from evolink_mcp.studio.jobs import Job, Timing

log = logging.getLogger(__name__)

REPEAT_WITHIN_S = 30.0
CLOCK_SKEW_S = 60.0
# EvoLink's clock is known to a second, and its task IDs contain whole seconds.
CLOCK_ERROR_S = 3.0
# EvoLink makes the task of a purchase within this time after the entry was recorded.
SPAN_S = REPEAT_WITHIN_S + SUBMIT_DEADLINE_S
# Other entries in these phases may own the same candidate. A `found` entry counts too: a caller may have read one of
# two candidates with get_task, and that does not make the other one certain.
RIVAL_PHASES = (Phase.SENDING, Phase.UNKNOWN, Phase.EXTERNAL)
# The account's list is read at once and again later, because EvoLink may list a new task with a delay.
LIST_DELAYS_S = (0.0, 3.0)
# The charge may differ from the computed price by this share, because the prompt's tokens are estimated.
PRICE_ERROR = 0.25


class Reconciler:
    """Find the tasks of lost answers.

    With `is_shared` other callers use the account too. Then a task of its list can belong to any of them, so only
    callbacks are used.
    """

    def __init__(self, client: EvolinkClient, writer: JournalWriter, *, is_shared: bool, timing: Timing) -> None:
        self._client = client
        self._journal = writer.journal
        self._writer = writer
        self._is_shared = is_shared
        self._timing = timing
        self._callback_tasks: dict[str, str] = {}  # task IDs that callbacks named, by the key of the entry

    def add_callback(self, key: str, task_id: str) -> None:
        """A callback named the task of this entry."""
        self._callback_tasks[key] = task_id

    async def reconcile(self, job: Job) -> None:
        """Find the task of a POST with a lost answer.

        A callback's task is certain. One candidate of the list becomes an unconfirmed match, if no other entry may own
        it. Several candidates are named in the advice. Without a candidate the outcome stays unknown.
        """
        if await self._use_callback(job):
            return None
        entry = job.entry
        candidates: list[Task] = []
        for delay_s in () if self._is_shared else LIST_DELAYS_S:
            if delay_s:
                await self._timing.sleep(delay_s)
            try:
                candidates = await self._candidates(entry)
                if len(candidates) == 1 and not await self._has_rivals(entry):
                    log.info("unconfirmed match for a lost answer: %s", candidates[0].id)
                    return await self._writer.record_phase(job, Phase.SUBMITTED, task=candidates[0], error=UNCONFIRMED)
            except TaskKnown:
                candidates = []
            except EvolinkError as error:
                log.info("cannot read the account's task list: %s", error.code)
            if candidates:
                break
        message = entry.error.message if entry.error else "the answer to the request was lost"
        advice = OutcomeUnknown.advice
        if candidates:
            ids = ", ".join(task.id for task in candidates[:5])
            advice = (
                f"It may be one of these tasks of the account: {ids}. Look at them with get_task before buying again."
            )
        problem = Problem("outcome_unknown", message, False, advice)
        return await self._writer.record_phase(job, Phase.UNKNOWN, error=problem)

    async def _use_callback(self, job: Job) -> bool:
        task_id = self._callback_tasks.pop(job.entry.key, None)
        if task_id is None or not is_task_id(task_id):
            return False
        try:
            task = await self._client.task(task_id)
            if contradicts(job.entry, task, self._client.clock_skew_s):
                log.warning("ignoring a callback: the task %s contradicts the order", task.id)
                return False
            await self._writer.record_phase(job, Phase.SUBMITTED, task=task)
        except EvolinkError as error:
            log.info("cannot use the task of a callback: %s", error.code)
            return False
        return True

    async def _candidates(self, entry: Entry) -> list[Task]:
        """Return the account's tasks that fit the entry and have no entry of their own."""
        tasks = await self._client.recent_tasks()
        skew = self._client.clock_skew_s
        tasks = [task for task in tasks if not contradicts(entry, task, skew)]
        known_ids = await self._journal.known_tasks([task.id for task in tasks])
        return [task for task in tasks if task.id not in known_ids]

    async def _has_rivals(self, entry: Entry) -> bool:
        """Return whether another purchase of the same time may own the task."""
        span = SPAN_S + CLOCK_SKEW_S
        near = await self._journal.recent(200, since=entry.created_at - span, until=entry.created_at + span)
        return any(other.key != entry.key and other.phase in RIVAL_PHASES for other in near)


def contradicts(entry: Entry, task: Task, skew_s: float | None) -> bool:
    """Return whether the model, the time or the credits of a task contradict the entry.

    `skew_s` is the lead of EvoLink's clock over this server's clock in seconds, None if it is unknown.
    """
    if task.model not in (None, entry.request.get("model", DEFAULT_MODEL.name)) or task.created is None:
        return True
    error_s = CLOCK_SKEW_S if skew_s is None else CLOCK_ERROR_S
    age = task.created - entry.created_at - (skew_s or 0.0)
    if not -error_s <= age <= SPAN_S + error_s:
        return True
    credits = task.credits_used if task.credits_used is not None else task.credits_reserved
    low, high = _price_range(entry, task)
    return credits is not None and not low <= credits <= high


def _price_range(entry: Entry, task: Task) -> tuple[float, float]:
    """Return the lowest and the highest possible charge for the entry's request, in credits."""
    try:
        request = GenerationRequest.model_validate(entry.request)
    except ValidationError:
        return 0.0, float("inf")
    references = len(request.image_urls or ()) + (1 if request.mask_url else 0)
    tokens = costs.prompt_tokens(request.prompt)
    model = request.image_model
    resolved = [sizes.resolve(request.size, request.resolution, rule, model.limits).size for rule in sizes.RULES]
    shapes = [size for size in resolved if size is not None] or [sizes.Size(*size) for size in model.auto_sizes]
    fewest = 1 if task.settled else request.n  # EvoLink may make fewer images than requested
    low = min(costs.price(size, request.quality, fewest, model=model).credits for size in shapes)
    high = max(
        costs.price(size, request.quality, request.n, references=references, prompt_tokens=tokens, model=model).credits
        for size in shapes
    )
    return low * (1 - PRICE_ERROR), high * (1 + PRICE_ERROR)
