"""Whether EvoLink's callbacks arrive at the servers of an account. All servers share the count."""

from __future__ import annotations

import logging

from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.journal import FACTS_MAX_AGE_S, Journal

log = logging.getLogger(__name__)

# The fact with the number of callbacks that did not arrive, since the last one that did. At most MISSED_MAX.
MISSED_FACT = "missed_callbacks"
# A restart of the servers can lose one callback, but hardly those of three tasks in a row.
MISSED_MAX = 3
MISSING = (
    f"EvoLink did not call back for the last {MISSED_MAX} tasks, so the servers poll without waiting for callbacks: "
    "EvoLink must reach EVOLINK_MCP_PUBLIC_URL"
)


class CallbackHistory:
    """The last callbacks of the account. The journal is written only while callbacks begin or stop to arrive."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._missed = 0

    @property
    def are_missing(self) -> bool:
        """Whether the last callbacks did not arrive, so that none is expected to."""
        return self._missed >= MISSED_MAX

    async def read(self) -> None:
        """Read the count of all servers. If the journal cannot be read, nothing changes."""
        try:
            facts = await self._journal.facts(max_age_s=FACTS_MAX_AGE_S)
        except JournalUnwritable:
            return
        self._missed = missed_in(facts.get(MISSED_FACT))

    async def add(self, *, has_arrived: bool) -> None:
        """A task ended, and its callback arrived before or did not."""
        missed = 0 if has_arrived else min(self._missed + 1, MISSED_MAX)
        if missed == self._missed:
            return
        self._missed = missed
        if self.are_missing:
            log.warning(MISSING)
        try:
            await self._journal.save_fact(MISSED_FACT, str(missed))
        except JournalUnwritable as error:
            log.info("%s", error.message)


def missed_in(text: str | None) -> int:
    """Return the number in the fact. A damaged fact counts as missing."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 3 else 0
