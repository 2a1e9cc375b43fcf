"""Link a new API key to the earlier accounts of the profile, so that their tasks are followed with the new key."""

from __future__ import annotations

import logging

import anyio

from evolink_mcp.api.client import EvolinkClient
from evolink_mcp.causes import WEB_PAGE
from evolink_mcp.errors import EvolinkError, Refused
from evolink_mcp.journal.entry import Entry
from evolink_mcp.journal.journal import Journal
from evolink_mcp.studio.jobs import Timing

log = logging.getLogger(__name__)

NOT_FOUND = 404
# EvoLink may not know a younger task yet.
TASK_AGE_MIN_S = 10.0
# Every adoption tries to link. An EvoLink that fails gets no test for each of them.
TRY_AGAIN_AFTER_S = 15.0
# EvoLink refused to show the task. Other refusals, such as 401, show nothing about the account.
REFUSALS = (400, 403, NOT_FOUND, 410)


class AccountLinker:
    """Test once per account of the profile whether EvoLink lets this key read one of the account's recent tasks.

    A test is free. The journal records a link. The next server repeats a test that failed. `is_complete`: all are tested.
    """

    def __init__(self, client: EvolinkClient, journal: Journal, timing: Timing) -> None:
        self._client = client
        self._journal = journal
        self._timing = timing
        self._lock = anyio.Lock()
        self._next_try_at = 0.0
        self.is_complete = not client.has_key

    async def link(self) -> None:
        """Link the key to every account that it can read. Return at once if all accounts are tested.

        Raises:
            Refused: EvoLink did not answer. The same call may be repeated.
            JournalUnwritable: the accounts are unknown.
        """
        if self.is_complete:
            return
        # Several calls begin at the same time, and one test serves all of them.
        async with self._lock:
            if self.is_complete:
                return
            for account in await self._journal.read_links():
                await self._test(account)
            self.is_complete = True

    async def try_to_link(self) -> None:
        """Do the same as `link`, but log an error. After an error do nothing for TRY_AGAIN_AFTER_S seconds."""
        if self._timing.clock() < self._next_try_at:
            return
        try:
            await self.link()
        except EvolinkError as error:
            log.warning("%s", error.message)
            self._next_try_at = self._timing.clock() + TRY_AGAIN_AFTER_S

    async def _test(self, account: str) -> None:
        # A "not found" for an older task is certain. Without one, the newest task must do.
        is_old_by = self._timing.clock() - TASK_AGE_MIN_S
        entry = await self._journal.newest_of(account, until=is_old_by) or await self._journal.newest_of(account)
        if entry is not None and await self._can_read(entry):
            await self._journal.link(account)
            log.info("the API key can read the tasks of an earlier key: they are followed with it")

    async def _can_read(self, entry: Entry) -> bool:
        assert entry.task_id is not None
        try:
            await self._client.task(entry.task_id)
        except EvolinkError as error:
            is_young = error.http_status == NOT_FOUND and self._timing.clock() - entry.created_at < TASK_AGE_MIN_S
            is_foreign = error.cause is not None and error.cause.code == WEB_PAGE.code  # a firewall answered
            if error.http_status in REFUSALS and not is_foreign and not is_young:
                return False
            if is_young and not is_foreign:
                raise Refused(
                    "the API key is new, and the purchases of the earlier key are too young to tell whether it belongs to them",
                    code=error.code,
                    retryable=True,
                    advice=f"Call again in {TASK_AGE_MIN_S:.0f} s.",
                ) from error
            raise Refused(
                f"the API key is new here, and EvoLink did not say whether it belongs to the earlier purchases: {error.message}",
                code=error.code,
                retryable=True,
                advice=error.advice,
            ) from error
        return True
