"""EvoLink's answers are read in every known shape, and an invalid field is not an error."""

from __future__ import annotations

import json
from typing import Any

import pytest

from evolink_mcp.api.task import read_balance, read_task, read_tasks

ID = "task-unified-1757156493-imcg5zqt"
IN_THE_ID = 1_757_156_493.0


@pytest.mark.parametrize(
    ("fields", "created"),
    [
        pytest.param({"created": 1_757_000_000}, 1_757_000_000.0, id="created, as single tasks have it"),
        pytest.param({"created_at": 1_757_000_000}, 1_757_000_000.0, id="created_at, as rows of the list have it"),
        pytest.param({"created_at": 1_757_000_000_123}, 1_757_000_000.123, id="milliseconds"),
        pytest.param({"created_at": "1757000000"}, 1_757_000_000.0, id="a number as text"),
        pytest.param({"created_at": "2025-09-04T15:33:20Z"}, 1_757_000_000.0, id="ISO, UTC"),
        pytest.param({"created_at": "2025-09-04T23:33:20+08:00"}, 1_757_000_000.0, id="ISO, another zone"),
        pytest.param({"created_at": "2025-09-04 15:33:20"}, 1_757_000_000.0, id="ISO without a zone"),
        pytest.param({"created": None, "created_at": None}, IN_THE_ID, id="null"),
        pytest.param({}, IN_THE_ID, id="not at all"),
        pytest.param({"created": 0}, IN_THE_ID, id="nought"),
        pytest.param({"created": "yesterday"}, IN_THE_ID, id="a word"),
        pytest.param({"created_at": "0000-99-99T00:00"}, IN_THE_ID, id="no such day"),
        pytest.param({"created": 10**400}, IN_THE_ID, id="beyond floats"),
        pytest.param({"created": True}, IN_THE_ID, id="a truth"),
    ],
)
def test_the_creation_time_of_a_task_is_read_in_every_form(fields: dict[str, Any], created: float) -> None:
    assert read_task({"id": ID, **fields}).created == created


def test_an_id_without_a_time_has_no_creation_time() -> None:
    assert read_task({"id": "task-unified-abc"}).created is None


@pytest.mark.parametrize(
    "value", ["1e999", "-1e999", "NaN", "1" + "0" * 400, "-" + "9" * 400, '"' + "9" * 31 + '"', "[]"]
)
@pytest.mark.parametrize("field", ["progress", "created", "created_at"])
def test_absurd_numbers_raise_no_error(field: str, value: str) -> None:
    assert read_task(json.loads(f'{{"id": "{ID}", "{field}": {value}}}')).id == ID


@pytest.mark.parametrize("value", ["1e308", "1e16", "10" + "0" * 15, "-1e308", '"1e308"'])
def test_an_absurd_charge_is_unknown(value: str) -> None:
    """A sum or a ratio of such floats would be infinite."""
    assert read_task(json.loads(f'{{"id": "{ID}", "usage": {{"credits_used": {value}}}}}')).credits_used is None


@pytest.mark.parametrize("value", ["1e999", "1" + "0" * 400, "NaN", "true", '"7"', "null"])
def test_an_absurd_balance_is_unknown(value: str) -> None:
    answer = json.loads(f'{{"data": {{"user": {{"remaining_credits": {value}, "used_credits": 2}}}}}}')
    balance = read_balance(answer)
    assert (balance.account_remaining, balance.account_used) == (None, 2.0)


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda rows: {"data": rows}, id="data"),
        pytest.param(lambda rows: {"data": {"tasks": rows}}, id="data.tasks"),
        pytest.param(lambda rows: {"data": {"items": rows}}, id="data.items"),
        pytest.param(lambda rows: {"data": {"list": rows}}, id="data.list"),
        pytest.param(lambda rows: rows, id="the list itself"),
    ],
)
def test_a_list_is_read_in_every_shape_and_invalid_rows_are_skipped(wrap: Any) -> None:
    rows = [{"id": ID, "created_at": 1_757_000_000}, 7, None, {"id": [9]}, {"id": "two words"}, {}, [ID]]
    assert [task.id for task in read_tasks(wrap(rows))] == [ID]
    assert list(read_tasks(wrap([]))) == []
