"""The output schemas are brief: each field has a type, and one tool describes the nested objects for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evolink_mcp.tools.schemas import ErrorOut
from evolink_mcp.tools.task_answer import ImageOut

TOOLS: dict[str, Any] = json.loads((Path(__file__).parent / "contract" / "tools.json").read_text("utf-8"))
OUTPUTS = {name: tool["outputSchema"]["properties"] for name, tool in TOOLS.items() if "outputSchema" in tool}


def test_every_field_of_an_answer_has_a_type() -> None:
    assert [
        f"{tool}.{name}" for tool, fields in OUTPUTS.items() for name, field in fields.items() if not field["type"]
    ] == []


def test_generate_image_describes_the_images_the_error_and_the_next_action() -> None:
    fields = OUTPUTS["generate_image"]
    assert set(fields["error"]["properties"]) == set(ErrorOut.model_fields)
    assert set(fields["next_action"]["properties"]) == {"tool", "arguments"}
    assert set(fields["expected_size"]["properties"]) == {"width", "height"}
    assert set(fields["images"]["items"]["properties"]) == set(ImageOut.model_fields)


def test_get_task_has_the_fields_of_generate_image() -> None:
    assert set(OUTPUTS["get_task"]) == set(OUTPUTS["generate_image"])
