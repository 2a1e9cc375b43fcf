"""A wrapper around a real journal. Tests make its methods fail or run something in the middle of a call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from evolink_mcp.errors import JournalUnwritable
from evolink_mcp.journal.journal import Journal


class FaultyJournal:
    """Pass each call on to `journal`.

    The methods in `unwritable` raise JournalUnwritable. `before` and `after` run something once before the call of a
    method, or after the real method returned. Each of `replacements` gets the real method and its arguments.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.unwritable: set[str] = set()
        self.before: dict[str, Callable[[], Awaitable[None]]] = {}
        self.after: dict[str, Callable[[], Awaitable[None]]] = {}
        self.replacements: dict[str, Callable[..., Awaitable[Any]]] = {}

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._journal, name)
        if name in self.replacements:
            return partial(self.replacements[name], attribute)
        if not callable(attribute) or not {name} & (self.unwritable | self.before.keys() | self.after.keys()):
            return attribute

        async def call(*args: Any, **options: Any) -> Any:
            if name in self.before:
                await self.before.pop(name)()
            if name in self.unwritable:
                raise JournalUnwritable("the journal cannot be used (simulated)")
            answer = await attribute(*args, **options)
            if name in self.after:
                await self.after.pop(name)()
            return answer

        return call
