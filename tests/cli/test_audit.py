"""The sums of the command `audit` are EvoLink's bills, to the last digit."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import Open, PlainSimulator
from team_server import ANNA, BERT, open_team_server

from evolink_mcp.cli.audit import Line, lines_by, rows_of, text_of
from evolink_mcp.cli.image_commands import find_charges
from evolink_mcp.journal.journal import Charge
from evolink_mcp.teams.settings import TeamSettings

pytestmark = pytest.mark.anyio

DAY_S = 86_400
CHARGES = [
    Charge("anna", 1_790_000_000.0 + DAY_S, "task-3", 0.1, 0.0),
    Charge("büro", 1_790_000_000.0, "task-2", 0.2, 0.0),
    Charge("anna", 1_790_000_000.0, None, 0.0, 3.5),
    Charge("anna", 1_790_000_000.0, "task-1", 0.2, 0.0),
]


def settings_of(folder: Path, **environ: str) -> TeamSettings:
    return TeamSettings.from_environment({"EVOLINK_MCP_DATA_DIR": str(folder), **environ})


async def test_the_sums_of_the_tenants_are_those_of_evolink(tmp_path: Path) -> None:
    async with open_team_server(tmp_path, ANNA, BERT, simulator=PlainSimulator(duration_s=0)) as server:
        for number in range(3):
            await server.call("a", "generate_image", prompt=f"A fox {number}", size="1024x640", quality="low")
        await server.call("b", "generate_image", prompt="A hen", size="16:9", n=2)
        await server.call("b", "generate_image", prompt="sim:fail A hen")
        billed_credits = {
            key: server.simulator.credits(key)[1] for key in {task.key for task in server.simulator.tasks.values()}
        }
        settings = settings_of(tmp_path / "data", EVOLINK_MCP_TOKENS_FILE=str(tmp_path / "tokens.toml"))
        charges = await anyio.to_thread.run_sync(find_charges, settings, 0.0)
    lines = lines_by("tenant", charges)
    assert [(line.name, line.purchases, line.reserved) for line in lines] == [("anna", 3, 0), ("bert", 1, 0)]
    assert sum(line.spent for line in lines) == round(sum(billed_credits.values()), 4)
    tasks = lines_by("task", charges)
    assert {line.name for line in tasks} == {charge.task_id for charge in charges}
    assert round(sum(line.spent for line in tasks), 4) == round(sum(billed_credits.values()), 4)


async def test_a_person_sees_only_the_charges_of_the_profile(open_world: Open) -> None:
    async with open_world() as world, world.client() as client:
        await client.call_tool("generate_image", {"prompt": "sim:fast a fox"})
        folder = world.folder / "data"
        spent = world.simulator.credits(world.settings.key.get_secret_value())[1]  # pyright: ignore
        (line,) = lines_by("tenant", find_charges(settings_of(folder), 0.0))
        assert (line.name, line.spent) == ("default", round(spent, 4))
        assert find_charges(settings_of(folder, EVOLINK_MCP_PROFILE="other"), 0.0) == []


async def test_a_folder_without_a_journal_has_no_charges(tmp_path: Path) -> None:
    assert find_charges(settings_of(tmp_path / "none"), 0.0) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("tenant", [("anna", 3, 0.3, 3.5), ("büro", 1, 0.2, 0.0)]),
        ("month", [("2026-09", 4, 0.5, 3.5)]),
        ("task", [("(no id)", 1, 0.0, 3.5), ("task-1", 1, 0.2, 0.0), ("task-2", 1, 0.2, 0.0), ("task-3", 1, 0.1, 0.0)]),
    ],
)
async def test_charges_are_added_without_an_error_of_the_last_digit(key: str, expected: list[Any]) -> None:
    lines = lines_by(key, CHARGES)
    assert [(line.name, line.purchases, line.spent, line.reserved) for line in lines] == expected
    assert [line.spent for line in lines_by("day", CHARGES)] == [0.4, 0.1]


async def test_the_table_has_a_sum_and_the_exports_have_none() -> None:
    lines = lines_by("tenant", CHARGES)
    table = text_of(lines, "tenant", "table").splitlines()
    assert table[0].split() == ["tenant", "purchases", "spent_credits", "spent_usd", "reserved_credits"]
    assert table[-1].split() == ["all", "4", "0.5", "0.0074", "3.5"]
    assert len({len(line) for line in table}) == 1
    assert json.loads(text_of(lines, "tenant", "json")) == rows_of(lines, "tenant")
    rows = list(csv.DictReader(io.StringIO(text_of(lines, "tenant", "csv"))))
    assert [(row["tenant"], float(row["spent_credits"])) for row in rows] == [("anna", 0.3), ("büro", 0.2)]
    formula = text_of([Line("=1+1", 1, 0.0, -3.5)], "tenant", "csv").splitlines()[1]
    assert formula == "'=1+1,1,0.0,0.0,-3.5"
    assert text_of([], "tenant", "table") == "The journal has no charges in this period.\n"
    assert (text_of([], "tenant", "csv"), text_of([], "tenant", "json")) == ("", "[]\n")
