"""Which of EvoLink's two tables its pictures follow: pinned by a setting, or learned from the pixels of a picture."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING

from evolink_mcp.api import sizes
from evolink_mcp.api.sizes import Rule
from evolink_mcp.errors import JournalUnwritable

if TYPE_CHECKING:
    from evolink_mcp.journal.entry import Entry
    from evolink_mcp.journal.journal import Journal

log = logging.getLogger(__name__)

AUTO = "auto"
SETTINGS = (AUTO, *sizes.RULES)
FACT = "size_rule"
THE_PAGES: Rule = "anchor-edge"


class SizeRule:
    """The rule by `setting`: one of SETTINGS. What is learned is in the journal, for every server of this account."""

    def __init__(self, journal: Journal, setting: str = AUTO) -> None:
        if setting not in SETTINGS:
            raise ValueError(f"the size rule is not one of {', '.join(SETTINGS)}")
        self._journal = journal
        self._pinned: Rule | None = next((rule for rule in sizes.RULES if rule == setting), None)
        self._learned: Rule | None = None
        self._read_at = -math.inf

    @property
    def current(self) -> Rule:
        """The rule that sizes are told by: the page's until a picture has shown another one."""
        return self._pinned or self._learned or THE_PAGES

    @property
    def known(self) -> bool:
        """Whether a delivered picture has shown `current`."""
        return self._learned == self.current

    @property
    def possible(self) -> tuple[Rule, ...]:
        """The rules that a picture may follow: prices are judged by the dearest of them."""
        return (self.current,) if self._pinned or self._learned else sizes.RULES

    async def refresh(self, fresh_for_s: float = 0.0) -> None:
        """Read what another server may have learned; if the journal cannot be read, what is known stays.

        What was read less than `fresh_for_s` seconds ago is not read again.
        """
        if self._learned is None and time.monotonic() - self._read_at >= fresh_for_s:
            self._read_at = time.monotonic()
            try:
                found = await self._journal.fact(FACT)
            except JournalUnwritable as error:
                log.info("%s", error.message)
            else:
                self._learned = next((rule for rule in sizes.RULES if rule == found), None)

    async def learn(self, entry: Entry) -> Rule | None:
        """Learn from the saved pictures of an entry; the rule, if it was not known before.

        Only a cell where the two tables differ teaches anything, and only if the picture is one of the two.
        """
        shown = shown_by(entry)
        if shown is None or shown == self._learned:
            return None
        await self.refresh()
        if shown == self._learned:
            return None
        self._learned = shown
        try:
            await self._journal.save_fact(FACT, shown)
        except JournalUnwritable as error:
            log.warning("%s", error.message)
        return shown


def shown_by(entry: Entry) -> Rule | None:
    """The rule that an entry's pictures follow, if they tell."""
    try:
        cells: dict[Rule, sizes.Size | None] = {rule: size_of(entry, rule) for rule in sizes.RULES}
    except ValueError:
        return None
    if len(set(cells.values())) < len(cells):
        return None
    pixels = {(picture.width, picture.height) for picture in entry.images if picture.is_saved}
    shown: list[Rule] = [rule for rule, size in cells.items() if size and (size.width, size.height) in pixels]
    return shown[0] if len(shown) == 1 else None


def size_of(entry: Entry, rule: str) -> sizes.Size | None:
    """The pixels that an entry's request means by `rule`; None for auto and where the request is not known.

    Raises:
        ValueError: the request makes no sense.
    """
    if not entry.request:
        return None
    return sizes.resolve(entry.request.get("size", "auto"), entry.request.get("resolution", "1K"), rule).size
