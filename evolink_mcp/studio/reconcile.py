"""Find the task of a purchase with a lost answer in the account's task list. Nothing is sent again.

The list does not prove which task belongs to a purchase. Therefore the result is an unconfirmed match.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pydantic import ValidationError

from evolink_mcp.api import costs, sizes
from evolink_mcp.api.client import BATCH_MAX, SUBMIT_DEADLINE_S, EvolinkClient
from evolink_mcp.api.models import DEFAULT_MODEL
from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.api.task import Task, is_task_id
from evolink_mcp.errors import EvolinkError, OutcomeUnknown, Problem, TaskKnown
from evolink_mcp.journal.entry import UNCONFIRMED, Entry, Phase
from evolink_mcp.studio.jobs import Job, Timing
from evolink_mcp.studio.journal_writer import JournalWriter
from evolink_mcp.studio.prices import references_of
from evolink_mcp.studio.size_rule import size_of

log = logging.getLogger(__name__)

# The longest time from the first to the last attempt of one POST. `purchase` keeps it, and SPAN_S depends on it.
REPEAT_WITHIN_S = 30.0
# The assumed error of a clock while no answer of EvoLink has shown its own time.
CLOCK_SKEW_S = 60.0
# EvoLink's clock is known to a second, and its task IDs contain whole seconds.
CLOCK_ERROR_S = 3.0
# EvoLink makes the task of a purchase within this time after the entry was recorded.
SPAN_S = REPEAT_WITHIN_S + SUBMIT_DEADLINE_S
# Other entries in these phases may own the same candidate. An `external` entry counts too: with get_task, a caller may
# have read one of two candidates, and that does not make the other one certain.
RIVAL_PHASES = (Phase.SENDING, Phase.UNKNOWN, Phase.EXTERNAL)
# The account's list is read at once and again later, because EvoLink may list a new task with a delay.
LIST_DELAYS_S = (0.0, 3.0)
# The charge may differ from the computed range by this share. The range covers every possible count of text tokens.
PRICE_ERROR = 0.02
# The entries that are compared with a candidate. With more of them no match is certain enough.
NEAR_MAX = 200
# More candidates are read in batches.
SINGLE_READS_MAX = 5


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

    async def reconcile(self, job: Job, named_ids: tuple[str, ...] = ()) -> None:
        """Find the task of a POST with a lost answer. `named_ids` are the task IDs in its answer.

        A callback's task is certain. One candidate becomes an unconfirmed match, if no other entry may own it. Several
        candidates are named in the advice. Without a candidate the outcome stays unknown.
        """
        if await self._use_callback(job):
            return
        entry = job.entry
        candidates: list[Task] = []
        if named_ids:
            tasks = await self._read(named_ids)
            skew_s = self._client.clock_skew_s
            candidates = [task for task in tasks.values() if not contradicts(entry, task, skew_s)]
            if len(candidates) == 1 and await self._match(job, candidates[0]):
                return
        if not candidates and not self._is_shared:
            is_matched, candidates = await self._search_list(job)
            if is_matched:
                return
        message = entry.error.message if entry.error else "the answer to the request was lost"
        advice = entry.error.advice if entry.error else OutcomeUnknown.advice
        if candidates:
            ids = ", ".join(task.id for task in candidates[:5])
            advice = (
                f"It may be one of these tasks of the account: {ids}. Look at them with get_task before buying again."
            )
        problem = Problem("outcome_unknown", message, False, advice)
        await self._writer.record_phase(job, Phase.UNKNOWN, error=problem)

    async def _search_list(self, job: Job) -> tuple[bool, list[Task]]:
        """Search the account's task list, now and later. Return whether a task was assigned, else also the candidates."""
        entry = job.entry
        candidates: list[Task] = []
        for delay_s in LIST_DELAYS_S:
            if delay_s:
                await self._timing.sleep(delay_s)
            try:
                candidates, is_certain = await self._candidates(entry)
                if len(candidates) == 1 and is_certain and not await self._has_rivals(entry, candidates[0]):
                    if await self._match(job, candidates[0]):
                        return True, []
                    candidates = []
            except EvolinkError as error:
                log.info("cannot read the account's task list: %s", error.code)
            if candidates:
                break
        return False, candidates

    async def refute(self, job: Job) -> bool:
        """Undo an unconfirmed match if the task or its images contradict the order. Return True if so."""
        entry = job.entry
        task = entry.task
        if task is None or not entry.is_unconfirmed:
            return False
        if not (contradicts(entry, task, self._client.clock_skew_s) or _has_other_pixels(entry)):
            return False
        log.info("the task %s contradicts the order, so it is no match for the lost answer", task.id)
        advice = f"{OutcomeUnknown.advice} The task {task.id} was a candidate, but its price or pixels differ."
        problem = Problem("outcome_unknown", "the answer to the request was lost", False, advice)
        await self._writer.withdraw_match(job, problem)
        return True

    async def _match(self, job: Job, task: Task) -> bool:
        """Assign a task as an unconfirmed match. Return False if another entry has it."""
        try:
            await self._writer.record_phase(job, Phase.SUBMITTED, task=task, error=UNCONFIRMED)
        except TaskKnown:
            return False
        log.info("unconfirmed match for a lost answer: %s", task.id)
        return True

    async def _use_callback(self, job: Job) -> bool:
        """Assign the task that EvoLink's callback named: only EvoLink knows the address of this entry."""
        entry = job.entry
        task_id = self._callback_tasks.pop(entry.key, None)
        if task_id is None or not is_task_id(task_id):
            return False
        try:
            task = await self._client.task(task_id)
            if await self._journal.belongs_to_other(task_id, entry.key):
                log.warning("ignoring a callback: the task %s belongs to another order", task_id)
                return False
            await self._writer.record_phase(job, Phase.SUBMITTED, task=task)
        except EvolinkError as error:
            log.info("cannot use the task of a callback: %s", error.code)
            return False
        return True

    async def _candidates(self, entry: Entry) -> tuple[list[Task], bool]:
        """Return the account's tasks that fit the entry and have no entry of their own.

        Return also whether that is certain: the list is complete, and every candidate was read.
        """
        skew_s = self._client.clock_skew_s
        since = entry.created_at + (skew_s or 0.0) - CLOCK_SKEW_S
        rows, is_complete = await self._client.tasks_since(since)
        rows = [task for task in rows if not contradicts(entry, task, skew_s)]
        known_ids = await self._journal.known_tasks([task.id for task in rows])
        ids = [task.id for task in rows if task.id not in known_ids]
        # Rows of the list have no credits and no images, so each candidate is compared again.
        tasks = await self._read(ids)
        unread = [task for task in rows if task.id in ids and task.id not in tasks]
        candidates = [task for task in tasks.values() if not contradicts(entry, task, skew_s)]
        return [*candidates, *unread], is_complete and not unread

    async def _read(self, task_ids: Sequence[str]) -> dict[str, Task]:
        """Read tasks by ID, many of them in batches. Unreadable ones are absent."""
        tasks: dict[str, Task] = {}
        for start in range(0, len(task_ids) if len(task_ids) > SINGLE_READS_MAX else 0, BATCH_MAX):
            try:
                batch = await self._client.tasks(task_ids[start : start + BATCH_MAX])
            except EvolinkError as error:
                log.info("cannot read candidates together: %s", error.code)
                break
            # A batch answer may lack credits, and a match needs them.
            tasks |= {task.id: task for task in batch.values() if task.has_credits}
        for task_id in [task_id for task_id in task_ids if task_id not in tasks][:SINGLE_READS_MAX]:
            try:
                tasks[task_id] = await self._client.task(task_id)
            except EvolinkError as error:
                log.info("cannot read the candidate %s: %s", task_id, error.code)
        return tasks

    async def _has_rivals(self, entry: Entry, task: Task) -> bool:
        """Return whether another purchase of the same time may own the task, in any profile of the account."""
        span = SPAN_S + CLOCK_SKEW_S
        near = await self._journal.of_accounts(NEAR_MAX, entry.created_at - span, entry.created_at + span)
        skew_s = self._client.clock_skew_s
        rivals = [rival for rival in near if rival.key != entry.key and rival.phase in RIVAL_PHASES]
        return len(near) == NEAR_MAX or any(not contradicts(rival, task, skew_s) for rival in rivals)


