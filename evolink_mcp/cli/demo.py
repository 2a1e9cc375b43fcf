"""The command `demo`: a real MCP client calls this server over stdio. The server uses a simulated EvoLink."""

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
from evolink_mcp.app.settings import environment_without_settings
from evolink_mcp.isolated import isolated_command
from evolink_mcp.simulator.app import Simulator

TASK_S = 5.0
SIZE = {"size": "16:9", "resolution": "2K", "quality": "medium"}
BAR_WIDTH = 28
SERVER_REQUIREMENTS = ("mcp", "mcp_types", "httpx2", "pydantic", "anyio", "PIL", "platformdirs", "filelock")


async def run_demo(prompt: str, output: Path, report: Callable[..., None]) -> int:
    """Generate one image beside the folder `output` and print the result with `report`. Return the exit code."""
    report("evolink-mcp demo: a real MCP client, a real server, a simulated EvoLink. No key, no network, no cost.\n")
    call = f'generate_image(prompt="{prompt}", size="16:9", resolution="2K")'
    width = max(shutil.get_terminal_size().columns - 2, 20)
    report(textwrap.fill(call, width, initial_indent="  ", subsequent_indent="      ") + "\n")
    simulator = Simulator(duration_s=TASK_S)
    web = uvicorn.Server(uvicorn.Config(simulator.app, port=0, log_level="error", lifespan="off"))
    code = 1
    with tempfile.TemporaryDirectory(prefix="evolink-demo-") as data:
        async with anyio.create_task_group() as group:
            group.start_soon(web.serve)
            while not web.started:
                await anyio.sleep(0.01)
            port = web.servers[0].sockets[0].getsockname()[1]
            start = time.monotonic()
            try:
                answer = await _generate(prompt, port, data, demo_folder(output), report)
                code = _report_result(answer, time.monotonic() - start, report)
            finally:
                web.should_exit = True
    return code


def demo_folder(output: Path) -> Path:
    """Return the output folder of the demo. Simulated images never mix with bought ones."""
    is_simulated = "simulated" in output.name.lower()
    return output if is_simulated else output.with_name(f"{output.name} simulated")


async def _generate(prompt: str, port: int, data: str, output: Path, report: Callable[..., None]) -> CallToolResult:
    command, *arguments = isolated_command("evolink_mcp.cli.main:main", SERVER_REQUIREMENTS)
    server = StdioServerParameters(
        command=command,
        args=arguments,
        env={
            **environment_without_settings(),
            "NO_PROXY": "127.0.0.1",  # a proxy cannot reach the simulator on this machine
            "no_proxy": "127.0.0.1",
            "EVOLINK_BASE_URL": f"http://127.0.0.1:{port}",
            "EVOLINK_API_KEY": "sk-demo-no-money",
            "EVOLINK_MCP_DATA_DIR": data,
            "EVOLINK_MCP_OUTPUT_DIR": str(output),
        },
    )
    bar = _ProgressBar(report)

    async def show(progress: float, total: float | None, message: str | None) -> None:
        bar.show(progress, message or "")

    try:
        async with Client(server) as client:
            return await client.call_tool("generate_image", {"prompt": prompt, **SIZE}, progress_callback=show)
    finally:  # after Ctrl-C too, so that the prompt of the terminal is on a new line
        bar.end()


def _report_result(answer: CallToolResult, duration_s: float, report: Callable[..., None]) -> int:
    facts = as_dict(answer.structured_content)
    images = [image for image in map(as_dict, as_list(facts.get("images"))) if image["path"]]
    if answer.is_error or not images:
        report(next(block.text for block in answer.content if isinstance(block, TextContent)))
        return 1
    for image in images:
        report(f"\n  {image['path']}")
        report(f"  {image['width']} × {image['height']} pixels, {image['bytes']:,} bytes, {image['mime_type']}")
    price = f"about {facts['credits']:g} credits (${facts['usd']:.3f})"
    report(f"\nDone in {duration_s:.1f} s. At EvoLink the same call costs {price} and takes 10 to 130 s.")
    report("The image is simulated. It is saved in a separate folder. Next step:")
    report("  evolink-mcp install    adds the server to the configuration of your MCP hosts")
    return 0


def _can_print(characters: str) -> bool:
    """Whether the console has these characters: cp1252 has no blocks."""
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


class _ProgressBar:
    """A progress bar in a terminal. Without a terminal, one line per new message."""

    def __init__(self, report: Callable[..., None]) -> None:
        self._report = report
        self._is_terminal = sys.stdout.isatty()
        self._full, self._empty = "█░" if _can_print("█░") else "#-"
        self._last_message = ""

    def show(self, percent: float, message: str) -> None:
        filled = round(BAR_WIDTH * percent / 100)
        line = f"  [{self._full * filled}{self._empty * (BAR_WIDTH - filled)}] {percent:3.0f} %  {message}"
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            self._report("\r" + line[:width].ljust(width), end="", flush=True)
        elif message != self._last_message:
            self._report(line, flush=True)
        self._last_message = message

    def end(self) -> None:
        if self._is_terminal:
            self._report()
