"""Choose between EvoLink's two size tables: a setting decides, or the pixels of a saved image."""

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
PUBLISHED_RULE: Rule = "anchor-edge"


class SizeRule:
    """The size rule of an account. `setting` is one of SETTINGS. All servers share the learned rule in the journal."""

    def __init__(self, journal: Journal, setting: str = AUTO) -> None:
        if setting not in SETTINGS:
            raise ValueError(f"the size rule is not one of {', '.join(SETTINGS)}")
        self._journal = journal
        self._pinned: Rule | None = next((rule for rule in sizes.RULES if rule == setting), None)
        self._learned: Rule | None = None
        self._read_at = -math.inf

    @property
    def current(self) -> Rule:
        """The rule for computed sizes: EvoLink's published one until an image shows another one."""
        return self._pinned or self._learned or PUBLISHED_RULE

    @property
    def is_known(self) -> bool:
        """Whether a saved image showed `current`."""
        return self._learned == self.current

    @property
    def possible(self) -> tuple[Rule, ...]:
        """The rules that an image may follow. The price ceiling uses the most expensive one."""
        return (self.current,) if self._pinned or self._learned else sizes.RULES

    async def refresh(self, fresh_for_s: float = 0.0) -> None:
        """Read the rule that another server learned, unless the last read is younger than `fresh_for_s` seconds.

        If the journal cannot be read, nothing changes.
        """
        if self._learned is None and time.monotonic() - self._read_at >= fresh_for_s:
            self._read_at = time.monotonic()
            try:
                value = await self._journal.fact(FACT)
            except JournalUnwritable as error:
                log.info("%s", error.message)
            else:
                self._learned = next((rule for rule in sizes.RULES if rule == value), None)

    async def learn(self, entry: Entry) -> Rule | None:
        """Learn from the saved images of an entry. Return the rule if it is new.

        An image proves a rule only if the two tables differ for its request and one of them has its pixels.
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
    """Return the rule that an entry's images prove, if any."""
    try:
        cells: dict[Rule, sizes.Size | None] = {rule: size_of(entry, rule) for rule in sizes.RULES}
    except ValueError:
        return None
    if len(set(cells.values())) < len(cells):
        return None
    pixels = {(image.width, image.height) for image in entry.images if image.is_saved}
    shown: list[Rule] = [rule for rule, size in cells.items() if size and (size.width, size.height) in pixels]
    return shown[0] if len(shown) == 1 else None


def size_of(entry: Entry, rule: str) -> sizes.Size | None:
    """Return the pixels of an entry's request under `rule`. None: size=auto, or the request is unknown.

    Raises:
        ValueError: the request is invalid.
    """
    if not entry.request:
        return None
    return sizes.resolve(entry.request.get("size", "auto"), entry.request.get("resolution", "1K"), rule).size
