"""Find the one of EvoLink's two size tables that the pixels of a saved image follow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evolink_mcp.api import sizes
from evolink_mcp.api.sizes import Rule

if TYPE_CHECKING:
    from evolink_mcp.journal.entry import Entry

AUTO = "auto"
SETTINGS = (AUTO, *sizes.RULES)
# The table of EvoLink's page of 2026-04-23. Until an image proves a table, a price ceiling covers both.
PUBLISHED_RULE: Rule = "anchor-edge"


def shown_by(entry: Entry) -> Rule | None:
    """Return the rule that an entry's images prove, if any."""
    try:
        cells: dict[Rule, sizes.Size | None] = {rule: size_of(entry, rule) for rule in sizes.RULES}
    except ValueError:
        return None
    # Both tables have the same pixels for this request.
    if len(set(cells.values())) < len(cells):
        return None
    pixels = {(image.width, image.height) for image in entry.images if image.is_saved}
    matching_rules: list[Rule] = [rule for rule, size in cells.items() if size and (size.width, size.height) in pixels]
    # Images with the pixels of both tables contradict each other.
    return matching_rules[0] if len(matching_rules) == 1 else None


def size_of(entry: Entry, rule: str) -> sizes.Size | None:
    """Return the pixels of an entry's request under `rule`. None: size=auto, or the request is unknown.

    Raises:
        ValueError: the request is invalid.
    """
    if not entry.request:
        return None
    return sizes.resolve(entry.request.get("size", "auto"), entry.request.get("resolution", "1K"), rule).size
