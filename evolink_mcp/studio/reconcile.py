"""A paid request whose answer was lost: its task is looked for in the account's list, which is only read.

No list can prove whose a task is. What is found is therefore a guess, and only if nothing speaks against it.
"""

from __future__ import annotations

import logging

import anyio
from pydantic import ValidationError

from evolink_mcp.api import costs, sizes
from evolink_mcp.api.client import SUBMIT_DEADLINE_S, EvolinkClient
from evolink_mcp.api.models import DEFAULT_MODEL
from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.api.task import Task, is_task_id
from evolink_mcp.errors import EvolinkError, OutcomeUnknown, Problem, TaskKnown
from evolink_mcp.journal.entry import UNCONFIRMED, Entry, Phase
from evolink_mcp.journal.journal import Journal
from evolink_mcp.studio.events import JournalWriter
from evolink_mcp.studio.jobs import Job, Sleep

log = logging.getLogger(__name__)

REPEAT_WITHIN_S = 30.0
CLOCK_SKEW_S = 60.0
# EvoLink's clock is known to a second, and writes whole seconds into its ids.
CLOCK_ERROR_S = 3.0
# EvoLink makes a purchase's task within this time after the entry was written.
SPAN_S = REPEAT_WITHIN_S + SUBMIT_DEADLINE_S
# Entries that may own a task that is found by its time. `external` counts too: the user may have called get_task on one
# of two candidates, and that does not make the other one certain.
RIVALS = (Phase.SENDING, Phase.UNKNOWN, Phase.EXTERNAL)
# When the account's list is read for a lost answer: at once, and again because the task may not be listed yet.
LOOK_AFTER_S = (0.0, 3.0)
# What EvoLink bills may differ from the computed price by this share: the prompt's tokens are estimated.
PRICE_ERROR = 0.25


class Reconciler:
    """Finds the tasks of lost answers."""

    def __init__(
        self,
        client: EvolinkClient,
        journal: Journal,
        recorder: JournalWriter,
        *,
        shared: bool = False,
        sleep: Sleep = anyio.sleep,
    ) -> None:
        """`shared`: others spend from the account too, so a task of its list may be anybody's."""
        self._client = client
        self._journal = journal
        self._recorder = recorder
        self._shared = shared
        self._sleep = sleep
        self._told: dict[str, str] = {}  # the tasks that EvoLink has named at the addresses made for these entries

    def told(self, key: str, task_id: str) -> None:
        """EvoLink has called back: this task is the order's with this key."""
        self._told[key] = task_id

    async def _told_by_callback(self, job: Job) -> bool:
        """Take the task that EvoLink has named at this order's own address, if it is there. That is no guess."""
        task_id = self._told.pop(job.entry.key, None)
        if task_id is None or not is_task_id(task_id):
            return False
        try:
            task = await self._client.task(task_id)
            if contradicts(job.entry, task, self._client.clock_skew_s):
                log.warning("a callback named the task %s, which cannot be this order's", task.id)
                return False
            await self._recorder.phase_changed(job, Phase.SUBMITTED, task=task)
        except EvolinkError as error:
            log.info("the task of a callback could not be read or is another order's: %s", error.code)
            return False
        return True

    async def reconcile(self, job: Job) -> None:
        """Ask the account's task list what became of a request whose answer was lost.

        If exactly one task may be the one and no other entry may own it, it is taken as a guess. If there are several,
        they are named. If there is none, the outcome stays unknown.
        """
        if await self._told_by_callback(job):
            return None
        entry = job.entry
        candidates: list[Task] = []
        for wait in () if self._shared else LOOK_AFTER_S:
            if wait:
                await self._sleep(wait)
            try:
                candidates = await self._candidates(entry)
                if len(candidates) == 1 and not await self._has_rivals(entry):
                    log.info("a lost answer may be this task of the account's list: %s", candidates[0].id)
                    return await self._recorder.phase_changed(
                        job, Phase.SUBMITTED, task=candidates[0], error=UNCONFIRMED
                    )
            except TaskKnown:
                candidates = []
            except EvolinkError as error:
                log.info("the account's tasks could not be compared: %s", error.code)
            if candidates:
                break
        said = entry.error.message if entry.error else "the answer to the request was lost"
        advice = OutcomeUnknown.advice
        if candidates:
            ids = ", ".join(task.id for task in candidates[:5])
            advice = (
                f"It may be one of these tasks of the account: {ids}. Look at them with get_task before buying again."
            )
        return await self._recorder.phase_changed(
            job, Phase.UNKNOWN, error=Problem("outcome_unknown", said, False, advice)
        )

    async def _candidates(self, entry: Entry) -> list[Task]:
        """The account's tasks that may be the entry's and belong to no entry of the journal."""
        tasks = await self._client.recent_tasks()
        skew = self._client.clock_skew_s
        tasks = [task for task in tasks if not contradicts(entry, task, skew)]
        known = await self._journal.known_tasks([task.id for task in tasks])
        return [task for task in tasks if task.id not in known]

    async def _has_rivals(self, entry: Entry) -> bool:
        """Whether another purchase of the same time may own the task: then nobody can say whose it is."""
        span = SPAN_S + CLOCK_SKEW_S
        near = await self._journal.recent(200, since=entry.created_at - span, until=entry.created_at + span)
        return any(other.key != entry.key and other.phase in RIVALS for other in near)


def contradicts(entry: Entry, task: Task, skew_s: float | None) -> bool:
    """Whether something says that `task` is not the entry's purchase: its model, its time or its credits.

    `skew_s` is how far EvoLink's clock is ahead of ours, in seconds; None if that is not known.
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
    """What EvoLink may have reserved or charged for the entry's request, in credits."""
    try:
        request = GenerationRequest.model_validate(entry.request)
    except ValidationError:
        return 0.0, float("inf")
    references = len(request.image_urls or ()) + (1 if request.mask_url else 0)
    tokens = costs.prompt_tokens(request.prompt)
    model = request.image_model
    resolved = [sizes.resolve(request.size, request.resolution, rule, model.limits).size for rule in sizes.RULES]
    shapes = [size for size in resolved if size is not None] or [sizes.Size(*size) for size in model.auto_sizes]
    fewest = 1 if task.settled else request.n  # fewer pictures may come than were asked
    low = min(costs.price(size, request.quality, fewest, model=model).credits for size in shapes)
    high = max(
        costs.price(size, request.quality, request.n, references=references, prompt_tokens=tokens, model=model).credits
        for size in shapes
    )
    return low * (1 - PRICE_ERROR), high * (1 + PRICE_ERROR)
