"""One measured figure with its promise, and the table they are printed in."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COLUMN = 62


@dataclass(frozen=True, slots=True)
class Figure:
    """`limit` is the most that is promised; without one the figure only explains another."""

    name: str
    value: float
    unit: str = ""
    limit: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.limit is None else self.value <= self.limit

    def data(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": round(self.value, 5),
            "unit": self.unit,
            "at_most": self.limit,
            "met": self.met,
            "note": self.note,
        }

    def line(self) -> str:
        word = {True: "met", False: "NOT MET", None: ""}[self.met]
        most = "" if self.limit is None else f"≤ {shown(self.limit)}"
        return f"  {self.name:{COLUMN}} {shown(self.value):>9} {self.unit:9} {most:>9}  {word:8} {self.note}".rstrip()

    def row(self) -> str:
        word = {True: "met", False: "**not met**", None: ""}[self.met]
        most = "" if self.limit is None else f"≤ {shown(self.limit)}"
        return f"| {self.name} | {shown(self.value)} {self.unit} | {most} | {word} | {self.note} |"


def shown(value: float) -> str:
    """Three digits that matter, thousands in groups."""
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def middle(values: Sequence[float]) -> float:
    return statistics.median(values)


def share(values: Sequence[float], part: float) -> float:
    """The value that `part` of all values do not exceed."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]
