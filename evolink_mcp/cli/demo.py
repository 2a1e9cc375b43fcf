"""The main job without key or network: a real MCP client over stdio against this server and a simulated EvoLink."""

from __future__ import annotations

import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import uvicorn
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters
from mcp_types import CallToolResult, TextContent

from evolink_mcp.api.task import as_dict, as_list
from evolink_mcp.app.settings import Settings, environment_without_ours
from evolink_mcp.isolated import isolated_command
from evolink_mcp.simulator.app import Simulator

PICTURE_SECONDS = 5.0
SIZE = {"size": "16:9", "resolution": "2K", "quality": "medium"}
BAR_WIDTH = 28
SERVER_REQUIREMENTS = ("mcp", "mcp_types", "httpx2", "pydantic", "anyio", "PIL", "platformdirs", "filelock")


async def run_demo(prompt: str, say: Callable[..., None]) -> int:
    """Make one picture and tell what a person wants to know; returns the exit code."""
    output = demo_folder(Settings.from_environment().folders.output)
    say("evolink-mcp demo: a real MCP client, a real server, a simulated EvoLink. No key, no network, no cost.\n")
    call = f'generate_image(prompt="{prompt}", size="16:9", resolution="2K")'
    width = max(shutil.get_terminal_size().columns - 2, 20)
    say(textwrap.fill(call, width, initial_indent="  ", subsequent_indent="      ") + "\n")
    simulator = Simulator(duration_s=PICTURE_SECONDS)
    web = uvicorn.Server(uvicorn.Config(simulator.app, port=0, log_level="error", lifespan="off"))
    code = 1
    with tempfile.TemporaryDirectory(prefix="evolink-demo-") as data:
        async with anyio.create_task_group() as group:
            group.start_soon(web.serve)
            while not web.started:
                await anyio.sleep(0.01)
            port = web.servers[0].sockets[0].getsockname()[1]
            started = time.monotonic()
            try:
                answer = await _ask(prompt, port, data, output, say)
                code = _tell(answer, time.monotonic() - started, say)
            finally:
                web.should_exit = True
    return code


def demo_folder(output: Path) -> Path:
    """Where a demo's pictures go: beside the bought ones, never among them."""
    simulated = "simulated" in output.name.lower()
    return output if simulated else output.with_name(f"{output.name} simulated")


async def _ask(prompt: str, port: int, data: str, output: Path, say: Callable[..., None]) -> CallToolResult:
    command, *arguments = isolated_command("evolink_mcp.cli.main:main", SERVER_REQUIREMENTS)
    server = StdioServerParameters(
        command=command,
        args=arguments,
        env={
            **environment_without_ours(),
            "NO_PROXY": "127.0.0.1",  # a proxy could not reach this machine's own simulator
            "no_proxy": "127.0.0.1",
            "EVOLINK_BASE_URL": f"http://127.0.0.1:{port}",
            "EVOLINK_API_KEY": "sk-demo-no-money",
            "EVOLINK_MCP_DATA_DIR": data,
            "EVOLINK_MCP_OUTPUT_DIR": str(output),
        },
    )
    bar = _Bar(say)

    async def show(progress: float, total: float | None, message: str | None) -> None:
        bar.show(progress, message or "")

    try:
        async with Client(server) as client:
            return await client.call_tool("generate_image", {"prompt": prompt, **SIZE}, progress_callback=show)
    finally:  # also after Ctrl-C: the terminal's next line is its own
        bar.end()


def _tell(answer: CallToolResult, took_s: float, say: Callable[..., None]) -> int:
    facts = as_dict(answer.structured_content)
    pictures = [image for image in map(as_dict, as_list(facts.get("images"))) if image["path"]]
    if answer.is_error or not pictures:
        say(next(block.text for block in answer.content if isinstance(block, TextContent)))
        return 1
    for image in pictures:
        say(f"\n  {image['path']}")
        say(f"  {image['width']} × {image['height']} pixels, {image['bytes']:,} bytes, {image['mime_type']}")
    say(f"\nDone in {took_s:.1f} s. At EvoLink the same call costs about {facts['credits']:g} credits "
        f"(${facts['usd']:.3f}) and takes 10 to 130 s.")  # fmt: skip
    say("The picture is simulated: it lies in a folder of its own. Next:")
    say("  evolink-mcp doctor    checks this machine, and prints what your MCP host needs to start the server")
    return 0


def _can_print(letters: str) -> bool:
    """Whether this console has these letters: cp1252 has no blocks."""
    try:
        letters.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


class _Bar:
    """A live bar in a terminal, a line per change elsewhere."""

    def __init__(self, say: Callable[..., None]) -> None:
        self._say = say
        self._live = sys.stdout.isatty()
        self._full, self._empty = "█░" if _can_print("█░") else "#-"
        self._last = ""

    def show(self, done: float, message: str) -> None:
        filled = round(BAR_WIDTH * done / 100)
        line = f"  [{self._full * filled}{self._empty * (BAR_WIDTH - filled)}] {done:3.0f} %  {message}"
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._say("\r" + line[:width].ljust(width), end="", flush=True)
        elif message != self._last:
            self._say(line, flush=True)
        self._last = message

    def end(self) -> None:
        if self._live:
            self._say()