def contradicts(entry: Entry, task: Task, skew_s: float | None) -> bool:
    """Return whether the model, the time, the number of images or the credits of a task contradict the entry.

    `skew_s` is the lead of EvoLink's clock over this server's clock in seconds, None if it is unknown.
    """
    if task.model not in (None, entry.request.get("model", DEFAULT_MODEL.name)) or task.created is None:
        return True
    error_s = CLOCK_SKEW_S if skew_s is None else CLOCK_ERROR_S
    age = task.created - entry.created_at - (skew_s or 0.0)
    if not -error_s <= age <= SPAN_S + error_s:
        return True
    if _images_of(task) > entry.request.get("n", 1):
        return True
    credits = task.credits_used if task.credits_used is not None else task.credits_reserved
    low, high = _price_range(entry, task)
    return credits is not None and not low <= credits <= high


def _images_of(task: Task) -> int:
    """Return the number of images of a task. 0: it has none yet, or the answer does not show them."""
    return len(task.results) + task.links_left_out


def _has_other_pixels(entry: Entry) -> bool:
    """Return whether a saved image has pixels that no size rule gives for the request."""
    expected: set[tuple[int, int]] = set()
    for rule in sizes.RULES:
        try:
            size = size_of(entry, rule)
        except ValueError:
            return False
        if size is None:  # EvoLink chooses the pixels
            return False
        expected.add((size.width, size.height))
    return any(image.is_saved and (image.width, image.height) not in expected for image in entry.images)


def _price_range(entry: Entry, task: Task) -> tuple[float, float]:
    """Return the lowest and the highest possible charge for the entry's request, in credits."""
    try:
        request = GenerationRequest.model_validate(entry.body)
    except ValidationError:
        return 0.0, float("inf")
    references = references_of(request)
    tokens = len(request.prompt.encode("utf-8", "surrogatepass"))  # a token has at least one byte
    model = request.image_model
    resolved = [sizes.resolve(request.size, request.resolution, rule, model.limits).size for rule in sizes.RULES]
    shapes = [size for size in resolved if size is not None] or [sizes.Size(*size) for size in model.auto_sizes]
    # EvoLink may make fewer images than requested, and bills those.
    delivered = min(_images_of(task), request.n)
    fewest = delivered or (1 if task.settled else request.n)
    most = delivered or request.n
    low = min(costs.price(size, request.quality, fewest, model=model).credits for size in shapes)
    high = max(
        costs.price(size, request.quality, most, references=references, prompt_tokens=tokens, model=model).credits
        for size in shapes
    )
    return low * entry.price_factor * (1 - PRICE_ERROR), high * entry.price_factor * (1 + PRICE_ERROR)
