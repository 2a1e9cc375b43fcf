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
from evolink_mcp.cli.image_commands import profile_of
from evolink_mcp.journal.journal import Charge
from evolink_mcp.journal.sqlite import FILE_NAME, read_charges
from evolink_mcp.sanitize import printable
from evolink_mcp.teams.settings import TeamSettings

# EvoLink bills credits with at most four decimal places.
DECIMALS = 4


@dataclass(frozen=True, slots=True)
class Line:
    """The sums of one tenant, day, month or task, in credits."""

    name: str
    purchases: int
    spent: float
    reserved: float


def find_charges(settings: TeamSettings, since: float) -> list[Charge]:
    """Return the charges since a time (epoch seconds). A team's journal has those of all tenants. Blocks.

    Raises:
        JournalUnwritable: the journal is damaged or unreadable.
    """
    if settings.database_url is not None:
        from evolink_mcp.teams import schema

        return schema.read_charges(settings.database_url, since)
    if not (settings.data_dir / FILE_NAME).exists():
        return []
    return read_charges(settings.data_dir, since, profile=profile_of(settings))


def lines_by(key: str, charges: Iterable[Charge]) -> list[Line]:
    """Add the charges by "tenant", "day", "month" or "task", in the order of the names. Days are those of this machine."""
    groups: defaultdict[str, list[Charge]] = defaultdict(list)
    for charge in charges:
        groups[_name(key, charge)].append(charge)
    return [_line(name, group) for name, group in sorted(groups.items())]


def _name(key: str, charge: Charge) -> str:
    match key:
        case "tenant":
            return charge.profile
        case "task":
            return charge.task_id or "(no id)"
        case _:
            return datetime.fromtimestamp(charge.created_at).strftime("%Y-%m-%d" if key == "day" else "%Y-%m")


def _line(name: str, charges: list[Charge]) -> Line:
    spent = round(math.fsum(charge.spent for charge in charges), DECIMALS)
    reserved = round(math.fsum(charge.reserved for charge in charges), DECIMALS)
    return Line(name, len(charges), spent, reserved)


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


def text_of(rows: list[dict[str, Any]], form: str) -> str:
    """Return the rows as a table with a sum, as CSV or as JSON."""
    if form == "json":
        return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    if not rows:
        return "" if form == "csv" else "The journal has no charges in this period.\n"
    if form == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()
    return _table([*rows, _total(rows)])


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    key, *columns = rows[0]
    sums = {column: round(math.fsum(row[column] for row in rows), DECIMALS) for column in columns}
    return {
        key: "all",
        **sums,
        "purchases": sum(row["purchases"] for row in rows),
        "spent_usd": usd(sums["spent_credits"]),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [list(rows[0]), *([printable(_cell(value)) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in cells
    ]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)
