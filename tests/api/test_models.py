"""A new quality, model, tool or object store needs at most two changed modules.

Each test copies the package, makes the edits that a person would make, and runs a check in the copy.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from child_processes import without_coverage

import evolink_mcp
from evolink_mcp.api import costs
from evolink_mcp.api.models import DEFAULT_MODEL, MODELS
from evolink_mcp.api.sizes import Size

PACKAGE = Path(evolink_mcp.__file__).parent
CHANGED_MODULES_MAX = 2

ADDITIONS = """
from pathlib import Path
import json, tempfile
import anyio
from mcp.client import Client
from evolink_mcp.api import costs, models, sizes
from evolink_mcp.api.request import GenerationRequest
from evolink_mcp.app.settings import Settings
from evolink_mcp.app.wiring import open_studio
from evolink_mcp.server.gallery import page_text
from evolink_mcp.server.server import build_server
from evolink_mcp.studio.prices import price_of
from mcp_types import PromptReference

async def connect(check):
    with tempfile.TemporaryDirectory() as folder:
        environ = {"EVOLINK_MCP_DATA_DIR": folder + "/data", "EVOLINK_MCP_OUTPUT_DIR": folder + "/pictures"}
        async with open_studio(Settings.from_environment(environ)) as studio, Client(build_server(studio)) as client:
            await check(client)

def properties(tools, name):
    return next(tool for tool in tools if tool.name == name).input_schema["properties"]
"""

QUALITY = """
async def check(client):
    tools = (await client.list_tools()).tools
    for name in ("generate_image", "compute_size"):
        quality = properties(tools, name)["quality"]
        assert quality["enum"] == ["low", "medium", "high", "ultra"], quality
        assert quality["description"].endswith("high about 4x, ultra about 16x of medium."), quality
    completion = await client.complete(
        PromptReference(type="ref/prompt", name="new_picture"), {"name": "quality", "value": ""}
    )
    assert completion.completion.values == ["low", "medium", "high", "ultra"]
    answer = await client.call_tool("compute_size", {"size": "1:1", "quality": "ULTRA"})
    assert answer.structured_content["estimated_tokens"] == 16 * 1756
    other = await client.call_tool("compute_size", {"size": "1:1"})
    assert "ultra" in {price["quality"] for price in other.structured_content["prices"]}

assert models.TYPICAL_S["ultra"] == 300.0
assert '"ultra": 300.0' in page_text()
request = GenerationRequest(prompt="a fox", size="1024x1024", quality="ultra")
assert price_of(request, sizes.RULES) > 4 * price_of(request.model_copy(update={"quality": "high"}), sizes.RULES) * 0.9
anyio.run(connect, check)
"""

MODEL = """
async def check(client):
    model = properties((await client.list_tools()).tools, "generate_image")["model"]
    assert model["enum"] == ["gpt-image-2", "gpt-image-9"], model
    assert model["default"] == "gpt-image-2"

first = GenerationRequest(prompt="a fox", size="4096x2048", model="gpt-image-9", quality="low")
assert first.body()["size"] == "4096x2048"
small = {"prompt": "a fox", "size": "1024x1024", "quality": "low"}
old = price_of(GenerationRequest(**small), sizes.RULES)
new = price_of(GenerationRequest(**small, model="gpt-image-9"), sizes.RULES)
assert new > 9 * old, (old, new)
for wrong in ({"size": "4096x2048"}, {"model": "gpt-image-9", "quality": "high"}, {"model": "gpt-image-9", "n": 5}):
    try:
        GenerationRequest(**{"prompt": "a fox", **wrong})
    except ValueError:
        continue
    raise AssertionError(wrong)
assert models.TYPICAL_S["gpt-image-9 low"] == 5.0
anyio.run(connect, check)
"""

TOOL = """
async def check(client):
    assert "say_hello" in {tool.name for tool in (await client.list_tools()).tools}
    assert (await client.call_tool("say_hello", {})).content[0].text == "hello"

from evolink_mcp.tools.names import TOOL_NAMES
assert "say_hello" in TOOL_NAMES
anyio.run(connect, check)
"""

HELLO_MODULE = '''"""say_hello: a greeting."""

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp_types import CallToolResult
from typing import Any
from evolink_mcp.api.request import Arguments
from evolink_mcp.tools.adapter import READS, flat_tool, format_error_as, result
from evolink_mcp.tools.schemas import ErrorOut
from pydantic import BaseModel


class HelloArguments(Arguments):
    """No arguments."""


class HelloOut(BaseModel):
    """The answer."""

    text: str = "hello"
    error: ErrorOut | None = None


def hello_tool() -> Tool:
    """Return the tool."""

    async def say_hello(req: HelloArguments, ctx: Context[Any, Any]) -> CallToolResult:
        """Say hello."""
        return result("hello", HelloOut(), is_error=False)

    error_text = format_error_as(HelloOut)
    return flat_tool(say_hello, HelloArguments, HelloOut, error_text, title="Say hello", annotations=READS)
'''

STORE = """
import os
from evolink_mcp.teams.object_store import ObjectStore

