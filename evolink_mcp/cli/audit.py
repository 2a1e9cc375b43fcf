"""The command `audit`: add the charges of the journal by tenant, day, month or task."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from evolink_mcp.api.costs import usd
from evolink_mcp.journal.journal import Charge
from evolink_mcp.sanitize import printable

# EvoLink bills credits with at most four decimal places.
DECIMALS = 4
# The first characters that make a spreadsheet read a cell of CSV as a formula (OWASP, "CSV injection").
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


@dataclass(frozen=True, slots=True)
class Line:
    """The sums of one tenant, day, month or task, in credits."""

    name: str
    purchases: int
    spent: float
    reserved: float


def lines_by(key: str, charges: Iterable[Charge]) -> list[Line]:
    """Add the charges by "tenant", "day", "month" or "task", in the order of the names. Days are those of this machine."""
    groups: defaultdict[str, list[Charge]] = defaultdict(list)
    for charge in charges:
        groups[_name(key, charge)].append(charge)
    return [
        Line(name, len(group), _sum(charge.spent for charge in group), _sum(charge.reserved for charge in group))
        for name, group in sorted(groups.items())
    ]


def _name(key: str, charge: Charge) -> str:
    match key:
        case "tenant":
            return charge.profile
        case "task":
            return charge.task_id or "(no id)"
        case _:
            return datetime.fromtimestamp(charge.created_at).strftime("%Y-%m-%d" if key == "day" else "%Y-%m")


def rows_of(lines: list[Line], key: str) -> list[dict[str, Any]]:
    """Return the lines as rows with the names of their columns."""
    return [
        {
            key: line.name,
            "purchases": line.purchases,
            "spent_credits": line.spent,
            "spent_usd": usd(line.spent),
            "reserved_credits": line.reserved,
        }
        for line in lines
    ]


def text_of(lines: list[Line], key: str, form: str) -> str:
    """Return the lines as a table with a sum, as CSV or as JSON. `key` names their first column."""
    if form == "json":
        return json.dumps(rows_of(lines, key), indent=2, ensure_ascii=False) + "\n"
    if not lines:
        return "" if form == "csv" else "The journal has no charges in this period.\n"
    if form == "csv":
        rows = rows_of(lines, key)
        out = io.StringIO()
        # The standard output of Windows makes \r\n of \n, so \r\n from csv would become \r\r\n.
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _spreadsheet_cell(value) for name, value in row.items()} for row in rows)
        return out.getvalue()
    return _table(rows_of([*lines, _total(lines)], key))


def _total(lines: list[Line]) -> Line:
    return Line(
        "all",
        sum(line.purchases for line in lines),
        _sum(line.spent for line in lines),
        _sum(line.reserved for line in lines),
    )


def _sum(credits: Iterable[float]) -> float:
    # A plain sum of many charges would be wrong in its last digit.
    return round(math.fsum(credits), DECIMALS)


def _table(rows: list[dict[str, Any]]) -> str:
    # The name of a tenant with a JWT comes from its issuer and can have control characters.
    cells = [list(rows[0]), *([printable(_cell(value)) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in cells
    ]
    return "\n".join(lines) + "\n"


def _spreadsheet_cell(value: object) -> object:
    # The name of a tenant with a JWT comes from its issuer. A spreadsheet would run a name like "=1+1" as a formula.
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value


def _cell(value: object) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)
