"""A measured figure with its target, and its line in a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COLUMN = 62


@dataclass(frozen=True, slots=True)
class Figure:
    """`limit` is the target, a maximum. A figure without a target explains another figure."""

    name: str
    value: float
    unit: str = ""
    limit: float | None = None
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        return None if self.limit is None else self.value <= self.limit

    def data(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": round(self.value, 5),
            "unit": self.unit,
            "at_most": self.limit,
            "met": self.is_met,
            "note": self.note,
        }

    def line(self) -> str:
        word = {True: "met", False: "NOT MET", None: ""}[self.is_met]
        most = "" if self.limit is None else f"≤ {format_value(self.limit)}"
        return f"  {self.name:{COLUMN}} {format_value(self.value):>9} {self.unit:9} {most:>9}  {word:8} {self.note}".rstrip()

    def row(self) -> str:
        word = {True: "met", False: "**not met**", None: ""}[self.is_met]
        most = "" if self.limit is None else f"≤ {format_value(self.limit)}"
        return f"| {self.name} | {format_value(self.value)} {self.unit} | {most} | {word} | {self.note} |"


def format_value(value: float) -> str:
    """Return three significant digits, with thousands in groups."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def middle(values: Sequence[float]) -> float:
    return statistics.median(values)


def share(values: Sequence[float], part: float) -> float:
    """Return the value that this part of all values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]