os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "eu-central-1"}

async def store():
    url, expires_at = await ObjectStore("s3a://bucket/prefix", 24).link("a.png")
    assert "/prefix/a.png?" in url, url

anyio.run(store)
os._exit(0)  # the threads of obstore can abort an interpreter that ends normally
"""


def run_in_copy(folder: Path, edits: dict[str, Callable[[str], str]], check: str) -> None:
    """Copy the package, apply the edits to existing modules, and run the check with the copy."""
    assert len(edits) <= CHANGED_MODULES_MAX
    copy = folder / "evolink_mcp"
    if not copy.exists():
        copytree(PACKAGE, copy, ignore=ignore_patterns("__pycache__"))
    for name, edit in edits.items():
        module = copy / name
        text = module.read_text(encoding="utf-8")
        assert edit(text) != text, f"{name} has changed: correct the edit"
        module.write_text(edit(text), encoding="utf-8")
    script = f"import sys; sys.path.insert(0, {str(folder)!r})\nimport evolink_mcp\n"
    script += f"assert evolink_mcp.__file__.startswith({str(folder)!r})\n{ADDITIONS}{check}"
    process = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=folder,
        env=without_coverage(os.environ),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr


def replacing(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new, 1)


def test_a_new_quality_is_one_line_of_the_record(tmp_path: Path) -> None:
    line = '"high": Quality(96, 126.0)'
    edits = {"api/models.py": replacing(line, f'{line}, "ultra": Quality(192, 300.0)')}
    run_in_copy(tmp_path, edits, QUALITY)


def test_a_new_model_is_one_record(tmp_path: Path) -> None:
    record = """NEW = replace(
    GPT_IMAGE_2,
    name="gpt-image-9",
    qualities={"low": Quality(16, 5.0), "medium": Quality(48, 6.0)},
    limits=replace(GPT_IMAGE_2.limits, edge_max=4096, pixels_max=16_777_216),
    rates=Rates(image_output=183_600, image_input=4_896, text_input=3_060),
    images_max=4,
)
MODELS: Mapping[str, ImageModel] = {model.name: model for model in (GPT_IMAGE_2, NEW)}
"""

    def edit(text: str) -> str:
        old = next(line for line in text.splitlines() if line.startswith("MODELS:"))
        return text.replace(old, record).replace("import dataclass", "import dataclass, replace", 1)

    run_in_copy(tmp_path, {"api/models.py": edit}, MODEL)


def test_a_new_tool_is_its_own_module_and_two_lists(tmp_path: Path) -> None:
    copytree(PACKAGE, tmp_path / "evolink_mcp", ignore=ignore_patterns("__pycache__"))
    (tmp_path / "evolink_mcp" / "tools" / "hello.py").write_text(HELLO_MODULE)

    def edit_server(text: str) -> str:
        text = text.replace(
            "        get_balance_tool(studio),\n", "        get_balance_tool(studio),\n        hello_tool(),\n"
        )
        line = "from evolink_mcp.tools.list_tasks import"
        return text.replace(line, f"from evolink_mcp.tools.hello import hello_tool\n{line}")

    edits = {
        "server/server.py": edit_server,
        "tools/names.py": replacing('    "get_balance",\n', '    "get_balance",\n    "say_hello",\n'),
    }
    run_in_copy(tmp_path, edits, TOOL)


def test_a_new_object_store_is_one_scheme(tmp_path: Path) -> None:
    edits = {"teams/object_store.py": replacing('"az://")', '"az://", "s3a://")')}
    run_in_copy(tmp_path, edits, STORE)


@pytest.mark.parametrize("model", list(MODELS.values()), ids=list(MODELS))
def test_the_cost_ratio_of_a_quality_is_the_ratio_of_its_tokens(model) -> None:
    square = Size(1024, 1024)
    default = costs.output_tokens(square, model.default_quality, model)
    for quality in model.qualities:
        assert costs.output_tokens(square, quality, model) / default == pytest.approx(
            model.cost_ratio(quality), rel=0.01
        )


def test_auto_is_at_most_as_expensive_as_the_largest_size_that_it_may_choose() -> None:
    cheapest, dearest = (costs.price(Size(*size), "medium").credits for size in DEFAULT_MODEL.auto_sizes)
    assert cheapest < costs.price(None, "medium").credits < dearest
